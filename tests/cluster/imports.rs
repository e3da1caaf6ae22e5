//! Bitmaps that are there already become checkpoints, and what goes with those.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::component::VM_NAMESPACE;
use virtmark_bed::{Disk, wait_until};

use super::bitmaps::{bitmap, listed};
use super::chain::Chain;
use super::rig::{BOUND, MIB, Rig, merge, small};

/// A VmCheckpoint as a user writes it; `more` adds to its spec.
fn import(rig: &Rig, name: &str, bitmap: &str, more: Value) -> Result<()> {
    let mut spec = json!({"vm": rig.vm.name, "vmUuid": rig.vm.uuid, "bitmap": bitmap,
        "creationTime": "2026-11-25T00:00:00Z", "disks": [{"target": "vda", "format": "qcow2"}]});
    merge(&mut spec, more);
    let object = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmCheckpoint",
        "metadata": {"name": name, "namespace": VM_NAMESPACE}, "spec": spec});
    apply(rig, &object)
}

fn apply(rig: &Rig, object: &Value) -> Result<()> {
    rig.made("vmcheckpoint", object["metadata"]["name"].as_str().context("no name")?);
    rig.bed.kubectl().run_with(&["create", "-f", "-"], &object.to_string()).map(drop)
}

fn delete(rig: &Rig, name: &str) -> Result<()> {
    rig.delete("vmcheckpoint", name)
}

fn strict(from: &str) -> Value {
    json!({"type": "Incremental", "onInvalidCheckpoint": "Fail", "fromCheckpoint": from})
}

#[test]
fn an_orphan_is_listed_imported_used_and_purged() -> Result<()> {
    let rig = Rig::running("adopted", [Disk::qcow2("vda", 16 * MIB)])?;
    let chain = Chain::of(&rig, "adopted");
    rig.vm.write("vda", 0, MIB, 0x11)?;
    let lost = chain.take("adopted-1", json!({}), || Ok(()))?;
    let name = bitmap(&rig, lost.checkpoint())?;
    rig.vm.destroy()?;
    rig.vm.start()?;
    rig.published("Running")?;
    // as a lost etcd does it: the objects are gone, and nobody cleaned up
    let mut kept = rig.get("vmcheckpoint", lost.checkpoint())?;
    rig.delete("vmbackup", "adopted-1")?;
    let free = json!({"metadata": {"finalizers": null}}).to_string();
    rig.kubectl(&["patch", "vmcheckpoint", lost.checkpoint(), "--type=merge", "-p", &free])?;
    delete(&rig, lost.checkpoint())?;
    wait_until(BOUND, "the orphan to be listed", || {
        let found = listed(&rig, &name)?;
        let is_orphan = found["owner"] == "Virtmark" && found["vmCheckpoint"].is_null();
        Ok((is_orphan && found["disks"] == json!(["vda"])).then_some(()))
    })?;
    assert_eq!(rig.bitmaps("vda")?, [name.as_str()], "nobody deletes an orphan");

    // what a user saved of it is applied again, while a backup runs: it waits for that
    rig.backup("adopted-2", json!({"transfers": "Manual"}))?;
    rig.phase("vmbackup", "adopted-2", "Ready")?;
    let saved = json!({"apiVersion": kept["apiVersion"], "kind": kept["kind"], "spec": kept["spec"].take(),
        "metadata": {"name": lost.checkpoint(), "namespace": VM_NAMESPACE, "labels": kept["metadata"]["labels"]}});
    apply(&rig, &saved)?;
    rig.reason("vmcheckpoint", lost.checkpoint(), "Importing")?;
    rig.state("vmbackup", "adopted-2", "Cancelled")?;
    let message = rig.reason("vmcheckpoint", lost.checkpoint(), "Imported")?;
    ensure!(message.contains("whole on every disk"), "{message}");
    rig.told(lost.checkpoint(), "Imported")?;
    // it is a base like any other
    rig.vm.write("vda", 2 * MIB, MIB, 0x22)?;
    let next = chain.take("adopted-3", strict(lost.checkpoint()), || Ok(()))?;
    assert_eq!((next.mode("vda").as_str(), next.restored["vda"].mostly_read()), ("Incremental", MIB));
    let shown = rig.get("vmcheckpoint", next.checkpoint())?;
    assert_eq!(shown["status"]["parent"], lost.checkpoint(), "and a link of the chain");

    // to purge an orphan is to import it, and to delete that
    rig.vm.destroy()?;
    rig.published("Off")?;
    delete(&rig, lost.checkpoint())?;
    assert_eq!(rig.bitmaps("vda")?, [bitmap(&rig, next.checkpoint())?]);
    wait_until(BOUND, "it to be listed no more", || Ok(listed(&rig, &name)?.is_null().then_some(())))
}

#[test]
fn another_products_bitmap_is_a_base_and_stays_its_own() -> Result<()> {
    let rig = Rig::running("foreign", [Disk::qcow2("vda", 16 * MIB)])?;
    let node = rig.vm.hypervisor();
    let chain = Chain::of(&rig, "foreign");
    rig.vm.write("vda", 0, MIB, 0x11)?;
    // as virtnbdbackup has it: libvirt goes on knowing it
    fs::copy(rig.vm.mirror("vda"), rig.files.path().join("foreign-vda.raw"))?;
    node.virsh(&["checkpoint-create-as", "foreign", "virtnbdbackup.0", "--diskspec", "vda"])?;
    let resumed = ["suspend", "resume"].map(|verb| node.virsh(&[verb, "foreign"]));
    resumed.into_iter().collect::<Result<Vec<_>>>()?;
    wait_until(BOUND, "it to be listed", || {
        let found = listed(&rig, "virtnbdbackup.0")?;
        Ok((found["owner"] == "Foreign" && found["vmCheckpoint"].is_null()).then_some(()))
    })?;
    import(&rig, "foreign-0", "virtnbdbackup.0", json!({}))?;
    rig.reason("vmcheckpoint", "foreign-0", "Imported")?;
    wait_until(BOUND, "it to be listed under its name", || {
        Ok((listed(&rig, "virtnbdbackup.0")?["vmCheckpoint"] == "foreign-0").then_some(()))
    })?;
    rig.vm.write("vda", 4 * MIB, MIB, 0x22)?;
    rig.backup("foreign-1", strict("foreign-0"))?;
    let point = chain.go_on("foreign-1", || Ok(()))?;
    assert_eq!((point.mode("vda").as_str(), point.restored["vda"].mostly_read()), ("Incremental", MIB));

    delete(&rig, "foreign-0")?;
    rig.told("foreign-0", "BitmapKept")?;
    let whole = |name: &str| -> Result<bool> {
        let said = node.virsh(&["checkpoint-dumpxml", "foreign", name, "--size", "--no-domain"])?;
        Ok(said.contains("size='1048576'"))
    };
    ensure!(whole("virtnbdbackup.0")?, "libvirt's note of it, and its bitmap, are as they were");
    node.virsh(&["checkpoint-delete", "foreign", "virtnbdbackup.0", "--metadata"])?;

    // without a note of libvirt's, and of another cluster's Virtmark
    let theirs = "virtmark-ffffffff-00000000-0000-4000-8000-000000000001";
    fs::copy(rig.vm.mirror("vda"), rig.files.path().join("foreign-vda.raw"))?;
    node.virsh(&["checkpoint-create-as", "foreign", theirs, "--diskspec", "vda"])?;
    node.virsh(&["checkpoint-delete", "foreign", theirs, "--metadata"])?;
    import(&rig, "foreign-2", theirs, json!({}))?;
    rig.reason("vmcheckpoint", "foreign-2", "Imported")?;
    rig.vm.write("vda", 8 * MIB, MIB, 0x33)?;
    let point = chain.take("foreign-3", strict("foreign-2"), || Ok(()))?;
    assert_eq!((point.mode("vda").as_str(), point.restored["vda"].mostly_read()), ("Incremental", MIB));
    rig.vm.destroy()?;
    rig.published("Off")?;
    delete(&rig, "foreign-2")?;
    rig.told("foreign-2", "BitmapKept")?;
    let left = rig.all_bitmaps("vda")?;
    ensure!(left.contains(&theirs.to_owned()) && left.contains(&"virtnbdbackup.0".to_owned()), "{left:?}");
    wait_until(BOUND, "it to be listed as theirs", || {
        let found = listed(&rig, theirs)?;
        Ok((found["owner"] == "Foreign" && found["vmCheckpoint"].is_null()).then_some(()))
    })
}

#[test]
fn what_cannot_be_imported_says_why_and_takes_no_bitmap_with_it() -> Result<()> {
    let rig = Rig::running("denied", small())?;
    let chain = Chain::of(&rig, "denied");
    let point = chain.take("denied-1", json!({}), || Ok(()))?;
    let name = bitmap(&rig, point.checkpoint())?;
    let refused = |object: &str, bitmap: &str, more: Value, reason: &str, words: &str| -> Result<()> {
        import(&rig, object, bitmap, more)?;
        let message = rig.reason("vmcheckpoint", object, reason)?;
        ensure!(message.contains(words), "{message}");
        rig.told(object, reason)?;
        let conditions = rig.get("vmcheckpoint", object)?["status"]["conditions"].clone();
        let conditions = conditions.as_array().cloned().unwrap_or_default();
        ensure!(
            conditions.iter().any(|one| one["type"] == "Usable" && one["status"] == "False"),
            "{conditions:?}"
        );
        delete(&rig, object)
    };
    let other = json!({"vmUuid": "00000000-0000-4000-8000-000000000001"});
    refused("denied-uuid", &name, other, "CheckpointOfOtherVm", &rig.vm.uuid)?;
    refused("denied-vm", &name, json!({"vm": "nobody"}), "VmNotFound", "no LibvirtDomain nobody")?;
    refused("denied-twin", &name, json!({}), "BitmapTaken", point.checkpoint())?;
    let disks =
        json!({"disks": [{"target": "vda", "format": "qcow2"}, {"target": "vdz", "format": "qcow2"}]});
    refused("denied-disk", "another", disks, "DiskNotFound", "vdz")?;
    let serial = json!({"disks": [{"target": "vda", "format": "qcow2", "serial": "s"}]});
    refused("denied-serial", "another", serial, "DiskNotFound", "without a serial, not qcow2 with serial s")?;
    refused("denied-nothing", "another", json!({}), "CheckpointInvalid", "vda: libvirt says")?;
    rig.told("denied-twin", "BitmapKept")?;
    assert_eq!(rig.bitmaps("vda")?, [name], "what was refused took nothing with it");
    let point = chain.take("denied-2", strict(point.checkpoint()), || Ok(()))?;
    assert_eq!(point.mode("vda"), "Incremental");
    Ok(())
}
