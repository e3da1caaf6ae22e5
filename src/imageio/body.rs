//! Bodies of answers: a line of text, the bytes of a disk, its extents.
//!
//! A body of a disk holds its [`Operation`] until all of it is in the kernel or the connection is cut. A
//! backend that fails, or a ticket that ends, is an error of the body, which makes hyper drop the connection:
//! the client sees a short answer, never a wrong one. At most one request window of the NBD client is held.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::Instant;
use tracing::warn;

use super::connection::Connection;
use super::ticket::{Access, Ticket};
use super::tickets::{Operation, Slot};
use super::wire::ExtentsJson;
use crate::extent::Extent;
use crate::nbd::{Client, NbdError, ReadStream, StatusStream};

/// Extents are given out when so many bytes of JSON are there, or when the storage must be waited for.
const EXTENTS_FRAME: usize = 32 << 10;

/// The connection is cut in the middle of an answer; the log has the reason.
#[derive(Debug, thiserror::Error)]
#[error("the answer was cut: {0}")]
pub(super) struct Cut(#[from] NbdError);

/// The body of any answer.
pub(super) enum Answer {
    Text(Option<Bytes>),
    Image(Box<ImageBody>),
    Extents(Box<ExtentsBody>),
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let data = match self.get_mut() {
            Answer::Text(text) => text.take().map(Ok),
            Answer::Image(image) => ready!(image.poll_data(cx)),
            Answer::Extents(extents) => ready!(extents.poll_data(cx)),
        };
        Poll::Ready(data.map(|data| data.map(Frame::data).map_err(Cut::from)))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Answer::Text(text) => text.as_ref().is_none_or(Bytes::is_empty),
            Answer::Image(image) => image.at == image.end,
            Answer::Extents(extents) => extents.work.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Answer::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64)),
            Answer::Image(image) => SizeHint::with_exact(image.end - image.at),
            Answer::Extents(_) => SizeHint::default(),
        }
    }
}

/// An operation whose body is being given out.
pub(super) struct Running {
    pub(super) connection: Arc<Connection>,
    /// Leaves for the connection with the last byte.
    pub(super) operation: Option<Operation>,
    pub(super) slot: Arc<Slot>,
    pub(super) begun: Instant,
}

impl Running {
    fn finish(&mut self, client: Option<Client>) {
        if let Some(client) = client {
            self.slot.keep(client);
        }
        if let Some(operation) = self.operation.take() {
            self.connection.finished(operation);
        }
    }

    fn failed(&self, what: &str, error: &NbdError) {
        let Some(Ticket { backup, transfer, disk, .. }) = self.operation.as_ref().map(|op| &*op.ticket)
        else {
            return;
        };
        warn!(backup, transfer, disk, error = %chain(error), "{what} failed, the connection is cut");
    }
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &NbdError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// The bytes `at..end` of a disk.
pub(super) struct ImageBody {
    running: Running,
    stream: Option<ReadStream>,
    first: Option<Bytes>,
    start: u64,
    at: u64,
    end: u64,
    /// Since when the storage is waited for.
    asked: Option<Instant>,
    /// Since when hyper has the last bytes.
    given: Option<Instant>,
    storage: Duration,
    socket: Duration,
}

impl ImageBody {
    /// The bytes that `stream` gives, the first of them already read since `running` began.
    pub(super) fn new(
        running: Running,
        stream: ReadStream,
        first: Option<Bytes>,
        start: u64,
        end: u64,
    ) -> ImageBody {
        let mut body = ImageBody {
            storage: running.begun.elapsed(),
            running,
            stream: Some(stream),
            first,
            start,
            at: start,
            end,
            asked: None,
            given: None,
            socket: Duration::ZERO,
        };
        if start == end {
            body.finish();
        }
        body
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, NbdError>>> {
        let Some(stream) = self.stream.as_mut() else { return Poll::Ready(None) };
        ready!(self.running.connection.poll_taken(cx));
        if let Some(given) = self.given.take() {
            self.socket += given.elapsed();
        }
        let asked = *self.asked.get_or_insert_with(Instant::now);
        let chunk = match self.first.take() {
            Some(first) => Some(Ok(first)),
            None => ready!(stream.poll_next(cx)),
        };
        self.storage += asked.elapsed();
        self.asked = None;
        let chunk =
            chunk.unwrap_or(Err(NbdError::Closed)).inspect_err(|error| self.running.failed("READ", error))?;
        let behind = self.at + chunk.len() as u64;
        if let Some(operation) = &self.running.operation {
            // who writes has what was written counted
            let counts = operation.ticket.access == Access::Read;
            self.running.connection.yielded(counts.then_some(&operation.coverage), self.at, behind);
        }
        self.at = behind;
        self.given = Some(Instant::now());
        if self.at == self.end {
            self.finish();
        }
        Poll::Ready(Some(Ok(chunk)))
    }

    fn finish(&mut self) {
        let client = self.stream.take().and_then(ReadStream::into_client);
        self.running.finish(client);
    }
}

impl Drop for ImageBody {
    fn drop(&mut self) {
        let mut journal = self.running.connection.journal();
        journal.reads.add(self.at - self.start, self.running.begun.elapsed());
        journal.storage += self.storage;
        journal.socket += self.socket;
        drop(journal);
        self.running.connection.meter().waited(self.storage, self.socket);
    }
}

/// The extents of a disk, as JSON.
pub(super) struct ExtentsBody {
    running: Running,
    work: Option<(StatusStream, ExtentsJson)>,
    out: BytesMut,
    bytes: u64,
}

impl ExtentsBody {
    /// The extents that `stream` gives, the first of them already told since `running` began.
    pub(super) fn new(
        running: Running,
        stream: StatusStream,
        mut json: ExtentsJson,
        first: Option<Extent>,
    ) -> ExtentsBody {
        let mut out = BytesMut::new();
        if let Some(first) = first {
            json.push(first, &mut out);
        }
        ExtentsBody { running, work: Some((stream, json)), out, bytes: 0 }
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, NbdError>>> {
        let Some((stream, json)) = self.work.as_mut() else { return Poll::Ready(None) };
        while self.out.len() < EXTENTS_FRAME {
            match stream.poll_next(cx) {
                Poll::Pending if self.out.is_empty() => return Poll::Pending,
                Poll::Pending => break,
                Poll::Ready(Some(Ok(extent))) => json.push(extent, &mut self.out),
                Poll::Ready(Some(Err(error))) => {
                    self.running.failed("EXTENTS", &error);
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(None) => {
                    json.finish(&mut self.out);
                    let client = self.work.take().and_then(|(stream, _)| stream.into_client());
                    self.running.finish(client);
                    break;
                }
            }
        }
        let frame = self.out.split().freeze();
        self.bytes += frame.len() as u64;
        Poll::Ready(Some(Ok(frame)))
    }
}

impl Drop for ExtentsBody {
    fn drop(&mut self) {
        self.running.connection.journal().extents.add(self.bytes, self.running.begun.elapsed());
    }
}
