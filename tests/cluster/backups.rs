//! The life of a backup: read and finalized, cancelled, deleted, or ended by its VM.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use virtmark_bed::{Disk, compare, wait_until};

use super::rig::{BOUND, MIB, Rig, small};

fn usable(rig: &Rig, backup: &str) -> Result<String> {
    let checkpoint = rig.checkpoint_of(backup)?;
    wait_until(BOUND, "a usable checkpoint", || {
        let status = rig.get("vmcheckpoint", &checkpoint)?["status"].clone();
        let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.iter().any(|c| c["type"] == "Usable" && c["status"] == "True").then_some(()))
    })?;
    Ok(checkpoint)
}

#[test]
fn what_is_read_is_what_the_guest_had_although_it_writes_on() -> Result<()> {
    let rig = Rig::running("mixed", [Disk::qcow2("vda", 256 * MIB), Disk::raw("vdb", 64 * MIB)])?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.vm.write("vda", 100 * MIB, 3 * MIB, 0x22)?;
    rig.vm.zero("vda", 101 * MIB, MIB)?;
    rig.vm.write("vdb", 64 * MIB - 512, 512, 0x33)?;
    rig.backup("mixed-1", json!({}))?;
    let status = rig.phase("vmbackup", "mixed-1", "Ready")?;
    assert_eq!(status["disks"].as_array().map(Vec::len), Some(2));
    let (vda, vdb) = (rig.vm.remember("vda")?, rig.vm.remember("vdb")?);
    rig.vm.write("vda", 50 * MIB, 60 * MIB, 0xee)?;
    rig.vm.write("vdb", 0, 64 * MIB, 0xee)?;
    rig.read("mixed-1-vda", &vda)?;
    rig.read("mixed-1-vdb", &vdb)?;
    let secret = rig.ticket("mixed-1-vda")?.secret;
    rig.state("vmbackup", "mixed-1", "Finalized")?;
    rig.phase("vmbackup", "mixed-1", "Succeeded")?;
    for transfer in ["mixed-1-vda", "mixed-1-vdb"] {
        rig.phase("imagetransfer", transfer, "Succeeded")?;
    }
    rig.host_is_clean()?;
    rig.gone("secret", &secret)?;
    let checkpoint = usable(&rig, "mixed-1")?;
    let spec = rig.get("vmcheckpoint", &checkpoint)?["spec"].clone();
    assert_eq!(rig.bitmaps("vda")?, [spec["bitmap"].as_str().unwrap_or_default()]);
    assert_eq!(spec["disks"].as_array().map(Vec::len), Some(1), "the raw disk has no bitmap");
    assert_eq!(rig.get("lvd", "mixed")?["status"]["lastBackup"], "mixed-1");
    rig.delete("vmcheckpoint", &checkpoint)?;
    assert!(rig.bitmaps("vda")?.is_empty(), "deleting the checkpoint removes its bitmap");
    Ok(())
}

#[test]
fn the_integrators_example_does_the_whole_round() -> Result<()> {
    let rig = Rig::running("example", [Disk::qcow2("vda", 128 * MIB), Disk::raw("vdb", 32 * MIB)])?;
    rig.vm.write("vda", 7 * MIB, 9 * MIB, 0x5a)?;
    rig.vm.write("vdb", 0, 4096, 0xa5)?;
    let python =
        std::env::var_os("VIRTMARK_PYTHON").context("VIRTMARK_PYTHON is not set: run `make test`")?;
    let examples = "examples/backup.py";
    let output = Command::new(python)
        .args([examples, "--namespace", "vms", "example"])
        .arg(rig.files.path())
        .env("KUBECONFIG", &rig.bed.plane.kubeconfig)
        .output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for disk in ["vda", "vdb"] {
        compare(&rig.vm.mirror(disk), &rig.files.path().join(format!("{disk}.qcow2")), "qcow2")?;
    }
    rig.host_is_clean()
}

#[test]
fn raw_disks_alone_make_no_checkpoint() -> Result<()> {
    let rig = Rig::running("rawonly", [Disk::raw("vda", 16 * MIB)])?;
    rig.vm.write("vda", 0, MIB, 0x42)?;
    rig.backup("rawonly-1", json!({}))?;
    let status = rig.phase("vmbackup", "rawonly-1", "Ready")?;
    assert!(status["toCheckpoint"].is_null());
    rig.read("rawonly-1-vda", &rig.vm.remember("vda")?)?;
    rig.state("vmbackup", "rawonly-1", "Finalized")?;
    rig.phase("vmbackup", "rawonly-1", "Succeeded")?;
    rig.host_is_clean()
}

#[test]
fn finalize_is_not_obeyed_while_bytes_are_unread() -> Result<()> {
    let rig = Rig::running("early", small())?;
    rig.vm.write("vda", 0, 4 * MIB, 0x11)?;
    rig.backup("early-1", json!({}))?;
    rig.phase("vmbackup", "early-1", "Ready")?;
    let ticket = rig.ticket("early-1-vda")?;
    assert_eq!(ticket.curl(&["-H", "Range: bytes=0-1048575"])?, "206");
    rig.state("vmbackup", "early-1", "Finalized")?;
    let message = rig.reason("vmbackup", "early-1", "TransfersIncomplete")?;
    assert!(message.contains("vda: 3145728 bytes"), "{message}");
    assert_eq!(rig.get("vmbackup", "early-1")?["status"]["phase"], "Ready");
    rig.told("early-1", "TransfersIncomplete")?;
    assert_eq!(ticket.curl(&["-H", "Range: bytes=1048576-4194303"])?, "206");
    rig.phase("vmbackup", "early-1", "Succeeded")?;
    rig.host_is_clean()
}

#[test]
fn a_finalize_waits_for_who_still_reads_what_need_not_be_read() -> Result<()> {
    let rig = Rig::running("slow", [Disk::qcow2("vda", 64 * MIB)])?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.backup("slow-1", json!({}))?;
    rig.phase("vmbackup", "slow-1", "Ready")?;
    let then = rig.vm.remember("vda")?;
    let (ticket, image) = (rig.ticket("slow-1-vda")?, rig.files.path().join("slow.raw"));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| ticket.curl(&["--limit-rate", "16M", "-o", &image.to_string_lossy()]));
        wait_until(BOUND, "the reader to be among the zeroes", || {
            Ok(image.metadata().is_ok_and(|image| image.len() > 2 * MIB).then_some(()))
        })?;
        rig.state("vmbackup", "slow-1", "Finalized")?;
        let message = rig.reason("vmbackup", "slow-1", "TransfersIncomplete")?;
        ensure!(message.contains("a client's request"), "{message}");
        ensure!(rig.get("vmbackup", "slow-1")?["status"]["phase"] == "Ready");
        let said = reader.join().map_err(|_| anyhow::anyhow!("the reader died"))??;
        ensure!(said == "200", "HTTP {said}");
        Ok(())
    })?;
    compare(&then, &image, "raw")?;
    rig.phase("vmbackup", "slow-1", "Succeeded")?;
    rig.host_is_clean()
}

#[test]
fn cancel_and_delete_leave_nothing_in_any_phase() -> Result<()> {
    let rig = Rig::running("undone", small())?;
    rig.vm.write("vda", 0, MIB, 0x11)?;

    rig.backup("undone-1", json!({}))?;
    rig.phase("vmbackup", "undone-1", "Ready")?;
    let (made, secret) = (rig.checkpoint_of("undone-1")?, rig.ticket("undone-1-vda")?.secret);
    assert_eq!(rig.bitmaps("vda")?.len(), 1);
    rig.state("vmbackup", "undone-1", "Cancelled")?;
    rig.phase("vmbackup", "undone-1", "Failed")?;
    rig.reason("vmbackup", "undone-1", "Cancelled")?;
    rig.phase("imagetransfer", "undone-1-vda", "Cancelled")?;
    rig.host_is_clean()?;
    rig.gone("vmcheckpoint", &made)?;
    rig.gone("secret", &secret)?;
    assert!(rig.bitmaps("vda")?.is_empty(), "a failed backup's bitmap would be a hole in the chain");

    rig.backup("undone-2", json!({}))?;
    rig.phase("vmbackup", "undone-2", "Ready")?;
    let made = rig.checkpoint_of("undone-2")?;
    rig.delete("vmbackup", "undone-2")?;
    rig.gone("vmcheckpoint", &made)?;
    rig.gone("imagetransfer", "undone-2-vda")?;
    assert!(rig.bitmaps("vda")?.is_empty());

    // the same name at once, deleted before anybody can have done much
    rig.backup("undone-2", json!({}))?;
    rig.delete("vmbackup", "undone-2")?;
    rig.gone("imagetransfer", "undone-2-vda")?;
    rig.backup("undone-2", json!({}))?;
    rig.phase("vmbackup", "undone-2", "Ready")?;
    rig.state("vmbackup", "undone-2", "Cancelled")?;
    rig.phase("vmbackup", "undone-2", "Failed")?;
    rig.delete("vmbackup", "undone-2")?;
    rig.host_is_clean()?;
    assert!(rig.bitmaps("vda")?.is_empty());
    rig.vm.destroy()?;
    rig.vm.start()
}

#[test]
fn a_vm_that_stops_ends_its_backup_and_loses_the_bitmap() -> Result<()> {
    let rig = Rig::running("stopped", small())?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.backup("stopped-1", json!({}))?;
    rig.phase("vmbackup", "stopped-1", "Ready")?;
    rig.vm.destroy()?;
    rig.phase("vmbackup", "stopped-1", "Failed")?;
    rig.reason("vmbackup", "stopped-1", "VmStopped")?;
    rig.told("stopped-1", "VmStopped")?;
    rig.host_is_clean()?;
    assert!(rig.bitmaps("vda")?.is_empty(), "destroyed in mid-backup, libvirt keeps the checkpoint: a hole");
    rig.vm.start()
}

#[test]
fn nobody_prints_a_ticket() -> Result<()> {
    let rig = Rig::running("secretive", small())?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.backup("secretive-1", json!({}))?;
    rig.phase("vmbackup", "secretive-1", "Ready")?;
    let ticket = rig.ticket("secretive-1-vda")?;
    assert_eq!(ticket.curl(&[])?, "200");
    assert_eq!(ticket.curl(&["-H", "Range: bytes=9-1"])?, "416", "a refusal is logged too");
    rig.state("vmbackup", "secretive-1", "Finalized")?;
    rig.phase("vmbackup", "secretive-1", "Succeeded")?;
    let id = ticket.url.rsplit('/').next().context("no id")?;
    assert!(id.len() >= 32, "an id that nobody guesses");
    let uid = rig.get("vmbackup", "secretive-1")?["metadata"]["uid"].as_str().context("no uid")?.to_owned();
    let logs = rig.bed.logs();
    assert!(!logs.contains(id), "the ticket id is in a log");
    let objects = rig.kubectl(&["get", "vmbackups,imagetransfers,vmcheckpoints,events", "-o", "json"])?;
    assert!(!objects.contains(id), "the ticket id is in an object");
    for line in ["bound", "host action", "ADD", "OPEN", "CLOSE", "REMOVE"] {
        let found = logs.lines().any(|text| text.contains(line) && text.contains(&uid));
        assert!(found, "no line {line:?} with the backup's uid");
    }
    Ok(())
}
