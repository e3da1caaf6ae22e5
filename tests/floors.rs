//! The floors of ARCHITECTURE.md: who must never import whom.

use std::fs;
use std::path::{Path, PathBuf};

/// For each part of `src`, what its code must not name. The longest prefix that fits a file counts.
const NEVER: &[(&str, &[&str])] = &[
    ("extent.rs", &["crate::", "tokio", "kube", "serde_json", "std::fs", "std::net"]),
    ("reason.rs", &["crate::", "tokio", "kube", "std::fs", "std::net"]),
    ("step.rs", &["crate::", "tokio", "kube", "std::fs", "std::net"]),
    (
        "outage.rs",
        &["crate::agent", "crate::controller", "crate::api", "tokio", "kube", "std::fs", "std::net"],
    ),
    ("metrics/metric.rs", &["crate::", "tokio", "kube", "prometheus_client", "std::fs", "std::net"]),
    ("metrics", &["crate::", "tokio", "kube::", "k8s_openapi", "std::fs", "std::net"]),
    (
        "probe.rs",
        &[
            "crate::agent",
            "crate::controller",
            "crate::api",
            "crate::imageio",
            "crate::libvirt",
            "kube::",
            "std::fs",
        ],
    ),
    ("x509", X509),
    ("killpoint.rs", &["crate::agent", "crate::controller", "tokio", "kube"]),
    (
        "api",
        &[
            "crate::agent",
            "crate::controller",
            "crate::cluster",
            "crate::clock",
            "tokio",
            "kube::Client",
            "std::fs",
        ],
    ),
    ("nbd/proto.rs", PURE),
    ("nbd/handshake", PURE),
    ("nbd/transmission", PURE),
    ("nbd/outbox.rs", PURE),
    ("nbd/client.rs", &["hyper", "kube", "crate::libvirt", "crate::imageio", "crate::api"]),
    ("nbd/writer.rs", &["hyper", "kube", "crate::libvirt", "crate::imageio", "crate::api"]),
    ("imageio/wire.rs", PURE),
    ("imageio/route.rs", PURE),
    ("imageio/coverage", PURE),
    ("imageio/ticket.rs", PURE),
    (
        "imageio",
        &["kube::", "k8s_openapi", "crate::api", "crate::libvirt", "crate::agent", "crate::controller"],
    ),
    ("libvirt/xml", &["virt::", "tokio", "hyper", "kube::", "std::fs"]),
    ("libvirt", &["kube::", "hyper", "crate::nbd", "crate::imageio", "crate::agent", "crate::controller"]),
    ("agent/backup/life", DECISION),
    ("agent/backup/decide.rs", DECISION),
    ("agent/backup/scratch.rs", DECISION),
    ("agent/backup/status.rs", DECISION),
    ("agent/transfer/status.rs", DECISION),
    ("agent/transfer/wish.rs", DECISION),
    ("agent/certificate/renewal.rs", ADDRESSES),
    ("agent/metrics.rs", DECISION),
    ("agent/survey/report.rs", DECISION),
    ("agent", &["crate::controller", "crate::client"]),
    ("controller/chain.rs", DECISION),
    ("controller/health.rs", DECISION),
    ("controller/metrics.rs", DECISION),
    ("controller/import.rs", DECISION),
    ("controller/tenancy.rs", DECISION),
    ("controller/upload.rs", DECISION),
    ("agent/upload/record.rs", DECISION),
    ("controller/certificates/decide", ADDRESSES),
    ("controller/certificates/authorities.rs", ADDRESSES),
    ("controller/backup/base.rs", DECISION),
    ("controller/backup/resolve", DECISION),
    ("controller/backup/desired.rs", DECISION),
    ("controller/backup/status.rs", DECISION),
    ("controller/domain/publish.rs", DECISION),
    (
        "controller",
        &["crate::libvirt", "crate::nbd", "crate::imageio", "crate::agent", "crate::client", "std::fs"],
    ),
    ("client/chain.rs", VALUES),
    ("client/chain_line.rs", VALUES),
    ("client/extents.rs", VALUES),
    ("client/manifest.rs", VALUES),
    ("client/moves.rs", VALUES),
    ("client/names.rs", VALUES),
    ("client/output.rs", VALUES),
    ("client/plan.rs", VALUES),
    ("client/progress.rs", VALUES),
    ("client/reshape.rs", VALUES),
    ("client/transfer_line.rs", VALUES),
    ("client/words.rs", VALUES),
    ("client/explain.rs", DECISION),
    ("client/inventory.rs", DECISION),
    ("client/record.rs", DECISION),
    ("client/resume.rs", DECISION),
    ("client/state.rs", DECISION),
    ("client/transfer_state.rs", DECISION),
    ("client/exit.rs", &["tokio", "hyper", "std::fs", "std::net", "std::process", "crate::cluster"]),
    ("client/args.rs", &["tokio", "hyper", "kube", "std::fs", "std::net", "std::process", "crate::cluster"]),
    ("client", CLIENT),
    (
        "cluster.rs",
        &["crate::agent", "crate::controller", "crate::client", "crate::libvirt", "crate::imageio"],
    ),
];

/// The client's own decisions and formats: values in, values out.
const VALUES: &[&str] = &[
    "crate::agent",
    "crate::controller",
    "crate::cluster",
    "crate::clock",
    "crate::imageio",
    "crate::libvirt",
    "crate::api",
    "tokio",
    "hyper",
    "kube",
    "std::fs",
    "std::net",
    "std::process",
    "SystemTime",
    "rand::",
];

/// The client is one of many: it knows the kinds and the wire, and nothing of who answers.
const CLIENT: &[&str] = &[
    "crate::agent",
    "crate::controller",
    "crate::imageio",
    "crate::libvirt",
    "crate::access",
    "crate::metrics",
];

/// Formats: bytes in, bytes out.
const PURE: &[&str] = &[
    "tokio",
    "hyper::server",
    "hyper_util",
    "kube",
    "crate::api",
    "std::fs",
    "std::net",
    "std::time::SystemTime",
];

/// Decisions: values in, values out.
const DECISION: &[&str] = &[
    "tokio",
    "hyper",
    "kube::Client",
    "kube::Api",
    "crate::cluster",
    "crate::clock",
    "std::fs",
    "std::net",
    "std::process",
    "SystemTime",
    "rand::",
];

/// Certificates: text in, text out. An address is a value in them.
const X509: &[&str] = &[
    "crate::agent",
    "crate::controller",
    "crate::api",
    "crate::cluster",
    "crate::clock",
    "crate::imageio",
    "tokio",
    "kube",
    "std::fs",
    "std::process",
    "SystemTime",
];

/// Decisions about addresses.
const ADDRESSES: &[&str] = &[
    "tokio",
    "hyper",
    "kube::Client",
    "kube::Api",
    "crate::cluster",
    "crate::clock",
    "std::fs",
    "TcpStream",
    "std::process",
    "SystemTime",
    "rand::",
];

fn rule(file: &str) -> Option<&'static (&'static str, &'static [&'static str])> {
    let fits = NEVER
        .iter()
        .filter(|(part, _)| file == *part || file.starts_with(&format!("{}/", part.trim_end_matches(".rs"))));
    fits.max_by_key(|(part, _)| part.len())
}

/// What `text` names although it must not. Comments and tests may say what they like.
fn breaches(file: &str, text: &str) -> Vec<String> {
    let Some((part, never)) = rule(file) else { return Vec::new() };
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = code.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    let named = lines
        .flat_map(|line| never.iter().filter(move |name| names(line, name)).map(move |name| (line, name)));
    named.map(|(line, name)| format!("{file}: {part} must not name {name}: {line}")).collect()
}

/// Whether `line` names `name` as a path, not as the end of a longer word.
fn names(line: &str, name: &str) -> bool {
    line.match_indices(name).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + name.len()..].chars().next();
        let ends = name.ends_with(':') || after.is_none_or(|c| !c.is_alphanumeric() && c != '_');
        ends && before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':')
    })
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a folder of src") {
        let path = entry.expect("an entry of src").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn nobody_looks_up() {
    let src = Path::new("src").to_owned();
    let mut files = Vec::new();
    sources(&src, &mut files);
    let found: Vec<String> = files
        .iter()
        .filter(|path| path.file_name().is_none_or(|name| name != "tests.rs"))
        .flat_map(|path| {
            let file = path.strip_prefix(&src).unwrap().to_string_lossy().into_owned();
            breaches(&file, &fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
    for (part, _) in NEVER {
        assert!(src.join(part).exists(), "the table names {part}, which is not there");
    }
}

#[test]
fn the_test_can_fail() {
    let bad = [
        ("extent.rs", "use tokio::io;"),
        ("agent/backup/life", "let now = crate::clock::now();"),
        ("controller/backup/mod.rs", "use crate::agent::state;"),
        ("imageio/serve.rs", "use kube::Api;"),
        ("client/backup.rs", "use crate::controller::chain;"),
        ("client/plan.rs", "let now = crate::clock::now();"),
        ("agent/run.rs", "use crate::client::names;"),
    ];
    for (file, line) in bad {
        assert_eq!(breaches(file, line).len(), 1, "{file}: {line}");
    }
    assert!(breaches("extent.rs", "// tokio is not used here").is_empty());
    assert!(breaches("agent/run.rs", "use tokio::io;").is_empty());
}
