//! A private hypervisor: libvirtd and virtlogd in namespaces of their own, on the machine's loopback.
//!
//! `start` runs `bed hypervisor-init` as PID 1 of new mount, UTS, IPC and PID namespaces. It lays its own
//! /run, /etc/libvirt and /var/*/libvirt over the machine's, so that a user's own libvirt is never touched,
//! and starts the daemons. SIGKILL of that one process ends all: daemons, QEMUs and mounts.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rand::Rng as _;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::ledger::{Ledger, Process};
use crate::namespaces::{self, Service};
use crate::wait::wait_until;

/// What is laid over the machine's, from the hypervisor's folder.
const OVERLAID: [(&str, &str); 4] = [
    ("etc", "/etc/libvirt"),
    ("lib", "/var/lib/libvirt"),
    ("cache", "/var/cache/libvirt"),
    ("log", "/var/log/libvirt"),
];

/// One hypervisor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hypervisor {
    /// Its node's name.
    pub name: String,
    /// Its folder.
    pub dir: PathBuf,
    /// Its address, if it has a network of its own.
    #[serde(default)]
    pub address: Option<String>,
    host_uuid: String,
    init: Option<Process>,
}

impl Hypervisor {
    /// A new one in `bed_dir`/`name`, started.
    ///
    /// # Errors
    /// When its libvirtd does not come up; logs are in its folder.
    pub fn start_new(bed_dir: &Path, name: &str, ledger: &Ledger) -> Result<Self> {
        let mut hypervisor = Self::make(bed_dir, name, None)?;
        hypervisor.start(ledger)?;
        Ok(hypervisor)
    }

    /// A new one, which is off. One with an address has a network of its own, and takes migrations over TCP.
    pub(crate) fn make(bed_dir: &Path, name: &str, address: Option<&str>) -> Result<Self> {
        let dir = bed_dir.join(name);
        for sub in ["etc", "lib", "cache", "log", "sock"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        let address = address.map(str::to_owned);
        let hypervisor = Self { name: name.to_owned(), dir, address, host_uuid: random_uuid(), init: None };
        hypervisor.configure(bed_dir)?;
        Ok(hypervisor)
    }

    fn configure(&self, bed_dir: &Path) -> Result<()> {
        // the packaged defaults, without the domains and networks that a user may have defined
        copy_tree(Path::new("/etc/libvirt"), &self.dir.join("etc"))?;
        for entry in ["etc/qemu", "etc/storage"] {
            let _ = fs::remove_dir_all(self.dir.join(entry));
        }
        fs::create_dir_all(self.dir.join("lib/qemu"))?;
        let sock = self.dir.join("sock");
        let mut libvirtd = format!(
            "host_uuid = \"{}\"\nauth_unix_rw = \"none\"\nunix_sock_dir = \"{}\"\n",
            self.host_uuid,
            sock.display()
        );
        let mut qemu = format!(
            "security_driver = \"none\"\ncgroup_controllers = []\nshared_filesystems = [ \"{}\" ]\n",
            bed_dir.display()
        );
        if let Some(address) = &self.address {
            libvirtd += &format!(
                "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nlisten_addr = \"{address}\"\n"
            );
            qemu += &format!("migration_address = \"{address}\"\nmigration_host = \"{address}\"\n");
        }
        fs::write(self.dir.join("etc/libvirtd.conf"), libvirtd)?;
        fs::write(self.dir.join("etc/qemu.conf"), qemu)?;
        Ok(())
    }

    /// Powers it on.
    ///
    /// # Errors
    /// When its libvirtd does not come up.
    pub fn start(&mut self, ledger: &Ledger) -> Result<()> {
        self.begin("hypervisor-init", &[], ledger)?;
        self.ready()
    }

    /// Starts its PID 1, `bed VERB FOLDER NAME`, in namespaces of these kinds besides its own.
    pub(crate) fn begin(&mut self, verb: &str, kinds: &[&str], ledger: &Ledger) -> Result<Process> {
        let kinds = [&["--mount", "--uts", "--ipc"], kinds].concat();
        let verb = [Path::new(verb), &self.dir, Path::new(&self.name)];
        let init = namespaces::start(&self.name, &kinds, &verb, &self.dir.join("init.log"), ledger)?;
        self.init = Some(init.clone());
        Ok(init)
    }

    /// Waits until its libvirtd answers.
    pub(crate) fn ready(&self) -> Result<()> {
        wait_until(Duration::from_secs(20), "libvirtd", || {
            if !self.init.as_ref().is_some_and(Process::is_alive) {
                let log = fs::read_to_string(self.dir.join("init.log")).unwrap_or_default();
                bail!("hypervisor {} ended: {log}", self.name);
            }
            Ok(self.virsh(&["version"]).ok().map(drop))
        })
    }

    /// Its PID 1, while it is on.
    ///
    /// # Errors
    /// When it is off.
    pub fn init(&self) -> Result<&Process> {
        self.init.as_ref().with_context(|| format!("{} is off", self.name))
    }

    /// Cuts its power: everything in it is gone at once.
    pub fn power_off(&mut self) {
        if let Some(init) = self.init.take() {
            init.signal(Signal::KILL);
            init.end();
        }
    }

    /// The URI of its libvirt, for any client on the machine.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.dir.join("sock/libvirt-sock").display())
    }

    /// Where a domain's migration to it is received on this machine, by its QEMU.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn migration_socket(&self, domain: &str) -> Result<PathBuf> {
        let folder = self.dir.join("migration");
        fs::create_dir_all(&folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777))?;
        Ok(folder.join(format!("{domain}.sock")))
    }

    /// How another hypervisor reaches its libvirt, and where a domain's migration is received by its QEMU.
    pub(crate) fn migration_uris(&self, domain: &str) -> Result<(String, String)> {
        Ok(match &self.address {
            Some(address) => (format!("qemu+tcp://{address}/system"), format!("tcp://{address}")),
            None => (self.uri(), format!("unix://{}", self.migration_socket(domain)?.display())),
        })
    }

    /// Runs virsh on it, and answers what it printed.
    ///
    /// # Errors
    /// When it fails: with what it printed to standard error.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new("virsh").arg("-q").arg("-c").arg(self.uri()).args(arguments).output()?;
        if !output.status.success() {
            bail!("virsh {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Ends its libvirtd, politely or with SIGKILL, and answers which it was. QEMUs go on, and so does PID 1, which
    /// starts another.
    ///
    /// # Errors
    /// When none runs, or it does not end.
    pub fn end_libvirtd(&self, politely: bool) -> Result<Process> {
        let old = self.libvirtd()?;
        old.signal(if politely { Signal::TERM } else { Signal::KILL });
        wait_until(Duration::from_secs(40), "libvirtd to end", || Ok((!old.is_alive()).then_some(())))?;
        Ok(old)
    }

    /// Waits until another libvirtd than `old` answers.
    ///
    /// # Errors
    /// When none comes up.
    pub fn libvirtd_after(&self, old: &Process) -> Result<()> {
        wait_until(Duration::from_secs(40), "another libvirtd", || {
            let other = self.libvirtd().is_ok_and(|new| new != *old);
            Ok(other.then(|| self.virsh(&["version"]).ok()).flatten().map(drop))
        })
    }

    /// Its libvirtd.
    ///
    /// # Errors
    /// When none runs.
    pub fn libvirtd(&self) -> Result<Process> {
        let init = self.init.as_ref().context("it is off")?.pid;
        let children = fs::read_to_string(format!("/proc/{init}/task/{init}/children"))?;
        let mut pids = children.split_whitespace();
        let is_libvirtd = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "libvirtd")
        };
        let pid = pids.find(is_libvirtd).context("no libvirtd runs")?;
        Process::find(pid.parse()?, "libvirtd", false).context("libvirtd is gone")
    }

    /// What libvirt keeps of a domain that runs, in its own words: the job that it is in, among others.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kept_status(&self, domain: &str) -> Result<String> {
        let init = self.init()?.pid;
        Ok(fs::read_to_string(format!("/proc/{init}/root/run/libvirt/qemu/{domain}.xml"))?)
    }

    /// The log of one domain's QEMU.
    pub fn qemu_log(&self, domain: &str) -> PathBuf {
        self.dir.join("log/qemu").join(format!("{domain}.log"))
    }
}

/// PID 1 of a hypervisor's namespaces. Returns only when something fails.
///
/// # Errors
/// What failed.
pub fn init(dir: &Path, name: &str) -> Result<()> {
    namespaces::enter(name)?;
    lay_over(dir)?;
    let services = ["virtlogd", "libvirtd"].map(|daemon| Service::new(daemon, [daemon.to_owned()]));
    let running = services.into_iter().map(|service| Ok((service.clone(), service.start(dir)?)));
    namespaces::keep(running.collect::<Result<_>>()?, dir)
}

/// Lays what is libvirt's of the hypervisor in `dir` over the machine's.
pub(crate) fn lay_over(dir: &Path) -> Result<()> {
    OVERLAID
        .iter()
        .try_for_each(|(ours, machines)| namespaces::lay_over(&dir.join(ours), Path::new(machines)))
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    for entry in
        fs::read_dir(from).with_context(|| format!("{} is missing: install libvirt", from.display()))?
    {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            fs::create_dir_all(&target)?;
            copy_tree(&entry.path(), &target)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// A random uuid (RFC 9562, version 4).
pub(crate) fn random_uuid() -> String {
    let mut bytes: [u8; 16] = rand::rng().random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
