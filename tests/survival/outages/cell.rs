//! One row of the table: a VM, its backups, and what is asked of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kube::Resource;
use kube::core::ApiResource;
use serde_json::{Value, json};
use virtmark::api::{ImageTransfer, VmBackup, VmCheckpoint};
use virtmark::outage::Moment;
use virtmark_bed::guest;
use virtmark_bed::ledger::Process;
use virtmark_bed::{Bed, Disk, Plan, Vm, compare};

use super::super::rig::{MIB, Ticket, objects::Objects};

/// Long enough for a loaded machine, and for the pauses of those that try again.
pub(super) const BOUND: Duration = Duration::from_secs(90);

/// How often the API is asked. Many ask at the same time.
const PACE: Duration = Duration::from_millis(100);

/// A VM, and the moment that its backups are brought to.
pub struct Cell {
    pub moment: Moment,
    pub vm: Vm,
    pub(super) disk: &'static str,
    pub(super) objects: Arc<Objects>,
    pub(super) holds: PathBuf,
    pub(super) files: tempfile::TempDir,
    pub(super) made: Vec<String>,
    pub(super) held: Option<PathBuf>,
    pub(super) stopped: Option<Process>,
    /// The QEMU of a guest that is up.
    pub(super) booted: Option<Process>,
    pub(super) reader: Option<(Child, PathBuf)>,
    pub(super) count: u8,
}

impl Cell {
    pub fn new(moment: Moment, bed: &Bed, objects: Arc<Objects>, holds: &Path) -> Result<Self> {
        let name = format!("outage-{moment:?}").to_lowercase();
        let hypervisor = &bed.hypervisors[1];
        let size = if moment == Moment::Reading { 48 } else { 8 };
        let (vm, disk) = match moment {
            Moment::Frozen => {
                let disks = [Disk::qcow2("vdb", size * MIB)];
                (guest::Image::get()?.boot(&name, hypervisor, disks)?, "vdb")
            }
            _ => (Plan::new(&name).disk(Disk::qcow2("vda", size * MIB)).start(hypervisor)?, "vda"),
        };
        Ok(Self {
            moment,
            booted: if moment == Moment::Frozen { Some(vm.qemu()?) } else { None },
            vm,
            disk,
            objects,
            holds: holds.to_owned(),
            files: tempfile::tempdir()?,
            made: Vec::new(),
            held: None,
            stopped: None,
            reader: None,
            count: 0,
        })
    }

    /// Makes a backup of what the disk holds now.
    pub(super) fn backup(&mut self) -> Result<String> {
        self.backup_quiesced(if self.moment == Moment::Frozen { "BestEffort" } else { "None" })
    }

    pub(super) fn backup_quiesced(&mut self, mode: &str) -> Result<String> {
        self.count += 1;
        let name = format!("{}-{}", self.vm.name, self.count);
        if self.vm.state()? == "running" {
            self.vm.write(self.disk, u64::from(self.count) * 65536, MIB, self.count)?;
        }
        self.vm.remember(self.disk)?;
        self.made.push(name.clone());
        let spec = json!({"vm": self.vm.name, "disks": [self.disk], "quiesce": {"mode": mode}});
        self.objects.create::<VmBackup>(&name, &json!({}), &spec)?;
        Ok(name)
    }

    /// The last backup that was made.
    pub(super) fn last(&self) -> Result<&str> {
        self.made.last().map(String::as_str).context("nothing was made")
    }

    pub(super) fn until<T>(&self, what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let began = Instant::now();
        loop {
            if let Some(answer) = ask()? {
                return Ok(answer);
            }
            ensure!(began.elapsed() < BOUND, "waited {} s in vain for {what}", BOUND.as_secs());
            std::thread::sleep(PACE);
        }
    }

    /// Waits for a phase of a backup, and for a reason if one is given. Another end is an error at once.
    pub(super) fn phase(&self, name: &str, phase: &str, reason: Option<&str>) -> Result<()> {
        let what = format!("be {phase} {reason:?}");
        self.wait::<VmBackup>(name, &what, |object| {
            let status = &object["status"];
            let (now, why) = (status["phase"].as_str().unwrap_or_default(), ready(status));
            if now == phase && reason.is_none_or(|reason| why["reason"] == reason) {
                return Ok(true);
            }
            if ["Succeeded", "Failed"].contains(&now) {
                bail!("{name} is {now}, not {phase} {reason:?}: {status}");
            }
            Ok(false)
        })
    }

    pub(super) fn gone<K: Resource<DynamicType = ()>>(&self, name: &str) -> Result<()> {
        self.wait::<K>(name, "go", |object| Ok(object.is_null()))
    }

    fn wait<K: Resource<DynamicType = ()>>(
        &self,
        name: &str,
        what: &str,
        holds: impl FnMut(&Value) -> Result<bool>,
    ) -> Result<()> {
        self.objects.wait(&ApiResource::erase::<K>(&()), BOUND, name, what, holds).map(drop)
    }

    pub(super) fn ticket(&self, backup: &str) -> Result<Ticket> {
        let transfer = format!("{backup}-{}", self.disk);
        let name = self.until(&format!("{transfer} to be Ready"), || {
            let status = self.objects.get::<ImageTransfer>(&transfer)?["status"].clone();
            let is_ready = status["phase"] == "Ready";
            Ok(status["ticketSecret"].as_str().filter(|_| is_ready).map(str::to_owned))
        })?;
        self.objects.secret(&name, self.files.path())
    }

    pub(super) fn remembered(&self) -> PathBuf {
        self.vm.mirror(self.disk).with_extension("remembered")
    }

    /// Reads the disk of a backup that is Ready, while the guest writes, and compares.
    pub(super) fn read(&self, backup: &str) -> Result<()> {
        self.vm.write(self.disk, 0, 65536, 0xee)?;
        let image = self.files.path().join(format!("{backup}.raw"));
        let ticket = self.ticket(backup)?;
        let said = ticket.curl(&["-o", &image.to_string_lossy()])?;
        ensure!(said == "200", "HTTP {said}");
        compare(&self.remembered(), &image, "raw")
    }

    /// From Ready, or on the way there, to Succeeded.
    pub(super) fn succeed(&self, backup: &str) -> Result<()> {
        self.phase(backup, "Ready", None)?;
        self.read(backup)?;
        self.objects.state::<VmBackup>(backup, "Finalized")?;
        self.phase(backup, "Succeeded", None)
    }

    /// Ends the last backup.
    pub(super) fn cancel(&self) -> Result<()> {
        let name = self.last()?;
        self.phase(name, "Ready", None)?;
        self.objects.state::<VmBackup>(name, "Cancelled")?;
        self.phase(name, "Failed", Some("Cancelled"))
    }

    pub(super) fn checkpoint(&self, backup: &str) -> Result<String> {
        let status = self.objects.get::<VmBackup>(backup)?["status"].clone();
        Ok(status["toCheckpoint"].as_str().context("no toCheckpoint")?.to_owned())
    }

    /// Lets go what was held.
    pub(super) fn let_go(&mut self) -> Result<()> {
        match self.held.take() {
            Some(held) => Ok(fs::remove_file(held)?),
            None => Ok(()),
        }
    }

    /// Lets everything go on that stood still for the moment.
    pub(super) fn release(&mut self) -> Result<()> {
        if let Some(qemu) = self.stopped.take() {
            qemu.resume();
        }
        self.let_go()
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        // a test that failed says why already
        let _ = self.release();
        if let Some((mut curl, _)) = self.reader.take() {
            let _ = curl.kill();
            let _ = curl.wait();
        }
        for name in &self.made {
            let _ = self.objects.delete::<VmBackup>(name);
        }
        for checkpoint in self.objects.list::<VmCheckpoint>().unwrap_or_default() {
            if checkpoint["spec"]["vm"] == self.vm.name.as_str() {
                let name = checkpoint["metadata"]["name"].as_str().unwrap_or_default();
                let _ = self.objects.delete::<VmCheckpoint>(name);
            }
        }
    }
}

/// The condition `Ready`.
pub(super) fn ready(status: &Value) -> Value {
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    conditions.into_iter().find(|condition| condition["type"] == "Ready").unwrap_or_default()
}
