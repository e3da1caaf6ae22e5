//! An image server on real sockets in front of real qemu-nbds, and a client that speaks raw HTTP.
#![allow(dead_code, clippy::unwrap_used, reason = "a test rig, of which each test binary uses a part")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use virtmark::imageio::{
    Access, Config, Coverage, ImageServer, SharedCoverage, Ticket, TicketId, Tickets, tls,
};
use virtmark::nbd::Export;

/// Waits until `ready`, at most 20 s.
pub(crate) async fn until(what: &str, ready: impl Fn() -> bool) {
    within(Duration::from_secs(20), what, ready).await;
}

/// Waits until `ready`, at most so long.
pub(crate) async fn within(bound: Duration, what: &str, ready: impl Fn() -> bool) {
    let waited = async {
        while !ready() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(bound, waited)
        .await
        .unwrap_or_else(|_| panic!("waited {} s for {what}", bound.as_secs()));
}

/// A server; stops when dropped.
pub(crate) struct Server {
    pub(crate) tickets: Tickets,
    pub(crate) socket: PathBuf,
    pub(crate) ca: PathBuf,
    pub(crate) port: u16,
    pub(crate) tls: tls::Tls,
    _stop: tokio_util::sync::DropGuard,
}

impl Server {
    /// A server with its files in `directory`.
    pub(crate) async fn start(directory: &Path) -> Server {
        Server::with(directory, Config::default()).await
    }

    /// A server with other limits.
    pub(crate) async fn with(directory: &Path, limits: Config) -> Server {
        let loopback = ["127.0.0.1".parse().unwrap(), "127.0.0.2".parse().unwrap()];
        let made = tls::self_signed(&["localhost".to_owned()], &loopback).unwrap();
        let ca = directory.join("ca.pem");
        std::fs::write(&ca, &made.ca_pem).unwrap();
        let socket = directory.join("images.sock");
        let tls =
            tls::Tls::from(tls::server_config(made.cert_pem.as_bytes(), made.key_pem.as_bytes()).unwrap());
        let config = Config {
            addresses: vec!["0.0.0.0:0".parse().unwrap()],
            tls: Some(tls.clone()),
            unix_socket: Some(socket.clone()),
            ..limits
        };
        let tickets = Tickets::default();
        let server = ImageServer::bind(config, tickets.clone()).await.unwrap();
        let port = server.addresses()[0].port();
        let stop = CancellationToken::new();
        tokio::spawn(server.serve(stop.clone()));
        Server { tickets, socket, ca, port, tls, _stop: stop.drop_guard() }
    }

    /// A ticket to read a disk of `size` bytes; its id, and the disk's coverage.
    pub(crate) fn ticket(&self, transfer: &str, export: &Export, size: u64) -> (String, Arc<SharedCoverage>) {
        self.permit(transfer, export, size, Access::Read)
    }

    /// A ticket for what `access` says.
    pub(crate) fn permit(
        &self,
        transfer: &str,
        export: &Export,
        size: u64,
        access: Access,
    ) -> (String, Arc<SharedCoverage>) {
        let id = TicketId::random().unwrap();
        let coverage = SharedCoverage::new(Coverage::new(size));
        let ticket = Ticket {
            id: id.clone(),
            transfer: transfer.to_owned(),
            backup: "b1".to_owned(),
            disk: "vda".to_owned(),
            access,
            size,
            export: export.clone(),
            dirty: export.bitmap.is_some(),
            filename: None,
        };
        self.tickets.add(ticket, Arc::clone(&coverage));
        (id.expose(), coverage)
    }

    /// A raw connection to the unix socket.
    pub(crate) async fn connect(&self) -> Raw {
        Raw { stream: UnixStream::connect(&self.socket).await.unwrap(), input: Vec::new() }
    }

    /// One request on a connection of its own.
    pub(crate) async fn ask(&self, request: &str) -> Response {
        let mut raw = self.connect().await;
        raw.send(request).await;
        raw.response().await.expect("an answer")
    }
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
    /// The body came as whole as its head announced.
    pub(crate) whole: bool,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// A connection that speaks raw HTTP.
pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    input: Vec<u8>,
}

impl Raw {
    pub(crate) async fn send(&mut self, request: &str) {
        self.stream.write_all(request.as_bytes()).await.unwrap();
    }

    /// Receives more; false at the end.
    async fn more(&mut self) -> bool {
        let received =
            tokio::time::timeout(Duration::from_secs(20), self.stream.read_buf(&mut self.input)).await;
        matches!(received.expect("bytes or the end within 20 s"), Ok(bytes) if bytes > 0)
    }

    /// True when the server closes the connection without saying more.
    pub(crate) async fn closed(&mut self) -> bool {
        self.input.is_empty() && !self.more().await
    }

    /// The head of an answer; `None` when the connection ends before it.
    pub(crate) async fn head(&mut self) -> Option<Response> {
        let end = loop {
            if let Some(end) = self.input.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                break end;
            }
            if !self.more().await {
                return None;
            }
        };
        let head = String::from_utf8(self.input.drain(..end + 4).collect()).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Some(Response { status, head, body: Vec::new(), whole: false })
    }

    /// A whole answer, or as much of it as came before the end.
    pub(crate) async fn response(&mut self) -> Option<Response> {
        let mut response = self.head().await?;
        if response.header("transfer-encoding") == Some("chunked") {
            response.whole = self.chunks(&mut response.body).await.is_some();
        } else if let Some(length) = response.header("content-length") {
            let length: usize = length.parse().unwrap();
            while self.input.len() < length && self.more().await {}
            response.whole = self.input.len() >= length;
            response.body = self.input.drain(..length.min(self.input.len())).collect();
        } else {
            while self.more().await {}
            response.body = std::mem::take(&mut self.input);
        }
        Some(response)
    }

    async fn chunks(&mut self, body: &mut Vec<u8>) -> Option<()> {
        loop {
            let line = loop {
                if let Some(end) = self.input.windows(2).position(|bytes| bytes == b"\r\n") {
                    break self.input.drain(..end + 2).collect::<Vec<u8>>();
                }
                self.more().await.then_some(())?;
            };
            let length = usize::from_str_radix(std::str::from_utf8(&line).unwrap().trim(), 16).unwrap();
            while self.input.len() < length + 2 {
                self.more().await.then_some(())?;
            }
            body.extend(self.input.drain(..length));
            self.input.drain(..2);
            if length == 0 {
                return Some(());
            }
        }
    }
}

/// A python with ovirt-imageio 2.5.1.
pub(crate) fn python() -> PathBuf {
    if let Some(python) = std::env::var_os("VIRTMARK_PYTHON") {
        return python.into();
    }
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("virtmark");
    let entries = std::fs::read_dir(&cache).into_iter().flatten().flatten();
    let venvs = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("venv-"));
    let python = venvs.map(|entry| entry.path().join("bin/python")).filter(|python| python.exists());
    let newest = python.max_by_key(|python| python.symlink_metadata().and_then(|data| data.modified()).ok());
    newest.expect("no python with ovirt-imageio: run `make test`, or set VIRTMARK_PYTHON")
}

const DOWNLOAD: &str = "
import sys
from ovirt_imageio import client
url, target, ca, incremental, backing = sys.argv[1:]
client.download(url, target, ca, fmt='qcow2', max_workers=4, incremental=incremental == 'y',
                backing_file=backing or None, backing_format='qcow2' if backing else None)
";

const UPLOAD: &str = "
import sys
from ovirt_imageio import client
url, source, ca, workers = sys.argv[1:]
client.upload(source, url, ca, max_workers=int(workers))
";

/// Uploads an image of any format with the stock client, over so many connections.
pub(crate) async fn stock_upload(url: String, source: &Path, ca: &Path, workers: u32) {
    let path = super::nbd_qemu_rig::path;
    let arguments = ["-c", UPLOAD, &url, path(source), path(ca), &workers.to_string()].map(str::to_owned);
    let client = tokio::task::spawn_blocking(move || {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        super::nbd_qemu_rig::run(super::nbd_qemu_rig::path(&python()), &arguments);
    });
    client.await.unwrap();
}

/// Downloads with the stock client into a new qcow2, as an incremental onto `backing` when there is one.
pub(crate) async fn stock_download(url: String, target: &Path, ca: &Path, backing: Option<&Path>) {
    let incremental = if backing.is_some() { "y" } else { "n" };
    let backing = backing.map_or("", super::nbd_qemu_rig::path).to_owned();
    let arguments = [
        "-c",
        DOWNLOAD,
        &url,
        super::nbd_qemu_rig::path(target),
        super::nbd_qemu_rig::path(ca),
        incremental,
        &backing,
    ]
    .map(str::to_owned);
    let client = tokio::task::spawn_blocking(move || {
        super::nbd_qemu_rig::run(
            super::nbd_qemu_rig::path(&python()),
            &arguments.iter().map(String::as_str).collect::<Vec<_>>(),
        );
    });
    client.await.unwrap();
}
