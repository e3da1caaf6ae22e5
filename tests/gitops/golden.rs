//! The recorded objects: one YAML file a kind, with the name of each phase before its object. What differs from run to
//! run is made the same: uids, times, paths. What GitOps tools do not read is left out.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use serde_saphyr::SerializerOptions;

/// Objects by kind, then by phase.
pub type Objects = BTreeMap<String, BTreeMap<String, Value>>;

const KEPT: [&str; 8] = [
    "name",
    "namespace",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "finalizers",
    "labels",
    "ownerReferences",
];

/// Whether objects and table are to be written instead of compared.
pub fn is_to_be_written() -> bool {
    std::env::var_os("VIRTMARK_GOLDEN").is_some_and(|wish| wish == "write")
}

/// The recorded objects.
pub fn load() -> Result<Objects> {
    let mut objects = Objects::new();
    for entry in fs::read_dir(folder())? {
        let path = entry?.path();
        let kind = path.file_stem().and_then(|stem| stem.to_str()).context("a file without a name")?;
        let text = fs::read_to_string(&path)?;
        let states = serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?;
        objects.insert(kind.to_owned(), states);
    }
    Ok(objects)
}

/// Compares what was recorded just now with what is kept, or writes it.
pub fn settle(recorded: &Objects, bed: &Path) -> Result<()> {
    let new = normalised(recorded, bed)?;
    if is_to_be_written() {
        for (kind, states) in &new {
            let mut plain = SerializerOptions::default();
            plain.prefer_block_scalars = false;
            let mut text = String::new();
            serde_saphyr::to_fmt_writer_with_options(&mut text, states, plain)?;
            fs::write(folder().join(format!("{kind}.yaml")), text)?;
        }
    }
    let kept = load()?;
    for (kind, states) in &new {
        for (state, object) in states {
            let old = kept.get(kind).and_then(|states| states.get(state));
            if old != Some(object) {
                let old = old.map_or_else(|| "nothing".to_owned(), Value::to_string);
                bail!(
                    "{kind} {state} is not as recorded.\nnow:  {object}\nkept: {old}\n\
                    If that is right: VIRTMARK_GOLDEN=write cargo test --test gitops"
                );
            }
        }
        ensure!(kept[kind].len() == states.len(), "more phases of {kind} are kept than were recorded");
    }
    Ok(())
}

fn folder() -> PathBuf {
    Path::new("tests/gitops/objects").to_owned()
}

fn normalised(objects: &Objects, bed: &Path) -> Result<Objects> {
    let mut objects = objects.clone();
    for object in objects.values_mut().flat_map(BTreeMap::values_mut) {
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.retain(|key, _| KEPT.contains(&key.as_str()));
        }
    }
    // whether the agent has looked at the bitmaps by then is chance
    for (kind, seen) in [("VmCheckpoint", ["disks", "dirty"].as_slice()), ("LibvirtDomain", &["checkpoints"])]
    {
        for object in objects.get_mut(kind).into_iter().flat_map(BTreeMap::values_mut) {
            if let Some(status) = object["status"].as_object_mut() {
                status.retain(|key, _| !seen.contains(&key.as_str()));
            }
        }
    }
    let text = serde_json::to_string(&objects)?.replace(&*bed.to_string_lossy(), "/tmp/vmbed");
    let text = replaced(&text, 20, is_time, |_| "2026-01-01T00:00:00Z".to_owned());
    let mut uids: Vec<(String, String)> = Vec::new();
    let text = replaced(&text, 36, is_uid, |uid| {
        let known = uids.iter().find(|(old, _)| old == uid).map(|(_, new)| new.clone());
        known.unwrap_or_else(|| {
            let new = format!("{:08x}-0000-4000-8000-000000000000", uids.len() + 1);
            uids.push((uid.to_owned(), new.clone()));
            new
        })
    });
    let text = replaced(&text, 18, is_cluster, |_| "virtmark-cccccccc-".to_owned());
    // a checkpoint is named after the start of its backup's uid
    let text = uids
        .iter()
        .fold(text, |text, (old, new)| text.replace(&format!("-{}", &old[..8]), &format!("-{}", &new[..8])));
    Ok(serde_json::from_str(&text)?)
}

fn replaced(
    text: &str,
    length: usize,
    fits: fn(&str) -> bool,
    mut with: impl FnMut(&str) -> String,
) -> String {
    let (mut new, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(next) = rest.chars().next() {
        match rest.get(..length).filter(|part| fits(part)) {
            Some(part) => {
                new += &with(part);
                rest = &rest[length..];
            }
            None => {
                new.push(next);
                rest = &rest[next.len_utf8()..];
            }
        }
    }
    new
}

/// `9`: a digit; `x`: a hexadecimal one; everything else: itself.
fn looks(text: &str, like: &str) -> bool {
    text.len() == like.len()
        && text.bytes().zip(like.bytes()).all(|(byte, like)| match like {
            b'9' => byte.is_ascii_digit(),
            b'x' => byte.is_ascii_hexdigit(),
            like => byte == like,
        })
}

fn is_time(text: &str) -> bool {
    looks(text, "9999-99-99T99:99:99Z")
}

fn is_uid(text: &str) -> bool {
    looks(text, "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")
}

fn is_cluster(text: &str) -> bool {
    looks(text, "virtmark-xxxxxxxx-")
}
