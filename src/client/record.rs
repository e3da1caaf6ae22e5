//! From what is wanted to a VmBackup, and from what was read to a manifest: pure, values in, values out.

use kube::ResourceExt as _;

use super::backup::Wanted;
use super::folder::{DiskState, State};
use super::kubernetes::RUN;
use super::manifest::{self, Base, DiskFormat, Manifest, Outcome, ReadMode};
use super::names;
use crate::api::{
    BackupDisk, BackupType, DiskMode, LABEL_OWNER, Quiesce, VmBackup, VmBackupSpec, VmBackupStatus,
    conditions,
};

/// What the manifest says of a disk whose base is not here.
pub const NO_BASE_HERE: &str = "NoBaseHere";

/// The spec of a VmBackup.
#[must_use]
pub fn spec(wanted: &Wanted, from: Option<&str>) -> VmBackupSpec {
    let text = serde_json::json!({"vm": wanted.vm});
    // what is left out has the API's defaults
    let mut spec: VmBackupSpec =
        serde_json::from_value(text).unwrap_or_else(|_| unreachable!("vm is all it needs"));
    spec.disks = (!wanted.disks.is_empty()).then(|| wanted.disks.clone());
    spec.backup_type = if from.is_some() { BackupType::Incremental } else { BackupType::Full };
    spec.from_checkpoint = from.map(str::to_owned);
    spec.max_checkpoints = wanted.max_checkpoints;
    spec.quiesce = wanted.quiesce.map(|mode| Quiesce { mode, ..Quiesce::default() });
    spec.start_deadline_seconds = wanted.start_seconds;
    spec
}

/// A VmBackup of ours.
#[must_use]
pub fn object(name: &str, spec: VmBackupSpec, owner: Option<&str>, run: Option<&str>) -> VmBackup {
    let mut object = VmBackup::new(name, spec);
    if let Some(owner) = owner {
        object.labels_mut().insert(LABEL_OWNER.to_owned(), owner.to_owned());
    }
    if let Some(run) = run {
        object.annotations_mut().insert(RUN.to_owned(), run.to_owned());
    }
    object
}

/// How a disk is read: as the backup says, or all of it where what it would lie over is not here.
pub(super) fn mode(
    disk: &BackupDisk,
    status: &VmBackupStatus,
    state: &State,
    below: Option<&Manifest>,
) -> DiskState {
    let format = state.format;
    let from = state.parent.as_ref().map(|(_, checkpoint)| checkpoint.as_str());
    let is_from_there = from.is_some() && from == status.from_checkpoint.as_deref();
    let base = below.filter(|_| is_from_there && disk.mode == DiskMode::Incremental);
    let base = base.and_then(|below| below.disk(&disk.name)).filter(|base| base.in_checkpoint);
    let base = base.map(|base| Base { file: base.file.clone(), format: base.format });
    let (mode, reason) = match (disk.mode, &base) {
        (DiskMode::Incremental, Some(_)) => (ReadMode::Incremental, None),
        (DiskMode::Incremental, None) => (ReadMode::Full, Some(NO_BASE_HERE.to_owned())),
        (DiskMode::Full, _) => (ReadMode::Full, disk.mode_reason.map(|reason| format!("{reason:?}"))),
    };
    let file = names::file(&disk.name, mode, format);
    DiskState {
        mode,
        reason,
        file,
        base,
        work: None,
        made: false,
        done: super::progress::Done::default(),
        complete: false,
    }
}

/// A disk as the manifest says it.
pub(super) fn described(
    name: &str,
    state: &DiskState,
    told: Option<&BackupDisk>,
    domain: &serde_json::Value,
    bytes: u64,
    blake3: String,
) -> manifest::Disk {
    let disks = domain["disks"].as_array().into_iter().flatten();
    let known = disks.into_iter().find(|disk| disk["target"] == name);
    let (size, total) = state.work.unwrap_or_default();
    manifest::Disk {
        target: name.to_owned(),
        serial: known.and_then(|disk| disk["serial"].as_str()).map(str::to_owned),
        size,
        mode: state.mode,
        mode_reason: state.reason.clone(),
        in_checkpoint: told.is_some_and(|disk| disk.in_checkpoint),
        file: state.file.clone(),
        format: match state.file.ends_with(".raw") {
            true => DiskFormat::Raw,
            false => DiskFormat::Qcow2,
        },
        bytes,
        blake3,
        base: state.base.clone(),
        covered: manifest::Covered { read: total.read, zeroed: total.zeroed },
    }
}

/// The manifest of what was read.
pub(super) fn manifest(
    state: &State,
    backup: &VmBackup,
    status: &VmBackupStatus,
    outcome: Outcome,
    checkpoint: Option<manifest::Checkpoint>,
    disks: Vec<manifest::Disk>,
) -> Manifest {
    let is_incremental = disks.iter().any(|disk| disk.mode == ReadMode::Incremental);
    Manifest {
        version: manifest::VERSION,
        name: state.point.clone(),
        client: format!("virtmark {}", env!("CARGO_PKG_VERSION")),
        vm: manifest::Vm {
            name: state.vm.clone(),
            namespace: state.namespace.clone(),
            uuid: status.vm_uuid.clone().unwrap_or_default(),
            status: state.domain.clone(),
            domain_xml: None,
        },
        backup: manifest::Backup {
            name: state.backup.clone(),
            uid: backup.uid().unwrap_or_default(),
            node: status.node_name.clone(),
            outcome,
        },
        taken_at: status.ready_time.as_ref().map(|time| time.0.to_string()).unwrap_or_default(),
        quiesced: conditions::is_true(&status.conditions, conditions::QUIESCED),
        checkpoint,
        parent: state.parent.as_ref().filter(|_| is_incremental).map(|(parent, _)| parent.clone()),
        disks,
    }
}

#[cfg(test)]
mod tests {
    use super::super::folder::Kind;
    use super::super::manifest::Parent;
    use super::super::manifest::tests::example;
    use super::*;
    use serde_json::json;

    fn state(parent: bool) -> State {
        let mut state = State::new("b", "db01", "vms", Kind::Auto, DiskFormat::Qcow2);
        let there = Parent { name: "a".to_owned(), uid: "uid-a".to_owned() };
        state.parent = parent.then(|| (there, "cp-a".to_owned()));
        state
    }

    fn told(mode: &str, from: &str) -> (BackupDisk, VmBackupStatus) {
        let disk = json!({"name": "vda", "mode": mode, "modeReason": "SizeChanged", "inCheckpoint": true});
        let disk = serde_json::from_value(disk).unwrap();
        (disk, VmBackupStatus { from_checkpoint: Some(from.to_owned()), ..VmBackupStatus::default() })
    }

    #[test]
    fn a_disk_is_incremental_only_over_what_its_backup_started_from() {
        let below = example("a", None);
        let mut without = below.clone();
        without.disks[0].in_checkpoint = false;
        let rows = [
            ("Incremental", "cp-a", true, Some(&below), "Incremental", None),
            ("Incremental", "cp-other", true, Some(&below), "Full", Some(NO_BASE_HERE)),
            ("Incremental", "cp-a", false, Some(&below), "Full", Some(NO_BASE_HERE)),
            ("Incremental", "cp-a", true, None, "Full", Some(NO_BASE_HERE)),
            ("Incremental", "cp-a", true, Some(&without), "Full", Some(NO_BASE_HERE)),
            ("Full", "cp-a", true, Some(&below), "Full", Some("SizeChanged")),
        ];
        for (mode, from, parent, below, is, reason) in rows {
            let (disk, status) = told(mode, from);
            let found = super::mode(&disk, &status, &state(parent), below);
            assert_eq!(
                (format!("{:?}", found.mode).as_str(), found.reason.as_deref()),
                (is, reason),
                "{mode} {from}"
            );
            assert_eq!(found.base.is_some(), is == "Incremental");
            let file = if is == "Full" { "vda.full.qcow2" } else { "vda.incr.qcow2" };
            assert_eq!(found.file, file);
        }
    }

    #[test]
    fn a_manifest_names_a_parent_only_when_a_disk_lies_over_it() {
        let (told, status) = told("Full", "cp-a");
        let found = super::mode(&told, &status, &state(true), Some(&example("a", None)));
        let domain = json!({"disks": [{"target": "vda", "serial": "s-1"}]});
        let disk = described("vda", &found, Some(&told), &domain, 7, "00".to_owned());
        assert_eq!((disk.serial.as_deref(), disk.in_checkpoint, disk.bytes), (Some("s-1"), true, 7));
        let object =
            object("b", serde_json::from_value(json!({"vm": "db01"})).unwrap(), Some("me"), Some("r"));
        assert_eq!(object.labels()[LABEL_OWNER], "me");
        let manifest = manifest(&state(true), &object, &status, Outcome::Succeeded, None, vec![disk]);
        assert_eq!(manifest.parent, None);
        assert_eq!(Manifest::parse(&manifest.text()), Ok(manifest));
    }
}
