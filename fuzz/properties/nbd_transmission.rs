//! A hostile NBD server answers reads, writes and block status requests that are in flight.
//!
//! The input is a little script: which requests, then what the server sends, in chunks that are nearly right.
//! The machine is held against a model that is too simple to be wrong: one `Option<u8>` a byte asked for.

use std::collections::BTreeMap;

use arbitrary::Unstructured;
use bytes::{Buf as _, BufMut as _, BytesMut};
use virtmark::nbd::handshake::Contexts;
use virtmark::nbd::proto::{self, Decoded, ReplyHead, chunk};
use virtmark::nbd::transmission::{MAX_ERROR, MAX_STATUS, Reply, Transmission};

use super::number;

/// A reply: of which request, and the bytes of a read, nothing of a block status, or the server's error.
type Told = (u64, Result<Vec<u8>, u32>);

/// Whatever comes: no panic, and exactly the replies of the model. So never other bytes or more than were asked
/// for, and no reply that is incomplete or has data twice.
pub fn check(input: &[u8]) {
    let mut script = Unstructured::new(input);
    let choice: u8 = number(&mut script);
    let structured = choice & 1 == 0;
    let id = |bit: u8, id| (structured && choice & bit != 0).then_some(id);
    let contexts = Contexts { allocation: id(2, 1), depth: id(4, 2), dirty: id(8, 0xffff_ffff) };
    let step = [1, 7, 29, usize::MAX][usize::from(choice >> 6)];
    let mut wire = Transmission::new(structured, contexts);
    let mut model = Model { structured, contexts, in_flight: BTreeMap::new(), told: Vec::new() };
    let mut requests = BytesMut::new();
    for _ in 0..=(choice >> 4 & 3) {
        ask(&mut script, &mut wire, &mut model, &mut requests);
    }
    assert_eq!(requests.len(), model.in_flight.len() * proto::REQUEST_LEN);
    let server = answers(&mut script, &model);
    let sound = model.run(&server);
    let (told, failed) = run(&mut wire, &server, step);
    assert_eq!(told, model.told);
    assert_eq!(failed, !sound, "the machine and the model disagree about {server:?}");
    assert!(failed || wire.in_flight() == model.in_flight.len());
}

fn ask(script: &mut Unstructured<'_>, wire: &mut Transmission, model: &mut Model, out: &mut BytesMut) {
    let (kind, length, place): (u8, u16, u16) = (number(script), number(script), number(script));
    let length = u32::from(length % 4096) + 1;
    let offset = if kind & 2 == 0 { u64::from(place) } else { (1 << 63) - u64::from(place) - 4096 };
    let (cookie, request) = if kind & 0xc0 == 0xc0 {
        let cookie = match kind & 3 {
            0 => wire.flush(out),
            1 => wire.write_zeroes(offset, length, 0, out),
            _ => wire.write(offset, length, out),
        };
        (cookie, Request::Plain)
    } else if kind & 1 == 0 {
        let have = vec![None; length as usize];
        (wire.read(offset, length, 0, out), Request::Read { offset, have })
    } else {
        (wire.block_status(offset, length, out), Request::Status(Vec::new()))
    };
    model.in_flight.insert(cookie, (request, None));
}

/// What the server sends: chunks of every kind with fields that fit, nearly fit or do not.
fn answers(script: &mut Unstructured<'_>, model: &Model) -> Vec<u8> {
    let mut out = BytesMut::new();
    while !script.is_empty() && out.len() < 1 << 16 {
        let (op, cookie): (u8, u8) = (number(script), number(script));
        let done = if op & 0x80 == 0 { chunk::FLAG_DONE } else { 0 };
        let cookie = u64::from(cookie % 6);
        let start = match model.in_flight.get(&cookie) {
            Some((Request::Read { offset, .. }, _)) => *offset,
            _ => 0,
        };
        let mut payload = BytesMut::new();
        let kind = match op & 7 {
            0 => {
                let most = usize::from(number::<u8>(script));
                out.put_slice(script.bytes(most.min(script.len())).unwrap_or_default());
                continue;
            }
            1 => {
                let (error, length): (u8, u16) = (number(script), number(script));
                ReplyHead::Simple { error: u32::from(error >> 4), cookie }.encode(&mut out);
                out.put_bytes(error, usize::from(length % 4100));
                continue;
            }
            2 => {
                let (at, length, fill): (i16, u16, u8) = (number(script), number(script), number(script));
                payload.put_u64(start.wrapping_add_signed(i64::from(at)));
                payload.put_bytes(fill, usize::from(length % 4100));
                chunk::OFFSET_DATA
            }
            3 => {
                let (at, length): (i16, u16) = (number(script), number(script));
                payload.put_u64(start.wrapping_add_signed(i64::from(at)));
                payload.put_u32(u32::from(length));
                chunk::OFFSET_HOLE
            }
            4 => {
                let (id, runs): (u8, u8) = (number(script), number(script));
                payload.put_u32([0, 1, 2, u32::MAX][usize::from(id & 3)]);
                for _ in 0..runs & 7 {
                    payload.put_u32(number(script));
                    payload.put_u32(number::<u8>(script).into());
                }
                chunk::BLOCK_STATUS
            }
            5 => {
                let (errno, said, length): (u8, u8, u8) = (number(script), number(script), number(script));
                payload.put_u32(errno.into());
                payload.put_u16(said.into());
                payload.put_bytes(b'\n', length.into());
                chunk::ERROR | 1
            }
            6 => chunk::NONE,
            _ => {
                let (kind, length): (u16, u32) = (number(script), number(script));
                ReplyHead::Chunk { flags: done, kind, cookie, length }.encode(&mut out);
                continue;
            }
        };
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        ReplyHead::Chunk { flags: done, kind, cookie, length }.encode(&mut out);
        out.put_slice(&payload);
    }
    out.to_vec()
}

/// Feeds the machine as its client does; what it told, and whether it gave up.
fn run(wire: &mut Transmission, mut server: &[u8], step: usize) -> (Vec<Told>, bool) {
    let mut told = Vec::new();
    loop {
        match wire.advance() {
            Ok(Some(Reply::Read { cookie, result })) => {
                told.push((
                    cookie,
                    result.map(|bytes| bytes.to_vec()).map_err(|error| {
                        assert!(error.message.chars().count() <= 200 && !error.message.contains('\n'));
                        error.errno
                    }),
                ));
            }
            Ok(Some(Reply::Status { cookie, result })) => {
                told.push((cookie, result.map(|_| Vec::new()).map_err(|error| error.errno)));
            }
            Ok(Some(Reply::Done { cookie, result })) => {
                told.push((cookie, result.map(|()| Vec::new()).map_err(|error| error.errno)));
            }
            Ok(None) if server.is_empty() => return (told, false),
            Ok(None) => {
                let mut space = wire.space();
                let take = server.len().min(step).min(space.remaining_mut());
                assert!(take > 0, "a read of no bytes means the end of the stream");
                space.put_slice(&server[..take]);
                server.advance(take);
            }
            Err(_) => return (told, true),
        }
    }
}

enum Request {
    Read {
        offset: u64,
        have: Vec<Option<u8>>,
    },
    Status(Vec<u32>),
    /// A write, zeroes or a flush.
    Plain,
}

struct Model {
    structured: bool,
    contexts: Contexts,
    in_flight: BTreeMap<u64, (Request, Option<u32>)>,
    told: Vec<Told>,
}

impl Model {
    /// Reads all that the server sent; false when it broke the protocol.
    fn run(&mut self, mut server: &[u8]) -> bool {
        loop {
            let (head, taken) = match ReplyHead::decode(server) {
                Decoded::Need(_) => return true,
                Decoded::BadMagic(_) => return false,
                Decoded::Head(head, taken) => (head, taken),
            };
            let next = match head {
                ReplyHead::Simple { error, cookie } => self.simple(error, cookie, &server[taken..]),
                ReplyHead::Chunk { flags, kind, cookie, length } => {
                    let done = flags & chunk::FLAG_DONE != 0;
                    self.chunk(done, kind, cookie, length as usize, &server[taken..])
                }
            };
            match next {
                Some(Next::Go(used)) => server.advance(taken + used),
                Some(Next::Hungry) => return true,
                None => return false,
            }
        }
    }

    fn simple(&mut self, error: u32, cookie: u64, rest: &[u8]) -> Option<Next> {
        let (request, earlier) = self.in_flight.get(&cookie)?;
        // what was said to have failed did, whatever is said after
        let failed = Some(error).filter(|error| *error != 0).or(*earlier);
        let length = match request {
            _ if error != 0 => 0,
            Request::Read { have, .. } if !self.structured => have.len(),
            Request::Plain => 0,
            _ => return None,
        };
        let Some(data) = rest.get(..length) else { return Some(Next::Hungry) };
        self.in_flight.remove(&cookie);
        self.told.push((cookie, failed.map_or_else(|| Ok(data.to_vec()), Err)));
        Some(Next::Go(length))
    }

    fn chunk(&mut self, done: bool, kind: u16, cookie: u64, length: usize, rest: &[u8]) -> Option<Next> {
        if kind == chunk::OFFSET_DATA && length > 8 && rest.len() < 8 {
            return Some(Next::Hungry);
        }
        let (request, error) = self.in_flight.get_mut(&cookie).filter(|_| self.structured)?;
        // what the head tells, and for data the offset behind it
        match (kind, &*request) {
            (chunk::NONE, _) => (length == 0 && done).then_some(())?,
            (chunk::OFFSET_DATA, Request::Read { offset, have }) => {
                (length > 8).then_some(())?;
                inside(*offset, have.len(), proto::be64(rest, 0)?, length - 8)?;
            }
            (chunk::OFFSET_HOLE, Request::Read { .. }) => (length == 12).then_some(())?,
            (chunk::BLOCK_STATUS, Request::Status(_)) => {
                (length >= 12 && length <= MAX_STATUS as usize && length % 8 == 4).then_some(())?;
            }
            (kind, _) => {
                (kind & chunk::ERROR != 0 && length >= 6 && length <= MAX_ERROR as usize).then_some(())?;
            }
        }
        let Some(payload) = rest.get(..length) else { return Some(Next::Hungry) };
        match (kind, &mut *request) {
            (chunk::OFFSET_DATA, Request::Read { offset, have }) => {
                let place = inside(*offset, have.len(), proto::be64(payload, 0)?, length - 8)?;
                fill(&mut have[place..place + length - 8], payload[8..].iter().copied())?;
            }
            (chunk::OFFSET_HOLE, Request::Read { offset, have }) => {
                let hole = proto::be32(payload, 8)? as usize;
                let place = inside(*offset, have.len(), proto::be64(payload, 0)?, hole)?;
                fill(&mut have[place..place + hole], std::iter::repeat(0))?;
            }
            (chunk::BLOCK_STATUS, Request::Status(seen)) => {
                let id = proto::be32(payload, 0)?;
                let Contexts { allocation, depth, dirty } = self.contexts;
                let agreed = [allocation, depth, dirty].contains(&Some(id));
                let lengths = payload[4..].chunks(8).map(|run| proto::be32(run, 0));
                (agreed && !seen.contains(&id) && !lengths.into_iter().any(|l| l == Some(0))).then_some(())?;
                seen.push(id);
            }
            (chunk::NONE, _) => {}
            _ => {
                let said = usize::from(proto::be16(payload, 4)?);
                payload.get(6..6 + said)?;
                error.get_or_insert(proto::be32(payload, 0)?);
            }
        }
        if done {
            let (request, error) = self.in_flight.remove(&cookie)?;
            let result = match (error, request) {
                (Some(errno), _) => Err(errno),
                (None, Request::Read { have, .. }) => Ok(have.into_iter().collect::<Option<Vec<u8>>>()?),
                (None, Request::Status(seen)) => {
                    let Contexts { allocation, depth, dirty } = self.contexts;
                    let wanted = [allocation, depth, dirty].into_iter().flatten();
                    wanted.into_iter().all(|id| seen.contains(&id)).then(|| Ok(Vec::new()))?
                }
                (None, Request::Plain) => Ok(Vec::new()),
            };
            self.told.push((cookie, result));
        }
        Some(Next::Go(length))
    }
}

enum Next {
    Go(usize),
    Hungry,
}

fn inside(offset: u64, asked: usize, at: u64, length: usize) -> Option<usize> {
    let place = usize::try_from(at.checked_sub(offset)?).ok()?;
    (length > 0 && place.checked_add(length)? <= asked).then_some(place)
}

/// Puts bytes where none are yet.
fn fill(have: &mut [Option<u8>], bytes: impl Iterator<Item = u8>) -> Option<()> {
    have.iter_mut().zip(bytes).all(|(have, byte)| have.replace(byte).is_none()).then_some(())
}
