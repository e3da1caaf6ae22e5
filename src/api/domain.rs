//! `LibvirtDomain`: the inventory a tenant sees. The operator alone writes it, from DomainSightings.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use super::{DomainCheckpoint, DomainDisk, DomainState, schema};

/// Which domain this is.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[cfg_attr(test, kube(cel))]
#[kube(
    group = "virtmark.dev",
    version = "v1alpha1",
    kind = "LibvirtDomain",
    plural = "libvirtdomains",
    singular = "libvirtdomain",
    shortname = "lvd",
    category = "virtmark",
    namespaced,
    status = "LibvirtDomainStatus",
    derive = "PartialEq",
    doc = "LibvirtDomain is a virtual machine that some node's libvirt knows. Virtmark publishes it; name it in a VmBackup's spec.vm.",
    selectable = ".status.nodeName",
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.nodeName"),
    printcolumn(name = "Incremental", type_ = "string", json_path = ".status.incremental"),
    printcolumn(name = "LastBackup", type_ = "date", json_path = ".status.lastBackupTime"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct LibvirtDomainSpec {
    /// The domain's uuid, its identity: it may move between nodes and change its name.
    #[schemars(length(min = 36, max = 36), regex(pattern = schema::UUID))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("uuid is immutable"))]
    pub uuid: String,
}

/// What the nodes report of the domain.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LibvirtDomainStatus {
    /// The generation of the spec that this status answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready: a backup of it can start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Whether it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<DomainState>,
    /// The node that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node_name: Option<String>,
    /// The domain's name in libvirt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub domain_name: Option<String>,
    /// Disks that can be backed up incrementally, of all: `1/2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub incremental: Option<String>,
    /// Its disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["target".into()]))]
    pub disks: Vec<DomainDisk>,
    /// Checkpoints that its images and libvirt hold: those of VmCheckpoints, orphans, and those of others. Of a VM that
    /// runs, a bitmap that no VmCheckpoint and no libvirt names shows once its QEMU has stored it, when that ends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub checkpoints: Vec<DomainCheckpoint>,
    /// Name of the last VmBackup that succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub last_backup: Option<String>,
    /// The point in time that it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_backup_time: Option<Time>,
}
