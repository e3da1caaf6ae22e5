//! Differential conformance: every request goes to the stock ovirt-imageio daemon and to our image
//! server, before the same disks and with the same tickets, over TLS and over the unix socket. What they answer has to
//! be equal, save the differences listed in `differences.yaml` and docs/conformance.md. See README.md beside this.
#![allow(clippy::unwrap_used, reason = "tests")]

mod case;
mod compare;
mod exchange;
mod generated;
#[path = "../image_server_rig/mod.rs"]
mod image_server_rig;
#[path = "../nbd_qemu_rig/mod.rs"]
mod nbd_qemu_rig;
mod servers;
mod suite;
mod twins;
mod world;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use case::Case;
use suite::Suite;

/// Cases that are played at a time.
const WORKERS: usize = 4;

#[test]
fn every_case_is_answered_alike() {
    let suite = Suite::start();
    let used = play_all(&suite);
    if suite.is_ours() {
        let unused: Vec<_> =
            suite.rules.0.iter().map(|rule| &rule.id).filter(|id| !used.contains(*id)).collect();
        assert!(unused.is_empty(), "no case shows these differences: {unused:?}");
    }
}

/// What is found to differ differs: the comparison itself finds nothing, and a vendor's server can be compared.
#[test]
fn the_stock_daemon_differs_from_itself_in_nothing() {
    play_all(&Suite::of_stock_alone());
}

/// Plays every case, each of which must pass; the differences that they show.
fn play_all(suite: &Suite) -> BTreeSet<String> {
    let cases = case::all();
    let names: BTreeSet<_> = cases.iter().map(|(_, case)| &case.name).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    assert!(cases.len() >= 150, "{} cases", cases.len());
    let (next, failures, used) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Mutex::new(BTreeSet::new()));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some((file, case)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (failed, shown) = check(suite, case);
                    failures.lock().unwrap().extend(failed.map(|failed| format!("{file}: {failed}")));
                    used.lock().unwrap().extend(shown);
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(
        failures.is_empty(),
        "{} of {} cases fail:\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
    used.into_inner().unwrap()
}

/// Why a case fails, and the differences that it shows.
fn check(suite: &Suite, case: &Case) -> (Option<String>, BTreeSet<String>) {
    let (mut complaints, mut used) = (Vec::new(), BTreeSet::new());
    let named = suite.is_ours().then_some(&case.differs);
    for transport in suite.transports() {
        let compared = suite.compare(transport, &case.requests(), case.pipelined, case.end, named);
        let said: Vec<_> = compared.stock.answers.iter().map(|answer| answer.status).collect();
        let expected = case.status(transport);
        if said != expected {
            complaints.push(format!("{transport:?}: the stock daemon answers {said:?}, not {expected:?}"));
        }
        complaints.extend(compared.complaint(transport));
        used.extend(compared.used);
    }
    if suite.is_ours() && complaints.is_empty() {
        complaints.extend(case.differs.difference(&used).map(|id| format!("does not show {id}")));
    }
    let failed = (!complaints.is_empty()).then(|| format!("{:?}\n  {}", case.name, complaints.join("\n  ")));
    (failed, used)
}
