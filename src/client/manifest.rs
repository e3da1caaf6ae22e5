//! The manifest of a restore point: what its files are and what they lie over. A format that is kept for years, so it
//! borrows no type of the Kubernetes API. It never touches a file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::names::is_plain;

/// The version that is written.
pub const VERSION: u32 = 1;

/// Why a manifest cannot be believed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// It is no JSON, is cut off, or lacks something.
    #[error("the manifest cannot be read: {0}")]
    Unreadable(String),
    /// Of a later client.
    #[error("the manifest has version {0}, and this virtmark knows version {VERSION}: use a newer one")]
    Version(u32),
    /// A name in it that leads elsewhere.
    #[error("the manifest names {0:?}, which is no plain name of a file or folder")]
    Name(String),
}

/// A restore point: one backup of one VM, in one folder. `docs/restore-point.schema.json` is its schema.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// The version of this format: 1.
    pub version: u32,
    /// The name of the restore point, and of its folder.
    pub name: String,
    /// The client that wrote it, `virtmark 0.1.0`.
    pub client: String,
    /// The VM.
    pub vm: Vm,
    /// The VmBackup that was read.
    pub backup: Backup,
    /// The point in time that the disks hold, in RFC 3339.
    pub taken_at: String,
    /// Whether the guest's file systems were frozen at that moment.
    pub quiesced: bool,
    /// Where an incremental backup that lies over this one can start; absent when the backup made no checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// The restore point that the incremental disks lie over; absent when every disk is whole by itself.
    pub parent: Option<Parent>,
    /// The disks.
    pub disks: Vec<Disk>,
}

/// The VM, as far as the API shows it.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Vm {
    /// The name of its LibvirtDomain.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its libvirt uuid.
    pub uuid: String,
    /// The LibvirtDomain's status, as it was when the backup began.
    pub status: serde_json::Value,
    /// The domain's whole XML. The API does not show it yet: absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_xml: Option<String>,
}

/// The VmBackup.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Backup {
    /// Its name.
    pub name: String,
    /// Its uid, which is the restore point's identity.
    pub uid: String,
    /// The node that it ran on.
    pub node: Option<String>,
    /// How it stood when the files were whole.
    pub outcome: Outcome,
}

/// How a backup stood when its files were whole.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It Succeeded: Virtmark saw too that all was read.
    Succeeded,
    /// All was read, and whether it Succeeded was not seen: it was left for somebody else to finalize (`virtmark backup
    /// download`), or it was gone before.
    Read,
}

/// A VmCheckpoint.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Checkpoint {
    /// Its name.
    pub name: String,
    /// The bitmap's name in the images. A checkpoint of the same name with another bitmap is another one.
    pub bitmap: String,
}

/// The restore point below.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Parent {
    /// Its name.
    pub name: String,
    /// The uid of its VmBackup.
    pub uid: String,
}

/// A disk in a restore point.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Disk {
    /// Its target in the domain, `vda`.
    pub target: String,
    /// Its serial number, if it has one.
    pub serial: Option<String>,
    /// Its virtual size in bytes.
    pub size: u64,
    /// Whether the file is the whole disk, or lies over another.
    pub mode: ReadMode,
    /// Why the whole disk was read although an incremental backup was asked for; `Merged` when `chain merge` made it whole.
    pub mode_reason: Option<String>,
    /// Whether it is in the checkpoint: the next backup can be incremental.
    pub in_checkpoint: bool,
    /// The file, in the restore point's folder.
    pub file: String,
    /// Its format.
    pub format: DiskFormat,
    /// Its length in bytes.
    pub bytes: u64,
    /// BLAKE3 of the file, in hexadecimal digits.
    pub blake3: String,
    /// The file that it lies over, in the parent; absent of a full one.
    pub base: Option<Base>,
    /// What of the disk was covered.
    pub covered: Covered,
}

/// The file below a disk's.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Base {
    /// The file's name in the parent's folder.
    pub file: String,
    /// Its format.
    pub format: DiskFormat,
}

/// What of a disk was covered, in bytes.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Covered {
    /// Of data that was read.
    pub read: u64,
    /// Of zeroes that were written without being read.
    pub zeroed: u64,
}

/// Whether a file is a whole disk.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReadMode {
    /// It is.
    Full,
    /// It holds what changed, over another file.
    Incremental,
}

impl ReadMode {
    /// As files are named.
    #[must_use]
    pub const fn short(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incr",
        }
    }
}

/// The format of a file.
#[derive(Serialize, Deserialize, JsonSchema, clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// qcow2.
    #[default]
    Qcow2,
    /// The guest's bytes, sparse.
    Raw,
}

impl DiskFormat {
    /// As qemu-img spells it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

impl Manifest {
    /// Reads one. Nothing in it leads out of the folder of restore points.
    ///
    /// # Errors
    /// When it is cut off, of another version, or names what it must not.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let unreadable = |error: serde_json::Error| ManifestError::Unreadable(error.to_string());
        let Versioned { version } = serde_json::from_str(text).map_err(unreadable)?;
        if version != VERSION {
            return Err(ManifestError::Version(version));
        }
        let manifest: Self = serde_json::from_str(text).map_err(unreadable)?;
        let files = manifest
            .disks
            .iter()
            .flat_map(|disk| std::iter::once(&disk.file).chain(disk.base.as_ref().map(|base| &base.file)));
        let points =
            std::iter::once(&manifest.name).chain(manifest.parent.as_ref().map(|parent| &parent.name));
        match files.chain(points).find(|name| !is_plain(name)) {
            Some(bad) => Err(ManifestError::Name(bad.clone())),
            None => Ok(manifest),
        }
    }

    /// As it is stored.
    #[must_use]
    pub fn text(&self) -> String {
        // a manifest has no map with keys that are no strings, nor numbers that JSON lacks
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// The disk with this target.
    #[must_use]
    pub fn disk(&self, target: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.target == target)
    }

    /// Whether any disk lies over another restore point.
    #[must_use]
    pub fn is_incremental(&self) -> bool {
        self.disks.iter().any(|disk| disk.mode == ReadMode::Incremental)
    }
}

/// The schema of the manifest, for `docs/restore-point.schema.json`.
#[must_use]
pub fn schema() -> serde_json::Value {
    let mut schema = schemars::schema_for!(Manifest);
    schema.insert("$id".to_owned(), "https://virtmark.dev/schemas/restore-point-v1.json".into());
    schema.to_value()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A restore point with one disk, for the tests of others.
    pub(crate) fn example(name: &str, parent: Option<&str>) -> Manifest {
        let mode = if parent.is_some() { ReadMode::Incremental } else { ReadMode::Full };
        let base = parent.map(|_| Base { file: "vda.full.qcow2".to_owned(), format: DiskFormat::Qcow2 });
        Manifest {
            version: VERSION,
            name: name.to_owned(),
            client: "virtmark 0.1.0".to_owned(),
            vm: Vm {
                name: "db01".to_owned(),
                namespace: "vms".to_owned(),
                uuid: "u-1".to_owned(),
                status: serde_json::json!({}),
                domain_xml: None,
            },
            backup: Backup {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                node: None,
                outcome: Outcome::Succeeded,
            },
            taken_at: format!("2026-11-30T00:00:0{}Z", name.len() % 10),
            quiesced: false,
            checkpoint: Some(Checkpoint { name: format!("cp-{name}"), bitmap: format!("bm-{name}") }),
            parent: parent.map(|name| Parent { name: name.to_owned(), uid: format!("uid-{name}") }),
            disks: vec![Disk {
                target: "vda".to_owned(),
                serial: None,
                size: 1 << 20,
                mode,
                mode_reason: None,
                in_checkpoint: true,
                file: format!("vda.{}.qcow2", mode.short()),
                format: DiskFormat::Qcow2,
                bytes: 10,
                blake3: "00".to_owned(),
                base,
                covered: Covered::default(),
            }],
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        for manifest in [example("a", None), example("b", Some("a"))] {
            assert_eq!(Manifest::parse(&manifest.text()), Ok(manifest));
        }
    }

    #[test]
    fn a_manifest_that_is_cut_off_anywhere_is_refused() {
        let text = example("b", Some("a")).text();
        for end in 0..text.trim_end().len() {
            assert!(matches!(Manifest::parse(&text[..end]), Err(ManifestError::Unreadable(_))), "{end}");
        }
    }

    #[test]
    fn other_versions_and_names_that_lead_elsewhere_are_refused() {
        let later = example("a", None).text().replace("\"version\": 1", "\"version\": 2");
        assert_eq!(Manifest::parse(&later), Err(ManifestError::Version(2)));
        let mut manifest = example("b", Some("a"));
        manifest.disks[0].file = "../../etc/passwd".to_owned();
        assert!(matches!(Manifest::parse(&manifest.text()), Err(ManifestError::Name(_))));
        let mut manifest = example("b", Some("a"));
        manifest.parent = Some(Parent { name: "..".to_owned(), uid: String::new() });
        assert!(matches!(Manifest::parse(&manifest.text()), Err(ManifestError::Name(_))));
    }
}
