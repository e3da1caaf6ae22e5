//! The client over a unix socket: moves bytes between the machines and the kernel, and nothing else.
//!
//! ```text
//! connect -> Client --read_stream---> ReadStream --all read--> into_client -> Client
//!                   --block_status--> StatusStream --all read--> into_client -> Client
//!                   --writer--------> Writer (its own module) --finish----------> Client
//! ```
//!
//! A stream owns its client and gives it back only when every request it sent was answered: a client
//! dropped in the middle of a stream takes its connection with it, so that a connection can never be out of
//! step. Reads are pipelined and come out in order; at most `window` requests are in flight, so that at most
//! `window * request` bytes are held. Nothing is read from the socket unless a stream is polled.
//!
//! Deadlines: 10 s to connect and shake hands, 60 s for the server to send the next byte of a reply; ten minutes while it
//! flushes or makes zeroes.

use std::collections::VecDeque;
use std::future::{Future as _, poll_fn};
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::time::{Instant, Sleep};

use super::error::NbdError;
use super::handshake::{Agreed, Handshake};
use super::outbox::Outbox;
use super::proto::{command, export_flag};
use super::transmission::{ProtocolError, Reply, Transmission};
use super::writer::Writer;
use crate::extent::{self, Coalescer, Extent};

/// Time to connect and shake hands.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time without a byte of the reply that is waited for.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// The same while the server flushes or makes zeroes, whose time the client does not bound: a flush writes what the node's page
/// cache holds dirty (20 % of 256 GiB at 100 MB/s: nearly nine minutes), and a storage that cannot make
/// [`super::writer::ZERO_REQUEST`] of zeroes itself is sent them (a minute at 2 MiB/s).
pub const SLOW_REPLY_TIMEOUT: Duration = Duration::from_secs(600);
/// Bytes of a read request: with its head it fits the server's socket buffer (208 KiB by default), so that
/// QEMU need not wait in the middle of a reply. Measured on tmpfs with 8 in flight: 64 KiB 1,810 MiB/s,
/// 128 KiB 2,180-2,330, 256 KiB 1,100-1,850, 1 MiB 1,630.
pub const REQUEST: u32 = 128 << 10;
/// Read requests in flight.
pub const WINDOW: usize = 8;
/// Bytes of a block status request: the most that is a multiple of every block size.
const STATUS_REQUEST: u64 = 2 << 30;

/// An NBD export on this node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Export {
    /// Unix socket of the server.
    pub socket: PathBuf,
    /// Name of the export, maybe empty.
    pub name: String,
    /// Dirty bitmap that must be offered: its name (libvirt: `backup-vda`), or the whole
    /// `qemu:dirty-bitmap:` context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
    /// From this byte on everything counts as dirty, whatever the bitmap says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_from: Option<u64>,
}

/// A connection to an export, between two streams.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    pub(super) wire: Transmission,
    pub(super) agreed: Agreed,
    output: BytesMut,
    /// What a [`Writer`] sends, while there is one.
    pub(super) outbox: Outbox,
    /// When the wait for the next byte began.
    waiting: Option<Instant>,
    /// How long it may be.
    pub(super) patience: Duration,
    timer: Pin<Box<Sleep>>,
    pub(super) request: u32,
    pub(super) window: usize,
    changed_from: u64,
}

impl Client {
    /// Connects and shakes hands, within [`CONNECT_TIMEOUT`].
    pub async fn connect(export: &Export) -> Result<Client, NbdError> {
        Client::within_time(export, Handshake::new(&export.name, export.bitmap.as_deref())).await
    }

    /// The same for who also writes: the server is left to care for ends of requests within a block, see
    /// [`Handshake::any_alignment`]. That the export can be written is seen by [`Client::writer`].
    pub async fn connect_to_write(export: &Export) -> Result<Client, NbdError> {
        let machine = Handshake::new(&export.name, export.bitmap.as_deref()).any_alignment();
        Client::within_time(export, machine).await
    }

    async fn within_time(export: &Export, machine: Handshake) -> Result<Client, NbdError> {
        tokio::time::timeout(CONNECT_TIMEOUT, Client::handshake(export, machine))
            .await
            .map_err(|_| NbdError::ConnectTimeout { socket: export.socket.clone() })?
    }

    async fn handshake(export: &Export, mut machine: Handshake) -> Result<Client, NbdError> {
        let mut stream = UnixStream::connect(&export.socket)
            .await
            .map_err(|source| NbdError::Connect { socket: export.socket.clone(), source })?;
        let mut input = [0; 4096];
        let agreed = loop {
            stream.write_all(&machine.output()).await?;
            stream.readable().await?;
            let received = match stream.try_read(&mut input) {
                Ok(0) => return Err(NbdError::Closed),
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            };
            if let Some(agreed) = machine.receive(&input[..received])? {
                break agreed;
            }
        };
        let wire = Transmission::new(agreed.structured, agreed.contexts);
        let timer = Box::pin(tokio::time::sleep(REPLY_TIMEOUT));
        let mut client = Client {
            stream,
            wire,
            agreed,
            output: BytesMut::with_capacity(1024),
            outbox: Outbox::default(),
            waiting: None,
            patience: REPLY_TIMEOUT,
            timer,
            request: REQUEST,
            window: WINDOW,
            changed_from: export.changed_from.unwrap_or(u64::MAX),
        };
        client.shape(REQUEST, WINDOW);
        Ok(client)
    }

    /// Sets how reads and writes are cut: bytes of a request (rounded to the server's block sizes) and requests in
    /// flight (at least 1).
    pub fn shape(&mut self, request: u32, window: usize) {
        let block = self.agreed.minimum_block;
        let request = request.min(self.agreed.maximum_block).max(block);
        self.request = request - request % block;
        self.window = window.max(1);
    }

    /// Bytes of the export.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.agreed.size
    }

    /// The asked dirty bitmap is reported by [`Client::block_status`].
    #[must_use]
    pub fn has_dirty_bitmap(&self) -> bool {
        self.agreed.contexts.dirty.is_some()
    }

    /// The bytes of a range, in order.
    pub fn read_stream(self, offset: u64, length: u64) -> Result<ReadStream, NbdError> {
        let size = self.agreed.size;
        let end = offset.checked_add(length).filter(|end| *end <= size);
        let end = end.ok_or(NbdError::OutOfRange { offset, length, size })?;
        let block = u64::from(self.agreed.minimum_block);
        let next = offset - offset % block;
        let stop = if length == 0 { next } else { end.next_multiple_of(block).min(size) };
        Ok(ReadStream { client: self, start: offset, end, next, stop, slots: VecDeque::new(), failed: false })
    }

    /// The extents from `offset` to the end of the export, equal neighbours joined.
    pub fn block_status(self, offset: u64) -> Result<StatusStream, NbdError> {
        let size = self.agreed.size;
        if offset > size {
            return Err(NbdError::OutOfRange { offset, length: 0, size });
        }
        let batch: Box<dyn Iterator<Item = Extent> + Send> = Box::new(std::iter::empty());
        let coalescer = Coalescer::default();
        Ok(StatusStream { client: self, next: offset, batch, coalescer, asked: None, failed: false })
    }

    /// Writes to the export; [`NbdError::ReadOnly`] when it has no writers.
    pub fn writer(self) -> Result<Writer, NbdError> {
        if self.agreed.flags & export_flag::READ_ONLY != 0 {
            return Err(NbdError::ReadOnly);
        }
        Ok(Writer::new(self))
    }

    /// Ends the session as the protocol wants it.
    pub async fn disconnect(mut self) -> Result<(), NbdError> {
        self.wire.disconnect(&mut self.output);
        self.stream.write_all(&self.output).await?;
        self.stream.shutdown().await?;
        Ok(())
    }

    /// Sends what is waiting and receives until there is a reply.
    pub(super) fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<Result<Reply, NbdError>> {
        self.poll_send(cx)?;
        loop {
            if let Some(reply) = self.wire.advance()? {
                self.waiting = None;
                return Poll::Ready(Ok(reply));
            }
            match self.stream.try_read_buf(&mut self.wire.space()) {
                Ok(0) => return Poll::Ready(Err(NbdError::Closed)),
                Ok(_) => self.waiting = None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.stream.poll_read_ready(cx)?.is_pending() {
                        return self.poll_deadline(cx);
                    }
                }
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>) -> Result<(), NbdError> {
        loop {
            let heads = !self.output.is_empty();
            let next = if heads { &self.output[..] } else { self.outbox.next() };
            if next.is_empty() {
                return Ok(());
            }
            match self.stream.try_write(next) {
                Ok(0) => return Err(NbdError::Closed),
                Ok(sent) if heads => self.output.advance(sent),
                Ok(sent) => self.outbox.sent(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.stream.poll_write_ready(cx)?.is_pending() {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Pending until the deadline of the reply, which counts from the begin of the wait.
    fn poll_deadline<T>(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, NbdError>> {
        let deadline = *self.waiting.get_or_insert_with(Instant::now) + self.patience;
        if self.timer.deadline() != deadline {
            self.timer.as_mut().reset(deadline);
        }
        ready!(self.timer.as_mut().poll(cx));
        Poll::Ready(Err(NbdError::ReplyTimeout { silent: self.patience }))
    }
}

/// The bytes of a range, in order; owns its [`Client`].
#[derive(Debug)]
pub struct ReadStream {
    client: Client,
    /// The range that is given out.
    start: u64,
    end: u64,
    /// What is still to be asked for, at block boundaries.
    next: u64,
    stop: u64,
    slots: VecDeque<Slot>,
    failed: bool,
}

/// A request in flight, or its data waiting for those before it.
#[derive(Debug)]
struct Slot {
    cookie: u64,
    offset: u64,
    data: Option<Bytes>,
}

impl ReadStream {
    /// The next bytes, at most a request's worth; `None` at the end. After an error the stream is dead.
    pub async fn next(&mut self) -> Option<Result<Bytes, NbdError>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`ReadStream::next`] for hand-written futures.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, NbdError>>> {
        if self.failed {
            return Poll::Ready(None);
        }
        let result = ready!(self.poll_chunk(cx));
        self.failed = result.is_err();
        Poll::Ready(result.transpose())
    }

    /// The client, when everything was read; otherwise the connection is closed with the stream.
    #[must_use]
    pub fn into_client(mut self) -> Option<Client> {
        self.client.wire.rest();
        (!self.failed && self.slots.is_empty() && self.next == self.stop).then_some(self.client)
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, NbdError>> {
        loop {
            self.fill();
            if let Some(slot) = self.slots.pop_front_if(|slot| slot.data.is_some()) {
                self.fill();
                self.client.poll_send(cx)?;
                return Poll::Ready(Ok(slot.data.map(|data| self.trim(slot.offset, data))));
            }
            if self.slots.is_empty() {
                return Poll::Ready(Ok(None));
            }
            let reply = ready!(self.client.poll_reply(cx))?;
            let Reply::Read { cookie, result } = reply else {
                return Poll::Ready(Err(ProtocolError::UnknownCookie.into()));
            };
            let slot = self.slots.iter_mut().find(|slot| slot.cookie == cookie);
            let slot = slot.ok_or(ProtocolError::UnknownCookie)?;
            let offset = slot.offset;
            slot.data = Some(result.map_err(|error| NbdError::Server { what: "read", offset, error })?);
        }
    }

    /// Fills the window when half of it is free, so that requests are sent some at a time. They end at multiples
    /// of their size, whatever the range begins with.
    fn fill(&mut self) {
        let Client { wire, agreed, output, request, window, .. } = &mut self.client;
        if self.slots.len() > *window / 2 {
            return;
        }
        let df = agreed.structured && agreed.flags & export_flag::SEND_DF != 0;
        let flags = if df { command::FLAG_DF } else { 0 };
        while self.next < self.stop && self.slots.len() < *window {
            let request = u64::from(*request);
            let length = (request - self.next % request).min(self.stop - self.next);
            let asked = u32::try_from(length).unwrap_or(u32::MAX);
            let cookie = wire.read(self.next, asked, flags, output);
            self.slots.push_back(Slot { cookie, offset: self.next, data: None });
            self.next += length;
        }
    }

    /// Cuts what was only read for the server's block size.
    fn trim(&self, offset: u64, mut data: Bytes) -> Bytes {
        let inside = |at: u64| usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
        data.truncate(inside(self.end));
        data.advance(inside(self.start).min(data.len()));
        data
    }
}

/// The extents of an export, as the server tells them; owns its [`Client`].
///
/// Holds one reply of the server at a time (with QEMU at most 1 MiB a context), however many extents the
/// disk has.
pub struct StatusStream {
    client: Client,
    /// Where the extents of the next batch begin.
    next: u64,
    batch: Box<dyn Iterator<Item = Extent> + Send>,
    coalescer: Coalescer,
    /// The request in flight: cookie and bytes cut from its head.
    asked: Option<(u64, u64)>,
    failed: bool,
}

impl StatusStream {
    /// The next extent; `None` at the end. After an error the stream is dead.
    pub async fn next(&mut self) -> Option<Result<Extent, NbdError>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`StatusStream::next`] for hand-written futures.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Extent, NbdError>>> {
        if self.failed {
            return Poll::Ready(None);
        }
        let result = ready!(self.poll_extent(cx));
        self.failed = result.is_err();
        Poll::Ready(result.transpose())
    }

    /// Bytes of the export.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.client.size()
    }

    /// The client, when everything was read; otherwise the connection is closed with the stream.
    #[must_use]
    pub fn into_client(self) -> Option<Client> {
        (!self.failed && self.asked.is_none()).then_some(self.client)
    }

    fn poll_extent(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Extent>, NbdError>> {
        loop {
            for extent in self.batch.by_ref() {
                self.next = extent.end();
                if let Some(done) = self.coalescer.push(extent) {
                    return Poll::Ready(Ok(Some(done)));
                }
            }
            let size = self.client.size();
            if self.next >= size {
                return Poll::Ready(Ok(self.coalescer.finish()));
            }
            self.batch = ready!(self.poll_batch(cx, size))?;
        }
    }

    /// Asks for the extents from `next` on, and waits for them.
    fn poll_batch(
        &mut self,
        cx: &mut Context<'_>,
        size: u64,
    ) -> Poll<Result<Box<dyn Iterator<Item = Extent> + Send>, NbdError>> {
        let Client { wire, agreed, output, .. } = &mut self.client;
        let contexts = agreed.contexts;
        if contexts.allocation.or(contexts.depth).or(contexts.dirty).is_none() {
            let all = extent::Run { length: size - self.next, flags: extent::Flags::DATA };
            return Poll::Ready(Ok(Box::new(extent::place(self.next, size, [all]))));
        }
        let block = u64::from(agreed.minimum_block);
        let (cookie, head) = *self.asked.get_or_insert_with(|| {
            let head = self.next % block;
            let from = self.next - head;
            let length = STATUS_REQUEST.min((size - from).next_multiple_of(block)).min(size - from);
            let length = u32::try_from(length).unwrap_or(u32::MAX);
            (wire.block_status(from, length, output), head)
        });
        let Reply::Status { cookie: answered, result } = ready!(self.client.poll_reply(cx))? else {
            return Poll::Ready(Err(ProtocolError::UnknownCookie.into()));
        };
        if answered != cookie {
            return Poll::Ready(Err(ProtocolError::UnknownCookie.into()));
        }
        self.asked = None;
        let (offset, what) = (self.next, "report block status");
        let maps = result.map_err(|error| NbdError::Server { what, offset, error })?;
        let placed = extent::place(offset - head, size, maps.runs());
        let mut cut = placed.filter_map(move |mut extent| {
            let before = offset.saturating_sub(extent.start).min(extent.length);
            extent.start += before;
            extent.length -= before;
            (extent.length > 0).then_some(extent)
        });
        // Progress is made by every reply, or the loop would ask for ever.
        let first = cut.next().ok_or(ProtocolError::BadStatus("nothing about the range asked for"))?;
        let (cut, from) = (std::iter::once(first).chain(cut), self.client.changed_from);
        Poll::Ready(Ok(Box::new(extent::raise(cut, from, extent::Flags::DIRTY))))
    }
}

impl std::fmt::Debug for StatusStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StatusStream").field("next", &self.next).finish_non_exhaustive()
    }
}
