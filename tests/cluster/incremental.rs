//! Incremental backups: what changed since a checkpoint, put over what was read before, is what the guest had.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::{Disk, compare};

use super::restore::{Restored, restore};
use super::rig::{MIB, Rig, small};

/// Backs the VM up, restores each disk over `images`, compares with what the guest had, and finalizes. Answers the
/// backup's status, and how much was read of each disk.
fn round(
    rig: &Rig,
    name: &str,
    spec: Value,
    images: &[(&str, PathBuf)],
    meanwhile: impl Fn() -> Result<()>,
) -> Result<(Value, Vec<Restored>)> {
    rig.backup(name, spec)?;
    let status = rig.phase("vmbackup", name, "Ready")?;
    let then = images.iter().map(|(disk, _)| rig.vm.remember(disk)).collect::<Result<Vec<_>>>()?;
    meanwhile()?;
    let mut read = Vec::new();
    for ((disk, image), then) in images.iter().zip(&then) {
        let of_disk = status["disks"].as_array().into_iter().flatten().find(|seen| seen["name"] == *disk);
        let incremental = of_disk.context("not in the backup")?["mode"] == "Incremental";
        read.push(restore(&rig.ticket(&format!("{name}-{disk}"))?, incremental, image)?);
        compare(then, image, "raw").with_context(|| format!("{name}: {disk}"))?;
    }
    rig.state("vmbackup", name, "Finalized")?;
    rig.phase("vmbackup", name, "Succeeded")?;
    rig.host_is_clean()?;
    Ok((rig.get("vmbackup", name)?["status"].clone(), read))
}

fn mode(status: &Value, disk: &str) -> (String, String) {
    let of_disk = status["disks"].as_array().into_iter().flatten().find(|seen| seen["name"] == disk);
    let text = |key: &str| of_disk.and_then(|seen| seen[key].as_str()).unwrap_or_default().to_owned();
    (text("mode"), text("modeReason"))
}

fn delete_checkpoints(rig: &Rig) -> Result<()> {
    let list: Value = serde_json::from_str(&rig.kubectl(&["get", "vmcheckpoints", "-o", "json"])?)?;
    for checkpoint in list["items"].as_array().into_iter().flatten() {
        if checkpoint["spec"]["vmUuid"] == rig.vm.uuid {
            let name = checkpoint["metadata"]["name"].as_str().unwrap_or_default();
            rig.kubectl(&["delete", "vmcheckpoint", name, "--timeout=30s"])?;
        }
    }
    Ok(())
}

#[test]
fn what_changed_is_read_and_every_point_is_what_the_guest_had() -> Result<()> {
    let rig = Rig::running("chain", [Disk::qcow2("vda", 128 * MIB), Disk::raw("vdb", 16 * MIB)])?;
    rig.vm.write("vda", 0, 64 * MIB, 0x11)?;
    rig.vm.write("vdb", 0, MIB, 0x12)?;
    let images = [("vda", rig.files.path().join("vda.raw")), ("vdb", rig.files.path().join("vdb.raw"))];
    for (_, image) in &images {
        File::create(image)?;
    }
    // without a base it is a full one, and says why
    let (status, _) = round(&rig, "chain-1", json!({"type": "Incremental"}), &images, || {
        rig.vm.write("vda", 8 * MIB, 4096, 0xee)
    })?;
    assert_eq!(mode(&status, "vda"), ("Full".to_owned(), "NoBase".to_owned()));
    let first = status["toCheckpoint"].as_str().context("no checkpoint")?.to_owned();

    // written, zeroed, discarded, and written over again, across the ends of clusters
    rig.vm.write("vda", 65536 - 512, 1024, 0x22)?;
    rig.vm.zero("vda", 16 * MIB, 2 * MIB)?;
    rig.vm.zero("vda", 40 * MIB - 512, 4096)?;
    rig.vm.write("vda", 41 * MIB, MIB, 0x33)?;
    rig.vm.write("vdb", 4096, 512, 0x34)?;
    let (status, read) = round(&rig, "chain-2", json!({"type": "Incremental"}), &images, || {
        rig.vm.write("vda", 0, 4 * MIB, 0xee)
    })?;
    assert_eq!(mode(&status, "vda"), ("Incremental".to_owned(), String::new()));
    assert_eq!(mode(&status, "vdb"), ("Full".to_owned(), "CannotKeepBitmap".to_owned()));
    assert_eq!(status["fromCheckpoint"], first.as_str());
    ensure!(read[0].read <= 2 * MIB && read[0].zeroed >= 2 * MIB, "{:?} of what changed", read[0]);

    // over a power cycle, from the middle of the chain: from the first again, which was put over the second's image
    rig.vm.hypervisor().virsh(&["shutdown", "chain", "--mode", "acpi"])?;
    rig.vm.destroy()?;
    rig.vm.start()?;
    rig.published("Running")?;
    rig.vm.write("vda", 100 * MIB, MIB, 0x44)?;
    let spec = json!({"type": "Incremental", "fromCheckpoint": first});
    let (status, _) = round(&rig, "chain-3", spec, &images, || Ok(()))?;
    assert_eq!(mode(&status, "vda").0, "Incremental");
    assert_eq!(status["fromCheckpoint"], first.as_str());

    // without the middle one
    let middle =
        rig.get("vmbackup", "chain-2")?["status"]["toCheckpoint"].as_str().context("none")?.to_owned();
    rig.kubectl(&["delete", "vmcheckpoint", &middle, "--timeout=30s"])?;
    rig.vm.write("vda", 101 * MIB, MIB, 0x55)?;
    let (status, _) = round(&rig, "chain-4", json!({"type": "Incremental"}), &images, || Ok(()))?;
    let third = rig.get("vmbackup", "chain-3")?["status"]["toCheckpoint"].clone();
    assert_eq!(status["fromCheckpoint"], third, "the newest usable one");
    delete_checkpoints(&rig)?;
    assert!(rig.bitmaps("vda")?.is_empty());
    Ok(())
}

#[test]
fn what_cannot_start_from_its_base_is_full_or_fails_as_the_user_wants() -> Result<()> {
    let rig = Rig::running("based", [Disk::qcow2("vda", 16 * MIB), Disk::qcow2("vdb", 16 * MIB)])?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.vm.write("vdb", 0, MIB, 0x12)?;
    let images = [("vda", rig.files.path().join("vda.raw")), ("vdb", rig.files.path().join("vdb.raw"))];
    let fails = |name: &str, spec: Value, reason: &str| -> Result<String> {
        rig.backup(name, spec)?;
        rig.phase("vmbackup", name, "Failed")?;
        rig.reason("vmbackup", name, reason)
    };
    let strict = |more: Value| {
        let mut spec = json!({"type": "Incremental", "onInvalidCheckpoint": "Fail"});
        spec.as_object_mut()
            .into_iter()
            .for_each(|spec| spec.extend(more.as_object().cloned().unwrap_or_default()));
        spec
    };
    fails("based-1", strict(json!({})), "CheckpointNotFound")?;
    fails("based-2", json!({"type": "Incremental", "fromCheckpoint": "nothing"}), "CheckpointNotFound")?;

    // only one disk is in the first backup
    let (status, _) = round(&rig, "based-3", json!({"disks": ["vda"]}), &images[..1], || Ok(()))?;
    let base = status["toCheckpoint"].as_str().context("no checkpoint")?.to_owned();
    let message = fails("based-4", strict(json!({})), "DiskNotInCheckpoint")?;
    ensure!(message.contains("vdb"), "{message}");
    let (status, _) = round(&rig, "based-5", json!({"type": "Incremental"}), &images, || Ok(()))?;
    assert_eq!(mode(&status, "vda").0, "Incremental");
    assert_eq!(mode(&status, "vdb"), ("Full".to_owned(), "NotInCheckpoint".to_owned()));
    let whole = status["toCheckpoint"].as_str().context("no checkpoint")?.to_owned();

    // another VM's
    let other = Rig::running("based-other", small())?;
    other.backup("based-other-1", json!({"type": "Incremental", "fromCheckpoint": base}))?;
    other.phase("vmbackup", "based-other-1", "Failed")?;
    other.reason("vmbackup", "based-other-1", "CheckpointOfOtherVm")?;

    // somebody removes the bitmap of one disk behind our back: that disk, and no other, is read in full
    let bitmap = rig.get("vmcheckpoint", &whole)?["spec"]["bitmap"].as_str().context("no bitmap")?.to_owned();
    remove_bitmap(&rig, "vdb", &bitmap)?;
    rig.vm.write("vda", 2 * MIB, MIB, 0x21)?;
    rig.vm.write("vdb", 2 * MIB, MIB, 0x22)?;
    let message = fails("based-6", strict(json!({})), "RedefineFailed")?;
    ensure!(message.contains("vdb"), "{message}");
    let (status, _) = round(&rig, "based-7", json!({"type": "Incremental"}), &images, || Ok(()))?;
    assert_eq!(mode(&status, "vda").0, "Incremental");
    assert_eq!(mode(&status, "vdb"), ("Full".to_owned(), "BitmapInvalid".to_owned()));
    let seen = rig.get("vmcheckpoint", &whole)?["status"]["disks"].clone();
    ensure!(seen[0]["target"] == "vdb" && seen[0]["consistent"] == false, "{seen}");

    // and of the other disk too: no incremental starts there any more
    remove_bitmap(&rig, "vda", &bitmap)?;
    let spec = json!({"type": "Incremental", "fromCheckpoint": whole});
    let (status, _) = round(&rig, "based-8", spec.clone(), &images, || Ok(()))?;
    assert_eq!(mode(&status, "vda"), ("Full".to_owned(), "BitmapInvalid".to_owned()));
    rig.reason("vmcheckpoint", &whole, "CheckpointInvalid")?;
    fails("based-9", strict(json!({"fromCheckpoint": whole})), "CheckpointInvalid")?;
    delete_checkpoints(&rig)?;
    assert!(rig.bitmaps("vda")?.is_empty() && rig.bitmaps("vdb")?.is_empty());
    Ok(())
}

/// Removes a bitmap of a running VM through QEMU itself.
fn remove_bitmap(rig: &Rig, target: &str, bitmap: &str) -> Result<()> {
    let node = rig.vm.hypervisor();
    let said =
        node.virsh(&["qemu-monitor-command", &rig.vm.name, r#"{"execute":"query-named-block-nodes"}"#])?;
    let said: Value = serde_json::from_str(&said)?;
    let file = rig.vm.image(target).to_string_lossy().into_owned();
    let nodes = said["return"].as_array().cloned().unwrap_or_default();
    let holds = |node: &&Value| node["drv"] == "qcow2" && node["file"] == file.as_str();
    let name =
        nodes.iter().find(holds).and_then(|node| node["node-name"].as_str()).context("no such node")?;
    let arguments = json!({"node": name, "name": bitmap});
    let command = json!({"execute": "block-dirty-bitmap-remove", "arguments": arguments}).to_string();
    node.virsh(&["qemu-monitor-command", &rig.vm.name, &command]).map(drop)
}
