//! The cases: requests as data, and the bytes that they become. Knows no server.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::exchange::Transport;

/// Requests on one connection, and what the stock daemon answers.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    /// What is asked, in words; unique.
    pub(crate) name: String,
    #[serde(default)]
    head: Option<String>,
    #[serde(default)]
    body: String,
    #[serde(default)]
    raw: Option<String>,
    #[serde(default)]
    requests: Vec<Request>,
    /// All requests are sent before an answer is read.
    #[serde(default)]
    pub(crate) pipelined: bool,
    /// The client closes its half of the connection after them.
    #[serde(default)]
    pub(crate) end: bool,
    status: Statuses,
    /// The same over the unix socket, where it is another.
    #[serde(default)]
    unix: Option<u16>,
    /// Ids of the differences that are shown on purpose, each over one transport at least.
    #[serde(default)]
    pub(crate) differs: BTreeSet<String>,
}

/// One request: a head of lines and a body, or just bytes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    #[serde(default)]
    head: Option<String>,
    #[serde(default)]
    body: String,
    #[serde(default)]
    raw: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Statuses {
    One(u16),
    Each(Vec<u16>),
}

impl Case {
    /// Its requests.
    pub(crate) fn requests(&self) -> Vec<Request> {
        if self.requests.is_empty() {
            vec![Request { head: self.head.clone(), body: self.body.clone(), raw: self.raw.clone() }]
        } else {
            self.requests.clone()
        }
    }

    /// Status of each answer of the stock daemon.
    pub(crate) fn status(&self, transport: Transport) -> Vec<u16> {
        if let (Transport::Unix, Some(status)) = (transport, self.unix) {
            return vec![status];
        }
        match &self.status {
            Statuses::One(status) => vec![*status],
            Statuses::Each(each) => each.clone(),
        }
    }
}

impl Request {
    /// A request of head lines and a body.
    pub(crate) fn new(head: String, body: String) -> Request {
        Request { head: Some(head), body, raw: None }
    }

    /// The bytes to send: a head's lines end in CRLF; `raw` is sent as it is, a character a byte.
    pub(crate) fn bytes(&self, names: &Names) -> Vec<u8> {
        if let Some(raw) = &self.raw {
            let filled = names.fill(raw);
            return filled
                .chars()
                .map(|c| u8::try_from(c).expect("raw holds characters of one byte"))
                .collect();
        }
        let body = names.fill(&self.body);
        let head = self.head.as_ref().expect("a request has `head` or `raw`");
        let head = names.fill(head).replace("{length}", &body.len().to_string());
        format!("{}\r\n\r\n{body}", head.trim_end_matches('\n').replace('\n', "\r\n")).into_bytes()
    }
}

/// Shorter values, as numbers, are shown.
const HIDDEN: usize = 16;

/// What stands for what in requests, as `{name}`, and is shown instead of it in answers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names(pub(crate) BTreeMap<String, String>);

impl Names {
    /// The text with every value that has a name shown as `{name}`; the longest first.
    pub(crate) fn hide(&self, text: &str) -> String {
        let mut text = text.to_owned();
        let mut shown: Vec<_> = self.0.iter().filter(|(_, value)| value.len() >= HIDDEN).collect();
        shown.sort_by_key(|(_, value)| std::cmp::Reverse(value.len()));
        for (name, value) in shown {
            text = text.replace(value, &format!("{{{name}}}"));
        }
        text
    }

    /// The text with every name replaced, and `{x*N}` by N times `x`, `{lines*N}` by N header lines.
    fn fill(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (name, value) in &self.0 {
            text = text.replace(&format!("{{{name}}}"), value);
        }
        text = repeat(text, "{x*", |count| "x".repeat(count));
        repeat(text, "{lines*", |count| (0..count).map(|n| format!("h{n}: v")).collect::<Vec<_>>().join("\n"))
    }
}

fn repeat(mut text: String, mark: &str, made: impl Fn(usize) -> String) -> String {
    while let Some(start) = text.find(mark) {
        let end = start + text[start..].find('}').expect("a repetition ends in }");
        let count = text[start + mark.len()..end].parse().expect("a repetition has a count");
        text.replace_range(start..=end, &made(count));
    }
    text
}

/// The folder of the suite.
pub(crate) fn folder() -> &'static Path {
    Path::new("tests/conformance")
}

/// Every case, by its file.
pub(crate) fn all() -> Vec<(String, Case)> {
    let mut files: Vec<_> =
        folder().join("cases").read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut cases = Vec::new();
    for file in files {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        cases.extend(read::<Vec<Case>>(&file).into_iter().map(|case| (name.clone(), case)));
    }
    cases
}

/// What a YAML file holds.
pub(crate) fn read<T: DeserializeOwned>(file: &Path) -> T {
    let text = std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}
