//! The objects that a backup needs, as values: its VmCheckpoint and its ImageTransfers.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::api::ObjectMeta;
use kube::{Resource as _, ResourceExt as _};

use super::resolve::Binding;
use crate::api::{
    self, CheckpointDisk, Direction, ImageTransfer, ImageTransferSpec, Protocol, TimeoutPolicy,
    TransferFormat, TransferState, VmBackup, VmCheckpoint, VmCheckpointSpec,
};

/// The name of the checkpoint of a backup: its name, and the start of its uid, for a name can be used again.
pub fn checkpoint_name(backup: &VmBackup) -> String {
    let uid = backup.uid().unwrap_or_default();
    format!("{}-{}", backup.name_any(), uid.chars().take(8).collect::<String>())
}

/// The checkpoint to be made with a backup; `None` when only raw disks are in it.
pub fn checkpoint(backup: &VmBackup, binding: &Binding, cluster: &str) -> Option<VmCheckpoint> {
    if binding.in_checkpoint.is_empty() {
        return None;
    }
    let bitmap = format!("virtmark-{cluster}-{}", backup.uid().unwrap_or_default());
    // every disk has a bitmap of the same name: of several, that alone does not tell whose image it is in
    let several = binding.in_checkpoint.len() > 1;
    let disks = binding.in_checkpoint.iter().map(|disk| CheckpointDisk {
        mark: several.then(|| format!("{bitmap}.{}", disk.target)),
        target: disk.target.clone(),
        serial: disk.serial.clone(),
        size: disk.size,
        format: disk.format.clone(),
    });
    let disks = disks.collect();
    let spec = VmCheckpointSpec {
        vm: backup.spec.vm.clone(),
        vm_uuid: binding.vm_uuid.clone(),
        bitmap,
        parent: binding.parent.clone(),
        creation_time: Time(binding.checkpoint_time),
        disks,
    };
    let mut metadata = metadata(backup, checkpoint_name(backup), None);
    let of_vm = (api::LABEL_VM_UUID.to_owned(), binding.vm_uuid.clone());
    metadata.labels.get_or_insert_default().extend([of_vm]);
    Some(VmCheckpoint { metadata, spec, status: None })
}

/// The transfers of a bound backup, one a disk.
pub fn transfers(backup: &VmBackup) -> Vec<ImageTransfer> {
    let disks = backup.status.as_ref().map(|status| status.disks.as_slice()).unwrap_or_default();
    let owner = backup.owner_ref(&()).map(|owner| OwnerReference { block_owner_deletion: None, ..owner });
    let one = |disk: &str| ImageTransfer {
        metadata: metadata(backup, format!("{}-{disk}", backup.name_any()), owner.clone()),
        spec: ImageTransferSpec {
            backup: Some(backup.name_any()),
            disk: Some(disk.to_owned()),
            volume: None,
            direction: Direction::Download,
            format: TransferFormat::Raw,
            protocol: Protocol::Imageio,
            state: TransferState::Running,
            inactivity_timeout_seconds: None,
            timeout_policy: TimeoutPolicy::Cancel,
        },
        status: None,
    };
    disks.iter().map(|disk| one(&disk.name)).collect()
}

fn metadata(backup: &VmBackup, name: String, owner: Option<OwnerReference>) -> ObjectMeta {
    let uid = (api::LABEL_BACKUP.to_owned(), backup.uid().unwrap_or_default());
    let owner_label = backup.labels().get_key_value(api::LABEL_OWNER);
    let labels = owner_label.map(|(key, value)| (key.clone(), value.clone())).into_iter().chain([uid]);
    ObjectMeta {
        name: Some(name),
        namespace: backup.namespace(),
        labels: Some(labels.collect::<BTreeMap<_, _>>()),
        owner_references: owner.map(|owner| vec![owner]),
        finalizers: Some(vec![api::FINALIZER.to_owned()]),
        ..ObjectMeta::default()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;
    use serde_json::json;

    use super::*;

    #[test]
    fn of_several_disks_each_has_a_mark_of_its_own() {
        let backup: VmBackup = serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1",
            "kind": "VmBackup", "metadata": {"name": "b", "uid": "u"}, "spec": {"vm": "db01"}}))
        .unwrap();
        let marks = |targets: &[&str]| -> Vec<Option<String>> {
            let disk = |target: &&str| json!({"target": target, "format": "qcow2", "backup": "Incremental"});
            let disks = targets.iter().map(|target| serde_json::from_value(disk(target)).unwrap());
            let binding = Binding {
                node: "n".to_owned(),
                vm_uuid: "v".to_owned(),
                disks: Vec::new(),
                from_checkpoint: None,
                in_checkpoint: disks.collect(),
                parent: None,
                checkpoint_time: Timestamp::UNIX_EPOCH,
            };
            let made = checkpoint(&backup, &binding, "c").unwrap();
            assert_eq!(made.spec.marks().len(), if targets.len() > 1 { targets.len() } else { 0 });
            made.spec.disks.into_iter().map(|disk| disk.mark).collect()
        };
        assert_eq!(marks(&["vda"]), [None], "its bitmap alone tells it");
        let [a, b] = ["virtmark-c-u.vda", "virtmark-c-u.vdb"].map(|mark| Some(mark.to_owned()));
        assert_eq!(marks(&["vda", "vdb"]), [a, b]);
    }
}
