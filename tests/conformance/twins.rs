//! Disks that are written to: one for each server, of the same bytes before a case, and of the same after it.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use virtmark::nbd::Export;

use crate::nbd_qemu_rig::{QemuNbd, path};

/// Bytes of each: no whole number of blocks.
pub(crate) const SIZE: u64 = (1 << 20) + 512;

/// Both, behind qemu-nbds that write through to their files.
pub(crate) struct Twins {
    images: [PathBuf; 2],
    servers: [QemuNbd; 2],
}

impl Twins {
    pub(crate) fn make(directory: &Path) -> Twins {
        let images = ["stock", "other"].map(|side| directory.join(format!("written-by-{side}.raw")));
        images.iter().for_each(|image| std::fs::write(image, content()).unwrap());
        let servers = [0, 1].map(|at| QemuNbd::writable(directory, &["--format=raw", path(&images[at])]));
        Twins { images, servers }
    }

    /// The stock daemon's, and the other server's.
    pub(crate) fn exports(&self) -> [Export; 2] {
        [0, 1].map(|at| self.servers[at].export(None))
    }

    /// Both as they were made.
    pub(crate) fn reset(&self) {
        for image in &self.images {
            // not made anew: the servers have the files open
            let mut file = std::fs::OpenOptions::new().write(true).open(image).unwrap();
            file.write_all(&content()).unwrap();
        }
    }

    /// What is on them now, each in a line; the lines are the same only for the same bytes.
    pub(crate) fn summaries(&self) -> [String; 2] {
        let bytes = [0, 1].map(|at| std::fs::read(&self.images[at]).unwrap());
        let first = bytes[0].iter().zip(&bytes[1]).position(|(left, right)| left != right);
        bytes.map(|bytes| {
            let mut sum = DefaultHasher::new();
            bytes.hash(&mut sum);
            let other = first.map_or(String::new(), |at| {
                format!(", {:02x?} at {at}", &bytes[at..bytes.len().min(at + 16)])
            });
            format!("{} bytes {:016x}{other}", bytes.len(), sum.finish())
        })
    }
}

/// Bytes of which none is zero, and neighbours differ.
fn content() -> Vec<u8> {
    (0..SIZE).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 13).to_le_bytes()[0] | 1).collect()
}
