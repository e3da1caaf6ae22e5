//! The file of a volume that is uploaded: made under a temporary name, checked, and given its name. Each call blocks and can be
//! repeated. It knows no Kubernetes and no NBD, and never touches a file that has a volume's name.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::record::Upload;
use crate::agent::backup::act::{Host, HostError};
use crate::agent::image::qemu_img;
use crate::api::NewVolume;
use crate::reason::{Because, Reason};

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

fn io_error(path: &Path) -> impl Fn(io::Error) -> HostError {
    let path = path.to_owned();
    move |source| HostError::Io { path: path.clone(), source }
}

/// The folder of the pool in which the volume can be made.
///
/// # Errors
/// [`Reason::PoolNotUsable`], [`Reason::VolumeExists`]; libvirt's.
pub fn folder(host: &Host, volume: &NewVolume) -> Result<PathBuf, VolumeError> {
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
    if !folder.is_dir() {
        return unusable(format!("the agent does not see the folder of pool {name}, {}", folder.display()));
    }
    let file = folder.join(&volume.name);
    if fs::symlink_metadata(&file).is_ok() {
        return refused(Reason::VolumeExists, format!("pool {name} has a volume {}", volume.name));
    }
    Ok(folder)
}

/// Makes the file anew, empty.
///
/// # Errors
/// qemu-img's; the operating system's.
pub fn make(upload: &Upload) -> Result<(), HostError> {
    let partial = upload.partial();
    remove(upload)?;
    // the guest's bytes are nobody else's; qemu-img keeps the mode of a file that is there
    let made = File::options().write(true).create_new(true).mode(0o600).open(&partial);
    made.map_err(io_error(&partial))?;
    let size = upload.size.to_string();
    let format = upload.format.as_str();
    let arguments: [&OsStr; 5] =
        ["-q".as_ref(), "-f".as_ref(), format.as_ref(), partial.as_ref(), size.as_ref()];
    qemu_img("create", &arguments).map(drop)
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Measured {
    virtual_size: u64,
    format: String,
    backing_filename: Option<PathBuf>,
}

/// Checks that the file, which nobody writes any more, is what was said: format, size, no error that qemu-img finds.
///
/// # Errors
/// [`Reason::ImageCorrupt`].
fn check(upload: &Upload) -> Result<(), VolumeError> {
    let (partial, format) = (upload.partial(), upload.format.as_str());
    let corrupt = |why: String| refused(Reason::ImageCorrupt, why);
    let of = |verb: &'static str| {
        let arguments: [&OsStr; 4] =
            ["--output=json".as_ref(), "-f".as_ref(), format.as_ref(), partial.as_ref()];
        qemu_img(verb, &arguments)
    };
    let said = match of("info") {
        Ok(said) => said,
        Err(error) => return corrupt(error.to_string()),
    };
    let Ok(measured) = serde_json::from_slice::<Measured>(&said) else {
        return corrupt("qemu-img info does not tell of its size".to_owned());
    };
    let Measured { virtual_size, format: found, backing_filename } = measured;
    if virtual_size != upload.size || found != format || backing_filename.is_some() {
        return corrupt(format!(
            "it is {found} of {virtual_size} bytes, and was to be {format} of {} bytes without a backing file",
            upload.size
        ));
    }
    // a raw image has nothing to check
    if format != "raw"
        && let Err(error) = of("check")
    {
        return corrupt(error.to_string());
    }
    Ok(())
}

/// Checks the file and gives it its name: nothing that has it already is touched. Repeated after a crash it ends what it began.
///
/// # Errors
/// [`Reason::ImageCorrupt`], [`Reason::VolumeExists`]; the operating system's.
pub fn publish(upload: &Upload) -> Result<(), VolumeError> {
    let (partial, file) = (upload.partial(), upload.file());
    let inode = |path: &Path| fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()));
    match inode(&partial) {
        // what was closed went nowhere but there
        None if inode(&file).is_some() => return Ok(()),
        None => return refused(Reason::ImageCorrupt, format!("{} is gone", partial.display())),
        Some(ours) if inode(&file) == Some(ours) => {}
        Some(_) => {
            check(upload)?;
            let synced = File::open(&partial).and_then(|open| open.sync_all());
            synced.map_err(io_error(&partial))?;
            match fs::hard_link(&partial, &file) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    let message = format!("pool {} has a volume {} now", upload.pool, upload.volume);
                    return refused(Reason::VolumeExists, message);
                }
                Err(error) => return Err(io_error(&file)(error).into()),
            }
        }
    }
    remove(upload)?;
    let synced = File::open(&upload.folder).and_then(|folder| folder.sync_all());
    Ok(synced.map_err(io_error(&upload.folder))?)
}

/// Removes the file as long as it has the temporary name; what is not there is removed.
///
/// # Errors
/// The operating system's.
pub fn remove(upload: &Upload) -> Result<(), HostError> {
    let partial = upload.partial();
    match fs::remove_file(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&partial)(error)),
        _ => Ok(()),
    }
}
