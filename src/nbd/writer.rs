//! Writes through a [`Client`]: bytes, zeroes and flushes, pipelined.
//!
//! ```text
//! Client --writer--> Writer: write, zero, ... --flush--> on stable storage
//!                      |
//!                      +--finish: all was answered--> Client
//! ```
//!
//! Bytes that follow each other are gathered into requests that end at multiples of their size. At most a window of
//! requests is in flight, so that `(window + 1) * request` bytes are held at most, whatever is written. A server may do
//! what is in flight in any order: what overlaps waits for what came before. Zeroes in flight are [`ZERO_REQUEST`] bytes at
//! most.
//!
//! An error ends it: which of the bytes in flight were written is unknown. So does a call that is dropped in its middle. The
//! client comes back only when every request was answered.
//!
//! **Nothing takes a request back.** The protocol has no command for it, and a server whose client is gone does what it was
//! sent nevertheless (QEMU: what it has begun, and what is in the socket's buffer). So who gives a writer up waits for the
//! answers, [`Writer::abandon`]; without them only the end of the server's process is the end of its writes.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;

use super::client::{Client, REPLY_TIMEOUT, SLOW_REPLY_TIMEOUT};
use super::error::NbdError;
use super::proto::{self, command, export_flag};
use super::transmission::{ProtocolError, Reply};

/// Most bytes that are made zero at a time: as much as imageio asks for, since storage on a network was seen to time out
/// with more (`ovirt_imageio`, `ops.Zero`).
pub const ZERO_REQUEST: u64 = 128 << 20;

/// Zeroes that are written where a server cannot make them itself.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// How a range is made to read as zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ZeroMode {
    /// It stays, or becomes, allocated.
    Allocate,
    /// The server may make a hole of it.
    Punch,
}

/// Writes to an export; owns its [`Client`].
#[derive(Debug)]
pub struct Writer {
    client: Client,
    /// A place for a head, and bytes that were not asked to be written yet; empty when there are none.
    gathered: BytesMut,
    /// Where they go.
    from: u64,
    in_flight: Vec<InFlight>,
    /// A call failed, or did not come to its end.
    dead: bool,
    /// The server broke the protocol: nothing more can be heard of it.
    lost: bool,
}

/// A request without a reply.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    cookie: u64,
    what: What,
    offset: u64,
    length: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Write,
    Zero,
    Flush,
}

impl Writer {
    pub(super) fn new(client: Client) -> Writer {
        Writer { client, gathered: BytesMut::new(), from: 0, in_flight: Vec::new(), dead: false, lost: false }
    }

    /// Bytes of the export.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.client.size()
    }

    /// Writes bytes at `offset`. Waits for nothing but room: what the server makes of them is told by a later call, by
    /// [`Writer::flush`] at the latest. [`NbdError::OutOfRange`] is told at once, and nothing of it is written.
    pub async fn write(&mut self, offset: u64, mut data: &[u8]) -> Result<(), NbdError> {
        self.check(offset, data.len() as u64)?;
        self.begin()?;
        let mut at = offset;
        while !data.is_empty() {
            if self.gathering() && self.from + self.bytes() != at {
                self.send_gathered().await?;
            }
            let request = u64::from(self.client.request);
            if !self.gathering() {
                let whole = proto::REQUEST_LEN + self.client.request as usize;
                self.gathered = self.client.outbox.take(whole);
                self.gathered.resize(proto::REQUEST_LEN, 0);
                self.from = at;
            }
            let missing = request - at % request;
            let take = data.len().min(usize::try_from(missing).unwrap_or(usize::MAX));
            self.gathered.extend_from_slice(&data[..take]);
            data = &data[take..];
            at += take as u64;
            if at.is_multiple_of(request) {
                self.send_gathered().await?;
            }
        }
        self.dead = false;
        Ok(())
    }

    /// Makes a range read as zeroes, as [`Writer::write`] writes. Where the server has no command for it zeroes are
    /// written, whatever the mode.
    pub async fn zero(&mut self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), NbdError> {
        self.check(offset, length)?;
        let end = offset + length;
        let mut at = offset;
        if self.sends_zeroes() {
            while at < end {
                let some = (end - at).min(ZEROES.len() as u64);
                self.write(at, &ZEROES[..usize::try_from(some).unwrap_or(0)]).await?;
                at += some;
            }
            return Ok(());
        }
        self.begin()?;
        self.send_gathered().await?;
        let flags = if mode == ZeroMode::Allocate { command::FLAG_NO_HOLE } else { 0 };
        while at < end {
            let length = (ZERO_REQUEST - at % ZERO_REQUEST).min(end - at);
            self.room(What::Zero, at, length).await?;
            let asked = u32::try_from(length).unwrap_or(u32::MAX);
            let mut head = self.client.outbox.take(proto::REQUEST_LEN);
            let cookie = self.client.wire.write_zeroes(at, asked, flags, &mut head);
            self.submit(InFlight { cookie, what: What::Zero, offset: at, length }, head).await?;
            at += length;
        }
        self.dead = false;
        Ok(())
    }

    /// Waits until all that was written before is on stable storage, as far as the server knows how: one without `FLUSH` has
    /// nothing that it could lose ("Ordering of messages and writes").
    pub async fn flush(&mut self) -> Result<(), NbdError> {
        self.drain().await?;
        if self.client.agreed.flags & export_flag::SEND_FLUSH == 0 {
            return Ok(());
        }
        self.begin()?;
        let mut head = self.client.outbox.take(proto::REQUEST_LEN);
        let cookie = self.client.wire.flush(&mut head);
        self.submit(InFlight { cookie, what: What::Flush, offset: 0, length: 0 }, head).await?;
        self.dead = false;
        self.drain().await
    }

    /// Waits until the server has done all that was asked. It may still lose it: see [`Writer::flush`].
    pub async fn drain(&mut self) -> Result<(), NbdError> {
        self.begin()?;
        self.send_gathered().await?;
        poll_fn(|cx| {
            while !self.in_flight.is_empty() {
                ready!(self.poll_one(cx))?;
            }
            Poll::Ready(Ok::<_, NbdError>(()))
        })
        .await?;
        self.dead = false;
        Ok(())
    }

    /// The client, when all that was asked is done.
    pub async fn finish(mut self) -> Result<Client, NbdError> {
        self.drain().await?;
        // one that answers before it has the whole request cannot be asked for anything else
        if self.rest() { Ok(self.client) } else { Err(NbdError::GivenUp) }
    }

    /// The lowest byte that the server has not answered for; `None` when it has answered for all.
    #[must_use]
    pub fn unanswered_from(&self) -> Option<u64> {
        let gathered = self.gathering().then_some(self.from);
        self.in_flight
            .iter()
            .filter(|request| request.what != What::Flush)
            .map(|r| r.offset)
            .chain(gathered)
            .min()
    }

    /// Ends it, also after an error or a call that was dropped: what is gathered is forgotten, what is in flight is waited for,
    /// and the connection is closed. Nothing of it reaches the export afterwards, but for [`NbdError::Unanswered`]. A server
    /// that closed the connection owes nothing: it ended, or the export did, for which QEMU does what is in flight first.
    pub async fn abandon(mut self) -> Result<(), NbdError> {
        poll_fn(|cx| {
            while !self.in_flight.is_empty() {
                let answered = if self.lost { None } else { Some(ready!(self.poll_one(cx))) };
                match answered {
                    Some(Ok(()) | Err(NbdError::Server { .. })) => {}
                    Some(Err(NbdError::Closed | NbdError::Io(_))) => break,
                    _ => return Poll::Ready(Err(NbdError::Unanswered { requests: self.in_flight.len() })),
                }
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// Frees its buffers but for what is gathered, where nothing is in flight; whether it was so.
    pub fn rest(&mut self) -> bool {
        let rests = self.in_flight.is_empty() && self.client.outbox.next().is_empty();
        if rests {
            self.client.outbox.rest();
        }
        rests
    }

    /// Whether zeroes are sent, byte by byte: the server has no command for them.
    #[must_use]
    pub fn sends_zeroes(&self) -> bool {
        self.client.agreed.flags & export_flag::SEND_WRITE_ZEROES == 0
    }

    /// Whether a flush covers what was written over other connections, too (`CAN_MULTI_CONN`).
    #[must_use]
    pub fn flushes_others(&self) -> bool {
        self.client.agreed.flags & export_flag::CAN_MULTI_CONN != 0
    }

    /// Goes on with what is in flight, without waiting for it: for who waits for something else meanwhile. The task is
    /// woken when there is more to do.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) -> Result<(), NbdError> {
        self.begin()?;
        self.client.poll_send(cx)?;
        while !self.in_flight.is_empty() {
            match self.poll_one(cx) {
                Poll::Ready(done) => done?,
                Poll::Pending => break,
            }
        }
        self.dead = false;
        Ok(())
    }

    /// From here on to the end of the call it counts as given up.
    fn begin(&mut self) -> Result<(), NbdError> {
        if std::mem::replace(&mut self.dead, true) { Err(NbdError::GivenUp) } else { Ok(()) }
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), NbdError> {
        let size = self.client.size();
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(NbdError::OutOfRange { offset, length, size });
        }
        Ok(())
    }

    fn gathering(&self) -> bool {
        !self.gathered.is_empty()
    }

    /// Bytes that are gathered.
    fn bytes(&self) -> u64 {
        self.gathered.len().saturating_sub(proto::REQUEST_LEN) as u64
    }

    /// Asks for what is gathered to be written.
    async fn send_gathered(&mut self) -> Result<(), NbdError> {
        if !self.gathering() {
            return Ok(());
        }
        let (offset, length) = (self.from, self.bytes());
        self.room(What::Write, offset, length).await?;
        let mut request = std::mem::take(&mut self.gathered);
        let mut head = BytesMut::with_capacity(proto::REQUEST_LEN);
        let asked = u32::try_from(length).unwrap_or(u32::MAX);
        let cookie = self.client.wire.write(offset, asked, &mut head);
        request[..proto::REQUEST_LEN].copy_from_slice(&head);
        self.submit(InFlight { cookie, what: What::Write, offset, length }, request).await
    }

    /// Waits until a request for this range may be sent. Ends of blocks are looked at here, where they are known.
    async fn room(&mut self, what: What, offset: u64, length: u64) -> Result<(), NbdError> {
        let block = self.client.agreed.minimum_block;
        let end = offset + length;
        let whole = |at: u64| at.is_multiple_of(u64::from(block));
        if !whole(offset) || !(whole(end) || end == self.client.size()) {
            return Err(NbdError::Unaligned { offset, length, block });
        }
        poll_fn(|cx| {
            while !self.has_room(what, offset, end) {
                ready!(self.poll_one(cx))?;
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    fn has_room(&self, what: What, offset: u64, end: u64) -> bool {
        let apart = |other: &InFlight| other.offset >= end || other.offset + other.length <= offset;
        let zeroes = self.in_flight.iter().filter(|other| other.what == What::Zero);
        let zeroing: u64 = zeroes.map(|other| other.length).sum();
        self.in_flight.len() < self.client.window
            && self.in_flight.iter().all(apart)
            && (what != What::Zero || zeroing + (end - offset) <= ZERO_REQUEST)
    }

    /// Sends a request as far as the server takes it now.
    async fn submit(&mut self, request: InFlight, bytes: BytesMut) -> Result<(), NbdError> {
        self.client.outbox.put(bytes);
        self.in_flight.push(request);
        self.be_patient();
        poll_fn(|cx| Poll::Ready(self.client.poll_send(cx))).await
    }

    fn be_patient(&mut self) {
        let slow = self.in_flight.iter().any(|request| request.what != What::Write);
        self.client.patience = if slow { SLOW_REPLY_TIMEOUT } else { REPLY_TIMEOUT };
    }

    /// Waits until one more request is done.
    fn poll_one(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NbdError>> {
        let done = ready!(self.poll_done(cx));
        self.lost |= matches!(done, Err(NbdError::Protocol(_)));
        Poll::Ready(done)
    }

    fn poll_done(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NbdError>> {
        let Reply::Done { cookie, result } = ready!(self.client.poll_reply(cx))? else {
            return Poll::Ready(Err(ProtocolError::UnknownCookie.into()));
        };
        let place = self.in_flight.iter().position(|request| request.cookie == cookie);
        let done = self.in_flight.swap_remove(place.ok_or(ProtocolError::UnknownCookie)?);
        self.be_patient();
        let what = match done.what {
            What::Write => "write",
            What::Zero => "write zeroes",
            What::Flush => "flush what was written before",
        };
        Poll::Ready(result.map_err(|error| NbdError::Server { what, offset: done.offset, error }))
    }
}
