//! From a request's head to the operation it asks for, or a refusal: pure, in imageio's order of checks.
//!
//! Method and path first, then the syntax of parameters; tickets and disks are not known here, so that a
//! malformed request on an unknown ticket is told to be malformed. A path is decoded before it is matched.
//! Refusals never repeat a path, since it may hold a ticket's id.

use std::borrow::Cow;

use hyper::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE, TRANSFER_ENCODING};
use hyper::{HeaderMap, Method, StatusCode, Uri};
use percent_encoding::percent_decode_str;

use super::wire::{self, Range, Refusal};

/// What a request asks for. `ticket` is what the client sent as the ticket's id.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// `OPTIONS /images/*`: what the server can do.
    ServerOptions,
    /// `OPTIONS /images/ID`: what the ticket permits.
    Options {
        /// As sent.
        ticket: String,
    },
    /// `GET /images/ID`: bytes.
    Read {
        /// As sent.
        ticket: String,
        /// All when absent.
        range: Option<Range>,
    },
    /// `GET /images/ID/extents`; the context is checked after the ticket, as imageio does.
    Extents {
        /// As sent.
        ticket: String,
        /// Value of `context`.
        context: Option<String>,
    },
    /// `PUT /images/ID`, well formed.
    Write {
        /// As sent.
        ticket: String,
        /// What is written.
        put: Put,
    },
    /// `PATCH /images/ID`; its body is still to be checked.
    Patch {
        /// As sent.
        ticket: String,
    },
    /// `GET /info/`: the version.
    Info,
}

/// Where a body goes, and whether it is flushed before the answer, as it is when nothing is said of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Put {
    /// First byte.
    pub offset: u64,
    /// Bytes, as the request's length says; what `Content-Range` says of its end does not count.
    pub length: u64,
    /// Whether all is on stable storage with the answer.
    pub flush: bool,
}

enum Resource {
    Image(String),
    Extents(String),
    Info,
}

/// Methods that are known, whether a resource has them or not.
const METHODS: [&str; 7] = ["OPTIONS", "GET", "PUT", "PATCH", "POST", "DELETE", "HEAD"];

/// The operation of a request.
pub fn route(method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Op, Refusal> {
    let resource = resource(uri.path());
    if !METHODS.contains(&method.as_str()) {
        return Err(refuse_method(format!("Invalid method '{method}'"), resource.as_ref().ok()));
    }
    let resource = resource?;
    let query = uri.query();
    match (method.as_str(), resource) {
        ("OPTIONS" | "GET" | "PUT" | "PATCH", Resource::Image(ticket)) if ticket.is_empty() => {
            Err(no_ticket())
        }
        ("GET", Resource::Extents(ticket)) if ticket.is_empty() => Err(no_ticket()),
        ("OPTIONS", Resource::Image(ticket)) if ticket == "*" => Ok(Op::ServerOptions),
        ("OPTIONS", Resource::Image(ticket)) => Ok(Op::Options { ticket }),
        ("GET", Resource::Image(ticket)) => {
            let mut ranges = headers.get_all(RANGE).iter();
            let range = ranges.next().map(|value| Range::parse(value.as_bytes())).transpose()?;
            if ranges.next().is_some() {
                return Err(Refusal::new(
                    StatusCode::RANGE_NOT_SATISFIABLE,
                    "Unsupported range: send one Range",
                ));
            }
            Ok(Op::Read { ticket, range })
        }
        ("GET", Resource::Extents(ticket)) => {
            Ok(Op::Extents { ticket, context: wire::query_value(query, "context") })
        }
        ("GET", Resource::Info) => Ok(Op::Info),
        ("PUT", Resource::Image(ticket)) => {
            let put = check_put(query, headers)?;
            Ok(Op::Write { ticket, put })
        }
        ("PATCH", Resource::Image(ticket)) => Ok(Op::Patch { ticket }),
        (_, resource) => {
            let message = format!("Method '{method}' not defined for this resource");
            Err(refuse_method(message, Some(&resource)))
        }
    }
}

/// The client asks that the connection is closed after the answer, whatever it is (`close=y`).
#[must_use]
pub fn asks_to_close(method: &Method, uri: &Uri) -> bool {
    matches!(*method, Method::GET | Method::PUT)
        && wire::query_value(uri.query(), "close").as_deref() == Some("y")
        && matches!(resource(uri.path()), Ok(Resource::Image(ticket)) if !ticket.is_empty())
}

fn resource(path: &str) -> Result<Resource, Refusal> {
    let not_found = |message: &str| Refusal::new(StatusCode::NOT_FOUND, message);
    let path = decoded(path);
    if path == "/info/" {
        return Ok(Resource::Info);
    }
    let image = path.strip_prefix("/images/").ok_or_else(|| not_found("No handler for this path"))?;
    let (ticket, rest) = image.split_once('/').map_or((image, None), |(ticket, rest)| (ticket, Some(rest)));
    match rest {
        None => Ok(Resource::Image(ticket.to_owned())),
        Some("extents") => Ok(Resource::Extents(ticket.to_owned())),
        Some("checksum" | "checksum/algorithms") => {
            Err(not_found("Checksum is not supported by this server"))
        }
        Some(_) => Err(not_found("No handler for this path of an image; did you mean /extents?")),
    }
}

/// A path as it is matched. What is no UTF-8 once it is decoded names no ticket.
#[must_use]
pub fn decoded(path: &str) -> Cow<'_, str> {
    percent_decode_str(path).decode_utf8_lossy()
}

fn no_ticket() -> Refusal {
    Refusal::bad_request("Ticket id is required")
}

fn check_put(query: Option<&str>, headers: &HeaderMap) -> Result<Put, Refusal> {
    // That it is a number, the same wherever it stands, was checked when the request was read.
    let length = headers.get(CONTENT_LENGTH).filter(|_| !headers.contains_key(TRANSFER_ENCODING));
    let length = length.and_then(|value| value.to_str().ok()?.split(',').next()?.trim().parse().ok());
    let length = length.ok_or_else(|| Refusal::bad_request("Content-Length header is required"))?;
    let offset = headers.get(CONTENT_RANGE).map(|value| wire::content_range(value.as_bytes())).transpose()?;
    let flush = match wire::query_value(query, "flush").as_deref() {
        None | Some("y") => true,
        Some("n") => false,
        Some(_) => return Err(Refusal::bad_request("Invalid value for \"flush\": use y or n")),
    };
    Ok(Put { offset: offset.unwrap_or(0), length, flush })
}

fn refuse_method(message: String, resource: Option<&Resource>) -> Refusal {
    let allow = resource.map(|resource| match resource {
        Resource::Image(_) => "OPTIONS,GET,PUT,PATCH",
        Resource::Extents(_) | Resource::Info => "GET",
    });
    Refusal { allow, ..Refusal::new(StatusCode::METHOD_NOT_ALLOWED, message) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(method: &str, uri: &str, headers: &[(&str, &str)]) -> Result<Op, u16> {
        let request = headers
            .iter()
            .fold(hyper::Request::builder().method(method).uri(uri), |request, (name, value)| {
                request.header(*name, *value)
            });
        let (parts, ()) = request.body(()).unwrap().into_parts();
        route(&parts.method, &parts.uri, &parts.headers).map_err(|refusal| refusal.status.as_u16())
    }

    #[test]
    fn requests_become_operations() {
        let ticket = || "ID".to_owned();
        assert_eq!(ask("OPTIONS", "/images/ID", &[]), Ok(Op::Options { ticket: ticket() }));
        assert_eq!(ask("OPTIONS", "/images/*", &[]), Ok(Op::ServerOptions));
        assert_eq!(ask("GET", "/info/", &[]), Ok(Op::Info));
        let read = |range| Ok(Op::Read { ticket: ticket(), range });
        assert_eq!(ask("GET", "/images/ID?close=n&close=y&x=1", &[]), read(None));
        assert_eq!(
            ask("GET", "/images/%49D", &[("range", "bytes=1-")]),
            read(Some(Range { first: 1, last: None }))
        );
        let extents =
            |context: Option<&str>| Ok(Op::Extents { ticket: ticket(), context: context.map(str::to_owned) });
        assert_eq!(ask("GET", "/images/ID/extents", &[]), extents(None));
        assert_eq!(ask("GET", "/images/ID/extents?context=a&context=dirty", &[]), extents(Some("dirty")));
        let length = ("content-length", "10");
        assert_eq!(
            ask("PUT", "/images/ID?flush=n", &[length, ("content-range", "bytes 7-9/*")]),
            Ok(Op::Write { ticket: ticket(), put: Put { offset: 7, length: 10, flush: false } })
        );
        let put = Put { offset: 0, length: 10, flush: true };
        assert_eq!(
            ask("PUT", "/images/ID", &[("content-length", "10, 10")]),
            Ok(Op::Write { ticket: ticket(), put })
        );
        assert_eq!(ask("PATCH", "/images/ID", &[]), Ok(Op::Patch { ticket: ticket() }));
    }

    #[test]
    fn only_reads_and_writes_of_a_disk_close_when_asked() {
        for (method, uri, closes) in [
            ("GET", "/images/ID?close=n&close=y", true),
            ("PUT", "/images/ID?%63lose=y", true),
            ("GET", "/images/ID?close=y&close", false),
            ("GET", "/images/?close=y", false),
            ("GET", "/images/ID/extents?close=y", false),
            ("PATCH", "/images/ID?close=y", false),
        ] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            assert_eq!(asks_to_close(&method, &uri.parse().unwrap()), closes, "{method} {uri}");
        }
    }

    #[test]
    fn the_rest_is_refused() {
        for (method, uri, headers, status) in [
            ("GET", "/", &[][..], 404),
            ("GET", "/images", &[], 404),
            ("GET", "/info", &[], 404),
            ("GET", "/images/", &[], 400),
            ("GET", "/images//extents", &[], 400),
            ("GET", "/images/ID/", &[], 404),
            ("GET", "/images/ID/extentsfoo", &[], 404),
            ("GET", "/images/ID/checksum", &[], 404),
            ("POST", "/images/", &[], 405),
            ("FOO", "/nothing", &[], 405),
            ("HEAD", "/images/ID", &[], 405),
            ("POST", "/images/ID", &[], 405),
            ("FOO", "/images/ID", &[], 405),
            ("PUT", "/images/ID/extents", &[], 405),
            ("PUT", "/info/", &[], 405),
            ("GET", "/images/ID", &[("range", "bytes=-5")], 416),
            ("GET", "/images/ID", &[("range", "bytes=0-1"), ("range", "bytes=3-4")], 416),
            ("PUT", "/images/ID", &[], 400),
            ("PUT", "/images/ID", &[("transfer-encoding", "chunked")], 400),
            ("PUT", "/images/ID?flush=maybe", &[("content-length", "1")], 400),
            ("PUT", "/images/ID", &[("content-length", "1"), ("content-range", "bytes */9")], 400),
        ] {
            assert_eq!(ask(method, uri, headers), Err(status), "{method} {uri} {headers:?}");
        }
    }
}
