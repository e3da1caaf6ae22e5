//! A long-lived process of the bed, which can be killed, paused and started again as it was.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::ledger::{Ledger, Process};

/// A daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Daemon {
    /// Its name, and its log's: `etcd`, `operator`, `agent-node-a`.
    pub name: String,
    binary: PathBuf,
    arguments: Vec<String>,
    dir: PathBuf,
    /// What its environment has besides, of this life.
    #[serde(default)]
    environment: Vec<(String, String)>,
    /// Its process.
    pub process: Process,
}

impl Daemon {
    /// Starts `binary` in a process group of its own, with its log in `dir`/log, and records it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &str, binary: &Path, arguments: Vec<String>, dir: &Path) -> Result<Self> {
        let process = spawn(name, binary, &arguments, dir, &[])?;
        Ok(Self {
            name: name.to_owned(),
            binary: binary.to_owned(),
            arguments,
            dir: dir.to_owned(),
            environment: Vec::new(),
            process,
        })
    }

    /// The value that it was given for a flag: `--listen`, say.
    pub fn argument(&self, flag: &str) -> Option<&str> {
        let at = self.arguments.iter().position(|argument| argument == flag)?;
        self.arguments.get(at + 1).map(String::as_str)
    }

    /// Gives it another value for a flag that it has, from its next start on.
    pub fn set_argument(&mut self, flag: &str, value: &str) {
        if let Some(argument) = self.arguments.iter_mut().skip_while(|argument| *argument != flag).nth(1) {
            value.clone_into(argument);
        }
    }

    /// Kills it, with SIGKILL, and waits until it is gone.
    pub fn kill(&self) {
        self.process.signal(Signal::KILL);
        self.process.end();
    }

    /// Stops it where it stands, until `resume`.
    pub fn pause(&self) {
        self.process.pause();
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.process.resume();
    }

    /// Kills it if it lives, and starts it again as it was started, with `environment` besides.
    ///
    /// # Errors
    /// When it does not start.
    pub fn restart(&mut self, environment: &[(&str, &str)]) -> Result<()> {
        self.kill();
        self.process = spawn(&self.name, &self.binary, &self.arguments, &self.dir, environment)?;
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        self.environment = environment.iter().map(owned).collect();
        Ok(())
    }

    /// Starts it again as it was started first, if it is dead, stands still, or has more in its environment. Answers
    /// whether that was so.
    ///
    /// # Errors
    /// When it does not start.
    pub fn put_right(&mut self) -> Result<bool> {
        let is_right = self.process.is_alive() && !self.process.is_paused() && self.environment.is_empty();
        if !is_right {
            self.restart(&[])?;
        }
        Ok(!is_right)
    }

    /// Its resident memory, in KiB.
    ///
    /// # Errors
    /// When it does not run.
    pub fn rss_kib(&self) -> Result<u64> {
        self.memory_kib("VmRSS:")
    }

    /// The most resident memory that it had, in KiB.
    ///
    /// # Errors
    /// When it does not run.
    pub fn peak_rss_kib(&self) -> Result<u64> {
        self.memory_kib("VmHWM:")
    }

    fn memory_kib(&self, name: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// What it logged so far, in all its lives.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log").join(format!("{}.log", self.name))).unwrap_or_default()
    }
}

fn spawn(
    name: &str,
    binary: &Path,
    arguments: &[String],
    dir: &Path,
    environment: &[(&str, &str)],
) -> Result<Process> {
    let log = File::options().create(true).append(true).open(dir.join("log").join(format!("{name}.log")))?;
    let child = Command::new(binary)
        .args(arguments)
        // etcd and kube-apiserver have small heaps, and a machine that has room for more: a sixth of their CPU
        .env("GOGC", "400")
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C in the terminal is for the bed, which takes its daemons down in order
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let process = Process::find(child.id(), name, false).with_context(|| format!("{name} ended at once"))?;
    Ledger::of(dir).add(&process)?;
    // its parent may be gone before it is: zombies are reaped here as long as this process lives
    std::thread::spawn(move || {
        let mut child = child;
        child.wait()
    });
    Ok(process)
}
