//! Requests made up from a grammar, legal and illegal, compared as the cases are. What fails is shrunk, and printed so
//! that it can be added to the cases.

use std::collections::BTreeSet;
use std::sync::Mutex;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use crate::case::Request;
use crate::suite::Suite;
use crate::world::SIZE;

/// Where the same requests come from in each run.
const SEEDS: [u64; 3] = [1, 2, 3];
/// Requests of each seed.
const REQUESTS: u32 = 100;
/// Another seed, instead of a fresh one.
const SEED: &str = "VIRTMARK_CONFORMANCE_SEED";

/// A made-up request.
#[derive(Clone, Debug)]
struct Made {
    method: String,
    target: String,
    version: &'static str,
    headers: Vec<String>,
    body: Option<String>,
}

impl Made {
    fn head(&self) -> String {
        let mut head = format!("{} {} {}", self.method, self.target, self.version);
        for header in self
            .headers
            .iter()
            .cloned()
            .chain(self.body.as_ref().map(|_| "content-length: {length}".to_owned()))
        {
            head.push('\n');
            head.push_str(&header);
        }
        head
    }

    fn request(&self) -> Request {
        Request::new(self.head(), self.body.clone().unwrap_or_default())
    }

    /// As it stands among the cases.
    fn case(&self) -> String {
        let head = self.head().replace('\n', "\n    ");
        let body = self.body.as_ref().map_or(String::new(), |body| format!("\n  body: {body:?}"));
        format!("- name: TODO\n  head: |\n    {head}{body}\n  status: TODO")
    }
}

#[test]
fn made_up_requests_are_answered_alike() {
    let suite = Suite::start();
    let fresh = std::env::var(SEED).ok().map_or_else(rand::random, |seed| seed.parse().expect("a number"));
    let statuses = Mutex::new(BTreeSet::new());
    let failures: Vec<String> = std::thread::scope(|scope| {
        let runs: Vec<_> = SEEDS
            .into_iter()
            .chain([fresh])
            .map(|seed| {
                let (suite, statuses) = (&suite, &statuses);
                scope.spawn(move || compare_from(seed, suite, statuses))
            })
            .collect();
        runs.into_iter().filter_map(|run| run.join().unwrap().err()).collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // What is made up reaches what the daemon can say.
    let (seen, wanted) =
        (statuses.into_inner().unwrap(), BTreeSet::from([200, 206, 400, 403, 404, 405, 416, 500]));
    assert!(wanted.is_subset(&seen), "only {seen:?}");
}

fn compare_from(seed: u64, suite: &Suite, statuses: &Mutex<BTreeSet<u16>>) -> Result<(), String> {
    let config =
        Config { cases: REQUESTS, failure_persistence: None, max_shrink_iters: 300, ..Config::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed.to_le_bytes().repeat(4));
    let compared = TestRunner::new_with_rng(config, rng).run(&requests(), |made| {
        for transport in suite.transports() {
            let compared = suite.compare(transport, &[made.request()], false, false, None);
            statuses.lock().unwrap().extend(compared.stock.answers.iter().map(|answer| answer.status));
            if let Some(complaint) = compared.complaint(transport) {
                return Err(TestCaseError::fail(complaint));
            }
        }
        Ok(())
    });
    compared.map_err(|error| match error {
        TestError::Fail(reason, made) => {
            format!("with {SEED}={seed}, as a case:\n{}\n{}", made.case(), reason.message())
        }
        TestError::Abort(reason) => format!("with {SEED}={seed}: {}", reason.message()),
    })
}

fn requests() -> impl Strategy<Value = Made> {
    let method = prop_oneof![
        10 => Just("GET".to_owned()),
        3 => Just("OPTIONS".to_owned()),
        3 => Just("PUT".to_owned()),
        3 => Just("PATCH".to_owned()),
        2 => select(vec!["POST", "DELETE", "HEAD"]).prop_map(str::to_owned),
        1 => "[A-Z]{1,8}",
        1 => "[a-z]{3,6}",
    ];
    let version = prop_oneof![12 => Just("HTTP/1.1"), 2 => Just("HTTP/1.0"), 1 => Just("HTTP/1.2")];
    let headers = (range(), content_range(), connection(), others()).prop_map(
        |(range, content_range, connection, others)| {
            range.into_iter().chain(content_range).chain(connection).chain(others).collect()
        },
    );
    let body = prop_oneof![
        6 => Just(None),
        1 => Just(Some(String::new())),
        1 => "[a-z ]{1,20}".prop_map(Some),
        4 => patch().prop_map(Some),
    ];
    (method, target(), version, headers, body).prop_map(|(method, target, version, headers, body)| Made {
        method,
        target,
        version,
        headers,
        body,
    })
}

fn ticket() -> impl Strategy<Value = String> {
    let named = [
        "disk", "disk", "disk", "full", "named", "small", "large", "empty", "raw", "nobitmap", "dead",
        "canceled", "removed", "expired", "unknown", "writable", "writable", "part", "more", "both",
    ];
    prop_oneof![12 => select(named.to_vec()).prop_map(|name| format!("{{{name}}}")), 1 => "[0-9a-f-]{1,36}"]
}

fn target() -> impl Strategy<Value = String> {
    let path = prop_oneof![
        10 => ticket().prop_map(|ticket| format!("/images/{ticket}")),
        5 => ticket().prop_map(|ticket| format!("/images/{ticket}/extents")),
        1 => ticket().prop_map(|ticket| format!("/%69mages%2F{ticket}")),
        1 => (ticket(), "[a-z]{1,8}/?").prop_map(|(ticket, rest)| format!("/images/{ticket}/{rest}")),
        1 => select(vec!["/", "/info/", "/images", "/images/", "/images/*", "/images//extents"]).prop_map(str::to_owned),
        1 => "/[a-zA-Z0-9._~%-]{0,12}",
    ];
    (path, query()).prop_map(|(path, query)| path + &query)
}

fn query() -> impl Strategy<Value = String> {
    let key = select(vec!["close", "flush", "context", "context", "x", "%63lose", "Context"]);
    let value = select(vec![
        "", "=", "=y", "=n", "=zero", "=dirty", "=1", "=%79", "=di%72ty", "=+", "=%FF", "=y=y", "=%",
    ]);
    let pairs = prop::collection::vec((key, value), 0..3);
    pairs.prop_map(|pairs| {
        let pairs: Vec<_> = pairs.iter().map(|(key, value)| format!("{key}{value}")).collect();
        if pairs.is_empty() { String::new() } else { format!("?{}", pairs.join("&")) }
    })
}

/// A number about which something changes, or any.
fn number() -> impl Strategy<Value = String> {
    let names = ["size", "last", "past", "small.size", "small.last", "large.size", "large.last"];
    prop_oneof![
        2 => (0..4u64).prop_map(|n| n.to_string()),
        2 => (0..SIZE + 10_000).prop_map(|n| n.to_string()),
        1 => (1..100u64, 0..3u64).prop_map(|(cluster, by)| (cluster * 65536 + by - 1).to_string()),
        3 => select(names.to_vec()).prop_map(|name| format!("{{{name}}}")),
        1 => select(vec!["00", "18446744073709551615", "18446744073709551616"]).prop_map(str::to_owned),
    ]
}

fn range() -> impl Strategy<Value = Option<String>> {
    let open_or_not = prop_oneof![1 => Just(String::new()), 4 => number()];
    prop_oneof![
        4 => Just(None),
        8 => (number(), open_or_not).prop_map(|(first, last)| Some(format!("range: bytes={first}-{last}"))),
        1 => number().prop_map(|last| Some(format!("range: bytes=-1{last}"))),
        2 => "[bytes=0-9,+ x-]{0,12}".prop_map(|junk| Some(format!("range: {}", junk.trim()))),
    ]
}

fn content_range() -> impl Strategy<Value = Option<String>> {
    let or_star = || prop_oneof![1 => Just("*".to_owned()), 2 => number()];
    prop_oneof![
        8 => Just(None),
        3 => (number(), or_star(), or_star())
            .prop_map(|(first, last, total)| Some(format!("content-range: bytes {first}-{last}/{total}"))),
        1 => "[bytes 0-9*/-]{0,12}".prop_map(|junk| Some(format!("content-range: {}", junk.trim()))),
    ]
}

fn connection() -> impl Strategy<Value = Option<String>> {
    let wish = select(vec!["close", "Close", "keep-alive", "Keep-Alive", "foo", "close, foo"]);
    prop_oneof![6 => Just(None), 2 => wish.prop_map(|wish| Some(format!("connection: {wish}")))]
}

fn others() -> impl Strategy<Value = Vec<String>> {
    let header = prop_oneof![
        4 => ("x-[a-z]{1,5}", "[ -~]{0,20}").prop_map(|(name, value)| format!("{name}: {}", value.trim())),
        2 => select(vec!["host: test", "accept-encoding: gzip", "if-range: \"x\"", "content-type: application/json"])
            .prop_map(str::to_owned),
        1 => Just("expect: 100-continue".to_owned()),
    ];
    prop::collection::vec(header, 0..3)
}

/// A body for PATCH, more or less.
fn patch() -> impl Strategy<Value = String> {
    let op = select(vec!["\"zero\"", "\"zero\"", "\"flush\"", "\"trim\"", "1", "null"]);
    let value = prop_oneof![
        4 => (0..SIZE).prop_map(|n| n.to_string()),
        2 => select(vec!["-1", "1.5", "\"1\"", "null", "[]", "false0", "{}"]).prop_map(str::to_owned),
    ];
    let flag = select(vec!["true", "false", "false", "0", "null"]);
    let pair = prop_oneof![
        3 => value.clone().prop_map(|value| format!("\"size\": {value}")),
        2 => value.prop_map(|value| format!("\"offset\": {value}")),
        1 => flag.prop_map(|flag| format!("\"flush\": {flag}")),
    ];
    let object = (op, prop::collection::vec(pair, 0..4)).prop_map(|(op, pairs)| {
        let pairs: Vec<_> = std::iter::once(format!("\"op\": {op}")).chain(pairs).collect();
        format!("{{{}}}", pairs.join(", "))
    });
    prop_oneof![8 => object, 1 => "[\\[\\]{}\":,a-z0-9 ]{1,16}", 1 => select(vec!["[]", "null", "{}", "1"]).prop_map(str::to_owned)]
}
