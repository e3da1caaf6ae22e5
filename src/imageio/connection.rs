//! One HTTP connection: what it served, when it last moved, and its socket under hyper.
//!
//! ```text
//! body yields bytes a..b --> pending --hyper writes all it has--> poll_flush is Ready --> coverage.mark(a, b)
//!                               \--connection cut--> forgotten: the bytes count as not served
//!                               \--server stops--> nothing more is yielded, and it is cut when all is in the kernel
//! ```
//!
//! **Bytes count as served when the kernel took them.** hyper (1.12, `proto/h1/io.rs`) calls the socket's
//! `poll_flush` only when its own buffers are empty, and a body's frame is in those buffers as soon as it was
//! yielded; rustls' `poll_flush` is ready only when each record was written. So at a ready `poll_flush` all
//! that was yielded before is in the kernel. An operation ends after that, so that whoever waited for the end
//! of operations sees their bytes in the coverage.
//!
//! hyper's own header timeout is not used: it also counts on idle keep-alive connections and would close a
//! client's worker that waits for its extents. [`Connection::expired`] watches progress instead.

use std::future::Future as _;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf, Take};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use super::journal::Journal;
use super::meter::{Meter, Opened};
use super::progress::Progress;
use super::ticket::Ticket;
use super::tickets::{Operation, SharedCoverage, Slot, Tickets};

/// NBD connections that one HTTP connection keeps, of different tickets.
const SLOTS: usize = 4;
/// Bytes of bodies that hyper is given before it must have written them: four frames. Measured over TLS and
/// the unix socket, see the commit.
const UNTAKEN: u64 = 512 << 10;
/// Most bytes that hyper is given of its client at a time. It makes its buffer twice as large when one was filled, up to a MiB,
/// and a connection keeps it: so it stays below twice this.
const READ: u64 = 64 << 10;
/// How long the rest of a refused body is read, so that the client can read the answer.
const LINGER: Duration = Duration::from_secs(2);
/// How much of it.
const LINGER_BYTES: usize = 16 << 20;

/// What a connection's parts share: its service, its bodies, its socket and its watchdog.
#[derive(Debug)]
pub(super) struct Connection {
    /// Cuts the connection; a ticket that ends does so to those that run an operation on it.
    pub(super) cut: CancellationToken,
    pub(super) progress: Progress,
    authorized: AtomicBool,
    woken: Notify,
    flushes: Notify,
    unread: AtomicBool,
    pending: Mutex<Pending>,
    slots: Mutex<Vec<(String, Arc<Slot>)>>,
    journal: Mutex<Journal>,
    opened: Opened,
}

/// What was yielded to hyper and is not known to be in the kernel.
#[derive(Debug, Default)]
struct Pending {
    ranges: Vec<(Arc<SharedCoverage>, u64, u64)>,
    bytes: u64,
    finished: Vec<Operation>,
    /// Nothing more is yielded.
    closed: bool,
    /// Of the body that waits for its bytes to be taken.
    waker: Option<Waker>,
}

impl Connection {
    pub(super) fn new(journal: Journal, opened: Opened) -> Arc<Connection> {
        Arc::new(Connection {
            cut: CancellationToken::new(),
            progress: Progress::new(),
            authorized: AtomicBool::new(false),
            woken: Notify::new(),
            flushes: Notify::new(),
            unread: AtomicBool::new(false),
            pending: Mutex::default(),
            slots: Mutex::default(),
            journal: Mutex::new(journal),
            opened,
        })
    }

    /// A ticket permitted a request.
    pub(super) fn authorize(&self, ticket: &Ticket) {
        self.journal().authorized(ticket);
        self.progress.moved();
        if !self.authorized.swap(true, Ordering::Relaxed) {
            self.woken.notify_one();
        }
    }

    /// The place of the NBD connection for a ticket; an old one makes room.
    pub(super) fn slot(&self, tickets: &Tickets, transfer: &str) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|(_, slot)| !slot.closed());
        if let Some((_, slot)) = slots.iter().find(|(kept, _)| kept == transfer) {
            return Arc::clone(slot);
        }
        if slots.len() >= SLOTS {
            slots.remove(0);
        }
        let slot = tickets.slot(transfer);
        slots.push((transfer.to_owned(), Arc::clone(&slot)));
        slot
    }

    /// Bytes `start..end` were given to hyper, and count as served by this coverage, if by any, once they are taken.
    pub(super) fn yielded(&self, coverage: Option<&Arc<SharedCoverage>>, start: u64, end: u64) {
        let mut pending = self.pending();
        pending.bytes += end - start;
        let Some(coverage) = coverage else { return };
        if let Some((last, _, behind)) = pending.ranges.last_mut()
            && Arc::ptr_eq(last, coverage)
            && *behind == start
        {
            *behind = end;
            return;
        }
        pending.ranges.push((Arc::clone(coverage), start, end));
    }

    /// Ready when hyper may be given more bytes: it takes new ones before it has written the old, so that
    /// with a slow client its buffers are never empty, and nothing would count as served until the end.
    pub(super) fn poll_taken(&self, cx: &Context<'_>) -> Poll<()> {
        let mut pending = self.pending();
        if pending.bytes < UNTAKEN && !pending.closed {
            return Poll::Ready(());
        }
        pending.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// All bytes of an operation were given to hyper.
    pub(super) fn finished(&self, operation: Operation) {
        self.pending().finished.push(operation);
    }

    /// Gives hyper no more bytes of any body.
    pub(super) fn give_no_more(&self) {
        self.pending().closed = true;
    }

    /// Waits until all that was given to hyper is in the kernel.
    pub(super) async fn settled(&self) {
        loop {
            let flushed = self.flushes.notified();
            if self.pending().bytes == 0 {
                return;
            }
            flushed.await;
        }
    }

    /// Everything given to hyper so far is in the kernel.
    fn flushed(&self) {
        let mut pending = self.pending();
        let closed = pending.closed;
        let before = std::mem::replace(&mut *pending, Pending { closed, ..Pending::default() });
        drop(pending);
        let Pending { ranges, bytes, finished, waker, .. } = before;
        self.meter().served(self.opened.encryption, bytes);
        for (coverage, start, end) in ranges {
            coverage.mark(start, end);
        }
        drop(finished);
        self.flushes.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// A request's body will not be read.
    pub(super) fn leave_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    /// Returns when the connection stood still for too long: `before` after its begin while no ticket
    /// permitted anything, `idle` after the last byte that moved later.
    pub(super) async fn expired(&self, before: Duration, idle: Duration) {
        loop {
            let deadline = if self.authorized.load(Ordering::Relaxed) {
                self.progress.last() + idle
            } else {
                self.progress.begun() + before
            };
            if deadline <= Instant::now() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep_until(deadline) => {}
                () = self.woken.notified() => {}
            }
        }
    }

    pub(super) fn meter(&self) -> &Meter {
        &self.opened.meter
    }

    pub(super) fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's socket, as hyper sees it.
#[derive(Debug)]
pub(super) struct Socket<T> {
    inner: Take<T>,
    connection: Arc<Connection>,
    closing: Option<Linger>,
}

#[derive(Debug)]
struct Linger {
    timer: Pin<Box<Sleep>>,
    bytes: usize,
}

impl<T: AsyncRead> Socket<T> {
    pub(super) fn new(inner: T, connection: Arc<Connection>) -> Socket<T> {
        Socket { inner: inner.take(READ), connection, closing: None }
    }

    fn wrote(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Ok(bytes)) if bytes > 0) {
            self.connection.progress.moved();
        }
        written
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Socket<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        self.inner.set_limit(READ);
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.connection.progress.moved();
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Socket<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(self.inner.get_mut()).poll_write(cx, buf);
        self.wrote(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(self.inner.get_mut()).poll_write_vectored(cx, bufs);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.get_ref().is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(self.inner.get_mut()).poll_flush(cx))?;
        self.connection.flushed();
        Poll::Ready(Ok(()))
    }

    /// Ends the writing half; after a refused body also reads on for a moment, since closing a socket with
    /// unread bytes resets it, and the reset may overtake the answer (RFC 9112, 9.6).
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.closing.is_none() {
            ready!(Pin::new(this.inner.get_mut()).poll_shutdown(cx))?;
            if !this.connection.unread.load(Ordering::Relaxed) {
                return Poll::Ready(Ok(()));
            }
        }
        let linger = this
            .closing
            .get_or_insert_with(|| Linger { timer: Box::pin(tokio::time::sleep(LINGER)), bytes: 0 });
        let mut scratch = [0; 16 << 10];
        while linger.bytes < LINGER_BYTES && linger.timer.as_mut().poll(cx).is_pending() {
            let mut buf = ReadBuf::new(&mut scratch);
            this.inner.set_limit(READ);
            match ready!(Pin::new(&mut this.inner).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => linger.bytes += buf.filled().len(),
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
