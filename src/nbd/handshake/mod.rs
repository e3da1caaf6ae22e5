//! The fixed newstyle handshake as a machine: bytes in, bytes out, no socket.
//!
//! ```text
//! Greeting --flags, STRUCTURED_REPLY--> StructuredReply --ACK----> SetMetaContext --ACK--> Go --ACK--> done
//!                                             |                        |                   ^
//!                                             +--error: simple replies-|-------------------+
//!                                                                      +--asked bitmap missing--> ListMetaContext
//!                                                                                                  (names it, fails)
//! ```
//!
//! Asks for `base:allocation`, `qemu:allocation-depth` and the one dirty bitmap it was told to; and for block sizes, unless
//! it was told to leave them to the server. Never
//! allocates more than [`MAX_REPLY`] bytes for what a server announces, nor reads more than
//! [`MAX_REPLIES`] replies to an option. Source: the NBD specification, "Fixed newstyle negotiation".

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::proto::{self, OptionReply, info, option, reply};

/// Longest option reply that is read; the longest legal one is a context's name and id.
pub const MAX_REPLY: u32 = 4 + 2 * 4096;
/// Most replies to one option that are read.
pub const MAX_REPLIES: u32 = 1024;

/// What the handshake agreed on.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Agreed {
    /// Bytes of the export.
    pub size: u64,
    /// Transmission flags, see [`proto::export_flag`].
    pub flags: u16,
    /// Replies come as structured chunks.
    pub structured: bool,
    /// Requests begin and end at multiples of this many bytes (a power of two).
    pub minimum_block: u32,
    /// No request is longer than this many bytes.
    pub maximum_block: u32,
    /// Ids of the contexts that block status will report.
    pub contexts: Contexts,
}

/// Ids the server gave to meta contexts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Contexts {
    /// `base:allocation`.
    pub allocation: Option<u32>,
    /// `qemu:allocation-depth`.
    pub depth: Option<u32>,
    /// The dirty bitmap that was asked for.
    pub dirty: Option<u32>,
}

/// Why no session came about.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The peer speaks something else.
    #[error("the server is not a fixed newstyle NBD server (it sent {0:#018x}); check the socket's path")]
    NotNbd(u64),
    /// The export does not exist.
    #[error("the server has no export {name:?}: {message}")]
    NoExport {
        /// The name asked for.
        name: String,
        /// The server's own words.
        message: String,
    },
    /// The export does not offer the dirty bitmap.
    #[error("the export has no dirty bitmap {wanted:?} (it has: {offered}); a full backup is needed")]
    NoBitmap {
        /// The bitmap asked for.
        wanted: String,
        /// Those that exist, or "none".
        offered: String,
    },
    /// The server wants TLS.
    #[error("the server requires TLS, which this client does not speak on a node's socket")]
    TlsRequired,
    /// The server refused an option for another reason.
    #[error("the server refused option {option} with {code:#x}: {message}")]
    Refused {
        /// The option's number.
        option: u32,
        /// The reply type.
        code: u32,
        /// The server's own words.
        message: String,
    },
    /// The server broke the protocol.
    #[error("the server broke the NBD protocol: {0}")]
    Protocol(&'static str),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Greeting,
    StructuredReply,
    SetMetaContext,
    ListMetaContext,
    Go,
    Done,
}

/// One handshake, see the module's picture.
#[derive(Debug)]
pub struct Handshake {
    export: String,
    bitmap: Option<String>,
    any_alignment: bool,
    state: State,
    input: BytesMut,
    output: BytesMut,
    replies: u32,
    offered: Vec<String>,
    agreed: Agreed,
    informed: bool,
}

impl Handshake {
    /// A handshake for `export`, with the dirty bitmap `bitmap` (its name, or the whole
    /// `qemu:dirty-bitmap:` context).
    #[must_use]
    pub fn new(export: &str, bitmap: Option<&str>) -> Handshake {
        let bitmap = bitmap.map(|name| match name.strip_prefix(proto::DIRTY_BITMAP) {
            Some(_) => name.to_owned(),
            None => format!("{}{name}", proto::DIRTY_BITMAP),
        });
        Handshake {
            export: export.to_owned(),
            bitmap,
            any_alignment: false,
            state: State::Greeting,
            input: BytesMut::new(),
            output: BytesMut::new(),
            replies: 0,
            offered: Vec::new(),
            agreed: Agreed { minimum_block: 1, maximum_block: 32 << 20, ..Agreed::default() },
            informed: false,
        }
    }

    /// Leaves it to the server that requests begin and end anywhere: the client does not say that it would obey block
    /// sizes, so that a server has none, or says so ("Block size constraints"). QEMU then reads, changes and writes the
    /// blocks at the ends of a write, and keeps writes to one block apart, which a client cannot.
    #[must_use]
    pub fn any_alignment(mut self) -> Handshake {
        self.any_alignment = true;
        self
    }

    /// What must be sent now; empty when it is the server's turn.
    pub fn output(&mut self) -> Bytes {
        self.output.split().freeze()
    }

    /// Takes bytes from the server; the agreement when the handshake is over.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Option<Agreed>, HandshakeError> {
        self.input.put_slice(bytes);
        loop {
            let more = match self.state {
                State::Greeting => self.greeting()?,
                State::Done => {
                    if !self.input.is_empty() {
                        return Err(HandshakeError::Protocol("bytes behind the handshake"));
                    }
                    return Ok(Some(self.agreed.clone()));
                }
                _ => self.option_reply()?,
            };
            if !more {
                return Ok(None);
            }
        }
    }

    fn greeting(&mut self) -> Result<bool, HandshakeError> {
        if let Some(magic) = proto::be64(&self.input, 0).filter(|magic| *magic != proto::NBD_MAGIC) {
            return Err(HandshakeError::NotNbd(magic));
        }
        if let Some(magic) = proto::be64(&self.input, 8).filter(|magic| *magic != proto::OPTION_MAGIC) {
            return Err(HandshakeError::NotNbd(magic));
        }
        let Some(flags) = proto::be16(&self.input, 16) else { return Ok(false) };
        if flags & proto::FLAG_FIXED_NEWSTYLE == 0 {
            return Err(HandshakeError::Protocol("the server is newstyle, but not fixed newstyle"));
        }
        self.input.advance(proto::GREETING_LEN);
        let client = proto::FLAG_FIXED_NEWSTYLE | (flags & proto::FLAG_NO_ZEROES);
        self.output.put_u32(u32::from(client));
        self.ask(State::StructuredReply, option::STRUCTURED_REPLY, &[]);
        Ok(true)
    }

    fn ask(&mut self, state: State, option: u32, data: &[u8]) {
        self.state = state;
        self.replies = 0;
        proto::encode_option(option, data, &mut self.output);
    }

    fn option_reply(&mut self) -> Result<bool, HandshakeError> {
        let head = OptionReply::decode(&self.input)
            .map_err(|_| HandshakeError::Protocol("an option reply has the wrong magic"))?;
        let Some(head) = head else { return Ok(false) };
        if head.length > MAX_REPLY {
            return Err(HandshakeError::Protocol("an option reply is too long"));
        }
        let whole = proto::OPTION_REPLY_LEN + head.length as usize;
        if self.input.len() < whole {
            return Ok(false);
        }
        let mut data = self.input.split_to(whole).freeze();
        data.advance(proto::OPTION_REPLY_LEN);
        self.replies += 1;
        if self.replies > MAX_REPLIES {
            return Err(HandshakeError::Protocol("an option has too many replies"));
        }
        if head.option != self.option() {
            return Err(HandshakeError::Protocol("a reply is for another option"));
        }
        match self.state {
            State::StructuredReply => self.structured_reply(head.kind, &data),
            State::SetMetaContext => self.set_meta_context(head.kind, &data),
            State::ListMetaContext => self.list_meta_context(head.kind, &data),
            _ => self.go(head.kind, &data),
        }?;
        Ok(true)
    }

    fn option(&self) -> u32 {
        match self.state {
            State::StructuredReply => option::STRUCTURED_REPLY,
            State::SetMetaContext => option::SET_META_CONTEXT,
            State::ListMetaContext => option::LIST_META_CONTEXT,
            State::Go | State::Greeting | State::Done => option::GO,
        }
    }

    fn structured_reply(&mut self, kind: u32, data: &[u8]) -> Result<(), HandshakeError> {
        match kind {
            reply::ACK => {
                self.agreed.structured = true;
                let mut query = BytesMut::new();
                proto::put_counted(self.export.as_bytes(), &mut query);
                query.put_u32(if self.bitmap.is_some() { 3 } else { 2 });
                proto::put_counted(proto::BASE_ALLOCATION.as_bytes(), &mut query);
                proto::put_counted(proto::ALLOCATION_DEPTH.as_bytes(), &mut query);
                if let Some(bitmap) = &self.bitmap {
                    proto::put_counted(bitmap.as_bytes(), &mut query);
                }
                self.ask(State::SetMetaContext, option::SET_META_CONTEXT, &query);
                Ok(())
            }
            reply::ERR_TLS_REQUIRED => Err(HandshakeError::TlsRequired),
            kind if kind & reply::ERROR != 0 => self.contexts_settled(),
            _ => Err(self.refused(kind, data)),
        }
    }

    fn set_meta_context(&mut self, kind: u32, data: &[u8]) -> Result<(), HandshakeError> {
        match kind {
            reply::META_CONTEXT => {
                let (id, name) = context(data)?;
                let contexts = &mut self.agreed.contexts;
                let place = match name {
                    proto::BASE_ALLOCATION => &mut contexts.allocation,
                    proto::ALLOCATION_DEPTH => &mut contexts.depth,
                    other if Some(other) == self.bitmap.as_deref() => &mut contexts.dirty,
                    _ => return Err(HandshakeError::Protocol("a meta context that was not asked for")),
                };
                if place.replace(id).is_some() {
                    return Err(HandshakeError::Protocol("a meta context was given twice"));
                }
                Ok(())
            }
            reply::ACK => {
                let contexts = self.agreed.contexts;
                let ids = [contexts.allocation, contexts.depth, contexts.dirty];
                if (0..3).any(|i| (i + 1..3).any(|j| ids[i].is_some() && ids[i] == ids[j])) {
                    return Err(HandshakeError::Protocol("two meta contexts have one id"));
                }
                self.contexts_settled()
            }
            // The export's name is checked here first by some servers: let GO say so in full.
            kind if kind & reply::ERROR != 0 && kind != reply::ERR_TLS_REQUIRED => {
                // an option that failed has set nothing, whatever came before the error
                self.agreed.contexts = Contexts::default();
                self.contexts_settled()
            }
            _ => Err(self.refused(kind, data)),
        }
    }

    fn contexts_settled(&mut self) -> Result<(), HandshakeError> {
        if self.bitmap.is_some() && self.agreed.contexts.dirty.is_none() && self.agreed.structured {
            let mut query = BytesMut::new();
            proto::put_counted(self.export.as_bytes(), &mut query);
            query.put_u32(1);
            proto::put_counted(proto::DIRTY_BITMAP.as_bytes(), &mut query);
            self.ask(State::ListMetaContext, option::LIST_META_CONTEXT, &query);
        } else if self.bitmap.is_some() && self.agreed.contexts.dirty.is_none() {
            return Err(self.no_bitmap());
        } else {
            let mut query = BytesMut::new();
            proto::put_counted(self.export.as_bytes(), &mut query);
            if self.any_alignment {
                query.put_u16(0);
            } else {
                query.put_u16(1);
                query.put_u16(info::BLOCK_SIZE);
            }
            self.ask(State::Go, option::GO, &query);
        }
        Ok(())
    }

    fn list_meta_context(&mut self, kind: u32, data: &[u8]) -> Result<(), HandshakeError> {
        match kind {
            reply::META_CONTEXT => {
                let (_, name) = context(data)?;
                let name = name.strip_prefix(proto::DIRTY_BITMAP).unwrap_or(name);
                if self.offered.len() < 16 {
                    self.offered.push(words(name.as_bytes()));
                }
                Ok(())
            }
            reply::ERR_UNKNOWN => {
                Err(HandshakeError::NoExport { name: self.export.clone(), message: words(data) })
            }
            _ => Err(self.no_bitmap()),
        }
    }

    fn no_bitmap(&self) -> HandshakeError {
        let wanted = self.bitmap.as_deref().unwrap_or_default();
        let wanted = wanted.strip_prefix(proto::DIRTY_BITMAP).unwrap_or(wanted).to_owned();
        let offered = if self.offered.is_empty() { "none".to_owned() } else { self.offered.join(", ") };
        HandshakeError::NoBitmap { wanted, offered }
    }

    fn go(&mut self, kind: u32, data: &[u8]) -> Result<(), HandshakeError> {
        match kind {
            reply::INFO => self.information(data),
            reply::ACK if !self.informed => Err(HandshakeError::Protocol("no size before transmission")),
            reply::ACK => {
                self.state = State::Done;
                Ok(())
            }
            reply::ERR_UNKNOWN => {
                Err(HandshakeError::NoExport { name: self.export.clone(), message: words(data) })
            }
            _ => Err(self.refused(kind, data)),
        }
    }

    fn information(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        const SHORT: HandshakeError = HandshakeError::Protocol("an information reply is too short");
        match proto::be16(data, 0).ok_or(SHORT)? {
            info::EXPORT => {
                self.agreed.size = proto::be64(data, 2).ok_or(SHORT)?;
                self.agreed.flags = proto::be16(data, 10).ok_or(SHORT)?;
                if self.agreed.size > i64::MAX.unsigned_abs() {
                    return Err(HandshakeError::Protocol("the export is larger than 2^63 bytes"));
                }
                self.informed = true;
            }
            info::BLOCK_SIZE => {
                let minimum = proto::be32(data, 2).ok_or(SHORT)?;
                let maximum = proto::be32(data, 10).ok_or(SHORT)?;
                if !minimum.is_power_of_two() || minimum > 1 << 16 || maximum < minimum {
                    return Err(HandshakeError::Protocol("block sizes that the specification forbids"));
                }
                self.agreed.minimum_block = minimum;
                self.agreed.maximum_block = maximum;
            }
            _ => {}
        }
        Ok(())
    }

    fn refused(&self, code: u32, data: &[u8]) -> HandshakeError {
        match code {
            reply::ERR_TLS_REQUIRED => HandshakeError::TlsRequired,
            _ => HandshakeError::Refused { option: self.option(), code, message: words(data) },
        }
    }
}

/// Id and name of a meta context reply.
fn context(data: &[u8]) -> Result<(u32, &str), HandshakeError> {
    const BAD: HandshakeError = HandshakeError::Protocol("a malformed meta context");
    let id = proto::be32(data, 0).ok_or(BAD)?;
    let name = std::str::from_utf8(&data[4..]).map_err(|_| BAD)?;
    Ok((id, name))
}

/// A server's message, made fit for an error: one line, at most 200 characters.
pub(super) fn words(data: &[u8]) -> String {
    String::from_utf8_lossy(data).chars().take(200).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests;
