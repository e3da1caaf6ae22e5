//! `ImageTransfer`: permission to move one disk's bytes. The ticket itself is in a Secret, never here.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{NbdExport, Phase, schema};

/// Which bytes may be moved, and how.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[cfg_attr(test, kube(cel))]
#[kube(
    group = "virtmark.dev",
    version = "v1alpha1",
    kind = "ImageTransfer",
    plural = "imagetransfers",
    singular = "imagetransfer",
    shortname = "imgt",
    category = "virtmark",
    namespaced,
    status = "ImageTransferStatus",
    derive = "PartialEq",
    doc = "ImageTransfer is the permission to read one disk of a VmBackup, or to write a new libvirt volume. When it is Ready, the Secret named in status.ticketSecret holds the URL, which is a bearer secret.",
    selectable = ".spec.backup",
    selectable = ".status.nodeName",
    printcolumn(name = "Backup", type_ = "string", json_path = ".spec.backup"),
    printcolumn(name = "Disk", type_ = "string", json_path = ".spec.disk"),
    printcolumn(name = "Volume", type_ = "string", json_path = ".spec.volume.name", priority = 1),
    printcolumn(name = "Direction", type_ = "string", json_path = ".spec.direction"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.protocol != 'Nbd' || !has(self.inactivityTimeoutSeconds)")
        .message("inactivityTimeoutSeconds needs protocol Imageio: what is read of QEMU's socket is not seen")
        .field_path(".inactivityTimeoutSeconds"),
    validation = Rule::new("self.protocol != 'Nbd' || self.state != 'Paused'")
        .message("a transfer with protocol Nbd cannot be paused: QEMU serves it").field_path(".state"),
    validation = Rule::new("self.direction == 'Upload' || has(self.backup) && has(self.disk) && !has(self.volume)")
        .message("a download names a backup and a disk of it, and no volume"),
    validation = Rule::new("self.direction != 'Upload' || has(self.volume) && !has(self.backup) && !has(self.disk)")
        .message("an upload names a new volume, and neither backup nor disk"),
    validation = Rule::new("self.direction != 'Upload' || self.protocol != 'Nbd'")
        .message("an upload needs protocol Imageio").field_path(".protocol")
)]
pub struct ImageTransferSpec {
    /// To download: name of the VmBackup to read from, in this namespace. It may not be Ready yet, or not exist yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 180), regex(pattern = schema::OBJECT_NAME))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("backup is immutable"))]
    pub backup: Option<String>,
    /// To download: target of the disk in the domain, `vda`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = schema::TARGET))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("disk is immutable"))]
    pub disk: Option<String>,
    /// To upload: the libvirt volume to make. It has this name once the transfer Succeeded, and nothing is left of one that did not.
    /// An admin allows which namespaces may use which pools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("volume is immutable"))]
    pub volume: Option<NewVolume>,
    /// Download: from the VM's disk to the client. Upload: from the client to a new volume.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("direction is immutable"))]
    pub direction: Direction,
    /// The format of the bytes on the wire.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("format is immutable"))]
    pub format: TransferFormat,
    /// Imageio: HTTPS and a unix socket on the node, as ovirt-imageio serves images. Nbd: QEMU's own NBD
    /// socket on the node; what is read there is not seen, so finalizing such a transfer says that the
    /// disk was read wholly.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("protocol is immutable"))]
    pub protocol: Protocol,
    /// What you want of it: Running, or Paused for a while, then Finalized when the disk was read, or Cancelled.
    /// Finalizing the backup ends its transfers too. From an end it never goes back.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf || oldSelf in ['Running', 'Paused'] || self == 'Cancelled'")
        .message("state goes one way: Running or Paused, Finalized, Cancelled"))]
    pub state: TransferState,
    /// Seconds without any request on the ticket after which timeoutPolicy is obeyed. Unset: as long as the backup lives, which
    /// has a clientIdleSeconds of its own; of an upload a day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2_592_000))]
    pub inactivity_timeout_seconds: Option<i32>,
    /// What to do after inactivityTimeoutSeconds. Cancel: end it. Pause: answer no request until the spec is changed, by more
    /// inactivityTimeoutSeconds say; the ticket stays the same.
    #[serde(default)]
    pub timeout_policy: TimeoutPolicy,
}

impl ImageTransferSpec {
    /// The backup that it reads from; empty of an upload.
    pub fn backup(&self) -> &str {
        self.backup.as_deref().unwrap_or_default()
    }

    /// The disk that it reads, or the name of the volume that it makes.
    pub fn disk(&self) -> &str {
        let volume = || self.volume.as_ref().map(|volume| volume.name.as_str());
        self.disk.as_deref().or_else(volume).unwrap_or_default()
    }
}

/// A libvirt volume that an upload makes.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct NewVolume {
    /// The node with the pool.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// The libvirt storage pool: active, of type dir, fs or netfs, in a folder of the chart's agent.imageDirs.
    #[schemars(length(min = 1, max = 64), regex(pattern = schema::VOLUME))]
    pub pool: String,
    /// The volume's name, hence its file's. There must be none of that name.
    #[schemars(length(min = 1, max = 128), regex(pattern = schema::VOLUME))]
    pub name: String,
    /// The format of the volume. What is uploaded is the guest's bytes in either case.
    #[serde(default)]
    pub format: VolumeFormat,
    /// Bytes that the guest will see.
    #[schemars(range(min = 512, max = 1_125_899_906_842_624_u64))]
    #[x_kube(validation = Rule::new("self % 512 == 0").message("size is a multiple of 512"))]
    pub size: i64,
}

/// The format of a volume.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub enum VolumeFormat {
    /// qcow2: backed up incrementally.
    #[default]
    Qcow2,
    /// raw.
    Raw,
}

impl VolumeFormat {
    /// As QEMU spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// What the user wants of a transfer.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransferState {
    /// Go on.
    #[default]
    Running,
    /// Answer no request until it is Running again.
    Paused,
    /// The disk was read: end it well.
    Finalized,
    /// Give up: end it and leave nothing.
    Cancelled,
}

/// What to do about a transfer that nobody uses.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimeoutPolicy {
    /// End it.
    #[default]
    Cancel,
    /// Answer no request until the spec is changed.
    Pause,
}

/// Which way the bytes go.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// From the VM's disk to the client.
    #[default]
    Download,
    /// From the client to a new volume.
    Upload,
}

/// The format of the bytes on the wire.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub enum TransferFormat {
    /// The guest's bytes.
    #[default]
    Raw,
}

/// How the bytes are moved.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// The images API of ovirt-imageio.
    #[default]
    Imageio,
    /// NBD on the node.
    Nbd,
}

/// What was observed of the transfer.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ImageTransferStatus {
    /// The generation of the spec that this status answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the transfer is: Initializing, Ready, maybe Paused, then Succeeded, Failed or Cancelled.
    #[serde(default)]
    pub phase: Phase,
    /// Ready: the ticket answers. Reconciling: not done yet. Stalled: failed for good. Succeeded: the
    /// outcome. HostClean: the ticket is gone from the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// The node that serves the bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node_name: Option<String>,
    /// The uid of the VmBackup that `spec.backup` was resolved to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub backup_uid: Option<String>,
    /// Virtual size of the disk in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub size: Option<i64>,
    /// Bytes of the disk served so far; each counts once. Written at most every 5 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub transferred_bytes: Option<i64>,
    /// transferredBytes of size, for people: `42%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub progress: Option<String>,
    /// Name of the Secret (type `virtmark.dev/ticket`) with `url`, `unixSocket` and `ca.crt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub ticket_secret: Option<String>,
    /// With protocol Nbd: where QEMU serves the disk on the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<NbdExport>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
}
