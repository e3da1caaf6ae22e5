//! The transmission phase as a machine: requests are noted as they are sent, bytes from the server become
//! whole replies. No socket, no waiting.
//!
//! ```text
//!            submit                       space/advance                      advance
//! (cookie) ---------> in flight --chunks--> collecting (payload, maps) --DONE--> Reply
//!                                              \--error chunk--> Reply with the server's error
//! ```
//!
//! The reader puts bytes where [`Transmission::space`] says. A read that comes as one chunk (always, with
//! the DF flag) is received straight into the buffer that is handed out; nothing is copied.
//!
//! A server is not trusted: unknown cookies, ranges that were not asked for, overlapping or missing data,
//! impossible lengths are typed errors, after which the machine must not be used again. Memory is bound by
//! what was asked for, [`MAX_STATUS`] per context and [`MAX_ERROR`].

use std::collections::{BTreeMap, HashMap};

use bytes::buf::Limit;
use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::handshake::{Contexts, words};
use super::proto::{self, Decoded, ReplyHead, Request, chunk, command};
use super::status::Maps;
use buffers::Buffers;

mod buffers;

/// Longest block status payload that is read: four times what QEMU sends at most.
pub const MAX_STATUS: u32 = 4 + 8 * (1 << 19);
/// Longest error payload that is read.
pub const MAX_ERROR: u32 = 14 + 4096;

/// Bytes received when a head is awaited: what follows it is copied to where it belongs.
const HEAD: usize = proto::CHUNK_LEN + 8 + 4096;

/// Zeroes for holes, shared by all who read one.
static ZEROES: [u8; 256 << 10] = [0; 256 << 10];

/// The server broke the protocol; the connection cannot be used any more.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProtocolError {
    /// No reply begins so.
    #[error("a reply begins with {0:#010x}")]
    BadMagic(u32),
    /// A reply to nothing.
    #[error("a reply has a cookie that no request in flight has")]
    UnknownCookie,
    /// A chunk type that cannot answer the request.
    #[error("a chunk of type {kind} with {length} bytes does not fit its request")]
    BadChunk {
        /// Chunk type.
        kind: u16,
        /// Payload length.
        length: u32,
    },
    /// A simple reply where a structured one must be.
    #[error("a simple reply to a request that needs a structured one")]
    SimpleReply,
    /// Data outside the range asked for, or twice.
    #[error("data outside the range that was asked for, or sent twice")]
    BadRange,
    /// The last chunk came before all was sent.
    #[error("a reply ended before all of it was sent")]
    Incomplete,
    /// A block status that does not make sense.
    #[error("a malformed block status: {0}")]
    BadStatus(&'static str),
}

/// The server's own error for one request.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{} ({errno}){}{message}", proto::error_name(*errno), if message.is_empty() { "" } else { ": " })]
pub struct ServerError {
    /// NBD error number.
    pub errno: u32,
    /// The server's own words, maybe none.
    pub message: String,
}

/// A whole reply.
#[derive(Debug)]
pub enum Reply {
    /// The bytes of a read, as many as were asked for.
    Read {
        /// Of the request.
        cookie: u64,
        /// The bytes.
        result: Result<Bytes, ServerError>,
    },
    /// The maps of a block status.
    Status {
        /// Of the request.
        cookie: u64,
        /// One map a context.
        result: Result<Maps, ServerError>,
    },
    /// A write, zeroes or a flush are done.
    Done {
        /// Of the request.
        cookie: u64,
        /// Nothing more is told.
        result: Result<(), ServerError>,
    },
}

#[derive(Debug)]
enum Kind {
    Read {
        offset: u64,
        length: u32,
        data: Assembly,
    },
    Status(Maps),
    /// Its reply has no payload.
    Plain,
}

#[derive(Debug)]
struct Pending {
    kind: Kind,
    error: Option<ServerError>,
}

/// The bytes of a read as far as they came.
#[derive(Debug)]
enum Assembly {
    Nothing,
    Whole(Bytes),
    Pieces { buffer: BytesMut, have: BTreeMap<u32, u32>, bytes: u32 },
}

/// A chunk (or simple reply) whose payload is being received.
#[derive(Clone, Copy, Debug)]
struct Receiving {
    cookie: u64,
    kind: u16,
    done: bool,
    /// Offset of an `OFFSET_DATA` chunk.
    offset: u64,
    payload: usize,
}

/// The machine, see the module's picture.
#[derive(Debug)]
pub struct Transmission {
    structured: bool,
    contexts: Contexts,
    cookie: u64,
    in_flight: HashMap<u64, Pending>,
    head: BytesMut,
    receiving: Option<Receiving>,
    payload: BytesMut,
    buffers: Buffers,
}

impl Transmission {
    /// A machine for a session on which the handshake agreed so.
    #[must_use]
    pub fn new(structured: bool, contexts: Contexts) -> Transmission {
        Transmission {
            structured,
            contexts,
            cookie: 0,
            in_flight: HashMap::new(),
            head: BytesMut::with_capacity(64),
            receiving: None,
            payload: BytesMut::new(),
            buffers: Buffers::default(),
        }
    }

    /// Frees what is kept for further reads.
    pub fn rest(&mut self) {
        self.buffers.forget();
    }

    /// Requests without a reply.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Appends a read to `out` and notes it; its cookie.
    pub fn read(&mut self, offset: u64, length: u32, flags: u16, out: &mut BytesMut) -> u64 {
        let kind = Kind::Read { offset, length, data: Assembly::Nothing };
        self.submit(Request { flags, command: command::READ, cookie: 0, offset, length }, kind, out)
    }

    /// Appends a block status request to `out` and notes it; its cookie.
    pub fn block_status(&mut self, offset: u64, length: u32, out: &mut BytesMut) -> u64 {
        let kind = Kind::Status(Maps::default());
        let request = Request { flags: 0, command: command::BLOCK_STATUS, cookie: 0, offset, length };
        self.submit(request, kind, out)
    }

    /// Appends the head of a write to `out` and notes it; its cookie. The caller sends `length` bytes behind it.
    pub fn write(&mut self, offset: u64, length: u32, out: &mut BytesMut) -> u64 {
        let request = Request { flags: 0, command: command::WRITE, cookie: 0, offset, length };
        self.submit(request, Kind::Plain, out)
    }

    /// Appends a request for zeroes to `out` and notes it; its cookie.
    pub fn write_zeroes(&mut self, offset: u64, length: u32, flags: u16, out: &mut BytesMut) -> u64 {
        let request = Request { flags, command: command::WRITE_ZEROES, cookie: 0, offset, length };
        self.submit(request, Kind::Plain, out)
    }

    /// Appends a flush to `out` and notes it; its cookie.
    pub fn flush(&mut self, out: &mut BytesMut) -> u64 {
        let request = Request { flags: 0, command: command::FLUSH, cookie: 0, offset: 0, length: 0 };
        self.submit(request, Kind::Plain, out)
    }

    /// Appends the request that ends the session, which has no reply.
    pub fn disconnect(&mut self, out: &mut BytesMut) {
        Request { flags: 0, command: command::DISCONNECT, cookie: 0, offset: 0, length: 0 }.encode(out);
    }

    fn submit(&mut self, request: Request, kind: Kind, out: &mut BytesMut) -> u64 {
        self.cookie += 1;
        Request { cookie: self.cookie, ..request }.encode(out);
        self.in_flight.insert(self.cookie, Pending { kind, error: None });
        self.cookie
    }

    /// Where the next bytes from the server go: never of length 0, never more than the current payload can take,
    /// or than a head and a little of what follows it.
    pub fn space(&mut self) -> Limit<&mut BytesMut> {
        match &self.receiving {
            Some(receiving) => {
                let missing = receiving.payload - self.payload.len();
                (&mut self.payload).limit(missing)
            }
            // A head, and the data of a small read with it, are received at once.
            None => {
                let missing = HEAD.saturating_sub(self.head.len()).max(1);
                // Without this, what is left of its capacity would cut a head into pieces.
                self.head.reserve(missing);
                (&mut self.head).limit(missing)
            }
        }
    }

    /// Looks at what came; a whole reply if there is one. Call again until it gives none.
    pub fn advance(&mut self) -> Result<Option<Reply>, ProtocolError> {
        loop {
            let Some(receiving) = self.receiving else {
                if !self.begin()? {
                    return Ok(None);
                }
                continue;
            };
            if self.payload.len() < receiving.payload {
                let take = self.head.len().min(receiving.payload - self.payload.len());
                self.payload.put_slice(&self.head[..take]);
                self.head.advance(take);
                if self.payload.len() < receiving.payload {
                    return Ok(None);
                }
            }
            self.receiving = None;
            let payload = self.buffers.lend(std::mem::take(&mut self.payload));
            if let Some(reply) = self.finish(receiving, payload)? {
                return Ok(Some(reply));
            }
        }
    }

    /// Reads a head; false when bytes are missing.
    fn begin(&mut self) -> Result<bool, ProtocolError> {
        let (head, mut taken) = match ReplyHead::decode(&self.head) {
            Decoded::Need(_) => return Ok(false),
            Decoded::BadMagic(magic) => return Err(ProtocolError::BadMagic(magic)),
            Decoded::Head(head, taken) => (head, taken),
        };
        let receiving = match head {
            ReplyHead::Simple { error, cookie } => self.simple(error, cookie)?,
            ReplyHead::Chunk { flags, kind, cookie, length } => {
                let mut offset = 0;
                if kind == chunk::OFFSET_DATA && length > 8 {
                    let Some(place) = proto::be64(&self.head, taken) else { return Ok(false) };
                    (offset, taken) = (place, taken + 8);
                }
                let done = flags & chunk::FLAG_DONE != 0;
                let payload = self.check_chunk((kind, done), cookie, offset, length)?;
                Receiving { cookie, kind, done, offset, payload }
            }
        };
        self.head.advance(taken);
        self.payload = self.buffers.take(receiving.payload);
        self.receiving = Some(receiving);
        Ok(true)
    }

    /// A simple reply, seen as the chunk that it is like.
    fn simple(&mut self, error: u32, cookie: u64) -> Result<Receiving, ProtocolError> {
        let pending = self.in_flight.get_mut(&cookie).ok_or(ProtocolError::UnknownCookie)?;
        let none = Receiving { cookie, kind: chunk::NONE, done: true, offset: 0, payload: 0 };
        if error != 0 {
            pending.error = Some(ServerError { errno: error, message: String::new() });
            return Ok(none);
        }
        match &pending.kind {
            Kind::Read { offset, length, .. } if !self.structured => {
                Ok(Receiving { kind: chunk::OFFSET_DATA, offset: *offset, payload: *length as usize, ..none })
            }
            // what has no payload may be answered so in any session, and QEMU does
            Kind::Plain => Ok(none),
            _ => Err(ProtocolError::SimpleReply),
        }
    }

    /// Whether a chunk may answer its request; the bytes of payload that follow.
    fn check_chunk(
        &self,
        (kind, done): (u16, bool),
        cookie: u64,
        offset: u64,
        length: u32,
    ) -> Result<usize, ProtocolError> {
        let pending = self.in_flight.get(&cookie).ok_or(ProtocolError::UnknownCookie)?;
        let fits = self.structured
            && match (kind, &pending.kind) {
                // without DONE it says nothing, and could do so for ever
                (chunk::NONE, _) => length == 0 && done,
                (chunk::OFFSET_DATA, Kind::Read { .. }) => length > 8,
                (chunk::OFFSET_HOLE, Kind::Read { .. }) => length == 12,
                (chunk::BLOCK_STATUS, Kind::Status(_)) => {
                    (12..=MAX_STATUS).contains(&length) && (length - 4).is_multiple_of(8)
                }
                (kind, _) => kind & chunk::ERROR != 0 && (6..=MAX_ERROR).contains(&length),
            };
        if !fits {
            return Err(ProtocolError::BadChunk { kind, length });
        }
        if let (chunk::OFFSET_DATA, Kind::Read { offset: start, length: asked, .. }) = (kind, &pending.kind) {
            within(*start, *asked, offset, length - 8)?;
            return Ok(length as usize - 8);
        }
        Ok(length as usize)
    }

    /// Takes a whole chunk; the reply when it was the last.
    fn finish(&mut self, chunk: Receiving, payload: Bytes) -> Result<Option<Reply>, ProtocolError> {
        let contexts = self.contexts;
        let pending = self.in_flight.get_mut(&chunk.cookie).ok_or(ProtocolError::UnknownCookie)?;
        match (chunk.kind, &mut pending.kind) {
            (chunk::NONE, _) => {}
            (chunk::OFFSET_DATA, Kind::Read { offset, length, data }) => {
                data.take(*length, within(*offset, *length, chunk.offset, len32(&payload))?, payload)?;
            }
            (chunk::OFFSET_HOLE, Kind::Read { offset, length, data }) => {
                let at = proto::be64(&payload, 0).ok_or(ProtocolError::Incomplete)?;
                let hole = proto::be32(&payload, 8).ok_or(ProtocolError::Incomplete)?;
                data.take(*length, within(*offset, *length, at, hole)?, zeroes(hole))?;
            }
            (chunk::BLOCK_STATUS, Kind::Status(maps)) => maps.take(contexts, payload)?,
            (kind, _) if kind & chunk::ERROR != 0 => {
                let errno = proto::be32(&payload, 0).unwrap_or(0);
                let said = usize::from(proto::be16(&payload, 4).unwrap_or(0));
                let message = payload.get(6..6 + said).ok_or(ProtocolError::Incomplete)?;
                pending.error.get_or_insert(ServerError { errno, message: words(message) });
            }
            (kind, _) => return Err(ProtocolError::BadChunk { kind, length: len32(&payload) }),
        }
        if !chunk.done {
            return Ok(None);
        }
        let cookie = chunk.cookie;
        let pending = self.in_flight.remove(&cookie).ok_or(ProtocolError::UnknownCookie)?;
        let failed = pending.error;
        Ok(Some(match pending.kind {
            Kind::Read { length, data, .. } => Reply::Read {
                cookie,
                result: failed.map_or_else(|| data.finish(length).map(Ok), |error| Ok(Err(error)))?,
            },
            Kind::Status(maps) => Reply::Status {
                cookie,
                result: failed.map_or_else(|| maps.complete(contexts).map(Ok), |error| Ok(Err(error)))?,
            },
            Kind::Plain => Reply::Done { cookie, result: failed.map_or(Ok(()), Err) },
        }))
    }
}

impl Assembly {
    /// Takes `data` for offset `at` of a read of `length` bytes.
    fn take(&mut self, length: u32, at: u32, data: Bytes) -> Result<(), ProtocolError> {
        if at == 0 && len32(&data) == length && matches!(self, Assembly::Nothing) {
            *self = Assembly::Whole(data);
            return Ok(());
        }
        if matches!(self, Assembly::Nothing) {
            let buffer = BytesMut::zeroed(length as usize);
            *self = Assembly::Pieces { buffer, have: BTreeMap::new(), bytes: 0 };
        }
        let Assembly::Pieces { buffer, have, bytes } = self else { return Err(ProtocolError::BadRange) };
        let (mut start, mut end) = (at, at + len32(&data));
        let before = have.range(..end).next_back().map(|(start, end)| (*start, *end));
        match before {
            Some((_, stop)) if stop > start => return Err(ProtocolError::BadRange),
            Some((begin, stop)) if stop == start => start = begin,
            _ => {}
        }
        if let Some(stop) = have.remove(&end) {
            end = stop;
        }
        have.insert(start, end);
        *bytes += len32(&data);
        buffer[at as usize..at as usize + data.len()].copy_from_slice(&data);
        Ok(())
    }

    fn finish(self, length: u32) -> Result<Bytes, ProtocolError> {
        match self {
            Assembly::Whole(data) => Ok(data),
            Assembly::Pieces { buffer, bytes, .. } if bytes == length => Ok(buffer.freeze()),
            _ => Err(ProtocolError::Incomplete),
        }
    }
}

/// Where in a request's range a chunk lies, if it lies in it.
fn within(start: u64, length: u32, at: u64, bytes: u32) -> Result<u32, ProtocolError> {
    let place = at.checked_sub(start).and_then(|place| u32::try_from(place).ok());
    match place {
        Some(place) if bytes > 0 && place.checked_add(bytes).is_some_and(|end| end <= length) => Ok(place),
        _ => Err(ProtocolError::BadRange),
    }
}

fn zeroes(length: u32) -> Bytes {
    match ZEROES.get(..length as usize) {
        Some(zeroes) => Bytes::from_static(zeroes),
        None => BytesMut::zeroed(length as usize).freeze(),
    }
}

/// The length of a payload, which was announced as 32 bits.
fn len32(data: &Bytes) -> u32 {
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
