//! A folder of restore points while `chain` changes it: the lock, the folders beside, and the moves of [`super::moves`] made
//! on disk. It never writes into a restore point that is there, and knows nothing of what is in an image.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use tokio_util::sync::CancellationToken;

use super::exit::Failure;
use super::folder;
use super::manifest::Manifest;
use super::moves::{self, Left, Move};
use super::names::{self, Aside};
use super::reshape;
use super::state::State;
use super::store::Store;

/// A folder that one process changes.
#[derive(Debug)]
pub struct Staging {
    root: PathBuf,
    _lock: File,
}

impl Staging {
    /// Locks the folder.
    ///
    /// # Errors
    /// The kernel's, and when another process changes it.
    pub fn open(root: &Path) -> Result<Self, Failure> {
        Ok(Self { root: root.to_owned(), _lock: folder::lock(root)? })
    }

    /// Puts in order what processes that were killed left; answers whose removal it ended.
    ///
    /// # Errors
    /// The kernel's.
    pub fn mend(&self) -> Result<Vec<String>, Failure> {
        // what is to be removed may be needed by one that comes back
        self.mend_those(false)?;
        self.mend_those(true)
    }

    fn mend_those(&self, set_aside: bool) -> Result<Vec<String>, Failure> {
        let store = Store::read(&self.root)?;
        let mut points: BTreeMap<&str, Left> = BTreeMap::new();
        for (point, aside) in store.asides.iter().filter(|(_, aside)| (*aside == Aside::Gone) == set_aside) {
            points.entry(point).or_default().asides.push(*aside);
        }
        let mut removed = Vec::new();
        for (point, mut left) in points {
            left.is_there = self.root.join(point).exists();
            if set_aside {
                let manifest = self.root.join(names::aside(point, Aside::Gone)).join(names::MANIFEST);
                left.has_manifest = manifest.exists();
                let uid = fs::read_to_string(manifest).ok().and_then(|text| Manifest::parse(&text).ok());
                let uid = uid.map(|manifest| manifest.backup.uid);
                left.is_needed = needed(&store, point, uid.as_deref())?.is_some();
            }
            self.make(&moves::mend(point, &left))?;
            if !self.root.join(point).exists() {
                removed.push(point.to_owned());
            }
        }
        Ok(removed)
    }

    /// Makes the folder beside a restore point, for its successor.
    ///
    /// # Errors
    /// The kernel's.
    pub fn begin(&self, point: &str) -> Result<PathBuf, Failure> {
        let (path, old) = (self.root.join(names::aside(point, Aside::New)), self.root.join(point));
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(Failure::file(&path))?;
        let like_it = fs::metadata(&old).and_then(|old| fs::set_permissions(&path, old.permissions()));
        like_it.map_err(Failure::file(&path))?;
        Ok(path)
    }

    /// Removes the folder beside a restore point, which nobody needs.
    ///
    /// # Errors
    /// The kernel's.
    pub fn give_up(&self, point: &str) -> Result<(), Failure> {
        self.make(&[Move::Remove(names::aside(point, Aside::New))])
    }

    /// Takes along what of a restore point stays: everything but `anew` and its manifest.
    ///
    /// # Errors
    /// The kernel's, and when there is a folder in it.
    pub fn carry(&self, point: &Manifest, anew: &[&str], stop: &CancellationToken) -> Result<(), Failure> {
        let (from, to) = (self.root.join(&point.name), self.root.join(names::aside(&point.name, Aside::New)));
        for entry in fs::read_dir(&from).map_err(Failure::file(&from))? {
            let entry = entry.map_err(Failure::file(&from))?;
            let name = entry.file_name();
            if name == names::MANIFEST || anew.iter().any(|file| name == *file) {
                continue;
            }
            let kind = entry.file_type().map_err(Failure::file(entry.path()))?;
            if kind.is_dir() {
                return Err(stranger(&entry.path()));
            }
            if !kind.is_file() {
                // a socket that a killed qemu-nbd left
                continue;
            }
            let to = to.join(&name);
            if fs::hard_link(entry.path(), &to).is_ok() {
                continue;
            }
            fs::copy(entry.path(), &to).map_err(Failure::file(&to))?;
            // it is on stable storage, and what the manifest says
            let copied = folder::digest(&to, stop)?;
            let known = point.disks.iter().find(|disk| name == *disk.file);
            if known.is_some_and(|disk| (disk.bytes, &disk.blake3) != (copied.0, &copied.1)) {
                let words = format!("{} is not what was written: virtmark verify", entry.path().display());
                return Err(Failure::Damaged(words));
            }
        }
        Ok(())
    }

    /// The restore point's successor, which is whole and on stable storage, takes its place.
    ///
    /// # Errors
    /// The kernel's.
    pub fn exchange(&self, point: &str) -> Result<(), Failure> {
        let moves = moves::exchange(point);
        // that nothing was moved is known of the first one only
        match self.make(&moves[..1]) {
            Err(Failure::File { source, .. }) if is_unknown(&source) => self.make(&moves::replace(point)),
            done => done.and_then(|()| self.make(&moves[1..])),
        }
    }

    /// An error when a restore point could not be removed once those of `moved` lie elsewhere.
    ///
    /// # Errors
    /// The kernel's, when something else is in it, and when something lies over it, or may.
    pub fn removable(&self, point: &Manifest, moved: &[&str]) -> Result<(), Failure> {
        let path = self.root.join(&point.name);
        for entry in fs::read_dir(&path).map_err(Failure::file(&path))? {
            let entry = entry.map_err(Failure::file(&path))?;
            let kind = entry.file_type().map_err(Failure::file(entry.path()))?;
            let name = entry.file_name();
            let is_ours = name == names::MANIFEST || point.disks.iter().any(|disk| name == *disk.file);
            if kind.is_dir() || kind.is_file() && !is_ours {
                return Err(stranger(&entry.path()));
            }
        }
        self.unneeded(point, moved)
    }

    /// Removes a restore point that nothing lies over.
    ///
    /// # Errors
    /// As [`Staging::removable`], also when something began to lie over it only now.
    pub fn remove(&self, point: &Manifest) -> Result<(), Failure> {
        self.removable(point, &[])?;
        self.make(&moves::leave(&point.name))?;
        // a backup says what it lies over, and then makes an image over it: either it is seen here, or it makes none
        if let Err(failure) = self.unneeded(point, &[]) {
            self.make(&moves::back(&point.name))?;
            return Err(failure);
        }
        self.make(&moves::remove(&point.name))
    }

    fn unneeded(&self, point: &Manifest, moved: &[&str]) -> Result<(), Failure> {
        let mut store = Store::read(&self.root)?;
        store.points.retain(|point| !moved.contains(&point.name.as_str()));
        match needed(&store, &point.name, Some(&point.backup.uid))? {
            Some(why) => Err(Failure::Usage(format!("{} cannot be removed: {why}", point.name))),
            None => Ok(()),
        }
    }

    fn make(&self, all: &[Move]) -> Result<(), Failure> {
        all.iter().try_for_each(|one| make(&self.root, one))
    }
}

/// Makes one move.
///
/// # Errors
/// The kernel's.
pub fn make(root: &Path, one: &Move) -> Result<(), Failure> {
    match one {
        Move::Exchange(a, b) => {
            let (a, b) = (root.join(a), root.join(b));
            let done = renameat_with(CWD, &a, CWD, &b, RenameFlags::EXCHANGE);
            done.map_err(|error| Failure::file(a)(error.into()))
        }
        Move::Rename(from, to) => {
            let to = root.join(to);
            // a folder that is empty would be renamed over
            if to.exists() {
                return Err(Failure::file(to)(io::ErrorKind::AlreadyExists.into()));
            }
            fs::rename(root.join(from), &to).map_err(Failure::file(to))
        }
        Move::Sync => folder::sync(root),
        Move::Forget(folder) => {
            let folder = root.join(folder);
            let manifest = folder.join(names::MANIFEST);
            gone(fs::remove_file(&manifest)).map_err(Failure::file(manifest))?;
            folder::sync(&folder)
        }
        Move::Remove(folder) => {
            let folder = root.join(folder);
            gone(fs::remove_dir_all(&folder)).map_err(Failure::file(folder))
        }
    }
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    removed.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// Whether a file system cannot let two folders change places.
fn is_unknown(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let known = [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP];
    known.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

fn stranger(path: &Path) -> Failure {
    let words = "no manifest names it, and virtmark does not remove it: move it out of the restore point";
    Failure::Usage(format!("{}: {words}", path.display()))
}

/// Why a restore point must stay.
fn needed(store: &Store, name: &str, uid: Option<&str>) -> Result<Option<String>, Failure> {
    if let Some(over) = store.points.iter().find(|point| reshape::lies_over(point, name, uid)) {
        return Ok(Some(format!("{} lies over it", over.name)));
    }
    if let Some((unreadable, why)) = store.unreadable.first() {
        return Ok(Some(format!("{unreadable} may lie over it, and its manifest says nothing: {why}")));
    }
    for point in &store.unfinished {
        let folder = store.root.join(names::partial(point));
        let state = match fs::read_to_string(folder.join(names::STATE)) {
            Ok(text) => text,
            // it has not begun to lie over anything, or is published now
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Failure::file(folder)(error)),
        };
        let state: Option<State> = serde_json::from_str(&state).ok();
        let parent = state.map(|state| state.parent.map(|(parent, _)| parent));
        if parent.is_none_or(|parent| {
            parent.is_some_and(|parent| parent.name == name && uid.is_none_or(|uid| parent.uid == uid))
        }) {
            return Ok(Some(format!(
                "{} is being written over it, or was when its process ended: let virtmark backup go on with it, or \
                 remove that folder",
                folder.display()
            )));
        }
    }
    Ok(None)
}
