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
use super::names::{self, Aside};
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
    /// Folders that `chain` left when its process ended, and what to do.
    pub left: Vec<(String, String)>,
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
    found.left = left(store);
    for point in store.points.iter().filter(|point| is_chosen(&point.name)) {
        found.points.push(Verdict { name: point.name.clone(), problems: problems(store, point, &files) });
    }
    for (name, words) in store.unreadable.iter().filter(|(name, _)| is_chosen(name)) {
        found.points.push(Verdict { name: name.clone(), problems: vec![words.clone()] });
    }
    for (point, aside) in &store.asides {
        if *aside == Aside::Old && !is_there(store, point) && is_chosen(point) {
            let problems = vec![beside(store, point, *aside).1];
            found.points.push(Verdict { name: point.clone(), problems });
        }
    }
    found.points.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Folders that `chain` left, and what to do.
#[must_use]
pub fn left(store: &Store) -> Vec<(String, String)> {
    store.asides.iter().map(|(point, aside)| beside(store, point, *aside)).collect()
}

fn beside(store: &Store, point: &str, aside: Aside) -> (String, String) {
    let again = "run virtmark chain merge or rebase again";
    let folder = names::aside(point, aside);
    let words = match aside {
        Aside::Old if !is_there(store, point) => {
            format!("{folder} is {point}, which was being replaced: {again}, which gives it its name back")
        }
        Aside::Gone if !is_there(store, point) => format!("it is {point}, which was being removed: {again}"),
        _ => format!("nothing needs it; {again}, which removes it"),
    };
    (folder, words)
}

fn is_there(store: &Store, point: &str) -> bool {
    store.point(point).is_some() || store.unreadable.iter().any(|(name, _)| name == point)
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
///
/// # Errors
/// When it cannot be looked at.
pub async fn file(
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

/// What QEMU says of a qcow2 image, and whether it names what it lies over as it was written: an image that names something
/// else would have QEMU read that.
///
/// # Errors
/// When qemu-img cannot be run.
pub async fn image(path: &Path, point: &Manifest, disk: &Disk) -> Result<Vec<String>, Failure> {
    let with = |words: &[&str]| -> Vec<std::ffi::OsString> {
        let words = words.iter().map(|word| std::ffi::OsString::from(*word));
        words.chain([path.as_os_str().to_owned()]).collect()
    };
    // this one opens nothing but the file itself
    let info = qemu_img(with(&["info", "--output=json", "-f", "qcow2"])).await?;
    if !info.status.success() {
        return Ok(vec![format!("qemu-img info of {}: {}", disk.file, first(&info.stderr))]);
    }
    let info: Value = serde_json::from_slice(&info.stdout).unwrap_or_default();
    let problems = named(&info, point, disk);
    if !problems.is_empty() {
        return Ok(problems);
    }
    let check = qemu_img(with(&["check", "-q", "-f", "qcow2"])).await?;
    // 3: clusters that nothing uses
    if matches!(check.status.code(), Some(0 | 3)) {
        return Ok(Vec::new());
    }
    Ok(vec![format!("qemu-img check of {}: {}", disk.file, first(&check.stderr))])
}

fn first(words: &[u8]) -> String {
    let words = String::from_utf8_lossy(words);
    let line = words.lines().find(|line| !line.trim().is_empty()).unwrap_or("it is damaged");
    line.trim_start_matches("qemu-img: ").to_owned()
}

/// What is wrong with what an image says of itself.
fn named(info: &Value, point: &Manifest, disk: &Disk) -> Vec<String> {
    let mut problems = Vec::new();
    let size = &info["virtual-size"];
    if size.as_u64() != Some(disk.size) {
        problems.push(format!("{} is of a disk of {size} bytes, not {}", disk.file, disk.size));
    }
    let parent = point.parent.as_ref().map(|parent| parent.name.as_str()).unwrap_or_default();
    let below = disk.base.as_ref().map(|base| (names::backing(parent, &base.file), base.format.as_str()));
    let (file, format) = (info["backing-filename"].as_str(), info["backing-filename-format"].as_str());
    if (file, format) != (below.as_ref().map(|below| below.0.as_str()), below.as_ref().map(|below| below.1)) {
        let (has, should) = (file.unwrap_or("nothing"), below.map_or("nothing".to_owned(), |below| below.0));
        problems.push(format!("{} names {has} as what it lies over, and not {should}", disk.file));
    }
    if !info["format-specific"]["data"]["data-file"].is_null() {
        problems.push(format!("{} has its data in another file, which virtmark never makes", disk.file));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::example;
    use super::*;
    use serde_json::json;

    #[test]
    fn what_an_image_says_of_itself() {
        let full = example("a", None);
        let over = example("b", Some("a"));
        let size = full.disks[0].size;
        let below = json!({"virtual-size": size, "backing-filename": "../a/vda.full.qcow2",
            "backing-filename-format": "qcow2"});
        let with = |key: &str, value: Value| {
            let mut info = below.clone();
            info[key] = value;
            info
        };
        let rows = [
            (&full, json!({"virtual-size": size}), 0),
            (&full, json!({"virtual-size": size + 512}), 1),
            (&full, below.clone(), 1),
            (&full, json!({}), 1),
            (&over, below.clone(), 0),
            (&over, json!({"virtual-size": size}), 1),
            (&over, with("backing-filename", json!("/etc/shadow")), 1),
            (&over, with("backing-filename-format", json!("raw")), 1),
            (&over, with("format-specific", json!({"data": {"data-file": "/etc/shadow"}})), 1),
        ];
        for (point, info, problems) in rows {
            let found = named(&info, point, &point.disks[0]);
            assert_eq!(found.len(), problems, "{info}: {found:?}");
        }
    }
}
