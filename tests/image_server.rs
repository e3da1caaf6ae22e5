//! The image server before a real qemu-nbd: raw HTTP on its unix socket, curl and the stock
//! `ovirt_imageio` client over TLS.

#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, fail by panic")]

mod image_server_rig;
mod nbd_qemu_rig;

use std::time::Duration;

use image_server_rig::{Server, stock_download};
use nbd_qemu_rig::{QemuNbd, path, qcow2_with_bitmap, raw, run};
use tokio::io::AsyncReadExt;
use virtmark::imageio::{Config, End, missing};

const SIZE: u64 = (64 << 20) + 512;

/// Waits until `ready`, at most 20 s.
async fn until(what: &str, ready: impl Fn() -> bool) {
    let waited = async {
        while !ready() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waited)
        .await
        .unwrap_or_else(|_| panic!("waited 20 s for {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_has_its_status() {
    let directory = tempfile::tempdir().unwrap();
    let (_, nbd) = qcow2_with_bitmap(directory.path());
    let server = Server::start(directory.path()).await;
    let (id, _) = server.ticket("t1", &nbd.export(Some("b0")), SIZE);
    let (full, _) = server.ticket("t2", &nbd.export(None), SIZE);
    let (gone, _) = server.ticket("t3", &nbd.export(None), SIZE);
    server.tickets.end("t3", End::Canceled);
    let long = "x".repeat(5000);
    let huge = "x".repeat(40_000);
    let many: String = (0..100).map(|n| format!("h{n}: v\r\n")).collect();
    let cases = [
        (format!("OPTIONS /images/{id} HTTP/1.1\r\n\r\n"), 200, "\"features\":[\"extents\"]"),
        ("OPTIONS /images/* HTTP/1.1\r\n\r\n".to_owned(), 200, "extents"),
        (format!("OPTIONS /images/{id}x HTTP/1.1\r\n\r\n"), 403, "No such ticket"),
        ("GET /info/ HTTP/1.1\r\n\r\n".to_owned(), 200, "version"),
        ("GET /info HTTP/1.1\r\n\r\n".to_owned(), 404, "No handler"),
        (format!("GET /images/{id}/ HTTP/1.1\r\n\r\n"), 404, "No handler"),
        (format!("GET /images/{id}/checksum HTTP/1.1\r\n\r\n"), 404, "Checksum"),
        (format!("GET /images/{gone} HTTP/1.1\r\n\r\n"), 403, "Transfer=t3 was canceled"),
        ("GET /images/no HTTP/1.1\r\n\r\n".to_owned(), 403, "No such ticket no"),
        ("GET /images/no HTTP/1.1\r\nrange: bytes=1-2,3-4\r\n\r\n".to_owned(), 416, "range"),
        ("GET /images/no/extents?context=x HTTP/1.1\r\n\r\n".to_owned(), 403, "No such ticket"),
        (format!("GET /images/{id}/extents?context=x HTTP/1.1\r\n\r\n"), 400, "context"),
        (format!("GET /images/{full}/extents?context=dirty HTTP/1.1\r\n\r\n"), 404, "does not support dirty"),
        (format!("GET /images/{id} HTTP/1.1\r\nrange: bytes=-5\r\n\r\n"), 416, "range"),
        (format!("GET /images/{id} HTTP/1.1\r\nrange: bytes=5-{SIZE}\r\n\r\n"), 416, "out of allowed range"),
        (format!("GET /images/{id} HTTP/1.1\r\nrange: bytes={SIZE}-\r\n\r\n"), 416, "out of allowed range"),
        (format!("GET /images/{id} HTTP/1.1\r\nrange: bytes=5-9\r\n\r\n"), 206, ""),
        (format!("POST /images/{id} HTTP/1.1\r\n\r\n"), 405, "not defined"),
        (format!("FOO /images/{id} HTTP/1.1\r\n\r\n"), 405, "Invalid method"),
        (format!("PUT /images/{id} HTTP/1.1\r\n\r\n"), 400, "Content-Length"),
        (
            format!("PUT /images/{id} HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc"),
            403,
            "Transfer=t1 forbids write",
        ),
        (format!("PUT /images/{id}?flush=x HTTP/1.1\r\ncontent-length: 0\r\n\r\n"), 400, "flush"),
        (format!("PATCH /images/{id} HTTP/1.1\r\ncontent-length: 2\r\n\r\n[]"), 400, "JSON"),
        (
            format!("PATCH /images/{id} HTTP/1.1\r\ncontent-length: 14\r\n\r\n{{\"op\":\"flush\"}}"),
            403,
            "forbids write",
        ),
        (format!("GET /images/{long} HTTP/1.1\r\n\r\n"), 414, "too long"),
        (format!("GET /images/{id} HTTP/1.1\r\nx: {huge}\r\n\r\n"), 431, ""),
        (format!("GET /images/{id} HTTP/1.1\r\n{many}\r\n"), 431, ""),
        ("nonsense\r\n\r\n".to_owned(), 400, ""),
        ("GET /images/no HTTP/9.9\r\n\r\n".to_owned(), 400, ""),
        ("GET /images/no HTTP/1.1\r\nbad header\r\n\r\n".to_owned(), 400, ""),
        ("PUT /images/no HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n".to_owned(), 400, ""),
    ];
    for (request, status, text) in &cases {
        let response = server.ask(request).await;
        let line = request.lines().next().unwrap();
        assert_eq!(response.status, *status, "{line}: {response:?}");
        assert!(response.whole || *status >= 400, "{line}");
        assert!(*status == 206 || response.text().contains(text), "{line}: {}", response.text());
        if response.status == 403 {
            assert_eq!(response.header("connection"), Some("close"), "{line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_serves_many_requests() {
    let directory = tempfile::tempdir().unwrap();
    let (image, nbd) = qcow2_with_bitmap(directory.path());
    let expected = raw(&image);
    let server = Server::start(directory.path()).await;
    let (id, _) = server.ticket("t1", &nbd.export(Some("b0")), SIZE);
    let mut raw = server.connect().await;

    raw.send(&format!("HEAD /images/{id} HTTP/1.1\r\n\r\n")).await;
    assert_eq!(raw.head().await.unwrap().status, 405);
    // Pipelined, and a refusal in between.
    let get = |range: &str| format!("GET /images/{id} HTTP/1.1\r\nrange: bytes={range}\r\n\r\n");
    raw.send(
        &[get("0-9"), get("x"), get("1048570-1200000"), format!("OPTIONS /images/{id} HTTP/1.1\r\n\r\n")]
            .concat(),
    )
    .await;
    let first = raw.response().await.unwrap();
    assert_eq!((first.status, first.body), (206, expected[..10].to_vec()));
    assert_eq!(raw.response().await.unwrap().status, 416);
    let second = raw.response().await.unwrap();
    assert_eq!(second.header("content-range"), Some(&*format!("bytes 1048570-1200000/{SIZE}")));
    assert!(second.body == expected[1_048_570..=1_200_000]);
    let options = raw.response().await.unwrap();
    let document: serde_json::Value = serde_json::from_slice(&options.body).unwrap();
    assert_eq!((document["size"].as_u64(), document["max_readers"].as_u64()), (Some(SIZE), Some(8)));
    assert_eq!(options.header("allow"), Some("OPTIONS,GET"));

    raw.send(&format!("GET /images/{id}/extents?context=dirty HTTP/1.1\r\n\r\n")).await;
    let extents = raw.response().await.unwrap();
    let list: Vec<serde_json::Value> = serde_json::from_slice(&extents.body).unwrap();
    let mut end = 0;
    for extent in &list {
        assert_eq!(extent["start"].as_u64(), Some(end));
        end += extent["length"].as_u64().unwrap();
    }
    assert_eq!(end, SIZE);
    assert!(list.iter().any(|extent| extent["dirty"] == true && extent["zero"] == true));

    raw.send(&format!("GET /images/{id}?close=y HTTP/1.1\r\n\r\n")).await;
    let whole = raw.response().await.unwrap();
    assert!(whole.status == 200 && whole.body == expected);
    assert!(raw.closed().await);

    let mut old = server.connect().await;
    old.send(&format!("GET /images/{id} HTTP/1.0\r\nconnection: keep-alive\r\nrange: bytes=0-0\r\n\r\n"))
        .await;
    assert_eq!(old.response().await.unwrap().body, expected[..1]);
    old.send(&format!("GET /images/{id} HTTP/1.0\r\nrange: bytes=1-1\r\n\r\n")).await;
    assert_eq!(old.response().await.unwrap().body, expected[1..2]);
    assert!(old.closed().await);
}

/// A body where none belongs ends the connection, so that it is never taken for a request.
#[tokio::test(flavor = "multi_thread")]
async fn unread_bodies_never_become_requests() {
    let directory = tempfile::tempdir().unwrap();
    let (_, nbd) = qcow2_with_bitmap(directory.path());
    let server = Server::start(directory.path()).await;
    let (id, _) = server.ticket("t1", &nbd.export(None), SIZE);
    let hidden = format!("GET /images/{id} HTTP/1.1\r\n\r\n");
    for method in ["GET", "PUT", "OPTIONS"] {
        let mut raw = server.connect().await;
        let length = hidden.len();
        raw.send(&format!(
            "{method} /images/{id} HTTP/1.1\r\nrange: bytes=0-9\r\ncontent-length: {length}\r\n\r\n{hidden}"
        ))
        .await;
        let response = raw.response().await.unwrap();
        assert_eq!(response.header("connection"), Some("close"), "{method}");
        assert!(raw.closed().await, "{method}");
    }
    // A client that sends all of a large body before it reads still gets the answer.
    let mut raw = server.connect().await;
    raw.send(&format!("PUT /images/{id} HTTP/1.1\r\ncontent-length: 8388608\r\n\r\n")).await;
    let body = vec![0; 8 << 20];
    tokio::io::AsyncWriteExt::write_all(&mut raw.stream, &body).await.unwrap();
    let response = raw.response().await.unwrap();
    assert_eq!(response.text(), "You are not allowed to access this resource: Transfer=t1 forbids write\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn coverage_counts_what_was_sent_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let (_, nbd) = qcow2_with_bitmap(directory.path());
    let server = Server::start(directory.path()).await;
    let export = nbd.export(None);
    let (id, coverage) = server.ticket("t1", &export, SIZE);
    let needed = missing(&export, &coverage).await.unwrap();
    assert!(needed > 3 << 20, "{needed}");

    // A client that takes a part of the answer and goes.
    let mut raw = server.connect().await;
    raw.send(&format!("GET /images/{id} HTTP/1.1\r\n\r\n")).await;
    raw.head().await.unwrap();
    let mut taken = vec![0; 1 << 20];
    raw.stream.read_exact(&mut taken).await.unwrap();
    assert_eq!(server.tickets.stats("t1").unwrap().active, 1);
    until("most of it to count as served", || coverage.transferred() >= 512 << 10).await;
    drop(raw);
    until("the operation to end", || server.tickets.stats("t1").unwrap().active == 0).await;
    let served = coverage.transferred();
    assert!((512 << 10..8 << 20).contains(&served), "{served}");

    let incremental = nbd.export(Some("b0"));
    let dirty = missing(&incremental, &coverage).await.unwrap();
    let whole = server.ask(&format!("GET /images/{id} HTTP/1.1\r\n\r\n")).await;
    assert!(whole.whole);
    until("the operation to end", || server.tickets.stats("t1").unwrap().active == 0).await;
    assert_eq!(coverage.transferred(), SIZE);
    assert_eq!(missing(&export, &coverage).await.unwrap(), 0);
    assert!(dirty > 0 && missing(&incremental, &coverage).await.unwrap() == 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canceled_ticket_cuts_its_streams_and_says_so_to_the_next_request() {
    let directory = tempfile::tempdir().unwrap();
    let (_, nbd) = qcow2_with_bitmap(directory.path());
    let server = Server::start(directory.path()).await;
    let (id, _) = server.ticket("t1", &nbd.export(None), SIZE);
    let mut idle = server.connect().await;
    idle.send(&format!("GET /images/{id} HTTP/1.1\r\nrange: bytes=0-9\r\n\r\n")).await;
    assert_eq!(idle.response().await.unwrap().status, 206);
    let mut busy = server.connect().await;
    busy.send(&format!("GET /images/{id} HTTP/1.1\r\n\r\n")).await;
    let head = busy.head().await.unwrap();
    assert_eq!(head.header("content-length"), Some(&*SIZE.to_string()));
    let stats = server.tickets.stats("t1").unwrap();
    assert_eq!((stats.active, stats.connections, stats.ever_used), (1, 2, true));

    server.tickets.end("t1", End::Canceled);
    assert!(server.tickets.drained("t1", Duration::from_secs(5)).await);
    let mut rest = Vec::new();
    let _ = busy.stream.read_to_end(&mut rest).await;
    assert!((rest.len() as u64) < SIZE);
    idle.send(&format!("GET /images/{id} HTTP/1.1\r\n\r\n")).await;
    let refused = idle.response().await.unwrap();
    assert_eq!(refused.text(), "You are not allowed to access this resource: Transfer=t1 was canceled\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_is_gone_is_a_500_and_one_that_dies_cuts_the_stream() {
    let directory = tempfile::tempdir().unwrap();
    let (image, nbd) = qcow2_with_bitmap(directory.path());
    let server = Server::start(directory.path()).await;
    let (id, _) = server.ticket("t1", &nbd.export(None), SIZE);
    let mut raw = server.connect().await;
    raw.send(&format!("GET /images/{id} HTTP/1.1\r\n\r\n")).await;
    raw.head().await.unwrap();
    let socket = nbd.socket.clone();
    drop(nbd);
    let mut rest = Vec::new();
    let _ = raw.stream.read_to_end(&mut rest).await;
    assert!((rest.len() as u64) < SIZE);
    let response = server.ask(&format!("GET /images/{id} HTTP/1.1\r\n\r\n")).await;
    assert_eq!(response.text(), "Server failed to perform the request, check logs\n");
    assert_eq!((response.status, response.header("connection")), (500, None));

    // Started anew on the same socket, a kept connection is replaced.
    let again = QemuNbd::start(directory.path(), &["--format=qcow2", path(&image)]);
    std::fs::rename(&again.socket, &socket).unwrap();
    let mut raw = server.connect().await;
    for _ in 0..2 {
        raw.send(&format!("GET /images/{id} HTTP/1.1\r\nrange: bytes=0-9\r\n\r\n")).await;
        assert_eq!(raw.response().await.unwrap().status, 206);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_stand_still_are_closed() {
    let directory = tempfile::tempdir().unwrap();
    let (_, nbd) = qcow2_with_bitmap(directory.path());
    let (short, long) = (Duration::from_millis(300), Duration::from_secs(3600));
    let limits = Config { idle_before_ticket: short, idle: long, ..Config::default() };
    let strict = Server::with(directory.path(), limits).await;
    let mut silent = strict.connect().await;
    silent.send("GET /im").await;
    assert!(silent.closed().await);
    // With a ticket it may wait for longer than that.
    let (id, _) = strict.ticket("t1", &nbd.export(None), SIZE);
    let request = format!("OPTIONS /images/{id} HTTP/1.1\r\n\r\n");
    let mut raw = strict.connect().await;
    raw.send(&request).await;
    raw.response().await.unwrap();
    tokio::time::sleep(2 * short).await;
    raw.send(&request).await;
    assert_eq!(raw.response().await.unwrap().status, 200);

    let other = tempfile::tempdir().unwrap();
    let limits = Config { idle_before_ticket: long, idle: short, ..Config::default() };
    let server = Server::with(other.path(), limits).await;
    let (id, _) = server.ticket("t1", &nbd.export(None), SIZE);
    let mut slow = server.connect().await;
    slow.send(&format!("GET /images/{id} HTTP/1.1\r\n\r\n")).await;
    slow.head().await.unwrap();
    until("the slow reader to be cut", || server.tickets.stats("t1").unwrap().active == 0).await;
}

#[tokio::test]
async fn a_socket_file_is_replaced_only_when_nobody_answers() {
    use virtmark::imageio::{BindError, ImageServer, Tickets};
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let config = || Config { unix_socket: Some(socket.clone()), ..Config::default() };
    let bound = ImageServer::bind(config(), Tickets::default()).await.unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o660);
    let second = ImageServer::bind(config(), Tickets::default()).await;
    assert!(matches!(second, Err(BindError::InUse { .. })), "{second:?}");
    drop(bound);
    assert!(socket.exists());
    drop(ImageServer::bind(config(), Tickets::default()).await.unwrap());
    std::fs::remove_file(&socket).unwrap();
    std::fs::write(&socket, "data").unwrap();
    let third = ImageServer::bind(config(), Tickets::default()).await;
    assert!(matches!(third, Err(BindError::NotASocket { .. })), "{third:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_reads_over_tls() {
    let directory = tempfile::tempdir().unwrap();
    let (image, nbd) = qcow2_with_bitmap(directory.path());
    let expected = raw(&image);
    let server = Server::start(directory.path()).await;
    let (id, coverage) = server.ticket("t1", &nbd.export(None), SIZE);
    let url = format!("https://localhost:{}/images/{id}", server.port);
    let out = directory.path().join("out");
    let arguments =
        ["-sS", "--fail", "--cacert", path(&server.ca), "-o", path(&out), &url].map(str::to_owned);
    let curl = tokio::task::spawn_blocking(move || {
        run("curl", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    });
    curl.await.unwrap();
    assert!(std::fs::read(&out).unwrap() == expected);
    until("the operation to end", || server.tickets.stats("t1").unwrap().active == 0).await;
    assert_eq!(coverage.transferred(), SIZE);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stock_client_downloads_full_and_incremental() {
    let directory = tempfile::tempdir().unwrap();
    let (image, nbd) = qcow2_with_bitmap(directory.path());
    let server = Server::start(directory.path()).await;
    let export = nbd.export(Some("b0"));
    // 127.0.0.2 is not the address of the client's end, so it stays on TLS; from 127.0.0.1 it changes over to
    // the unix socket.
    for (host, name) in [("127.0.0.2", "tls"), ("127.0.0.1", "unix")] {
        let (id, coverage) = server.ticket(name, &nbd.export(None), SIZE);
        let url = format!("https://{host}:{}/images/{id}", server.port);
        let target = directory.path().join(format!("{name}.qcow2"));
        stock_download(url, &target, &server.ca, None).await;
        run("qemu-img", &["compare", "-U", path(&image), path(&target)]);
        until("the operations to end", || server.tickets.stats(name).unwrap().active == 0).await;
        assert_eq!(missing(&nbd.export(None), &coverage).await.unwrap(), 0);
        assert!(coverage.transferred() < SIZE / 4, "zeroes were read");

        let transfer = format!("{name}-incremental");
        let (id, coverage) = server.ticket(&transfer, &export, SIZE);
        let url = format!("https://{host}:{}/images/{id}", server.port);
        let layer = directory.path().join(format!("{name}-incremental.qcow2"));
        stock_download(url, &layer, &server.ca, Some(&target)).await;
        run("qemu-img", &["compare", "-U", path(&image), path(&layer)]);
        until("the operations to end", || server.tickets.stats(&transfer).unwrap().active == 0).await;
        assert_eq!(missing(&export, &coverage).await.unwrap(), 0);
    }
}

/// The law itself: what coverage claims of a client that does not read is already on its side, be it that
/// the server is gone the next moment.
#[tokio::test(flavor = "multi_thread")]
async fn coverage_claims_nothing_that_the_kernel_did_not_take() {
    use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
    async fn stall(
        mut stream: impl AsyncRead + AsyncWrite + Unpin,
        server: &Server,
        transfer: &str,
        nbd: &QemuNbd,
    ) {
        let (id, coverage) = server.ticket(transfer, &nbd.export(None), SIZE);
        stream.write_all(format!("GET /images/{id} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
        let mut taken = vec![0; 1 << 20];
        stream.read_exact(&mut taken).await.unwrap();
        // It stands still when nothing more is claimed for a while; by then most of what was read is.
        let mut claimed = u64::MAX;
        while std::mem::replace(&mut claimed, coverage.transferred()) != coverage.transferred() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert!(claimed >= 512 << 10, "{claimed} claimed of 1 MiB that was read");
        server.tickets.end(transfer, End::Removed);
        assert!(server.tickets.drained(transfer, Duration::from_secs(5)).await);
        let mut received = Vec::new();
        let _ = stream.read_to_end(&mut received).await;
        received.splice(0..0, taken);
        let head = received.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
        let body = (received.len() - head) as u64;
        let claimed = coverage.transferred();
        println!("{transfer}: {claimed} claimed, {body} received");
        assert!(claimed <= body && body < SIZE, "{claimed} claimed, {body} received");
    }

    let directory = tempfile::tempdir().unwrap();
    let (_, nbd) = qcow2_with_bitmap(directory.path());
    let server = Server::start(directory.path()).await;
    stall(server.connect().await.stream, &server, "unix", &nbd).await;

    let mut roots = rustls::RootCertStore::empty();
    let ca: rustls::pki_types::CertificateDer<'_> =
        rustls::pki_types::pem::PemObject::from_pem_file(&server.ca).unwrap();
    roots.add(ca).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
    let name = "localhost".try_into().unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    stall(connector.connect(name, stream).await.unwrap(), &server, "tls", &nbd).await;
}
