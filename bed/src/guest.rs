//! A real Debian guest with qemu-guest-agent, for what needs a guest: freeze, thaw, a file system.
//!
//! Its image is built once a machine and is never written: each VM has an overlay of its own.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::cache;
use crate::hypervisor::Hypervisor;
use crate::vm::{Disk, Plan, Vm};
use crate::wait::wait_until;

const SUITE: &str = "bookworm";
const PACKAGES: &str = "linux-image-cloud-amd64,systemd-sysv,udev,kmod,qemu-guest-agent";
const SIZE: u64 = 1 << 30;

const CMDLINE: &str = "root=/dev/vda rw console=ttyS0 net.ifnames=0";
const MEMORY_MIB: u32 = 384;

/// Each has a place of its own, so that a VM with more disks goes on from the boot of one without.
const DEVICES: &str = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
    <serial type='null'/>\
    <controller type='virtio-serial' index='0'><address type='pci' slot='0x1c'/></controller>\
    <rng model='virtio'><backend model='random'>/dev/urandom</backend><address type='pci' slot='0x1d'/></rng>\
    <memballoon model='virtio'><address type='pci' slot='0x1e'/></memballoon>";

/// Where a hypervisor has the image's files, in its folder.
const SHARED: &str = "guest";

/// QEMU's name of the internal snapshot of a guest that is up.
const BOOTED: &str = "booted";

/// The kernel, initial RAM disk and root file system.
#[derive(Clone, Debug)]
pub struct Image {
    dir: PathBuf,
}

impl Image {
    /// The image; built with debootstrap the first time (about a minute).
    ///
    /// # Errors
    /// When debootstrap or mke2fs fail.
    pub fn get() -> Result<Self> {
        let dir = cache::keyed("guest", &[SUITE, PACKAGES, &SIZE.to_string(), "1"], |dir| {
            eprintln!("building a Debian guest, once on this machine: about a minute");
            let root = dir.join("root");
            let include = format!("--include={PACKAGES}");
            run(Command::new("debootstrap").args(["--variant=minbase", &include, SUITE]).arg(&root))?;
            for (link, name) in [("vmlinuz", "vmlinuz"), ("initrd.img", "initrd")] {
                fs::copy(root.join(link), dir.join(name))
                    .with_context(|| format!("the guest has no {link}"))?;
            }
            fs::write(root.join("etc/fstab"), "/dev/vda / ext4 rw 0 1\n")?;
            let disk = dir.join("disk.raw");
            fs::File::create(&disk)?.set_len(SIZE)?;
            run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&disk))?;
            Ok(fs::remove_dir_all(&root)?)
        })?;
        Ok(Self { dir })
    }

    /// A VM of this guest that is up, with a qcow2 overlay of the image as vda, and `more` disks that the guest does not
    /// touch. It goes on from a boot that is kept in the cache: a second, instead of half a minute of this machine.
    ///
    /// # Errors
    /// When its guest agent does not answer.
    pub fn boot(
        &self,
        name: &str,
        hypervisor: &Hypervisor,
        more: impl IntoIterator<Item = Disk>,
    ) -> Result<Vm> {
        let vm = more.into_iter().fold(self.plan(name, hypervisor)?, Plan::disk).define(hypervisor)?;
        self.go_on(&vm)?;
        Ok(vm)
    }

    /// Starts a VM of this guest that is off. Its vda is as it was after the boot, and its other disks are as they are.
    ///
    /// # Errors
    /// When its guest agent does not answer.
    pub fn go_on(&self, vm: &Vm) -> Result<()> {
        let booted = self.booted(vm.hypervisor())?;
        fs::copy(booted, vm.image("vda")).context("the kept boot cannot be copied")?;
        let backing = vm.hypervisor().dir.join(SHARED).join("disk.raw");
        let rebase = ["rebase", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b"];
        run(Command::new("qemu-img").args(rebase).arg(backing).arg(vm.image("vda")))?;
        vm.hypervisor().virsh(&["start", "--paused", &vm.name])?;
        let node = node_name(vm)?;
        job(vm, "snapshot-load", json!({"tag": BOOTED, "vmstate": node, "devices": [node]}))?;
        job(vm, "snapshot-delete", json!({"tag": BOOTED, "devices": [node]}))?;
        vm.hypervisor().virsh(&["resume", &vm.name])?;
        answers(vm)
    }

    /// The vda of a VM that has booted, with its memory in it; it boots the first time.
    fn booted(&self, hypervisor: &Hypervisor) -> Result<PathBuf> {
        let version = |tool| output(Command::new(tool).arg("--version"));
        let (qemu, libvirt) = (version("qemu-system-x86_64")?, version("virsh")?);
        let image = self.dir.to_string_lossy();
        let made_from = [&*image, &qemu, &libvirt, CMDLINE, DEVICES, &MEMORY_MIB.to_string()];
        let dir = cache::keyed("guest-booted", &made_from, |dir| {
            eprintln!("booting the Debian guest, once on this machine: half a minute");
            let vm = self.plan(&format!("booting-{}", std::process::id()), hypervisor)?.start(hypervisor)?;
            answers(&vm)?;
            let node = node_name(&vm)?;
            job(&vm, "snapshot-save", json!({"tag": BOOTED, "vmstate": node, "devices": [node]}))?;
            vm.destroy()?;
            fs::copy(vm.image("vda"), dir.join("vda.qcow2")).context("the boot cannot be kept")?;
            Ok(())
        })?;
        Ok(dir.join("vda.qcow2"))
    }

    /// A VM of the guest, with a qcow2 overlay of the image as vda.
    fn plan(&self, name: &str, hypervisor: &Hypervisor) -> Result<Plan> {
        // QEMU's user must reach them; the cache may be private to root
        let shared = hypervisor.dir.join(SHARED);
        fs::create_dir_all(&shared)?;
        let file = |part: &str| shared.join(part);
        for part in ["vmlinuz", "initrd", "disk.raw"] {
            if !file(part).exists() {
                let partial = file(&format!("{part}.{}", std::process::id()));
                run(Command::new("cp").arg("--sparse=always").arg(self.dir.join(part)).arg(&partial))?;
                fs::rename(partial, file(part))?;
            }
        }
        let os = format!(
            "<kernel>{}</kernel><initrd>{}</initrd><cmdline>{CMDLINE}</cmdline>",
            file("vmlinuz").display(),
            file("initrd").display()
        );
        let disk = Disk::qcow2("vda", SIZE).over(&file("disk.raw"));
        Ok(Plan::new(name).disk(disk).booting(&os, DEVICES, MEMORY_MIB))
    }
}

fn answers(vm: &Vm) -> Result<()> {
    wait_until(Duration::from_secs(180), "the guest agent to answer", || {
        Ok(agent(vm, &json!({"execute": "guest-ping"})).ok().map(drop))
    })
}

/// QEMU's name of what vda writes to.
fn node_name(vm: &Vm) -> Result<String> {
    let blocks = vm.monitor(&json!({"execute": "query-block"}))?;
    let of_vda = |block: &&Value| block["qdev"].as_str().is_some_and(|path| path.contains("ua-vda/"));
    let block = blocks.as_array().into_iter().flatten().find(of_vda);
    let name = block.and_then(|block| block["inserted"]["node-name"].as_str());
    Ok(name.context("QEMU has no disk vda")?.to_owned())
}

/// Has QEMU do a job, and waits for its end.
fn job(vm: &Vm, what: &str, mut arguments: Value) -> Result<()> {
    arguments["job-id"] = json!(what);
    vm.monitor(&json!({"execute": what, "arguments": arguments}))?;
    let error = wait_until(Duration::from_secs(60), "a job of QEMU's", || {
        let jobs = vm.monitor(&json!({"execute": "query-jobs"}))?;
        let job = jobs.as_array().into_iter().flatten().find(|job| job["id"] == what);
        let job = job.with_context(|| format!("QEMU has no job {what}"))?;
        Ok((job["status"] == "concluded").then(|| job["error"].as_str().map(str::to_owned)))
    })?;
    vm.monitor(&json!({"execute": "job-dismiss", "arguments": {"id": what}}))?;
    error.map_or(Ok(()), |error| bail!("{what}: {error}"))
}

/// What the guest agent of a VM answers to a command.
///
/// # Errors
/// When it does not answer.
pub fn agent(vm: &Vm, command: &Value) -> Result<Value> {
    let arguments = ["qemu-agent-command", "--timeout", "10", &vm.name, &command.to_string()];
    let said = vm.hypervisor().virsh(&arguments)?;
    Ok(serde_json::from_str::<Value>(&said)?["return"].clone())
}

/// Runs a shell command in the guest, and waits for it.
///
/// # Errors
/// When it fails, or does not end within a minute.
pub fn sh(vm: &Vm, script: &str) -> Result<()> {
    let arguments = json!({"path": "/bin/sh", "arg": ["-c", script]});
    let started = agent(vm, &json!({"execute": "guest-exec", "arguments": arguments}))?;
    let status = json!({"execute": "guest-exec-status", "arguments": {"pid": started["pid"]}});
    let code = wait_until(Duration::from_secs(60), "a command in the guest", || {
        let status = agent(vm, &status)?;
        Ok((status["exited"] == true).then(|| status["exitcode"].as_i64().unwrap_or(-1)))
    })?;
    if code != 0 {
        bail!("in the guest, {script:?} ended with {code}");
    }
    Ok(())
}

/// Whether the guest's file systems are frozen, as its agent says.
///
/// # Errors
/// When the agent does not answer.
pub fn is_frozen(vm: &Vm) -> Result<bool> {
    Ok(agent(vm, &json!({"execute": "guest-fsfreeze-status"}))? == "frozen")
}

fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// What a command prints.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{:?} cannot be run", command.get_program()))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&said);
        let tail: String = text.lines().rev().take(5).collect::<Vec<_>>().join(" | ");
        bail!("{:?} failed: {tail}", command.get_program());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
