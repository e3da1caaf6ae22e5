//! qcow2 images without a QEMU, by `qemu-img`: what their headers say. It knows no libvirt and decides nothing.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use super::backup::act::{HostError, io_error};
use crate::libvirt::one_line;

/// What qemu-img says of a qcow2 image.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    full_backing_filename: Option<PathBuf>,
    backing_filename_format: Option<String>,
    cluster_size: Option<u64>,
    #[serde(default)]
    format_specific: Specific,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Specific {
    #[serde(default)]
    data: Data,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Data {
    #[serde(default)]
    bitmaps: Vec<StoredBitmap>,
}

/// A bitmap in an image's header.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct StoredBitmap {
    /// Its name.
    pub name: String,
    /// Bytes that one of its bits stands for.
    pub granularity: u64,
    #[serde(default)]
    flags: Vec<String>,
}

impl StoredBitmap {
    /// Whether a QEMU has it, or had it when it died: what is stored of it missed writes.
    pub fn is_in_use(&self) -> bool {
        self.flags.iter().any(|flag| flag == "in-use")
    }
}

impl Info {
    /// The bitmap of this name.
    pub fn bitmap(&self, name: &str) -> Option<&StoredBitmap> {
        self.bitmaps().iter().find(|bitmap| bitmap.name == name)
    }

    /// All of them.
    pub fn bitmaps(&self) -> &[StoredBitmap] {
        &self.format_specific.data.bitmaps
    }

    /// The granularity that QEMU gives a new bitmap in this image (`bdrv_get_default_bitmap_granularity`).
    pub fn new_granularity(&self) -> Option<u64> {
        self.cluster_size.map(|cluster| cluster.clamp(4096, 65536))
    }

    /// The image below, where it is known to be a qcow2 one: what a guest wrote into a raw one may look like anything.
    pub fn below(self) -> Option<PathBuf> {
        self.full_backing_filename.filter(|_| self.backing_filename_format.as_deref() == Some("qcow2"))
    }
}

/// Whether an image is there, or was removed. One in a folder that this process does not have is neither: a pod sees the
/// folders of its node that it was given.
///
/// # Errors
/// [`HostError::NotSeen`]; the operating system's.
pub fn is_there(image: &Path) -> Result<bool, HostError> {
    let io = io_error(image);
    let folder = image.parent().unwrap_or(image);
    if image.try_exists().map_err(&io)? {
        return Ok(true);
    }
    if folder.try_exists().map_err(io)? { Ok(false) } else { Err(HostError::NotSeen(image.to_owned())) }
}

/// Reads an image that nobody writes. Beside a writer that stores its bitmaps they may seem to be gone: then this
/// fails, for it asks for the image's lock.
///
/// # Errors
/// qemu-img's.
pub fn read_locked(image: &Path) -> Result<Info, HostError> {
    info(image, &[])
}

/// Reads an image that a QEMU may have, or be starting with: it takes no lock, and nothing may depend on the answer.
///
/// # Errors
/// qemu-img's.
pub fn read_shared(image: &Path) -> Result<Info, HostError> {
    info(image, &["--force-share".as_ref()])
}

fn info(image: &Path, more: &[&OsStr]) -> Result<Info, HostError> {
    let fixed: [&OsStr; 4] = ["--output=json".as_ref(), "-f".as_ref(), "qcow2".as_ref(), image.as_ref()];
    let said = qemu_img("info", &[more, fixed.as_slice()].concat())?;
    serde_json::from_slice(&said)
        .map_err(|error| HostError::QemuImg { verb: "info", message: error.to_string() })
}

/// Runs `qemu-img`; answers what it prints.
///
/// # Errors
/// Its words.
pub fn qemu_img(verb: &'static str, arguments: &[&OsStr]) -> Result<Vec<u8>, HostError> {
    let failed = |message: String| HostError::QemuImg { verb, message };
    let output = Command::new("qemu-img").arg(verb).args(arguments).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(failed(one_line(&String::from_utf8_lossy(&output.stderr), 512)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_is_gone_is_told_from_one_whose_folder_the_pod_has_not() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("vda.qcow2");
        assert!(!is_there(&image).unwrap());
        std::fs::write(&image, "").unwrap();
        assert!(is_there(&image).unwrap());
        let elsewhere = dir.path().join("pool/vda.qcow2");
        let refusal = is_there(&elsewhere).unwrap_err();
        assert!(matches!(&refusal, HostError::NotSeen(path) if *path == elsewhere), "{refusal}");
    }
}
