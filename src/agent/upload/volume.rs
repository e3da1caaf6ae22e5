//! The file of a volume that is uploaded: made under a temporary name, checked, and given its name. Each call blocks and can be
//! repeated. It knows no Kubernetes and no NBD, and never touches a file that is not the one that it made.

use std::fs::{self, File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use super::record::{Inode, Upload};
use crate::agent::backup::act::{Host, HostError, io_error};
use crate::agent::image::qemu_img;
use crate::api::NewVolume;
use crate::libvirt::one_line;
use crate::reason::{Because, Reason};

/// Bytes of a pool that are left to those who are there already: a guest that finds no room is paused.
const RESERVE: u64 = 1 << 30;

/// Why a volume cannot be.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// For good: why.
    #[error(transparent)]
    Refused(#[from] Because),
    /// The host did not do it.
    #[error(transparent)]
    Host(#[from] HostError),
}

fn refused<T>(reason: Reason, message: String) -> Result<T, VolumeError> {
    Err(Because::new(reason, message).into())
}

fn inode(found: &Metadata) -> Inode {
    (found.dev(), found.ino())
}

/// Which file has this name; `None` only where there is none: what cannot be looked at is not gone.
fn found(path: &Path) -> Result<Option<Inode>, HostError> {
    match fs::symlink_metadata(path) {
        Ok(found) => Ok(Some(inode(&found))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error(path)(error)),
    }
}

/// The folder of the pool in which the volume can be made, beside others that need `promised` bytes more.
///
/// # Errors
/// [`Reason::PoolNotUsable`], [`Reason::PoolSpaceLow`], [`Reason::VolumeExists`]; libvirt's.
pub fn folder(host: &Host, volume: &NewVolume, promised: u64) -> Result<(PathBuf, Inode), VolumeError> {
    let name = &volume.pool;
    let unusable = |why: String| refused(Reason::PoolNotUsable, why);
    let Some(pool) = host.libvirt.pool(name).map_err(HostError::from)? else {
        return unusable(format!("libvirt has no pool {name}"));
    };
    if !pool.active {
        return unusable(format!("pool {name} is not active"));
    }
    let Some(folder) = pool.folder else {
        return unusable(format!("pool {name} is of type {}: its volumes are no files", pool.kind));
    };
    let Some(place) = fs::metadata(&folder).ok().filter(Metadata::is_dir).map(|found| inode(&found)) else {
        return unusable(format!("the agent does not see the folder of pool {name}, {}", folder.display()));
    };
    if found(&folder.join(&volume.name))?.is_some() {
        return refused(Reason::VolumeExists, format!("pool {name} has a volume {}", volume.name));
    }
    let system = rustix::fs::statvfs(&folder).map_err(|error| io_error(&folder)(error.into()))?;
    let free =
        system.f_bavail.saturating_mul(system.f_frsize).saturating_sub(RESERVE).saturating_sub(promised);
    let size = u64::try_from(volume.size).unwrap_or(u64::MAX);
    if size > free {
        let message = format!("pool {name} has room for {free} bytes, and the volume may need {size}");
        return refused(Reason::PoolSpaceLow, message);
    }
    Ok((folder, place))
}

/// Whether the pool's folder is the one that it was: on an empty mount point nothing is to be made, or called gone.
fn in_place(upload: &Upload) -> Result<(), HostError> {
    let there = fs::metadata(&upload.folder).ok().map(|found| inode(&found));
    if there == Some(upload.place) { Ok(()) } else { Err(HostError::NotSeen(upload.partial())) }
}

/// Makes the file anew, empty; which one it is.
///
/// # Errors
/// qemu-img's; the operating system's.
pub fn make(upload: &Upload) -> Result<Inode, HostError> {
    let partial = upload.partial();
    remove(upload)?;
    // the guest's bytes are nobody else's; qemu-img keeps the mode of a file that is there
    let made = File::options().write(true).create_new(true).mode(0o600).open(&partial);
    let made = made.and_then(|file| file.metadata()).map_err(io_error(&partial))?;
    let size = upload.size.to_string();
    let format = upload.format.as_str();
    qemu_img("create", &["-q".as_ref(), "-f".as_ref(), format.as_ref(), partial.as_ref(), size.as_ref()])?;
    Ok(inode(&made))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Measured {
    virtual_size: u64,
    format: String,
    backing_filename: Option<PathBuf>,
}

/// What qemu-img answers about the image, or why it finds it wrong. That it could not be asked is no word about the image.
fn ask(verb: &'static str, arguments: &[&str], image: &Path) -> Result<Result<Vec<u8>, String>, HostError> {
    let mut byte = [0];
    File::open(image).and_then(|mut file| file.read(&mut byte)).map_err(io_error(image))?;
    let output = Command::new("qemu-img").arg(verb).arg("--output=json").args(arguments).arg(image).output();
    let failed = |message: String| HostError::QemuImg { verb, message };
    let output = output.map_err(|error| failed(error.to_string()))?;
    match output.status.code() {
        Some(0) => Ok(Ok(output.stdout)),
        Some(_) => Ok(Err(one_line(&String::from_utf8_lossy(&output.stderr), 512))),
        None => Err(failed(output.status.to_string())),
    }
}

/// Checks that the file, which nobody writes any more, is what was said: format, size, no error that qemu-img finds.
///
/// A raw one that begins as another format does is refused: libvirt looks at what it finds in a pool, and would take it, with
/// the backing file that it names, for that.
fn check(upload: &Upload) -> Result<(), VolumeError> {
    let (partial, format) = (upload.partial(), upload.format.as_str());
    let corrupt = |why: String| refused(Reason::ImageCorrupt, why);
    let is_raw = format == "raw";
    let as_said = ["-f", format];
    let said = match ask("info", if is_raw { &[] } else { &as_said }, &partial)? {
        Ok(said) => said,
        Err(words) => return corrupt(words),
    };
    let Ok(Measured { virtual_size, format: seen, backing_filename }) = serde_json::from_slice(&said) else {
        return corrupt("qemu-img info does not tell of its size".to_owned());
    };
    if virtual_size != upload.size || seen != format || backing_filename.is_some() {
        return corrupt(format!(
            "it looks like {seen} of {virtual_size} bytes, and was to be {format} of {} bytes without a backing file",
            upload.size
        ));
    }
    // a raw image has no structure
    if !is_raw && let Err(words) = ask("check", &as_said, &partial)? {
        return corrupt(words);
    }
    Ok(())
}

/// Checks the file and gives it its name: nothing that has it already is touched. Repeated after a crash it ends what it began.
///
/// # Errors
/// [`Reason::ImageCorrupt`], [`Reason::VolumeExists`], neither once the file has its name; the operating system's.
pub fn publish(upload: &Upload) -> Result<(), VolumeError> {
    in_place(upload)?;
    let (partial, path, ours) = (upload.partial(), upload.path(), upload.file);
    if found(&path)? != ours {
        if found(&partial)? != ours {
            return refused(Reason::ImageCorrupt, format!("{} is gone", partial.display()));
        }
        check(upload)?;
        File::open(&partial).and_then(|open| open.sync_all()).map_err(io_error(&partial))?;
        match fs::hard_link(&partial, &path) {
            Ok(()) => {}
            // an answer of the file server that was lost, maybe
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if found(&path)? != ours {
                    let message = format!("pool {} has a volume {} now", upload.pool, upload.volume);
                    return refused(Reason::VolumeExists, message);
                }
            }
            Err(error) => return Err(io_error(&path)(error).into()),
        }
    }
    remove(upload)?;
    let synced = File::open(&upload.folder).and_then(|folder| folder.sync_all());
    Ok(synced.map_err(io_error(&upload.folder))?)
}

/// Removes the file as long as it has the temporary name; what is not there is removed.
///
/// # Errors
/// The operating system's; that the pool's folder is another one than it was.
pub fn remove(upload: &Upload) -> Result<(), HostError> {
    in_place(upload)?;
    let partial = upload.partial();
    match fs::remove_file(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&partial)(error)),
        _ => Ok(()),
    }
}
