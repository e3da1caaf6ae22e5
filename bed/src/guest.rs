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

    /// Boots a VM with a qcow2 overlay of it as vda, and `more` disks that the guest does not touch, and waits
    /// until its guest agent answers.
    ///
    /// # Errors
    /// When it does not come up within three minutes.
    pub fn boot(
        &self,
        name: &str,
        hypervisor: &Hypervisor,
        more: impl IntoIterator<Item = Disk>,
    ) -> Result<Vm> {
        // QEMU's user must reach them; the cache may be private to root
        let shared = hypervisor.dir.join("guest");
        fs::create_dir_all(&shared)?;
        let file = |name: &str| shared.join(name);
        for part in ["vmlinuz", "initrd", "disk.raw"] {
            if !file(part).exists() {
                let partial = file(&format!("{part}.{}", std::process::id()));
                run(Command::new("cp").arg("--sparse=always").arg(self.dir.join(part)).arg(&partial))?;
                fs::rename(partial, file(part))?;
            }
        }
        let os = format!(
            "<kernel>{}</kernel><initrd>{}</initrd><cmdline>root=/dev/vda rw console=ttyS0 net.ifnames=0</cmdline>",
            file("vmlinuz").display(),
            file("initrd").display()
        );
        let devices = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
            <serial type='null'/><rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>";
        let disk = Disk::qcow2("vda", SIZE).over(&file("disk.raw"));
        let plan = Plan::new(name).disk(disk).booting(&os, devices, 384);
        let vm = more.into_iter().fold(plan, Plan::disk).start(hypervisor)?;
        wait_until(Duration::from_secs(180), "the guest agent to answer", || {
            Ok(agent(&vm, &json!({"execute": "guest-ping"})).ok().map(drop))
        })?;
        Ok(vm)
    }
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
    let output = command.output().with_context(|| format!("{:?} cannot be run", command.get_program()))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&said);
        let tail: String = text.lines().rev().take(5).collect::<Vec<_>>().join(" | ");
        bail!("{:?} failed: {tail}", command.get_program());
    }
    Ok(())
}
