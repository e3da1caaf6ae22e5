//! Whether restore points are what was written, and have all that they lie over: digests, chains, `qemu-img check`. It
//! mends nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::chain;
use super::exit::Failure;
use super::folder;
use super::manifest::{Disk, DiskFormat, Manifest};
use super::names;
use super::screen::Screen;
use super::store::Store;
use super::target::qemu_img;

/// What was found of a folder.
#[derive(Serialize, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Each restore point that was looked at.
    pub points: Vec<Verdict>,
    /// Folders of restore points that are not whole yet: nothing is wrong with them, and they are none.
    pub unfinished: Vec<String>,
}

/// What was found of a restore point.
#[derive(Serialize, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Its name.
    pub name: String,
    /// What is wrong; nothing when it can be restored.
    pub problems: Vec<String>,
}

impl Found {
    /// How many cannot be restored.
    #[must_use]
    pub fn damaged(&self) -> usize {
        self.points.iter().filter(|point| !point.problems.is_empty()).count()
    }
}

/// Looks at each restore point of a folder; with `only`, at that one and those that it lies over.
///
/// # Errors
/// When something cannot be looked at; damage is none.
pub async fn verify(
    store: &Store,
    only: Option<&str>,
    screen: &Screen,
    stop: &CancellationToken,
) -> Result<Found, Failure> {
    let chosen: Option<BTreeSet<&str>> = only.and_then(|name| store.point(name)).map(|point| {
        let layers =
            point.disks.iter().flat_map(|disk| chain::layers(&store.points, point, disk).unwrap_or_default());
        layers.map(|(point, _)| point.name.as_str()).chain([point.name.as_str()]).collect()
    });
    let is_chosen = |name: &str| {
        only.is_none_or(|only| only == name) || chosen.as_ref().is_some_and(|chosen| chosen.contains(name))
    };
    // by file: several restore points lie over one
    let mut files: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for point in store.points.iter().filter(|point| is_chosen(&point.name)) {
        for disk in &point.disks {
            screen.say(format!("Reading {}/{}", point.name, disk.file));
            let problems = file(store, point, disk, stop).await?;
            files.insert((point.name.clone(), disk.file.clone()), problems);
        }
    }
    let mut found = Found { unfinished: store.unfinished.clone(), ..Found::default() };
    for point in store.points.iter().filter(|point| is_chosen(&point.name)) {
        found.points.push(Verdict { name: point.name.clone(), problems: problems(store, point, &files) });
    }
    for (name, words) in store.unreadable.iter().filter(|(name, _)| is_chosen(name)) {
        found.points.push(Verdict { name: name.clone(), problems: vec![words.clone()] });
    }
    found.points.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn problems(store: &Store, point: &Manifest, files: &BTreeMap<(String, String), Vec<String>>) -> Vec<String> {
    let of_disk = |disk: &Disk| match chain::layers(&store.points, point, disk) {
        Err(gap) => vec![format!("{}: {gap}", disk.target)],
        Ok(layers) => layers
            .iter()
            .flat_map(|(layer, below)| {
                let known = files.get(&(layer.name.clone(), below.file.clone()));
                let is_own = layer.name == point.name;
                known.into_iter().flatten().map(move |words| match is_own {
                    true => format!("{}: {words}", disk.target),
                    false => format!("{}: it lies over {}, where {words}", disk.target, layer.name),
                })
            })
            .collect(),
    };
    let mut problems: Vec<_> = point.disks.iter().flat_map(of_disk).collect();
    // a broken chain hides what is wrong with the own files
    for disk in &point.disks {
        let own = files.get(&(point.name.clone(), disk.file.clone())).into_iter().flatten();
        for words in own.map(|words| format!("{}: {words}", disk.target)) {
            if !problems.contains(&words) {
                problems.push(words);
            }
        }
    }
    problems
}

/// What is wrong with one file, whatever it lies over.
async fn file(
    store: &Store,
    point: &Manifest,
    disk: &Disk,
    stop: &CancellationToken,
) -> Result<Vec<String>, Failure> {
    let path = store.file(&point.name, &disk.file);
    let Ok(length) = std::fs::metadata(&path).map(|found| found.len()) else {
        return Ok(vec![format!("{} is not there", disk.file)]);
    };
    let mut problems = Vec::new();
    if length != disk.bytes {
        problems.push(format!("{} has {length} bytes, not {}", disk.file, disk.bytes));
    } else {
        let (path, stop) = (path.clone(), stop.clone());
        let digest = tokio::task::spawn_blocking(move || folder::digest(&path, &stop)).await;
        match digest.map_err(|error| Failure::Program(error.to_string()))? {
            Ok((_, found)) if found == disk.blake3 => {}
            Ok(_) => problems.push(format!("{} is not what was written: its digest differs", disk.file)),
            Err(Failure::File { source, .. }) => problems.push(format!("{}: {source}", disk.file)),
            Err(failure) => return Err(failure),
        }
    }
    if disk.format == DiskFormat::Qcow2 {
        problems.extend(image(&path, point, disk).await?);
    } else if length != disk.size {
        problems.push(format!("{} is of a disk of {length} bytes, not {}", disk.file, disk.size));
    }
    Ok(problems)
}

/// What QEMU says of a qcow2 image.
async fn image(path: &Path, point: &Manifest, disk: &Disk) -> Result<Vec<String>, Failure> {
    let with = |words: &[&str]| -> Vec<std::ffi::OsString> {
        let words = words.iter().map(|word| std::ffi::OsString::from(*word));
        words.chain([path.as_os_str().to_owned()]).collect()
    };
    let check = qemu_img(with(&["check", "-q", "-f", "qcow2"])).await?;
    let mut problems = Vec::new();
    // 3: clusters that nothing uses
    if !matches!(check.status.code(), Some(0 | 3)) {
        let words = String::from_utf8_lossy(&check.stderr);
        let first = words.lines().find(|line| !line.trim().is_empty()).unwrap_or("it is damaged");
        problems.push(format!("qemu-img check of {}: {}", disk.file, first.trim_start_matches("qemu-img: ")));
        return Ok(problems);
    }
    let info = qemu_img(with(&["info", "--output=json", "-f", "qcow2"])).await?;
    let info: Value = serde_json::from_slice(&info.stdout).unwrap_or_default();
    if info["virtual-size"].as_u64() != Some(disk.size) {
        problems
            .push(format!("{} is of a disk of {} bytes, not {}", disk.file, info["virtual-size"], disk.size));
    }
    let parent = point.parent.as_ref().map(|parent| parent.name.as_str()).unwrap_or_default();
    let expected = disk.base.as_ref().map(|base| names::backing(parent, &base.file));
    if info["backing-filename"].as_str() != expected.as_deref() {
        let (has, should) = (&info["backing-filename"], expected.as_deref().unwrap_or("nothing"));
        problems.push(format!("{} names {has} as what it lies over, and not {should}", disk.file));
    }
    Ok(problems)
}
