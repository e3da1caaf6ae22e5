//! CPU of processes, and of the rest of the machine meanwhile: what others used, and the host of a virtual machine.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::time::Instant;

use anyhow::{Context as _, Result};

/// Clock ticks of `/proc` a second, on all machines that Linux runs on today.
const TICKS: f64 = 100.0;
/// Most CPU of others that a run may have had, of all there is.
pub(crate) const FOREIGN: f64 = 0.08;

/// CPU seconds of one process so far, its ended children not counted.
pub(crate) fn of_process(pid: u32) -> Result<f64> {
    let Times { own, .. } = Times::read(&fs::read_to_string(format!("/proc/{pid}/stat"))?)?;
    Ok(own / TICKS)
}

/// The parent of a process.
#[allow(dead_code, reason = "each bench uses what it needs")]
pub(crate) fn parent(pid: u32) -> Result<u32> {
    Ok(Times::read(&fs::read_to_string(format!("/proc/{pid}/stat"))?)?.parent)
}

/// What others used meanwhile, of all CPU there is. Ours are the process `top` and all below it.
pub(crate) fn share<T>(top: u32, run: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let (before, begun) = (foreign(top)?, Instant::now());
    let done = run()?;
    let cores = std::thread::available_parallelism()?.get();
    let all = begun.elapsed().as_secs_f64() * cores as f64;
    Ok((done, ((foreign(top)? - before) / all).max(0.0)))
}

/// CPU seconds of the machine so far that were not ours.
fn foreign(top: u32) -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let cpu = stat.lines().next().context("no cpu line in /proc/stat")?;
    // user nice system idle iowait irq softirq steal
    let fields: Vec<f64> = cpu.split_whitespace().skip(1).map_while(|field| field.parse().ok()).collect();
    let busy: f64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|at| fields.get(*at)).sum();
    let mut all = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        // A process that ended meanwhile is counted by its parent.
        if let Ok(stat) = fs::read_to_string(entry.path().join("stat")) {
            all.insert(pid, Times::read(&stat)?);
        }
    }
    let mut ours = HashSet::from([top]);
    loop {
        let below = all.iter().filter(|(_, times)| ours.contains(&times.parent)).map(|(pid, _)| *pid);
        let more: Vec<_> = below.filter(|pid| !ours.contains(pid)).collect();
        if more.is_empty() {
            break;
        }
        ours.extend(more);
    }
    let used: f64 = ours.iter().filter_map(|pid| all.get(pid)).map(|times| times.own + times.children).sum();
    Ok((busy - used) / TICKS)
}

/// What `/proc/PID/stat` says of a process, in ticks.
struct Times {
    parent: u32,
    own: f64,
    /// Of its ended children.
    children: f64,
}

impl Times {
    fn read(stat: &str) -> Result<Times> {
        let (_, behind_name) = stat.rsplit_once(')').context("no name in /proc/PID/stat")?;
        let fields: Vec<_> = behind_name.split_whitespace().collect();
        let ticks = |at: usize| -> Result<f64> {
            fields.get(at).context("a short /proc/PID/stat")?.parse().context("/proc/PID/stat")
        };
        Ok(Times {
            parent: fields.get(1).context("a short /proc/PID/stat")?.parse()?,
            own: ticks(11)? + ticks(12)?,
            children: ticks(13)? + ticks(14)?,
        })
    }
}
