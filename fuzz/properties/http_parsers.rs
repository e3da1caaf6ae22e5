//! The pure half of the image server: request heads, ranges, content ranges, patches, ticket ids.
//!
//! The input's first line is `METHOD TARGET`, the others headers, behind an empty line comes a body.

use hyper::header::{HeaderMap, HeaderName, HeaderValue, RANGE};
use hyper::{Method, Uri};
use virtmark::imageio::TicketId;
use virtmark::imageio::route::{Op, decoded, route};
use virtmark::imageio::wire::{self, Range, Refusal};

/// Any head is an operation on the ticket that it names, or a refusal of one line that does not repeat the path;
/// any range is refused or inside both ticket and image, and starts and ends where it says.
pub fn check(input: &[u8]) {
    let mut lines = input.split(|byte| *byte == b'\n');
    let head = lines.next().unwrap_or_default();
    let mut headers = HeaderMap::new();
    for line in lines.by_ref().take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_at(line.iter().position(|byte| *byte == b':').unwrap_or(line.len()));
        let value = value.strip_prefix(b":").unwrap_or(value).trim_ascii();
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
        values(value);
    }
    let body: Vec<u8> = lines.flat_map(|line| [line, b"\n"].concat()).collect();
    values(head);
    values(&body);
    let (method, target) = head.split_at(head.iter().position(|byte| *byte == b' ').unwrap_or(0));
    let (Ok(method), Ok(uri)) = (Method::from_bytes(method), Uri::try_from(target.trim_ascii_start())) else {
        return;
    };
    match route(&method, &uri, &headers) {
        Err(refusal) => refused(&refusal, uri.path()),
        Ok(Op::Info) => assert_eq!(decoded(uri.path()), "/info/"),
        Ok(Op::ServerOptions) => assert_eq!(method, "OPTIONS"),
        Ok(Op::Read { ticket, range, .. }) => {
            named(&ticket, &uri, "");
            assert_eq!(method, "GET");
            assert_eq!(
                range.is_some(),
                headers.contains_key(RANGE),
                "a range that is ignored corrupts a backup"
            );
            resolved(range);
        }
        Ok(Op::Extents { ticket, .. }) => named(&ticket, &uri, "/extents"),
        Ok(Op::Options { ticket } | Op::Write { ticket, .. } | Op::Patch { ticket }) => {
            named(&ticket, &uri, "");
        }
    }
}

/// The ticket is what the path says, and no path of its own.
fn named(ticket: &str, uri: &Uri, behind: &str) {
    assert!(!ticket.is_empty() && !ticket.contains('/'));
    assert_eq!(decoded(uri.path()), format!("/images/{ticket}{behind}"));
}

fn refused(refusal: &Refusal, path: &str) {
    assert!(refusal.status.is_client_error() && !refusal.message.contains('\n'), "{refusal:?}");
    // the parts of a path that could be a ticket's id
    for part in path.split('/').filter(|part| part.len() >= 32) {
        assert!(!refusal.message.contains(part), "{refusal:?} repeats {path}");
    }
}

fn resolved(range: Option<Range>) {
    for (ticket, image) in [(0, 0), (1, 1), (40_000, 65_536), (65_536, 40_000), (u64::MAX, i64::MAX as u64)] {
        let Ok((start, end)) = Range::resolve(range, ticket, image) else { continue };
        assert!(start <= end && end <= ticket.min(image), "{range:?} of {ticket}, {image}: {start}..{end}");
        let Some(range) = range else { continue };
        assert!(start == range.first && start < end);
        assert!(range.last.is_none_or(|last| end - 1 == last), "{range:?} was clamped to {end}");
    }
}

/// Everything that reads a value out of a client's bytes.
fn values(bytes: &[u8]) {
    if let Ok(range) = Range::parse(bytes) {
        assert!(range.last.is_none_or(|last| range.first <= last));
        let last = range.last.map(|last| last.to_string()).unwrap_or_default();
        assert_eq!(Range::parse(format!("bytes={}-{last}", range.first).as_bytes()), Ok(range));
        resolved(Some(range));
    }
    if let Ok(first) = wire::content_range(bytes) {
        let text = std::str::from_utf8(bytes).expect("an ASCII header");
        let digits: String = text["bytes ".len()..].chars().take_while(char::is_ascii_digit).collect();
        assert_eq!(digits.parse(), Ok(first));
    }
    if let Err(refusal) = wire::Patch::parse(bytes) {
        assert!(refusal.status == 400 && refusal.message.len() < 256, "{refusal:?}");
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    assert!(decoded(text).len() <= text.len());
    for key in ["close", "context", "flush"] {
        assert!(wire::query_value(Some(text), key).is_none_or(|value| value.len() + key.len() <= text.len()));
    }
    if let Ok(id) = TicketId::parse(text) {
        assert_eq!(id.expose(), text.to_ascii_lowercase());
        assert!(!format!("{id:?}").contains(&id.expose()[..8]));
    }
}
