//! What it comes to: the end that the table names, nothing left, and a next backup that is right.

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Secret;
use serde_json::Value;
use virtmark::api::{ImageTransfer, LibvirtDomain, VmBackup, VmCheckpoint};
use virtmark::outage::{self, End, Moment, Outage};
use virtmark_bed::compare;

use super::cell::Cell;

impl Cell {
    /// What was expected of this moment comes, and nothing is left. The outage is over.
    pub fn ends(&mut self, outage: Outage) -> Result<()> {
        let expected = outage::end(self.moment, outage);
        let name = self.last()?.to_owned();
        match expected {
            End::Waits(reason) => {
                if outage != Outage::Libvirtd {
                    self.phase(&name, "Initializing", Some(reason.as_str()))?;
                }
                self.start()?;
            }
            End::Fails(reason) => self.phase(&name, "Failed", Some(reason.as_str()))?,
            End::Natural => {}
        }
        if self.vm.state().is_err() {
            // undefined while it was off
            self.vm.redefine()?;
        }
        if self.vm.state()? != "running" {
            self.vm.start()?;
        }
        if !matches!(expected, End::Fails(_)) {
            self.natural_end(&name, outage)?;
        }
        self.is_clean().context("after its end")?;
        let again = self.moment.natural() != "Succeeded" || matches!(expected, End::Fails(_));
        if again || self.moment == Moment::Succeeded {
            self.until("the VM to be published as running", || {
                let published = self.objects.get::<LibvirtDomain>(&self.vm.name)?;
                let state = published["status"]["state"].as_str();
                Ok((state == Some("Running") && published["spec"]["uuid"] == self.vm.uuid).then_some(()))
            })?;
            let next = self.backup()?;
            self.succeed(&next).context("the next backup")?;
        }
        if outage == Outage::Undefined {
            self.vm.redefine()?;
        }
        self.clear()
    }

    pub(super) fn natural_end(&mut self, name: &str, outage: Outage) -> Result<()> {
        match self.moment {
            Moment::VmOff | Moment::Bound | Moment::Frozen | Moment::Beginning | Moment::Ready => {
                self.succeed(name)
            }
            Moment::Queued => {
                let first = self.made[self.made.len() - 2].clone();
                match outage.stops_the_vm() {
                    true => self.phase(&first, "Failed", Some("VmStopped"))?,
                    false => self.succeed(&first)?,
                }
                self.vm.remember(self.disk)?;
                self.succeed(name)
            }
            Moment::Reading => {
                let (mut curl, image) = self.reader.take().context("no reader")?;
                ensure!(curl.wait()?.success(), "the reader was disturbed");
                compare(&self.remembered(), &image, "raw")?;
                self.objects.state::<VmBackup>(name, "Finalized")?;
                self.phase(name, "Succeeded", None)
            }
            Moment::Unread => {
                self.read(name)?;
                self.phase(name, "Succeeded", None)
            }
            Moment::Finalizing | Moment::JobEnded | Moment::Forgotten | Moment::Succeeded => {
                self.phase(name, "Succeeded", None)
            }
            Moment::Failing | Moment::Failed => self.phase(name, "Failed", Some("Cancelled")),
            Moment::Deleting => self.gone::<VmBackup>(name),
            Moment::CheckpointHeld => {
                let first = self.made[self.made.len() - 2].clone();
                match outage.stops_the_vm() {
                    true => self.phase(name, "Failed", Some("VmStopped"))?,
                    false => self.succeed(name)?,
                }
                self.gone::<VmCheckpoint>(&self.checkpoint(&first)?)
            }
            Moment::CheckpointGoing => self.gone::<VmCheckpoint>(&self.checkpoint(name)?),
        }
    }

    /// The bitmaps of ours in the disk of the VM, which runs.
    pub(super) fn bitmaps(&self) -> Result<Vec<String>> {
        Ok(self.vm.live_bitmaps()?.into_iter().filter(|name| name.starts_with("virtmark-")).collect())
    }

    /// Nothing is left on the host and in the API but usable checkpoints and their bitmaps.
    pub(super) fn is_clean(&self) -> Result<()> {
        let mut left = String::new();
        self.until("nothing to be left", || {
            left = self.leftovers()?;
            Ok(left.is_empty().then_some(()))
        })
        .with_context(|| left.clone())
    }

    pub(super) fn leftovers(&self) -> Result<String> {
        let node = self.vm.hypervisor();
        let job = node.virsh(&["domjobinfo", &self.vm.name])?;
        if !job.contains("None") {
            return Ok(format!("a job: {job}"));
        }
        let noted = node.virsh(&["checkpoint-list", "--name", &self.vm.name])?;
        if !noted.trim().is_empty() {
            return Ok(format!("libvirt's note of {noted}"));
        }
        let ours = |object: &Value| {
            object["metadata"]["name"]
                .as_str()
                .is_some_and(|name| self.made.iter().any(|made| name.starts_with(made)))
        };
        let all = [
            ("vmbackup", self.objects.list::<VmBackup>()?),
            ("imagetransfer", self.objects.list::<ImageTransfer>()?),
            ("vmcheckpoint", self.objects.list::<VmCheckpoint>()?),
        ];
        for (kind, objects) in all {
            let going = |object: &&Value| !object["metadata"]["deletionTimestamp"].is_null();
            if let Some(object) = objects.iter().filter(|object| ours(object)).find(going) {
                return Ok(format!("{kind} {} does not go", object["metadata"]["name"]));
            }
        }
        for backup in self.objects.list::<VmBackup>()?.iter().filter(|object| ours(object)) {
            let uid = backup["metadata"]["uid"].as_str().unwrap_or_default();
            for folder in ["run", "state/backups"] {
                let path = node.dir.join("agent").join(folder).join(uid);
                if path.exists() {
                    return Ok(format!("{} is left", path.display()));
                }
            }
        }
        let mut owners = self.objects.list::<ImageTransfer>()?;
        owners.retain(|object| ours(object));
        for secret in self.objects.list::<Secret>()? {
            let owner = &secret["metadata"]["ownerReferences"][0]["uid"];
            if owners.iter().any(|transfer| transfer["metadata"]["uid"] == *owner) {
                return Ok(format!("Secret {} is left", secret["metadata"]["name"]));
            }
        }
        let mut named = Vec::new();
        for checkpoint in self.objects.list::<VmCheckpoint>()?.iter().filter(|object| ours(object)) {
            let conditions = checkpoint["status"]["conditions"].as_array().cloned().unwrap_or_default();
            // a bitmap that went with its QEMU is told of, once it was looked at
            let settled = |c: &Value| c["status"] == "True" || c["reason"] == "CheckpointInvalid";
            if !conditions.iter().any(|c| c["type"] == "Usable" && settled(c)) {
                return Ok(format!(
                    "checkpoint {} is not usable: {conditions:?}",
                    checkpoint["metadata"]["name"]
                ));
            }
            named.push(checkpoint["spec"]["bitmap"].clone());
        }
        let orphan = self.bitmaps()?.into_iter().find(|bitmap| !named.iter().any(|named| named == bitmap));
        Ok(orphan.map(|bitmap| format!("bitmap {bitmap} is nobody's")).unwrap_or_default())
    }

    /// Deletes all that was made: then no bitmap is left at all.
    pub(super) fn clear(&mut self) -> Result<()> {
        let checkpoints = self.objects.list::<VmCheckpoint>()?;
        let of_vm = checkpoints.iter().filter(|checkpoint| checkpoint["spec"]["vm"] == self.vm.name.as_str());
        let names: Vec<_> = of_vm
            .filter_map(|checkpoint| checkpoint["metadata"]["name"].as_str().map(str::to_owned))
            .collect();
        for name in &self.made {
            self.objects.delete::<VmBackup>(name)?;
        }
        for name in &names {
            self.objects.delete::<VmCheckpoint>(name)?;
        }
        for name in std::mem::take(&mut self.made) {
            self.gone::<VmBackup>(&name)?;
        }
        for name in names {
            self.gone::<VmCheckpoint>(&name)?;
        }
        let bitmaps = self.bitmaps()?;
        ensure!(bitmaps.is_empty(), "bitmaps of deleted checkpoints are left: {bitmaps:?}");
        Ok(())
    }
}
