//! Processes die, daemons restart, the API server goes away: nothing is lost, and nothing leaks.
//!
//! These tests kill what all others share, so each has the bed to itself. They need the processes built with the
//! feature `killpoints`, as `make test` does.
#![allow(clippy::unwrap_used, reason = "tests")]

mod at_once;
mod certificates;
#[path = "../cluster/chain.rs"]
#[allow(dead_code, reason = "the cluster tests use the rest")]
mod chain;
mod chain_kills;
mod deletes;
mod doubles;
mod health;
mod history;
mod incremental;
mod kills;
mod namespace;
mod nodes;
mod outages;
#[path = "../cluster/pool.rs"]
mod pool;
#[path = "../metrics/prometheus.rs"]
#[allow(dead_code, reason = "the metrics tests use the rest")]
mod prometheus;
mod readers;
mod restored;
#[path = "../cluster/rig.rs"]
#[allow(dead_code, reason = "the cluster tests use the rest")]
mod rig;
mod two_operators;
mod uploads;
mod wishes;

use std::sync::{Mutex, MutexGuard, PoisonError};

use virtmark_bed::Bed;

/// The bed, for one test alone. Daemons that an earlier test failed to put right are put right: it fails alone.
fn alone() -> MutexGuard<'static, ()> {
    static BED: Mutex<()> = Mutex::new(());
    let alone = BED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut bed = Bed::from_env().expect("a bed");
    let plane = &mut bed.plane;
    let daemons =
        [&mut plane.etcd, &mut plane.apiserver, &mut bed.operator].into_iter().chain(&mut bed.agents);
    let wrong =
        daemons.filter_map(|daemon| daemon.put_right().expect("it starts again").then_some(&daemon.name));
    let wrong: Vec<_> = wrong.cloned().collect();
    if !wrong.is_empty() {
        println!("put right after an earlier test: {}", wrong.join(", "));
        bed.plane.ready().expect("the API server answers");
        bed.store().expect("the bed is kept");
    }
    alone
}
