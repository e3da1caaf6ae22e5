//! `chain merge` and `chain rebase`: a restore point's files written anew beside it, over something else, looked at, and put
//! in its place. Every restore point that stays has the bytes that it had, which is compared. It changes nothing in place,
//! and nothing outside the folder.
//!
//! ```text
//! reshape (what) -> digests of all that is read -> .NAME.chain-new -> check, compare, digests -> moves (in which order)
//! ```

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

use super::exit::Failure;
use super::folder;
use super::kubernetes::unless;
use super::manifest::{Disk, DiskFormat, Manifest};
use super::names;
use super::reshape::{self, ReshapeError, Reshaped, Rewrite};
use super::screen::Screen;
use super::staging::Staging;
use super::store::Store;
use super::target::{self, qemu_img, qemu_img_done};
use super::verify;
use super::words;

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The folder of restore points, or one of them.
    pub dir: PathBuf,
    /// The restore point, where the folder is of all.
    pub point: Option<String>,
    /// Whether digests are read before, and bytes compared after.
    pub verify: bool,
    /// Whether it is only said what would be done.
    pub dry_run: bool,
}

impl From<ReshapeError> for Failure {
    fn from(error: ReshapeError) -> Self {
        Self::Damaged(error.to_string())
    }
}

/// Makes a restore point whole by itself; answers what goes to standard output.
///
/// # Errors
/// Why it is as it was.
pub async fn merge(wanted: &Wanted, screen: &Screen, stop: &CancellationToken) -> Result<String, Failure> {
    let (root, name) = locate(wanted)?;
    let staging = Staging::open(&root)?;
    if !wanted.dry_run {
        staging.mend()?;
    }
    let store = Store::read(&root)?;
    let reshaped = reshape::merge(&store.points, find(&store, &name)?)?;
    if reshaped.is_none() {
        screen.say(format!("{name} is full already"));
    }
    if wanted.dry_run {
        return Ok(told(&store, reshaped.as_slice()));
    }
    if let Some(reshaped) = reshaped {
        Work { store: &store, staging, wanted, screen, stop, looked: BTreeSet::new() }.put(reshaped).await?;
    }
    Ok(format!("{}\n", root.join(name).display()))
}

/// Removes a restore point; what lies over it then lies over what is below. Answers what goes to standard output.
///
/// # Errors
/// Why it is there still. Some of what lay over it may lie elsewhere already.
pub async fn rebase(wanted: &Wanted, screen: &Screen, stop: &CancellationToken) -> Result<String, Failure> {
    let (root, name) = locate(wanted)?;
    let staging = Staging::open(&root)?;
    if !wanted.dry_run && staging.mend()?.contains(&name) {
        screen.say(format!("Removed {name}, as was begun before"));
        return Ok(String::new());
    }
    let store = Store::read(&root)?;
    let removed = find(&store, &name)?;
    let reshaped = reshape::rebase(&store.points, removed)?;
    // before hours of work
    let moved: Vec<_> = reshaped.iter().map(|reshaped| reshaped.manifest.name.as_str()).collect();
    staging.removable(removed, &moved)?;
    if wanted.dry_run {
        let bytes = removed.disks.iter().map(|disk| disk.bytes).sum();
        return Ok(format!("{}{name} is removed: {}\n", told(&store, &reshaped), words::bytes(bytes)));
    }
    let mut made = String::new();
    let mut work = Work { store: &store, staging, wanted, screen, stop, looked: BTreeSet::new() };
    for reshaped in reshaped {
        let path = root.join(&reshaped.manifest.name);
        work.put(reshaped).await?;
        made.push_str(&format!("{}\n", path.display()));
    }
    work.staging.remove(removed)?;
    screen.say(format!("Removed {name}"));
    if let Some(checkpoint) = &removed.checkpoint {
        screen.say(format!(
            "Its checkpoint stays in the cluster; nothing here needs it: virtmark checkpoint delete {}",
            checkpoint.name
        ));
    }
    Ok(made)
}

/// The folder of restore points, and the name of the one that is meant.
fn locate(wanted: &Wanted) -> Result<(PathBuf, String), Failure> {
    let dir = std::path::absolute(&wanted.dir).map_err(Failure::file(&wanted.dir))?;
    let parent = dir.parent().zip(dir.file_name().and_then(OsStr::to_str));
    // one that was being replaced or removed when a process was killed has another name for now
    let was_there = |(root, name): &(&Path, &str)| {
        let asides = Store::read(root).map(|store| store.asides).unwrap_or_default();
        asides.iter().any(|(point, _)| point == name)
    };
    let is_one =
        dir.join(names::MANIFEST).exists() || !dir.exists() && parent.as_ref().is_some_and(was_there);
    let (root, name) = match (parent, &wanted.point) {
        (Some((root, name)), None) if is_one => (root, name.to_owned()),
        (_, Some(name)) if !is_one => (dir.as_path(), name.clone()),
        (_, Some(_)) => {
            let words = format!("{} is a restore point itself: give no --point", wanted.dir.display());
            return Err(Failure::Usage(words));
        }
        (_, None) if !dir.exists() => {
            return Err(Failure::NotFound(format!("{} is not there", wanted.dir.display())));
        }
        (_, None) => {
            let words = format!(
                "name the restore point with --point, or give its own folder: virtmark chain list {}",
                wanted.dir.display()
            );
            return Err(Failure::Usage(words));
        }
    };
    Ok((root.canonicalize().map_err(Failure::file(root))?, name))
}

fn find<'a>(store: &'a Store, name: &str) -> Result<&'a Manifest, Failure> {
    let unreadable = store.unreadable.iter().find(|(other, _)| other == name);
    match (store.point(name), unreadable) {
        (Some(point), _) => Ok(point),
        (None, Some((_, why))) => Err(Failure::Damaged(format!("{name}: {why}"))),
        (None, None) => {
            let root = store.root.display();
            Err(Failure::NotFound(format!("there is no restore point {name}: virtmark chain list {root}")))
        }
    }
}

/// What would be done, in lines.
fn told(store: &Store, reshaped: &[Reshaped]) -> String {
    let mut lines = String::new();
    for reshaped in reshaped {
        let name = &reshaped.manifest.name;
        for Rewrite { target, over, reads } in &reshaped.rewrites {
            let bytes = reads.iter().filter_map(|(point, file)| {
                let disk = store.point(point)?.disks.iter().find(|disk| disk.file == *file)?;
                Some(disk.bytes)
            });
            let read = words::bytes(bytes.sum());
            let points = reads.iter().map(|(point, _)| point.as_str()).collect::<Vec<_>>().join(", ");
            lines.push_str(&match over {
                Some((below, base)) => {
                    format!("{name}: {target} lies over {below}/{}, from {points} ({read})\n", base.file)
                }
                None => format!("{name}: {target} is full, from {points} ({read})\n"),
            });
        }
    }
    lines
}

struct Work<'a> {
    store: &'a Store,
    staging: Staging,
    wanted: &'a Wanted,
    screen: &'a Screen,
    stop: &'a CancellationToken,
    /// The files that were looked at.
    looked: BTreeSet<(String, String)>,
}

impl Work<'_> {
    /// Writes a restore point anew, and puts it in its place.
    async fn put(&mut self, reshaped: Reshaped) -> Result<(), Failure> {
        let name = reshaped.manifest.name.clone();
        for (point, file) in reshaped.rewrites.iter().flat_map(|rewrite| &rewrite.reads) {
            self.look(point, file).await?;
        }
        let path = self.staging.begin(&name)?;
        if let Err(failure) = self.fill(&path, reshaped).await {
            // what stays of it the next one removes
            let _ = self.staging.give_up(&name);
            return Err(failure);
        }
        self.staging.exchange(&name)
    }

    /// Damage that is read would get a digest of its own.
    async fn look(&mut self, point: &str, file: &str) -> Result<(), Failure> {
        if !self.looked.insert((point.to_owned(), file.to_owned())) {
            return Ok(());
        }
        let found = find(self.store, point)?;
        let Some(disk) = found.disks.iter().find(|disk| disk.file == file) else { return Ok(()) };
        let problems = if self.wanted.verify {
            self.screen.say(format!("Reading {point}/{file}"));
            unless(self.stop, verify::file(self.store, found, disk, self.stop)).await?
        } else if disk.format == DiskFormat::Qcow2 {
            verify::image(&self.store.file(point, file), found, disk).await?
        } else {
            Vec::new()
        };
        match problems.first() {
            Some(words) => Err(Failure::Damaged(format!("{point}: {words}; nothing of it was changed"))),
            None => Ok(()),
        }
    }

    /// Writes what is to be in the folder beside, on stable storage.
    async fn fill(&self, path: &Path, reshaped: Reshaped) -> Result<(), Failure> {
        let Reshaped { mut manifest, rewrites } = reshaped;
        let old = find(self.store, &manifest.name)?;
        let mut anew = Vec::new();
        for rewrite in &rewrites {
            let described = manifest.clone();
            let Some(disk) = manifest.disks.iter_mut().find(|disk| disk.target == rewrite.target) else {
                continue;
            };
            let (from, to) = (self.store.file(&old.name, &disk.file), path.join(&disk.file));
            match &rewrite.over {
                Some((below, _)) => {
                    self.screen.say(format!("Writing {}/{} over {below}", old.name, disk.file));
                }
                None => self.screen.say(format!("Writing {}/{} whole", old.name, disk.file)),
            }
            unless(self.stop, write(rewrite, disk, &old.name, &from, &to)).await?;
            let like_it =
                std::fs::metadata(&from).and_then(|from| std::fs::set_permissions(&to, from.permissions()));
            like_it.map_err(Failure::file(&to))?;
            let problems = unless(self.stop, verify::image(&to, &described, disk)).await?;
            if let Some(words) = problems.first() {
                return Err(Failure::Program(format!(
                    "qemu-img made no good image: {words}; nothing was changed"
                )));
            }
            if self.wanted.verify {
                self.screen.say(format!("Comparing {}/{}", old.name, disk.file));
                unless(self.stop, compare(&from, &to)).await?;
            }
            let stop = self.stop.clone();
            let digest = tokio::task::spawn_blocking(move || folder::digest(&to, &stop)).await;
            (disk.bytes, disk.blake3) = digest.map_err(|error| Failure::Program(error.to_string()))??;
            anew.push(disk.file.clone());
        }
        let anew: Vec<_> = anew.iter().map(String::as_str).collect();
        self.staging.carry(old, &anew, self.stop)?;
        folder::write(&path.join(names::MANIFEST), &manifest.text())?;
        folder::sync(path)
    }
}

/// Writes a disk anew.
async fn write(rewrite: &Rewrite, disk: &Disk, point: &str, from: &Path, to: &Path) -> Result<(), Failure> {
    let Some((below, base)) = &rewrite.over else {
        let words = ["convert", "-q", "-f", "qcow2", "-O", "qcow2"].map(OsStr::new);
        return qemu_img_done(words.into_iter().chain([from.as_os_str(), to.as_os_str()])).await.map(drop);
    };
    // an empty image over the old one, into which rebase writes where the old one and its new base differ. Not convert -B: that
    // takes only what is in the uppermost layer
    let old = names::backing(point, &disk.file);
    target::create(to, DiskFormat::Qcow2, disk.size, Some((&old, DiskFormat::Qcow2))).await?;
    let words = ["rebase", "-q", "--image-opts", "-F", base.format.as_str(), "-b"].map(OsString::from);
    let over = OsString::from(names::backing(below, &base.file));
    qemu_img_done(words.into_iter().chain([over, zeroing(to)])).await.map(drop)
}

/// An image as rebase opens it: zeroes that hide data below are written as such, and take no room.
fn zeroing(image: &Path) -> OsString {
    let mut words =
        b"driver=qcow2,detect-zeroes=unmap,discard=unmap,file.driver=file,file.filename=".to_vec();
    for byte in image.as_os_str().as_bytes() {
        words.push(*byte);
        if *byte == b',' {
            words.push(b',');
        }
    }
    OsString::from_vec(words)
}

/// Whether two images read the same, each with what it lies over.
async fn compare(old: &Path, new: &Path) -> Result<(), Failure> {
    let words = ["compare", "-q", "-f", "qcow2", "-F", "qcow2"].map(OsStr::new);
    let found = qemu_img(words.into_iter().chain([old.as_os_str(), new.as_os_str()])).await?;
    let said = String::from_utf8_lossy(&found.stderr).trim().to_owned();
    match found.status.code() {
        Some(0) => Ok(()),
        Some(1) => Err(Failure::Program(format!(
            "what qemu-img made of {} has other bytes: nothing was changed; report it",
            old.display()
        ))),
        _ => Err(Failure::Program(said)),
    }
}
