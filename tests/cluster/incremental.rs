//! Incremental backups: what changed since a checkpoint, put over what was read before, is what the guest had.

use std::fs::File;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::{Disk, wait_until};

use super::chain::Chain;
use super::rig::{BOUND, MIB, Rig, merge, small};

fn incremental(more: Value) -> Value {
    let mut spec = json!({"type": "Incremental"});
    merge(&mut spec, more);
    spec
}

/// An incremental that will not put up with a full disk.
fn strict(more: Value) -> Value {
    let mut spec = incremental(json!({"onInvalidCheckpoint": "Fail"}));
    merge(&mut spec, more);
    spec
}

/// A backup that ends at once; answers the message of its reason.
fn fails(rig: &Rig, name: &str, spec: Value, reason: &str) -> Result<String> {
    rig.backup(name, spec)?;
    rig.phase("vmbackup", name, "Failed")?;
    let message = rig.reason("vmbackup", name, reason)?;
    rig.host_is_clean()?;
    Ok(message)
}

/// The names of the disks of a checkpoint whose bitmap is known to be broken, and what is said of them.
fn broken(rig: &Rig, checkpoint: &str) -> Result<Vec<(String, String)>> {
    let status = rig.get("vmcheckpoint", checkpoint)?["status"].clone();
    let disks = status["disks"].as_array().cloned().unwrap_or_default();
    let text = |disk: &Value, key: &str| disk[key].as_str().unwrap_or_default().to_owned();
    let broken = disks.iter().filter(|disk| disk["consistent"] == false);
    Ok(broken.map(|disk| (text(disk, "target"), text(disk, "message"))).collect())
}

fn bitmap(rig: &Rig, checkpoint: &str) -> Result<String> {
    let checkpoint = rig.get("vmcheckpoint", checkpoint)?;
    Ok(checkpoint["spec"]["bitmap"].as_str().context("no bitmap")?.to_owned())
}

/// Whether the checkpoint says Usable, and why.
fn usable(rig: &Rig, checkpoint: &str) -> Result<(bool, String)> {
    let status = rig.get("vmcheckpoint", checkpoint)?["status"].clone();
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    let usable = conditions.iter().find(|condition| condition["type"] == "Usable").context("not judged")?;
    Ok((usable["status"] == "True", usable["reason"].as_str().unwrap_or_default().to_owned()))
}

fn delete_checkpoint(rig: &Rig, name: &str) -> Result<()> {
    rig.delete("vmcheckpoint", name)
}

#[test]
fn what_changed_is_read_and_every_point_is_what_the_guest_had() -> Result<()> {
    let rig = Rig::running("chain", [Disk::qcow2("vda", 128 * MIB), Disk::raw("vdb", 16 * MIB)])?;
    let chain = Chain::of(&rig, "chain");
    rig.vm.write("vda", 0, 64 * MIB, 0x11)?;
    rig.vm.write("vdb", 0, MIB, 0x12)?;
    // without a base it is a full one, and says why
    let first = chain.take("chain-1", incremental(json!({})), || rig.vm.write("vda", 8 * MIB, 4096, 0xee))?;
    assert_eq!(first.mode("vda"), "Full NoBase");
    assert_eq!(first.base(), "");

    // written, zeroed, and written over again, across the ends of clusters
    rig.vm.write("vda", 65536 - 512, 1024, 0x22)?;
    rig.vm.zero("vda", 16 * MIB, 2 * MIB)?;
    rig.vm.zero("vda", 40 * MIB - 512, 4096)?;
    rig.vm.write("vda", 41 * MIB, MIB, 0x33)?;
    rig.vm.write("vdb", 4096, 512, 0x34)?;
    let second = chain.take("chain-2", incremental(json!({})), || rig.vm.write("vda", 0, 4 * MIB, 0xee))?;
    assert_eq!(
        (second.mode("vda").as_str(), second.mode("vdb").as_str()),
        ("Incremental", "Full CannotKeepBitmap")
    );
    assert_eq!(second.base(), first.checkpoint());
    let read = second.restored["vda"];
    ensure!(read.read <= 2 * MIB && read.zeroed >= 2 * MIB, "{read:?} of 3 MiB that changed");

    // over a power cycle, and from the first one again, which is not the newest
    rig.vm.destroy()?;
    rig.vm.start()?;
    rig.published("Running")?;
    rig.vm.write("vda", 100 * MIB, MIB, 0x44)?;
    let from_first = incremental(json!({"fromCheckpoint": first.checkpoint()}));
    let third = chain.take("chain-3", from_first, || Ok(()))?;
    assert_eq!((third.mode("vda").as_str(), third.base()), ("Incremental", first.checkpoint()));
    ensure!(third.restored["vda"].read >= 6 * MIB, "what changed before and after the second one");

    // without the one in the middle
    delete_checkpoint(&rig, second.checkpoint())?;
    rig.vm.write("vda", 101 * MIB, MIB, 0x55)?;
    let fourth = chain.take("chain-4", incremental(json!({})), || Ok(()))?;
    assert_eq!(fourth.base(), third.checkpoint(), "the newest usable one");
    assert_eq!(fourth.restored["vda"].mostly_read(), MIB);
    for point in [&first, &third, &fourth] {
        delete_checkpoint(&rig, point.checkpoint())?;
    }
    assert!(rig.bitmaps("vda")?.is_empty());
    Ok(())
}

#[test]
fn disks_of_one_backup_are_read_each_in_its_own_way() -> Result<()> {
    let disks = ["vda", "vdb", "vdd", "vde"].map(|target| Disk::qcow2(target, 8 * MIB));
    let replaced = Disk::qcow2("vdg", 8 * MIB).with("<serial>before</serial>");
    let rig = Rig::running("mixed", disks.into_iter().chain([Disk::raw("vdc", 8 * MIB), replaced]))?;
    let node = rig.vm.hypervisor();
    let chain = Chain::of(&rig, "mixed");
    let all = ["vda", "vdb", "vdc", "vdd", "vde", "vdg"];
    for disk in all {
        rig.vm.write(disk, 0, MIB, 0x11)?;
    }
    let without_e = json!({"disks": ["vda", "vdb", "vdc", "vdd", "vdg"]});
    let full = chain.take("mixed-1", without_e, || Ok(()))?;

    // another serial: another disk
    rig.vm.destroy()?;
    let xml = node.virsh(&["dumpxml", "--inactive", "mixed"])?.replace("<serial>before<", "<serial>after<");
    let file = rig.files.path().join("domain.xml");
    std::fs::write(&file, xml)?;
    node.virsh(&["define", &file.to_string_lossy()])?;
    rig.vm.start()?;
    rig.published("Running")?;
    // a larger one
    node.virsh(&["blockresize", "mixed", "vdb", "12M"])?;
    File::options().write(true).open(rig.vm.mirror("vdb"))?.set_len(12 * MIB)?;
    // a broken one
    remove_bitmap(&rig, "vdd", &bitmap(&rig, full.checkpoint())?)?;
    // a new one
    plug(&rig, "vdf")?;
    for disk in all.into_iter().chain(["vdf"]) {
        rig.vm.write(disk, 2 * MIB, MIB, 0x22)?;
    }
    rig.vm.write("vdb", 9 * MIB, MIB, 0x23)?;
    wait_until(BOUND, "the inventory to show it", || {
        let disks = rig.get("lvd", "mixed")?["status"]["disks"].as_array().cloned().unwrap_or_default();
        let size = |name: &str| disks.iter().find(|disk| disk["target"] == name)?["size"].as_u64();
        Ok((size("vdb") == Some(12 * MIB) && size("vdf").is_some()).then_some(()))
    })?;

    let mixed = chain.take("mixed-2", incremental(json!({})), || Ok(()))?;
    let expected = [
        ("vda", "Incremental"),
        ("vdb", "Full SizeChanged"),
        ("vdc", "Full CannotKeepBitmap"),
        ("vdd", "Full BitmapInvalid"),
        ("vde", "Full NotInCheckpoint"),
        ("vdf", "Full NotInCheckpoint"),
        ("vdg", "Full DiskReplaced"),
    ];
    assert_eq!(
        expected.map(|(disk, _)| (disk, mixed.mode(disk))),
        expected.map(|(disk, mode)| (disk, mode.to_owned()))
    );
    let words = mixed.disk("vdd")["modeMessage"].clone();
    ensure!(words.as_str().is_some_and(|words| words.contains("vdd")), "libvirt's words: {words}");
    assert_eq!(mixed.restored["vda"].mostly_read(), MIB);

    // from here on all go on, but the one that never can
    for (number, (disk, _)) in (0..).zip(expected) {
        rig.vm.write(disk, 4 * MIB, MIB, 0x30 + number)?;
    }
    let last = chain.take("mixed-3", incremental(json!({})), || Ok(()))?;
    for (disk, _) in expected {
        let mode = if disk == "vdc" { "Full CannotKeepBitmap" } else { "Incremental" };
        assert_eq!(last.mode(disk), mode, "{disk}");
    }
    Ok(())
}

#[test]
fn chains_of_two_owners_do_not_meet() -> Result<()> {
    let rig = Rig::running("owned", [Disk::qcow2("vda", 16 * MIB)])?;
    let [ours, theirs] = ["ours", "theirs"].map(|owner| Chain::of(&rig, owner));
    let take = |chain: &Chain<'_>, owner: &str, name: &str| {
        rig.backup_of(name, owner, incremental(json!({})))?;
        let point = chain.go_on(name, || Ok(()))?;
        rig.host_is_clean()?;
        Ok::<_, anyhow::Error>(point)
    };
    rig.vm.write("vda", 0, MIB, 0x11)?;
    let ours_1 = take(&ours, "ours", "owned-1")?;
    rig.vm.write("vda", MIB, MIB, 0x22)?;
    let theirs_1 = take(&theirs, "theirs", "owned-2")?;
    assert_eq!((ours_1.mode("vda").as_str(), theirs_1.mode("vda").as_str()), ("Full NoBase", "Full NoBase"));
    rig.vm.write("vda", 2 * MIB, MIB, 0x33)?;
    let ours_2 = take(&ours, "ours", "owned-3")?;
    assert_eq!((ours_2.base(), ours_2.restored["vda"].mostly_read()), (ours_1.checkpoint(), 2 * MIB));
    rig.vm.write("vda", 3 * MIB, MIB, 0x44)?;
    let theirs_2 = take(&theirs, "theirs", "owned-4")?;
    assert_eq!((theirs_2.base(), theirs_2.restored["vda"].mostly_read()), (theirs_1.checkpoint(), 2 * MIB));

    // all of one owner's go, and the other's chain goes on
    for point in [&theirs_1, &theirs_2] {
        delete_checkpoint(&rig, point.checkpoint())?;
    }
    rig.vm.write("vda", 4 * MIB, MIB, 0x55)?;
    let ours_3 = take(&ours, "ours", "owned-5")?;
    assert_eq!((ours_3.base(), ours_3.restored["vda"].mostly_read()), (ours_2.checkpoint(), 2 * MIB));
    assert_eq!(rig.bitmaps("vda")?.len(), 3, "those of the owner that has not deleted his");
    Ok(())
}

#[test]
fn what_cannot_start_from_its_base_is_full_or_fails_as_the_user_wants() -> Result<()> {
    let rig = Rig::running("based", [Disk::qcow2("vda", 16 * MIB), Disk::qcow2("vdb", 16 * MIB)])?;
    let chain = Chain::of(&rig, "based");
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.vm.write("vdb", 0, MIB, 0x12)?;
    fails(&rig, "based-1", strict(json!({})), "CheckpointNotFound")?;
    fails(&rig, "based-2", incremental(json!({"fromCheckpoint": "nothing"})), "CheckpointNotFound")?;

    // only one disk is in the first backup
    let half = chain.take("based-3", json!({"disks": ["vda"]}), || Ok(()))?;
    let message = fails(&rig, "based-4", strict(json!({})), "DiskNotInCheckpoint")?;
    ensure!(message.contains("vdb"), "{message}");
    let whole = chain.take("based-5", incremental(json!({})), || Ok(()))?;
    assert_eq!(
        (whole.mode("vda").as_str(), whole.mode("vdb").as_str()),
        ("Incremental", "Full NotInCheckpoint")
    );

    // another VM's
    let other = Rig::running("based-other", small())?;
    let theirs = incremental(json!({"fromCheckpoint": half.checkpoint()}));
    fails(&other, "based-other-1", theirs, "CheckpointOfOtherVm")?;

    // somebody removes the bitmap of one disk behind our back
    let removed = bitmap(&rig, whole.checkpoint())?;
    remove_bitmap(&rig, "vdb", &removed)?;
    rig.vm.write("vda", 2 * MIB, MIB, 0x21)?;
    rig.vm.write("vdb", 2 * MIB, MIB, 0x22)?;
    let message = fails(&rig, "based-6", strict(json!({})), "RedefineFailed")?;
    ensure!(message.contains("vdb"), "{message}");
    wait_until(BOUND, "the checkpoint to say so", || {
        let broken = broken(&rig, whole.checkpoint())?;
        let says = broken.iter().any(|(disk, words)| disk == "vdb" && words.contains("vdb"));
        Ok((says && broken.len() == 1).then_some(()))
    })?;
    // it is known now, before anything is tried
    let message = fails(&rig, "based-7", strict(json!({})), "CheckpointInvalid")?;
    ensure!(message.contains("vdb"), "{message}");
    assert_eq!(usable(&rig, whole.checkpoint())?, (true, "BackupSucceeded".to_owned()), "for the other disk");
    assert!(broken(&rig, half.checkpoint())?.is_empty(), "and no other checkpoint says a word");
    // that disk, and no other, is read in full
    let from_whole = json!({"fromCheckpoint": whole.checkpoint()});
    let point = chain.take("based-8", incremental(from_whole.clone()), || Ok(()))?;
    assert_eq!(
        (point.mode("vda").as_str(), point.mode("vdb").as_str()),
        ("Incremental", "Full BitmapInvalid")
    );
    assert_eq!(point.restored["vda"].mostly_read(), MIB);

    // and of the other disk too: no incremental starts there any more
    remove_bitmap(&rig, "vda", &removed)?;
    let point = chain.take("based-9", incremental(from_whole.clone()), || Ok(()))?;
    assert_eq!((point.mode("vda").as_str(), point.base()), ("Full BitmapInvalid", whole.checkpoint()));
    rig.reason("vmcheckpoint", whole.checkpoint(), "CheckpointInvalid")?;
    assert_eq!(usable(&rig, whole.checkpoint())?, (false, "CheckpointInvalid".to_owned()));
    fails(&rig, "based-10", strict(from_whole), "CheckpointInvalid")?;
    // nothing else was lost: the first one is as good as it was
    let from_half = strict(json!({"fromCheckpoint": half.checkpoint(), "disks": ["vda"]}));
    let point = chain.take("based-11", from_half, || Ok(()))?;
    assert_eq!(point.mode("vda"), "Incremental");
    rig.delete_made()?;
    assert!(rig.bitmaps("vda")?.is_empty());
    Ok(())
}

#[test]
fn a_qemu_that_was_killed_costs_its_bitmaps_and_no_more() -> Result<()> {
    let rig = Rig::running("felled", [Disk::qcow2("vda", 16 * MIB)])?;
    let chain = Chain::of(&rig, "felled");
    rig.vm.write("vda", 0, MIB, 0x11)?;
    let stored = chain.take("felled-1", json!({}), || Ok(()))?;
    // one whose bitmap is in the image, and one that QEMU alone knows
    rig.vm.destroy()?;
    rig.vm.start()?;
    rig.published("Running")?;
    let fresh = chain.take("felled-2", incremental(json!({})), || Ok(()))?;
    assert_eq!(fresh.mode("vda"), "Incremental");
    rig.vm.kill()?;
    rig.published("Off")?;
    rig.vm.start()?;
    rig.published("Running")?;
    rig.vm.write("vda", 2 * MIB, MIB, 0x22)?;
    for (name, base) in [("felled-3", &fresh), ("felled-4", &stored)] {
        let from = incremental(json!({"fromCheckpoint": base.checkpoint()}));
        let point = chain.take(name, from, || Ok(()))?;
        // that it is broken is found by the backup, or by the agent's look before it
        let mode = point.mode("vda");
        ensure!(["Full BitmapInvalid", "Full NoBase"].contains(&mode.as_str()), "{name} is {mode}");
        let words = broken(&rig, base.checkpoint())?;
        ensure!(words.iter().any(|(_, words)| words.contains("vda")), "libvirt's words: {words:?}");
    }
    rig.vm.write("vda", 3 * MIB, MIB, 0x33)?;
    let point = chain.take("felled-5", strict(json!({})), || Ok(()))?;
    assert_eq!((point.mode("vda").as_str(), point.restored["vda"].mostly_read()), ("Incremental", MIB));
    // what is broken can still be deleted
    rig.delete_made()?;
    assert!(rig.bitmaps("vda")?.is_empty());
    rig.vm.destroy()?;
    assert!(rig.bitmaps("vda")?.is_empty(), "in the image too");
    Ok(())
}

#[test]
fn where_no_disk_can_keep_a_bitmap_an_incremental_is_full_or_refused() -> Result<()> {
    let rig = Rig::running("bitless", [Disk::raw("vda", 8 * MIB), Disk::qcow2("vdb", 8 * MIB)])?;
    let chain = Chain::of(&rig, "bitless");
    rig.vm.write("vda", 0, MIB, 0x11)?;
    let only_raw = json!({"disks": ["vda"]});
    let message = fails(&rig, "bitless-1", strict(only_raw.clone()), "IncrementalNotSupported")?;
    ensure!(message.contains("convert a disk to qcow2"), "{message}");
    let point = chain.take("bitless-2", incremental(only_raw), || Ok(()))?;
    assert_eq!((point.mode("vda").as_str(), point.checkpoint()), ("Full CannotKeepBitmap", ""));
    // beside one that can it is no surprise
    chain.take("bitless-3", json!({}), || Ok(()))?;
    let point = chain.take("bitless-4", strict(json!({})), || Ok(()))?;
    assert_eq!(
        (point.mode("vda").as_str(), point.mode("vdb").as_str()),
        ("Full CannotKeepBitmap", "Incremental")
    );
    Ok(())
}

/// Plugs a new disk of 8 MiB into the VM that runs.
fn plug(rig: &Rig, target: &str) -> Result<()> {
    let image = rig.vm.image(target);
    let create = ["create", "-q", "-f", "qcow2", &image.to_string_lossy(), "8M"].map(str::to_owned);
    ensure!(std::process::Command::new("qemu-img").args(create).status()?.success(), "qemu-img create");
    std::fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    File::create(rig.vm.mirror(target))?.set_len(8 * MIB)?;
    let xml = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
         <target dev='{target}' bus='virtio'/><alias name='ua-{target}'/></disk>",
        image.display()
    );
    let file = rig.files.path().join(format!("{target}.xml"));
    std::fs::write(&file, xml)?;
    let attach = ["attach-device", &rig.vm.name, &file.to_string_lossy(), "--live"];
    rig.vm.hypervisor().virsh(&attach).map(drop)
}

/// Removes a bitmap of a running VM through QEMU itself.
pub fn remove_bitmap(rig: &Rig, target: &str, bitmap: &str) -> Result<()> {
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
