//! An image server in front of one NBD export, without Kubernetes: for conformance runs, fuzzing and benches.
//!
//! `cargo run --example image_server -- --nbd /run/nbd.sock --export vda --dir /tmp/served` serves until it is
//! told to stop, and first prints one line of JSON: `{"url": ..., "unixSocket": ..., "ca": ...}`. The URL carries
//! the ticket. It is not part of Virtmark's deployment: the agent serves its own tickets.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Parser;
use virtmark::imageio::{
    Access, Config, Coverage, ImageServer, SharedCoverage, Ticket, TicketId, Tickets, tls,
};
use virtmark::nbd::{Client, Export};
use virtmark::telemetry;

#[derive(Parser)]
struct Arguments {
    /// Path of the NBD server's unix socket.
    #[arg(long)]
    nbd: PathBuf,
    /// Name of the export.
    #[arg(long, default_value = "")]
    export: String,
    /// Dirty bitmap context of the export, `qemu:dirty-bitmap:NAME`.
    #[arg(long)]
    bitmap: Option<String>,
    /// Where to put the unix socket and the CA.
    #[arg(long)]
    dir: PathBuf,
    /// Where to listen for HTTPS.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The ticket's id, 32 hex digits with or without dashes; random when none is given.
    #[arg(long)]
    ticket: Option<String>,
    /// The ticket permits to write too; what is made zero may become a hole.
    #[arg(long)]
    write: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    telemetry::install_crypto();
    let export = Export {
        socket: arguments.nbd,
        name: arguments.export,
        bitmap: arguments.bitmap,
        changed_from: None,
    };
    let client = Client::connect(&export).await.context("the NBD export")?;
    let size = client.size();
    client.disconnect().await?;

    let made = tls::self_signed(&["localhost".to_owned()], &[arguments.listen.ip()])?;
    let (ca, unix_socket) = (arguments.dir.join("ca.pem"), arguments.dir.join("images.sock"));
    std::fs::create_dir_all(&arguments.dir)?;
    std::fs::write(&ca, &made.ca_pem)?;
    let config = Config {
        addresses: vec![arguments.listen],
        tls: Some(tls::server_config(made.cert_pem.as_bytes(), made.key_pem.as_bytes())?.into()),
        unix_socket: Some(unix_socket.clone()),
        ..Config::default()
    };
    let tickets = Tickets::default();
    let server = ImageServer::bind(config, tickets.clone()).await?;
    let id = match &arguments.ticket {
        Some(text) => TicketId::parse(text)?,
        None => TicketId::random()?,
    };
    let address = server.addresses().first().copied().context("no address")?;
    let told = serde_json::json!({
        "url": format!("https://{address}/images/{}", id.expose()),
        "unixSocket": unix_socket,
        "ca": ca,
        "size": size,
    });
    let ticket = Ticket {
        id,
        transfer: "transfer".to_owned(),
        backup: "backup".to_owned(),
        disk: "disk".to_owned(),
        access: if arguments.write { Access::Write { sparse: true } } else { Access::Read },
        size,
        dirty: export.bitmap.is_some(),
        export,
        filename: None,
    };
    tickets.add(ticket, SharedCoverage::new(Coverage::new(size)));
    println!("{told}");
    server.serve(telemetry::stop_on_signal()?).await;
    Ok(())
}
