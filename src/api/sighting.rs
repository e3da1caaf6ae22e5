//! `DomainSighting`: what one node's libvirt says of one domain. Written by that node's agent alone, in the
//! operator's namespace; users read the LibvirtDomain that the operator publishes from it.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{SightedCheckpoint, schema};

/// A domain as one libvirt knows it. It is all report and no wish, so it has no status: a sighting is
/// whole from the moment it is created, and admission can hold its writer to its node.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[cfg_attr(test, kube(cel))]
#[kube(
    group = "virtmark.dev",
    version = "v1alpha1",
    kind = "DomainSighting",
    plural = "domainsightings",
    singular = "domainsighting",
    shortname = "dsight",
    category = "virtmark",
    namespaced,
    derive = "PartialEq",
    doc = "DomainSighting is what the libvirt of one node says of one domain. Agents write it; do not edit it: read the LibvirtDomain instead.",
    selectable = ".spec.nodeName",
    printcolumn(name = "Domain", type_ = "string", json_path = ".spec.name"),
    printcolumn(name = "State", type_ = "string", json_path = ".spec.state"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct DomainSightingSpec {
    /// The node whose libvirt has the domain.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("nodeName is immutable"))]
    pub node_name: String,
    /// The domain's uuid.
    #[schemars(length(min = 36, max = 36), regex(pattern = schema::UUID))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("uuid is immutable"))]
    pub uuid: String,
    /// The domain's name in libvirt, as it is: data, never a path or a selector.
    #[schemars(length(min = 1, max = 1024))]
    pub name: String,
    /// Whether it runs.
    pub state: DomainState,
    /// Its disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["target".into()]))]
    pub disks: Vec<DomainDisk>,
    /// The dirty bitmaps in them, by name; absent until they were looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub checkpoints: Option<Vec<SightedCheckpoint>>,
}

/// Whether a domain runs (libvirt's virDomainState, as far as a backup cares).
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainState {
    /// Running.
    Running,
    /// Stopped by its user, QEMU is there: it can be backed up.
    Paused,
    /// Stopped by an error, starting, shutting down or migrating in.
    Busy,
    /// Defined, no QEMU.
    Off,
    /// No longer known to any libvirt (in a LibvirtDomain only).
    Missing,
    /// Its node is down (in a LibvirtDomain only).
    NodeLost,
}

impl DomainState {
    /// As objects spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Busy => "Busy",
            Self::Off => "Off",
            Self::Missing => "Missing",
            Self::NodeLost => "NodeLost",
        }
    }

    /// Whether there is a QEMU process.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Busy)
    }
}

/// One disk of a domain.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct DomainDisk {
    /// Its target in the domain, `vda`.
    #[schemars(length(min = 1, max = 64), regex(pattern = schema::TARGET))]
    pub target: String,
    /// Its serial number, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub serial: Option<String>,
    /// Its virtual size in bytes; absent when libvirt cannot tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub size: Option<i64>,
    /// The format of its image, `qcow2` or `raw`.
    #[schemars(length(max = 32))]
    pub format: String,
    /// The image and what backs it, top first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub backing_chain: Vec<BackingFile>,
    /// Whether it can be backed up.
    pub backup: BackupSupport,
    /// Why it cannot, or not incrementally.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub reason: Option<String>,
}

/// One layer of a disk's backing chain.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct BackingFile {
    /// Its path on the node, or how libvirt names the source.
    #[schemars(length(max = 4096))]
    pub file: String,
    /// Its format.
    #[schemars(length(max = 32))]
    pub format: String,
}

/// Whether a disk can be backed up.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupSupport {
    /// Fully and incrementally.
    Incremental,
    /// Only fully: its image cannot keep a dirty bitmap.
    Full,
    /// Not at all.
    Unsupported,
}
