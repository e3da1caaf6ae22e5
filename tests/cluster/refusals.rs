//! What cannot be backed up, now or ever: each with its reason, an Event, and nothing on the host.

use anyhow::Result;
use serde_json::{Value, json};
use virtmark_bed::Disk;

use super::rig::{MIB, Rig, small};

/// The backup fails for good, for this reason, and says so.
fn refused(rig: &Rig, name: &str, spec: Value, reason: &str, words: &str) -> Result<()> {
    rig.backup(name, spec)?;
    rig.phase("vmbackup", name, "Failed")?;
    let message = rig.reason("vmbackup", name, reason)?;
    assert!(message.contains(words), "{reason}: {message}");
    rig.told(name, reason)?;
    let status = rig.get("vmbackup", name)?["status"].clone();
    let stalled = status["conditions"].as_array().cloned().unwrap_or_default();
    assert!(
        stalled.iter().any(|c| c["type"] == "Stalled" && c["status"] == "True"),
        "kstatus would wait for ever"
    );
    assert!(status["nodeName"].is_null());
    rig.delete("vmbackup", name)?;
    rig.host_is_clean()
}

#[test]
fn refuses_what_can_never_be() -> Result<()> {
    let disks = [Disk::qcow2("vda", 8 * MIB), Disk::raw("vdb", 8 * MIB).with("<shareable/>")];
    let rig = Rig::running("picky", disks)?;
    refused(&rig, "picky-1", json!({"vm": "nobody"}), "VmNotFound", "kubectl get lvd")?;
    refused(&rig, "picky-2", json!({"disks": ["vda", "vdx"]}), "DiskNotFound", "it has vda, vdb")?;
    refused(&rig, "picky-3", json!({"disks": ["vdb"]}), "DiskNotSupported", "shareable")?;
    rig.vm.destroy()?;
    rig.published("Off")?;
    refused(&rig, "picky-4", json!({"offline": "Refuse"}), "VmNotRunning", "the VM is off")?;
    rig.vm.start()?;
    rig.published("Running")?;
    rig.backup("picky-5", json!({}))?;
    let status = rig.phase("vmbackup", "picky-5", "Ready")?;
    assert_eq!(status["disks"].as_array().map(Vec::len), Some(1), "by default, every disk that can be");
    Ok(())
}

#[test]
fn waits_for_a_vm_that_is_off() -> Result<()> {
    let rig = Rig::off("sleepy", small())?;
    rig.backup("sleepy-1", json!({}))?;
    rig.reason("vmbackup", "sleepy-1", "VmNotRunning")?;
    assert_eq!(rig.get("vmbackup", "sleepy-1")?["status"]["phase"], "Initializing");
    rig.vm.start()?;
    rig.phase("vmbackup", "sleepy-1", "Ready").map(drop)
}

#[test]
fn a_second_backup_waits_and_says_for_whom() -> Result<()> {
    let rig = Rig::running("queue", small())?;
    rig.backup("queue-1", json!({}))?;
    rig.phase("vmbackup", "queue-1", "Ready")?;
    rig.backup("queue-2", json!({}))?;
    let message = rig.reason("vmbackup", "queue-2", "BackupAlreadyRunning")?;
    assert!(message.contains("queue-1"), "{message}");
    assert!(rig.get("vmbackup", "queue-2")?["status"]["nodeName"].is_null());
    rig.state("vmbackup", "queue-1", "Cancelled")?;
    rig.phase("vmbackup", "queue-2", "Ready")?;
    // and one that is cancelled while it waits is never begun
    rig.backup("queue-3", json!({}))?;
    rig.reason("vmbackup", "queue-3", "BackupAlreadyRunning")?;
    rig.state("vmbackup", "queue-3", "Cancelled")?;
    rig.phase("vmbackup", "queue-3", "Failed")?;
    rig.reason("vmbackup", "queue-3", "Cancelled").map(drop)
}

#[test]
fn somebody_elses_job_is_waited_for_and_left_alone() -> Result<()> {
    let rig = Rig::running("foreign", small())?;
    let node = rig.vm.hypervisor();
    let xml = rig.files.path().join("backup.xml");
    let socket = node.dir.join("vm/foreign/foreign.sock");
    let text = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/></domainbackup>",
        socket.display()
    );
    std::fs::write(&xml, text)?;
    // QEMU makes the socket where the VM's disks are
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(node.dir.join("vm/foreign"), std::fs::Permissions::from_mode(0o777))?;
    node.virsh(&["backup-begin", "foreign", &xml.to_string_lossy()])?;
    rig.backup("foreign-1", json!({}))?;
    let message = rig.reason("vmbackup", "foreign-1", "BackupAlreadyRunning")?;
    assert!(message.contains("not Virtmark's"), "{message}");
    assert!(node.virsh(&["backup-dumpxml", "foreign"])?.contains("foreign.sock"), "it is not ours to end");
    node.virsh(&["domjobabort", "foreign"])?;
    rig.phase("vmbackup", "foreign-1", "Ready").map(drop)
}
