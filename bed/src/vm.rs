//! Virtual machines on a hypervisor. Most have no operating system: their disks are written through the
//! device by QEMU's `qemu-io` monitor command, which is fast and exact.
//!
//! Beside each disk lies its *mirror*, a sparse raw file that gets every write too: what the guest's disk
//! must hold, byte for byte, whatever anybody computes.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::hypervisor::{Hypervisor, random_uuid};
use crate::ledger::Process;
use crate::wait::wait_until;

/// A disk to make.
#[derive(Clone, Debug)]
pub struct Disk {
    target: String,
    format: &'static str,
    size: u64,
    cluster: Option<u64>,
    backing: Option<PathBuf>,
    extra: &'static str,
}

impl Disk {
    /// A qcow2 disk of `size` bytes at `target` (`vda`).
    pub fn qcow2(target: &str, size: u64) -> Self {
        Self { target: target.to_owned(), format: "qcow2", size, cluster: None, backing: None, extra: "" }
    }

    /// A raw, sparse disk of `size` bytes at `target`.
    pub fn raw(target: &str, size: u64) -> Self {
        Self { format: "raw", ..Self::qcow2(target, size) }
    }

    /// A qcow2 one with clusters of so many bytes.
    #[must_use]
    pub fn clusters(self, bytes: u64) -> Self {
        Self { cluster: Some(bytes), ..self }
    }

    /// With more elements in its `<disk>`: `<shareable/>`, say.
    #[must_use]
    pub fn with(self, extra: &'static str) -> Self {
        Self { extra, ..self }
    }

    /// Over a raw image that is not written.
    #[must_use]
    pub fn over(self, backing: &Path) -> Self {
        Self { backing: Some(backing.to_owned()), ..self }
    }
}

/// A VM to define.
#[derive(Clone, Debug)]
pub struct Plan {
    name: String,
    disks: Vec<Disk>,
    memory_mib: u32,
    os: String,
    devices: String,
}

impl Plan {
    /// A VM without an operating system.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            disks: Vec::new(),
            memory_mib: 64,
            os: String::new(),
            devices: String::new(),
        }
    }

    /// With a disk.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// With an operating system: more in `<os>`, more in `<devices>`, and memory for it.
    #[must_use]
    pub fn booting(self, os: &str, devices: &str, memory_mib: u32) -> Self {
        Self { os: os.to_owned(), devices: devices.to_owned(), memory_mib, ..self }
    }

    /// Makes its disks, and defines it on `hypervisor`; it is off.
    ///
    /// # Errors
    /// When qemu-img or libvirt says no.
    pub fn define(self, hypervisor: &Hypervisor) -> Result<Vm> {
        let dir = hypervisor.dir.join("vm").join(&self.name);
        fs::create_dir_all(&dir)?;
        let vm = Vm { name: self.name, uuid: random_uuid(), dir, hypervisor: hypervisor.clone() };
        let mut disks = String::new();
        for disk in &self.disks {
            disks += &vm.make(disk)?;
        }
        let os = if self.os.is_empty() { vm.halted()? } else { self.os };
        let xml = format!(
            "<domain type='qemu'><name>{}</name><uuid>{}</uuid><memory unit='MiB'>{}</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type>{}</os><features><acpi/></features><devices>\
             <emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}{}</devices></domain>",
            vm.name, vm.uuid, self.memory_mib, os, self.devices
        );
        let file = vm.dir.join("domain.xml");
        fs::write(&file, xml)?;
        vm.hypervisor.virsh(&["define", &file.to_string_lossy()])?;
        Ok(vm)
    }

    /// Defines it and starts it.
    ///
    /// # Errors
    /// When qemu-img or libvirt says no.
    pub fn start(self, hypervisor: &Hypervisor) -> Result<Vm> {
        let vm = self.define(hypervisor)?;
        vm.start()?;
        Ok(vm)
    }
}

/// A VM. Dropping it destroys it and removes its disks.
#[derive(Debug)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: String,
    pub(crate) dir: PathBuf,
    pub(crate) hypervisor: Hypervisor,
}

impl Vm {
    /// Makes the image and the mirror of a disk; answers its `<disk>`.
    pub(crate) fn make(&self, disk: &Disk) -> Result<String> {
        let image = self.image(&disk.target);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", disk.format]);
        if let Some(backing) = &disk.backing {
            create.args(["-F", "raw", "-b"]).arg(backing);
        }
        if let Some(cluster) = disk.cluster {
            create.args(["-o", &format!("cluster_size={cluster}")]);
        }
        run(create.arg(&image).arg(disk.size.to_string()))?;
        fs::set_permissions(&image, fs::Permissions::from_mode(0o666))?;
        File::create(self.mirror(&disk.target))?.set_len(disk.size)?;
        Ok(self.described(disk))
    }

    /// Firmware that halts the processor at once. The usual one looks for something to boot, which costs more than all else
    /// that such a VM does.
    fn halted(&self) -> Result<String> {
        let mut rom = vec![0; 64 << 10];
        // where an x86 processor begins: cli, hlt, and again
        rom[0xfff0..0xfff4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfc]);
        let file = self.dir.join("halt.rom");
        fs::write(&file, rom)?;
        Ok(format!("<loader readonly='yes' type='rom'>{}</loader>", file.display()))
    }

    /// The `<disk>` of a disk whose image is there.
    pub(crate) fn described(&self, disk: &Disk) -> String {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{}' discard='unmap'/><source file='{}'/>\
             <target dev='{}' bus='virtio'/><alias name='ua-{2}'/>{}</disk>",
            disk.format,
            self.image(&disk.target).display(),
            disk.target,
            disk.extra
        )
    }

    /// Its hypervisor.
    pub fn hypervisor(&self) -> &Hypervisor {
        &self.hypervisor
    }

    /// The image of a disk.
    pub fn image(&self, target: &str) -> PathBuf {
        self.dir.join(format!("{target}.img"))
    }

    /// What the disk must hold, as a raw file.
    pub fn mirror(&self, target: &str) -> PathBuf {
        self.dir.join(format!("{target}.mirror"))
    }

    /// A copy of the mirror as it is now, to compare with later.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn remember(&self, target: &str) -> Result<PathBuf> {
        let copy = self.dir.join(format!("{target}.remembered"));
        run(Command::new("cp").arg("--sparse=always").arg(self.mirror(target)).arg(&copy))?;
        Ok(copy)
    }

    /// Starts it.
    ///
    /// # Errors
    /// libvirt's.
    pub fn start(&self) -> Result<()> {
        self.hypervisor.virsh(&["start", &self.name]).map(drop)
    }

    /// Its QEMU.
    ///
    /// # Errors
    /// When it does not run.
    pub fn qemu(&self) -> Result<Process> {
        let ours = |pid: u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.split('\0').next().is_some_and(|name| name.contains("qemu-system"))
                && line.contains(&format!("-uuid\0{}\0", self.uuid))
        };
        let mut pids = fs::read_dir("/proc")?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok());
        let pid = pids.find(|pid| ours(*pid)).with_context(|| format!("{} has no QEMU", self.name))?;
        Process::find(pid, "qemu", false).context("it has ended")
    }

    /// Kills its QEMU, with SIGKILL, and waits until libvirt has seen it.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&self) -> Result<()> {
        self.qemu()?.signal(Signal::KILL);
        wait_until(Duration::from_secs(20), "libvirt to see that QEMU is gone", || {
            Ok((self.state().unwrap_or_default() != "running").then_some(()))
        })
    }

    /// Removes its definition: while it runs, it is transient from here on.
    ///
    /// # Errors
    /// libvirt's.
    pub fn undefine(&self) -> Result<()> {
        self.hypervisor.virsh(&["undefine", &self.name]).map(drop)
    }

    /// Defines it again, as it was.
    ///
    /// # Errors
    /// libvirt's.
    pub fn redefine(&self) -> Result<()> {
        let file = self.dir.join("domain.xml");
        self.hypervisor.virsh(&["define", &file.to_string_lossy()]).map(drop)
    }

    /// Pulls its plug.
    ///
    /// # Errors
    /// libvirt's.
    pub fn destroy(&self) -> Result<()> {
        self.hypervisor.virsh(&["destroy", &self.name]).map(drop)
    }

    /// Moves it to another hypervisor while it runs; its disks are shared, and stay. `flags` are more of virsh's.
    ///
    /// # Errors
    /// libvirt's: then it is where it was.
    pub fn migrate(&mut self, to: &Hypervisor, flags: &[&str]) -> Result<()> {
        let (destination, uri) = to.migration_uris(&self.name)?;
        let fixed = ["--live", "--p2p", "--persistent", "--undefinesource", "--migrateuri", &uri];
        let words = [&["migrate"], &fixed[..], flags, &["--domain", &self.name, "--desturi", &destination]];
        self.hypervisor.virsh(&words.concat())?;
        self.hypervisor = to.clone();
        Ok(())
    }

    /// Defines it on another hypervisor as it is, and no longer on its own; it is off.
    ///
    /// # Errors
    /// libvirt's.
    pub fn define_on(&mut self, to: &Hypervisor) -> Result<()> {
        let file = self.dir.join("domain.xml");
        fs::write(&file, self.hypervisor.virsh(&["dumpxml", "--inactive", &self.name])?)?;
        self.undefine()?;
        self.hypervisor = to.clone();
        self.redefine()
    }

    /// Says that it is on another hypervisor now.
    pub fn moved(&mut self, to: &Hypervisor) {
        self.hypervisor = to.clone();
    }

    /// Writes `length` bytes of `pattern` at `offset`, through the device.
    ///
    /// # Errors
    /// When the guest's write would have failed.
    pub fn write(&self, target: &str, offset: u64, length: u64, pattern: u8) -> Result<()> {
        self.qemu_io(
            target,
            // flushed: what QEMU keeps of it in memory would die with QEMU
            &format!("write -f -P {pattern:#x} {offset} {length}"),
            &format!("wrote {length}/{length}"),
        )?;
        let mirror = OpenOptions::new().write(true).open(self.mirror(target))?;
        let block = vec![pattern; usize::try_from(length.min(1 << 20))?];
        let mut done = 0;
        while done < length {
            let part = usize::try_from((length - done).min(1 << 20))?;
            mirror.write_all_at(&block[..part], offset + done)?;
            done += u64::try_from(part)?;
        }
        Ok(())
    }

    /// Zeroes `length` bytes at `offset`, through the device.
    ///
    /// # Errors
    /// When the guest's write would have failed.
    pub fn zero(&self, target: &str, offset: u64, length: u64) -> Result<()> {
        self.qemu_io(target, &format!("write -z {offset} {length}"), &format!("wrote {length}/{length}"))?;
        let mirror = OpenOptions::new().write(true).open(self.mirror(target))?;
        let block = vec![0; usize::try_from(length)?];
        Ok(mirror.write_all_at(&block, offset)?)
    }

    fn qemu_io(&self, target: &str, command: &str, expected: &str) -> Result<()> {
        let said = self.ask_qemu_io(target, command, expected)?;
        if said.contains("error") || said.contains("failed") {
            bail!("{command}: {said}");
        }
        Ok(())
    }

    /// qemu-io answers nothing on the monitor: its words are in the domain's QEMU log. Waits for `expected`, or that it
    /// went wrong.
    pub(crate) fn ask_qemu_io(&self, target: &str, command: &str, expected: &str) -> Result<String> {
        let log = self.hypervisor.qemu_log(&self.name);
        let before = fs::metadata(&log).map_or(0, |log| log.len());
        let device = format!("/machine/peripheral/ua-{target}/virtio-backend");
        let line = format!("qemu-io -d {device} \"{command}\"");
        let said = self.hypervisor.virsh(&["qemu-monitor-command", &self.name, "--hmp", &line])?;
        if said.contains("Error") {
            bail!("{line}: {said}");
        }
        wait_until(Duration::from_secs(20), "qemu-io's answer in the QEMU log", || {
            let text = fs::read(&log).context("the QEMU log cannot be read")?;
            let new = String::from_utf8_lossy(text.get(usize::try_from(before)?..).unwrap_or_default())
                .into_owned();
            let is_done = [expected, "error", "failed"].iter().any(|word| new.contains(word));
            Ok(is_done.then_some(new))
        })
    }

    /// What QEMU answers to a command of its monitor protocol.
    ///
    /// # Errors
    /// QEMU's, or that it does not run.
    pub(crate) fn monitor(&self, command: &Value) -> Result<Value> {
        let said = self.hypervisor.virsh(&["qemu-monitor-command", &self.name, &command.to_string()])?;
        let said: Value = serde_json::from_str(&said)?;
        if !said["error"].is_null() {
            bail!("{}: {}", command["execute"], said["error"]);
        }
        Ok(said["return"].clone())
    }

    /// Names of the persistent and active dirty bitmaps that QEMU has on a running VM's disks.
    ///
    /// # Errors
    /// When it does not run.
    pub fn live_bitmaps(&self) -> Result<Vec<String>> {
        let nodes = self.monitor(&json!({"execute": "query-named-block-nodes"}))?;
        let nodes = nodes.as_array().cloned().unwrap_or_default();
        let bitmaps = nodes.iter().filter_map(|node| node["dirty-bitmaps"].as_array()).flatten();
        let mut names: Vec<_> =
            bitmaps.filter_map(|bitmap| bitmap["name"].as_str()).map(str::to_owned).collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// The state that libvirt gives.
    ///
    /// # Errors
    /// libvirt's.
    pub fn state(&self) -> Result<String> {
        Ok(self.hypervisor.virsh(&["domstate", &self.name])?.trim().to_owned())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // each may have been done already: what counts is that nothing is left
        let _ = self.destroy();
        let _ = self.hypervisor.virsh(&[
            "undefine",
            &self.name,
            "--checkpoints-metadata",
            "--snapshots-metadata",
            "--nvram",
        ]);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Whether two images hold the same bytes (`qemu-img compare`, which reads every format).
///
/// # Errors
/// When they differ: with the offset.
pub fn compare(raw: &Path, other: &Path, other_format: &str) -> Result<()> {
    run(Command::new("qemu-img").args(["compare", "-q", "-f", "raw", "-F", other_format]).arg(raw).arg(other))
        .with_context(|| format!("{} differs from {}", other.display(), raw.display()))
}

pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("{:?} failed: {}", command.get_program(), String::from_utf8_lossy(&said).trim());
    }
    Ok(())
}
