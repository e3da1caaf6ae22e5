//! `VmBackup`: one backup of one VM. Never the data of a backup: deleting it deletes no bytes that a
//! client has read.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DesiredState, Phase, schema};

/// What to back up and within which bounds.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[cfg_attr(test, kube(cel))]
#[kube(
    group = "virtmark.dev",
    version = "v1alpha1",
    kind = "VmBackup",
    plural = "vmbackups",
    singular = "vmbackup",
    shortname = "vmbk",
    category = "virtmark",
    namespaced,
    status = "VmBackupStatus",
    derive = "PartialEq",
    doc = "VmBackup is one backup of one running virtual machine: a point-in-time, read-only view of its disks that clients read while the guest goes on writing. Finalize it with spec.state once every disk was read.",
    selectable = ".spec.vm",
    selectable = ".status.nodeName",
    printcolumn(name = "VM", type_ = "string", json_path = ".spec.vm"),
    printcolumn(name = "Type", type_ = "string", json_path = ".spec.type"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress"),
    printcolumn(name = "Checkpoint", type_ = "string", json_path = ".status.toCheckpoint", priority = 1),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.nodeName"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("size(self.metadata.name) <= 180").message(
        "metadata.name must be at most 180 characters, so that its transfers can be named after it"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.disks) == has(oldSelf.disks) && (!has(self.disks) || self.disks == oldSelf.disks)")
        .message("disks is immutable: make another VmBackup").field_path(".disks"),
    validation = Rule::new("has(self.quiesce) == has(oldSelf.quiesce) && (!has(self.quiesce) || self.quiesce == oldSelf.quiesce)")
        .message("quiesce is immutable: make another VmBackup").field_path(".quiesce"),
    validation = Rule::new("has(self.fromCheckpoint) == has(oldSelf.fromCheckpoint) && (!has(self.fromCheckpoint) || self.fromCheckpoint == oldSelf.fromCheckpoint)")
        .message("fromCheckpoint is immutable: make another VmBackup").field_path(".fromCheckpoint"),
    validation = Rule::new("has(self.maxCheckpoints) == has(oldSelf.maxCheckpoints) && (!has(self.maxCheckpoints) || self.maxCheckpoints == oldSelf.maxCheckpoints)")
        .message("maxCheckpoints is immutable: make another VmBackup").field_path(".maxCheckpoints"),
    validation = Rule::new("!has(self.fromCheckpoint) || self.type == 'Incremental'")
        .message("fromCheckpoint needs type Incremental").field_path(".fromCheckpoint")
)]
pub struct VmBackupSpec {
    /// Name of the LibvirtDomain to back up, in this namespace (`kubectl get lvd`).
    #[schemars(length(min = 1, max = 253), regex(pattern = schema::OBJECT_NAME))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("vm is immutable: make another VmBackup"))]
    pub vm: String,

    /// Targets of the disks to back up, as in the domain (`vda`). Default: every disk that can be backed
    /// up. A disk that is named here and cannot be backed up is an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 64), regex(pattern = schema::TARGET)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub disks: Option<Vec<String>>,

    /// Full reads all data of every disk. Incremental reads what changed since a checkpoint.
    #[serde(default, rename = "type")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("type is immutable: make another VmBackup"))]
    pub backup_type: BackupType,

    /// With type Incremental: the VmCheckpoint to start from. Default: the newest usable one of the VM with the same
    /// label virtmark.dev/owner, or without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = schema::OBJECT_NAME))]
    pub from_checkpoint: Option<String>,

    /// With type Incremental, what to do where a disk cannot start from the checkpoint, or there is none. FullBackup:
    /// read that disk in full; its reason is in status.disks. Fail: fail.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("onInvalidCheckpoint is immutable: make another VmBackup"))]
    pub on_invalid_checkpoint: InvalidCheckpointPolicy,

    /// Whether the guest's file systems are frozen while the point in time is taken. Default: BestEffort
    /// within 10 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesce: Option<Quiesce>,

    /// What to do while the VM is off. Wait: wait for it to run, up to startDeadlineSeconds. Refuse: fail.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("offline is immutable: make another VmBackup"))]
    pub offline: OfflinePolicy,

    /// Auto: one ImageTransfer per disk is made, named `<backup>-<disk>`. Manual: you make them.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("transfers is immutable: make another VmBackup"))]
    pub transfers: TransferPolicy,

    /// What you want of it: Running, then Finalized once every disk was read, or Cancelled. It never goes
    /// back. Leave it out of manifests kept in Git.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf || oldSelf == 'Running' || self == 'Cancelled'")
        .message("state goes one way: Running, Finalized, Cancelled"))]
    pub state: DesiredState,

    /// Seconds from creation until the backup must be Ready; then it fails with StartDeadlineExceeded.
    #[serde(default = "start_deadline")]
    #[schemars(range(min = 1, max = 604_800))]
    pub start_deadline_seconds: i32,

    /// Seconds from Ready until the backup must be finalized; then it fails with ReadyDeadlineExceeded.
    #[serde(default = "ready_deadline")]
    #[schemars(range(min = 1, max = 2_592_000))]
    pub ready_deadline_seconds: i32,

    /// Seconds without any request on any ticket after which a Ready backup fails with ClientIdle: while
    /// it lasts the VM can be neither migrated nor resized.
    #[serde(default = "client_idle")]
    #[schemars(range(min = 1, max = 2_592_000))]
    pub client_idle_seconds: i32,

    /// How many checkpoints of the VM and of this owner (label virtmark.dev/owner) are kept once this backup succeeded, its
    /// own with them: each costs the guest's writes a little. The others are deleted with their bitmaps: first such as
    /// cannot be used any more, then the oldest. One that a backup which has not ended starts from stays. Unset: all are
    /// kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_checkpoints: Option<i32>,

    /// Seconds after the end when this object is deleted. Unset: kept until you delete it. Its checkpoint
    /// stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<i32>,
}

impl VmBackup {
    /// Where it is; Initializing while nobody has looked at it.
    pub fn phase(&self) -> Phase {
        self.status.as_ref().map(|status| status.phase).unwrap_or_default()
    }
}

fn start_deadline() -> i32 {
    3_600
}

fn ready_deadline() -> i32 {
    86_400
}

fn client_idle() -> i32 {
    1_800
}

/// How much of a disk a backup reads.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackupType {
    /// All data of every disk.
    #[default]
    Full,
    /// What changed since a checkpoint, where a disk can start from it; all data of the others.
    Incremental,
}

impl BackupType {
    /// As objects spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "Full",
            Self::Incremental => "Incremental",
        }
    }
}

/// What to do where a disk cannot start from the checkpoint.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InvalidCheckpointPolicy {
    /// Read it in full.
    #[default]
    FullBackup,
    /// Fail.
    Fail,
}

/// What to do while the VM is off.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OfflinePolicy {
    /// Wait until it runs.
    #[default]
    Wait,
    /// Fail with `VmNotRunning`.
    Refuse,
}

/// Who makes the ImageTransfers.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransferPolicy {
    /// The operator, one per disk.
    #[default]
    Auto,
    /// The user.
    Manual,
}

/// How the guest is quiesced while the point in time is taken.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Quiesce {
    /// Required: fail if the guest cannot be frozen. BestEffort: go on, and say so. None: do not try.
    #[serde(default)]
    pub mode: QuiesceMode,
    /// Seconds the guest agent is given to freeze, and again to thaw.
    #[serde(default = "quiesce_timeout")]
    #[schemars(range(min = 1, max = 60))]
    pub timeout_seconds: i32,
}

impl Default for Quiesce {
    fn default() -> Self {
        Self { mode: QuiesceMode::default(), timeout_seconds: quiesce_timeout() }
    }
}

fn quiesce_timeout() -> i32 {
    10
}

/// Whether a freeze is needed.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QuiesceMode {
    /// Fail without it.
    Required,
    /// Try, go on without.
    #[default]
    BestEffort,
    /// Do not try.
    None,
}

/// What was observed of the backup.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct VmBackupStatus {
    /// The generation of the spec that this status answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the backup is: Initializing, Ready, Finalizing, then Succeeded or Failed.
    #[serde(default)]
    pub phase: Phase,
    /// Ready: the disks can be read (and after success). Reconciling: not done yet, with the reason.
    /// Stalled: failed for good. Succeeded: the outcome. HostClean: nothing is left on the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// The node whose agent does the work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node_name: Option<String>,
    /// The libvirt uuid of the VM that `spec.vm` was resolved to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 36))]
    pub vm_uuid: Option<String>,
    /// Name of the VmCheckpoint made with this backup; absent when only raw disks are in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub to_checkpoint: Option<String>,
    /// Name of the VmCheckpoint that its incremental disks start from; absent when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub from_checkpoint: Option<String>,
    /// Disks wholly read, of all: `1/2`. Bytes are in the ImageTransfers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub progress: Option<String>,
    /// The disks in this backup.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub disks: Vec<BackupDisk>,
    /// When it was bound to its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// The point in time that the backup holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_time: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// For how long the guest's file systems were frozen, in milliseconds; absent when they were not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub frozen_milliseconds: Option<i64>,
}

/// One disk of a backup.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct BackupDisk {
    /// The disk's target in the domain, `vda`.
    #[schemars(length(max = 64))]
    pub name: String,
    /// How much of it is read.
    pub mode: DiskMode,
    /// Why all of it is read although the backup is incremental.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode_reason: Option<FullReason>,
    /// More about the reason: libvirt's words, say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub mode_message: Option<String>,
    /// Its virtual size in bytes, at the point in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub size: Option<i64>,
    /// Whether this disk is in the checkpoint, hence can be read incrementally next time.
    #[serde(default)]
    pub in_checkpoint: bool,
    /// Bytes that had to be read and were not, at the last finalize; 0 when all was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub missing_bytes: Option<i64>,
    /// Where QEMU serves the disk on the node, for clients that speak NBD themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<NbdExport>,
}

/// How much of a disk is read.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskMode {
    /// All its data.
    Full,
    /// What changed since the checkpoint.
    Incremental,
}

/// Why a disk is read in full by an incremental backup.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum FullReason {
    /// There is no usable checkpoint.
    NoBase,
    /// Its image keeps no dirty bitmap: it is raw, say.
    CannotKeepBitmap,
    /// The checkpoint does not have it: it is new, or was left out of that backup.
    NotInCheckpoint,
    /// Another disk has its target now.
    DiskReplaced,
    /// Its size is another one than at the checkpoint.
    SizeChanged,
    /// Its bitmap is missing or inconsistent.
    BitmapInvalid,
}

impl std::fmt::Display for FullReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NoBase => "there is no usable checkpoint",
            Self::CannotKeepBitmap => "its image keeps no dirty bitmap",
            Self::NotInCheckpoint => "the checkpoint does not have it",
            Self::DiskReplaced => "another disk has its target now",
            Self::SizeChanged => "its size changed",
            Self::BitmapInvalid => "its bitmap is missing or inconsistent",
        })
    }
}

/// An NBD export on a unix socket of the node.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct NbdExport {
    /// Path of the socket on the node.
    #[schemars(length(max = 108))]
    pub socket: String,
    /// Name of the export.
    #[schemars(length(max = 253))]
    pub export: String,
    /// Of an incremental: from this byte on everything counts as dirty, whatever the export's dirty bitmap says. A disk that
    /// was cut and grown back reads zero there, and QEMU forgot that it changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub changed_from: Option<i64>,
}
