//! What a VmCheckpoint's status says of its bitmaps, from what the agent of its VM's node saw of them. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt as _;

use crate::api::{
    BitmapHealth, CheckpointDiskStatus, DomainSightingSpec, SightedBitmap, SightedCheckpoint, VmCheckpoint,
    VmCheckpointStatus, conditions,
};

/// What a sighting says of a checkpoint. A look that was made for another object of the same bitmaps does not count: it may be
/// older than this one.
pub fn sighted<'a>(
    sighting: &'a DomainSightingSpec,
    checkpoint: &VmCheckpoint,
) -> Option<&'a SightedCheckpoint> {
    let uid = checkpoint.uid()?;
    let mut all = sighting.checkpoints.iter().flatten();
    all.find(|one| one.checkpoint_uid.as_ref() == Some(&uid) && one.name == checkpoint.spec.bitmap)
}

/// The status with what was seen put in. A disk whose bitmap was once seen broken stays so: it missed writes.
pub fn observed(
    checkpoint: &VmCheckpoint,
    old: &VmCheckpointStatus,
    seen: &SightedCheckpoint,
) -> VmCheckpointStatus {
    let disk = |target: &String| {
        let before = old.disks.iter().find(|disk| disk.target == *target);
        let now = seen.disks.iter().find(|disk| disk.target == *target);
        merged(target, before, now)
    };
    let targets = checkpoint.spec.disks.iter().map(|disk| &disk.target);
    let disks: Vec<_> = targets.filter_map(disk).collect();
    let whole = disks.iter().filter(|disk| disk.consistent == Some(true));
    let counted: Vec<_> = whole.filter_map(|disk| disk.dirty_bytes).collect();
    let dirty =
        (!counted.is_empty()).then(|| human(counted.iter().fold(0, |sum, one| one.saturating_add(sum))));
    VmCheckpointStatus { disks, dirty, ..old.clone() }
}

fn merged(
    target: &str,
    before: Option<&CheckpointDiskStatus>,
    now: Option<&SightedBitmap>,
) -> Option<CheckpointDiskStatus> {
    if let Some(broken) = before.filter(|before| before.consistent == Some(false)) {
        return Some(broken.clone());
    }
    let Some(now) = now else { return before.cloned() };
    let target = target.to_owned();
    let known = before.cloned().unwrap_or_default();
    let new = match now.health {
        BitmapHealth::Unknown => return before.cloned(),
        BitmapHealth::Whole => CheckpointDiskStatus {
            target,
            granularity: now.granularity.or(known.granularity),
            dirty_bytes: now.dirty_bytes.or(known.dirty_bytes),
            consistent: Some(true),
            message: String::new(),
        },
        BitmapHealth::Broken | BitmapHealth::Missing => CheckpointDiskStatus {
            target,
            consistent: Some(false),
            message: now.message.clone().unwrap_or_else(|| "it is missing".to_owned()),
            ..CheckpointDiskStatus::default()
        },
    };
    Some(new)
}

/// Whether none of the checkpoint's bitmaps is whole any more.
pub fn is_lost(checkpoint: &VmCheckpoint, status: &VmCheckpointStatus) -> bool {
    let broken = |target: &str| {
        let mut disks = status.disks.iter();
        disks.any(|disk| disk.target == target && disk.consistent == Some(false))
    };
    checkpoint.spec.disks.iter().all(|disk| broken(&disk.target))
}

/// The words about the disks that are not whole: `vda: ...; vdb: ...`.
pub fn words(status: &VmCheckpointStatus) -> String {
    let broken = status.disks.iter().filter(|disk| disk.consistent == Some(false));
    let words: Vec<_> = broken.map(|disk| format!("{}: {}", disk.target, disk.message)).collect();
    words.join("; ").chars().take(1024).collect()
}

/// Whether the status may change by what is seen: the checkpoint was judged, and can be used.
pub fn is_followed(status: &VmCheckpointStatus) -> bool {
    let usable: Option<&Condition> = conditions::get(&status.conditions, conditions::USABLE);
    usable.is_some_and(|usable| usable.status == "True")
}

/// Bytes as people say them, in three digits at most and rounded up: `0`, `512Ki`, `2.5Mi`.
pub fn human(bytes: i64) -> String {
    let bytes = u64::try_from(bytes).unwrap_or_default();
    let units = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let fits = |power: &usize| bytes >> (10 * power) < 1024;
    let power = (0..units.len()).find(fits).unwrap_or_default();
    let unit = 1_u64 << (10 * power);
    let tenths = (u128::from(bytes) * 10).div_ceil(u128::from(unit));
    if power == 0 || tenths >= 1000 || tenths % 10 == 0 {
        return format!("{}{}", bytes.div_ceil(unit), units[power]);
    }
    format!("{}.{}{}", tenths / 10, tenths % 10, units[power])
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn checkpoint() -> VmCheckpoint {
        serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmCheckpoint",
            "metadata": {"name": "c", "uid": "u"},
            "spec": {"vm": "db01", "vmUuid": "00000000-0000-4000-8000-000000000001", "bitmap": "b",
                "creationTime": "2026-11-25T00:00:00Z",
                "disks": [{"target": "vda", "format": "qcow2"}, {"target": "vdb", "format": "qcow2"}]}}))
        .unwrap()
    }

    fn seen(disks: Value) -> SightedCheckpoint {
        serde_json::from_value(json!({"name": "b", "checkpointUid": "u", "disks": disks})).unwrap()
    }

    #[test]
    fn what_is_seen_is_said_and_what_was_once_broken_stays_so() {
        let (checkpoint, new) = (checkpoint(), VmCheckpointStatus::default());
        let whole =
            json!({"target": "vda", "health": "Whole", "granularity": 65536, "dirtyBytes": 2_621_440});
        let unknown = json!({"target": "vdb", "health": "Unknown"});
        let first = observed(&checkpoint, &new, &seen(json!([whole, unknown])));
        assert_eq!(first.dirty.as_deref(), Some("2.5Mi"));
        assert_eq!(first.disks.len(), 1, "nothing is said of what is not known");
        assert_eq!(first.disks[0].consistent, Some(true));

        // off: it is not counted, and what was counted stands
        let off = json!([{"target": "vda", "health": "Whole"}, {"target": "vdb", "health": "Whole"}]);
        let off = observed(&checkpoint, &first, &seen(off));
        assert_eq!((off.disks[0].dirty_bytes, off.disks[0].granularity), (Some(2_621_440), Some(65536)));
        assert_eq!(off.dirty.as_deref(), Some("2.5Mi"));

        let broken = json!([{"target": "vda", "health": "Missing", "message": "gone"}]);
        let broken = observed(&checkpoint, &off, &seen(broken));
        assert_eq!((broken.disks[0].consistent, broken.disks[0].dirty_bytes), (Some(false), None));
        assert_eq!(words(&broken), "vda: gone");
        assert!(!is_lost(&checkpoint, &broken), "the other one is whole");
        assert_eq!(broken.dirty, None, "of the other it was never counted");
        let back = observed(&checkpoint, &broken, &seen(json!([whole])));
        assert_eq!(back, broken, "it missed writes meanwhile");
        let both = json!([{"target": "vdb", "health": "Broken", "message": "in-use"}]);
        let both = observed(&checkpoint, &broken, &seen(both));
        assert!(is_lost(&checkpoint, &both));
        assert_eq!(observed(&checkpoint, &both, &seen(json!([]))), both);
    }

    #[test]
    fn a_look_for_another_object_of_the_same_name_does_not_count() {
        let sighting = |uid: Value, name: &str| -> DomainSightingSpec {
            serde_json::from_value(json!({"nodeName": "n", "uuid": "u", "name": "db01", "state": "Off",
                "checkpoints": [{"name": name, "checkpointUid": uid, "disks": []}]}))
            .unwrap()
        };
        assert!(sighted(&sighting(json!("u"), "b"), &checkpoint()).is_some());
        assert!(sighted(&sighting(json!("v"), "b"), &checkpoint()).is_none());
        assert!(sighted(&sighting(Value::Null, "b"), &checkpoint()).is_none());
        assert!(sighted(&sighting(json!("u"), "c"), &checkpoint()).is_none());
    }

    #[test]
    fn bytes_are_said_in_three_digits_and_never_less_than_they_are() {
        for (bytes, said) in [
            (0, "0"),
            (512, "512"),
            (1024, "1Ki"),
            (65536, "64Ki"),
            (1023 * 1024, "1023Ki"),
            (1 << 20, "1Mi"),
            ((1 << 20) + 1, "1.1Mi"),
            (2_621_440, "2.5Mi"),
            (128 << 20, "128Mi"),
            ((128 << 20) + 1, "129Mi"),
            (5 << 30, "5Gi"),
            (i64::MAX, "8Ei"),
        ] {
            assert_eq!(human(bytes), said, "{bytes}");
        }
    }
}
