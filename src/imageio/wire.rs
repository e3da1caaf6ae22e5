//! The texts of the images API: ranges, refusals, the OPTIONS document, extents as JSON.
//!
//! Pure: text in, values out, and back. What a compatible server must say is in `reference/imageio.md`
//! section 1; HTTP's own rules are RFC 9110 and 9112. Nothing here knows a ticket, a socket or a disk.

use bytes::{BufMut as _, BytesMut};
use hyper::StatusCode;
use serde::Serialize;

use crate::extent::{Coalescer, Extent, Flags};

/// Longest request line that is served, in bytes with its end, as in imageio.
pub const MAX_REQUEST_LINE: usize = 4096;

/// An answer that is no success: one line of text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// HTTP status.
    pub status: StatusCode,
    /// The line; imageio's clients show it to their user.
    pub message: String,
    /// Bytes of the disk, for `content-range: bytes */SIZE`.
    pub size: Option<u64>,
    /// Methods of the resource, for `allow`.
    pub allow: Option<&'static str>,
}

impl Refusal {
    /// A refusal without further headers.
    #[must_use]
    pub fn new(status: StatusCode, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into(), size: None, allow: None }
    }

    /// 400 with a message.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, message)
    }

    /// 403 with imageio's words.
    #[must_use]
    pub fn forbidden(why: &str) -> Refusal {
        let message = format!("You are not allowed to access this resource: {why}");
        Refusal::new(StatusCode::FORBIDDEN, message)
    }

    /// 416 with the bytes that there are.
    #[must_use]
    pub fn unsatisfiable(size: u64, message: &str) -> Refusal {
        Refusal { size: Some(size), ..Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, message) }
    }

    /// 500 with imageio's words, which tell a client nothing of the node.
    #[must_use]
    pub fn internal() -> Refusal {
        let message = "Server failed to perform the request, check logs";
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// 500 where the storage owes an answer: what is written now may be overwritten.
    #[must_use]
    pub fn doubtful() -> Refusal {
        let message = "The storage owes the answer to an earlier write, which may be written later than what follows it: begin again \
                       with a new transfer";
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }
}

/// A `Range` of the only form that is served: `bytes=FIRST-` or `bytes=FIRST-LAST`.
///
/// Every other form is refused: RFC 9110 allows a server to ignore it, but whoever writes the whole disk to
/// the place of a part corrupts a backup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// First byte.
    pub first: u64,
    /// Last byte, that is included.
    pub last: Option<u64>,
}

impl Range {
    /// Reads the header's value; 416 when it is of another form.
    pub fn parse(value: &[u8]) -> Result<Range, Refusal> {
        let refused = || {
            let message = "Unsupported range: use bytes=FIRST-LAST or bytes=FIRST-";
            Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, message)
        };
        let text = std::str::from_utf8(value).ok().and_then(|text| text.strip_prefix("bytes="));
        let (first, last) = text.and_then(|text| text.split_once('-')).ok_or_else(refused)?;
        let first = number(first).ok_or_else(refused)?;
        let last = if last.is_empty() { None } else { Some(number(last).ok_or_else(refused)?) };
        if last.is_some_and(|last| last < first) {
            return Err(refused());
        }
        Ok(Range { first: position(first), last: last.map(position) })
    }

    /// The bytes `start..end` that are meant, of a ticket for `ticket` bytes on an image of `image` bytes.
    /// An explicit end is never clamped.
    pub fn resolve(range: Option<Range>, ticket: u64, image: u64) -> Result<(u64, u64), Refusal> {
        let available = ticket.min(image);
        let Some(Range { first, last }) = range else { return Ok((0, available)) };
        let past_first = first.saturating_add(1);
        let end = last.map_or(available.max(past_first), |last| last.saturating_add(1));
        if end > ticket || first == u64::MAX {
            return Err(Refusal::unsatisfiable(ticket, "Requested range out of allowed range"));
        }
        if end > image {
            let message = format!("Requested more bytes than available: {end} > {available}");
            return Err(Refusal::unsatisfiable(available, &message));
        }
        Ok((first, end))
    }
}

/// A number of decimal digits only: no sign, no space. Wider than any disk, so that two that are beyond all disks can
/// still be compared.
fn number(text: &str) -> Option<u128> {
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| text.parse().unwrap_or(u128::MAX))
}

/// A byte's place; one that is beyond any disk is the last.
fn position(number: u128) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// The offset of a PUT: `bytes FIRST-(LAST|*)/(TOTAL|*)`, of which only FIRST counts.
pub fn content_range(value: &[u8]) -> Result<u64, Refusal> {
    let refused = || Refusal::bad_request("Invalid Content-Range: use bytes FIRST-LAST/*");
    let text = std::str::from_utf8(value).ok().and_then(|text| text.strip_prefix("bytes "));
    let (first, rest) = text.and_then(|text| text.split_once('-')).ok_or_else(refused)?;
    let (last, total) = rest.split_once('/').ok_or_else(refused)?;
    let open = |text| if text == "*" { Some(None) } else { number(text).map(Some) };
    let (first, last, total) = (number(first), open(last), open(total));
    let (Some(first), Some(last), Some(total)) = (first, last, total) else { return Err(refused()) };
    let lies = last.is_some_and(|last| first > last || total.is_some_and(|total| last >= total));
    if lies { Err(refused()) } else { Ok(position(first)) }
}

/// What the body of a PATCH asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Patch {
    /// `{"op": "zero", "size": N, "offset": N, "flush": BOOL}`: a range is to read as zeroes.
    Zero {
        /// First byte; 0 when absent.
        offset: u64,
        /// Bytes.
        size: u64,
        /// Whether all is on stable storage with the answer; not when absent.
        flush: bool,
    },
    /// `{"op": "flush"}`: all that was written is to be on stable storage.
    Flush,
}

impl Patch {
    /// Reads the body; 400 when it is of another form. Keys that are not known are ignored.
    pub fn parse(body: &[u8]) -> Result<Patch, Refusal> {
        let value: serde_json::Value = serde_json::from_slice(body)
            .map_err(|error| Refusal::bad_request(format!("Invalid JSON message: {error}")))?;
        let object =
            value.as_object().ok_or_else(|| Refusal::bad_request("Invalid JSON message: not an object"))?;
        let op = object.get("op").ok_or_else(|| Refusal::bad_request("Missing required value for \"op\""))?;
        match op.as_str() {
            Some("flush") => return Ok(Patch::Flush),
            Some("zero") => {}
            _ => return Err(Refusal::bad_request("Unknown operation: use zero or flush")),
        }
        let size =
            object.get("size").ok_or_else(|| Refusal::bad_request("Missing required value for \"size\""))?;
        let natural = |value: &serde_json::Value| {
            let refusal = "Integer required, 0 or more, for \"size\" and \"offset\"";
            value.as_u64().ok_or_else(|| Refusal::bad_request(refusal))
        };
        let (size, offset) = (natural(size)?, object.get("offset").map_or(Ok(0), natural)?);
        let flush = object.get("flush").map_or(Some(false), serde_json::Value::as_bool);
        let flush = flush.ok_or_else(|| Refusal::bad_request("Boolean required for \"flush\""))?;
        Ok(Patch::Zero { offset, size, flush })
    }
}

/// Whether `length` bytes at `offset` may be written, of a ticket for `ticket` bytes on an image of `image` bytes; else 416.
pub fn check_write(offset: u64, length: u64, ticket: u64, image: u64) -> Result<(), Refusal> {
    let end = u128::from(offset) + u128::from(length);
    if end > ticket.into() {
        return Err(Refusal::unsatisfiable(ticket, "Requested range out of allowed range"));
    }
    // imageio writes as far as there is an image, and fails
    if end > image.into() {
        let available = ticket.min(image);
        let message = format!("Requested more bytes than available: {end} > {available}");
        return Err(Refusal::unsatisfiable(available, &message));
    }
    Ok(())
}

/// The document that OPTIONS answers.
#[derive(Clone, Debug, Serialize)]
pub struct Options<'a> {
    /// Path of the unix socket that serves the same, when there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unix_socket: Option<&'a str>,
    /// What is served besides GET.
    pub features: &'static [&'static str],
    /// Connections that a client should open at most; more are served too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_readers: Option<u32>,
    /// The same for writing. 1 where the ticket only reads: clients expect the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_writers: Option<u32>,
    /// Bytes of the disk. Ours; clients ignore what they do not know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// What extents tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Context {
    /// Which bytes read as zero.
    Zero,
    /// Which bytes changed.
    Dirty,
}

impl Context {
    /// Reads the query's value, absent for zero.
    pub fn parse(value: Option<&str>) -> Result<Context, Refusal> {
        match value {
            None | Some("zero") => Ok(Context::Zero),
            Some("dirty") => Ok(Context::Dirty),
            Some(_) => Err(Refusal::bad_request("Invalid context: use zero or dirty")),
        }
    }
}

/// Writes extents as a JSON list, one at a time; neighbours that tell the same are joined.
#[derive(Debug)]
pub struct ExtentsJson {
    context: Context,
    coalescer: Coalescer,
    begun: bool,
}

impl ExtentsJson {
    /// A list that tells of `context`.
    #[must_use]
    pub fn new(context: Context) -> ExtentsJson {
        ExtentsJson { context, coalescer: Coalescer::default(), begun: false }
    }

    /// Takes the next extent; appends what is known to `out`.
    pub fn push(&mut self, extent: Extent, out: &mut BytesMut) {
        let mask = match self.context {
            Context::Zero => Flags::ZERO.union(Flags::HOLE),
            Context::Dirty => Flags::ZERO.union(Flags::DIRTY),
        };
        if let Some(done) = self.coalescer.push(extent.masked(mask)) {
            self.write(done, out);
        }
    }

    /// Appends the end of the list.
    pub fn finish(&mut self, out: &mut BytesMut) {
        if let Some(last) = self.coalescer.finish() {
            self.write(last, out);
        }
        out.put_slice(if self.begun { b"]\n" } else { b"[]\n" });
    }

    fn write(&mut self, extent: Extent, out: &mut BytesMut) {
        let before = if std::mem::replace(&mut self.begun, true) { ", " } else { "[" };
        let Extent { start, length, .. } = extent;
        let (zero, hole, dirty) = (extent.zero(), extent.hole(), extent.dirty());
        let text = match self.context {
            Context::Zero => {
                format!(r#"{before}{{"start": {start}, "length": {length}, "zero": {zero}, "hole": {hole}}}"#)
            }
            Context::Dirty => {
                format!(
                    r#"{before}{{"start": {start}, "length": {length}, "dirty": {dirty}, "zero": {zero}}}"#
                )
            }
        };
        out.put_slice(text.as_bytes());
    }
}

/// The last value of `key` in a query; a key without a value has an empty one.
#[must_use]
pub fn query_value(query: Option<&str>, key: &str) -> Option<String> {
    let pairs = form_urlencoded::parse(query?.as_bytes());
    pairs.filter(|(name, _)| name == key).last().map(|(_, value)| value.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_come_back(first: u64, more in 0..1_000_000u64) {
            let last = first.saturating_add(more);
            prop_assert_eq!(Range::parse(format!("bytes={first}-").as_bytes()), Ok(Range { first, last: None }));
            prop_assert_eq!(
                Range::parse(format!("bytes={first}-{last}").as_bytes()),
                Ok(Range { first, last: Some(last) })
            );
            prop_assert_eq!(content_range(format!("bytes {first}-{last}/*").as_bytes()), Ok(first));
        }

        #[test]
        fn resolved_ranges_are_inside_or_refused(first: u8, last: Option<u8>, ticket: u8, image: u8) {
            prop_assume!(last.is_none_or(|last| first <= last));
            let range = Range { first: first.into(), last: last.map(u64::from) };
            if let Ok((start, end)) = Range::resolve(Some(range), ticket.into(), image.into()) {
                prop_assert!(start == range.first && start <= end && end <= u64::from(ticket.min(image)));
                prop_assert!(range.last.is_none_or(|last| end == last + 1));
            }
        }

        #[test]
        fn any_text_parses_without_panic(bytes: Vec<u8>, text: String) {
            let _ = (Range::parse(&bytes), content_range(&bytes), Patch::parse(&bytes));
            let _ = query_value(Some(&text), "a");
        }
    }

    #[test]
    fn other_ranges_are_refused() {
        for text in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=-5",
            "bytes=1-2,4-5",
            "bytes=2-1",
            "Bytes=1-2",
            "bytes= 1-2",
            "bytes=1-2 ",
            "bytes=+1-2",
            "items=1-2",
        ] {
            let refusal = Range::parse(text.as_bytes()).unwrap_err();
            assert_eq!((refusal.status.as_u16(), refusal.size), (416, None), "{text}");
        }
    }

    #[test]
    fn an_explicit_end_is_never_clamped() {
        let range = |first, last| Some(Range { first, last });
        assert_eq!(Range::resolve(None, 100, 90), Ok((0, 90)));
        assert_eq!(Range::resolve(range(10, None), 100, 90), Ok((10, 90)));
        assert_eq!(Range::resolve(range(0, Some(89)), 100, 90), Ok((0, 90)));
        let refused = |range| Range::resolve(range, 100, 90).unwrap_err().message;
        assert_eq!(refused(range(0, Some(90))), "Requested more bytes than available: 91 > 90");
        assert_eq!(refused(range(90, None)), "Requested more bytes than available: 91 > 90");
        assert_eq!(refused(range(0, Some(100))), "Requested range out of allowed range");
        assert_eq!(refused(range(100, None)), "Requested range out of allowed range");
        for huge in ["bytes=0-99999999999999999999", "bytes=99999999999999999999-"] {
            let range = Range::parse(huge.as_bytes()).unwrap();
            assert_eq!(refused(Some(range)), "Requested range out of allowed range", "{huge}");
        }
    }

    #[test]
    fn writes_stay_within_ticket_and_image() {
        let refused = |offset, length, ticket, image| {
            let refusal = check_write(offset, length, ticket, image).unwrap_err();
            (refusal.status.as_u16(), refusal.size.unwrap())
        };
        for (offset, length) in [(0, 0), (0, 90), (90, 0), (89, 1)] {
            assert_eq!(check_write(offset, length, 100, 90), Ok(()));
            assert_eq!(check_write(offset, length, 90, 100), Ok(()));
        }
        assert_eq!(refused(90, 1, 100, 90), (416, 90));
        assert_eq!(refused(100, 1, 100, 90), (416, 100));
        assert_eq!(refused(101, 0, 100, 90), (416, 100));
        assert_eq!(refused(u64::MAX, u64::MAX, 100, 90), (416, 100));
    }

    #[test]
    fn content_ranges_that_lie_are_refused() {
        for text in ["bytes */10", "bytes 5-4/*", "bytes 0-9/9", "0-9/*", "bytes 0-9", "bytes a-9/*"] {
            assert_eq!(content_range(text.as_bytes()).unwrap_err().status.as_u16(), 400, "{text}");
        }
        assert_eq!(content_range(b"bytes 5-*/*"), Ok(5));
        assert_eq!(content_range(b"bytes 9-*/9"), Ok(9));
    }

    #[test]
    fn numbers_beyond_any_disk_have_an_order() {
        let (less, more) = (u128::from(u64::MAX), u128::from(u64::MAX) + 1);
        assert!(Range::parse(format!("bytes={less}-{more}").as_bytes()).is_ok());
        assert!(Range::parse(format!("bytes={more}-{less}").as_bytes()).is_err());
        assert!(content_range(format!("bytes {less}-{more}/*").as_bytes()).is_ok());
        assert!(content_range(format!("bytes {more}-{less}/*").as_bytes()).is_err());
    }

    #[test]
    fn patches_are_checked() {
        let zero = |size, offset, flush| Patch::Zero { offset, size, flush };
        for (text, patch) in [
            (r#"{"op":"flush","size":"x"}"#, Patch::Flush),
            (r#"{"op":"zero","size":0}"#, zero(0, 0, false)),
            (r#"{"op":"zero","size":1,"offset":2,"flush":true}"#, zero(1, 2, true)),
        ] {
            assert_eq!(Patch::parse(text.as_bytes()), Ok(patch), "{text}");
        }
        for bad in [
            "",
            "[]",
            "{}",
            "null",
            r#"{"op":"trim"}"#,
            r#"{"op":"zero"}"#,
            r#"{"op":"zero","size":-1}"#,
            r#"{"op":"zero","size":"1"}"#,
            r#"{"op":"zero","size":1,"offset":1.5}"#,
            r#"{"op":"zero","size":1,"flush":1}"#,
        ] {
            assert_eq!(Patch::parse(bad.as_bytes()).unwrap_err().status.as_u16(), 400, "{bad}");
        }
    }

    #[test]
    fn extents_are_the_lists_that_clients_read() {
        let extents = [
            Extent { start: 0, length: 10, flags: Flags::DATA },
            Extent { start: 10, length: 5, flags: Flags::DIRTY },
            Extent { start: 15, length: 5, flags: Flags::ZERO.union(Flags::HOLE) },
        ];
        let list = |context, extents: &[Extent]| {
            let (mut json, mut out) = (ExtentsJson::new(context), BytesMut::new());
            extents.iter().for_each(|extent| json.push(*extent, &mut out));
            json.finish(&mut out);
            String::from_utf8(out.to_vec()).unwrap()
        };
        assert_eq!(
            list(Context::Zero, &extents),
            concat!(
                r#"[{"start": 0, "length": 15, "zero": false, "hole": false}, "#,
                r#"{"start": 15, "length": 5, "zero": true, "hole": true}]"#,
                "\n"
            )
        );
        assert_eq!(
            list(Context::Dirty, &extents),
            concat!(
                r#"[{"start": 0, "length": 10, "dirty": false, "zero": false}, "#,
                r#"{"start": 10, "length": 5, "dirty": true, "zero": false}, "#,
                r#"{"start": 15, "length": 5, "dirty": false, "zero": true}]"#,
                "\n"
            )
        );
        assert_eq!(list(Context::Zero, &[]), "[]\n");
    }
}
