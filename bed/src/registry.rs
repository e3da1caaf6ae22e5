//! Which beds there are on this machine, and whose they are, so that one that was left by a SIGKILLed run is
//! taken down by the next.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::cache;
use crate::ledger::Process;

#[derive(Serialize, Deserialize)]
struct Entry {
    dir: PathBuf,
    owner: Process,
    keep: bool,
}

fn folder() -> Result<PathBuf> {
    let folder = cache::root()?.join("beds");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn file(dir: &Path) -> Result<PathBuf> {
    Ok(folder()?.join(dir.file_name().context("a bed's folder has a name")?))
}

/// Notes a bed that this process brings up. With `keep` it outlives it.
///
/// # Errors
/// When it cannot be written.
pub fn register(dir: &Path, keep: bool) -> Result<()> {
    let owner = Process::find(std::process::id(), "bed", false).context("this process has no /proc entry")?;
    let entry = Entry { dir: dir.to_owned(), owner, keep };
    fs::write(file(dir)?, serde_json::to_string(&entry)?)?;
    Ok(())
}

/// Forgets a bed that is down.
///
/// # Errors
/// When it cannot be removed.
pub fn unregister(dir: &Path) -> Result<()> {
    let file = file(dir)?;
    if file.exists() {
        fs::remove_file(file)?;
    }
    Ok(())
}

fn entries() -> Result<Vec<Entry>> {
    let files = fs::read_dir(folder()?)?.filter_map(Result::ok);
    Ok(files.filter_map(|file| serde_json::from_slice(&fs::read(file.path()).ok()?).ok()).collect())
}

/// Beds that were left running on purpose.
///
/// # Errors
/// When the registry cannot be read.
pub fn kept() -> Result<Vec<PathBuf>> {
    Ok(entries()?.into_iter().filter(|entry| entry.keep).map(|entry| entry.dir).collect())
}

/// Beds that this process brought up.
///
/// # Errors
/// When the registry cannot be read.
pub fn mine() -> Result<Vec<PathBuf>> {
    let this = std::process::id();
    let mine = entries()?.into_iter().filter(|entry| u32::try_from(entry.owner.pid) == Ok(this));
    Ok(mine.map(|entry| entry.dir).collect())
}

/// Takes down the beds whose owner is gone without having done so.
///
/// # Errors
/// When the registry cannot be read.
pub fn sweep() -> Result<()> {
    for entry in entries()?.into_iter().filter(|entry| !entry.keep && !entry.owner.is_alive()) {
        eprintln!("taking down {}, which a run that was killed left", entry.dir.display());
        crate::down(&entry.dir);
    }
    Ok(())
}
