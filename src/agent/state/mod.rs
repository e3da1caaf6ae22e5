//! The agent's state directory: one folder per backup, which outlives the agent's process.
//!
//! ```text
//!   STATE/backups/<backup uid>/record.json          what was planned, done, and may be on the host
//!                             /coverage-<disk>      which bytes were served
//!                             /ticket-<transfer uid>.json   0600: it holds the bearer secret
//!   STATE/uploads/<transfer uid>.json               0600: an upload, and its ticket
//!   STATE/backups                                   locked by the one agent that works with it
//!   STATE/orphans/<backup uid>.json                 the record of a failed backup whose VM was gone with its bitmaps
//!   STATE/succeeded/<backup uid>.json               for a week, the record of one that succeeded
//!   RUN/<backup uid>/          scratch images and the NBD socket, owned by the VM's QEMU
//!   RUN/<transfer uid>/        the NBD socket of an upload's volume
//! ```
//!
//! Files are written whole, and believed only when they are the agent's own: see `agent/folder.rs`. There is no
//! fsync: a process that dies leaves what it wrote, and a host that dies takes QEMU, job and freeze along.
//! Names come from uids that were checked first; nothing here follows a name from libvirt or a user, and a
//! record that would lead elsewhere is none.

mod record;
mod uploads;

use std::io;
use std::path::{Path, PathBuf};

use k8s_openapi::jiff::Timestamp;
use rustix::fs::Mode;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::record::{Base, PlannedDisk, Record};
use super::backup::scratch::Usage;
use super::folder::Folder;

/// Longest record or ticket that is read, in bytes: 128 disks with the longest paths fit.
const MAX_JSON: usize = 1 << 20;
/// Longest coverage that is read: the bits and the ranges of the largest disk fit.
const MAX_COVERAGE: usize = 6 << 20;

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
    /// A record that no agent of this node wrote.
    #[error("{path} is no record of this backup: its {what} cannot be so", path = path.display())]
    Foreign {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A backup's folder without its record.
    #[error("{} has no record.json, but other files", .0.display())]
    NoRecord(PathBuf),
}

/// The right to work with a state directory. It ends with the value, or with the process, whatever ends that.
#[derive(Debug)]
pub struct StateLock {
    _folder: Folder,
}

/// The state directory.
#[derive(Clone, Debug)]
pub struct StateDir {
    root: PathBuf,
    state: PathBuf,
    orphans: PathBuf,
    succeeded: PathBuf,
    uploads: PathBuf,
    run: PathBuf,
}

impl StateDir {
    /// Opens, and makes, the directories: `state` for the agent alone, `run` for QEMU too.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn open(state: &Path, run: &Path) -> Result<Self, StateError> {
        let dir = Self {
            root: state.to_owned(),
            state: state.join("backups"),
            orphans: state.join("orphans"),
            succeeded: state.join("succeeded"),
            uploads: state.join("uploads"),
            run: run.to_owned(),
        };
        let folder = Folder::make(state, Mode::RWXU).map_err(io_error(state))?;
        folder.make_folder("backups").map_err(io_error(&dir.state))?;
        folder.make_folder("orphans").map_err(io_error(&dir.orphans))?;
        folder.make_folder("succeeded").map_err(io_error(&dir.succeeded))?;
        folder.make_folder("uploads").map_err(io_error(&dir.uploads))?;
        let passable = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
        Folder::make(&dir.run, passable).map_err(io_error(&dir.run))?;
        Ok(dir)
    }

    /// The right to work with this directory; `None` while another agent has it.
    ///
    /// # Errors
    /// When it cannot be locked.
    pub fn lock(&self) -> Result<Option<StateLock>, StateError> {
        let folder = self.backups()?;
        let locked = folder.lock().map_err(io_error(&self.state))?;
        Ok(locked.then_some(StateLock { _folder: folder }))
    }

    /// Whether it can be written.
    ///
    /// # Errors
    /// When it cannot.
    pub fn ping(&self) -> Result<(), StateError> {
        let written = Folder::open(&self.root).and_then(|root| {
            root.write(PING, b"ok\n")?;
            root.remove(PING)
        });
        written.map_err(io_error(&self.root.join(PING)))
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

    /// Makes the folder of a backup in the run directory, new, empty and for the agent alone. Give it to QEMU when
    /// all files are in it: from then on its content is QEMU's word.
    ///
    /// # Errors
    /// When it cannot be made, or `uid` cannot be a folder's name.
    pub fn make_run(&self, uid: &str) -> Result<PathBuf, StateError> {
        self.remove_run(uid)?;
        let path = self.run_of(uid)?;
        let made = Folder::open(&self.run).and_then(|run| run.make_folder(uid));
        made.map_err(io_error(&path))?;
        Ok(path)
    }

    /// All backups.
    fn backups(&self) -> Result<Folder, StateError> {
        Folder::open(&self.state).map_err(io_error(&self.state))
    }

    /// One backup, if it is there.
    fn backup(&self, uid: &str) -> Result<Option<Folder>, StateError> {
        match self.backups()?.folder(checked(uid)?) {
            Ok(folder) => Ok(Some(folder)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error(&self.state.join(uid))(error)),
        }
    }

    /// Writes a file of a backup that is there.
    fn write(&self, uid: &str, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let path = self.state.join(checked(uid)?);
        let folder = self.backups()?.folder(uid).map_err(io_error(&path))?;
        folder.write(name, bytes).map_err(io_error(&path.join(name)))
    }

    /// Stores a record, and makes the backup's folder for it.
    ///
    /// # Errors
    /// When it cannot be written: then nothing may be done on the host.
    pub fn store(&self, record: &Record) -> Result<(), StateError> {
        let uid = checked(&record.uid)?;
        let folder = self.state.join(uid);
        let path = folder.join(RECORD);
        if let Some(what) = record.unsound() {
            return Err(StateError::Foreign { path, what });
        }
        let folder = self.backups()?.make_folder(uid).map_err(io_error(&folder))?;
        folder.write(RECORD, &json(&path, record)?).map_err(io_error(&path))
    }

    /// Every record of this directory. What cannot be read is reported beside them. A folder for which nothing
    /// was stored yet, hence nothing done, is removed.
    ///
    /// # Errors
    /// When the directory itself cannot be read.
    pub fn records(&self) -> Result<(Vec<Record>, Vec<StateError>), StateError> {
        let (mut records, mut broken) = (Vec::new(), Vec::new());
        let backups = self.backups()?;
        for uid in backups.names().map_err(io_error(&self.state))? {
            match self.record(&backups, &uid) {
                Ok(Some(record)) => records.push(record),
                Ok(None) => {}
                Err(error) => broken.push(error),
            }
        }
        Ok((records, broken))
    }

    fn record(&self, backups: &Folder, uid: &str) -> Result<Option<Record>, StateError> {
        let path = self.state.join(checked(uid)?);
        let folder = backups.folder(uid).map_err(io_error(&path))?;
        let Some(record) = read_json::<Record>(&folder, RECORD)? else {
            folder.remove(&format!("{RECORD}.partial")).map_err(io_error(&path))?;
            let empty = backups.remove_empty(uid).map_err(io_error(&path))?;
            return if empty { Ok(None) } else { Err(StateError::NoRecord(path)) };
        };
        match record.unsound() {
            None if record.uid == uid => Ok(Some(record)),
            what => Err(StateError::Foreign { path: path.join(RECORD), what: what.unwrap_or("uid") }),
        }
    }

    /// Stores the coverage of a disk.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store_coverage(&self, uid: &str, target: &str, encoded: &[u8]) -> Result<(), StateError> {
        self.write(uid, &format!("coverage-{target}"), encoded)
    }

    /// The coverage of a disk, as it was stored; what is missing or cannot be read was not served.
    pub fn coverage(&self, uid: &str, target: &str) -> Option<Vec<u8>> {
        self.backup(uid).ok()??.read(&format!("coverage-{target}"), MAX_COVERAGE).ok()?
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
        let name = format!("ticket-{}.json", checked(transfer)?);
        self.write(uid, &name, &json(&self.state.join(uid).join(&name), ticket)?)
    }

    /// Forgets a transfer's ticket.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove_ticket(&self, uid: &str, transfer: &str) -> Result<(), StateError> {
        let name = format!("ticket-{}.json", checked(transfer)?);
        match self.backup(uid)? {
            Some(folder) => folder.remove(&name).map_err(io_error(&folder.path().join(&name))),
            None => Ok(()),
        }
    }

    /// The stored tickets of a backup, by transfer uid.
    ///
    /// # Errors
    /// When the folder cannot be read. A ticket that cannot be read is left out.
    pub fn tickets<T: DeserializeOwned>(&self, uid: &str) -> Result<Vec<(String, T)>, StateError> {
        let Some(folder) = self.backup(uid)? else { return Ok(Vec::new()) };
        let names = folder.names().map_err(io_error(folder.path()))?;
        let stored = names.into_iter().filter_map(|name| {
            let transfer = checked(name.strip_prefix("ticket-")?.strip_suffix(".json")?).ok()?.to_owned();
            let ticket = read_json(&folder, &name).ok()??;
            Some((transfer, ticket))
        });
        Ok(stored.collect())
    }

    /// What the scratch images take, and what their file system has.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn scratch_usage(&self) -> Result<Usage, StateError> {
        let failed = io_error(&self.run);
        let system = rustix::fs::statvfs(&self.run).map_err(|error| failed(error.into()))?;
        let run = Folder::open(&self.run).map_err(&failed)?;
        let names = run.names().map_err(&failed)?;
        let used = names.into_iter().filter(|uid| checked(uid).is_ok()).map(|uid| {
            // what goes meanwhile takes nothing
            let bytes = run.allocated_in(&uid).unwrap_or_default();
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
        let path = self.run_of(uid)?;
        Folder::open(&self.run).and_then(|run| run.remove(uid)).map_err(io_error(&path))
    }

    /// Forgets a backup: its record, coverage and tickets.
    ///
    /// # Errors
    /// When something is there and cannot be removed.
    pub fn forget(&self, uid: &str) -> Result<(), StateError> {
        self.backups()?.remove(checked(uid)?).map_err(io_error(&self.state.join(uid)))
    }

    fn orphaned(&self) -> Result<Folder, StateError> {
        Folder::open(&self.orphans).map_err(io_error(&self.orphans))
    }

    /// Keeps the record of a failed backup that had to leave bitmaps: its VM was gone from here.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store_orphan(&self, record: &Record) -> Result<(), StateError> {
        keep(&self.orphaned()?, record)
    }

    /// The records of failed backups that had to leave bitmaps. One that cannot be read, or believed, is left out.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn orphans(&self) -> Result<Vec<Record>, StateError> {
        let folder = self.orphaned()?;
        let names = folder.names().map_err(io_error(&self.orphans))?;
        Ok(names.iter().filter_map(|name| kept(&folder, name)).collect())
    }

    /// Forgets one whose bitmaps are removed.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn forget_orphan(&self, uid: &str) -> Result<(), StateError> {
        let name = format!("{}.json", checked(uid)?);
        self.orphaned()?.remove(&name).map_err(io_error(&self.orphans.join(&name)))
    }

    fn past(&self) -> Result<Folder, StateError> {
        Folder::open(&self.succeeded).map_err(io_error(&self.succeeded))
    }

    /// Keeps the record of a backup that succeeded: an API server that is restored from a copy may ask for it again.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store_succeeded(&self, record: &Record) -> Result<(), StateError> {
        keep(&self.past()?, record)
    }

    /// The record of a backup that succeeded, where it is still kept and can be believed.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn succeeded(&self, uid: &str) -> Result<Option<Record>, StateError> {
        let record = kept(&self.past()?, &format!("{}.json", checked(uid)?));
        Ok(record.filter(Record::has_succeeded))
    }

    /// Forgets the records of backups that succeeded before `since`.
    ///
    /// # Errors
    /// When the folder cannot be read, or one cannot be removed.
    pub fn forget_succeeded(&self, since: Timestamp) -> Result<(), StateError> {
        let folder = self.past()?;
        for name in folder.names().map_err(io_error(&self.succeeded))? {
            let record = read_json::<Record>(&folder, &name).ok().flatten();
            if record.is_none_or(|record| record.life.ready_at.is_none_or(|ready| ready < since)) {
                folder.remove(&name).map_err(io_error(&self.succeeded.join(&name)))?;
            }
        }
        Ok(())
    }

    /// Uids of run folders that no record knows: a crash between the two left them.
    ///
    /// # Errors
    /// When the directories cannot be read.
    pub fn stray_runs(&self) -> Result<Vec<String>, StateError> {
        let names = |folder: Folder| folder.names().map_err(io_error(folder.path()));
        let known = names(self.backups()?)?;
        let runs = names(Folder::open(&self.run).map_err(io_error(&self.run))?)?;
        Ok(runs.into_iter().filter(|uid| checked(uid).is_ok() && !known.contains(uid)).collect())
    }
}

/// Name of a record's file.
const RECORD: &str = "record.json";
/// The file whose writing shows that files can be written.
const PING: &str = "ping";

/// Kubernetes makes uids as uuids: hex digits and dashes.
fn checked(uid: &str) -> Result<&str, StateError> {
    let fits = uid.len() == 36 && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    if fits { Ok(uid) } else { Err(StateError::NotAUid(uid.to_owned())) }
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { path: path.clone(), source }
}

/// Keeps a record in a folder of such.
fn keep(folder: &Folder, record: &Record) -> Result<(), StateError> {
    let name = format!("{}.json", checked(&record.uid)?);
    let path = folder.path().join(&name);
    folder.write(&name, &json(&path, record)?).map_err(io_error(&path))
}

/// What was kept under this name; nothing that cannot be read, or believed.
fn kept(folder: &Folder, name: &str) -> Option<Record> {
    let record = read_json::<Record>(folder, name).ok()??;
    (name == format!("{}.json", record.uid) && record.unsound().is_none()).then_some(record)
}

fn json<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, StateError> {
    serde_json::to_vec(value).map_err(|source| StateError::Content { path: path.to_owned(), source })
}

fn read_json<T: DeserializeOwned>(folder: &Folder, name: &str) -> Result<Option<T>, StateError> {
    let path = folder.path().join(name);
    let Some(bytes) = folder.read(name, MAX_JSON).map_err(io_error(&path))? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|source| StateError::Content { path, source })
}

#[cfg(test)]
mod tests;
