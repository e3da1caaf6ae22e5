//! From what is wanted to a VmBackup, and from what was read to a manifest: pure, values in, values out.

use kube::ResourceExt as _;

use super::backup::Wanted;
use super::kubernetes::RUN;
use super::manifest::{self, Base, DiskFormat, Manifest, Outcome, ReadMode};
use super::names;
use super::state::{DiskState, State};
use crate::api::{
    BackupDisk, BackupType, DiskMode, LABEL_OWNER, Phase, Quiesce, VmBackup, VmBackupSpec, VmBackupStatus,
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
    let is_from_there = |below: &&Manifest| {
        state.parent.as_ref().is_some_and(|(parent, checkpoint)| {
            parent.uid == below.backup.uid && Some(&checkpoint.name) == status.from_checkpoint.as_ref()
        })
    };
    let base = below.filter(is_from_there).filter(|_| disk.mode == DiskMode::Incremental);
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
    all: &State,
    bytes: u64,
    blake3: String,
) -> manifest::Disk {
    let disks = all.domain["disks"].as_array().into_iter().flatten();
    let known = disks.into_iter().find(|disk| disk["target"] == name);
    let (size, total) = state.work.unwrap_or_default();
    manifest::Disk {
        target: name.to_owned(),
        serial: known.and_then(|disk| disk["serial"].as_str()).map(str::to_owned),
        size,
        mode: state.mode,
        mode_reason: state.reason.clone(),
        in_checkpoint: all.told(name).is_some_and(|disk| disk.in_checkpoint),
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

/// The manifest of what was read of a VmBackup.
pub(super) fn manifest(state: &State, backup: &VmBackup, disks: Vec<manifest::Disk>) -> Manifest {
    let status = backup.status.clone().unwrap_or_default();
    let is_incremental = disks.iter().any(|disk| disk.mode == ReadMode::Incremental);
    Manifest {
        version: manifest::VERSION,
        name: state.point.clone(),
        client: format!("virtmark {}", env!("CARGO_PKG_VERSION")),
        vm: manifest::Vm {
            name: state.vm.clone(),
            namespace: state.namespace.clone(),
            uuid: status.vm_uuid.unwrap_or_default(),
            status: state.domain.clone(),
            domain_xml: None,
        },
        backup: manifest::Backup {
            name: backup.name_any(),
            uid: backup.uid().unwrap_or_default(),
            node: status.node_name,
            outcome: match status.phase {
                Phase::Succeeded => Outcome::Succeeded,
                _ => Outcome::Read,
            },
        },
        taken_at: status.ready_time.map(|time| time.0.to_string()).unwrap_or_default(),
        quiesced: conditions::is_true(&status.conditions, conditions::QUIESCED),
        checkpoint: state.checkpoint.clone(),
        parent: state.parent.as_ref().filter(|_| is_incremental).map(|(parent, _)| parent.clone()),
        disks,
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::example;
    use super::super::manifest::{Checkpoint, Parent};
    use super::super::state::Kind;
    use super::*;
    use serde_json::json;

    fn state(parent: bool) -> State {
        let mut state = State::new("b", "db01", "vms", Kind::Auto, DiskFormat::Qcow2);
        let there = Parent { name: "a".to_owned(), uid: "uid-a".to_owned() };
        let checkpoint = Checkpoint { name: "cp-a".to_owned(), bitmap: "bm-a".to_owned() };
        state.parent = parent.then_some((there, checkpoint));
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
        let mut other = below.clone();
        other.backup.uid = "of a later one of its name".to_owned();
        let rows = [
            ("Incremental", "cp-a", true, Some(&below), "Incremental", None),
            ("Incremental", "cp-other", true, Some(&below), "Full", Some(NO_BASE_HERE)),
            ("Incremental", "cp-a", false, Some(&below), "Full", Some(NO_BASE_HERE)),
            ("Incremental", "cp-a", true, None, "Full", Some(NO_BASE_HERE)),
            ("Incremental", "cp-a", true, Some(&without), "Full", Some(NO_BASE_HERE)),
            ("Incremental", "cp-a", true, Some(&other), "Full", Some(NO_BASE_HERE)),
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
        let mut all = state(true);
        all.domain = json!({"disks": [{"target": "vda", "serial": "s-1"}]});
        all.saw(&super::super::state::tests::backup("b", "u", "Ready", &["vda"]));
        let disk = described("vda", &found, &all, 7, "00".to_owned());
        assert_eq!((disk.serial.as_deref(), disk.in_checkpoint, disk.bytes), (Some("s-1"), true, 7));
        let mut object =
            object("b", serde_json::from_value(json!({"vm": "db01"})).unwrap(), Some("me"), Some("r"));
        assert_eq!(object.labels()[LABEL_OWNER], "me");
        object.status = Some(VmBackupStatus { phase: Phase::Ready, ..status });
        let manifest = manifest(&state(true), &object, vec![disk]);
        assert_eq!((manifest.parent.as_ref(), manifest.backup.outcome), (None, Outcome::Read));
        assert_eq!(Manifest::parse(&manifest.text()), Ok(manifest));
    }
}
