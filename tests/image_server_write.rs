//! The image server's writes before a real qemu-nbd: what the storage has after them, when it stalls, dies or a ticket ends,
//! and the stock `ovirt_imageio` client that uploads. What is answered to which request is in `tests/conformance`.

#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, fail by panic")]

mod image_server_rig;
mod nbd_qemu_rig;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use image_server_rig::{Raw, Server, stock_upload, until};
use nbd_qemu_rig::{QemuNbd, path, qcow2_with_bitmap, run};
use tokio::io::AsyncWriteExt as _;
use virtmark::imageio::{Access, Drained, End};

const SIZE: u64 = (64 << 20) + 512;
const WRITES: Access = Access::Write { sparse: false };

/// A disk full of old bytes, and its server.
fn target(directory: &Path, format: &str) -> (PathBuf, QemuNbd) {
    let image = directory.join(format!("target.{format}"));
    let _ = std::fs::remove_file(&image);
    run("qemu-img", &["create", "-q", "-f", format, path(&image), &SIZE.to_string()]);
    run("qemu-io", &["-f", format, "-c", &format!("write -P 238 0 {SIZE}"), path(&image)]);
    let nbd = QemuNbd::writable(directory, &["--format", format, path(&image)]);
    (image, nbd)
}

async fn put(raw: &mut Raw, id: &str, offset: u64, body: &str) -> u16 {
    let length = body.len();
    let head = format!(
        "PUT /images/{id}?flush=n HTTP/1.1\r\ncontent-length: {length}\r\ncontent-range: bytes {offset}-*/*"
    );
    raw.send(&format!("{head}\r\n\r\n{body}")).await;
    raw.response().await.expect("an answer").status
}

fn signal(nbd: &QemuNbd, name: &str) {
    run("kill", &["-s", name, &nbd.process.0.id().to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stock_client_uploads_what_it_has() {
    let directory = tempfile::tempdir().unwrap();
    let (qcow2, reader) = qcow2_with_bitmap(directory.path());
    drop(reader);
    let raw = directory.path().join("source.raw");
    run("qemu-img", &["convert", "-O", "raw", path(&qcow2), path(&raw)]);
    let server = Server::start(directory.path()).await;
    // from 127.0.0.1 it changes over to the unix socket, from 127.0.0.2 it stays on TLS
    for (at, (source, from, into, host, workers, sparse)) in [
        (&raw, "raw", "raw", "127.0.0.2", 1, false),
        (&raw, "raw", "qcow2", "127.0.0.1", 4, true),
        (&qcow2, "qcow2", "raw", "127.0.0.1", 4, true),
        (&qcow2, "qcow2", "qcow2", "127.0.0.2", 4, false),
        (&qcow2, "qcow2", "qcow2", "127.0.0.1", 8, true),
    ]
    .into_iter()
    .enumerate()
    {
        let (image, nbd) = target(directory.path(), into);
        let transfer = format!("t{at}");
        let access = Access::Write { sparse };
        let (id, coverage) = server.permit(&transfer, &nbd.export(None), SIZE, access);
        let url = format!("https://{host}:{}/images/{id}", server.port);
        stock_upload(url, source, &server.ca, workers).await;
        assert_eq!(coverage.transferred(), SIZE);
        // killed: what was flushed is there nevertheless
        drop(nbd);
        run("qemu-img", &["compare", "-q", "-f", from, "-F", into, path(source), path(&image)]);
        let allocated = std::fs::metadata(&image).unwrap().blocks() * 512;
        let holes = allocated < SIZE / 2;
        assert!(into == "qcow2" || holes == sparse, "{allocated} bytes allocated, sparse: {sparse}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_that_stalls_holds_its_client_back() {
    let directory = tempfile::tempdir().unwrap();
    let (image, nbd) = target(directory.path(), "raw");
    let server = Server::start(directory.path()).await;
    let (id, coverage) = server.permit("t1", &nbd.export(None), SIZE, WRITES);
    let mut raw = server.connect().await;
    assert_eq!(put(&mut raw, &id, 0, "a").await, 200);
    assert_eq!(coverage.transferred(), 1);
    signal(&nbd, "STOP");
    let length = 48 << 20;
    raw.send(&format!("PUT /images/{id} HTTP/1.1\r\ncontent-length: {length}\r\n\r\n")).await;
    let body = vec![7; 1 << 20];
    let mut taken = 0;
    while let Ok(sent) = tokio::time::timeout(Duration::from_secs(1), raw.stream.write(&body)).await {
        taken += sent.unwrap();
        assert!(taken < 16 << 20, "{taken} bytes were taken, and the storage took none");
    }
    println!("{taken} bytes were taken");
    assert_eq!(coverage.transferred(), 1, "nothing counts that was not answered for");
    signal(&nbd, "CONT");
    while taken < length {
        let most = body.len().min(length - taken);
        taken += raw.stream.write(&body[..most]).await.unwrap();
    }
    assert_eq!(raw.response().await.unwrap().status, 200);
    assert_eq!(coverage.transferred(), length as u64);
    let bytes = std::fs::read(&image).unwrap();
    assert!(bytes[..length].iter().all(|byte| *byte == 7) && bytes[length..].iter().all(|byte| *byte == 238));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_after_the_operations_ended() {
    let directory = tempfile::tempdir().unwrap();
    let (image, nbd) = target(directory.path(), "raw");
    let server = Server::start(directory.path()).await;
    let (id, _) = server.permit("t1", &nbd.export(None), SIZE, WRITES);
    let mut raw = server.connect().await;
    let head = format!("PUT /images/{id} HTTP/1.1\r\ncontent-length: {SIZE}\r\n\r\n");
    raw.send(&head).await;
    raw.stream.write_all(&vec![7; 4 << 20]).await.unwrap();
    signal(&nbd, "STOP");
    let _ = tokio::time::timeout(Duration::from_millis(300), raw.stream.write_all(&vec![7; 4 << 20])).await;
    server.tickets.end("t1", End::Canceled);
    let quick = Duration::from_millis(300);
    assert_eq!(
        server.tickets.drained("t1", quick).await,
        Drained::Writing,
        "what is in flight may be written still"
    );
    signal(&nbd, "CONT");
    assert_eq!(server.tickets.drained("t1", Duration::from_secs(5)).await, Drained::Over);
    let then = std::fs::read(&image).unwrap();
    assert!(raw.closed().await, "the connection is cut");
    tokio::time::sleep(quick).await;
    assert!(std::fs::read(&image).unwrap() == then, "bytes came after the end");
    let refused = server.ask(&format!("PUT /images/{id} HTTP/1.1\r\ncontent-length: 0\r\n\r\n")).await;
    assert_eq!(refused.text(), "You are not allowed to access this resource: Transfer=t1 was canceled\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_that_dies_is_told_before_the_body_is_sent_to_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let (image, nbd) = target(directory.path(), "raw");
    let server = Server::start(directory.path()).await;
    let (id, _) = server.permit("t1", &nbd.export(None), SIZE, WRITES);
    let mut raw = server.connect().await;
    // what overlaps would wait for it
    let length = SIZE - 512;
    raw.send(&format!("PUT /images/{id} HTTP/1.1\r\ncontent-length: {length}\r\n\r\n")).await;
    raw.stream.write_all(&vec![7; 4 << 20]).await.unwrap();
    let mut kept = server.connect().await;
    assert_eq!(put(&mut kept, &id, SIZE - 3, "abc").await, 200);
    let socket = nbd.socket.clone();
    drop(nbd);
    // it may be refused in the middle of this
    let _ = raw.stream.write_all(&vec![7; 1 << 20]).await;
    let failed = raw.response().await.unwrap();
    assert_eq!((failed.status, failed.header("connection")), (500, Some("close")));
    assert_eq!(failed.text(), "Server failed to perform the request, check logs\n");
    until("the operation to end", || server.tickets.stats("t1").unwrap().active == 0).await;

    // its successor does not know what the first one was told and did not flush
    let again = QemuNbd::writable(directory.path(), &["--format=raw", path(&image)]);
    std::fs::rename(&again.socket, &socket).unwrap();
    let flush = format!("PATCH /images/{id} HTTP/1.1\r\ncontent-length: 15\r\n\r\n{{\"op\": \"flush\"}}");
    for status in [500, 200] {
        kept.send(&flush).await;
        assert_eq!(kept.response().await.unwrap().status, status);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let (image, nbd) = target(directory.path(), "raw");
    let server = Server::start(directory.path()).await;
    let (id, coverage) = server.permit("t1", &nbd.export(None), SIZE, WRITES);
    let before = std::fs::read(&image).unwrap();
    let mut raw = server.connect().await;
    let head = format!("content-length: {SIZE}\r\ncontent-range: bytes 1-*/*");
    raw.send(&format!("PUT /images/{id} HTTP/1.1\r\n{head}\r\n\r\n")).await;
    let _ = tokio::time::timeout(Duration::from_secs(1), raw.stream.write_all(&vec![7; 2 << 20])).await;
    let refused = raw.response().await.unwrap();
    assert_eq!((refused.status, refused.header("connection")), (416, Some("close")));
    assert_eq!(refused.header("content-range"), Some(&*format!("bytes */{SIZE}")));
    assert!(std::fs::read(&image).unwrap() == before && coverage.transferred() == 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_waits_for_the_go_ahead() {
    let directory = tempfile::tempdir().unwrap();
    let (image, nbd) = target(directory.path(), "qcow2");
    let source = directory.path().join("source");
    run("qemu-img", &["create", "-q", "-f", "raw", path(&source), &SIZE.to_string()]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 5 0 20M", "-c", "write -P 6 40M 1M", path(&source)]);
    let server = Server::start(directory.path()).await;
    let (id, coverage) = server.permit("t1", &nbd.export(None), SIZE, WRITES);
    let url = format!("https://localhost:{}/images/{id}", server.port);
    let arguments =
        ["-sS", "--fail", "--cacert", path(&server.ca), "-T", path(&source), &url].map(str::to_owned);
    let curl = tokio::task::spawn_blocking(move || {
        run("curl", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    });
    curl.await.unwrap();
    assert_eq!(coverage.transferred(), SIZE);
    drop(nbd);
    run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", path(&source), path(&image)]);
}
