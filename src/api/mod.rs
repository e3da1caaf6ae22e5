//! The Kubernetes kinds of Virtmark (`virtmark.dev/v1alpha1`): what users write and read.
//!
//! Types, names and CEL rules only. Nothing here decides anything, talks to an API server or knows
//! libvirt: the operator and the agent both build on this vocabulary and never call each other.
//!
//! ```text
//!   VmBackup --1:n--> ImageTransfer      one disk's bytes, a ticket
//!      |  \--1:1----> VmCheckpoint       where the next incremental starts
//!      v
//!   LibvirtDomain <--published from-- DomainSighting (one per node and uuid)
//! ```

mod backup;
mod bitmap;
mod checkpoint;
pub mod conditions;
mod domain;
mod schema;
mod sighting;
#[cfg(test)]
mod tests;
mod transfer;

pub use backup::{
    BackupDisk, BackupType, DiskMode, FullReason, InvalidCheckpointPolicy, NbdExport, OfflinePolicy, Quiesce,
    QuiesceMode, TransferPolicy, VmBackup, VmBackupSpec, VmBackupStatus,
};
pub use bitmap::{
    BITMAP_PREFIX, BitmapHealth, BitmapOwner, DomainCheckpoint, SightedBitmap, SightedCheckpoint,
    bitmap_prefix,
};
pub use checkpoint::{
    BaseRank, CheckpointDisk, CheckpointDiskStatus, VmCheckpoint, VmCheckpointSpec, VmCheckpointStatus,
};
pub use domain::{LibvirtDomain, LibvirtDomainSpec, LibvirtDomainStatus};
pub use schema::{is_disk_target, is_volume_name};
pub use sighting::{BackingFile, BackupSupport, DomainDisk, DomainSighting, DomainSightingSpec, DomainState};
pub use transfer::{
    Direction, ImageTransfer, ImageTransferSpec, ImageTransferStatus, NewVolume, Protocol, TimeoutPolicy,
    TransferFormat, TransferState, VolumeFormat,
};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{CustomResourceDefinition, JSON};
use serde::{Deserialize, Serialize};

/// The API group of every kind.
pub const GROUP: &str = "virtmark.dev";

/// The finalizer that holds an object until its host is clean. Only the operator adds or removes it.
pub const FINALIZER: &str = "virtmark.dev/host-clean";

/// The type of the Secrets that carry a ticket's URL.
pub const TICKET_SECRET_TYPE: &str = "virtmark.dev/ticket";

/// Label on what belongs to one backup: its uid, the id that logs, events and metrics carry.
pub const LABEL_BACKUP: &str = "virtmark.dev/backup-uid";

/// Label that tells whose chain a backup or checkpoint belongs to (two products on one VM).
pub const LABEL_OWNER: &str = "virtmark.dev/owner";

/// Label on checkpoints: the libvirt uuid of their VM, to delete all of one at once.
pub const LABEL_VM_UUID: &str = "virtmark.dev/vm-uuid";

/// The field manager of the operator's writes.
pub const OPERATOR: &str = "virtmark-operator";

/// The field manager of the agents' writes.
pub const AGENT: &str = "virtmark-agent";

/// The name of the Lease, in the operator's namespace, by which the agent of `node` says that it lives.
pub fn agent_lease(node: &str) -> String {
    format!("virtmark-agent-{node}")
}

/// The signer of the agents' certificates: the operator.
pub const SIGNER: &str = "virtmark.dev/agent";

/// The name of the Secret with the signer's CA, and of the ConfigMap that publishes whom to trust, in the operator's namespace.
pub const AUTHORITY: &str = "virtmark-ca";

/// The common name in the certificate request of the agent of `node`.
pub fn certificate_subject(node: &str) -> String {
    format!("virtmark-agent:{node}")
}

/// The name of the DomainSighting of the domain `uuid` on `node`, which admission checks.
pub fn sighting_name(node: &str, uuid: &str) -> String {
    format!("{node}.{uuid}")
}

/// Where a one-shot object is in its life.
#[derive(Serialize, Deserialize, schemars::JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Being validated, bound to a node and prepared on its host.
    #[default]
    Initializing,
    /// The bytes can be read.
    Ready,
    /// Ending: the host is being cleaned.
    Finalizing,
    /// Usable again once somebody says so (transfers only).
    Paused,
    /// Ended well.
    Succeeded,
    /// Ended otherwise; the conditions say why.
    Failed,
    /// Ended because the user asked for it (transfers only).
    Cancelled,
}

impl Phase {
    /// Every phase.
    pub const ALL: &[Self] = &[
        Self::Initializing,
        Self::Ready,
        Self::Finalizing,
        Self::Paused,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// As objects spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Initializing => "Initializing",
            Self::Ready => "Ready",
            Self::Finalizing => "Finalizing",
            Self::Paused => "Paused",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
            Self::Cancelled => "Cancelled",
        }
    }

    /// Whether the object has come to its end and never moves again.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// What the user wants of a running backup. One way: it never returns to `Running`.
#[derive(Serialize, Deserialize, schemars::JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DesiredState {
    /// Go on.
    #[default]
    Running,
    /// The data was read: end it well.
    Finalized,
    /// Give up: end it and leave nothing.
    Cancelled,
}

/// Every CRD of this group, in the order in which they are applied.
pub fn crds() -> Vec<CustomResourceDefinition> {
    use kube::CustomResourceExt;
    vec![
        unseen(VmBackup::crd()),
        unseen(VmCheckpoint::crd()),
        unseen(ImageTransfer::crd()),
        unseen(LibvirtDomain::crd()),
        DomainSighting::crd(),
    ]
}

/// Gives a new object a status that answers no generation, until a controller has looked at it. kstatus calls an
/// object without a status done, and whoever applied it would go on at once.
fn unseen(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut crd.spec.versions {
        let schema = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut());
        let properties = schema.and_then(|schema| schema.properties.as_mut());
        if let Some(status) = properties.and_then(|properties| properties.get_mut("status")) {
            status.default = Some(JSON(serde_json::json!({"observedGeneration": -1})));
        }
    }
    crd
}
