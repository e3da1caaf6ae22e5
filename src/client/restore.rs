//! A restore point's disks as plain files: any point of a chain, by `qemu-img convert`. It reads no digest (`verify`
//! does), but looks that each image lies over what it should, and never writes over a file.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::chain;
use super::exit::Failure;
use super::folder;
use super::kubernetes::unless;
use super::manifest::{DiskFormat, Manifest};
use super::screen::Screen;
use super::store::Store;
use super::target::qemu_img_done;
use super::verify;
use tokio_util::sync::CancellationToken;

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The restore point; the newest when absent.
    pub point: Option<String>,
    /// The disks; all when empty.
    pub disks: Vec<String>,
    /// Where the files go.
    pub to: PathBuf,
    /// Their format.
    pub format: DiskFormat,
}

/// Writes `DISK.FORMAT` for each disk; answers the files.
///
/// # Errors
/// When there is no such restore point or disk, its chain is broken, or a file is there already.
pub async fn restore(
    store: &Store,
    wanted: &Wanted,
    screen: &Screen,
    stop: &CancellationToken,
) -> Result<Vec<PathBuf>, Failure> {
    let point = match &wanted.point {
        Some(name) => store.point(name),
        None => newest(store, screen)?,
    };
    let point = point.ok_or_else(|| {
        let name = wanted.point.as_deref().unwrap_or("one");
        Failure::NotFound(format!(
            "there is no restore point {name}: virtmark chain list {}",
            store.root.display()
        ))
    })?;
    if let Some(missing) = wanted.disks.iter().find(|name| point.disk(name).is_none()) {
        return Err(Failure::NotFound(format!("{} has no disk {missing}", point.name)));
    }
    std::fs::create_dir_all(&wanted.to).map_err(Failure::file(&wanted.to))?;
    let mut made = Vec::new();
    for disk in &point.disks {
        if !wanted.disks.is_empty() && !wanted.disks.contains(&disk.target) {
            continue;
        }
        let layers = chain::layers(&store.points, point, disk)
            .map_err(|gap| Failure::Damaged(format!("{}: {}: {gap}", point.name, disk.target)))?;
        for (layer, below) in layers.into_iter().filter(|(_, below)| below.format == DiskFormat::Qcow2) {
            let problems = verify::image(&store.file(&layer.name, &below.file), layer, below).await?;
            if let Some(words) = problems.first() {
                return Err(Failure::Damaged(format!("{}: {words}", layer.name)));
            }
        }
        let whole = wanted.to.join(format!("{}.{}", disk.target, wanted.format.as_str()));
        if whole.exists() {
            return Err(Failure::Usage(format!("{} is there already", whole.display())));
        }
        screen.say(format!("Restoring {} of {} to {}", disk.target, point.name, whole.display()));
        let beside = wanted.to.join(format!(".{}.{}.partial", disk.target, wanted.format.as_str()));
        let source = store.file(&point.name, &disk.file);
        let done = unless(stop, convert(&source, disk.format, &beside, wanted.format)).await;
        let done = done.and_then(|()| {
            let file = std::fs::File::open(&beside).and_then(|file| file.sync_all());
            file.map_err(Failure::file(&beside))
        });
        if let Err(failure) = done {
            let _ = std::fs::remove_file(&beside);
            return Err(failure);
        }
        std::fs::rename(&beside, &whole).map_err(Failure::file(&whole))?;
        made.push(whole);
    }
    folder::sync(&wanted.to)?;
    Ok(made)
}

/// The newest restore point of the only VM that has any here.
fn newest<'a>(store: &'a Store, screen: &Screen) -> Result<Option<&'a Manifest>, Failure> {
    if let Some((name, words)) = store.unreadable.first() {
        screen.warn(format!("{name} may be newer, and is not looked at: {words}"));
    }
    let newest = store.points.last();
    match newest.and_then(|newest| store.points.iter().find(|other| other.vm.uuid != newest.vm.uuid)) {
        None => Ok(newest),
        Some(other) => Err(Failure::Usage(format!(
            "{} has restore points of several VMs, {} and {} among them: name one with --point",
            store.root.display(),
            other.vm.name,
            newest.map(|newest| newest.vm.name.as_str()).unwrap_or_default()
        ))),
    }
}

async fn convert(from: &Path, format: DiskFormat, to: &Path, other: DiskFormat) -> Result<(), Failure> {
    let words = ["convert", "-q", "-f", format.as_str(), "-O", other.as_str()].map(OsStr::new);
    qemu_img_done(words.into_iter().chain([from.as_os_str(), to.as_os_str()])).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::example;
    use super::*;

    #[test]
    fn the_newest_is_of_the_only_vm_here() {
        let points = vec![example("a", None), example("b", Some("a"))];
        let mut store = Store { points, ..Store::default() };
        let screen = Screen::new(true);
        assert_eq!(newest(&store, &screen).unwrap().map(|point| point.name.as_str()), Some("b"));
        store.points[0].vm.uuid = "another".to_owned();
        assert!(matches!(newest(&store, &screen), Err(Failure::Usage(_))));
        store.points.clear();
        assert!(newest(&store, &screen).unwrap().is_none());
    }
}
