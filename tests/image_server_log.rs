//! What the image server logs: each step with its public names, never a ticket's id.

#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, fail by panic")]

mod image_server_rig;
mod nbd_qemu_rig;

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use image_server_rig::{Server, stock_download, within};
use nbd_qemu_rig::{QemuNbd, path, qcow2_with_bitmap, run};
use virtmark::imageio::{Access, End};

/// How long a line may take to be logged.
const BOUND: Duration = Duration::from_secs(10);

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// Lines at INFO that say `what`.
    fn lines(&self, what: &str) -> Vec<String> {
        self.text()
            .lines()
            .filter(|line| line.contains(" INFO ") && line.contains(what))
            .map(str::to_owned)
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_step_is_logged_without_the_secret() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .init();
    let directory = tempfile::tempdir().unwrap();
    let (_, nbd) = qcow2_with_bitmap(directory.path());
    let server = Server::start(directory.path()).await;
    let size = (64 << 20) + 512;
    let (id, _) = server.ticket("t1", &nbd.export(Some("b0")), size);

    let mut raw = server.connect().await;
    for request in [
        format!("OPTIONS /images/{id} HTTP/1.1\r\n\r\n"),
        format!("GET /images/{id}/extents HTTP/1.1\r\n\r\n"),
        format!("GET /images/{id} HTTP/1.1\r\nrange: bytes=0-1048575\r\n\r\n"),
        format!("GET /images/{id} HTTP/1.1\r\nrange: bytes=-1\r\n\r\n"),
        format!("POST /images/{id}/x HTTP/1.1\r\n\r\n"),
    ] {
        raw.send(&request).await;
        raw.response().await.unwrap();
    }
    drop(raw);
    let closed = || log.lines(": CLOSE ").len() + log.lines(" CLOSE ").len() > 0;
    within(BOUND, "the connection to be logged as closed", closed).await;

    // The stock client changes over to the unix socket by itself when the server is on its own host.
    for (host, socket) in [("127.0.0.2", false), ("127.0.0.1", true)] {
        let before = log.lines(" CLOSE ").len();
        let url = format!("https://{host}:{}/images/{id}", server.port);
        stock_download(url, &directory.path().join(host), &server.ca, None).await;
        let read = || -> Vec<String> {
            let lines = log.lines(" CLOSE ").split_off(before);
            lines.into_iter().filter(|line| !line.contains("read_ops=0")).collect()
        };
        within(BOUND, "four workers to be logged", || read().len() >= 4).await;
        assert!(read().iter().all(|line| line.contains("client=\"unix\"") == socket), "{:?}", read());
    }

    drop(nbd);
    let failed = server.ask(&format!("GET /images/{id} HTTP/1.1\r\n\r\n")).await;
    assert_eq!(failed.status, 500);
    server.tickets.end("t1", End::Removed);
    server.ask(&format!("GET /images/{id} HTTP/1.1\r\n\r\n")).await;

    for what in [" ADD ", " REMOVE ", " EXTENTS ", " OPEN ", " CLOSE "] {
        let lines = log.lines(what);
        assert!(!lines.is_empty(), "{what}: {}", log.text());
        for name in ["backup=\"b1\"", "transfer=\"t1\"", "disk=\"vda\""] {
            assert!(lines.iter().all(|line| line.contains(name)), "{lines:?}");
        }
    }
    let close = &log.lines(" CLOSE ")[0];
    println!("{close}");
    for count in ["requests=5", "refused=2", "read_ops=1", "read_bytes=1048576", "extents_ops=1"] {
        assert!(close.contains(count), "{close}");
    }
    let writer = writes(&log, &server, directory.path()).await;
    for id in [id, writer] {
        assert!(!log.text().contains(&id[..8]), "{}", log.text());
    }
}

/// Writes in every way, the last of them to a storage that is gone; the ticket's id.
async fn writes(log: &Log, server: &Server, directory: &Path) -> String {
    let image = directory.join("target.raw");
    run("qemu-img", &["create", "-q", "-f", "raw", path(&image), "1M"]);
    let nbd = QemuNbd::writable(directory, &["--format=raw", path(&image)]);
    let (id, _) = server.permit("t2", &nbd.export(None), 1 << 20, Access::Write { sparse: true });
    let ask = |line: &str, body: &str| {
        format!("{line} HTTP/1.1\r\ncontent-length: {}\r\n\r\n{body}", body.len()).replace("ID", &id)
    };
    let mut raw = server.connect().await;
    for (request, status) in [
        (ask("PUT /images/ID?flush=n", "abc"), 200),
        (ask("PATCH /images/ID", r#"{"op": "zero", "size": 4096}"#), 200),
        (ask("PATCH /images/ID", r#"{"op": "flush"}"#), 200),
        (ask("PATCH /images/ID", r#"{"op": "zero", "size": 9999999}"#), 416),
    ] {
        raw.send(&request).await;
        assert_eq!(raw.response().await.unwrap().status, status, "{request}");
    }
    drop(raw);
    let close = || log.lines(" CLOSE ").into_iter().find(|line| line.contains("transfer=\"t2\""));
    within(BOUND, "the writer to be logged as closed", || close().is_some()).await;
    let close = close().unwrap();
    println!("{close}");
    for count in [
        "requests=4",
        "refused=1",
        "write_ops=1",
        "write_bytes=3",
        "zero_ops=1",
        "zero_bytes=4096",
        "flush_ops=1",
    ] {
        assert!(close.contains(count), "{close}");
    }
    drop(nbd);
    assert_eq!(server.ask(&ask("PUT /images/ID", "abc")).await.status, 500);
    assert!(log.text().contains("nothing more is written"));
    id
}
