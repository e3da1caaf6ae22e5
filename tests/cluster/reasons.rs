//! Reasons that the other tests do not meet on their way, each produced by what produces it in the field.

use std::collections::BTreeSet;

use anyhow::Result;
use serde_json::json;
use virtmark_bed::{Disk, Plan, wait_until};

use super::rig::{BOUND, MIB, Rig, small};

#[test]
fn a_block_job_is_waited_for() -> Result<()> {
    let rig = Rig::running("locked", small())?;
    rig.vm.write("vda", 0, 32 * MIB, 0x11)?;
    let node = rig.vm.hypervisor();
    let copy = rig.vm.image("copy").to_string_lossy().into_owned();
    let slowly = ["blockcopy", "locked", "vda", "--dest", &copy, "--transient-job", "--bandwidth", "1"];
    node.virsh(&slowly)?;
    rig.backup("locked-1", json!({}))?;
    let message = rig.reason("vmbackup", "locked-1", "DisksLocked")?;
    assert!(message.contains("disk vda") && message.contains("wait until the block job ends"), "{message}");
    node.virsh(&["blockjob", "locked", "vda", "--abort"])?;
    rig.phase("vmbackup", "locked-1", "Ready").map(drop)
}

#[test]
fn a_vm_that_stands_still_by_an_error_is_waited_for() -> Result<()> {
    let rig = Rig::running("busy", small())?;
    let node = rig.vm.hypervisor();
    // QEMU stops by itself, and not because libvirt's user wanted it
    node.virsh(&["qemu-monitor-command", "busy", "--hmp", "stop"])?;
    rig.published("Busy")?;
    rig.backup("busy-1", json!({}))?;
    let message = rig.reason("vmbackup", "busy-1", "VmBusy")?;
    assert!(message.contains("wait until the VM runs"), "{message}");
    node.virsh(&["qemu-monitor-command", "busy", "--hmp", "cont"])?;
    rig.phase("vmbackup", "busy-1", "Ready").map(drop)
}

#[test]
fn a_job_that_somebody_else_ends_ends_the_backup() -> Result<()> {
    let rig = Rig::running("meddled", small())?;
    rig.backup("meddled-1", json!({}))?;
    rig.phase("vmbackup", "meddled-1", "Ready")?;
    rig.reason("vmbackup", "meddled-1", "AwaitingFinalize")?;
    rig.vm.hypervisor().virsh(&["domjobabort", "meddled"])?;
    rig.phase("vmbackup", "meddled-1", "Failed")?;
    let message = rig.reason("vmbackup", "meddled-1", "HypervisorError")?;
    assert!(message.contains("nobody asked Virtmark"), "{message}");
    rig.reason("imagetransfer", "meddled-1-vda", "TransferFailed")?;
    rig.host_is_clean()?;
    assert!(rig.bitmaps("vda")?.is_empty());
    Ok(())
}

#[test]
fn what_waits_for_a_backup_says_so() -> Result<()> {
    let rig = Rig::running("awaited", small())?;
    rig.backup("awaited-1", json!({}))?;
    rig.phase("vmbackup", "awaited-1", "Ready")?;
    rig.reason("imagetransfer", "awaited-1-vda", "TicketReady")?;
    rig.state("vmbackup", "awaited-1", "Finalized")?;
    rig.phase("vmbackup", "awaited-1", "Succeeded")?;
    let checkpoint = rig.checkpoint_of("awaited-1")?;
    rig.reason("vmcheckpoint", &checkpoint, "BackupSucceeded")?;

    rig.backup("awaited-2", json!({"transfers": "Manual"}))?;
    rig.phase("vmbackup", "awaited-2", "Ready")?;
    rig.backup("awaited-3", json!({}))?;
    rig.reason("vmbackup", "awaited-3", "BackupAlreadyRunning")?;
    rig.transfer("awaited-t", &json!({"backup": "awaited-3", "disk": "vda"}))?;
    rig.reason("imagetransfer", "awaited-t", "BackupNotReady")?;

    rig.kubectl(&["delete", "vmcheckpoint", &checkpoint, "--wait=false"])?;
    let message = rig.reason("vmcheckpoint", &checkpoint, "CheckpointBusy")?;
    assert!(message.contains("awaited-2"), "{message}");
    rig.kubectl(&["delete", "vmbackup", "awaited-3", "awaited-2", "--timeout=60s"])?;
    rig.told("awaited-2", "Deleted")?;
    rig.gone("vmcheckpoint", &checkpoint)?;
    assert!(rig.bitmaps("vda")?.is_empty());
    Ok(())
}

#[test]
fn a_vm_that_takes_a_name_over_takes_no_checkpoint_over() -> Result<()> {
    let rig = Rig::running("replaced", small())?;
    rig.backup("replaced-1", json!({}))?;
    rig.phase("vmbackup", "replaced-1", "Ready")?;
    rig.state("vmbackup", "replaced-1", "Finalized")?;
    rig.phase("vmbackup", "replaced-1", "Succeeded")?;
    let checkpoint = rig.checkpoint_of("replaced-1")?;
    rig.reason("vmcheckpoint", &checkpoint, "BackupSucceeded")?;
    drop(rig);
    let rig = Rig::running("replaced", [Disk::qcow2("vda", MIB)])?;
    let message = rig.reason("vmcheckpoint", &checkpoint, "VmReplaced")?;
    assert!(message.contains("starts a new chain"), "{message}");
    rig.backup("replaced-2", json!({}))?;
    rig.phase("vmbackup", "replaced-2", "Ready")?;
    rig.delete("vmcheckpoint", &checkpoint)
}

#[test]
fn two_vms_of_one_name_are_told_apart() -> Result<()> {
    let rig = Rig::off("twin", small())?;
    // another name for libvirt, the same for Kubernetes
    let other = Plan::new("TWIN").disk(Disk::qcow2("vda", MIB)).define(rig.vm.hypervisor())?;
    let name = format!("twin-{}", &other.uuid[..8]);
    wait_until(BOUND, "the other to be published", || {
        Ok((rig.get("lvd", &name)?["spec"]["uuid"] == other.uuid).then_some(()))
    })?;
    rig.told(&name, "NameTaken")?;
    let uuids = [rig.get("lvd", "twin")?, rig.get("lvd", &name)?];
    let uuids: BTreeSet<_> = uuids.iter().filter_map(|lvd| lvd["spec"]["uuid"].as_str()).collect();
    assert_eq!(uuids.len(), 2);
    Ok(())
}
