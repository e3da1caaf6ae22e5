//! The servers under comparison: the stock daemon, ours, and whichever one a vendor names.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;
use virtmark::imageio::{Access, Coverage, End, SharedCoverage, Ticket, TicketId, tls};

use crate::exchange::Endpoint;
use crate::image_server_rig::{Server, python};
use crate::nbd_qemu_rig::{Process, path, wait};
use crate::world::{Permit, State, World};

/// A server that has the tickets of a world; stopped when dropped.
pub(crate) struct Running {
    pub(crate) endpoint: Endpoint,
    _kept: Box<dyn std::any::Any + Send + Sync>,
}

/// The stock daemon.
pub(crate) fn stock(world: &World) -> Running {
    let directory = world.directory.path().join("stock");
    std::fs::create_dir_all(directory.join("conf.d")).unwrap();
    let (local, control) = (directory.join("images.sock"), directory.join("control.sock"));
    let made = tls::self_signed(&["localhost".to_owned()], &[]).unwrap();
    let pem = |name: &str, text: &str| {
        let file = directory.join(name);
        std::fs::write(&file, text).unwrap();
        file
    };
    let (ca, cert) = (pem("ca.pem", &made.ca_pem), pem("cert.pem", &made.cert_pem));
    let key = pem("key.pem", &made.key_pem);
    let settings = [
        (
            "daemon",
            vec!["poll_interval = 0.1", "drop_privileges = false", "systemd_enable = false"],
            vec![("run_dir", &directory)],
        ),
        ("tls", vec![], vec![("key_file", &key), ("cert_file", &cert), ("ca_file", &ca)]),
        ("remote", vec!["host = 127.0.0.1", "port = 0"], vec![]),
        ("local", vec![], vec![("socket", &local)]),
        ("control", vec!["transport = unix", "remove_timeout = 1"], vec![("socket", &control)]),
        ("handlers", vec!["keys = stderr"], vec![]),
        ("logger_root", vec!["handlers = stderr"], vec![]),
    ];
    let mut text = String::new();
    for (section, lines, paths) in settings {
        text += &format!("[{section}]\n");
        lines.iter().for_each(|line| text += &format!("{line}\n"));
        paths.iter().for_each(|(key, file)| text += &format!("{key} = {}\n", path(file)));
    }
    std::fs::write(directory.join("conf.d/50-test.conf"), text).unwrap();
    let log = directory.join("log");
    let program = "from ovirt_imageio._internal import server; server.main()";
    let child = Command::new(python())
        .args(["-c", program, "--conf-dir", path(&directory)])
        .stdin(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .expect("the stock daemon starts");
    let process = Process(child);
    wait("the stock daemon to be ready", || read(&log).contains("Ready for requests"));
    let said = read(&log);
    let port = said.split_once("remote.service listening on ('127.0.0.1', ").unwrap().1;
    let port = port.split_once(')').unwrap().0;
    let endpoint =
        Endpoint { tls: Some((format!("localhost:{port}"), trust(&ca))), unix: Some(local.clone()) };
    let stuck: Vec<_> = world.permits.iter().filter_map(|permit| add(permit, &control, &local)).collect();
    Running { endpoint, _kept: Box::new((process, stuck)) }
}

/// Gives the stock daemon a ticket. A canceled one stays known as long as an operation runs: of a client that does not
/// read on, which is handed back.
fn add(permit: &Permit, control: &Path, local: &Path) -> Option<UnixStream> {
    let (id, timeout) = (&permit.uuid, if permit.state == State::Expired { 0 } else { permit.timeout });
    let ticket = serde_json::to_string(&Permit { timeout, ..permit.clone() }).unwrap();
    assert_eq!(ask(control, &format!("PUT /tickets/{id}"), &ticket), 200);
    let delete = || ask(control, &format!("DELETE /tickets/{id}"), "");
    match permit.state {
        State::Valid | State::Expired => None,
        State::Removed => {
            assert_eq!(delete(), 204);
            None
        }
        State::Canceled => {
            let mut stuck = UnixStream::connect(local).unwrap();
            stuck.write_all(format!("GET /images/{id} HTTP/1.1\r\n\r\n").as_bytes()).unwrap();
            stuck.read_exact(&mut [0; 64]).unwrap();
            assert_eq!(delete(), 409, "an operation runs still");
            Some(stuck)
        }
    }
}

/// One request to a unix socket; its status.
fn ask(socket: &Path, line: &str, body: &str) -> u16 {
    let mut stream = UnixStream::connect(socket).unwrap();
    let length = body.len();
    let request = format!("{line} HTTP/1.1\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Ours.
pub(crate) fn ours(world: &World) -> Running {
    let directory = world.directory.path().join("ours");
    std::fs::create_dir_all(&directory).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(Server::start(&directory));
    for permit in &world.others {
        let writes = permit.ops.contains(&"write");
        let access = if writes { Access::Write { sparse: permit.sparse } } else { Access::Read };
        let ticket = Ticket {
            access,
            id: TicketId::parse(&permit.uuid).unwrap(),
            transfer: permit.transfer_id.clone(),
            backup: "b1".to_owned(),
            disk: "vda".to_owned(),
            size: permit.size,
            export: permit.export.clone(),
            dirty: permit.dirty,
            filename: permit.filename.map(str::to_owned),
        };
        server.tickets.add(ticket, SharedCoverage::new(Coverage::new(permit.size)));
        match permit.state {
            State::Valid => {}
            State::Canceled => server.tickets.end(&permit.transfer_id, End::Canceled),
            State::Removed => server.tickets.end(&permit.transfer_id, End::Removed),
            State::Expired => server.tickets.end(&permit.transfer_id, End::Paused),
        }
    }
    let endpoint = Endpoint {
        tls: Some((format!("localhost:{}", server.port), trust(&server.ca))),
        unix: Some(server.socket.clone()),
    };
    Running { endpoint, _kept: Box::new((server, runtime)) }
}

/// What a vendor's program says of its server.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Told {
    url: Option<String>,
    unix_socket: Option<PathBuf>,
    ca: Option<PathBuf>,
}

/// The server that a vendor's program runs, a command of the shell: it is given a file of tickets, says in one line of
/// JSON where it serves, and serves until its standard input ends.
pub(crate) fn vendor(program: &str, world: &World) -> Running {
    let tickets = world.directory.path().join("tickets.json");
    std::fs::write(&tickets, serde_json::to_vec_pretty(&world.others).unwrap()).unwrap();
    let mut child = Command::new("sh")
        .args(["-c", &format!("exec {program} \"$0\""), path(&tickets)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let kept = Vendor(child);
    let told: Told =
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{program} says {line:?}: {error}"));
    let tls = told.url.map(|url| {
        let address =
            url.strip_prefix("https://").expect("an https URL").split('/').next().unwrap().to_owned();
        (address, trust(&told.ca.expect("a CA for the URL")))
    });
    Running { endpoint: Endpoint { tls, unix: told.unix_socket }, _kept: Box::new(kept) }
}

struct Vendor(Child);

impl Drop for Vendor {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn read(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_default()
}

/// A client that trusts the CA in this file.
fn trust(ca: &Path) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(config.with_root_certificates(roots).with_no_client_auth())
}
