//! The image server before a real qemu-nbd: what it counts as served, how tickets, backends and connections end, curl
//! and the stock `ovirt_imageio` client over TLS. What it answers to which request is in `tests/conformance`.

#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, fail by panic")]

mod image_server_rig;
mod nbd_qemu_rig;

use std::path::Path;
use std::time::Duration;

use image_server_rig::{Server, stock_download, until};
use nbd_qemu_rig::{QemuNbd, path, qcow2_with_bitmap, raw, run};
use tokio::io::AsyncReadExt;
use virtmark::imageio::{Config, Drained, End, missing, tls};

const SIZE: u64 = (64 << 20) + 512;

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
    // zeroes that were excused before are not counted as transferred
    assert_eq!(coverage.settled(), SIZE);
    assert!((needed..SIZE).contains(&coverage.transferred()));
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
    assert_eq!(server.tickets.drained("t1", Duration::from_secs(5)).await, Drained::Over);
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
    // another test may be starting a program: until it is that program, its process has the socket, too
    let again = async {
        loop {
            match ImageServer::bind(config(), Tickets::default()).await {
                Err(BindError::InUse { .. }) => tokio::task::yield_now().await,
                bound => break bound,
            }
        }
    };
    drop(tokio::time::timeout(Duration::from_secs(10), again).await.unwrap().unwrap());
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
async fn a_new_certificate_is_for_new_connections_and_cuts_none() {
    let directory = tempfile::tempdir().unwrap();
    let (image, nbd) = qcow2_with_bitmap(directory.path());
    let expected = raw(&image);
    let server = Server::start(directory.path()).await;
    let (id, _) = server.ticket("t1", &nbd.export(None), SIZE);
    let url = format!("https://localhost:{}/images/{id}", server.port);
    let curl = |ca: &Path, out: &Path, rate: u64| {
        let mut curl = tokio::process::Command::new("curl");
        curl.args([
            "-s",
            "--fail",
            "--max-time",
            "60",
            "--limit-rate",
            &rate.to_string(),
            "--cacert",
            path(ca),
        ]);
        curl.args(["-o", path(out), &url]).kill_on_drop(true).spawn().unwrap()
    };
    let (slow, fast) = (directory.path().join("slow"), directory.path().join("fast"));
    let mut reader = curl(&server.ca, &slow, SIZE / 3);
    until("the reader to be served", || server.tickets.stats("t1").unwrap().active == 1).await;

    let made = tls::self_signed(&["localhost".to_owned()], &[]).unwrap();
    let ca = directory.path().join("new-ca.pem");
    std::fs::write(&ca, &made.ca_pem).unwrap();
    server.tls.replace(tls::server_config(made.cert_pem.as_bytes(), made.key_pem.as_bytes()).unwrap());
    assert!(curl(&ca, &fast, SIZE * 100).wait().await.unwrap().success(), "who trusts the new CA");
    let refused = curl(&server.ca, &fast, SIZE * 100).wait().await.unwrap();
    assert_eq!(refused.code(), Some(60), "the old one's CA does not vouch for the new one");
    assert!(reader.try_wait().unwrap().is_none(), "the first reader was done before: nothing was shown");
    assert!(reader.wait().await.unwrap().success(), "the first reader was cut");
    assert!(std::fs::read(&slow).unwrap() == expected);
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
        assert_eq!(server.tickets.drained(transfer, Duration::from_secs(5)).await, Drained::Over);
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

    stall(tls(&server).await, &server, "tls", &nbd).await;
}

async fn tls(server: &Server) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
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
    connector.connect(name, stream).await.unwrap()
}

/// A server that is told to stop leaves a client that is not done where the coverage is: it goes on from what it has.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_leaves_a_client_where_the_coverage_is() {
    use tokio::io::AsyncWriteExt;
    let directory = tempfile::tempdir().unwrap();
    let (_, nbd) = qcow2_with_bitmap(directory.path());
    let server = Server::start(directory.path()).await;
    let (id, coverage) = server.ticket("stopped", &nbd.export(None), SIZE);
    let mut stream = tls(&server).await;
    stream.write_all(format!("GET /images/{id} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
    let (mut received, mut part) = (Vec::new(), vec![0; 64 << 10]);
    let mut stop = Some(server);
    while let Ok(got @ 1..) = stream.read(&mut part).await {
        received.extend_from_slice(&part[..got]);
        if received.len() > 1 << 20 {
            drop(stop.take());
        }
        // a slow one: it is far from done when the server's patience ends
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let head = received.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
    let body = (received.len() - head) as u64;
    assert!(body < SIZE, "it was done before");
    assert_eq!(coverage.transferred(), body);
}
