//! The agent's state directory: one folder per backup, which outlives the agent's process.
//!
//! ```text
//!   STATE/backups/<backup uid>/record.json          what was planned, done, and may be on the host
//!                             /coverage-<disk>      which bytes were served
//!                             /ticket-<transfer uid>.json   0600: it holds the bearer secret
//!   RUN/<backup uid>/          scratch images and the NBD socket, owned by the VM's QEMU
//! ```
//!
//! A file is written under another name and renamed, so that a reader never sees half of it. There is no
//! fsync: a process that dies leaves what it wrote, and a host that dies takes QEMU, job and freeze along.
//! Names come from uids that were checked first; nothing here follows a name from libvirt or a user.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::backup::life::Life;
use super::backup::scratch::Usage;
use crate::api::QuiesceMode;

/// What went wrong with the state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The operating system said no.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A uid that cannot be a folder's name.
    #[error("{0:?} is not a uid")]
    NotAUid(String),
    /// A file that does not hold what it should.
    #[error("{path} cannot be read: {source}", path = path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

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
    /// The disks.
    pub disks: Vec<PlannedDisk>,
    /// Whether to freeze the guest.
    pub quiesce: QuiesceMode,
    /// Seconds the guest agent is given.
    pub quiesce_seconds: i32,
    /// How far it went.
    pub life: Life,
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
}

/// The state directory.
#[derive(Clone, Debug)]
pub struct StateDir {
    state: PathBuf,
    run: PathBuf,
}

impl StateDir {
    /// Opens, and makes, the directories: `state` for the agent alone, `run` for QEMU too.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn open(state: &Path, run: &Path) -> Result<Self, StateError> {
        let dir = Self { state: state.join("backups"), run: run.to_owned() };
        make_dir(&dir.state, 0o700)?;
        make_dir(&dir.run, 0o755)?;
        Ok(dir)
    }

    /// The folder of a backup in the run directory.
    ///
    /// # Errors
    /// When `uid` cannot be a folder's name.
    pub fn run_of(&self, uid: &str) -> Result<PathBuf, StateError> {
        Ok(self.run.join(checked(uid)?))
    }

    /// The scratch image of a disk. The target was checked when the disk was planned.
    ///
    /// # Errors
    /// When `uid` cannot be a folder's name.
    pub fn scratch_of(&self, uid: &str, target: &str) -> Result<PathBuf, StateError> {
        Ok(self.run_of(uid)?.join(format!("{target}.scratch")))
    }

    /// The NBD socket of a backup.
    ///
    /// # Errors
    /// When `uid` cannot be a folder's name.
    pub fn socket_of(&self, uid: &str) -> Result<PathBuf, StateError> {
        Ok(self.run_of(uid)?.join("nbd.sock"))
    }

    fn folder(&self, uid: &str) -> Result<PathBuf, StateError> {
        Ok(self.state.join(checked(uid)?))
    }

    /// Stores a record, and makes the backup's folder for it.
    ///
    /// # Errors
    /// When it cannot be written: then nothing may be done on the host.
    pub fn store(&self, record: &Record) -> Result<(), StateError> {
        let folder = self.folder(&record.uid)?;
        make_dir(&folder, 0o700)?;
        write_json(&folder.join("record.json"), record)
    }

    /// Every record of this directory. What cannot be read is reported beside them.
    ///
    /// # Errors
    /// When the directory itself cannot be read.
    pub fn records(&self) -> Result<(Vec<Record>, Vec<StateError>), StateError> {
        let (mut records, mut broken) = (Vec::new(), Vec::new());
        for uid in names(&self.state)? {
            match self.folder(&uid).and_then(|folder| read_json::<Record>(&folder.join("record.json"))) {
                Ok(Some(record)) if record.uid == uid => records.push(record),
                Ok(_) => broken.push(StateError::NotAUid(uid)),
                Err(error) => broken.push(error),
            }
        }
        Ok((records, broken))
    }

    /// Stores the coverage of a disk.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store_coverage(&self, uid: &str, target: &str, encoded: &[u8]) -> Result<(), StateError> {
        write(&self.folder(uid)?.join(format!("coverage-{target}")), encoded)
    }

    /// The coverage of a disk, as it was stored; what is missing or cannot be read was not served.
    pub fn coverage(&self, uid: &str, target: &str) -> Option<Vec<u8>> {
        fs::read(self.folder(uid).ok()?.join(format!("coverage-{target}"))).ok()
    }

    /// Stores what a transfer's ticket is.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store_ticket<T: Serialize>(
        &self,
        uid: &str,
        transfer: &str,
        ticket: &T,
    ) -> Result<(), StateError> {
        write_json(&self.folder(uid)?.join(format!("ticket-{}.json", checked(transfer)?)), ticket)
    }

    /// Forgets a transfer's ticket.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove_ticket(&self, uid: &str, transfer: &str) -> Result<(), StateError> {
        gone(&self.folder(uid)?.join(format!("ticket-{}.json", checked(transfer)?)), |path| {
            fs::remove_file(path)
        })
    }

    /// The stored tickets of a backup, by transfer uid.
    ///
    /// # Errors
    /// When the folder cannot be read. A ticket that cannot be read is left out.
    pub fn tickets<T: DeserializeOwned>(&self, uid: &str) -> Result<Vec<(String, T)>, StateError> {
        let folder = self.folder(uid)?;
        let stored = names(&folder)?.into_iter().filter_map(|name| {
            let transfer = name.strip_prefix("ticket-")?.strip_suffix(".json")?.to_owned();
            let ticket = read_json(&folder.join(&name)).ok()??;
            Some((transfer, ticket))
        });
        Ok(stored.collect())
    }

    /// What the scratch images take, and what their file system has.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn scratch_usage(&self) -> Result<Usage, StateError> {
        let system = rustix::fs::statvfs(&self.run).map_err(|error| io_error(&self.run)(error.into()))?;
        let used = names(&self.run)?.into_iter().filter(|uid| checked(uid).is_ok()).map(|uid| {
            let bytes = allocated(&self.run.join(&uid));
            (uid, bytes)
        });
        Ok(Usage {
            total: system.f_blocks.saturating_mul(system.f_frsize),
            free: system.f_bavail.saturating_mul(system.f_frsize),
            used: used.collect(),
        })
    }

    /// Removes what a backup used on the host: scratch images, socket, folder.
    ///
    /// # Errors
    /// When something is there and cannot be removed.
    pub fn remove_run(&self, uid: &str) -> Result<(), StateError> {
        gone(&self.run_of(uid)?, |path| fs::remove_dir_all(path))
    }

    /// Forgets a backup: its record, coverage and tickets.
    ///
    /// # Errors
    /// When something is there and cannot be removed.
    pub fn forget(&self, uid: &str) -> Result<(), StateError> {
        gone(&self.folder(uid)?, |path| fs::remove_dir_all(path))
    }

    /// Uids of run folders that no record knows: a crash between the two left them.
    ///
    /// # Errors
    /// When the directories cannot be read.
    pub fn stray_runs(&self) -> Result<Vec<String>, StateError> {
        let known = names(&self.state)?;
        Ok(names(&self.run)?.into_iter().filter(|uid| checked(uid).is_ok() && !known.contains(uid)).collect())
    }
}

/// Kubernetes makes uids as uuids: hex digits and dashes.
fn checked(uid: &str) -> Result<&str, StateError> {
    let fits = uid.len() == 36 && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    if fits { Ok(uid) } else { Err(StateError::NotAUid(uid.to_owned())) }
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { path: path.clone(), source }
}

/// Makes a directory with `mode`; parents get the usual one, for QEMU must be able to pass.
fn make_dir(path: &Path, mode: u32) -> Result<(), StateError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(io_error(parent))?;
    }
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(io_error(path)(error)),
        _ => fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io_error(path)),
    }
}

fn names(dir: &Path) -> Result<Vec<String>, StateError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error(dir)(error)),
    };
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

/// Bytes that the files of a folder take on their disk. What goes meanwhile takes none.
fn allocated(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.metadata().ok()).map(|file| file.blocks().saturating_mul(512)).sum()
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    let partial = path.with_extension("partial");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .map_err(io_error(&partial))?;
    file.write_all(bytes).map_err(io_error(&partial))?;
    fs::rename(&partial, path).map_err(io_error(path))
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StateError> {
    let bytes =
        serde_json::to_vec(value).map_err(|source| StateError::Content { path: path.to_owned(), source })?;
    write(path, &bytes)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| StateError::Content { path: path.to_owned(), source }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error(path)(error)),
    }
}

fn gone(path: &Path, remove: impl Fn(&Path) -> io::Result<()>) -> Result<(), StateError> {
    match remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_uids_become_paths() {
        for bad in [
            "",
            "..",
            "a/b",
            "../../etc/passwd-aaaaaaaaaaaaaaaaaaaaaaa",
            "g0000000-0000-0000-0000-000000000000",
        ] {
            assert!(checked(bad).is_err(), "{bad}");
        }
        assert!(checked("0f000000-0000-4000-8000-00000000000a").is_ok());
    }

    #[test]
    fn a_broken_record_is_reported_and_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("s"), &dir.path().join("r")).unwrap();
        let uid = "00000000-0000-4000-8000-000000000001";
        let record = Record {
            uid: uid.into(),
            namespace: "n".into(),
            name: "b".into(),
            vm: "v".into(),
            vm_uuid: uid.into(),
            bitmap: None,
            disks: vec![],
            quiesce: QuiesceMode::None,
            quiesce_seconds: 1,
            life: Life::default(),
        };
        state.store(&record).unwrap();
        let other = dir.path().join("s/backups/00000000-0000-4000-8000-000000000002");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("record.json"), b"{\"uid\":").unwrap();
        let (records, broken) = state.records().unwrap();
        assert_eq!(records, vec![record]);
        assert_eq!(broken.len(), 1);
        state.forget(uid).unwrap();
        state.forget(uid).unwrap();
        assert!(state.records().unwrap().0.is_empty());
    }
}
