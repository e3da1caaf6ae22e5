//! The XML that libvirt speaks about domains, backups and checkpoints, as values. Pure: no libvirt calls.
//!
//! Sources: libvirt's formatdomain, formatbackup and formatcheckpoint pages.

use std::collections::HashSet;

use serde::Deserialize;

use crate::api::{self, BackingFile, BackupSupport, DomainDisk};

/// Elements inside each other that are read: libvirt follows 200 images of a backing chain, and a few are around it.
const MAX_DEPTH: usize = 256;

/// Disks of a domain that the inventory holds.
const MOST_DISKS: usize = 128;

/// XML that is not what libvirt's schema says.
#[derive(Debug, thiserror::Error)]
#[error("libvirt's XML cannot be read: {0}")]
pub struct XmlError(#[from] quick_xml::DeError);

/// A `<domain>`, as far as backups care.
#[derive(Debug, Deserialize)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: String,
    /// Its devices.
    #[serde(default)]
    pub devices: Devices,
    #[serde(default, rename = "seclabel")]
    seclabels: Vec<SecLabel>,
}

/// The `<devices>` of a domain.
#[derive(Debug, Default, Deserialize)]
pub struct Devices {
    /// The `<disk>`s.
    #[serde(default, rename = "disk")]
    pub disks: Vec<Disk>,
    #[serde(default, rename = "channel")]
    channels: Vec<Channel>,
}

/// A `<disk>`.
#[derive(Debug, Deserialize)]
pub struct Disk {
    #[serde(rename = "@type", default)]
    kind: String,
    #[serde(rename = "@device", default)]
    device: String,
    #[serde(default)]
    driver: Option<Driver>,
    #[serde(default)]
    source: Option<Source>,
    #[serde(rename = "backingStore", default)]
    backing: Option<Box<BackingStore>>,
    #[serde(default)]
    mirror: Option<Empty>,
    /// Its `<target>`.
    pub target: Target,
    #[serde(default)]
    serial: Option<String>,
    #[serde(default)]
    readonly: Option<Empty>,
    #[serde(default)]
    shareable: Option<Empty>,
    #[serde(default)]
    transient: Option<Empty>,
}

/// The `<target>` of a disk.
#[derive(Debug, Deserialize)]
pub struct Target {
    /// `vda`.
    #[serde(rename = "@dev", default)]
    pub dev: String,
}

#[derive(Debug, Default, Deserialize)]
struct Driver {
    #[serde(rename = "@type", default)]
    format: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Source {
    #[serde(rename = "@file", default)]
    file: Option<String>,
    #[serde(rename = "@dev", default)]
    dev: Option<String>,
    #[serde(rename = "@protocol", default)]
    protocol: Option<String>,
    #[serde(rename = "@name", default)]
    name: Option<String>,
    #[serde(rename = "@volume", default)]
    volume: Option<String>,
}

impl Source {
    fn shown(&self) -> Option<String> {
        let network =
            || self.protocol.as_ref().map(|p| format!("{p}:{}", self.name.as_deref().unwrap_or_default()));
        self.file.clone().or_else(|| self.dev.clone()).or_else(network).or_else(|| self.volume.clone())
    }
}

#[derive(Debug, Default, Deserialize)]
struct BackingStore {
    #[serde(default)]
    format: Option<Driver>,
    #[serde(default)]
    source: Option<Source>,
    #[serde(rename = "backingStore", default)]
    backing: Option<Box<BackingStore>>,
}

#[derive(Debug, Deserialize)]
struct Empty {}

#[derive(Debug, Deserialize)]
struct Channel {
    #[serde(default)]
    target: Option<ChannelTarget>,
}

#[derive(Debug, Deserialize)]
struct ChannelTarget {
    #[serde(rename = "@name", default)]
    name: Option<String>,
    #[serde(rename = "@state", default)]
    state: Option<String>,
}

#[derive(Debug, Deserialize)]
struct SecLabel {
    #[serde(rename = "@model", default)]
    model: Option<String>,
    #[serde(default)]
    label: Option<String>,
}

impl Domain {
    /// Reads a `<domain>` document.
    ///
    /// # Errors
    /// When it is not one.
    pub fn parse(xml: &str) -> Result<Self, XmlError> {
        let mut reader = quick_xml::de::Deserializer::from_str(xml);
        Ok(Self::deserialize(reader.recursion_limit(MAX_DEPTH))?)
    }

    /// The disks that the inventory holds: those whose names the API server takes, each once.
    pub fn inventoried(&self) -> impl Iterator<Item = &Disk> {
        let mut targets = HashSet::new();
        let named = self.devices.disks.iter();
        named
            .filter(move |disk| api::is_disk_target(&disk.target.dev) && targets.insert(&disk.target.dev))
            .take(MOST_DISKS)
    }

    /// Whether the guest agent's channel is connected, so that a freeze has somebody to ask.
    pub fn guest_agent_connected(&self) -> bool {
        self.devices.channels.iter().filter_map(|channel| channel.target.as_ref()).any(|target| {
            target.name.as_deref() == Some("org.qemu.guest_agent.0")
                && target.state.as_deref() == Some("connected")
        })
    }

    /// The uid and gid that this QEMU runs as (`<seclabel model='dac'>`, `+64055:+64055`).
    pub fn qemu_owner(&self) -> Option<(u32, u32)> {
        let dac = self.seclabels.iter().find(|seclabel| seclabel.model.as_deref() == Some("dac"))?;
        let (user, group) = dac.label.as_deref()?.split_once(':')?;
        Some((user.trim_start_matches('+').parse().ok()?, group.trim_start_matches('+').parse().ok()?))
    }

    /// The targets of disks that a block job holds now.
    pub fn disks_with_block_job(&self) -> Vec<&str> {
        self.devices
            .disks
            .iter()
            .filter(|disk| disk.mirror.is_some())
            .map(|disk| disk.target.dev.as_str())
            .collect()
    }
}

impl Disk {
    /// Whether a medium is in it.
    pub fn has_source(&self) -> bool {
        self.source.as_ref().and_then(Source::shown).is_some()
    }

    /// The image format, `raw` when libvirt says none.
    pub fn format(&self) -> &str {
        self.driver.as_ref().and_then(|driver| driver.format.as_deref()).unwrap_or("raw")
    }

    /// The image's path on the node, for files and block devices; always an absolute one, since qemu-img takes any other
    /// text for more than a path: `json:`, `nbd:`.
    pub fn path(&self) -> Option<&str> {
        let source = self.source.as_ref()?;
        source.file.as_deref().or(source.dev.as_deref()).filter(|path| path.starts_with('/'))
    }

    /// The disk as the inventory shows it. `size` in bytes.
    pub fn sighted(&self, size: Option<u64>) -> DomainDisk {
        let (backup, reason) = self.support();
        DomainDisk {
            target: self.target.dev.clone(),
            serial: self.serial.clone().map(|serial| serial.chars().take(256).collect()),
            size: size.and_then(|size| i64::try_from(size).ok()),
            format: self.format().chars().take(32).collect(),
            backing_chain: self.chain(),
            backup,
            reason: reason.map(str::to_owned),
        }
    }

    /// Whether it is in a backup of all disks.
    pub fn can_be_backed_up(&self) -> bool {
        self.support().0 != BackupSupport::Unsupported
    }

    fn support(&self) -> (BackupSupport, Option<&'static str>) {
        let unsupported = |why| (BackupSupport::Unsupported, Some(why));
        match self.device.as_str() {
            "disk" | "" => {}
            "cdrom" => return unsupported("a CD-ROM is not backed up"),
            "floppy" => return unsupported("a floppy is not backed up"),
            "lun" => return unsupported("a LUN passed through is not seen by QEMU's block layer"),
            _ => return unsupported("this kind of device is not backed up"),
        }
        if !self.has_source() {
            return unsupported("it has no medium");
        }
        if self.readonly.is_some() {
            return unsupported("it is read-only: back its image up once, as a file");
        }
        if self.shareable.is_some() {
            return unsupported("it is shareable: other VMs write it without this QEMU seeing it");
        }
        if self.transient.is_some() {
            return unsupported("it is transient: its changes are thrown away at power-off");
        }
        if !matches!(self.kind.as_str(), "file" | "block") {
            return unsupported("only disks in files and block devices are supported");
        }
        match self.format() {
            "qcow2" => (BackupSupport::Incremental, None),
            "raw" => (BackupSupport::Full, Some("a raw image cannot keep a dirty bitmap")),
            _ => (BackupSupport::Full, Some("only qcow2 images can keep a dirty bitmap")),
        }
    }

    fn chain(&self) -> Vec<BackingFile> {
        let layer = |source: Option<&Source>, format: &str| BackingFile {
            file: source.and_then(Source::shown).unwrap_or_default().chars().take(4096).collect(),
            format: format.chars().take(32).collect(),
        };
        let mut chain = Vec::new();
        if self.has_source() {
            chain.push(layer(self.source.as_ref(), self.format()));
        }
        let mut next = self.backing.as_deref();
        while let Some(store) = next
            && let Some(source) = store.source.as_ref()
            && chain.len() < 256
        {
            let format = store.format.as_ref().and_then(|driver| driver.format.as_deref()).unwrap_or("raw");
            chain.push(layer(Some(source), format));
            next = store.backing.as_deref();
        }
        chain
    }
}

/// One disk to be backed up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupDisk<'a> {
    /// Its target, `vda`.
    pub target: &'a str,
    /// Path of its scratch image.
    pub scratch: &'a str,
    /// The checkpoint that it starts from; `None` for all of it.
    pub base: Option<&'a str>,
}

/// The name under which a disk's changes since its base are exported: an NBD client asks for
/// `qemu:dirty-bitmap:` and this.
pub fn dirty_context(target: &str) -> String {
    format!("backup-{target}")
}

/// The `<domainbackup>` of a pull backup over a unix socket (libvirt, formatbackup). Disks that are not listed are
/// left out.
pub fn backup_xml(socket: &str, disks: &[BackupDisk<'_>]) -> String {
    let mut xml = "<domainbackup mode='pull'>".to_owned();
    if let Some(base) = disks.iter().find_map(|disk| disk.base) {
        xml += &format!("<incremental>{}</incremental>", escape(base));
    }
    xml += &format!("<server transport='unix' socket='{}'/><disks>", escape(socket));
    for disk in disks {
        let mode = match disk.base {
            None => "backupmode='full'".to_owned(),
            Some(base) => format!(
                "backupmode='incremental' incremental='{}' exportbitmap='{}'",
                escape(base),
                escape(&dirty_context(disk.target))
            ),
        };
        xml += &format!(
            "<disk name='{target}' backup='yes' type='file' {mode} exportname='{target}'>\
             <driver type='qcow2'/><scratch file='{scratch}'><seclabel model='dac' relabel='no'/></scratch></disk>",
            target = escape(disk.target),
            scratch = escape(disk.scratch)
        );
    }
    xml + "</disks></domainbackup>"
}

/// The `<domaincheckpoint>` named `name`, with a bitmap of that name in each of `disks` and in no other
/// (libvirt, formatcheckpoint). `created`, in seconds since 1970, is for a redefinition only.
pub fn checkpoint_xml(name: &str, disks: &[&str], created: Option<i64>) -> String {
    let name = escape(name);
    let mut xml = format!("<domaincheckpoint><name>{name}</name>");
    if let Some(created) = created {
        xml += &format!("<creationTime>{created}</creationTime>");
    }
    xml += "<disks>";
    for target in disks {
        xml += &format!("<disk name='{}' checkpoint='bitmap' bitmap='{name}'/>", escape(target));
    }
    xml + "</disks></domaincheckpoint>"
}

/// When a checkpoint was made, says one that libvirt is to know for a moment only: no other was made in the first second of 1970.
pub const PROBE: i64 = 1;

/// Whether libvirt was to know a checkpoint for a moment only, by its XML.
pub fn is_probe(xml: &str) -> bool {
    quick_xml::de::from_str::<Noted>(xml).is_ok_and(|noted| noted.created == Some(PROBE))
}

/// One disk of a checkpoint that libvirt knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotedDisk {
    /// Its target.
    pub target: String,
    /// Bytes that its bitmap calls dirty, where QEMU could count them.
    pub dirty: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Noted {
    #[serde(rename = "creationTime", default)]
    created: Option<i64>,
    #[serde(default)]
    disks: NotedDisks,
}

#[derive(Debug, Default, Deserialize)]
struct NotedDisks {
    #[serde(default, rename = "disk")]
    disks: Vec<NotedBitmap>,
}

#[derive(Debug, Deserialize)]
struct NotedBitmap {
    #[serde(rename = "@name", default)]
    name: String,
    #[serde(rename = "@checkpoint", default)]
    kind: String,
    #[serde(rename = "@size", default)]
    size: Option<u64>,
}

/// The disks with a bitmap of a `<domaincheckpoint>` (libvirt, formatcheckpoint); none of what is not one.
pub fn noted_disks(xml: &str) -> Vec<NotedDisk> {
    let noted = quick_xml::de::from_str::<Noted>(xml).map(|noted| noted.disks.disks).unwrap_or_default();
    let noted = noted.into_iter().filter(|disk| disk.kind == "bitmap");
    noted.map(|disk| NotedDisk { target: disk.name, dirty: disk.size }).collect()
}

/// A text as an attribute's value or an element's text. Blanks too are written as references: in an attribute a
/// parser takes them for spaces.
fn escape(text: &str) -> String {
    quick_xml::escape::escape(text).replace('\t', "&#9;").replace('\n', "&#10;")
}

#[derive(Debug, Deserialize)]
struct RunningBackup {
    #[serde(default)]
    server: Option<BackupServer>,
}

#[derive(Debug, Deserialize)]
struct BackupServer {
    #[serde(rename = "@socket", default)]
    socket: Option<String>,
}

/// The unix socket of a running backup: how its maker recognises it.
pub fn backup_socket(xml: &str) -> Option<String> {
    quick_xml::de::from_str::<RunningBackup>(xml).ok()?.server?.socket
}

#[cfg(test)]
mod tests;
