//! Where an incremental backup starts, and which disks can start there. Pure.
//!
//! Every checkpoint's bitmap records on its own, so any usable one can be a base, also another owner's when it is named.

use kube::ResourceExt as _;

use crate::api::{
    BackupSupport, BackupType, CheckpointDiskStatus, DiskMode, DomainDisk, FullReason,
    InvalidCheckpointPolicy, VmBackup, VmCheckpoint,
};
use crate::controller::chain::{Chain, owner};
use crate::reason::{Because, Reason};

/// What a backup of a disk reads, and why all of it where less was asked for, with more about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mode {
    /// How much.
    pub mode: DiskMode,
    /// Why all.
    pub reason: Option<FullReason>,
    /// More about the reason.
    pub message: Option<String>,
}

impl Mode {
    fn full(reason: Option<FullReason>) -> Self {
        Self { mode: DiskMode::Full, reason, message: None }
    }
}

/// The base of a backup of these disks of the VM with this uuid; `None` when every disk is read in full.
///
/// # Errors
/// Why there is none, where that is an error.
pub fn choose<'a>(
    backup: &VmBackup,
    vm_uuid: &str,
    disks: &[DomainDisk],
    checkpoints: &'a [VmCheckpoint],
) -> Result<Option<&'a VmCheckpoint>, Because> {
    let spec = &backup.spec;
    if spec.backup_type == BackupType::Full {
        return Ok(None);
    }
    let or_full = |because| match spec.on_invalid_checkpoint {
        InvalidCheckpointPolicy::FullBackup => Ok(None),
        InvalidCheckpointPolicy::Fail => Err(because),
    };
    let none_can = || {
        let message = format!("no disk of VM {} that is asked for can keep a dirty bitmap", spec.vm);
        Because::new(Reason::IncrementalNotSupported, message)
    };
    let can = disks.iter().any(|disk| disk.backup == BackupSupport::Incremental);
    let Some(name) = &spec.from_checkpoint else {
        if !can {
            return or_full(none_can());
        }
        return match Chain::of(vm_uuid, owner(backup.labels()), checkpoints).next_base() {
            Some(newest) => Ok(Some(newest)),
            None => {
                let message = format!("VM {} has no usable checkpoint of this owner", spec.vm);
                or_full(Because::new(Reason::CheckpointNotFound, message))
            }
        };
    };
    let Some(found) = checkpoints.iter().find(|checkpoint| checkpoint.name_any() == *name) else {
        let message = format!("no VmCheckpoint {name} in this namespace");
        return Err(Because::new(Reason::CheckpointNotFound, message));
    };
    if found.spec.vm_uuid != vm_uuid {
        let message = format!("VmCheckpoint {name} is of VM {}, uuid {}", found.spec.vm, found.spec.vm_uuid);
        return Err(Because::new(Reason::CheckpointOfOtherVm, message));
    }
    if !can {
        return or_full(none_can());
    }
    if !found.is_base() {
        let message = format!("VmCheckpoint {name} is not usable: its conditions say why");
        return or_full(Because::new(Reason::CheckpointInvalid, message));
    }
    Ok(Some(found))
}

/// Whether a backup that has not ended starts from the checkpoint `name`, or wants to.
pub fn may_start_from(backup: &VmBackup, name: &str) -> bool {
    let status = backup.status.as_ref();
    let ended = status.is_some_and(|status| status.phase.is_terminal());
    let bound = status.and_then(|status| status.from_checkpoint.as_deref());
    !ended && (bound == Some(name) || backup.spec.from_checkpoint.as_deref() == Some(name))
}

/// How `disk` is read by a backup from `base`.
///
/// # Errors
/// When it must be read in full, and the user wants none of that.
pub fn mode(backup: &VmBackup, disk: &DomainDisk, base: Option<&VmCheckpoint>) -> Result<Mode, Because> {
    if backup.spec.backup_type == BackupType::Full {
        return Ok(Mode::full(None));
    }
    if disk.backup != BackupSupport::Incremental {
        // a disk that never could is no surprise
        return Ok(Mode::full(Some(FullReason::CannotKeepBitmap)));
    }
    let Some(base) = base else {
        let named = backup.spec.from_checkpoint.as_ref();
        let message = named.map(|name| format!("VmCheckpoint {name} is not usable: its conditions say why"));
        return Ok(Mode { message, ..Mode::full(Some(FullReason::NoBase)) });
    };
    let Some(why) = why_full(disk, base) else {
        return Ok(Mode { mode: DiskMode::Incremental, ..Mode::full(None) });
    };
    let mode = Mode { message: then_and_now(why, disk, base), ..Mode::full(Some(why)) };
    if backup.spec.on_invalid_checkpoint == InvalidCheckpointPolicy::FullBackup {
        return Ok(mode);
    }
    let message = format!("disk {} cannot start from VmCheckpoint {}: {why}", disk.target, base.name_any());
    let reason = match why {
        FullReason::BitmapInvalid => Reason::CheckpointInvalid,
        _ => Reason::DiskNotInCheckpoint,
    };
    Err(Because::new(reason, mode.message.map_or(message.clone(), |more| format!("{message}: {more}"))))
}

fn why_full(disk: &DomainDisk, base: &VmCheckpoint) -> Option<FullReason> {
    let Some(then) = base.spec.disks.iter().find(|then| then.target == disk.target) else {
        return Some(FullReason::NotInCheckpoint);
    };
    if then.serial != disk.serial || then.format != disk.format {
        return Some(FullReason::DiskReplaced);
    }
    // a size that is not known, now or then, says nothing; bitmaps are true over a resize
    if sizes(disk, base).is_some_and(|(now, then)| now != then) {
        return Some(FullReason::SizeChanged);
    }
    broken(disk, base).map(|_| FullReason::BitmapInvalid)
}

/// What was seen at the checkpoint, and what is seen now.
fn then_and_now(why: FullReason, disk: &DomainDisk, base: &VmCheckpoint) -> Option<String> {
    match why {
        FullReason::BitmapInvalid => broken(disk, base).map(|seen| seen.message.clone()),
        FullReason::SizeChanged => {
            let (now, then) = sizes(disk, base)?;
            Some(format!("{then} bytes at the checkpoint, {now} now"))
        }
        FullReason::DiskReplaced => {
            let then = base.spec.disks.iter().find(|then| then.target == disk.target)?;
            let shown = |serial: &Option<String>, format: &str| {
                let serial =
                    serial.as_ref().map_or("no serial".to_owned(), |serial| format!("serial {serial}"));
                format!("{format} with {serial}")
            };
            let (then, now) = (shown(&then.serial, &then.format), shown(&disk.serial, &disk.format));
            Some(format!("{then} at the checkpoint, {now} now"))
        }
        FullReason::NoBase | FullReason::NotInCheckpoint | FullReason::CannotKeepBitmap => None,
    }
}

/// The disk's size now, and at the checkpoint, where both are known.
fn sizes(disk: &DomainDisk, base: &VmCheckpoint) -> Option<(i64, i64)> {
    let then = base.spec.disks.iter().find(|then| then.target == disk.target)?;
    disk.size.zip(then.size)
}

/// What was seen of the disk's bitmap, where it is not whole.
fn broken<'a>(disk: &DomainDisk, base: &'a VmCheckpoint) -> Option<&'a CheckpointDiskStatus> {
    let mut seen = base.status.iter().flat_map(|status| &status.disks);
    seen.find(|seen| seen.target == disk.target && seen.consistent == Some(false))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const UUID: &str = "00000000-0000-4000-8000-000000000001";
    const OTHER: &str = "00000000-0000-4000-8000-000000000002";

    fn checkpoint(name: &str, uuid: &str, taken: &str, owner: Option<&str>, usable: &str) -> VmCheckpoint {
        let labels = owner.map(|owner| json!({"virtmark.dev/owner": owner}));
        let usable = json!({"type": "Usable", "status": usable, "reason": "Test", "message": "",
            "lastTransitionTime": "2026-11-25T00:00:00Z"});
        serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmCheckpoint",
            "metadata": {"name": name, "labels": labels},
            "spec": {"vm": "db01", "vmUuid": uuid, "bitmap": format!("virtmark-{name}"), "creationTime": taken,
                "disks": [{"target": "vda", "size": 100, "format": "qcow2"},
                    {"target": "vdb", "serial": "s", "size": 100, "format": "qcow2"},
                    {"target": "vdx", "size": 100, "format": "qcow2"}]},
            "status": {"phase": "Ready", "conditions": [usable],
                "disks": [{"target": "vdx", "consistent": false, "message": "broken"}]}}))
        .unwrap()
    }

    fn backup(spec: Value, owner: Option<&str>) -> VmBackup {
        let labels = owner.map(|owner| json!({"virtmark.dev/owner": owner}));
        let mut whole = json!({"vm": "db01", "type": "Incremental"});
        for (key, value) in spec.as_object().unwrap() {
            whole[key] = value.clone();
        }
        serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmBackup",
            "metadata": {"name": "b", "labels": labels}, "spec": whole}))
        .unwrap()
    }

    fn disk(target: &str, serial: Value, size: i64, format: &str, support: &str) -> DomainDisk {
        serde_json::from_value(json!({"target": target, "serial": serial, "size": size, "format": format,
            "backup": support}))
        .unwrap()
    }

    #[test]
    fn starts_from_the_newest_usable_one_of_its_owner() {
        let world = [
            checkpoint("old", UUID, "2026-11-01T00:00:00Z", None, "True"),
            checkpoint("new", UUID, "2026-11-03T00:00:00Z", None, "True"),
            checkpoint("newer-unusable", UUID, "2026-11-04T00:00:00Z", None, "False"),
            checkpoint("newer-of-veeam", UUID, "2026-11-05T00:00:00Z", Some("veeam"), "True"),
            checkpoint("newer-of-another", OTHER, "2026-11-06T00:00:00Z", None, "True"),
        ];
        let disks = [disk("vda", json!(null), 100, "qcow2", "Incremental")];
        let found = |spec, owner| {
            choose(&backup(spec, owner), UUID, &disks, &world)
                .map(|base| base.map(kube::ResourceExt::name_any))
                .map_err(|b| b.reason)
        };
        let name = |name: &str| Ok(Some(name.to_owned()));
        assert_eq!(found(json!({}), None), name("new"));
        assert_eq!(found(json!({}), Some("veeam")), name("newer-of-veeam"));
        assert_eq!(found(json!({}), Some("nobody")), Ok(None), "a full one, where there is no base");
        assert_eq!(
            found(json!({"onInvalidCheckpoint": "Fail"}), Some("nobody")),
            Err(Reason::CheckpointNotFound)
        );
        assert_eq!(found(json!({"type": "Full"}), None), Ok(None));
        assert_eq!(found(json!({"fromCheckpoint": "old"}), None), name("old"));
        assert_eq!(
            found(json!({"fromCheckpoint": "newer-of-veeam"}), None),
            name("newer-of-veeam"),
            "it was named"
        );
        assert_eq!(found(json!({"fromCheckpoint": "nothing"}), None), Err(Reason::CheckpointNotFound));
        assert_eq!(
            found(json!({"fromCheckpoint": "newer-of-another"}), None),
            Err(Reason::CheckpointOfOtherVm)
        );
        assert_eq!(found(json!({"fromCheckpoint": "newer-unusable"}), None), Ok(None));
        let strict = json!({"fromCheckpoint": "newer-unusable", "onInvalidCheckpoint": "Fail"});
        assert_eq!(found(strict, None), Err(Reason::CheckpointInvalid));
        let raw = [disk("vdb", json!(null), 100, "raw", "Full")];
        let found = |spec| choose(&backup(spec, None), UUID, &raw, &world).map_err(|because| because.reason);
        assert_eq!(found(json!({})), Ok(None));
        let strict = json!({"onInvalidCheckpoint": "Fail"});
        assert_eq!(found(strict), Err(Reason::IncrementalNotSupported));
    }

    #[test]
    fn every_disk_has_its_mode_and_its_reason() {
        let base = checkpoint("base", UUID, "2026-11-01T00:00:00Z", None, "True");
        let unsized_disk = DomainDisk { size: None, ..disk("vda", json!(null), 100, "qcow2", "Incremental") };
        let cases = [
            ("as it was", disk("vda", json!(null), 100, "qcow2", "Incremental"), None),
            ("of unknown size", unsized_disk, None),
            ("with its serial", disk("vdb", json!("s"), 100, "qcow2", "Incremental"), None),
            (
                "another serial",
                disk("vdb", json!("t"), 100, "qcow2", "Incremental"),
                Some(FullReason::DiskReplaced),
            ),
            ("grown", disk("vda", json!(null), 101, "qcow2", "Incremental"), Some(FullReason::SizeChanged)),
            ("new", disk("vdc", json!(null), 100, "qcow2", "Incremental"), Some(FullReason::NotInCheckpoint)),
            ("raw", disk("vda", json!(null), 100, "raw", "Full"), Some(FullReason::CannotKeepBitmap)),
            (
                "broken",
                disk("vdx", json!(null), 100, "qcow2", "Incremental"),
                Some(FullReason::BitmapInvalid),
            ),
        ];
        let strict = backup(json!({"onInvalidCheckpoint": "Fail"}), None);
        for (what, disk, why) in cases {
            let message = match why {
                Some(FullReason::BitmapInvalid) => Some("broken".to_owned()),
                Some(FullReason::SizeChanged) => Some("100 bytes at the checkpoint, 101 now".to_owned()),
                Some(FullReason::DiskReplaced) => {
                    Some("qcow2 with serial s at the checkpoint, qcow2 with serial t now".to_owned())
                }
                _ => None,
            };
            let expected = if why.is_some() { DiskMode::Full } else { DiskMode::Incremental };
            let expected = Mode { mode: expected, reason: why, message };
            assert_eq!(mode(&backup(json!({}), None), &disk, Some(&base)).unwrap(), expected, "{what}");
            let refused = match why {
                None | Some(FullReason::CannotKeepBitmap) => None,
                Some(FullReason::BitmapInvalid) => Some(Reason::CheckpointInvalid),
                Some(_) => Some(Reason::DiskNotInCheckpoint),
            };
            let found = mode(&strict, &disk, Some(&base)).err().map(|because| because.reason);
            assert_eq!(found, refused, "{what}");
            let why = match why {
                Some(FullReason::CannotKeepBitmap) => FullReason::CannotKeepBitmap,
                _ => FullReason::NoBase,
            };
            let without = mode(&backup(json!({}), None), &disk, None).unwrap();
            assert_eq!(without, Mode::full(Some(why)), "{what}");
        }
    }
}
