//! A restore point while it is being written: a hidden folder that nobody takes for one, which gets its name in one step,
//! when all in it is on stable storage. It never touches a restore point that is whole.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

use super::exit::Failure;
use super::manifest::Manifest;
use super::names;
use super::state::{State, VERSION};
use crate::api::VmBackup;

/// The folder.
#[derive(Debug)]
pub struct Partial {
    root: PathBuf,
    path: PathBuf,
    /// What is in it.
    pub state: State,
    /// Held for as long as a process writes.
    _lock: File,
}

impl Partial {
    /// Makes the folder below `root`.
    ///
    /// # Errors
    /// The kernel's, or when another process has it.
    pub fn create(root: &Path, state: State) -> Result<Self, Failure> {
        let path = root.join(names::partial(&state.point));
        // one that was not begun, and is empty
        let _ = fs::remove_dir(&path);
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(Failure::file(&path))?;
        let lock = lock(&path)?;
        let partial = Self { root: root.to_owned(), path, state, _lock: lock };
        partial.store()?;
        sync(root)?;
        Ok(partial)
    }

    /// The one of this name below `root`, if it was begun. A folder without a state is left alone: whose it is is not known.
    ///
    /// # Errors
    /// When another process writes it, or it cannot be read.
    pub fn open(root: &Path, point: &str) -> Result<Option<Self>, Failure> {
        let path = root.join(names::partial(point));
        if !path.is_dir() {
            return Ok(None);
        }
        let lock = lock(&path)?;
        let state = Self::look(root, point)?;
        Ok(state.map(|state| Self { root: root.to_owned(), path, state, _lock: lock }))
    }

    /// The state of the one of this name, whoever writes it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn look(root: &Path, point: &str) -> Result<Option<State>, Failure> {
        let path = root.join(names::partial(point));
        let file = path.join(names::STATE);
        let state = match fs::read_to_string(&file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(Failure::file(&file))?,
        };
        let unreadable = || {
            Failure::Damaged(format!(
                "{} is no state that this virtmark knows: remove the folder {}",
                names::STATE,
                path.display()
            ))
        };
        let state: State = serde_json::from_str(&state).map_err(|_| unreadable())?;
        if state.version != VERSION || state.point != point {
            return Err(unreadable());
        }
        Ok(Some(state))
    }

    /// A file in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The folder of restore points.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Stores the state, all or nothing.
    ///
    /// # Errors
    /// The kernel's.
    pub fn store(&self) -> Result<(), Failure> {
        let text = serde_json::to_string(&self.state).map_err(|error| Failure::Damaged(error.to_string()))?;
        write(&self.path.join(names::STATE), &text)
    }

    /// Notes the VmBackup as it is now, if it is there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn saw(&mut self, backup: Option<&VmBackup>) -> Result<(), Failure> {
        backup.map_or(Ok(()), |backup| {
            self.state.saw(backup);
            self.store()
        })
    }

    /// All that was read is on stable storage, and so is that it is here.
    ///
    /// # Errors
    /// The kernel's.
    pub fn sync(&self) -> Result<(), Failure> {
        for disk in self.state.disks.values() {
            sync(&self.file(&disk.file))?;
        }
        sync(&self.path)?;
        sync(&self.root)
    }

    /// Removes it with all that is in it; the state goes last, and says from the first moment on that nothing was read.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(mut self) -> Result<(), Failure> {
        let files = std::mem::take(&mut self.state.disks);
        self.store()?;
        for (disk, state) in files {
            remove(&self.file(&state.file))?;
            remove(&self.file(&work(&disk)))?;
        }
        fs::remove_dir_all(&self.path).map_err(Failure::file(&self.path))
    }

    /// Makes it a restore point: all in one step, and for good. Before that step it has its state, and a successor does this
    /// again; after it what is left of the state is of no account.
    ///
    /// # Errors
    /// The kernel's; then it is none.
    pub fn publish(self, manifest: &Manifest) -> Result<PathBuf, Failure> {
        let whole = self.root.join(&self.state.point);
        if whole.exists() {
            return Err(taken(&whole));
        }
        write(&self.path.join(names::MANIFEST), &manifest.text())?;
        for disk in self.state.disks.keys() {
            remove(&self.path.join(work(disk)))?;
        }
        sync(&self.path)?;
        fs::rename(&self.path, &whole).map_err(Failure::file(&whole))?;
        sync(&self.root)?;
        let _ = fs::remove_file(whole.join(names::STATE));
        Ok(whole)
    }
}

/// What is told when a restore point of a name is there already.
#[must_use]
pub fn taken(whole: &Path) -> Failure {
    Failure::Usage(format!("{} is there already: give another folder", whole.display()))
}

/// The file with a disk's work.
#[must_use]
pub fn work(disk: &str) -> String {
    format!("{disk}.work")
}

pub(super) fn lock(path: &Path) -> Result<File, Failure> {
    let folder = File::open(path).map_err(Failure::file(path))?;
    match folder.try_lock() {
        Ok(()) => Ok(folder),
        Err(fs::TryLockError::WouldBlock) => {
            Err(Failure::Usage(format!("another virtmark writes {}: wait for it", path.display())))
        }
        Err(fs::TryLockError::Error(error)) => Err(Failure::file(path)(error)),
    }
}

fn remove(path: &Path) -> Result<(), Failure> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Failure::file(path)(error)),
        _ => Ok(()),
    }
}

/// Writes a file, all or nothing.
pub(super) fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let beside = path.with_extension("new");
    let failed = || Failure::file(&beside);
    let mut file = File::create(&beside).map_err(failed())?;
    std::io::Write::write_all(&mut file, text.as_bytes()).map_err(failed())?;
    file.sync_all().map_err(failed())?;
    fs::rename(&beside, path).map_err(Failure::file(path))
}

/// A file, or which names a folder has, is on stable storage.
///
/// # Errors
/// The kernel's.
pub fn sync(path: &Path) -> Result<(), Failure> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Failure::file(path))
}

/// The length of a file, and its BLAKE3 in hexadecimal digits. It is on stable storage afterwards.
///
/// # Errors
/// The kernel's, and [`Failure::Interrupted`].
pub fn digest(path: &Path, stop: &CancellationToken) -> Result<(u64, String), Failure> {
    let failed = || Failure::file(path);
    let mut file = File::open(path).map_err(failed())?;
    file.sync_all().map_err(failed())?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        if stop.is_cancelled() {
            return Err(Failure::Interrupted);
        }
        match std::io::Read::read(&mut file, &mut buffer).map_err(failed())? {
            0 => return Ok((length, hasher.finalize().to_hex().to_string())),
            read => {
                hasher.update(&buffer[..read]);
                length += read as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::DiskFormat;
    use super::super::manifest::tests::example;
    use super::super::state::Kind;
    use super::*;

    fn state() -> State {
        State::new("db01-1", "db01", "vms", Kind::Auto, DiskFormat::Qcow2)
    }

    #[test]
    fn it_is_hidden_until_it_is_whole() {
        let root = tempfile::tempdir().unwrap();
        let partial = Partial::create(root.path(), state()).unwrap();
        fs::write(partial.file("vda.full.qcow2"), "x").unwrap();
        let seen = || -> Vec<_> {
            let names = fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name());
            names.collect()
        };
        assert_eq!(seen(), [".db01-1.partial"]);
        partial.publish(&example("db01-1", None)).unwrap();
        assert_eq!(seen(), ["db01-1"]);
        let mut inside: Vec<_> = fs::read_dir(root.path().join("db01-1"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        inside.sort();
        assert_eq!(inside, ["manifest.json", "vda.full.qcow2"]);
    }

    #[test]
    fn one_process_writes_and_a_successor_goes_on() {
        let root = tempfile::tempdir().unwrap();
        let mut partial = Partial::create(root.path(), state()).unwrap();
        assert!(matches!(Partial::open(root.path(), "db01-1"), Err(Failure::Usage(_))), "it is locked");
        partial.state.run = Some("r".to_owned());
        partial.store().unwrap();
        let left = partial.state.clone();
        drop(partial);
        let partial = Partial::open(root.path(), "db01-1").unwrap().unwrap();
        assert_eq!(partial.state, left);
        assert!(Partial::open(root.path(), "db01-2").unwrap().is_none());
    }

    #[test]
    fn a_step_to_a_restore_point_that_fails_leaves_what_a_successor_goes_on_with() {
        let root = tempfile::tempdir().unwrap();
        let partial = Partial::create(root.path(), state()).unwrap();
        fs::write(partial.file("vda.full.qcow2"), "x").unwrap();
        let in_the_way = root.path().join("db01-1");
        fs::create_dir(&in_the_way).unwrap();
        fs::write(in_the_way.join("file"), "x").unwrap();
        let manifest = example("db01-1", None);
        assert!(matches!(partial.publish(&manifest), Err(Failure::Usage(_))));
        // as when it is killed before the rename: all that is there is there, also of one that has its manifest
        let left = root.path().join(names::partial("db01-1"));
        fs::write(left.join(names::MANIFEST), manifest.text()).unwrap();
        fs::remove_dir_all(&in_the_way).unwrap();
        let partial = Partial::open(root.path(), "db01-1").unwrap().expect("it can be gone on with");
        let whole = partial.publish(&manifest).unwrap();
        assert_eq!(fs::read_to_string(whole.join("vda.full.qcow2")).unwrap(), "x");
    }

    #[test]
    fn one_whose_removal_was_cut_holds_nothing() {
        let root = tempfile::tempdir().unwrap();
        let mut partial = Partial::create(root.path(), state()).unwrap();
        partial.state = super::super::state::tests::state(None);
        partial.store().unwrap();
        // what cannot be removed stands for the kill
        fs::create_dir(partial.file("vda.full.qcow2")).unwrap();
        assert!(partial.remove().is_err());
        let left = Partial::open(root.path(), "db01-1").unwrap().expect("its state is there");
        assert!(left.state.disks.is_empty());
    }

    #[test]
    fn a_folder_whose_state_is_not_there_is_not_removed() {
        let root = tempfile::tempdir().unwrap();
        let left = root.path().join(names::partial("db01-1"));
        fs::create_dir(&left).unwrap();
        fs::write(left.join("vda.full.qcow2"), "x").unwrap();
        assert!(Partial::open(root.path(), "db01-1").unwrap().is_none());
        assert!(left.join("vda.full.qcow2").exists());
    }

    #[test]
    fn a_digest_is_the_files_own() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        fs::write(&path, b"abc").unwrap();
        let stop = CancellationToken::new();
        let (length, digest) = digest(&path, &stop).unwrap();
        assert_eq!(length, 3);
        assert_eq!(digest, "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85");
        stop.cancel();
        assert!(matches!(super::digest(&path, &stop), Err(Failure::Interrupted)));
    }
}
