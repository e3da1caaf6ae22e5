//! How a backup, or the deletion of a checkpoint, is brought to each moment, and made to stand there.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use virtmark::api::{LibvirtDomain, VmBackup, VmCheckpoint};
use virtmark::outage::{Moment, Outage};
use virtmark::step::Step;
use virtmark_bed::{guest, wait_until};

use super::cell::{BOUND, Cell, ready};

impl Cell {
    /// Brings a backup, or a checkpoint, to the moment.
    pub fn stand(&mut self, outage: Outage) -> Result<()> {
        match self.moment {
            Moment::VmOff => {
                if self.vm.state()? == "running" {
                    self.vm.destroy()?;
                }
                self.until("the VM to be published as off", || {
                    let state = self.objects.get::<LibvirtDomain>(&self.vm.name)?["status"]["state"].clone();
                    Ok((state == "Off").then_some(()))
                })?;
                let name = self.backup()?;
                self.phase(&name, "Initializing", Some("VmNotRunning"))
            }
            Moment::Queued => {
                let first = self.backup()?;
                self.phase(&first, "Ready", None)?;
                self.count += 1;
                let second = format!("{}-{}", self.vm.name, self.count);
                self.made.push(second.clone());
                let spec = json!({"vm": self.vm.name, "quiesce": {"mode": "None"}});
                self.objects.create::<VmBackup>(&second, &json!({}), &spec)?;
                self.phase(&second, "Initializing", Some("BackupAlreadyRunning"))
            }
            Moment::Bound => {
                self.hold(Step::RecordStored, &self.next_name())?;
                self.backup()?;
                self.is_held()
            }
            Moment::Frozen => {
                if self.booted != Some(self.vm.qemu()?) {
                    // it was started again a moment ago, and boots for half a minute
                    self.vm.destroy()?;
                    guest::Image::get()?.go_on(&self.vm)?;
                    self.booted = Some(self.vm.qemu()?);
                }
                self.hold(Step::BeginIntended, &self.next_name())?;
                // a guest that was started again has no agent for a while
                self.backup_quiesced(if outage.stops_the_vm() { "BestEffort" } else { "Required" })?;
                self.is_held()?;
                ensure!(guest::is_frozen(&self.vm)?, "the guest is not frozen");
                Ok(())
            }
            Moment::Beginning => Ok(()),
            Moment::Ready | Moment::Reading | Moment::Unread => {
                let name = self.backup()?;
                self.phase(&name, "Ready", None)?;
                if self.moment == Moment::Reading {
                    self.start_reading(&name, outage)?;
                }
                if self.moment == Moment::Unread {
                    self.objects.state::<VmBackup>(&name, "Finalized")?;
                    self.phase(&name, "Ready", Some("TransfersIncomplete"))?;
                }
                Ok(())
            }
            Moment::Finalizing | Moment::JobEnded | Moment::Forgotten => {
                let step = match self.moment {
                    Moment::Finalizing => Step::FinalizeSeen,
                    Moment::JobEnded => Step::JobAborted,
                    _ => Step::CheckpointForgotten,
                };
                let name = self.backup()?;
                self.phase(&name, "Ready", None)?;
                self.read(&name)?;
                self.hold(step, &name)?;
                self.objects.state::<VmBackup>(&name, "Finalized")?;
                self.is_held()
            }
            Moment::Failing => {
                let name = self.backup()?;
                self.phase(&name, "Ready", None)?;
                self.hold(Step::JobAborted, &name)?;
                self.objects.state::<VmBackup>(&name, "Cancelled")?;
                self.is_held()
            }
            Moment::Deleting => {
                let name = self.backup()?;
                self.phase(&name, "Ready", None)?;
                self.hold(Step::CheckpointRemoved, &name)?;
                self.objects.delete::<VmBackup>(&name)?;
                self.is_held()
            }
            Moment::Succeeded => {
                let name = self.backup()?;
                self.succeed(&name)?;
                if outage == Outage::QemuKilled {
                    // a bitmap that was stored, and that a killed QEMU leaves inconsistent
                    self.vm.destroy()?;
                    self.vm.start()?;
                }
                Ok(())
            }
            Moment::Failed => {
                self.backup()?;
                self.cancel()
            }
            Moment::CheckpointHeld | Moment::CheckpointGoing => {
                let first = self.backup()?;
                self.succeed(&first)?;
                if self.moment == Moment::CheckpointHeld {
                    let second = self.backup()?;
                    self.phase(&second, "Ready", None)?;
                    self.delete_checkpoint(&first)?;
                }
                Ok(())
            }
        }
    }

    /// The same, for what needs a QEMU that stands still: whoever asks it anything waits, and others behind them. So
    /// all others stand already.
    pub fn stand_still(&mut self) -> Result<()> {
        match self.moment {
            Moment::Beginning => {
                for _ in 0..5 {
                    self.hold(Step::BeginIntended, &self.next_name())?;
                    let name = self.backup()?;
                    self.is_held()?;
                    self.stop_qemu()?;
                    self.let_go()?;
                    let asked =
                        wait_until(Duration::from_secs(5), "the begin to be in libvirt's hands", || {
                            let kept = self.vm.hypervisor().kept_status(&self.vm.name)?;
                            Ok(kept.contains("async='backup'").then_some(()))
                        });
                    if asked.is_ok() {
                        return Ok(());
                    }
                    // somebody else's question was first
                    self.release()?;
                    self.objects.state::<VmBackup>(&name, "Cancelled")?;
                    self.phase(&name, "Failed", Some("Cancelled"))?;
                }
                bail!("no begin was ever in libvirt's hands")
            }
            Moment::CheckpointGoing => {
                self.stop_qemu()?;
                self.delete_checkpoint(self.last()?)
            }
            _ => Ok(()),
        }
    }

    /// A hold for the backup that is made next, or is there, at a step.
    pub(super) fn hold(&mut self, step: Step, backup: &str) -> Result<()> {
        fs::write(self.holds.join(format!("{step}@{backup}")), "")?;
        self.held = Some(self.holds.join(format!("held-{step}@{backup}")));
        Ok(())
    }

    pub(super) fn is_held(&self) -> Result<()> {
        let held = self.held.as_ref().context("nothing is held")?;
        wait_until(BOUND, &format!("{} to appear", held.display()), || Ok(held.exists().then_some(())))
    }

    pub(super) fn next_name(&self) -> String {
        format!("{}-{}", self.vm.name, self.count + 1)
    }

    pub(super) fn delete_checkpoint(&self, backup: &str) -> Result<()> {
        let checkpoint = self.checkpoint(backup)?;
        self.objects.delete::<VmCheckpoint>(&checkpoint)?;
        self.until("the deletion of the checkpoint to be under way", || {
            let status = self.objects.get::<VmCheckpoint>(&checkpoint)?["status"].clone();
            let waits = ready(&status)["reason"] == "CheckpointBusy";
            let goes = status["nodeName"].is_string();
            Ok((waits || goes).then_some(()))
        })
    }

    pub(super) fn start_reading(&mut self, backup: &str, outage: Outage) -> Result<()> {
        let ticket = self.ticket(backup)?;
        let image = self.files.path().join(format!("{backup}.raw"));
        // past the end of the outage, or for as long as it takes to get there
        let rate = if outage == Outage::ApiServer { "640k" } else { "6M" };
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--limit-rate", rate, "--max-time", "120", "--cacert"]).arg(&ticket.ca);
        let curl = curl.arg("-o").arg(&image).arg(&ticket.url).stderr(Stdio::null()).spawn()?;
        wait_until(BOUND, "bytes to come", || {
            Ok((fs::metadata(&image).map_or(0, |file| file.len()) > 0).then_some(()))
        })?;
        self.reader = Some((curl, image));
        Ok(())
    }

    pub(super) fn stop_qemu(&mut self) -> Result<()> {
        let qemu = self.vm.qemu()?;
        qemu.pause();
        self.stopped = Some(qemu);
        Ok(())
    }
}
