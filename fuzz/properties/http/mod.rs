//! Raw bytes from an HTTP client, through the image server's real connection code, in front of a real NBD client
//! and an NBD server that is honest. The first byte chooses how the stream is cut.

mod backend;
mod log;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::Runtime;
use virtmark::imageio::{Access, Config, Coverage, ImageServer, SharedCoverage, Ticket, TicketId, Tickets};
use virtmark::nbd::Export;

/// The ticket that the seeds use.
const TICKET: &str = "5ec2e700-feed-4ace-8bad-0123456789ab";
/// Bytes that it permits, of the larger disk behind it.
const SIZE: u64 = 9000;

struct World {
    runtime: Runtime,
    tickets: Tickets,
    export: Export,
    _dir: tempfile::TempDir,
}

/// Every connection ends; answers are well formed; bytes of the disk are the right ones and the ticket's; what counts
/// as served was received; nothing goes on running; and the ticket's id is in no log line and no header.
pub fn check(input: &[u8]) {
    static WORLD: OnceLock<Mutex<World>> = OnceLock::new();
    let Some((choice, request)) = input.split_first() else { return };
    let step = [usize::MAX, 7, 37, 4096][usize::from(choice & 3)];
    let world = WORLD.get_or_init(|| Mutex::new(World::new())).lock().unwrap_or_else(PoisonError::into_inner);
    let coverage = SharedCoverage::new(Coverage::new(SIZE));
    world.tickets.add(world.ticket(), Arc::clone(&coverage));
    let answers = world.runtime.block_on(async {
        let talked = tokio::time::timeout(Duration::from_secs(20), world.talk(request, step)).await;
        talked.expect("an answer or a close")
    });
    let mut received = vec![false; usize::try_from(SIZE).expect("a small disk")];
    let mut rest = &answers[..];
    while !rest.is_empty() {
        rest = answer(rest, &mut received);
    }
    let stats = world.tickets.stats("transfer").expect("the ticket is there");
    assert_eq!((stats.active, stats.transferred), (0, coverage.transferred()));
    let mut at = 0;
    for run in received.chunk_by(|one, next| one == next) {
        let end = at + run.len() as u64;
        assert!(
            run[0] || coverage.missing_in(at, end) == end - at,
            "{at}..{end} counts as served, and was not received"
        );
        at = end;
    }
}

impl World {
    fn new() -> World {
        log::install();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let dir = super::scratch();
        let socket = dir.path().join("nbd.sock");
        let listener = runtime.block_on(async { tokio::net::UnixListener::bind(&socket) }).expect("a socket");
        runtime.spawn(backend::serve(listener));
        let export =
            Export { socket, name: "vda".to_owned(), bitmap: Some("b0".to_owned()), changed_from: None };
        World { runtime, tickets: Tickets::default(), export, _dir: dir }
    }

    fn ticket(&self) -> Ticket {
        Ticket {
            id: TicketId::parse(TICKET).expect("an id"),
            transfer: "transfer".to_owned(),
            backup: "backup".to_owned(),
            disk: "vda".to_owned(),
            access: Access::Read,
            size: SIZE,
            export: self.export.clone(),
            dirty: true,
            filename: None,
        }
    }

    /// Sends the request in steps, and collects what comes until the server ends the connection. When nothing
    /// moves any more the client ends its half.
    async fn talk(&self, request: &[u8], step: usize) -> Vec<u8> {
        let (client, server) = tokio::io::duplex(64 << 10);
        let served = tokio::spawn(ImageServer::converse(Config::default(), self.tickets.clone(), server));
        let (mut answers, mut questions) = tokio::io::split(client);
        let ask = async {
            for piece in request.chunks(step) {
                // a server that has closed already has said what it has to say
                if questions.write_all(piece).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            let active = || self.tickets.stats("transfer").is_some_and(|stats| stats.active > 0);
            let mut still = 0;
            while still < 10 {
                still = if active() { 0 } else { still + 1 };
                tokio::task::yield_now().await;
            }
            let _ = questions.shutdown().await;
        };
        let mut received = Vec::new();
        let (_, read) = tokio::join!(ask, answers.read_to_end(&mut received));
        read.expect("a pipe in memory");
        served.await.expect("no panic in the server");
        received
    }
}

/// Checks one answer; what is behind it.
fn answer<'a>(answers: &'a [u8], received: &mut [bool]) -> &'a [u8] {
    // a connection that is cut ends anywhere
    let Some(end) = answers.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return &[] };
    let head = std::str::from_utf8(&answers[..end]).expect("an ASCII head");
    let body = &answers[end + 4..];
    assert!(!head.to_ascii_lowercase().contains(&TICKET[..8]), "{head}");
    let mut lines = head.split("\r\n");
    let status = lines.next().expect("a status line");
    assert!(status.starts_with("HTTP/1.1 ") || status.starts_with("HTTP/1.0 "), "{status:?}");
    let status: u16 = status[9..12].parse().expect("a status");
    let header = |name: &str| head.split("\r\n").find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let known = [100, 200, 206, 400, 403, 404, 405, 414, 416, 431, 500, 505];
    assert!(known.contains(&status), "{head}");
    assert_ne!(status, 500, "the backend is honest: {head}");
    if status == 100 {
        return body;
    }
    // the answer to a HEAD announces a body that is not sent
    if body.is_empty() || body.starts_with(b"HTTP/1.") {
        return body;
    }
    if header("transfer-encoding") == Some("chunked") {
        return chunked(body);
    }
    let Some(length) = header("content-length") else { return &[] };
    let length: usize = length.parse().expect("a length");
    let (body, rest) = body.split_at(length.min(body.len()));
    match header("content-type") {
        Some("application/octet-stream") => {
            let start = match (status, header("content-range")) {
                (200, None) => 0,
                (206, Some(range)) => bounds(range, length),
                other => panic!("{other:?} in {head}"),
            };
            let start = usize::try_from(start).expect("a small disk");
            let end = start + body.len();
            assert!(*body == backend::disk()[start..end], "other bytes in {head}");
            received[start..end].fill(true);
        }
        Some("application/json") if body.len() == length => {
            serde_json::from_slice::<serde_json::Value>(body).expect("JSON");
        }
        Some("application/json") => {}
        Some("text/plain; charset=UTF-8") => assert!(status >= 400, "{head}"),
        other => assert!(length == 0, "{other:?} in {head}"),
    }
    rest
}

fn bounds(range: &str, length: usize) -> u64 {
    let range = range.strip_prefix("bytes ").and_then(|range| range.strip_suffix("/9000"));
    let (first, last) = range.and_then(|range| range.split_once('-')).expect("a content range");
    let (first, last): (u64, u64) = (first.parse().expect("a number"), last.parse().expect("a number"));
    assert!(first <= last && last < SIZE && last - first + 1 == length as u64, "{range:?}");
    first
}

/// Extents, in chunks; a list that is whole is JSON.
fn chunked(mut body: &[u8]) -> &[u8] {
    let mut list = Vec::new();
    loop {
        let Some(line) = body.windows(2).position(|bytes| bytes == b"\r\n") else { return &[] };
        let length =
            std::str::from_utf8(&body[..line]).ok().and_then(|text| usize::from_str_radix(text, 16).ok());
        let length = length.expect("a chunk's length");
        let Some(chunk) = body.get(line + 2..line + 2 + length) else { return &[] };
        list.extend_from_slice(chunk);
        let Some(rest) = body.get(line + 4 + length..) else { return &[] };
        body = rest;
        if length == 0 {
            serde_json::from_slice::<Vec<serde_json::Value>>(&list).expect("a list of extents");
            return body;
        }
    }
}
