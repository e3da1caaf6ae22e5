//! Answers requests: routes them, asks the tickets, opens the backend, and makes the answer. What writes is in
//! [`super::write`].
//!
//! Everything that can be refused is refused before the first byte of a body. A backend that fails by then
//! is a 500 with imageio's words; its reason is in the log with the transfer's name. After that only the
//! connection can be cut, see [`super::body`].

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::{info, warn};

use super::body::{Answer, ExtentsBody, ImageBody, Running, chain};
use super::connection::Connection;
use super::route::{Op, asks_to_close, route};
use super::ticket::{Access, Denied, Ticket};
use super::tickets::{Operation, Slot, Tickets};
use super::wire::{self, Context, ExtentsJson, Options, Patch, Range, Refusal};
use crate::extent::Extent;
use crate::nbd::{Client, NbdError, ReadStream, StatusStream};

/// Longest PATCH body that is read.
const MAX_PATCH: usize = 64 << 10;
/// Connections a client should read a disk with, or write to it, at most. More are served.
const MAX_CLIENTS: u32 = 8;
/// `server` of every answer.
const SERVER: &str = concat!("virtmark/", env!("CARGO_PKG_VERSION"));

/// What answers the requests of one connection.
pub(super) struct Service {
    pub(super) tickets: Tickets,
    pub(super) unix_socket: Option<Arc<str>>,
    /// Of all connections.
    pub(super) places: Arc<Semaphore>,
    pub(super) connection: Arc<Connection>,
}

/// Why a request is not done.
pub(super) enum Failure {
    Refused(Refusal),
    /// As before, and the connection is closed, as imageio does.
    Denied(Refusal),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        Failure::Refused(refusal)
    }
}

impl Service {
    /// Answers one request. Never fails: what goes wrong is an answer.
    pub(super) async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Answer>, Infallible> {
        self.connection.journal().requests += 1;
        let (head, mut body) = request.into_parts();
        let cors = cors(&head.method, head.uri.path(), &head.headers);
        let mut unread = !body.is_end_stream();
        let answered = match check_line(&head).and_then(|()| route(&head.method, &head.uri, &head.headers)) {
            Err(refusal) => Err(refusal.into()),
            Ok(op) => self.perform(op, &mut body, &mut unread).await,
        };
        let mut close = unread || asks_to_close(&head.method, &head.uri);
        let mut response = match answered {
            Ok(response) => response,
            Err(failure) => {
                self.connection.journal().refused += 1;
                let (Failure::Refused(refusal) | Failure::Denied(refusal)) = &failure;
                close |= matches!(failure, Failure::Denied(_));
                refuse(refusal)
            }
        };
        if unread {
            self.connection.leave_unread();
        }
        self.connection.meter().answered(response.status());
        let headers = response.headers_mut();
        headers.insert(header::SERVER, HeaderValue::from_static(SERVER));
        headers.extend(cors);
        if close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            // Else hyper adds `keep-alive` for a client of HTTP/1.0 that asked for it.
            *response.version_mut() = head.version;
        }
        Ok(response)
    }

    /// Tells by `unread` whether something of the body is left, where that changed.
    async fn perform(
        &self,
        op: Op,
        body: &mut Incoming,
        unread: &mut bool,
    ) -> Result<Response<Answer>, Failure> {
        match op {
            Op::Info => Ok(json(&serde_json::json!({ "version": env!("CARGO_PKG_VERSION") }))),
            Op::ServerOptions => Ok(self.options(None)),
            Op::Options { ticket } => {
                let operation = self.begin(&ticket)?;
                let answer = Ok(self.options(Some(&operation.ticket)));
                self.connection.finished(operation);
                answer
            }
            Op::Read { ticket, range } => self.read(&ticket, range).await,
            Op::Extents { ticket, context } => self.extents(&ticket, context.as_deref()).await,
            Op::Write { ticket, put } => {
                let written = self.put(&ticket, put, body).await;
                *unread = !body.is_end_stream();
                written
            }
            Op::Patch { ticket } => {
                let patch = read_patch(body).await?;
                *unread = false;
                self.patch(&ticket, Patch::parse(&patch)?).await
            }
        }
    }

    /// What a ticket permits, or any could.
    fn options(&self, ticket: Option<&Ticket>) -> Response<Answer> {
        let writes = ticket.is_none_or(|ticket| ticket.access != Access::Read);
        let mut response = json(&Options {
            unix_socket: self.unix_socket.as_deref(),
            features: if writes { &["extents", "flush", "zero"] } else { &["extents"] },
            max_readers: ticket.map(|_| MAX_CLIENTS),
            max_writers: ticket.map(|_| if writes { MAX_CLIENTS } else { 1 }),
            size: ticket.map(|ticket| ticket.size),
        });
        let methods = if writes { "OPTIONS,GET,PUT,PATCH" } else { "OPTIONS,GET" };
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(methods));
        response
    }

    async fn read(&self, id: &str, range: Option<Range>) -> Result<Response<Answer>, Failure> {
        let begun = Instant::now();
        let operation = self.begin(id)?;
        let ticket = Arc::clone(&operation.ticket);
        let slot = self.connection.slot(&self.tickets, &ticket.transfer);
        let size = ticket.size;
        let mut kept = slot.take();
        let (stream, first, start, end) = loop {
            let reused = kept.is_some();
            let opened = async {
                let client = open(kept.take(), &ticket).await?;
                let (start, end) = match Range::resolve(range, size, client.size()) {
                    Ok(bounds) => bounds,
                    Err(refusal) => return Ok(Err((refusal, client))),
                };
                let mut stream: ReadStream = client.read_stream(start, end - start)?;
                let first = stream.next().await.transpose()?;
                Ok::<_, NbdError>(Ok((stream, first, start, end)))
            };
            match opened.await {
                Ok(Ok(opened)) => break opened,
                Ok(Err((refusal, client))) => {
                    slot.keep(client);
                    return Err(refusal.into());
                }
                // A kept connection may have been closed by the server meanwhile: once more with a new one, unless it may
                // have written, see [`super::write`].
                Err(_) if reused && ticket.access == Access::Read => {}
                Err(error) => return Err(self.backend_failed(&ticket, "READ", &error)),
            }
        };
        let mut builder = Response::builder()
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::CONTENT_DISPOSITION, disposition(ticket.filename.as_deref()));
        if range.is_some() {
            let bounds = format!("bytes {start}-{}/{size}", end - 1);
            builder = builder.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, bounds);
        }
        let running = self.running(operation, slot, begun);
        Ok(built(builder, Answer::Image(Box::new(ImageBody::new(running, stream, first, start, end)))))
    }

    async fn extents(&self, id: &str, context: Option<&str>) -> Result<Response<Answer>, Failure> {
        let begun = Instant::now();
        let operation = self.begin(id)?;
        let ticket = Arc::clone(&operation.ticket);
        let context = Context::parse(context)?;
        if context == Context::Dirty && !(ticket.dirty && ticket.export.bitmap.is_some()) {
            return Err(Refusal::new(StatusCode::NOT_FOUND, "Ticket does not support dirty extents").into());
        }
        let slot = self.connection.slot(&self.tickets, &ticket.transfer);
        let mut kept = slot.take();
        let (stream, first): (StatusStream, Option<Extent>) = loop {
            let reused = kept.is_some();
            let opened = async {
                let mut stream = open(kept.take(), &ticket).await?.block_status(0)?;
                let first = stream.next().await.transpose()?;
                Ok::<_, NbdError>((stream, first))
            };
            match opened.await {
                Ok(opened) => break opened,
                Err(_) if reused && ticket.access == Access::Read => {}
                Err(error) => return Err(self.backend_failed(&ticket, "EXTENTS", &error)),
            }
        };
        info!(backup = ticket.backup, transfer = ticket.transfer, disk = ticket.disk, ?context, "EXTENTS");
        let running = self.running(operation, slot, begun);
        let body = ExtentsBody::new(running, stream, ExtentsJson::new(context), first);
        let builder = Response::builder().header(header::CONTENT_TYPE, "application/json");
        Ok(built(builder, Answer::Extents(Box::new(body))))
    }

    fn running(&self, operation: Operation, slot: Arc<Slot>, begun: Instant) -> Running {
        Running { connection: Arc::clone(&self.connection), operation: Some(operation), slot, begun }
    }

    /// Asks the tickets. The refusal repeats the id that the client sent, as imageio does: to the client
    /// alone, which has it already.
    pub(super) fn begin(&self, id: &str) -> Result<Operation, Failure> {
        let operation =
            self.tickets.begin(id, &self.connection.cut, &self.connection.progress).map_err(|denied| {
                Failure::Denied(Refusal::forbidden(&match denied {
                    Denied::NoSuchTicket => format!("No such ticket {id}"),
                    Denied::Expired { transfer } => format!("Transfer={transfer} expired"),
                    Denied::Canceled { transfer } => format!("Transfer={transfer} was canceled"),
                }))
            })?;
        self.connection.authorize(&operation.ticket);
        Ok(operation)
    }

    fn backend_failed(&self, ticket: &Ticket, what: &str, error: &NbdError) -> Failure {
        let Ticket { backup, transfer, disk, .. } = ticket;
        warn!(backup, transfer, disk, error = %chain(error), "{what} failed before the first byte");
        Refusal::internal().into()
    }
}

/// The kept connection to a ticket's export, or a new one.
pub(super) async fn open(kept: Option<Client>, ticket: &Ticket) -> Result<Client, NbdError> {
    match (kept, ticket.access) {
        (Some(client), _) => Ok(client),
        (None, Access::Read) => Client::connect(&ticket.export).await,
        (None, Access::Write { .. }) => Client::connect_to_write(&ticket.export).await,
    }
}

fn check_line(head: &hyper::http::request::Parts) -> Result<(), Refusal> {
    let target = head.uri.path_and_query().map_or(0, |target| target.as_str().len());
    if head.method.as_str().len() + " ".len() + target + " HTTP/1.1\r\n".len() > wire::MAX_REQUEST_LINE {
        return Err(Refusal::new(StatusCode::URI_TOO_LONG, "Request line is too long"));
    }
    Ok(())
}

async fn read_patch(body: &mut Incoming) -> Result<Bytes, Refusal> {
    let whole = Limited::new(body, MAX_PATCH).collect().await;
    whole
        .map(http_body_util::Collected::to_bytes)
        .map_err(|_| Refusal::bad_request("Cannot read the request's body"))
}

fn refuse(refusal: &Refusal) -> Response<Answer> {
    let mut builder =
        Response::builder().status(refusal.status).header(header::CONTENT_TYPE, "text/plain; charset=UTF-8");
    if let Some(size) = refusal.size {
        builder = builder.header(header::CONTENT_RANGE, format!("bytes */{size}"));
    }
    if let Some(allow) = refusal.allow {
        builder = builder.header(header::ALLOW, allow);
    }
    built(builder, Answer::Text(Some(format!("{}\n", refusal.message).into())))
}

fn json(document: &impl serde::Serialize) -> Response<Answer> {
    match serde_json::to_string(document) {
        Ok(text) => {
            let builder = Response::builder().header(header::CONTENT_TYPE, "application/json");
            built(builder, Answer::Text(Some(format!("{text}\n").into())))
        }
        Err(_) => refuse(&Refusal::internal()),
    }
}

fn disposition(filename: Option<&str>) -> HeaderValue {
    filename
        .and_then(|name| HeaderValue::from_bytes(format!("attachment; filename={name}").as_bytes()).ok())
        .unwrap_or(HeaderValue::from_static("attachment"))
}

/// A builder fails only on a header that we wrote wrong: then the request fails, not the server.
pub(super) fn built(builder: hyper::http::response::Builder, answer: Answer) -> Response<Answer> {
    builder.body(answer).unwrap_or_else(|_| {
        let mut response = Response::new(Answer::Text(None));
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        response
    })
}

/// The headers that let a page of another origin read a disk, only when asked for (imageio does so).
fn cors(method: &hyper::Method, path: &str, headers: &HeaderMap) -> Vec<(HeaderName, HeaderValue)> {
    let served = match method.as_str() {
        "GET" if path == "/info/" => true,
        "OPTIONS" | "GET" | "PUT" => path.starts_with("/images/") && !path.ends_with("/extents"),
        _ => false,
    };
    let mut answer = Vec::new();
    if !served {
        return answer;
    }
    if headers.contains_key(header::ORIGIN) {
        answer.push((header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*")));
    }
    if headers.contains_key(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        answer.push((header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("*")));
    }
    if headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD) {
        let methods = if method == hyper::Method::OPTIONS { "OPTIONS,GET,PUT" } else { "*" };
        answer.push((header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(methods)));
    }
    if !answer.is_empty() {
        answer.push((header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400")));
    }
    answer
}
