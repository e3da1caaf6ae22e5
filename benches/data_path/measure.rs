//! Runs on a machine that is as quiet as can be had: one during which others used more than [`FOREIGN`] is repeated.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::cpu::{FOREIGN, share};

/// The first process of this PID namespace: all that are in it are ours.
const TOP: u32 = 1;
/// How often a run is repeated because of that.
const REPEATS: usize = 4;
/// How long a quiet machine is waited for before each.
const WAIT: Duration = Duration::from_secs(10);
/// How long is looked whether it is.
const GLANCE: Duration = Duration::from_millis(300);

/// One run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// In the case's unit.
    pub(crate) rate: f64,
    /// CPU seconds that the server took for a GiB.
    pub(crate) server_per_gib: Option<f64>,
    /// CPU seconds that the `qemu-nbd` took for a GiB.
    pub(crate) storage_per_gib: Option<f64>,
    /// CPU that others had, of all there is.
    pub(crate) foreign: f64,
}

/// Time that may be spent on waiting for a quiet machine and on repeated runs, in all. On a machine that is never
/// quiet it is soon gone, and the rows say how busy it was.
#[derive(Debug)]
pub(crate) struct Patience(pub(crate) Duration);

impl Patience {
    /// Waits for a quiet machine and runs; again when it was not quiet meanwhile, at most [`REPEATS`] times. The
    /// quietest run.
    pub(crate) fn run(&mut self, mut run: impl FnMut() -> Result<Sample>) -> Result<Sample> {
        let mut best: Option<Sample> = None;
        for _ in 0..=REPEATS {
            let begun = Instant::now();
            while begun.elapsed() < self.0.min(WAIT) && !glance()? {}
            let waited = begun.elapsed();
            let (mut sample, foreign) = share(TOP, &mut run)?;
            sample.foreign = foreign;
            let again = best.is_some();
            if best.is_none_or(|best| foreign < best.foreign) {
                best = Some(sample);
            }
            self.0 = self.0.saturating_sub(if again { begun.elapsed() } else { waited });
            if foreign <= FOREIGN || self.0.is_zero() {
                break;
            }
        }
        best.context("no run")
    }
}

/// Whether the machine is quiet now.
fn glance() -> Result<bool> {
    let ((), foreign) = share(TOP, || {
        std::thread::sleep(GLANCE);
        Ok(())
    })?;
    Ok(foreign <= FOREIGN)
}
