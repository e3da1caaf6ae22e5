//! `VmCheckpoint`: a point in time to start the next incremental from. It outlives its VmBackup.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Phase, conditions, schema};

/// What the checkpoint is; immutable, so that a restored etcd loses nothing.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[cfg_attr(test, kube(cel))]
#[kube(
    group = "virtmark.dev",
    version = "v1alpha1",
    kind = "VmCheckpoint",
    plural = "vmcheckpoints",
    singular = "vmcheckpoint",
    shortname = "vmcp",
    category = "virtmark",
    namespaced,
    status = "VmCheckpointStatus",
    derive = "PartialEq",
    doc = "VmCheckpoint is a point in time of a virtual machine from which an incremental backup can start: a dirty bitmap in each of its qcow2 disks. Deleting it deletes the bitmaps.",
    selectable = ".spec.vm",
    selectable = ".spec.vmUuid",
    selectable = ".status.nodeName",
    printcolumn(name = "VM", type_ = "string", json_path = ".spec.vm"),
    printcolumn(name = "Parent", type_ = "string", json_path = ".status.parent"),
    printcolumn(name = "Base", type_ = "string", json_path = ".status.base"),
    printcolumn(
        name = "Usable",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Usable\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Usable\")].reason"
    ),
    printcolumn(name = "Dirty", type_ = "string", json_path = ".status.dirty"),
    printcolumn(name = "Taken", type_ = "date", json_path = ".spec.creationTime"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self == oldSelf").message("a checkpoint's spec is immutable"))]
pub struct VmCheckpointSpec {
    /// Name of the LibvirtDomain, in this namespace.
    #[schemars(length(min = 1, max = 253), regex(pattern = schema::OBJECT_NAME))]
    pub vm: String,
    /// The libvirt uuid of the VM: a new VM of the same name is another VM.
    #[schemars(length(min = 36, max = 36), regex(pattern = schema::UUID))]
    pub vm_uuid: String,
    /// The checkpoint's name in libvirt, hence the dirty bitmap's name in each image.
    #[schemars(length(min = 1, max = 200), regex(pattern = r"^[A-Za-z0-9_.:-]+$"))]
    pub bitmap: String,
    /// Name of the VmCheckpoint of the same VM and owner that was the newest when this one was made. It may be gone:
    /// status.parent is the one that is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = schema::OBJECT_NAME))]
    pub parent: Option<String>,
    /// When it was made; later than its parent.
    pub creation_time: Time,
    /// The disks that have the bitmap.
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["target".into()]))]
    pub disks: Vec<CheckpointDisk>,
}

/// A disk in a checkpoint, as it was then.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointDisk {
    /// Its target in the domain, `vda`.
    #[schemars(length(min = 1, max = 64), regex(pattern = schema::TARGET))]
    pub target: String,
    /// Its serial number, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub serial: Option<String>,
    /// Its virtual size in bytes; absent when libvirt could not tell at that moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub size: Option<i64>,
    /// Its image format, `qcow2`.
    #[schemars(length(max = 32))]
    pub format: String,
    /// Name of a bitmap that this disk's image alone has: no incremental starts here in an image without it, which is
    /// another disk's. Absent when the checkpoint is of one disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 265), regex(pattern = r"^[A-Za-z0-9_.:-]+$"))]
    pub mark: Option<String>,
}

impl VmCheckpoint {
    /// Whether an incremental can start from it.
    pub fn is_usable(&self) -> bool {
        self.status.as_ref().is_some_and(|status| conditions::is_true(&status.conditions, conditions::USABLE))
    }

    /// Whether it can be a base: usable, and not about to go.
    pub fn is_base(&self) -> bool {
        self.is_usable() && self.metadata.deletion_timestamp.is_none()
    }
}

impl VmCheckpointSpec {
    /// The sizes of its disks in bytes, by target, where they are known.
    pub fn sizes(&self) -> BTreeMap<String, u64> {
        let known = self.disks.iter().filter_map(|disk| {
            let size = disk.size.and_then(|size| u64::try_from(size).ok()).filter(|size| *size > 0)?;
            Some((disk.target.clone(), size))
        });
        known.collect()
    }

    /// The marks of its disks, by target.
    pub fn marks(&self) -> BTreeMap<String, String> {
        let marked = self.disks.iter().filter_map(|disk| Some((disk.target.clone(), disk.mark.clone()?)));
        marked.collect()
    }
}

/// What was observed of the checkpoint.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct VmCheckpointStatus {
    /// The generation of the spec that this status answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Initializing until its backup succeeded, then Ready; Finalizing while its bitmaps are removed.
    #[serde(default)]
    pub phase: Phase,
    /// Usable: an incremental can start here. HostClean: its bitmaps are gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Name of the VmCheckpoint before it in the chain of its VM and owner; absent of the oldest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub parent: Option<String>,
    /// Next: an incremental backup of this owner that names no checkpoint starts here. Older: only one that names it.
    /// Absent when none can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseRank>,
    /// How much of its disks changed since, of those whose bitmap is whole, as last counted: `2.5Mi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub dirty: Option<String>,
    /// The node whose agent removes the bitmaps, or looks for those that are to be imported, while it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node_name: Option<String>,
    /// Per disk, what became of the bitmap.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["target".into()]))]
    pub disks: Vec<CheckpointDiskStatus>,
}

/// Which incremental backups start from a checkpoint.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseRank {
    /// Those that name no checkpoint: it is the newest usable one.
    Next,
    /// Those that name it.
    Older,
}

/// What was observed of one disk's bitmap.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointDiskStatus {
    /// The disk's target in the domain.
    #[schemars(length(max = 64))]
    pub target: String,
    /// Bytes of the disk that one bit of the bitmap stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub granularity: Option<i64>,
    /// Bytes that changed since the checkpoint, as last counted while the VM ran; written again when they moved by a
    /// tenth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub dirty_bytes: Option<i64>,
    /// True when it was seen to be whole. False once its bitmap was seen to be missing or inconsistent: no incremental
    /// starts from it any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistent: Option<bool>,
    /// What is wrong with it, or why it could not be removed yet.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 1024))]
    pub message: String,
}
