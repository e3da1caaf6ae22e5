//! The image server's writes before a storage that is late, silent or out of order: what was answered holds, and what was given
//! up never comes after what was written later. What a real one makes of its writes is in `tests/image_server_write.rs`.

#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, fail by panic")]

mod image_server_rig;
mod nbd_fake_rig;
mod nbd_qemu_rig;

use std::time::Duration;

use image_server_rig::{Raw, Server, until};
use nbd_fake_rig::{Fake, Fate, WRITABLE};
use tokio::io::AsyncWriteExt as _;
use virtmark::imageio::{Access, Config};
use virtmark::nbd::proto::{Request, command, export_flag};

const REQUEST: usize = 128 << 10;
const SIZE: u64 = 4 << 20;
const WRITES: Access = Access::Write { sparse: false };
/// Where an answer must not come, so long is waited for it.
const MOMENT: Duration = Duration::from_millis(300);

fn all_done(_: usize, _: &Request) -> Fate {
    Fate::Done
}

fn is_flush(request: &Request) -> bool {
    request.command == command::FLUSH
}

/// Asks that `length` bytes are written at the begin, and says so many of them.
async fn begin_put(raw: &mut Raw, id: &str, length: usize, fill: u8, said: usize) {
    raw.send(&format!("PUT /images/{id}?flush=n HTTP/1.1\r\ncontent-length: {length}\r\n\r\n")).await;
    raw.stream.write_all(&vec![fill; said]).await.unwrap();
}

async fn put(server: &Server, id: &str, length: usize, fill: u8) -> (u16, String) {
    let mut raw = server.connect().await;
    begin_put(&mut raw, id, length, fill, length).await;
    let answer = raw.response().await.expect("an answer");
    (answer.status, answer.text().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_is_answered_when_nothing_of_its_request_is_in_flight() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path(), SIZE, WRITABLE, Duration::ZERO, |_, request| {
        match request.offset / REQUEST as u64 {
            0 => Fate::Held,
            1 => Fate::Full,
            _ => Fate::Done,
        }
    });
    let server = Server::start(directory.path()).await;
    let (id, _) = server.permit("t1", &fake.export, SIZE, WRITES);
    let mut raw = server.connect().await;
    begin_put(&mut raw, &id, 3 * REQUEST, 1, 3 * REQUEST).await;
    let early = tokio::time::timeout(MOMENT, raw.response()).await;
    assert!(early.is_err(), "{early:?}, and the first request may be done later still");
    fake.judge(all_done);
    assert_eq!(raw.response().await.unwrap().status, 500);
    assert_eq!(put(&server, &id, 3 * REQUEST, 2).await.0, 200);
    assert!(fake.bytes(3 * REQUEST).iter().all(|byte| *byte == 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_again_is_written_after_what_it_asked_before() {
    /// Two requests to the storage, and no more than a socket takes that nobody reads from.
    const LENGTH: usize = REQUEST + 1;
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path(), SIZE, WRITABLE, Duration::ZERO, |connection, request| {
        if connection == 0 && !is_flush(request) { Fate::Held } else { Fate::Done }
    });
    let server = Server::start(directory.path()).await;
    let (id, _) = server.permit("t1", &fake.export, SIZE, WRITES);
    let mut first = server.connect().await;
    begin_put(&mut first, &id, LENGTH, 1, LENGTH).await;
    until("the storage to be asked", || fake.seen().len() == 2).await;
    drop(first);
    let mut again = server.connect().await;
    begin_put(&mut again, &id, LENGTH, 2, LENGTH).await;
    let early = tokio::time::timeout(MOMENT, again.response()).await;
    assert!(early.is_err(), "{early:?}, and what was asked before is in flight");
    // what lies elsewhere need not wait
    let elsewhere = format!("content-length: 1\r\ncontent-range: bytes {}-*/*", 2 * REQUEST);
    let elsewhere = server.ask(&format!("PUT /images/{id} HTTP/1.1\r\n{elsewhere}\r\n\r\nx")).await;
    assert_eq!(elsewhere.status, 200);
    fake.judge(all_done);
    assert_eq!(again.response().await.unwrap().status, 200);
    until("all to be done", || server.tickets.stats("t1").unwrap().active == 0).await;
    assert!(fake.bytes(LENGTH).iter().all(|byte| *byte == 2), "the first came last");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_again_does_not_wait_for_a_client_that_is_gone_without_a_word() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path(), SIZE, WRITABLE, Duration::ZERO, all_done);
    let server = Server::start(directory.path()).await;
    let (id, _) = server.permit("t1", &fake.export, SIZE, WRITES);
    let mut silent = server.connect().await;
    begin_put(&mut silent, &id, 2 * REQUEST, 1, REQUEST + 1).await;
    until("the storage to be asked", || fake.seen().len() == 1).await;
    assert_eq!(put(&server, &id, 2 * REQUEST, 2).await.0, 200);
    assert!(silent.closed().await, "its place was taken");
    assert!(fake.bytes(2 * REQUEST).iter().all(|byte| *byte == 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_zero_moves() {
    let directory = tempfile::tempdir().unwrap();
    let size = 10 << 27;
    let fake = Fake::start(directory.path(), size, WRITABLE, Duration::from_millis(300), all_done);
    let limits = Config { idle: Duration::from_secs(1), ..Config::default() };
    let server = Server::with(directory.path(), limits).await;
    let (id, coverage) = server.permit("t1", &fake.export, size, WRITES);
    let zero = format!("{{\"op\": \"zero\", \"size\": {size}}}");
    let length = zero.len();
    let mut raw = server.connect().await;
    raw.send(&format!("PATCH /images/{id} HTTP/1.1\r\ncontent-length: {length}\r\n\r\n{zero}")).await;
    let answer = raw.response().await.expect("a zero that goes on is not cut");
    assert_eq!((answer.status, coverage.transferred()), (200, size));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_covers_what_was_written_over_other_connections() {
    for (shared, flushes) in [(false, 3), (true, 1)] {
        let directory = tempfile::tempdir().unwrap();
        let flags = WRITABLE | if shared { export_flag::CAN_MULTI_CONN } else { 0 };
        let fake = Fake::start(directory.path(), SIZE, flags, Duration::ZERO, all_done);
        let server = Server::start(directory.path()).await;
        let (id, _) = server.permit("t1", &fake.export, SIZE, WRITES);
        let mut others = [server.connect().await, server.connect().await];
        for other in &mut others {
            begin_put(other, &id, 10, 1, 10).await;
            assert_eq!(other.response().await.unwrap().status, 200);
        }
        let flush = format!("PATCH /images/{id} HTTP/1.1\r\ncontent-length: 15\r\n\r\n{{\"op\": \"flush\"}}");
        assert_eq!(server.ask(&flush).await.status, 200);
        assert_eq!(fake.unstable(), 0, "shared: {shared}");
        let seen = fake.seen();
        assert_eq!(seen.iter().filter(|(_, seen)| *seen == command::FLUSH).count(), flushes);
    }
}

/// As when it was silent for too long, which takes a minute: it is there, and what it was given may be done still.
#[tokio::test(flavor = "multi_thread")]
async fn a_storage_that_owes_an_answer_is_written_to_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path(), SIZE, WRITABLE, Duration::ZERO, |_, request| {
        if request.offset == 0 { Fate::Held } else { Fate::Garbled }
    });
    let server = Server::start(directory.path()).await;
    let (id, _) = server.permit("t1", &fake.export, SIZE, WRITES);
    for _ in 0..2 {
        let (status, told) = put(&server, &id, 2 * REQUEST, 1).await;
        assert_eq!(status, 500);
        assert!(told.contains("may be written later"), "{told}");
    }
    assert_eq!(fake.seen().len(), 2, "the second was not written");
    fake.judge(all_done);
    assert_eq!(put(&server, &id, 2 * REQUEST, 1).await.0, 500, "nobody knows whether it is over");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_that_stalls_has_only_so_much_waiting_for_it() {
    const LENGTH: usize = 16 << 20;
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path(), 10 << 24, WRITABLE, Duration::ZERO, |_, _| Fate::Held);
    let limits = Config { max_writing: 2, ..Config::default() };
    let server = Server::with(directory.path(), limits).await;
    let (id, coverage) = server.permit("t1", &fake.export, 10 << 24, WRITES);
    let mut clients = Vec::new();
    for number in 0..10 {
        let mut client = server.connect().await;
        let range = format!("content-length: {LENGTH}\r\ncontent-range: bytes {}-*/*", number * LENGTH);
        client.send(&format!("PUT /images/{id}?flush=n HTTP/1.1\r\n{range}\r\n\r\n")).await;
        let (body, mut taken) = (vec![1; 1 << 20], 0);
        while let Ok(sent) = tokio::time::timeout(MOMENT, client.stream.write(&body)).await {
            taken += sent.unwrap();
        }
        clients.push((client, taken));
    }
    let asked = fake.seen();
    let asking = |number: &usize| asked.iter().any(|(other, _)| other == number);
    assert_eq!((0..10).filter(asking).count(), 2, "others wait for their place");
    let taken: Vec<_> = clients.iter().map(|(_, taken)| *taken >> 10).collect();
    // of each the sockets' buffers, what hyper has and a frame; of the two the window besides
    assert!(
        taken[..2].iter().all(|kib| *kib < 2048) && taken[2..].iter().all(|kib| *kib < 1024),
        "{taken:?} KiB"
    );

    fake.judge(all_done);
    let ended = clients.into_iter().map(|(mut client, taken)| {
        tokio::spawn(async move {
            client.stream.write_all(&vec![1; LENGTH - taken]).await.unwrap();
            client.response().await.unwrap().status
        })
    });
    for ended in ended.collect::<Vec<_>>() {
        assert_eq!(ended.await.unwrap(), 200);
    }
    assert_eq!(coverage.transferred(), 10 << 24);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stalls_holds_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path(), SIZE, WRITABLE, Duration::ZERO, all_done);
    let limits = Config { max_writing: 1, ..Config::default() };
    let server = Server::with(directory.path(), limits).await;
    let (id, _) = server.permit("t1", &fake.export, SIZE, WRITES);
    let mut slow = server.connect().await;
    begin_put(&mut slow, &id, 2 * REQUEST, 1, REQUEST + 1).await;
    until("the storage to have answered", || fake.done() == 1).await;
    let range = format!("content-length: 1\r\ncontent-range: bytes {}-*/*", 2 * REQUEST);
    let other = server.ask(&format!("PUT /images/{id} HTTP/1.1\r\n{range}\r\n\r\nx")).await;
    assert_eq!(other.status, 200);
    slow.stream.write_all(&vec![1; REQUEST - 1]).await.unwrap();
    assert_eq!(slow.response().await.unwrap().status, 200);
    assert!(fake.bytes(2 * REQUEST).iter().all(|byte| *byte == 1));
}
