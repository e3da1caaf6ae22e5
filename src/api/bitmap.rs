//! The dirty bitmaps of a domain's disks: as an agent reports them in a DomainSighting, and as users see them in a
//! LibvirtDomain.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;

/// The bitmaps of one name in a domain's disks: a checkpoint, or what is left of one.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct SightedCheckpoint {
    /// Their name.
    #[schemars(length(min = 1, max = 255))]
    pub name: String,
    /// The uid of the VmCheckpoint that they were looked at for; absent of those that no VmCheckpoint names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub checkpoint_uid: Option<String>,
    /// The disks that have one, or should.
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["target".into()]))]
    pub disks: Vec<SightedBitmap>,
}

/// One disk's bitmap.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct SightedBitmap {
    /// The disk's target in the domain.
    #[schemars(length(min = 1, max = 64), regex(pattern = schema::TARGET))]
    pub target: String,
    /// Whether it is there and whole.
    pub health: BitmapHealth,
    /// Bytes of the disk that one of its bits stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub granularity: Option<i64>,
    /// Bytes that it calls dirty, when last counted; it is counted while there is a QEMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub dirty_bytes: Option<i64>,
    /// libvirt's or qemu-img's words about one that is not whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub message: Option<String>,
}

/// What is known of one bitmap.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapHealth {
    /// It is there, and records.
    Whole,
    /// It is there, and inconsistent: it missed writes.
    Broken,
    /// It is not there.
    Missing,
    /// It is there; whether it is whole was not asked.
    Unknown,
}

/// The bitmaps of one name, as a LibvirtDomain lists them.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct DomainCheckpoint {
    /// Their name in the images, and in libvirt.
    #[schemars(length(max = 255))]
    pub name: String,
    /// Targets of the disks that have one.
    #[schemars(length(max = 64), inner(length(max = 64)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub disks: Vec<String>,
    /// Who made them.
    pub owner: BitmapOwner,
    /// Name of the VmCheckpoint that names them; absent of orphans.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub vm_checkpoint: Option<String>,
}

/// Who made a bitmap, by its name.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapOwner {
    /// Virtmark, for this cluster.
    Virtmark,
    /// Another product, or the Virtmark of another cluster: never removed.
    Foreign,
}

/// How the names of all bitmaps begin that Virtmark makes: libvirt never keeps a note of them.
pub const BITMAP_PREFIX: &str = "virtmark-";

/// How the names of the bitmaps begin that Virtmark makes for a cluster.
pub fn bitmap_prefix(cluster: &str) -> String {
    format!("{BITMAP_PREFIX}{cluster}-")
}
