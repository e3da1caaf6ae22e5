//! What a run cost: CPU of processes, and of the rest of the machine meanwhile.
//!
//! The bench is the first process of a PID namespace, so `/proc` lists its processes and no others, while
//! `/proc/stat` counts the whole machine. The difference is what others used, and the host of a virtual
//! machine: a run during which that was more than [`FOREIGN`] is repeated.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// Clock ticks of `/proc` a second, on all machines that Linux runs on today.
const TICKS: f64 = 100.0;
/// Most CPU of others that a run may have had, of all there is.
pub(crate) const FOREIGN: f64 = 0.08;
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

/// CPU seconds of one process so far, its ended children not counted.
pub(crate) fn of_process(pid: u32) -> Result<f64> {
    let [user, system, _, _] = times(&fs::read_to_string(format!("/proc/{pid}/stat"))?)?;
    Ok((user + system) / TICKS)
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
            let (mut sample, foreign) = share(&mut run)?;
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
    let ((), foreign) = share(|| {
        std::thread::sleep(GLANCE);
        Ok(())
    })?;
    Ok(foreign <= FOREIGN)
}

/// What others used meanwhile, of all CPU there is.
fn share<T>(run: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let (before, begun) = (foreign()?, Instant::now());
    let done = run()?;
    let cores = std::thread::available_parallelism()?.get();
    let all = begun.elapsed().as_secs_f64() * cores as f64;
    Ok((done, ((foreign()? - before) / all).max(0.0)))
}

/// CPU seconds of the machine so far that were not ours.
fn foreign() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let cpu = stat.lines().next().context("no cpu line in /proc/stat")?;
    // user nice system idle iowait irq softirq steal
    let fields: Vec<f64> = cpu.split_whitespace().skip(1).map_while(|field| field.parse().ok()).collect();
    let busy: f64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|at| fields.get(*at)).sum();
    let mut ours = 0.0;
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().parse::<u32>().is_err() {
            continue;
        }
        // A process that ended meanwhile is counted by its parent.
        if let Ok(stat) = fs::read_to_string(entry.path().join("stat")) {
            ours += times(&stat)?.iter().sum::<f64>();
        }
    }
    Ok((busy - ours) / TICKS)
}

/// Ticks of a process: user, system, and both of its ended children.
fn times(stat: &str) -> Result<[f64; 4]> {
    let (_, behind_name) = stat.rsplit_once(')').context("no name in /proc/PID/stat")?;
    let mut fields = behind_name.split_whitespace().skip(11).map(str::parse);
    let mut next = || fields.next().context("a short /proc/PID/stat")?.context("/proc/PID/stat");
    Ok([next()?, next()?, next()?, next()?])
}
