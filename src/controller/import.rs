//! Whether a VmCheckpoint that a user made, for bitmaps that are there already, becomes a base; and whose bitmaps go with
//! their object. Pure.
//!
//! Until it is accepted it stays in phase Initializing: nothing is removed for it, and no backup starts from it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kube::ResourceExt as _;

use super::chain::is_accepted;
use super::health;
use crate::api::{
    self, BitmapHealth, LibvirtDomain, Phase, SightedCheckpoint, VmCheckpoint, VmCheckpointStatus,
    bitmap_prefix,
};
use crate::reason::{Because, Reason};

/// What is to be done about one.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// It cannot be looked at as it is. It is judged again when the inventory changes.
    Wait(Because),
    /// The agent of this node has to look.
    Look(String, Because),
    /// It is a base from here on, or was found to be none; with what was seen of its disks.
    Judged(Box<VmCheckpointStatus>, Phase, Because),
}

/// Whether nobody but the operator made the object: with a backup, which settles it.
pub fn is_made_with_a_backup(checkpoint: &VmCheckpoint) -> bool {
    let creates = |entry: &ManagedFieldsEntry| {
        let fields = entry.fields_v1.as_ref();
        entry.manager.as_deref() == Some(api::OPERATOR)
            && entry.subresource.is_none()
            && fields.is_some_and(|fields| fields.0.get("f:spec").is_some())
    };
    checkpoint.managed_fields().iter().any(creates)
}

/// Whether it is somebody's import that is not accepted yet.
pub fn is_pending(checkpoint: &VmCheckpoint) -> bool {
    let phase = checkpoint.status.as_ref().map(|status| status.phase).unwrap_or_default();
    phase == Phase::Initializing && !is_made_with_a_backup(checkpoint)
}

/// Judges an import. `beside` are the VmCheckpoints of its namespace, `node` has the VM, `seen` is what that node's agent
/// found.
pub fn judge<'a>(
    checkpoint: &VmCheckpoint,
    domain: Option<&LibvirtDomain>,
    beside: impl IntoIterator<Item = &'a VmCheckpoint>,
    node: Option<String>,
    seen: Option<&SightedCheckpoint>,
) -> Verdict {
    let spec = &checkpoint.spec;
    let wait = |reason, message| Verdict::Wait(Because::new(reason, message));
    let Some(domain) = domain else {
        return wait(Reason::VmNotFound, format!("no LibvirtDomain {} in this namespace", spec.vm));
    };
    if domain.spec.uuid != spec.vm_uuid {
        let message = format!("VM {} has uuid {}, not {}", spec.vm, domain.spec.uuid, spec.vm_uuid);
        return wait(Reason::CheckpointOfOtherVm, message);
    }
    if let Some(twin) = twin(checkpoint, beside) {
        let message = format!("VmCheckpoint {} names bitmap {} already", twin.name_any(), spec.bitmap);
        return wait(Reason::BitmapTaken, message);
    }
    let disks = domain.status.as_ref().map(|status| status.disks.as_slice()).unwrap_or_default();
    for then in &spec.disks {
        let Some(now) = disks.iter().find(|now| now.target == then.target) else {
            return wait(Reason::DiskNotFound, format!("VM {} has no disk {}", spec.vm, then.target));
        };
        if now.format != then.format || now.serial != then.serial {
            let shown = |format: &str, serial: &Option<String>| match serial {
                Some(serial) => format!("{format} with serial {serial}"),
                None => format!("{format} without a serial"),
            };
            let (is, named) = (shown(&now.format, &now.serial), shown(&then.format, &then.serial));
            let message = format!("disk {} of VM {} is {is}, not {named}", then.target, spec.vm);
            return wait(Reason::DiskNotFound, message);
        }
    }
    let Some(node) = node else {
        return wait(Reason::VmNotFound, format!("no node's libvirt knows VM {}", spec.vm));
    };
    let old = checkpoint.status.clone().unwrap_or_default();
    let new = seen.map(|seen| (seen, health::observed(checkpoint, &old, seen)));
    let look = || {
        let message = format!("the agent of node {node} looks for bitmap {}", spec.bitmap);
        Verdict::Look(node.clone(), Because::new(Reason::Importing, message))
    };
    let Some((seen, new)) = new else { return look() };
    let is_known = |target: &str| {
        let bitmap = seen.disks.iter().find(|bitmap| bitmap.target == target);
        bitmap.is_some_and(|bitmap| bitmap.health != BitmapHealth::Unknown)
    };
    if !spec.disks.iter().all(|disk| is_known(&disk.target)) {
        return look();
    }
    let new = VmCheckpointStatus { node_name: None, ..new };
    let words = health::words(&new);
    if health::is_lost(checkpoint, &new) {
        let because = Because::new(Reason::CheckpointInvalid, words);
        return Verdict::Judged(Box::new(new), Phase::Failed, because);
    }
    let message = match words.as_str() {
        "" => format!("bitmap {} was found whole on every disk", spec.bitmap),
        words => format!(
            "bitmap {} was found whole, but for these disks, which are read in full: {words}",
            spec.bitmap
        ),
    };
    Verdict::Judged(Box::new(new), Phase::Ready, Because::new(Reason::Imported, message))
}

/// Another object for the same bitmaps, which was accepted.
fn twin<'a>(
    checkpoint: &VmCheckpoint,
    beside: impl IntoIterator<Item = &'a VmCheckpoint>,
) -> Option<&'a VmCheckpoint> {
    beside.into_iter().find(|other| {
        other.uid() != checkpoint.uid()
            && other.spec.vm_uuid == checkpoint.spec.vm_uuid
            && other.spec.bitmap == checkpoint.spec.bitmap
            && other.metadata.deletion_timestamp.is_none()
            && (is_accepted(other) || is_made_with_a_backup(other))
    })
}

/// Why the bitmaps of an object that is being deleted stay; `None` when they go with it.
pub fn keeps_bitmaps<'a>(
    checkpoint: &VmCheckpoint,
    cluster: &str,
    beside: impl IntoIterator<Item = &'a VmCheckpoint>,
) -> Option<Because> {
    let bitmap = &checkpoint.spec.bitmap;
    let kept = |message| Some(Because::new(Reason::BitmapKept, message));
    if is_pending(checkpoint) {
        return kept(format!(
            "it was not imported: bitmap {bitmap}, where there is one, stays in the images"
        ));
    }
    if !bitmap.starts_with(&bitmap_prefix(cluster)) {
        return kept(format!("bitmap {bitmap} is not of this cluster's Virtmark, and stays in the images"));
    }
    let twin = twin(checkpoint, beside)?;
    kept(format!("bitmap {bitmap} stays in the images, for VmCheckpoint {} names it too", twin.name_any()))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const UUID: &str = "00000000-0000-4000-8000-000000000001";

    fn checkpoint(name: &str, bitmap: &str, phase: Value) -> VmCheckpoint {
        let judged = if phase == "Initializing" {
            json!([])
        } else {
            json!([{"type": "Usable", "status": "True", "reason": "Test", "message": "",
                "lastTransitionTime": "2026-11-25T00:00:00Z"}])
        };
        serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmCheckpoint",
            "metadata": {"name": name, "uid": name},
            "spec": {"vm": "db01", "vmUuid": UUID, "bitmap": bitmap, "creationTime": "2026-11-25T00:00:00Z",
                "disks": [{"target": "vda", "format": "qcow2"}, {"target": "vdb", "format": "qcow2", "serial": "s"}]},
            "status": {"phase": phase, "conditions": judged}}))
        .unwrap()
    }

    fn domain(uuid: &str, disks: Value) -> LibvirtDomain {
        serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "LibvirtDomain",
            "metadata": {"name": "db01"}, "spec": {"uuid": uuid}, "status": {"disks": disks}}))
        .unwrap()
    }

    fn disk(target: &str, serial: Value) -> Value {
        json!({"target": target, "format": "qcow2", "serial": serial, "backup": "Incremental"})
    }

    #[test]
    fn an_import_is_judged_by_what_is_there() {
        let ours = checkpoint("ours", "b", json!("Initializing"));
        let both = json!([disk("vda", Value::Null), disk("vdb", json!("s"))]);
        let there = domain(UUID, both.clone());
        let other = domain("00000000-0000-4000-8000-000000000002", both);
        let one = domain(UUID, json!([disk("vda", Value::Null)]));
        let replaced = domain(UUID, json!([disk("vda", Value::Null), disk("vdb", json!("t"))]));
        let twin = checkpoint("twin", "b", json!("Ready"));
        let pending = checkpoint("pending", "b", json!("Initializing"));
        let seen = |a: &str, b: &str| -> SightedCheckpoint {
            serde_json::from_value(json!({"name": "b", "checkpointUid": "ours", "disks": [
                {"target": "vda", "health": a, "message": "words"},
                {"target": "vdb", "health": b, "message": "words"}]}))
            .unwrap()
        };
        let node = || Some("node-a".to_owned());
        let said =
            |domain: Option<&LibvirtDomain>, beside: &VmCheckpoint, node, seen: Option<SightedCheckpoint>| {
                match judge(&ours, domain, [&ours, beside], node, seen.as_ref()) {
                    Verdict::Wait(because) => ("wait", because.reason),
                    Verdict::Look(_, because) => ("look", because.reason),
                    Verdict::Judged(status, phase, because) => {
                        assert_eq!(status.disks.len(), 2);
                        (if phase == Phase::Ready { "base" } else { "none" }, because.reason)
                    }
                }
            };
        let rows = [
            (said(None, &pending, node(), None), ("wait", Reason::VmNotFound)),
            (said(Some(&other), &pending, node(), None), ("wait", Reason::CheckpointOfOtherVm)),
            (said(Some(&there), &twin, node(), None), ("wait", Reason::BitmapTaken)),
            (said(Some(&one), &pending, node(), None), ("wait", Reason::DiskNotFound)),
            (said(Some(&replaced), &pending, node(), None), ("wait", Reason::DiskNotFound)),
            (said(Some(&there), &pending, None, None), ("wait", Reason::VmNotFound)),
            (said(Some(&there), &pending, node(), None), ("look", Reason::Importing)),
            (
                said(Some(&there), &pending, node(), Some(seen("Whole", "Unknown"))),
                ("look", Reason::Importing),
            ),
            (said(Some(&there), &pending, node(), Some(seen("Whole", "Whole"))), ("base", Reason::Imported)),
            (
                said(Some(&there), &pending, node(), Some(seen("Whole", "Missing"))),
                ("base", Reason::Imported),
            ),
            (
                said(Some(&there), &pending, node(), Some(seen("Broken", "Missing"))),
                ("none", Reason::CheckpointInvalid),
            ),
        ];
        for (row, (found, expected)) in rows.into_iter().enumerate() {
            assert_eq!(found, expected, "row {row}");
        }
    }

    #[test]
    fn bitmaps_go_only_with_the_object_that_was_accepted_for_them() {
        let kept = |checkpoint: &VmCheckpoint, beside: &[VmCheckpoint]| {
            keeps_bitmaps(checkpoint, "0a1b2c3d", beside).map(|because| because.message)
        };
        let ours = "virtmark-0a1b2c3d-uid";
        let ready = checkpoint("a", ours, json!("Ready"));
        assert_eq!(kept(&ready, std::slice::from_ref(&ready)), None);
        assert_eq!(
            kept(&checkpoint("a", ours, json!("Failed")), &[]),
            None,
            "it was looked at, and is broken"
        );
        let cases = [
            (checkpoint("a", ours, json!("Initializing")), "was not imported"),
            (checkpoint("a", "virtnbdbackup.0", json!("Ready")), "not of this cluster's"),
            (checkpoint("a", "virtmark-ffffffff-uid", json!("Ready")), "not of this cluster's"),
            (checkpoint("a", "virtmark-0a1b2c3dx", json!("Ready")), "not of this cluster's"),
        ];
        for (one, words) in cases {
            assert!(kept(&one, &[]).is_some_and(|said| said.contains(words)), "{words}");
        }
        let twin = checkpoint("b", ours, json!("Ready"));
        assert!(kept(&ready, &[ready.clone(), twin]).is_some_and(|said| said.contains("b names it too")));
    }

    #[test]
    fn what_the_operator_made_is_told_from_what_a_user_made() {
        let mut one = checkpoint("a", "b", json!("Initializing"));
        let entry = |manager: &str, subresource: Value, fields: Value| -> ManagedFieldsEntry {
            serde_json::from_value(
                json!({"manager": manager, "subresource": subresource, "operation": "Update",
                "fieldsType": "FieldsV1", "fieldsV1": fields}),
            )
            .unwrap()
        };
        let spec = json!({"f:spec": {"f:vm": {}}});
        let finalizer = json!({"f:metadata": {"f:finalizers": {}}});
        let by_kubectl = entry("kubectl-create", Value::Null, spec.clone());
        let held = entry(api::OPERATOR, Value::Null, finalizer);
        let told = entry(api::OPERATOR, json!("status"), json!({"f:status": {}}));
        one.metadata.managed_fields = Some(vec![by_kubectl, held, told]);
        assert!(is_pending(&one));
        one.metadata.managed_fields = Some(vec![entry(api::OPERATOR, Value::Null, spec)]);
        assert!(!is_pending(&one));
    }
}
