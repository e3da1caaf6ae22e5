//! What differs between two exchanges, and which of it is meant. Pure.
//!
//! An exchange is taken apart into aspects: the status, each header, the body, what became of the connection. A
//! deliberate difference says, for each aspect in which it shows, what the stock daemon has there and what the other
//! server has; everything else has to be equal.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::Path;

use regex::Regex;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::case::{self, Names};
use crate::exchange::{Answer, Exchange, Transport};

/// Headers that tell of the server and the hour, not of the answer.
const OF_THE_SERVER: [&str; 2] = ["date", "server"];
/// What an aspect has that is not there.
const ABSENT: &str = "absent";

/// One aspect in which two exchanges differ.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Difference {
    /// Of which answer.
    pub(crate) answer: usize,
    pub(crate) aspect: String,
    pub(crate) stock: String,
    pub(crate) other: String,
}

/// The aspects in which the exchanges differ; `names` of each side are shown instead of what they stand for.
pub(crate) fn differences(stock: (&Exchange, &Names), other: (&Exchange, &Names)) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut compare = |answer: usize, left: BTreeMap<String, String>, right: BTreeMap<String, String>| {
        let aspects: BTreeSet<_> = left.keys().chain(right.keys()).cloned().collect();
        for aspect in aspects {
            let value =
                |side: &BTreeMap<String, String>| side.get(&aspect).map_or(ABSENT, String::as_str).to_owned();
            let (stock, other) = (value(&left), value(&right));
            if stock != other {
                found.push(Difference { answer, aspect, stock, other });
            }
        }
    };
    for (at, (left, right)) in stock.0.answers.iter().zip(&other.0.answers).enumerate() {
        let (mut left, mut right) = (aspects(left, stock.1), aspects(right, other.1));
        join_extents(&mut left, &mut right);
        compare(at, left, right);
    }
    let whole = |exchange: &Exchange| -> BTreeMap<String, String> {
        [("answers", exchange.answers.len().to_string()), ("after", format!("{:?}", exchange.after))]
            .map(|(aspect, value)| (aspect.to_owned(), value))
            .into()
    };
    compare(stock.0.answers.len().min(other.0.answers.len()), whole(stock.0), whole(other.0));
    found
}

fn aspects(answer: &Answer, names: &Names) -> BTreeMap<String, String> {
    let mut aspects = BTreeMap::from([
        ("version".to_owned(), answer.version.clone()),
        ("status".to_owned(), answer.status.to_string()),
        ("interim".to_owned(), format!("{:?}", answer.interim)),
        ("whole".to_owned(), answer.whole.to_string()),
    ]);
    for (name, value) in &answer.headers {
        if OF_THE_SERVER.contains(&name.as_str()) {
            continue;
        }
        // What is compared of a true length is the body.
        let exact = name == "content-length" && *value == answer.body.len().to_string();
        let value = if exact { "exact" } else { value.as_str() };
        let entry = aspects.entry(format!("header {name}")).or_default();
        if !entry.is_empty() {
            entry.push_str(", ");
        }
        entry.push_str(&names.hide(value));
    }
    let kind = answer.header("content-type").unwrap_or_default();
    let document = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&answer.body);
    match document {
        Ok(document) if kind == "application/json" => {
            for (key, value) in document {
                aspects.insert(format!("json {key}"), names.hide(&value.to_string()));
            }
            aspects.insert("json end".to_owned(), answer.body.ends_with(b"}\n").to_string());
        }
        _ if kind == "application/octet-stream" => {
            aspects.insert("body".to_owned(), summary(&answer.body));
        }
        _ => {
            aspects.insert("body".to_owned(), names.hide(&String::from_utf8_lossy(&answer.body)));
        }
    }
    aspects
}

/// Bytes in a line that is the same only for the same bytes.
fn summary(bytes: &[u8]) -> String {
    let mut sum = DefaultHasher::new();
    bytes.hash(&mut sum);
    format!("{} bytes {:016x}, the first {:02x?}", bytes.len(), sum.finish(), &bytes[..bytes.len().min(16)])
}

/// Two lists of extents that tell the same are the same: neighbours that look equal are apart in the stock daemon's when
/// the storage told them apart, and that changes from one moment to the next (what a file system says of holes).
fn join_extents(left: &mut BTreeMap<String, String>, right: &mut BTreeMap<String, String>) {
    let Some(left_list) = left.get("body").and_then(|text| Extents::parse(text)) else { return };
    let Some(right_list) = right.get("body").and_then(|text| Extents::parse(text)) else { return };
    let written = left["body"] == left_list.text() && right["body"] == right_list.text();
    if written && left_list.joined() == right_list.joined() {
        left.remove("body");
        right.remove("body");
    }
}

/// A list of extents: start, length and flags, as text.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Extents(Vec<(u64, u64, String)>);

impl Extents {
    fn parse(text: &str) -> Option<Extents> {
        let list: Vec<serde_json::Map<String, serde_json::Value>> = serde_json::from_str(text).ok()?;
        let extents = list.iter().map(|extent| {
            let flags = ["dirty", "zero", "hole"].iter().filter_map(|key| Some((key, extent.get(*key)?)));
            let flags = flags.map(|(key, value)| format!(", \"{key}\": {value}")).collect();
            Some((extent.get("start")?.as_u64()?, extent.get("length")?.as_u64()?, flags))
        });
        extents.collect::<Option<_>>().map(Extents)
    }

    fn joined(&self) -> Extents {
        let mut joined: Vec<(u64, u64, String)> = Vec::new();
        for (start, length, flags) in &self.0 {
            match joined.last_mut() {
                Some((first, run, same)) if same == flags && *first + *run == *start => *run += length,
                _ => joined.push((*start, *length, flags.clone())),
            }
        }
        Extents(joined)
    }

    /// As the API writes it.
    fn text(&self) -> String {
        let extents = self
            .0
            .iter()
            .map(|(start, length, flags)| format!("{{\"start\": {start}, \"length\": {length}{flags}}}"));
        format!("[{}]\n", extents.collect::<Vec<_>>().join(", "))
    }
}

/// A difference that is meant.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rule {
    pub(crate) id: String,
    /// What a request must have for it, as a pattern over its text.
    #[serde(default)]
    request: Option<Pattern>,
    /// What a request must not have.
    #[serde(default)]
    unless: Option<Pattern>,
    /// Over which transport it shows, when over one only.
    #[serde(default)]
    transport: Option<Transport>,
    /// By aspect, a pattern too: what the stock daemon has, and what the other server has instead.
    #[serde(deserialize_with = "by_aspect")]
    shows: Vec<Shown>,
    /// For readers of docs/conformance.md.
    #[allow(dead_code, reason = "`generate` reads it")]
    stock: String,
    #[allow(dead_code, reason = "`generate` reads it")]
    ours: String,
    #[allow(dead_code, reason = "`generate` reads it")]
    what: String,
    #[allow(dead_code, reason = "`generate` reads it")]
    why: String,
}

/// A pattern that fits a text from its begin to its end.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Pattern(Regex);

impl TryFrom<String> for Pattern {
    type Error = regex::Error;

    fn try_from(text: String) -> Result<Pattern, regex::Error> {
        Regex::new(&format!("^(?s:{text})$")).map(Pattern)
    }
}

/// An aspect of an answer, and the pairs of what stock and ours may say of it.
type Shown = (Pattern, Vec<(Pattern, Pattern)>);

fn by_aspect<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<Shown>, D::Error> {
    let shown = BTreeMap::<String, Vec<(Pattern, Pattern)>>::deserialize(source)?;
    let shown = shown.into_iter().map(|(aspect, pairs)| Ok((Pattern::try_from(aspect)?, pairs)));
    shown.collect::<Result<_, regex::Error>>().map_err(D::Error::custom)
}

impl Rule {
    fn applies(&self, request: &str, transport: Transport) -> bool {
        self.transport.is_none_or(|only| only == transport)
            && self.request.as_ref().is_none_or(|pattern| pattern.0.is_match(request))
            && !self.unless.as_ref().is_some_and(|pattern| pattern.0.is_match(request))
    }

    fn explains(&self, difference: &Difference) -> bool {
        let shown = self.shows.iter().filter(|(aspect, _)| aspect.0.is_match(&difference.aspect));
        shown
            .flat_map(|(_, pairs)| pairs)
            .any(|(stock, other)| stock.0.is_match(&difference.stock) && other.0.is_match(&difference.other))
    }
}

/// The deliberate differences.
pub(crate) struct Rules(pub(crate) Vec<Rule>);

impl Rules {
    pub(crate) fn read(file: &Path) -> Rules {
        let rules: Vec<Rule> = case::read(file);
        let ids: BTreeSet<_> = rules.iter().map(|rule| &rule.id).collect();
        assert_eq!(ids.len(), rules.len(), "an id is given twice in {}", file.display());
        Rules(rules)
    }

    /// What no rule explains, and the ids of the rules that explain something. Of the rules, only those that
    /// `named` holds count, when it is given.
    pub(crate) fn explain(
        &self,
        request: &str,
        transport: Transport,
        named: Option<&BTreeSet<String>>,
        differences: &[Difference],
    ) -> (Vec<Difference>, BTreeSet<String>) {
        let rules: Vec<_> = self
            .0
            .iter()
            .filter(|rule| named.is_none_or(|named| named.contains(&rule.id)))
            .filter(|rule| rule.applies(request, transport))
            .collect();
        let (mut unexplained, mut used) = (Vec::new(), BTreeSet::new());
        for difference in differences {
            let explaining: Vec<_> = rules.iter().filter(|rule| rule.explains(difference)).collect();
            if explaining.is_empty() {
                unexplained.push(difference.clone());
            }
            used.extend(explaining.into_iter().map(|rule| rule.id.clone()));
        }
        (unexplained, used)
    }
}
