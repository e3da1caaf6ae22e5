//! The operations that write: PUT streams a request's body into the NBD server, PATCH makes zeroes and flushes.
//!
//! ```text
//! ticket (403) -> storage (500) -> range (416) -> its turn -> the body, a frame at a time -> all is answered for --flush--> 200
//!                                                                         \--storage fails--> all is answered for -------> 500
//! ```
//!
//! A body that ends early is written as far as it came, as imageio does. What an NBD connection took and did not flush may
//! be lost with it, so that one that broke is told to the client, and never replaced in silence.
//!
//! **An operation ends, and is answered, when nothing of it can reach the disk any more**, also one that failed, or was cut: whoever
//! waits for the end of operations sees the last of its bytes, and who asks again is written last. Where the storage owes an
//! answer, after [`crate::nbd::client::REPLY_TIMEOUT`] or because it broke the protocol, that cannot be had: its connection is
//! closed, the client is told, and nothing more is written with the ticket, which stays doubtful
//! ([`super::tickets::Drained`]) until its owner has ended the NBD server.
//!
//! **A flush covers what was answered before it**, over whichever connection: where the export does not say that it is so with
//! several (`CAN_MULTI_CONN`; QEMU does), each write is flushed before its answer.
//!
//! **Memory.** A writer's buffers (1.1 MiB) are had only with a place, of which there are [`super::Config::max_writing`]. A body that
//! waits for one holds the frame that came; a client that stands still gives its place back when the storage has answered, and
//! holds what is gathered (128 KiB at most).
//!
//! It never reads an image.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use hyper::StatusCode;
use hyper::body::{Body as _, Incoming};
use hyper::{Response, http::response};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::body::{Answer, chain};
use super::connection::Connection;
use super::route::Put;
use super::service::{Failure, Service, built, open};
use super::ticket::{Access, Ticket};
use super::tickets::{Doubtful, Operation, Slot};
use super::wire::{self, Patch, Refusal};
use crate::nbd::writer::ZERO_REQUEST;
use crate::nbd::{NbdError, Writer, ZeroMode};

/// What is done, as logs name it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Write,
    Zero,
    Flush,
}

/// Why a body was not written to its end.
enum Broken {
    /// The client's side: it sent less than it said.
    Body,
    Storage(NbdError),
}

impl From<NbdError> for Broken {
    fn from(error: NbdError) -> Broken {
        Broken::Storage(error)
    }
}

impl Service {
    /// Writes a request's body; 200 when the storage has answered for all of it.
    pub(super) async fn put(
        &self,
        id: &str,
        put: Put,
        body: &mut Incoming,
    ) -> Result<Response<Answer>, Failure> {
        let mut writing = self.begin_writing(Kind::Write, id, Some((put.offset, put.length))).await?;
        let written = match writing.stream(body).await {
            Ok(()) if writing.at - put.offset < put.length => Err(Broken::Body),
            written => written,
        };
        writing.received();
        let done = writing.at - put.offset;
        let stored = match &written {
            Ok(()) => writing.finish(put.flush).await,
            Err(Broken::Body) => writing.finish(false).await,
            Err(Broken::Storage(_)) => Ok(()),
        };
        match written.and(stored.map_err(Broken::from)) {
            Ok(()) => Ok(done_well()),
            Err(Broken::Body) => {
                let message = format!("Requested {} bytes, available {done} bytes", put.length);
                Err(Refusal::bad_request(message).into())
            }
            Err(Broken::Storage(error)) => Err(writing.failed(&error).await),
        }
    }

    /// Does what a PATCH asks for; 200 when the storage has answered for all of it.
    pub(super) async fn patch(&self, id: &str, patch: Patch) -> Result<Response<Answer>, Failure> {
        let (kind, range, flush) = match patch {
            Patch::Zero { offset, size, flush } => (Kind::Zero, Some((offset, size)), flush),
            Patch::Flush => (Kind::Flush, None, true),
        };
        let mut writing = self.begin_writing(kind, id, range).await?;
        writing.received();
        let done = async {
            writing.zero(range.map_or(0, |(_, size)| size)).await?;
            writing.finish(flush).await
        };
        if let Err(error) = done.await {
            return Err(writing.failed(&error).await);
        }
        if kind == Kind::Flush {
            let Ticket { backup, transfer, disk, .. } = &*writing.ticket;
            info!(backup, transfer, disk, "FLUSH");
        }
        Ok(done_well())
    }

    /// Asks the ticket, then the storage, then whether there is such a range (offset and length) in both; waits until
    /// it is this one's turn.
    async fn begin_writing(
        &self,
        kind: Kind,
        id: &str,
        range: Option<(u64, u64)>,
    ) -> Result<Writing, Failure> {
        let begun = Instant::now();
        let operation = self.begin(id)?;
        let ticket = Arc::clone(&operation.ticket);
        let Access::Write { sparse } = ticket.access else {
            let why = format!("Transfer={} forbids write", ticket.transfer);
            return Err(Failure::Denied(Refusal::forbidden(&why)));
        };
        let slot = self.connection.slot(&self.tickets, &ticket.transfer);
        let opened = open(slot.take(), &ticket).await;
        let client = opened.map_err(|error| failed(&ticket, kind, &error))?;
        let refused =
            range.map(|(offset, length)| wire::check_write(offset, length, ticket.size, client.size()));
        if let Some(Err(refusal)) = refused {
            slot.keep(client);
            return Err(refusal.into());
        }
        let writer = client.writer().map_err(|error| failed(&ticket, kind, &error))?;
        let (at, length) = range.unwrap_or((0, 0));
        operation.turn(at, length).await.map_err(|Doubtful| Refusal::doubtful())?;
        let mode = if sparse { ZeroMode::Punch } else { ZeroMode::Allocate };
        let work = Some((writer, operation));
        let (connection, places) = (Arc::clone(&self.connection), Arc::clone(&self.places));
        let (start, marked, place) = (at, at, None);
        Ok(Writing { kind, begun, connection, ticket, work, places, place, slot, mode, start, at, marked })
    }
}

/// An operation that writes, from its first byte on in order.
struct Writing {
    kind: Kind,
    begun: Instant,
    connection: Arc<Connection>,
    ticket: Arc<Ticket>,
    /// Gone when it is done.
    work: Option<(Writer, Operation)>,
    places: Arc<Semaphore>,
    /// Had while the writer has buffers.
    place: Option<OwnedSemaphorePermit>,
    slot: Arc<Slot>,
    mode: ZeroMode,
    start: u64,
    /// What is before was given to the writer.
    at: u64,
    /// What is before counts as transferred.
    marked: u64,
}

impl Writing {
    async fn stream(&mut self, body: &mut Incoming) -> Result<(), Broken> {
        loop {
            let Some((writer, _)) = &mut self.work else { return Ok(()) };
            let place = &mut self.place;
            // the storage's answers are taken while the client is waited for
            let frame = poll_fn(|cx| {
                if let Err(error) = writer.poll_progress(cx) {
                    return Poll::Ready(Some(Err(Broken::Storage(error))));
                }
                let frame = Pin::new(&mut *body).poll_frame(cx);
                if frame.is_pending() && writer.rest() {
                    *place = None;
                }
                frame.map(|frame| frame.map(|frame| frame.map_err(|_| Broken::Body)))
            });
            let Some(frame) = frame.await else { return Ok(()) };
            // trailers are nobody's bytes
            let Ok(data) = frame?.into_data() else { continue };
            take(place, &self.places).await;
            writer.write(self.at, &data).await?;
            self.at += data.len() as u64;
            self.mark();
        }
    }

    async fn zero(&mut self, size: u64) -> Result<(), NbdError> {
        let end = self.at + size;
        while self.at < end {
            let Some((writer, _)) = &mut self.work else { return Ok(()) };
            let step = (end - self.at).min(ZERO_REQUEST);
            if writer.sends_zeroes() {
                take(&mut self.place, &self.places).await;
            }
            writer.zero(self.at, step, self.mode).await?;
            self.at += step;
            self.mark();
        }
        Ok(())
    }

    /// All that is waited for from here on is the storage.
    fn received(&self) {
        if let Some((_, operation)) = &self.work {
            operation.received();
        }
    }

    /// Waits until the storage has answered for all, and ends the operation when its answer is in the kernel.
    async fn finish(&mut self, flush: bool) -> Result<(), NbdError> {
        if let Some((writer, _)) = &mut self.work {
            writer.drain().await?;
            writer.rest();
            self.place = None;
            if flush || !writer.flushes_others() {
                writer.flush().await?;
            }
        }
        self.mark();
        if let Some((writer, operation)) = self.work.take() {
            self.slot.keep(writer.finish().await?);
            operation.written();
            self.connection.finished(operation);
        }
        Ok(())
    }

    /// What the client is told when nothing of the operation can reach the disk any more, or when that cannot be known.
    async fn failed(&mut self, error: &NbdError) -> Failure {
        let failure = failed(&self.ticket, self.kind, error);
        let Some(ended) = self.give_up() else { return failure };
        if ended.await.unwrap_or(false) { failure } else { Refusal::doubtful().into() }
    }

    /// Ends the operation when nothing of it can reach the disk any more, whether somebody waits for that or not; whether it
    /// is so at the end. Without a runtime the process is on its way out.
    fn give_up(&mut self) -> Option<JoinHandle<bool>> {
        let runtime = tokio::runtime::Handle::try_current();
        let (writer, operation) = self.work.take()?;
        operation.received();
        let place = self.place.take();
        let ended = runtime.ok()?.spawn(async move {
            let _place = place;
            let Err(unanswered) = writer.abandon().await else { return true };
            let Ticket { backup, transfer, disk, .. } = &*operation.ticket;
            error!(backup, transfer, disk, error = %chain(&unanswered), "nothing more is written with this ticket");
            operation.doubt();
            false
        });
        Some(ended)
    }

    /// Bytes count as transferred when the storage has answered for them; that is what moves, where no client does.
    fn mark(&mut self) {
        let Some((writer, operation)) = &self.work else { return };
        let answered = writer.unanswered_from().unwrap_or(self.at);
        if answered > self.marked {
            operation.coverage.mark(self.marked, answered);
            self.marked = answered;
            self.connection.progress.moved();
        }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let mut journal = self.connection.journal();
        let count = match self.kind {
            Kind::Write => &mut journal.writes,
            Kind::Zero => &mut journal.zeroes,
            Kind::Flush => &mut journal.flushes,
        };
        count.add(self.at - self.start, self.begun.elapsed());
        drop(journal);
        // nobody waits for it
        let _ = self.give_up();
    }
}

async fn take(place: &mut Option<OwnedSemaphorePermit>, places: &Arc<Semaphore>) {
    if place.is_none() {
        // they are never closed
        *place = Arc::clone(places).acquire_owned().await.ok();
    }
}

fn done_well() -> Response<Answer> {
    built(response::Builder::new().status(StatusCode::OK), Answer::Text(None))
}

fn failed(ticket: &Ticket, kind: Kind, error: &NbdError) -> Failure {
    let Ticket { backup, transfer, disk, .. } = ticket;
    warn!(backup, transfer, disk, ?kind, error = %chain(error), "nothing more is written");
    Refusal::internal().into()
}
