//! What a bed made, written down so that just this is taken down again: by this process, after a failure or
//! Ctrl-C, or by the next one after a SIGKILL.
//!
//! Mounts, sockets and daemons of a hypervisor live in its namespaces, which end with their recorded PID 1;
//! so the ledger needs processes only, each with its start time: a pid that was used again is not ours.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

/// A process, beyond doubt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// When it started, in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub started: u64,
    /// What it is, for people.
    pub what: String,
    /// It holds a whole PID namespace: end it with SIGKILL at once.
    pub is_namespace: bool,
}

impl Process {
    /// The process with this pid, as it is now; `None` when there is none.
    pub fn find(pid: u32, what: &str, is_namespace: bool) -> Option<Self> {
        let pid = i32::try_from(pid).ok()?;
        Some(Self { pid, started: stat(pid)?.1, what: what.to_owned(), is_namespace })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|(_, started)| started == self.started)
    }

    /// Whether it runs, and was stopped where it stands (SIGSTOP).
    pub fn is_paused(&self) -> bool {
        stat(self.pid).is_some_and(|(state, started)| state == 'T' && started == self.started)
    }

    /// Sends a signal, if it is still this process.
    pub fn signal(&self, signal: Signal) {
        if self.is_alive()
            && let Some(pid) = Pid::from_raw(self.pid)
        {
            // it may end at this very moment, which is as well
            let _ = kill_process(pid, signal);
        }
    }

    /// Whether signals wait for it, because it was stopped.
    pub fn has_signals(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let pending = status.lines().filter_map(|line| {
            line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:")).map(str::trim)
        });
        pending.into_iter().any(|mask| !mask.trim_start_matches('0').is_empty())
    }

    /// Stops it where it stands, until `resume`.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Ends it: politely first, unless it is a namespace; waits until it is gone.
    pub fn end(&self) {
        if !self.is_namespace {
            self.signal(Signal::TERM);
            // an agent gives its readers five seconds
            if self.wait(Duration::from_secs(10)) {
                return;
            }
        }
        self.signal(Signal::KILL);
        self.wait(Duration::from_secs(10));
    }

    fn wait(&self, bound: Duration) -> bool {
        let until = Instant::now() + bound;
        while self.is_alive() {
            if Instant::now() > until {
                return false;
            }
            sleep(Duration::from_millis(5));
        }
        true
    }
}

/// State and start time, fields 3 and 22 of `/proc/PID/stat`; none for a zombie, which is as good as gone.
fn stat(pid: i32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the name, in parentheses, may hold anything
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let threads: u32 = fields.nth(16)?.parse().ok()?;
    // a zombie whose other threads are not at their end yet holds its files and ports still
    if state == 'Z' && threads <= 1 {
        return None;
    }
    Some((state, fields.nth(1)?.parse().ok()?))
}

/// The list, in a file of the bed's folder.
#[derive(Clone, Debug)]
pub struct Ledger {
    path: PathBuf,
}

impl Ledger {
    /// The ledger of the bed in `dir`.
    pub fn of(dir: &Path) -> Self {
        Self { path: dir.join("ledger") }
    }

    /// Adds a process.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(&self, process: &Process) -> Result<()> {
        let mut file: File = OpenOptions::new().create(true).append(true).open(&self.path)?;
        // in one write: hypervisors and control plane start side by side, and their lines must not mix
        let line = serde_json::to_string(process)? + "\n";
        file.write_all(line.as_bytes()).context("the ledger cannot be written")
    }

    /// Every process of the ledger, in the order in which they were added.
    pub fn processes(&self) -> Vec<Process> {
        let lines = fs::read_to_string(&self.path).unwrap_or_default();
        lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Ends every process that still runs, the youngest first.
    pub fn end_all(&self) {
        for process in self.processes().iter().rev() {
            process.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_pid_that_was_used_again_is_left_alone() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let real = Process::find(child.id(), "sleep", false).unwrap();
        let other = Process { started: real.started - 1, ..real.clone() };
        assert!(real.is_alive());
        assert!(!other.is_alive());
        other.end();
        assert!(real.is_alive(), "another start time is another process");
        real.end();
        assert!(!real.is_alive());
        child.wait().unwrap();
    }

    #[test]
    fn the_ledger_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::of(dir.path());
        let this = Process::find(std::process::id(), "this (test) :)", false).unwrap();
        ledger.add(&this).unwrap();
        assert_eq!(ledger.processes(), vec![this]);
    }

    #[test]
    fn lines_that_are_added_at_once_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::of(dir.path());
        let this = Process::find(std::process::id(), "this", false).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|_| ledger.add(&this).unwrap()));
            }
        });
        assert_eq!(ledger.processes().len(), 2000, "what is not in the ledger is never ended");
    }
}
