//! Checkpoints as a chain: what is shown of it, what is deleted from it, how many there are.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark::libvirt::xml::{PROBE, checkpoint_xml};
use virtmark_bed::{Disk, wait_until};

use super::bitmaps::{bitmap, listed};
use super::chain::{Chain, Point};
use super::rig::{BOUND, MIB, Rig, merge, small};

/// An incremental that will not put up with a full disk.
fn strict(more: Value) -> Value {
    let mut spec = json!({"type": "Incremental", "onInvalidCheckpoint": "Fail"});
    merge(&mut spec, more);
    spec
}

/// Waits until a checkpoint says where it stands.
fn stands(rig: &Rig, point: &Point, parent: &str, base: &str) -> Result<()> {
    let mut last = Value::Null;
    wait_until(BOUND, &format!("{} to stand after {parent:?}, {base:?}", point.checkpoint()), || {
        last = rig.get("vmcheckpoint", point.checkpoint())?["status"].clone();
        let text = |key: &str| last[key].as_str().unwrap_or_default();
        Ok((text("parent") == parent && text("base") == base).then_some(()))
    })
    .with_context(|| format!("its status: {last}"))
}

fn delete(rig: &Rig, point: &Point) -> Result<()> {
    rig.delete("vmcheckpoint", point.checkpoint())
}

/// The disk holds the bitmaps of these checkpoints, and no other.
fn holds(rig: &Rig, disk: &str, points: &[&Point]) -> Result<()> {
    let uid = |point: &&Point| -> Result<String> {
        let checkpoint = rig.get("vmcheckpoint", point.checkpoint())?;
        Ok(checkpoint["spec"]["bitmap"].as_str().context("no bitmap")?.to_owned())
    };
    let expected = points.iter().map(uid).collect::<Result<BTreeSet<_>>>()?;
    let found: BTreeSet<_> = rig.bitmaps(disk)?.into_iter().collect();
    ensure!(found == expected, "{disk} holds {found:?}, not {expected:?}");
    Ok(())
}

#[test]
fn the_chain_is_shown_and_closes_over_what_is_deleted_running_paused_or_off() -> Result<()> {
    let disks = ["vda", "vdb"];
    let rig = Rig::running("linked", disks.map(|target| Disk::qcow2(target, 16 * MIB)))?;
    let node = rig.vm.hypervisor();
    let chain = Chain::of(&rig, "linked");
    let take = |number: u8, spec: Value| -> Result<Point> {
        for disk in disks {
            rig.vm.write(disk, u64::from(number) * MIB, MIB / 2, number)?;
        }
        chain.take(&format!("linked-{number}"), spec, || Ok(()))
    };
    let mut points = vec![take(1, json!({}))?, take(2, strict(json!({})))?, take(3, strict(json!({})))?];
    // these are in the images now; those that come are QEMU's alone
    rig.vm.destroy()?;
    rig.vm.start()?;
    rig.published("Running")?;
    points.extend([take(4, strict(json!({})))?, take(5, strict(json!({})))?]);
    let [first, second, third, fourth, fifth] = points.as_slice() else { unreachable!() };
    stands(&rig, first, "", "Older")?;
    stands(&rig, second, first.checkpoint(), "Older")?;
    stands(&rig, third, second.checkpoint(), "Older")?;
    stands(&rig, fourth, third.checkpoint(), "Older")?;
    stands(&rig, fifth, fourth.checkpoint(), "Next")?;
    let table = rig.kubectl(&["get", "vmcp"])?;
    ensure!(
        table.lines().next().is_some_and(|line| line.contains("PARENT") && line.contains("BASE")),
        "{table}"
    );
    let row = table.lines().find(|line| line.starts_with(fifth.checkpoint())).context("not in the table")?;
    let row: Vec<_> = row.split_whitespace().collect();
    assert_eq!(row[1..6], ["linked", fourth.checkpoint(), "Next", "True", "BackupSucceeded"]);

    // one in the images while it runs; one in the images, and one that is not, while it is paused
    delete(&rig, second)?;
    stands(&rig, third, first.checkpoint(), "Older")?;
    holds(&rig, "vda", &[first, third, fourth, fifth])?;
    node.virsh(&["suspend", "linked"])?;
    rig.published("Paused")?;
    delete(&rig, third)?;
    delete(&rig, fourth)?;
    stands(&rig, fifth, first.checkpoint(), "Next")?;
    holds(&rig, "vda", &[first, fifth])?;
    node.virsh(&["resume", "linked"])?;
    rig.published("Running")?;

    // the chain goes on, from the newest and from over the hole
    let sixth = take(6, strict(json!({})))?;
    assert_eq!((sixth.base(), sixth.restored["vdb"].mostly_read()), (fifth.checkpoint(), MIB / 2));
    let seventh = take(7, strict(json!({"fromCheckpoint": first.checkpoint()})))?;
    assert_eq!((seventh.base(), seventh.restored["vdb"].mostly_read()), (first.checkpoint(), 3 * MIB));
    // without the newest, the one before it is where tonight's starts
    delete(&rig, &seventh)?;
    stands(&rig, &sixth, fifth.checkpoint(), "Next")?;
    rig.vm.destroy()?;
    rig.published("Off")?;
    for disk in disks {
        holds(&rig, disk, &[first, fifth, &sixth])?;
    }
    delete(&rig, fifth)?;
    stands(&rig, &sixth, first.checkpoint(), "Next")?;
    for disk in disks {
        holds(&rig, disk, &[first, &sixth])?;
    }
    rig.vm.start()?;
    rig.published("Running")?;
    let eighth = take(8, strict(json!({})))?;
    assert_eq!((eighth.base(), eighth.restored["vda"].mostly_read()), (sixth.checkpoint(), MIB));

    // all of a VM
    rig.vm.destroy()?;
    rig.published("Off")?;
    let of_vm = format!("virtmark.dev/vm-uuid={}", rig.vm.uuid);
    let deleted = rig.kubectl(&["delete", "vmcheckpoint", "-l", &of_vm, "--timeout=60s"])?;
    assert_eq!(deleted.lines().count(), 3, "{deleted}");
    for disk in disks {
        holds(&rig, disk, &[])?;
    }
    Ok(())
}

#[test]
fn one_of_a_vm_that_is_gone_goes_and_leaves_an_orphan() -> Result<()> {
    let rig = Rig::running("departed", [Disk::qcow2("vda", 8 * MIB)])?;
    let chain = Chain::of(&rig, "departed");
    let point = chain.take("departed-1", json!({}), || Ok(()))?;
    let name = bitmap(&rig, point.checkpoint())?;
    rig.vm.destroy()?;
    rig.vm.undefine()?;
    rig.published("Missing")?;
    delete(&rig, &point)?;
    rig.told(point.checkpoint(), "VmNotFound")?;
    // it comes back, and what was left is listed
    rig.vm.redefine()?;
    rig.published("Off")?;
    wait_until(BOUND, "the orphan to be listed", || {
        let found = listed(&rig, &name)?;
        Ok((found["owner"] == "Virtmark" && found["vmCheckpoint"].is_null()).then_some(()))
    })?;
    assert_eq!(rig.bitmaps("vda")?, [name]);
    Ok(())
}

#[test]
fn no_more_are_kept_than_the_last_backup_wants_and_none_goes_that_one_starts_from() -> Result<()> {
    let rig = Rig::running("bounded", [Disk::qcow2("vda", 8 * MIB)])?;
    let [ours, theirs] = ["bounded", "bounded-other"].map(|name| Chain::of(&rig, name));
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.backup_of("bounded-other", "other", json!({}))?;
    let others = theirs.go_on("bounded-other", || Ok(()))?;
    let take = |number: u8| {
        rig.vm.write("vda", u64::from(number) * MIB, MIB, number)?;
        let spec = json!({"type": "Incremental", "maxCheckpoints": 2});
        let name = format!("bounded-{number}");
        rig.backup(&name, spec)?;
        // libvirt is told of the one that goes, for a moment: its host is clean in the end
        ours.go_on(&name, || Ok(()))
    };
    let [first, second, third] = [take(1)?, take(2)?, take(3)?];
    rig.gone("vmcheckpoint", first.checkpoint())?;
    holds(&rig, "vda", &[&others, &second, &third])?;
    stands(&rig, &second, "", "Older")?;
    stands(&rig, &third, second.checkpoint(), "Next")?;
    rig.told("bounded-3", "TooManyCheckpoints")?;

    // one wants no other kept, while the next one waits to start from the oldest
    rig.backup("bounded-4", json!({"type": "Incremental", "maxCheckpoints": 1}))?;
    rig.phase("vmbackup", "bounded-4", "Ready")?;
    let fourth = rig.checkpoint_of("bounded-4")?;
    rig.made("vmcheckpoint", &fourth);
    rig.backup("bounded-5", strict(json!({"fromCheckpoint": second.checkpoint(), "maxCheckpoints": 2})))?;
    rig.reason("vmbackup", "bounded-5", "BackupAlreadyRunning")?;
    rig.read("bounded-4-vda", &rig.vm.remember("vda")?)?;
    rig.state("vmbackup", "bounded-4", "Finalized")?;
    let fifth = ours.go_on("bounded-5", || Ok(()))?;
    assert_eq!((fifth.base(), fifth.restored["vda"].mostly_read()), (second.checkpoint(), MIB));
    // and once nobody starts from it, it is too many
    rig.gone("vmcheckpoint", third.checkpoint())?;
    rig.gone("vmcheckpoint", second.checkpoint())?;
    stands(&rig, &fifth, &fourth, "Next")?;
    rig.host_is_clean()?;
    assert_eq!(rig.bitmaps("vda")?.len(), 3, "two of ours, and the other owner's");
    stands(&rig, &others, "", "Next")
}

#[test]
fn what_a_dead_agent_had_libvirt_know_is_forgotten_and_what_others_had_is_not() -> Result<()> {
    let rig = Rig::running("probed", small())?;
    let node = rig.vm.hypervisor();
    let point = Chain::of(&rig, "probed").take("probed-1", json!({}), || Ok(()))?;
    let bitmap = bitmap(&rig, point.checkpoint())?;
    node.virsh(&["checkpoint-create-as", "probed", "theirs", "--diskspec", "vda"])?;
    let probe = rig.files.path().join("probe.xml");
    fs::write(&probe, checkpoint_xml(&bitmap, &["vda"], Some(PROBE)))?;
    let forgotten = |state: &str| {
        wait_until(BOUND, &format!("it to be forgotten, {state}"), || {
            let known = node.virsh(&["checkpoint-list", "--name", "probed"])?;
            Ok((known.split_whitespace().collect::<Vec<_>>() == ["theirs"]).then_some(()))
        })
    };
    let left = || node.virsh(&["checkpoint-create", "probed", &probe.to_string_lossy(), "--redefine"]);
    // an agent looks when a VM's state changes
    left()?;
    node.virsh(&["suspend", "probed"])?;
    node.virsh(&["resume", "probed"])?;
    forgotten("running")?;
    left()?;
    rig.vm.destroy()?;
    forgotten("off")?;
    assert_eq!(rig.bitmaps("vda")?, [bitmap], "its bitmap stays");
    node.virsh(&["checkpoint-delete", "probed", "theirs", "--metadata"]).map(drop)
}
