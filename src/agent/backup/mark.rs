//! Marks: by which an image is known again. A checkpoint has a bitmap of the same name in every disk, since libvirt wants it
//! so; of several disks each has one more, whose name has the disk in it. It goes wherever the image goes, and its copies:
//! what QEMU copies has it, and what is another disk's has another. All is done through
//! libvirt, which asks QEMU.
//!
//! QEMU keeps a mark as it keeps every bitmap. What it records is never read.

use std::path::{Path, PathBuf};

use super::act::{Host, HostError};
use crate::agent::state::Record;
use crate::api::FullReason;
use crate::killpoint;
use crate::libvirt::xml;
use crate::step::Step;

/// A disk of a checkpoint, to be rid of its bitmaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapDisk {
    /// Its target.
    pub target: String,
    /// Path of its qcow2 image.
    pub image: Option<PathBuf>,
    /// Its mark.
    pub mark: Option<String>,
}

impl BitmapDisk {
    /// The disks of the record's checkpoint.
    pub(super) fn of(record: &Record) -> Vec<Self> {
        let disks = record.disks.iter().filter(|disk| disk.in_checkpoint).cloned();
        disks.map(|disk| Self { target: disk.target, image: disk.image, mark: disk.mark }).collect()
    }
}

impl Host {
    /// Marks the disks of the record's checkpoint, while its job runs: until that has ended each image stays where it is.
    ///
    /// # Errors
    /// libvirt's.
    pub(super) fn mark(&self, record: &Record) -> Result<(), HostError> {
        for (disk, mark) in record.disks.iter().filter_map(|disk| Some((disk, disk.mark.as_ref()?))) {
            let xml = xml::checkpoint_xml(mark, &[&disk.target], None);
            match self.libvirt.checkpoint_create(&record.vm_uuid, &xml) {
                Ok(()) => self.libvirt.checkpoint_forget(&record.vm_uuid, mark)?,
                // an earlier process made it, and did not live to note that
                Err(_) if self.has_mark(&record.vm_uuid, &disk.target, mark)? => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Sees that the images are those that the base was made of, and as large. A disk whose image is another's is read in
    /// full, or fails the backup: its bitmap is whole, and true of the other disk. The inventory may not have known it yet.
    ///
    /// # Errors
    /// libvirt's, or the first image that is not the same, where that fails the backup.
    pub(super) fn know_again(&self, record: &mut Record) -> Result<(), HostError> {
        let Some(base) = &record.base else { return Ok(()) };
        for disk in record.disks.iter_mut().filter(|disk| disk.incremental) {
            let resized = base.sizes.get(&disk.target).filter(|size| **size != disk.size);
            let why = if let Some(size) = resized {
                let message = format!("{size} bytes at the checkpoint, {} now", disk.size);
                (FullReason::SizeChanged, message)
            } else {
                match base.marks.get(&disk.target) {
                    Some(mark) if !self.has_mark(&record.vm_uuid, &disk.target, mark)? => {
                        (FullReason::DiskReplaced, replaced(disk.image.as_deref()))
                    }
                    _ => continue,
                }
            };
            if base.strict {
                return Err(HostError::Replaced { disk: disk.target.clone(), message: why.1 });
            }
            disk.incremental = false;
            disk.full_because = Some((why.0, Some(why.1)));
        }
        Ok(())
    }

    /// Whether the image of a disk has this mark.
    fn has_mark(&self, vm_uuid: &str, target: &str, mark: &str) -> Result<bool, HostError> {
        let xml = xml::checkpoint_xml(mark, &[target], Some(xml::PROBE));
        match self.libvirt.checkpoint_redefine(vm_uuid, &xml, true) {
            Ok(()) => self.libvirt.checkpoint_forget(vm_uuid, mark)?,
            Err(error) if error.is_inconsistent() => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    /// Removes a checkpoint's bitmaps, and its marks, from the disks of a VM that has a QEMU.
    pub(super) fn delete_live(
        &self,
        vm_uuid: &str,
        bitmap: &str,
        disks: &[BitmapDisk],
    ) -> Result<(), HostError> {
        for disk in disks {
            // the mark first: a mark without its bitmap is nobody's
            let marked = match &disk.mark {
                Some(mark) => self.delete_bitmap(vm_uuid, &disk.target, mark)?,
                None => false,
            };
            let found = self.delete_bitmap(vm_uuid, &disk.target, bitmap)?;
            if found && !marked {
                // its image was another disk's, whose mark goes too
                for other in disks.iter().filter_map(|other| other.mark.as_ref()) {
                    self.delete_bitmap(vm_uuid, &disk.target, other)?;
                }
            }
        }
        Ok(())
    }

    /// Removes one bitmap from one disk of a VM that has a QEMU: disk by disk, and unseen, for what is missing or broken in
    /// one is no matter of the others. Whether it was there.
    fn delete_bitmap(&self, vm_uuid: &str, target: &str, bitmap: &str) -> Result<bool, HostError> {
        self.libvirt.checkpoint_forget(vm_uuid, bitmap)?;
        let xml = xml::checkpoint_xml(bitmap, &[target], Some(xml::PROBE));
        match self.libvirt.checkpoint_redefine(vm_uuid, &xml, false) {
            Ok(()) => {
                let found = self.libvirt.checkpoint_delete(vm_uuid, bitmap)?;
                killpoint::reached(Step::BitmapDeleted);
                Ok(found)
            }
            Err(error) if error.is_no_disk() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// What is said of an image without its mark.
fn replaced(image: Option<&Path>) -> String {
    let image = image.map(|image| format!(" {}", image.display())).unwrap_or_default();
    format!("its image{image} has not the mark of this disk that the checkpoint made: it was another disk's")
}
