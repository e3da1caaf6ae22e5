//! A folder that the agent keeps for itself. What it reads is a plain file of its own user, of a sane length; what it
//! writes is there whole or not at all.
//!
//! No link is followed from the folder on, nothing is waited for (a FIFO), and nothing outside is ever written or
//! removed. It knows no record and no ticket.

use std::ffi::CStr;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;

/// An open folder.
#[derive(Debug)]
pub(super) struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl Folder {
    /// Opens the folder at `path`.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let fd = rustix::fs::openat(CWD, path, DIRECTORY, Mode::empty())?;
        own(&rustix::fs::fstat(&fd)?)?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Opens, and makes, the folder at `path` with `mode`. Parents get the usual mode, and may be links.
    pub(super) fn make(path: &Path, mode: Mode) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        made(rustix::fs::mkdirat(CWD, path, mode))?;
        let folder = Self::open(path)?;
        rustix::fs::fchmod(&folder.fd, mode)?;
        Ok(folder)
    }

    /// Opens a folder in it.
    pub(super) fn folder(&self, name: &str) -> io::Result<Self> {
        let fd = rustix::fs::openat(&self.fd, name, DIRECTORY, Mode::empty())?;
        own(&rustix::fs::fstat(&fd)?)?;
        Ok(Self { fd, path: self.path.join(name) })
    }

    /// Opens, and makes, a folder in it, for the agent alone.
    pub(super) fn make_folder(&self, name: &str) -> io::Result<Self> {
        made(rustix::fs::mkdirat(&self.fd, name, Mode::RWXU))?;
        let folder = self.folder(name)?;
        rustix::fs::fchmod(&folder.fd, Mode::RWXU)?;
        Ok(folder)
    }

    /// Locks it for as long as it is open; whether it did, or another open one has the lock.
    pub(super) fn lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(&self.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What is in it; names that are no text are not ours, and left out.
    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            let name = CStr::to_str(entry.file_name()).ok().filter(|name| !matches!(*name, "." | ".."));
            names.extend(name.map(str::to_owned));
        }
        Ok(names)
    }

    /// Bytes that the files of a folder in it take on their disk. The folder may be another user's: nothing is read.
    pub(super) fn allocated_in(&self, name: &str) -> io::Result<u64> {
        let fd = rustix::fs::openat(&self.fd, name, DIRECTORY, Mode::empty())?;
        let files = rustix::fs::Dir::read_from(&fd)?.filter_map(Result::ok);
        let stats = files.filter_map(|file| {
            let stat = rustix::fs::statat(&fd, file.file_name(), AtFlags::SYMLINK_NOFOLLOW).ok()?;
            (FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some(stat)
        });
        Ok(stats.map(|stat| u64::try_from(stat.st_blocks).unwrap_or_default().saturating_mul(512)).sum())
    }

    /// The bytes of a file of at most `limit` bytes; `None` when it is not there.
    pub(super) fn read(&self, name: &str, limit: usize) -> io::Result<Option<Vec<u8>>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            opened => opened?,
        };
        let stat = rustix::fs::fstat(&file)?;
        own(&stat)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(foreign("not a file"));
        }
        let mut bytes = Vec::new();
        let longest = u64::try_from(limit).unwrap_or(u64::MAX);
        fs::File::from(file).take(longest.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() > limit {
            Err(foreign("too long to be one of the agent's files"))
        } else {
            Ok(Some(bytes))
        }
    }

    /// Stores a file under this name, and at no time a part of it.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let partial = format!("{name}.partial");
        // what a process that died left, or whatever else is in the way
        self.remove(&partial)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.fd, &partial, flags, Mode::RUSR | Mode::WUSR)?;
        fs::File::from(file).write_all(bytes)?;
        Ok(rustix::fs::renameat(&self.fd, &partial, &self.fd, name)?)
    }

    /// Removes whatever has this name, a folder with all that is in it; what is not there is removed.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            // std's does not follow links either, not even those that appear meanwhile
            Err(Errno::ISDIR) => fs::remove_dir_all(self.path.join(name)),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a folder if nothing is in it; whether it did.
    pub(super) fn remove_empty(&self, name: &str) -> io::Result<bool> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn made(result: rustix::io::Result<()>) -> io::Result<()> {
    match result {
        Err(Errno::EXIST) => Ok(()),
        result => Ok(result?),
    }
}

/// What another user owns, or could have written, is not believed.
fn own(stat: &Stat) -> io::Result<()> {
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err(foreign("owned by another user"));
    }
    let others = Mode::WGRP | Mode::WOTH;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if Mode::from_raw_mode(stat.st_mode).intersects(others) => {
            Err(foreign("writable by other users"))
        }
        _ => Ok(()),
    }
}

fn foreign(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::make(&dir.path().join("in/it"), Mode::RWXU).unwrap();
        fs::write(dir.path().join("outside"), "as it was").unwrap();
        (dir, folder)
    }

    fn outside(dir: &tempfile::TempDir) -> String {
        fs::read_to_string(dir.path().join("outside")).unwrap()
    }

    #[test]
    fn a_file_comes_back_whole_and_for_the_agent_alone() {
        let (_dir, folder) = folder();
        assert_eq!(folder.read("a", 3).unwrap(), None);
        folder.write("a", b"abc").unwrap();
        folder.write("a", b"xyz").unwrap();
        assert_eq!(folder.read("a", 3).unwrap().as_deref(), Some(&b"xyz"[..]));
        assert!(folder.read("a", 2).is_err(), "longer than it may be");
        assert_eq!(fs::metadata(folder.path().join("a")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(folder.names().unwrap(), ["a"]);
        folder.remove("a").unwrap();
        folder.remove("a").unwrap();
        assert!(folder.names().unwrap().is_empty());
    }

    #[test]
    fn a_link_is_neither_read_nor_written_through() {
        let (dir, folder) = folder();
        for name in ["a", "a.partial", "b"] {
            symlink("../../outside", folder.path().join(name)).unwrap();
        }
        assert!(folder.read("a", 100).is_err());
        folder.write("a", b"new").unwrap();
        assert_eq!(folder.read("a", 100).unwrap().as_deref(), Some(&b"new"[..]));
        folder.remove("b").unwrap();
        assert_eq!(outside(&dir), "as it was");

        symlink(dir.path(), folder.path().join("sub")).unwrap();
        assert!(folder.folder("sub").is_err() && folder.make_folder("sub").is_err());
        folder.remove("sub").unwrap();
        symlink(folder.path(), dir.path().join("other")).unwrap();
        assert!(Folder::make(&dir.path().join("other"), Mode::RWXU).is_err());
        assert_eq!(outside(&dir), "as it was");
    }

    #[test]
    fn what_is_no_file_is_refused_at_once_and_removed_when_it_is_in_the_way() {
        let (_dir, folder) = folder();
        let fifo = FileType::Fifo;
        for name in ["a", "a.partial"] {
            rustix::fs::mknodat(&folder.fd, name, fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        }
        assert!(folder.read("a", 100).is_err(), "and nobody waited for a writer");
        folder.write("a", b"new").unwrap();
        fs::create_dir_all(folder.path().join("b/c")).unwrap();
        assert!(folder.read("b", 100).is_err());
        assert!(!folder.remove_empty("b").unwrap());
        folder.remove("b").unwrap();
        assert!(folder.remove_empty("b").unwrap());
        assert_eq!(folder.names().unwrap(), ["a"]);
    }

    #[test]
    fn what_others_could_have_written_is_not_believed() {
        let (_dir, folder) = folder();
        folder.write("a", b"abc").unwrap();
        let path = folder.path().join("a");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(folder.read("a", 100).unwrap_err().to_string(), "writable by other users");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        // as any other user a test cannot give files away; there the first half has to do
        if rustix::process::geteuid().is_root() {
            chown(&path, Some(12_345), None).unwrap();
            assert_eq!(folder.read("a", 100).unwrap_err().to_string(), "owned by another user");
            chown(folder.path(), Some(12_345), None).unwrap();
            assert!(Folder::open(folder.path()).is_err());
        }
    }
}
