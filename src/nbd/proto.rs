//! The NBD wire format: numbers, and codecs on byte slices.
//!
//! Source: the NBD specification (`doc/proto.md` of NetworkBlockDevice/nbd), sections named at each item. All
//! numbers are big endian. Nothing here reads, writes, allocates for a peer's number or keeps state.

use bytes::{BufMut, BytesMut};

/// `NBDMAGIC`, the first eight bytes from a server ("Newstyle negotiation").
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: a newstyle server, and the head of each option request.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Head of each option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Head of each request in the transmission phase.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Head of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Head of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Longest string of the protocol ("Values": strings).
pub const MAX_STRING: usize = 4096;

/// Server handshake flag: fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Server handshake flag: no 124 zero bytes after `EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Options ("Option types").
pub mod option {
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Name the export, hear about it, begin transmission.
    pub const GO: u32 = 7;
    /// Structured replies from now on.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which meta contexts exist.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Which meta contexts block status shall report.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Option replies ("Option reply types").
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One piece of information about the export.
    pub const INFO: u32 = 3;
    /// One meta context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR: u32 = 1 << 31;
    /// The server does not know the option.
    pub const ERR_UNSUPPORTED: u32 = ERROR | 1;
    /// Forbidden by the server's policy.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// TLS must be used.
    pub const ERR_TLS_REQUIRED: u32 = ERROR | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
}

/// Information types of `OPT_GO`.
pub mod info {
    /// Size and transmission flags: always sent.
    pub const EXPORT: u16 = 0;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of the export that this client looks at.
pub mod export_flag {
    /// Nothing can be written.
    pub const READ_ONLY: u16 = 1 << 1;
    /// The server knows `FLUSH`.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The server knows `WRITE_ZEROES`.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The server honours "do not fragment" on reads.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see the same data.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Commands ("Request types").
pub mod command {
    /// Read bytes.
    pub const READ: u16 = 0;
    /// Write the bytes that follow the request.
    pub const WRITE: u16 = 1;
    /// End the session.
    pub const DISCONNECT: u16 = 2;
    /// All that was written before is to be on stable storage.
    pub const FLUSH: u16 = 3;
    /// Make a range read as zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask for the state of a range.
    pub const BLOCK_STATUS: u16 = 7;
    /// Command flag: the zeroes are to be allocated, no hole is punched.
    pub const FLAG_NO_HOLE: u16 = 1 << 1;
    /// Command flag: answer a read in one chunk.
    pub const FLAG_DF: u16 = 1 << 2;
}

/// Structured reply chunk types.
pub mod chunk {
    /// Flag: last chunk of the reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// No payload.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and a length of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Context id and descriptors.
    pub const BLOCK_STATUS: u16 = 5;
    /// Set in every error chunk.
    pub const ERROR: u16 = 1 << 15;
}

/// `base:allocation` state bit: reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;
/// `qemu:dirty-bitmap:*` state bit: dirty (QEMU's `docs/interop/nbd.txt`).
pub const STATE_DIRTY: u32 = 1 << 0;
/// Prefix of QEMU's dirty bitmap contexts.
pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// Context with the zero state.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Context with the depth in the chain at which a range is allocated, 0 for nowhere.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

/// Bytes of a request.
pub const REQUEST_LEN: usize = 28;
/// Bytes of a simple reply's head.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Bytes of a structured chunk's head.
pub const CHUNK_LEN: usize = 20;
/// Bytes of an option reply's head.
pub const OPTION_REPLY_LEN: usize = 20;
/// Bytes of the server's greeting.
pub const GREETING_LEN: usize = 18;

/// A request of the transmission phase.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Command.
    pub command: u16,
    /// Chosen by the client, given back in the reply.
    pub cookie: u64,
    /// Bytes from the start of the export.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Request {
    /// Appends the 28 bytes of the request.
    pub fn encode(&self, out: &mut BytesMut) {
        out.reserve(REQUEST_LEN);
        out.put_u32(REQUEST_MAGIC);
        out.put_u16(self.flags);
        out.put_u16(self.command);
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        out.put_u32(self.length);
    }

    /// Reads a request, as a server does; `None` when the bytes are too few or are none.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Request> {
        (be32(bytes, 0)? == REQUEST_MAGIC).then_some(())?;
        Some(Request {
            flags: be16(bytes, 4)?,
            command: be16(bytes, 6)?,
            cookie: be64(bytes, 8)?,
            offset: be64(bytes, 16)?,
            length: be32(bytes, 24)?,
        })
    }
}

/// The head of a reply in the transmission phase.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyHead {
    /// A simple reply; the data of a read follows when `error` is 0.
    Simple {
        /// 0 or an NBD error number.
        error: u32,
        /// Of the request.
        cookie: u64,
    },
    /// A structured reply chunk; `length` bytes of payload follow.
    Chunk {
        /// Chunk flags.
        flags: u16,
        /// Chunk type.
        kind: u16,
        /// Of the request.
        cookie: u64,
        /// Bytes of payload.
        length: u32,
    },
}

/// What [`ReplyHead::decode`] made of the bytes so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decoded {
    /// So many bytes in all are needed to say more.
    Need(usize),
    /// A head, and how many bytes it took.
    Head(ReplyHead, usize),
    /// The first four bytes are no reply's.
    BadMagic(u32),
}

impl ReplyHead {
    /// Reads the head of a reply from the first bytes of `bytes`.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Decoded {
        let Some(magic) = be32(bytes, 0) else { return Decoded::Need(SIMPLE_REPLY_LEN) };
        let head = match magic {
            SIMPLE_REPLY_MAGIC => simple(bytes).ok_or(SIMPLE_REPLY_LEN),
            STRUCTURED_REPLY_MAGIC => structured(bytes).ok_or(CHUNK_LEN),
            other => return Decoded::BadMagic(other),
        };
        match head {
            Ok((head, length)) => Decoded::Head(head, length),
            Err(need) => Decoded::Need(need),
        }
    }

    /// Appends the head, as a server does.
    pub fn encode(&self, out: &mut BytesMut) {
        match *self {
            ReplyHead::Simple { error, cookie } => {
                out.put_u32(SIMPLE_REPLY_MAGIC);
                out.put_u32(error);
                out.put_u64(cookie);
            }
            ReplyHead::Chunk { flags, kind, cookie, length } => {
                out.put_u32(STRUCTURED_REPLY_MAGIC);
                out.put_u16(flags);
                out.put_u16(kind);
                out.put_u64(cookie);
                out.put_u32(length);
            }
        }
    }
}

fn simple(bytes: &[u8]) -> Option<(ReplyHead, usize)> {
    Some((ReplyHead::Simple { error: be32(bytes, 4)?, cookie: be64(bytes, 8)? }, SIMPLE_REPLY_LEN))
}

fn structured(bytes: &[u8]) -> Option<(ReplyHead, usize)> {
    let head = ReplyHead::Chunk {
        flags: be16(bytes, 4)?,
        kind: be16(bytes, 6)?,
        cookie: be64(bytes, 8)?,
        length: be32(bytes, 16)?,
    };
    Some((head, CHUNK_LEN))
}

/// The head of an option reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionReply {
    /// The option answered.
    pub option: u32,
    /// Reply type.
    pub kind: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionReply {
    /// Reads the head of an option reply; `Ok(None)` when bytes are missing, the wrong magic as error.
    pub fn decode(bytes: &[u8]) -> Result<Option<OptionReply>, u64> {
        match be64(bytes, 0) {
            None => Ok(None),
            Some(OPTION_REPLY_MAGIC) => Ok((|| {
                Some(OptionReply {
                    option: be32(bytes, 8)?,
                    kind: be32(bytes, 12)?,
                    length: be32(bytes, 16)?,
                })
            })()),
            Some(other) => Err(other),
        }
    }

    /// Appends the head, as a server does.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u64(OPTION_REPLY_MAGIC);
        out.put_u32(self.option);
        out.put_u32(self.kind);
        out.put_u32(self.length);
    }
}

/// Appends an option request. Options are small: `data` over 4 GiB cannot happen and is cut.
pub fn encode_option(option: u32, data: &[u8], out: &mut BytesMut) {
    out.put_u64(OPTION_MAGIC);
    out.put_u32(option);
    put_counted(data, out);
}

/// Appends a 32-bit length and the bytes.
pub fn put_counted(data: &[u8], out: &mut BytesMut) {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    out.put_u32(length);
    out.put_slice(&data[..length as usize]);
}

/// The name of an NBD error number ("Error values").
#[must_use]
pub fn error_name(error: u32) -> &'static str {
    match error {
        1 => "EPERM",
        5 => "EIO",
        12 => "ENOMEM",
        22 => "EINVAL",
        28 => "ENOSPC",
        75 => "EOVERFLOW",
        95 => "ENOTSUP",
        108 => "ESHUTDOWN",
        _ => "unknown error",
    }
}

/// The 16-bit number at `at`.
#[must_use]
pub fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_be_bytes)
}

/// The 32-bit number at `at`.
#[must_use]
pub fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
}

/// The 64-bit number at `at`.
#[must_use]
pub fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn requests_come_back(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
            let request = Request { flags, command, cookie, offset, length };
            let mut out = BytesMut::new();
            request.encode(&mut out);
            prop_assert_eq!(out.len(), REQUEST_LEN);
            prop_assert_eq!(Request::decode(&out), Some(request));
        }

        #[test]
        fn reply_heads_come_back(error: u32, flags: u16, kind: u16, cookie: u64, length: u32) {
            for head in [ReplyHead::Simple { error, cookie }, ReplyHead::Chunk { flags, kind, cookie, length }] {
                let mut out = BytesMut::new();
                head.encode(&mut out);
                prop_assert_eq!(ReplyHead::decode(&out), Decoded::Head(head, out.len()));
                for cut in 0..out.len() {
                    prop_assert!(matches!(ReplyHead::decode(&out[..cut]), Decoded::Need(n) if n > cut));
                }
            }
        }

        #[test]
        fn option_replies_come_back(option: u32, kind: u32, length: u32) {
            let reply = OptionReply { option, kind, length };
            let mut out = BytesMut::new();
            reply.encode(&mut out);
            prop_assert_eq!(OptionReply::decode(&out), Ok(Some(reply)));
        }

        #[test]
        fn any_bytes_decode_without_panic(bytes: Vec<u8>) {
            let _ = (Request::decode(&bytes), ReplyHead::decode(&bytes), OptionReply::decode(&bytes));
        }
    }
}
