//! What the cases need: images on a tmpfs, `qemu-nbd`s, and both servers over the same exports.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark::imageio::{TicketId, tls::self_signed};

use super::client::Way;
use super::{image, tls};

/// Not the address that a client on this host connects from: the stock client would change over to the unix
/// socket.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// Time for a server to answer.
const STARTS: Duration = Duration::from_secs(30);

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Pieces of data of the raw image, each with a hole as long behind it.
    pub(crate) pieces: u64,
    /// Bytes of a piece.
    pub(crate) piece: u64,
    /// Extents of the qcow2 image.
    pub(crate) extents: u64,
    /// How long small requests are made.
    pub(crate) small: Duration,
}

impl Size {
    /// Bytes of data.
    pub(crate) fn data(&self) -> u64 {
        self.pieces * self.piece
    }
}

/// Everything that runs.
pub(crate) struct Stage {
    pub(crate) size: Size,
    /// Of the raw image.
    pub(crate) data: Vec<Range<u64>>,
    pub(crate) raw: Disk,
    pub(crate) alternating: Disk,
    pub(crate) python: PathBuf,
    /// Where downloads go.
    pub(crate) target: PathBuf,
}

/// One export, and both servers before it.
pub(crate) struct Disk {
    pub(crate) nbd: Process,
    pub(crate) socket: PathBuf,
    pub(crate) ours: Server,
    pub(crate) peer: Server,
}

/// A server of images.
pub(crate) struct Server {
    pub(crate) process: Process,
    pub(crate) https: Way,
    pub(crate) unix: Way,
    /// With the ticket.
    pub(crate) path: String,
    pub(crate) url: String,
    pub(crate) ca: PathBuf,
}

/// A process that is killed with its handle.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Stage {
    /// Makes the images in `dir` and starts everything.
    pub(crate) fn set(dir: &Path, size: Size, ours: &Path, python: PathBuf) -> Result<Stage> {
        let (raw, alternating) = (dir.join("disk.raw"), dir.join("alternating.qcow2"));
        let data = image::raw(&raw, size.pieces, size.piece)?;
        image::alternating(&alternating, size.extents)?;
        let raw_bytes = 2 * size.data();
        let disk = |name: &str, arguments: &[&str], bytes| {
            Disk::start(&dir.join(name), arguments, bytes, ours, &python)
        };
        Ok(Stage {
            size,
            data,
            raw: disk("raw", &["--format=raw", text(&raw)?], raw_bytes).context("the raw disk")?,
            alternating: disk(
                "alternating",
                &["--format=qcow2", "--allocation-depth", text(&alternating)?],
                size.extents * (64 << 10),
            )
            .context("the qcow2 disk")?,
            python,
            target: dir.join("download.raw"),
        })
    }
}

impl Disk {
    fn start(dir: &Path, arguments: &[&str], bytes: u64, ours: &Path, python: &Path) -> Result<Disk> {
        fs::create_dir(dir)?;
        let socket = dir.join("nbd.sock");
        let nbd = Command::new("qemu-nbd")
            .args(["--read-only", "--persistent", "--shared=16", "--cache=writeback", "--aio=threads"])
            .args(["--socket", text(&socket)?])
            .args(arguments)
            .stdin(Stdio::null())
            .spawn();
        let nbd = Process(nbd.context("qemu-nbd")?);
        answers(|| UnixStream::connect(&socket).is_ok()).context("qemu-nbd")?;
        let ours = Server::ours(ours, &socket, &dir.join("ours")).context("our image server")?;
        let peer =
            Server::peer(python, &socket, bytes, &dir.join("peer")).context("the stock ovirt-imageio")?;
        Ok(Disk { nbd, socket, ours, peer })
    }
}

impl Server {
    fn ours(program: &Path, nbd: &Path, dir: &Path) -> Result<Server> {
        let child = Command::new(program)
            .args(["--nbd", text(nbd)?, "--dir", text(dir)?, "--listen", &format!("{ADDRESS}:0")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = child.with_context(|| program.display().to_string())?;
        let out = child.stdout.take();
        let process = Process(child);
        let mut line = String::new();
        BufReader::new(out.context("no output")?).read_line(&mut line)?;
        let told: Value = serde_json::from_str(&line)?;
        let field = |name: &str| told[name].as_str().map(str::to_owned).with_context(|| name.to_owned());
        Server::at(process, field("url")?, field("unixSocket")?.into(), field("ca")?.into())
    }

    fn peer(python: &Path, nbd: &Path, bytes: u64, dir: &Path) -> Result<Server> {
        fs::create_dir_all(dir.join("conf.d"))?;
        let made = self_signed(&["localhost".to_owned()], &[ADDRESS.into()])?;
        let (ca, cert, key) = (dir.join("ca.pem"), dir.join("cert.pem"), dir.join("key.pem"));
        fs::write(&ca, &made.ca_pem)?;
        fs::write(&cert, &made.cert_pem)?;
        fs::write(&key, &made.key_pem)?;
        let socket = dir.join("images.sock");
        // Free now, and nobody else is in a hurry for it: the daemon does not tell which one it took.
        let port = TcpListener::bind((ADDRESS, 0))?.local_addr()?.port();
        let dir_text = text(dir)?;
        let configuration = format!(
            "[daemon]\nsystemd_enable = false\ndrop_privileges = false\nrun_dir = {dir_text}\n\
             [tls]\ncert_file = {}\nkey_file = {}\n\
             [remote]\nhost = {ADDRESS}\nport = {port}\n[local]\nsocket = {}\n[control]\nenable = false\n\
             [handler_logfile]\nargs = (\"{dir_text}/daemon.log\",)\n",
            text(&cert)?,
            text(&key)?,
            text(&socket)?,
        );
        fs::write(dir.join("conf.d/bench.conf"), configuration)?;
        let id = TicketId::random()?.expose();
        let ticket = json!({
            "uuid": id, "size": bytes, "ops": ["read"], "timeout": 86400, "inactivity_timeout": 86400,
            "url": format!("nbd:unix:{}", text(nbd)?), "transfer_id": "bench",
        });
        fs::write(dir.join("ticket"), ticket.to_string())?;
        let daemon = python.with_file_name("ovirt-imageio");
        let child = Command::new(&daemon)
            .args(["--conf-dir", dir_text, "--ticket", text(&dir.join("ticket"))?])
            .stdin(Stdio::null())
            .spawn();
        let process = Process(child.with_context(|| daemon.display().to_string())?);
        let address = SocketAddr::from((ADDRESS, port));
        answers(|| TcpStream::connect(address).is_ok() && UnixStream::connect(&socket).is_ok())
            .with_context(|| fs::read_to_string(dir.join("daemon.log")).unwrap_or_default())?;
        Server::at(process, format!("https://{address}/images/{id}"), socket, ca)
    }

    fn at(process: Process, url: String, unix: PathBuf, ca: PathBuf) -> Result<Server> {
        let rest = url.strip_prefix("https://").and_then(|rest| rest.split_once('/'));
        let (address, path) = rest.context("not an https URL")?;
        let https = Way::Https(address.parse()?, tls::trust(&fs::read(&ca)?)?);
        Ok(Server { process, https, unix: Way::Unix(unix), path: format!("/{path}"), url, ca })
    }
}

/// The path as text, for a command line.
pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

fn answers(mut ready: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + STARTS;
    while !ready() {
        ensure!(Instant::now() < deadline, "no answer for {} s", STARTS.as_secs());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
