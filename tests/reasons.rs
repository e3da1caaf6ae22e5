#![allow(clippy::unwrap_used, reason = "tests")]
//! Every reason is met for real: a test against a cluster and a hypervisor waits for it by its name.

use std::fs;
use std::path::Path;

use virtmark::reason::Reason;

fn sources(dir: &Path, into: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else {
            into.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_reason_is_produced_on_a_real_cluster() {
    let mut tests = String::new();
    for dir in ["tests/cluster", "tests/survival"] {
        sources(Path::new(dir), &mut tests);
    }
    let named = |reason: &&Reason| tests.contains(&format!("\"{reason}\""));
    let unproved: Vec<_> = Reason::ALL.iter().filter(|reason| !named(reason)).collect();
    assert!(unproved.is_empty(), "no test produces {unproved:?}");
}
