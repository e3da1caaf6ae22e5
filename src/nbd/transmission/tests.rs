use proptest::prelude::*;

use super::*;
use crate::extent::Run;

const CONTEXTS: Contexts = Contexts { allocation: Some(1), depth: None, dirty: Some(2) };

fn chunk(out: &mut BytesMut, done: bool, kind: u16, cookie: u64, payload: &[u8]) {
    let flags = if done { chunk::FLAG_DONE } else { 0 };
    ReplyHead::Chunk { flags, kind, cookie, length: u32::try_from(payload.len()).unwrap() }.encode(out);
    out.put_slice(payload);
}

fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes(), bytes].concat()
}

fn hole(offset: u64, length: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat()
}

fn map(id: u32, runs: &[(u32, u32)]) -> Vec<u8> {
    let runs = runs.iter().flat_map(|(length, flags)| [length.to_be_bytes(), flags.to_be_bytes()].concat());
    id.to_be_bytes().into_iter().chain(runs).collect()
}

/// Feeds `bytes`, at most `step` at a time, and collects the replies; the most memory held for a payload.
fn feed(
    wire: &mut Transmission,
    mut bytes: &[u8],
    step: usize,
) -> Result<(Vec<Reply>, usize), ProtocolError> {
    let (mut replies, mut most) = (Vec::new(), 0);
    while !bytes.is_empty() {
        let mut space = wire.space();
        let take = bytes.len().min(step).min(space.remaining_mut());
        assert!(take > 0);
        space.put_slice(&bytes[..take]);
        bytes = &bytes[take..];
        while let Some(reply) = wire.advance()? {
            replies.push(reply);
        }
        most = most.max(wire.payload.capacity());
    }
    Ok((replies, most))
}

fn read(reply: &Reply) -> (u64, Result<Bytes, ServerError>) {
    match reply {
        Reply::Read { cookie, result } => (*cookie, result.clone()),
        Reply::Status { .. } | Reply::Done { .. } => panic!("not a read: {reply:?}"),
    }
}

proptest! {
    #[test]
    fn any_split_gives_the_same_replies(step in 1..80usize) {
        let mut wire = Transmission::new(true, CONTEXTS);
        let mut requests = BytesMut::new();
        let whole = wire.read(4096, 40, 0, &mut requests);
        let pieces = wire.read(0, 30, 0, &mut requests);
        let failed = wire.read(9, 1, 0, &mut requests);
        let status = wire.block_status(0, 100, &mut requests);
        let written = wire.write(7, 5, &mut requests);
        let full = wire.write_zeroes(0, u32::MAX, command::FLAG_NO_HOLE, &mut requests);
        let flushed = wire.flush(&mut requests);
        prop_assert_eq!(requests.len(), 7 * proto::REQUEST_LEN);

        let mut bytes = BytesMut::new();
        chunk(&mut bytes, false, chunk::OFFSET_DATA, pieces, &data(20, &[7; 10]));
        ReplyHead::Simple { error: 0, cookie: written }.encode(&mut bytes);
        chunk(&mut bytes, true, chunk::NONE, flushed, &[]);
        chunk(&mut bytes, true, chunk::ERROR | 1, full, &[0, 0, 0, 28, 0, 0]);
        chunk(&mut bytes, true, chunk::OFFSET_DATA, whole, &data(4096, &[9; 40]));
        chunk(&mut bytes, false, chunk::OFFSET_HOLE, pieces, &hole(10, 10));
        chunk(&mut bytes, false, chunk::BLOCK_STATUS, status, &map(1, &[(60, 0), (100, 3)]));
        chunk(&mut bytes, true, chunk::ERROR | 1, failed, &[0, 0, 0, 5, 0, 2, b'n', b'o']);
        chunk(&mut bytes, true, chunk::OFFSET_DATA, pieces, &data(0, &[5; 10]));
        chunk(&mut bytes, false, chunk::BLOCK_STATUS, status, &map(2, &[(10, 1), (80, 0)]));
        chunk(&mut bytes, true, chunk::NONE, status, &[]);

        let (replies, _) = feed(&mut wire, &bytes, step).unwrap();
        prop_assert_eq!(wire.in_flight(), 0);
        let (done, replies): (Vec<_>, Vec<_>) =
            replies.into_iter().partition(|reply| matches!(reply, Reply::Done { .. }));
        let no_space = ServerError { errno: 28, message: String::new() };
        let done: Vec<_> = done.into_iter().map(|reply| match reply {
            Reply::Done { cookie, result } => (cookie, result),
            other => panic!("{other:?}"),
        }).collect();
        prop_assert_eq!(done, [(written, Ok(())), (flushed, Ok(())), (full, Err(no_space))]);
        prop_assert_eq!(replies.len(), 4);
        prop_assert_eq!(read(&replies[0]), (whole, Ok(Bytes::from(vec![9; 40]))));
        let error = ServerError { errno: 5, message: "no".to_owned() };
        prop_assert_eq!(error.to_string(), "EIO (5): no");
        prop_assert_eq!(read(&replies[1]), (failed, Err(error)));
        let joined = [[5; 10], [0; 10], [7; 10]].concat();
        prop_assert_eq!(read(&replies[2]), (pieces, Ok(Bytes::from(joined))));
        let Reply::Status { cookie, result: Ok(maps) } = &replies[3] else { panic!("{:?}", replies[3]) };
        prop_assert_eq!(*cookie, status);
        let runs: Vec<Run> = maps.clone().runs().collect();
        use crate::extent::Flags;
        prop_assert_eq!(runs, [
            Run { length: 10, flags: Flags::DIRTY },
            Run { length: 50, flags: Flags::DATA },
            Run { length: 30, flags: Flags::ZERO },
        ]);
    }

    #[test]
    fn hostile_bytes_never_panic_nor_allocate_beyond_bounds(
        heads in proptest::collection::vec((any::<u16>(), 0..8u16, 0..4u64, any::<u32>(), any::<Vec<u8>>()), 1..8),
        tail: Vec<u8>,
        step in 1..100usize,
    ) {
        let mut wire = Transmission::new(true, CONTEXTS);
        let mut out = BytesMut::new();
        wire.read(0, 1000, 0, &mut out);
        wire.block_status(0, 1000, &mut out);
        wire.write(0, 1000, &mut out);
        let mut bytes = BytesMut::new();
        for (flags, kind, cookie, length, payload) in heads {
            let length = if length % 3 == 0 { length } else { u32::try_from(payload.len()).unwrap() };
            ReplyHead::Chunk { flags, kind, cookie, length }.encode(&mut bytes);
            bytes.put_slice(&payload);
        }
        bytes.put_slice(&tail);
        if let Ok((_, most)) = feed(&mut wire, &bytes, step) {
            prop_assert!(most <= MAX_STATUS as usize + 64);
        }
    }
}

#[test]
fn simple_replies_carry_reads() {
    let mut wire = Transmission::new(false, Contexts::default());
    let mut out = BytesMut::new();
    let (first, second) = (wire.read(0, 4, 0, &mut out), wire.read(4, 4, 0, &mut out));
    let mut bytes = BytesMut::new();
    ReplyHead::Simple { error: 5, cookie: second }.encode(&mut bytes);
    ReplyHead::Simple { error: 0, cookie: first }.encode(&mut bytes);
    bytes.put_slice(b"abcd");
    let (replies, _) = feed(&mut wire, &bytes, 7).unwrap();
    assert_eq!(read(&replies[0]).1.unwrap_err().errno, 5);
    assert_eq!(read(&replies[1]), (first, Ok(Bytes::from_static(b"abcd"))));
}

/// What a broken server sends for a read of 10 bytes at 100, or a block status.
#[test]
fn each_breach_has_its_error() {
    let broken = |write: &dyn Fn(&mut BytesMut, u64, u64)| {
        let mut wire = Transmission::new(true, CONTEXTS);
        let mut out = BytesMut::new();
        let (read, status) = (wire.read(100, 10, 0, &mut out), wire.block_status(0, 10, &mut out));
        let mut bytes = BytesMut::new();
        write(&mut bytes, read, status);
        feed(&mut wire, &bytes, 1000).unwrap_err()
    };
    use ProtocolError::*;
    let head = |flags, kind, cookie, length| ReplyHead::Chunk { flags, kind, cookie, length };
    assert_eq!(broken(&|b, _, _| b.put_slice(b"junk")), BadMagic(0x6a75_6e6b));
    assert_eq!(broken(&|b, _, _| chunk(b, true, chunk::NONE, 99, &[])), UnknownCookie);
    assert_eq!(broken(&|b, r, _| ReplyHead::Simple { error: 0, cookie: r }.encode(b)), SimpleReply);
    assert_eq!(broken(&|b, r, _| chunk(b, true, chunk::NONE, r, &[])), Incomplete);
    let endless = BadChunk { kind: chunk::NONE, length: 0 };
    assert_eq!(broken(&|b, r, _| chunk(b, false, chunk::NONE, r, &[])), endless);
    assert_eq!(broken(&|b, r, _| chunk(b, true, chunk::OFFSET_DATA, r, &data(100, &[0; 9]))), Incomplete);
    assert_eq!(broken(&|b, r, _| chunk(b, true, chunk::OFFSET_DATA, r, &data(99, &[0; 9]))), BadRange);
    assert_eq!(broken(&|b, r, _| chunk(b, true, chunk::OFFSET_DATA, r, &data(101, &[0; 10]))), BadRange);
    assert_eq!(broken(&|b, r, _| chunk(b, true, chunk::OFFSET_HOLE, r, &hole(100, 11))), BadRange);
    assert_eq!(broken(&|b, r, _| chunk(b, true, chunk::OFFSET_HOLE, r, &hole(100, 0))), BadRange);
    let twice = |b: &mut BytesMut, r, _| {
        chunk(b, false, chunk::OFFSET_DATA, r, &data(100, &[0; 6]));
        chunk(b, true, chunk::OFFSET_DATA, r, &data(105, &[0; 5]));
    };
    assert_eq!(broken(&twice), BadRange);
    let huge = |b: &mut BytesMut, r, _| {
        head(0, chunk::OFFSET_DATA, r, u32::MAX).encode(b);
        b.put_slice(&100u64.to_be_bytes());
    };
    assert_eq!(broken(&huge), BadRange);
    let long = |b: &mut BytesMut, _, s| head(0, chunk::BLOCK_STATUS, s, MAX_STATUS + 8).encode(b);
    assert_eq!(broken(&long), BadChunk { kind: chunk::BLOCK_STATUS, length: MAX_STATUS + 8 });
    let foreign = |b: &mut BytesMut, _, s| chunk(b, true, chunk::BLOCK_STATUS, s, &map(5, &[(1, 0)]));
    assert!(matches!(broken(&foreign), BadStatus(_)));
    let empty = |b: &mut BytesMut, _, s| chunk(b, true, chunk::BLOCK_STATUS, s, &map(1, &[(0, 0)]));
    assert!(matches!(broken(&empty), BadStatus(_)));
    let half = |b: &mut BytesMut, _, s| chunk(b, true, chunk::BLOCK_STATUS, s, &map(1, &[(9, 0)]));
    assert!(matches!(broken(&half), BadStatus(_)));

    let write = |send: &dyn Fn(&mut BytesMut, u64)| {
        let mut wire = Transmission::new(true, CONTEXTS);
        let cookie = wire.write(0, 10, &mut BytesMut::new());
        let mut bytes = BytesMut::new();
        send(&mut bytes, cookie);
        feed(&mut wire, &bytes, 1000).unwrap_err()
    };
    let silent = BadChunk { kind: chunk::NONE, length: 0 };
    assert_eq!(write(&|b, w| chunk(b, false, chunk::NONE, w, &[])), silent);
    let read = BadChunk { kind: chunk::OFFSET_DATA, length: 18 };
    assert_eq!(write(&|b, w| chunk(b, true, chunk::OFFSET_DATA, w, &data(0, &[0; 10]))), read);
    let twice = |b: &mut BytesMut, w| {
        ReplyHead::Simple { error: 0, cookie: w }.encode(b);
        ReplyHead::Simple { error: 0, cookie: w }.encode(b);
    };
    assert_eq!(write(&twice), UnknownCookie);
}

/// Each system call more for a reply is felt in small reads.
#[test]
fn a_small_read_is_received_at_once() {
    let mut wire = Transmission::new(true, CONTEXTS);
    for number in 0..20 {
        let cookie = wire.read(number * 4096, 4096, 0, &mut BytesMut::new());
        let mut reply = BytesMut::new();
        chunk(&mut reply, true, chunk::OFFSET_DATA, cookie, &data(number * 4096, &[9; 4096]));
        assert!(wire.space().chunk_mut().len() >= reply.len(), "reply {number}");
        let (replies, _) = feed(&mut wire, &reply, usize::MAX).unwrap();
        assert_eq!(read(&replies[0]), (cookie, Ok(Bytes::from(vec![9; 4096]))));
    }
}
