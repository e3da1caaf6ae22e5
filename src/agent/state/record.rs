//! What the state directory has of one backup: the plan, and how far it went. Pure; it reads and writes nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::checked;
use crate::agent::backup::life::{Life, Outcome};
use crate::api::{FullReason, QuiesceMode, is_disk_target};

/// What is to be done for one backup, fixed when it is bound, and how far it went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The VmBackup's uid.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The LibvirtDomain's name.
    pub vm: String,
    /// The domain's uuid.
    pub vm_uuid: String,
    /// Name of the checkpoint in libvirt, of the bitmaps in the images; none when only raw disks are in it.
    pub bitmap: Option<String>,
    /// The checkpoint that its incremental disks start from.
    #[serde(default)]
    pub base: Option<Base>,
    /// The disks.
    pub disks: Vec<PlannedDisk>,
    /// Whether it is of all the VM's disks, and not of those that its user named.
    #[serde(default)]
    pub all_disks: bool,
    /// Whether the images of its checkpoint are marked, as far as any are to be.
    #[serde(default)]
    pub marked: bool,
    /// libvirt's number of the QEMU that it was prepared with; none before.
    #[serde(default)]
    pub qemu: Option<u32>,
    /// Whether to freeze the guest.
    pub quiesce: QuiesceMode,
    /// Seconds the guest agent is given.
    pub quiesce_seconds: i32,
    /// How far it went.
    pub life: Life,
}

impl Record {
    /// Whether the backup succeeded, and nothing of it is left on the host.
    pub fn has_succeeded(&self) -> bool {
        self.life.is_ended() && self.life.outcome == Some(Outcome::Succeeded)
    }

    /// What of it cannot be so in a record that an agent wrote: it would lead to other files or objects.
    pub fn unsound(&self) -> Option<&'static str> {
        let name = |text: &str, more: &[u8], longest: usize| {
            let fits = |byte: u8| byte.is_ascii_alphanumeric() || more.contains(&byte);
            (1..=longest).contains(&text.len()) && text.bytes().all(fits)
        };
        let object = |text: &str| name(text, b"-.", 253) && !text.starts_with('.');
        let base = self.base.iter().flat_map(|base| base.marks.values().chain([&base.bitmap]));
        let marks = self.disks.iter().filter_map(|disk| disk.mark.as_ref());
        if checked(&self.uid).is_err() {
            Some("uid")
        } else if checked(&self.vm_uuid).is_err() {
            Some("vm_uuid")
        } else if !object(&self.namespace) || !object(&self.name) || !object(&self.vm) {
            Some("name")
        } else if !self.bitmap.iter().chain(base).chain(marks).all(|bitmap| name(bitmap, b"_.:-", 265)) {
            Some("bitmap")
        } else if !self.disks.iter().all(|disk| is_disk_target(&disk.target)) {
            Some("disk")
        } else if !self.disks.iter().all(|disk| disk.image.as_ref().is_none_or(|image| image.is_absolute())) {
            Some("image")
        } else {
            None
        }
    }
}

/// The checkpoint that an incremental backup starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its name in libvirt, and of its bitmaps.
    pub bitmap: String,
    /// When it was made, in seconds since 1970.
    pub created: i64,
    /// A disk whose bitmap is not whole fails the backup, and is not read in full.
    pub strict: bool,
    /// Whether libvirt knew it before this backup came: then it is another product's, whose note is left as it is. `None`
    /// until that was asked.
    #[serde(default)]
    pub noted: Option<bool>,
    /// By disk, the bitmap that it put into that disk's image alone.
    #[serde(default)]
    pub marks: BTreeMap<String, String>,
    /// By disk, its virtual size in bytes when the checkpoint was made, where that is known.
    #[serde(default)]
    pub sizes: BTreeMap<String, u64>,
}

/// One disk of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedDisk {
    /// Its target in the domain, and the name of its export.
    pub target: String,
    /// Its virtual size in bytes when the backup began; before, what the inventory said.
    pub size: u64,
    /// Path of its image on this host, for bitmaps of a VM that is off.
    pub image: Option<PathBuf>,
    /// Whether the checkpoint has a bitmap in it.
    pub in_checkpoint: bool,
    /// Whether what changed since the base is read, and not all.
    #[serde(default)]
    pub incremental: bool,
    /// Why all is read although the backup is incremental, and more about it.
    #[serde(default)]
    pub full_because: Option<(FullReason, Option<String>)>,
    /// Of an incremental one, from where on all is read as changed: once the job runs, and that was looked at.
    #[serde(default)]
    pub changed_from: Option<u64>,
    /// The bitmap that the checkpoint puts into this disk's image alone.
    #[serde(default)]
    pub mark: Option<String>,
}
