//! A libvirt pool for uploads, what is asked for one, and what is left in it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::component::TENANT_POOLS;
use virtmark_bed::hypervisor::Hypervisor;

use super::rig::MIB;

/// A pool of the hypervisor, in a folder of its own; the bed's operator allows it.
pub fn pool(hypervisor: &Hypervisor, name: &str) -> Result<PathBuf> {
    ensure!(TENANT_POOLS.contains(&name), "the bed's operator does not allow pool {name}");
    let folder = hypervisor.dir.join(format!("pool-{name}"));
    fs::create_dir_all(&folder)?;
    let path = folder.to_string_lossy();
    hypervisor.virsh(&["pool-create-as", name, "dir", "--target", &path])?;
    Ok(folder)
}

/// The spec of an upload.
pub fn upload(node: &str, pool: &str, volume: &str, more: Value) -> Value {
    let mut spec = json!({"direction": "Upload",
        "volume": {"nodeName": node, "pool": pool, "name": volume, "size": 32 * MIB}});
    for (key, value) in more.as_object().into_iter().flatten() {
        spec["volume"][key] = value.clone();
    }
    spec
}

/// Nothing but these is in the folder, and nothing serves a file of it.
pub fn left(folder: &Path, volumes: &[&str]) -> Result<()> {
    let mut found: Vec<_> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    found.sort();
    ensure!(found == volumes, "{found:?} is in the pool, not {volumes:?}");
    let line = |entry: fs::DirEntry| fs::read(entry.path().join("cmdline")).unwrap_or_default();
    let lines = fs::read_dir("/proc")?.filter_map(Result::ok).map(line);
    let words = format!("{}/", folder.display());
    let serves =
        |line: &Vec<u8>| line.starts_with(b"qemu-nbd") && String::from_utf8_lossy(line).contains(&words);
    let serving = lines.filter(serves);
    ensure!(serving.count() == 0, "a qemu-nbd is left");
    Ok(())
}
