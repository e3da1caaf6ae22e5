//! What happens to a VM's disks besides writes: discards, growth, plugs, external snapshots. The mirrors follow.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::vm::{Disk, Vm, run};
use crate::wait::wait_until;

impl Vm {
    /// Discards `length` bytes at `offset`, through the device. What that does to the bytes is QEMU's, and it is asked:
    /// qcow2 zeroes whole clusters, or, while a backup job runs, nothing.
    ///
    /// # Errors
    /// When the guest's discard would have failed.
    pub fn discard(&self, target: &str, offset: u64, length: u64) -> Result<()> {
        let said = self.ask_qemu_io(
            target,
            &format!("discard {offset} {length}"),
            &format!("discard {length}/{length}"),
        )?;
        anyhow::ensure!(!said.contains("error") && !said.contains("failed"), "discard: {said}");
        let mirror = OpenOptions::new().write(true).open(self.mirror(target))?;
        let (size, end) = (mirror.metadata()?.len(), offset + length);
        let cluster = info(&self.active(target)?)?["cluster-size"].as_u64().unwrap_or(1);
        let from = offset.next_multiple_of(cluster);
        let to = if end == size { end } else { end / cluster * cluster };
        if from < to && self.reads_zero(target, from, to - from)? {
            mirror.write_all_at(&vec![0; usize::try_from(to - from)?], from)?;
        }
        Ok(())
    }

    fn reads_zero(&self, target: &str, offset: u64, length: u64) -> Result<bool> {
        let read = format!("read {length}/{length}");
        let said = self.ask_qemu_io(target, &format!("read -P 0 {offset} {length}"), &read)?;
        anyhow::ensure!(!said.contains("error"), "{said}");
        Ok(!said.contains("failed"))
    }

    /// Has everything that was written so far stored, as a guest does before it commits.
    ///
    /// # Errors
    /// libvirt's.
    pub fn flush(&self, target: &str) -> Result<()> {
        self.ask_qemu_io(target, "flush", "").map(drop)
    }

    /// The image that a disk writes to, which may be an overlay.
    ///
    /// # Errors
    /// When the VM has no such disk.
    pub fn active(&self, target: &str) -> Result<PathBuf> {
        let list = self.hypervisor.virsh(&["domblklist", &self.name])?;
        let mut words = list.lines().map(str::split_whitespace);
        let path = words.find_map(|mut words| (words.next() == Some(target)).then(|| words.next())?);
        Ok(path.with_context(|| format!("{} has no disk {target}", self.name))?.into())
    }

    /// All images that a disk consists of, the one that is written first.
    ///
    /// # Errors
    /// When the VM has no such disk.
    pub fn layers(&self, target: &str) -> Result<Vec<PathBuf>> {
        let mut layers = vec![self.active(target)?];
        while let Some(next) = info(&layers[layers.len() - 1])?["full-backing-filename"].as_str() {
            layers.push(next.into());
        }
        Ok(layers)
    }

    /// Makes a disk and plugs it, whether the VM runs or not.
    ///
    /// # Errors
    /// When qemu-img or libvirt says no.
    pub fn plug(&self, disk: &Disk) -> Result<()> {
        self.make(disk)?;
        self.plug_again(disk)
    }

    /// Plugs a disk whose image is there, whether the VM runs or not.
    ///
    /// # Errors
    /// When libvirt says no.
    pub fn plug_again(&self, disk: &Disk) -> Result<()> {
        let file = self.dir.join("plugged.xml");
        fs::write(&file, self.described(disk))?;
        let (name, file) = (self.name.as_str(), file.to_string_lossy());
        let mut attach = vec!["attach-device", name, &file, "--config"];
        if self.runs()? {
            attach.push("--live");
        }
        self.hypervisor.virsh(&attach).map(drop)
    }

    /// Unplugs a disk and removes its images, whether the VM runs or not. Without an operating system that answers, a
    /// running VM lets go of it at a reset.
    ///
    /// # Errors
    /// libvirt's.
    pub fn unplug(&self, target: &str) -> Result<()> {
        let layers = self.layers(target)?;
        let (name, node) = (self.name.as_str(), &self.hypervisor);
        node.virsh(&["detach-disk", name, target, "--config"])?;
        if self.runs()? {
            node.virsh(&["detach-device-alias", name, &format!("ua-{target}"), "--live"])?;
            node.virsh(&["reset", name])?;
            wait_until(Duration::from_secs(20), "the disk to be unplugged", || {
                Ok(self.active(target).is_err().then_some(()))
            })?;
        }
        Ok(layers.iter().try_for_each(fs::remove_file)?)
    }

    /// Makes a disk larger, or cuts it, whether the VM runs or not.
    ///
    /// # Errors
    /// When qemu-img or libvirt says no.
    pub fn resize(&self, target: &str, size: u64) -> Result<()> {
        if self.runs()? {
            self.hypervisor.virsh(&["blockresize", &self.name, target, &format!("{size}b")])?;
        } else {
            let active = self.active(target)?;
            let format = info(&active)?["format"].as_str().unwrap_or("raw").to_owned();
            run(Command::new("qemu-img")
                .args(["resize", "-q", "--shrink", "-f", &format])
                .arg(active)
                .arg(size.to_string()))?;
        }
        Ok(OpenOptions::new().write(true).open(self.mirror(target))?.set_len(size)?)
    }

    /// An external snapshot of these disks and no other, without memory: each goes on in an overlay.
    ///
    /// # Errors
    /// libvirt's.
    pub fn snapshot(&self, targets: &[&str]) -> Result<()> {
        let overlay = |target: &str, number: usize| self.dir.join(format!("{target}.overlay-{number}"));
        let is_free = |number: &usize| targets.iter().all(|target| !overlay(target, *number).exists());
        let number = (0..).find(is_free).context("no name is free")?;
        let specs = targets
            .iter()
            .map(|target| format!("{target},snapshot=external,file={}", overlay(target, number).display()));
        let list = self.hypervisor.virsh(&["domblklist", &self.name])?;
        let all = list.lines().skip(2).filter_map(|line| line.split_whitespace().next());
        // libvirt takes those along that are not mentioned
        let others = all.filter(|disk| !targets.contains(disk)).map(|disk| format!("{disk},snapshot=no"));
        let specs: Vec<_> = specs.chain(others).flat_map(|spec| ["--diskspec".to_owned(), spec]).collect();
        let mut create =
            vec!["snapshot-create-as", self.name.as_str(), "--disk-only", "--atomic", "--no-metadata"];
        create.extend(specs.iter().map(String::as_str));
        self.hypervisor.virsh(&create).map(drop)
    }

    /// Commits the overlays of a disk to the lowest image, which is written from then on, and removes them.
    ///
    /// # Errors
    /// libvirt's.
    pub fn commit(&self, target: &str) -> Result<()> {
        let layers = self.layers(target)?;
        if layers.len() > 1 {
            let commit = ["blockcommit", &self.name, target, "--active", "--pivot", "--wait"];
            self.hypervisor.virsh(&commit)?;
        }
        Ok(layers.iter().rev().skip(1).try_for_each(fs::remove_file)?)
    }

    /// Whether it runs.
    ///
    /// # Errors
    /// libvirt's.
    pub fn runs(&self) -> Result<bool> {
        Ok(self.state()? == "running")
    }
}

/// What qemu-img knows of an image, also of one that a QEMU holds.
///
/// # Errors
/// qemu-img's.
pub fn info(image: &Path) -> Result<Value> {
    let info =
        Command::new("qemu-img").args(["info", "--force-share", "--output=json"]).arg(image).output()?;
    serde_json::from_slice(&info.stdout).with_context(|| {
        format!("qemu-img info {}: {}", image.display(), String::from_utf8_lossy(&info.stderr))
    })
}
