//! The truth of the chain: random histories on real QEMU, and every restore point of them rebuilt from the downloaded
//! extents alone, compared byte for byte with what the guest's disk held when the backup began.
//!
//! ```text
//!   seed -> history.rs (what happens, a value) -> run.rs, backup.rs (on a bed) -> restore points, compared -> tally.rs
//!                                      ^                                  | fails
//!                                      +------- shrink.rs <---------------+
//! ```
//!
//! `make soak N=1000` runs many. `SEED=7` runs one seed, `HISTORY='{...}'` or `HISTORY=@file` one history as it was printed.
#![allow(clippy::unwrap_used, reason = "tests")]

mod backup;
#[path = "../cluster/chain.rs"]
#[allow(dead_code, reason = "the cluster tests use the rest")]
mod chain;
mod history;
#[path = "../cluster/rig.rs"]
#[allow(dead_code, reason = "the cluster tests use the rest")]
mod rig;
mod run;
mod shrink;
mod tally;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use rand::Rng as _;

use chain::Zeroes;
use history::{Base, DiskPlan, End, History, Step};
use run::World;
use tally::Tally;

/// Seeds that are run each time.
const FIXED: std::ops::Range<u64> = 0..4;

/// How many fresh ones are run beside them.
const FRESH: usize = 1;

/// How many histories go on at once.
const AT_ONCE: usize = 4;

/// For how long a history that fails is made smaller.
const SHRINKING: Duration = Duration::from_secs(60);

/// What the environment says, or nothing.
fn said(variable: &str) -> Option<String> {
    std::env::var(variable).ok().filter(|value| !value.is_empty())
}

fn histories() -> Result<Vec<History>> {
    if let Some(history) = said("HISTORY") {
        let text = match history.strip_prefix('@') {
            Some(file) => std::fs::read_to_string(file)?,
            None => history,
        };
        return Ok(vec![serde_json::from_str(&text).context("HISTORY is none")?]);
    }
    if let Some(seed) = said("SEED") {
        return Ok(vec![History::of(seed.parse().context("SEED is no number")?)]);
    }
    let mut random = rand::rng();
    // a short seed is a seed that can be typed
    let mut fresh =
        |count: usize| -> Vec<u64> { (0..count).map(|_| random.random_range(1000..1 << 32)).collect() };
    let seeds = match said("N") {
        Some(count) => fresh(count.parse().context("N is no number")?),
        None => FIXED.chain(fresh(FRESH)).collect(),
    };
    Ok(seeds.into_iter().map(History::of).collect())
}

/// Runs one, and takes a panic for the failure that it is.
fn run(world: &World, history: &History, zeroes: Zeroes) -> Result<Tally> {
    catch_unwind(AssertUnwindSafe(|| world.run(history, zeroes)))
        .unwrap_or_else(|panic| Err(anyhow!("panicked: {:?}", panic.downcast_ref::<String>())))
}

#[test]
fn every_restore_point_of_every_history_is_what_the_guest_had() -> Result<()> {
    let world = World::of_env()?;
    let histories = histories()?;
    let (next, sum, failed) = (AtomicUsize::new(0), Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(histories.len()) {
            scope.spawn(|| {
                while let Some(history) = histories.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let came_to = run(&world, history, Zeroes::Write);
                    let mut sum = sum.lock().unwrap();
                    match came_to {
                        Ok(tally) => sum.add(&tally),
                        Err(error) => {
                            sum.add(&Tally { histories: 1, differences: 1, ..Tally::default() });
                            println!("SEED={} failed: {error:#}\nHISTORY='{history}'", history.seed);
                            failed.lock().unwrap().push((history, error));
                        }
                    }
                    if sum.histories.is_multiple_of(10) {
                        println!("{} s: {sum}", began.elapsed().as_secs());
                    }
                }
            });
        }
    });
    println!("{} s: {}", began.elapsed().as_secs(), sum.lock().unwrap());
    let failed = failed.into_inner().unwrap();
    let Some((history, error)) = failed.first() else { return Ok(()) };
    let small = shrunk(&world, history);
    Err(anyhow!(
        "{} of {} histories failed. The first, SEED={}: {error:#}\nIt still fails as HISTORY='{small}'",
        failed.len(),
        histories.len(),
        history.seed
    ))
}

/// A history that fails, made smaller for as long as there is time.
fn shrunk(world: &World, history: &History) -> History {
    let until = Instant::now() + SHRINKING;
    let fails = |history: &History| run(world, history, Zeroes::Write).is_err();
    shrink::shrink(history, &fails, &|| said("SHRINK").as_deref() != Some("no") && Instant::now() < until)
}

/// A backup of all disks that nothing happens to.
fn backup(base: Base) -> Step {
    let (kill, meanwhile) = (None, Vec::new());
    Step::Backup(history::Backup { owner: 0, base, disks: 0, kill, meanwhile, end: End::Finalize })
}

#[test]
fn a_checkpoint_deleted_while_the_vm_is_off_is_gone_from_the_layers_below_too() -> Result<()> {
    let steps = vec![
        Step::Write { disk: 0, at: 0, length: 1 << 20, pattern: 0xab },
        backup(Base::None),
        Step::Snapshot,
        Step::Write { disk: 0, at: 65536, length: 65536, pattern: 0xcd },
        backup(Base::Newest),
        Step::Restart { off: vec![Step::DeleteCheckpoint { which: 0 }] },
        Step::Commit,
        Step::Write { disk: 0, at: 0, length: 65536, pattern: 0xef },
        backup(Base::Newest),
    ];
    let history = History { seed: 0, disks: vec![DiskPlan { size: 2 << 20, cluster: Some(65536) }], steps };
    let tally = run(&World::of_env()?, &history, Zeroes::Write)?;
    ensure!((tally.points, tally.modes["Incremental"]) == (3, 2), "{tally}");
    Ok(())
}

#[test]
fn a_rebuilder_that_leaves_what_is_dirty_and_zero_is_found_out() -> Result<()> {
    let world = World::of_env()?;
    let steps = vec![
        Step::Write { disk: 0, at: 0, length: 1 << 20, pattern: 0xab },
        backup(Base::None),
        Step::Zero { disk: 0, at: 65536, length: 65536 },
        backup(Base::Newest),
    ];
    let history = History { seed: 0, disks: vec![DiskPlan { size: 2 << 20, cluster: Some(65536) }], steps };
    let tally = run(&world, &history, Zeroes::Write)?;
    ensure!((tally.points, tally.modes["Incremental"]) == (2, 1), "{tally}");
    let Err(error) = run(&world, &history, Zeroes::Leave) else { panic!("nobody noticed") };
    let error = format!("{error:#}");
    ensure!(error.contains("DIFFERENCE") && error.contains("at byte 65536: it was Some(0)"), "{error}");
    Ok(())
}
