//! What is built once a machine: kept outside the clone, keyed by what made it. Never per-run state.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// `${XDG_CACHE_HOME:-$HOME/.cache}/virtmark`.
///
/// # Errors
/// When neither variable is set.
pub fn root() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    Ok(base.join("virtmark"))
}

/// The folder `name-<key of made_from>`; made by `make` the first time, under another name until it is whole. Others that
/// want it meanwhile wait.
///
/// # Errors
/// What `make` says, or the file system.
pub fn keyed(name: &str, made_from: &[&str], make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    made_from.hash(&mut hasher);
    let whole = root()?.join(format!("{name}-{:016x}", hasher.finish()));
    if whole.exists() {
        return Ok(whole);
    }
    fs::create_dir_all(root()?)?;
    let lock = whole.with_extension("lock");
    let lock = fs::File::create(&lock).with_context(|| format!("cannot make {}", lock.display()))?;
    lock.lock().context("what others make cannot be waited for")?;
    if whole.exists() {
        return Ok(whole);
    }
    let partial = whole.with_extension(format!("partial-{}", std::process::id()));
    fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    let made = make(&partial).and_then(|()| {
        fs::rename(&partial, &whole).with_context(|| format!("cannot rename to {}", whole.display()))
    });
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    made.map(|()| whole)
}
