//! PID 1 of new namespaces: started by a bed, recorded, and ended by one SIGKILL. What such a process sets up in them
//! (mounts, links, daemons) ends with it, so that nothing else has to be taken down.
//!
//! What each sets up is its own module's: `hypervisor`, `nodes::network`, `nodes::init`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use std::os::unix::process::CommandExt as _;

use anyhow::{Context as _, Result, bail};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};

use crate::ledger::{Ledger, Process};
use crate::wait::wait_until;

/// Starts `bed VERB ARGUMENTS` as PID 1 of new namespaces of the kinds that are given (`--mount`, `--net`, ...; always a
/// PID namespace), and records it in `ledger` as `name`. What it prints is in `log`.
///
/// # Errors
/// When the namespaces cannot be made: with what was printed.
pub fn start(name: &str, kinds: &[&str], verb: &[&Path], log: &Path, ledger: &Ledger) -> Result<Process> {
    let file = fs::File::create(log)?;
    let mut parent = Command::new("unshare")
        .args(kinds)
        .args(["--pid", "--fork", "--kill-child=KILL", "--mount-proc"])
        .arg(bed_executable()?)
        .args(verb)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .process_group(0)
        .spawn()
        .context("unshare cannot be run: are you root?")?;
    let children = format!("/proc/{0}/task/{0}/children", parent.id());
    let init = wait_until(Duration::from_secs(5), "the namespaces", || {
        if let Some(status) = parent.try_wait()? {
            bail!("the namespaces of {name}: {status}: {}", fs::read_to_string(log).unwrap_or_default());
        }
        let pid = fs::read_to_string(&children).unwrap_or_default();
        Ok(pid.trim().parse().ok().and_then(|pid| Process::find(pid, name, true)))
    })?;
    ledger.add(&init)?;
    std::thread::spawn(move || parent.wait());
    Ok(init)
}

fn bed_executable() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("VIRTMARK_BED_EXECUTABLE") {
        return Ok(path.into());
    }
    Ok(crate::component::binary_dir()?.join("bed"))
}

/// To be called by a PID 1 first: it has a name, a /run of its own, and its mounts are nobody else's.
///
/// # Errors
/// When the kernel refuses.
pub fn enter(name: &str) -> Result<()> {
    rustix::system::sethostname(name.as_bytes())?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), Some(c"mode=755"))?;
    Ok(())
}

/// To be called by a PID 1: lays a file or folder over one of the machine's.
///
/// # Errors
/// When one of them is not there.
pub fn lay_over(ours: &Path, machines: &Path) -> Result<()> {
    mount_bind(ours, machines).with_context(|| format!("cannot lay over {}", machines.display()))
}

/// A daemon that a PID 1 starts, and starts again when it ends, as an init system does.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its log's name.
    pub name: &'static str,
    /// Its command line.
    pub command: Vec<String>,
}

impl Service {
    /// The command line `words`; the log is named after the program.
    pub fn new(name: &'static str, words: impl IntoIterator<Item = String>) -> Self {
        Self { name, command: words.into_iter().collect() }
    }

    /// Starts it, with its log in `logs`; answers its pid.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, logs: &Path) -> Result<u32> {
        let log =
            fs::File::options().create(true).append(true).open(logs.join(format!("{}.log", self.name)))?;
        let (program, arguments) = self.command.split_first().context("no command")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(command.spawn().with_context(|| format!("cannot start {program}"))?.id())
    }
}

/// The life of a PID 1: reaps what is left to it, and starts those services again that end. Returns only on failure.
///
/// # Errors
/// What failed.
pub fn keep(mut running: Vec<(Service, u32)>, logs: &Path) -> Result<()> {
    loop {
        match rustix::process::wait(rustix::process::WaitOptions::empty()) {
            Ok(Some((ended, _))) => {
                for (service, pid) in &mut running {
                    if i32::try_from(*pid) == Ok(ended.as_raw_nonzero().get()) {
                        std::thread::sleep(Duration::from_millis(100));
                        *pid = service.start(logs)?;
                    }
                }
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
