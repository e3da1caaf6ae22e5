//! The NBD writer before a server that is honest and difficult: it answers what is in flight in any order, late, and takes
//! note of what a client must never do. What a real qemu-nbd makes of it is in `tests/nbd_qemu_write.rs`.

#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, fail by panic")]

mod nbd_fake_rig;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::BytesMut;
use nbd_fake_rig::{NO_SPACE, WRITABLE, shake_hands};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use virtmark::nbd::client::{REPLY_TIMEOUT, SLOW_REPLY_TIMEOUT};
use virtmark::nbd::proto::{self, ReplyHead, Request, command, export_flag};
use virtmark::nbd::writer::ZERO_REQUEST;
use virtmark::nbd::{Client, Export, NbdError, Writer, ZeroMode};

const SIZE: usize = 100_000;

/// What the server has, and what it saw.
#[derive(Default)]
struct Disk {
    bytes: Vec<u8>,
    flags: u16,
    block: u32,
    /// Answers are held back until so many requests are in flight, or nothing more comes.
    hold: usize,
    /// Nothing is answered.
    silent: bool,
    /// The connection is closed when so many requests came.
    closes_at: Option<usize>,
    /// The write of this number, and what comes after it, fails.
    full_at: Option<usize>,
    most_in_flight: usize,
    longest: u32,
    commands: Vec<u16>,
    flags_seen: Vec<u16>,
    overlaps: usize,
    /// Requests that were not done when a flush came.
    unflushed: usize,
}

type Shared = Arc<Mutex<Disk>>;

fn serve(directory: &Path, disk: Disk) -> (Export, Shared) {
    let socket = directory.join("s");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    let disk = Arc::new(Mutex::new(disk));
    let shared = Arc::clone(&disk);
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        // the client may go at any time
        let _ = talk(stream, &shared).await;
    });
    (Export { socket, name: String::new(), bitmap: None, changed_from: None }, disk)
}

/// A writer of requests of 8 KiB, so many in flight, before a server of this disk.
async fn writer_to(directory: &Path, disk: Disk, window: usize) -> (Writer, Shared) {
    let (export, disk) = serve(directory, disk);
    let mut client = Client::connect_to_write(&export).await.unwrap();
    client.shape(8192, window);
    (client.writer().unwrap(), disk)
}

async fn talk(mut stream: UnixStream, disk: &Shared) -> std::io::Result<()> {
    let (size, flags, block) = {
        let disk = disk.lock().unwrap();
        (disk.bytes.len() as u64, disk.flags, disk.block)
    };
    shake_hands(&mut stream, size, flags, block).await?;
    let mut waiting: VecDeque<(Request, Vec<u8>)> = VecDeque::new();
    let mut writes = 0;
    loop {
        let (hold, silent) = {
            let disk = disk.lock().unwrap();
            if disk.closes_at.is_some_and(|at| disk.commands.len() >= at) {
                return Ok(());
            }
            (disk.hold, disk.silent)
        };
        let patience = Duration::from_millis(5);
        let mut head = [0; proto::REQUEST_LEN];
        let first = stream.read_exact(&mut head[..1]);
        let comes = if waiting.is_empty() || silent {
            first.await.map(|_| true)?
        } else {
            waiting.len() < hold && tokio::time::timeout(patience, first).await.is_ok_and(|read| read.is_ok())
        };
        if comes {
            stream.read_exact(&mut head[1..]).await?;
            let request = Request::decode(&head).unwrap();
            let mut data =
                vec![0; if request.command == command::WRITE { request.length as usize } else { 0 }];
            stream.read_exact(&mut data).await?;
            if request.command == command::DISCONNECT {
                return Ok(());
            }
            let mut disk = disk.lock().unwrap();
            let end = |request: &Request| request.offset + u64::from(request.length);
            let over = |other: &Request| other.offset < end(&request) && request.offset < end(other);
            disk.overlaps += waiting.iter().filter(|(other, _)| over(other)).count();
            if request.command == command::FLUSH {
                disk.unflushed += waiting.len();
            }
            disk.commands.push(request.command);
            disk.flags_seen.push(request.flags);
            disk.longest = disk.longest.max(request.length);
            waiting.push_back((request, data));
            disk.most_in_flight = disk.most_in_flight.max(waiting.len());
            continue;
        }
        // the last that came is done first
        let (request, data) = waiting.pop_back().unwrap();
        let mut out = BytesMut::new();
        let error = {
            let mut disk = disk.lock().unwrap();
            writes += 1;
            let full = disk.full_at.is_some_and(|at| writes > at);
            let start = usize::try_from(request.offset).unwrap();
            match request.command {
                _ if full => NO_SPACE,
                command::WRITE => {
                    disk.bytes[start..start + data.len()].copy_from_slice(&data);
                    0
                }
                command::WRITE_ZEROES => {
                    let end = start + request.length as usize;
                    // a large disk of the tests has no bytes of its own
                    if let Some(range) = disk.bytes.get_mut(start..end) {
                        range.fill(0);
                    }
                    0
                }
                _ => 0,
            }
        };
        ReplyHead::Simple { error, cookie: request.cookie }.encode(&mut out);
        stream.write_all(&out).await?;
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Zero(u64, u64, ZeroMode),
    Flush,
    Drain,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let offset = || prop_oneof![0..SIZE as u64, (0..12_u64).prop_map(|block| block * 8192)];
    let write = (offset(), any::<u8>(), 0..20_000_usize).prop_map(|(offset, fill, length)| {
        let length = length.min(SIZE - usize::try_from(offset).unwrap());
        Step::Write(offset, (0..251).cycle().take(length).map(|at| fill.wrapping_add(at)).collect())
    });
    let mode = prop_oneof![Just(ZeroMode::Allocate), Just(ZeroMode::Punch)];
    let zero = (offset(), 0..50_000_u64, mode)
        .prop_map(|(offset, length, mode)| Step::Zero(offset, length.min(SIZE as u64 - offset), mode));
    let step = prop_oneof![6 => write, 2 => zero, 1 => Just(Step::Flush), 1 => Just(Step::Drain)];
    proptest::collection::vec(step, 0..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_disk_holds_what_was_written_last(
        steps in steps(), window in 1..6_usize, hold in 1..8_usize, knows_zeroes: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let flags = if knows_zeroes { WRITABLE } else { export_flag::SEND_FLUSH };
            let disk = Disk { bytes: vec![1; SIZE], flags, hold, ..Disk::default() };
            let (mut writer, disk) = writer_to(directory.path(), disk, window).await;
            let mut model = vec![1; SIZE];
            for step in steps {
                match step {
                    Step::Write(offset, data) => {
                        writer.write(offset, &data).await.unwrap();
                        let start = usize::try_from(offset).unwrap();
                        model[start..start + data.len()].copy_from_slice(&data);
                    }
                    Step::Zero(offset, length, mode) => {
                        writer.zero(offset, length, mode).await.unwrap();
                        let start = usize::try_from(offset).unwrap();
                        model[start..start + usize::try_from(length).unwrap()].fill(0);
                    }
                    Step::Flush => writer.flush().await.unwrap(),
                    Step::Drain => {
                        writer.drain().await.unwrap();
                        assert!(disk.lock().unwrap().bytes == model);
                    }
                }
            }
            writer.finish().await.unwrap().disconnect().await.unwrap();
            let disk = disk.lock().unwrap();
            assert!(disk.bytes == model);
            assert_eq!((disk.overlaps, disk.unflushed), (0, 0));
            assert!(disk.most_in_flight <= window, "{} in flight", disk.most_in_flight);
            assert!(knows_zeroes || !disk.commands.contains(&command::WRITE_ZEROES));
            assert!(knows_zeroes || disk.longest <= 8192);
        });
    }
}

#[tokio::test]
async fn bytes_that_follow_each_other_are_gathered_and_pipelined() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk { bytes: vec![0; SIZE], flags: WRITABLE, hold: 4, ..Disk::default() };
    let (mut writer, disk) = writer_to(directory.path(), disk, 4).await;
    for at in 0..8192 * 6 / 512 {
        writer.write(100 + at * 512, &[7; 512]).await.unwrap();
    }
    writer.finish().await.unwrap();
    let disk = disk.lock().unwrap();
    // the first ends at a multiple, and what is over makes one more
    assert_eq!((disk.commands.len(), disk.most_in_flight, disk.longest), (7, 4, 8192));
    assert!(disk.bytes[100..100 + 8192 * 6].iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn zeroes_are_cut_and_say_what_may_become_a_hole() {
    let directory = tempfile::tempdir().unwrap();
    // nothing writes to its bytes, so that they need no memory
    let bytes = vec![0; usize::try_from(3 * ZERO_REQUEST).unwrap()];
    let (export, disk) = serve(directory.path(), Disk { bytes, flags: WRITABLE, hold: 8, ..Disk::default() });
    let mut writer = Client::connect_to_write(&export).await.unwrap().writer().unwrap();
    writer.zero(4096, 2 * ZERO_REQUEST, ZeroMode::Allocate).await.unwrap();
    writer.zero(0, 0, ZeroMode::Punch).await.unwrap();
    writer.zero(0, 4096, ZeroMode::Punch).await.unwrap();
    writer.flush().await.unwrap();
    let disk = disk.lock().unwrap();
    let no_hole = command::FLAG_NO_HOLE;
    assert_eq!(disk.flags_seen, [no_hole, no_hole, no_hole, 0, 0]);
    assert_eq!(disk.commands, [vec![command::WRITE_ZEROES; 4], vec![command::FLUSH]].concat());
    // two short ones fit beside each other, two long ones do not
    assert!(u64::from(disk.longest) <= ZERO_REQUEST && disk.most_in_flight <= 2);
}

#[tokio::test]
async fn an_error_is_told_and_ends_it() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk { bytes: vec![0; SIZE], flags: WRITABLE, hold: 1, full_at: Some(2), ..Disk::default() };
    let (mut writer, _) = writer_to(directory.path(), disk, 2).await;
    let error = loop {
        if let Err(error) = writer.write(0, &[1; 8192]).await {
            break error;
        }
    };
    assert_eq!(error.to_string(), "the NBD server failed to write at offset 0: ENOSPC (28)");
    assert!(matches!(writer.write(0, &[1]).await, Err(NbdError::GivenUp)));
    assert!(matches!(writer.finish().await, Err(NbdError::GivenUp)));
}

#[tokio::test]
async fn a_write_that_was_dropped_in_its_middle_ends_it() {
    let directory = tempfile::tempdir().unwrap();
    // it answers when eight are in flight, which never are
    let disk = Disk { bytes: vec![0; SIZE], flags: WRITABLE, hold: 8, ..Disk::default() };
    let (mut writer, _) = writer_to(directory.path(), disk, 1).await;
    let data = vec![1; 60_000];
    {
        let mut write = std::pin::pin!(writer.write(0, &data));
        std::future::poll_fn(|cx| {
            assert!(write.as_mut().poll(cx).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
    }
    assert!(matches!(writer.finish().await, Err(NbdError::GivenUp)));
}

#[tokio::test]
async fn what_is_given_up_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk { bytes: vec![0; SIZE], flags: WRITABLE, hold: 4, ..Disk::default() };
    let (mut writer, disk) = writer_to(directory.path(), disk, 4).await;
    writer.write(0, &[1; 3 * 8192 + 10]).await.unwrap();
    assert_eq!(writer.unanswered_from(), Some(0));
    writer.drain().await.unwrap();
    assert_eq!(writer.unanswered_from(), None);
    writer.write(8192, &[2; 2 * 8192 + 5]).await.unwrap();
    assert_eq!(writer.unanswered_from(), Some(8192));
    writer.abandon().await.unwrap();
    let disk = disk.lock().unwrap();
    assert!(disk.bytes[8192..3 * 8192].iter().all(|byte| *byte == 2));
    assert_eq!(
        disk.bytes[3 * 8192..][..12],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        "what was gathered is forgotten"
    );
}

#[tokio::test]
async fn what_cannot_be_written_is_refused_before_anything_is_sent() {
    let directory = tempfile::tempdir().unwrap();
    let (export, _) = serve(
        directory.path(),
        Disk { bytes: vec![0; SIZE], flags: WRITABLE | export_flag::READ_ONLY, hold: 1, ..Disk::default() },
    );
    let client = Client::connect_to_write(&export).await.unwrap();
    assert!(matches!(client.writer(), Err(NbdError::ReadOnly)));

    // a server that insists on its blocks
    let (export, disk) = serve(
        directory.path(),
        Disk { bytes: vec![0; SIZE], flags: WRITABLE, hold: 1, block: 512, ..Disk::default() },
    );
    let mut writer = Client::connect_to_write(&export).await.unwrap().writer().unwrap();
    assert!(matches!(writer.write(SIZE as u64, &[1]).await, Err(NbdError::OutOfRange { .. })));
    assert!(matches!(writer.zero(u64::MAX, 2, ZeroMode::Punch).await, Err(NbdError::OutOfRange { .. })));
    writer.write(512, &[1; 512]).await.unwrap();
    writer.write(SIZE as u64 / 512 * 512, &[1; SIZE % 512]).await.unwrap();
    writer.flush().await.unwrap();
    writer.write(100, &[1; 512]).await.unwrap();
    let error = writer.flush().await.unwrap_err();
    assert!(matches!(error, NbdError::Unaligned { offset: 100, length: 512, block: 512 }), "{error}");
    assert_eq!(disk.lock().unwrap().commands, [command::WRITE, command::WRITE, command::FLUSH]);
}

/// The time that a silent server is given, as the writer tells it and as it passed.
async fn given_up(asked: impl AsyncFn(&mut Writer) -> Result<(), NbdError>) -> (Writer, Duration) {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk { bytes: vec![0; SIZE], flags: WRITABLE, silent: true, ..Disk::default() };
    let (mut writer, _) = writer_to(directory.path(), disk, 4).await;
    // time passes at once where nothing else is to be done
    tokio::time::pause();
    let begun = tokio::time::Instant::now();
    let error = asked(&mut writer).await.unwrap_err();
    let passed = begun.elapsed();
    tokio::time::resume();
    let NbdError::ReplyTimeout { silent } = error else { panic!("{error}") };
    assert!(passed >= silent && passed < silent + Duration::from_secs(1), "{passed:?} of {silent:?}");
    (writer, silent)
}

#[tokio::test]
async fn a_storage_has_longer_for_zeroes_and_flushes() {
    let (_, data) = given_up(async |writer| {
        writer.write(0, &[1; 8192]).await?;
        writer.drain().await
    })
    .await;
    let (_, zeroes) = given_up(async |writer| {
        writer.write(0, &[1; 8192]).await?;
        writer.zero(8192, 8192, ZeroMode::Punch).await?;
        writer.drain().await
    })
    .await;
    let (_, flush) = given_up(async |writer| writer.flush().await).await;
    assert_eq!((data, zeroes, flush), (REPLY_TIMEOUT, SLOW_REPLY_TIMEOUT, SLOW_REPLY_TIMEOUT));
}

#[tokio::test]
async fn what_was_not_answered_is_told_when_it_is_given_up() {
    let (writer, _) = given_up(async |writer| {
        writer.write(0, &[1; 3 * 8192]).await?;
        writer.drain().await
    })
    .await;
    let error = writer.abandon().await.unwrap_err();
    assert!(matches!(error, NbdError::Unanswered { requests: 3 }), "{error}");

    // one that closes the connection is known to do nothing more
    let directory = tempfile::tempdir().unwrap();
    let disk =
        Disk { bytes: vec![0; SIZE], flags: WRITABLE, silent: true, closes_at: Some(2), ..Disk::default() };
    let (mut writer, _) = writer_to(directory.path(), disk, 4).await;
    writer.write(0, &[1; 2 * 8192]).await.unwrap();
    writer.abandon().await.unwrap();
}
