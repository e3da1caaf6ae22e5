//! What is known of bitmaps before the next backup: how much changed, which are broken, whose they are.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::{Disk, wait_until};

use super::chain::Chain;
use super::incremental::remove_bitmap;
use super::rig::{BOUND, MIB, Rig};

/// What a checkpoint says of a disk.
fn disk(rig: &Rig, checkpoint: &str, target: &str) -> Result<Value> {
    let status = rig.get("vmcheckpoint", checkpoint)?["status"].clone();
    let disks = status["disks"].as_array().cloned().unwrap_or_default();
    Ok(disks.into_iter().find(|disk| disk["target"] == target).unwrap_or_default())
}

/// Waits until a checkpoint says something of a disk.
fn says(rig: &Rig, checkpoint: &str, target: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    wait_until(BOUND, &format!("{checkpoint} to say it of {target}"), || {
        last = disk(rig, checkpoint, target)?;
        Ok(holds(&last).then(|| last.clone()))
    })
    .with_context(|| format!("it says {last}"))
}

/// The condition Usable, and its reason.
fn usable(rig: &Rig, checkpoint: &str) -> Result<(String, String)> {
    let conditions = rig.get("vmcheckpoint", checkpoint)?["status"]["conditions"].clone();
    let conditions = conditions.as_array().cloned().unwrap_or_default();
    let usable = conditions.iter().find(|one| one["type"] == "Usable").cloned().unwrap_or_default();
    let text = |key: &str| usable[key].as_str().unwrap_or_default().to_owned();
    Ok((text("status"), text("reason")))
}

/// What the LibvirtDomain lists under the name of a bitmap, or null.
pub fn listed(rig: &Rig, bitmap: &str) -> Result<Value> {
    let listed = rig.get("lvd", &rig.vm.name)?["status"]["checkpoints"].clone();
    let listed = listed.as_array().cloned().unwrap_or_default();
    Ok(listed.into_iter().find(|one| one["name"] == bitmap).unwrap_or_default())
}

/// The name of a checkpoint's bitmap.
pub fn bitmap(rig: &Rig, checkpoint: &str) -> Result<String> {
    let checkpoint = rig.get("vmcheckpoint", checkpoint)?;
    Ok(checkpoint["spec"]["bitmap"].as_str().context("no bitmap")?.to_owned())
}

#[test]
fn what_changed_is_counted_and_what_broke_is_seen_before_the_next_backup() -> Result<()> {
    let disks = ["vda", "vdb"].map(|target| Disk::qcow2(target, 16 * MIB));
    let rig = Rig::running("counted", disks)?;
    let chain = Chain::of(&rig, "counted");
    rig.vm.write("vda", 0, MIB, 0x11)?;
    let first = chain.take("counted-1", json!({}), || Ok(()))?;
    rig.vm.write("vda", 4 * MIB, 2 * MIB, 0x22)?;
    rig.vm.write("vdb", 0, 65536, 0x22)?;
    let changed = says(&rig, first.checkpoint(), "vda", |disk| disk["dirtyBytes"] == 2 * MIB)?;
    assert_eq!((&changed["granularity"], &changed["consistent"]), (&json!(65536), &json!(true)));
    says(&rig, first.checkpoint(), "vdb", |disk| disk["dirtyBytes"] == 65536)?;
    let table = rig.kubectl(&["get", "vmcp", first.checkpoint()])?;
    ensure!(table.contains("DIRTY") && table.contains("2.1Mi"), "{table}");
    let second = chain.take("counted-2", json!({"type": "Incremental"}), || Ok(()))?;
    says(&rig, second.checkpoint(), "vda", |disk| disk["dirtyBytes"] == 0)?;
    let names = [bitmap(&rig, first.checkpoint())?, bitmap(&rig, second.checkpoint())?];
    wait_until(BOUND, "both to be listed", || {
        let found = [listed(&rig, &names[0])?, listed(&rig, &names[1])?];
        let is = |at: usize, point: &str| {
            found[at]["vmCheckpoint"] == point
                && found[at]["owner"] == "Virtmark"
                && found[at]["disks"] == json!(["vda", "vdb"])
        };
        Ok((is(0, first.checkpoint()) && is(1, second.checkpoint())).then_some(()))
    })?;

    // one bitmap goes behind our back: that disk of that checkpoint says so, in libvirt's words
    remove_bitmap(&rig, "vdb", &names[0])?;
    let words = says(&rig, first.checkpoint(), "vdb", |disk| disk["consistent"] == false)?;
    ensure!(words["message"].as_str().is_some_and(|words| words.contains("libvirt says")), "{words}");
    assert_eq!(disk(&rig, first.checkpoint(), "vda")?["consistent"], true);
    assert_eq!(usable(&rig, first.checkpoint())?, ("True".to_owned(), "BackupSucceeded".to_owned()));
    // a paused VM is looked at like one that runs
    rig.vm.hypervisor().virsh(&["suspend", "counted"])?;
    rig.published("Paused")?;
    remove_bitmap(&rig, "vda", &names[0])?;
    let message = rig.reason("vmcheckpoint", first.checkpoint(), "CheckpointInvalid")?;
    ensure!(message.contains("vda: libvirt says"), "{message}");
    assert_eq!(usable(&rig, first.checkpoint())?.0, "False");
    wait_until(BOUND, "it to be listed no more", || Ok(listed(&rig, &names[0])?.is_null().then_some(())))?;
    rig.told(first.checkpoint(), "CheckpointInvalid")?;
    for target in ["vda", "vdb"] {
        assert_eq!(
            disk(&rig, second.checkpoint(), target)?["consistent"],
            true,
            "the other one says nothing"
        );
    }
    rig.vm.hypervisor().virsh(&["resume", "counted"])?;
    rig.published("Running")?;
    let third =
        chain.take("counted-3", json!({"type": "Incremental", "onInvalidCheckpoint": "Fail"}), || Ok(()))?;
    assert_eq!(third.base(), second.checkpoint());
    Ok(())
}

#[test]
fn bitmaps_of_a_vm_that_is_off_are_looked_at_in_its_images() -> Result<()> {
    let rig = Rig::running("lain", [Disk::qcow2("vda", 16 * MIB)])?;
    let chain = Chain::of(&rig, "lain");
    let stored = chain.take("lain-1", json!({}), || Ok(()))?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    says(&rig, stored.checkpoint(), "vda", |disk| disk["dirtyBytes"] == MIB)?;
    rig.vm.destroy()?;
    rig.published("Off")?;
    let name = bitmap(&rig, stored.checkpoint())?;
    wait_until(BOUND, "it to be listed", || {
        Ok((listed(&rig, &name)?["disks"] == json!(["vda"])).then_some(()))
    })?;
    let kept = disk(&rig, stored.checkpoint(), "vda")?;
    assert_eq!((&kept["dirtyBytes"], &kept["consistent"]), (&json!(MIB), &json!(true)));

    // the next QEMU is killed: what is in the image is known to be broken, while the VM is off
    rig.vm.start()?;
    rig.published("Running")?;
    rig.vm.kill()?;
    rig.published("Off")?;
    let message = rig.reason("vmcheckpoint", stored.checkpoint(), "CheckpointInvalid")?;
    ensure!(message.contains("vda: qemu-img says: in-use"), "{message}");
    // it is there still, for it can be removed
    assert_eq!(listed(&rig, &name)?["vmCheckpoint"], stored.checkpoint());
    rig.delete("vmcheckpoint", stored.checkpoint())?;
    assert!(rig.bitmaps("vda")?.is_empty());
    wait_until(BOUND, "it to be listed no more", || Ok(listed(&rig, &name)?.is_null().then_some(())))
}
