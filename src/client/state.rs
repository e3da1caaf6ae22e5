//! What is known of a restore point that is being written, so that a successor goes on with it, and whether all of its VmBackup
//! is in it. It never touches a file; `folder` keeps it.

use std::collections::BTreeMap;

use kube::ResourceExt as _;
use serde::{Deserialize, Serialize};

use super::kubernetes::RUN;
use super::manifest::{Base, Checkpoint, DiskFormat, Parent, ReadMode};
use super::plan::Total;
use super::progress::Done;
use crate::api::{BackupDisk, VmBackup};

/// The version of the state that is written.
pub const VERSION: u32 = 2;

/// What a backup was asked to be.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Incremental where it can, full where not.
    Auto,
    /// All of every disk.
    Full,
    /// What changed, over what is there.
    Incremental,
}

/// Why what is here is not all of a backup.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Incomplete {
    /// Its VmBackup was not seen Ready, or has no disk.
    #[error("nothing of it was read")]
    Nothing,
    /// One of its disks.
    #[error("disk {0} was not read to its end")]
    Disk(String),
    /// There is a disk that it does not have.
    #[error("disk {0} is not in it")]
    Other(String),
    /// A disk has another size than the backup says.
    #[error("disk {disk} has {read} bytes, and not the {told} of its VmBackup")]
    Size {
        /// Which.
        disk: String,
        /// The size that was read.
        read: u64,
        /// The size in the status.
        told: u64,
    },
}

/// What is known of a restore point that is being written.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct State {
    /// The version of this file.
    pub version: u32,
    /// The name of the restore point, and of its VmBackup.
    pub point: String,
    /// What the VmBackup's annotation says, by which it is known before its uid is. Absent when it was made by another command.
    pub run: Option<String>,
    /// The VM.
    pub vm: String,
    /// Its namespace.
    pub namespace: String,
    /// What was asked for.
    pub kind: Kind,
    /// The format of the files.
    pub format: DiskFormat,
    /// The LibvirtDomain's status when it began.
    pub domain: serde_json::Value,
    /// The restore point that incremental disks lie over, and its checkpoint.
    pub parent: Option<(Parent, Checkpoint)>,
    /// The VmBackup as it was seen last, once it was Ready: one of the same name with another uid is another one.
    pub backup: Option<VmBackup>,
    /// The checkpoint that it makes.
    pub checkpoint: Option<Checkpoint>,
    /// Of each disk, what is there.
    pub disks: BTreeMap<String, DiskState>,
}

/// One disk of it.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct DiskState {
    /// How it is read.
    pub mode: ReadMode,
    /// Why in full.
    pub reason: Option<String>,
    /// The file.
    pub file: String,
    /// What the file lies over.
    pub base: Option<Base>,
    /// Its virtual size and its work, once the extents were read.
    pub work: Option<(u64, Total)>,
    /// Whether the image was made.
    pub made: bool,
    /// What of it is done, and on stable storage.
    pub done: Done,
    /// Whether all of it is.
    pub complete: bool,
}

impl State {
    /// Of a restore point that begins.
    #[must_use]
    pub fn new(point: &str, vm: &str, namespace: &str, kind: Kind, format: DiskFormat) -> Self {
        Self {
            version: VERSION,
            point: point.to_owned(),
            run: None,
            vm: vm.to_owned(),
            namespace: namespace.to_owned(),
            kind,
            format,
            domain: serde_json::Value::Null,
            parent: None,
            backup: None,
            checkpoint: None,
            disks: BTreeMap::new(),
        }
    }

    /// Notes the VmBackup as it is now.
    pub fn saw(&mut self, backup: &VmBackup) {
        let mut backup = backup.clone();
        // longer than all the rest, and nobody asks for them
        backup.metadata.managed_fields = None;
        self.backup = Some(backup);
    }

    /// Whether `found` is the VmBackup that this is of, and not a later one of its name.
    #[must_use]
    pub fn is_of(&self, found: &VmBackup) -> bool {
        match &self.backup {
            Some(known) => known.uid() == found.uid(),
            None => self.run.is_some() && found.annotations().get(RUN) == self.run.as_ref(),
        }
    }

    /// What the VmBackup says of a disk.
    #[must_use]
    pub fn told(&self, disk: &str) -> Option<&BackupDisk> {
        let told = self.backup.as_ref()?.status.as_ref()?.disks.iter();
        told.into_iter().find(|told| told.name == disk)
    }

    /// The size of a disk in bytes, as the VmBackup says it.
    #[must_use]
    pub fn size(&self, disk: &str) -> Option<u64> {
        self.told(disk)?.size.and_then(|size| u64::try_from(size).ok())
    }

    /// The VmBackup, when all of it is here: each of its disks, to its end, and no other.
    ///
    /// # Errors
    /// What is not.
    pub fn whole(&self) -> Result<&VmBackup, Incomplete> {
        let backup = self.backup.as_ref().ok_or(Incomplete::Nothing)?;
        let told = backup.status.as_ref().map(|status| status.disks.as_slice()).unwrap_or_default();
        if told.is_empty() {
            return Err(Incomplete::Nothing);
        }
        for BackupDisk { name, .. } in told {
            let read = self.disks.get(name).filter(|disk| disk.complete).and_then(|disk| disk.work);
            let (read, _) = read.ok_or_else(|| Incomplete::Disk(name.clone()))?;
            if let Some(told) = self.size(name).filter(|told| *told != read) {
                return Err(Incomplete::Size { disk: name.clone(), read, told });
            }
        }
        match self.disks.keys().find(|name| self.told(name).is_none()) {
            Some(other) => Err(Incomplete::Other(other.clone())),
            None => Ok(backup),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// A VmBackup of `db01` with these disks, for the tests of others.
    pub(crate) fn backup(name: &str, uid: &str, phase: &str, disks: &[&str]) -> VmBackup {
        let disk = |name: &&str| json!({"name": name, "mode": "Full", "size": 1 << 20, "inCheckpoint": true});
        let disks: Vec<_> = disks.iter().map(disk).collect();
        let object = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmBackup",
            "metadata": {"name": name, "namespace": "vms", "uid": uid, "annotations": {RUN: "r"}},
            "spec": {"vm": "db01"},
            "status": {"phase": phase, "disks": disks, "vmUuid": "u-1", "readyTime": "2026-11-30T22:15:09Z"}});
        serde_json::from_value(object).unwrap()
    }

    /// A disk that was read.
    pub(crate) fn read(disk: &str) -> DiskState {
        DiskState {
            mode: ReadMode::Full,
            reason: None,
            file: format!("{disk}.full.qcow2"),
            base: None,
            work: Some((1 << 20, Total::default())),
            made: true,
            done: Done::default(),
            complete: true,
        }
    }

    /// The state of a backup of `db01` of which `vda` was read.
    pub(crate) fn state(backup: Option<&VmBackup>) -> State {
        let mut state = State::new("db01-1", "db01", "vms", Kind::Auto, DiskFormat::Qcow2);
        state.run = Some("r".to_owned());
        state.disks.insert("vda".to_owned(), read("vda"));
        if let Some(backup) = backup {
            state.saw(backup);
        }
        state
    }

    #[test]
    fn whole_is_each_disk_of_the_backup_to_its_end_and_no_other() {
        let of = |disks: &[&str]| state(Some(&backup("db01-1", "u", "Ready", disks)));
        assert!(of(&["vda"]).whole().is_ok());
        assert_eq!(of(&["vda", "vdb"]).whole(), Err(Incomplete::Disk("vdb".to_owned())));
        assert_eq!(of(&[]).whole(), Err(Incomplete::Nothing));
        assert_eq!(state(None).whole(), Err(Incomplete::Nothing));
        assert_eq!(of(&["vdb"]).whole(), Err(Incomplete::Disk("vdb".to_owned())));
        let mut more = of(&["vda"]);
        more.disks.insert("vdb".to_owned(), read("vdb"));
        assert_eq!(more.whole(), Err(Incomplete::Other("vdb".to_owned())));
        let mut cut = of(&["vda"]);
        cut.disks.entry("vda".to_owned()).and_modify(|disk| disk.complete = false);
        assert_eq!(cut.whole(), Err(Incomplete::Disk("vda".to_owned())));
        let mut other = of(&["vda"]);
        other.disks.entry("vda".to_owned()).and_modify(|disk| disk.work = Some((512, Total::default())));
        assert!(matches!(other.whole(), Err(Incomplete::Size { read: 512, .. })));
    }

    #[test]
    fn a_later_backup_of_the_same_name_is_another_one() {
        let first = backup("db01-1", "u", "Ready", &["vda"]);
        let later = backup("db01-1", "another", "Ready", &["vda"]);
        // by its mark, until its uid is known; a mark can be copied with a manifest, a uid cannot
        assert!(state(None).is_of(&first) && state(None).is_of(&later));
        assert!(state(Some(&first)).is_of(&first) && !state(Some(&first)).is_of(&later));
        let mut of_download = state(None);
        of_download.run = None;
        assert!(!of_download.is_of(&first));
    }
}
