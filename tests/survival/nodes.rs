//! What a node, its agent or its room for scratch images does to backups: each with its reason, and undone again.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use virtmark::killpoint::PAUSE_VARIABLE;
use virtmark_bed::daemon::Daemon;
use virtmark_bed::guest::{self, Image};
use virtmark_bed::{Bed, Disk, component, wait_until};

use super::rig::{BOUND, MIB, Rig, small};

/// The second hypervisor: its node, and its agent.
const NODE: &str = "node-b";

fn restart(rig: &mut Rig, environment: &[(&str, &str)]) -> Result<()> {
    rig.bed.agents[1].restart(environment)?;
    rig.bed.store()
}

fn running(name: &str) -> Result<Rig> {
    Rig::running_on(1, name, small())
}

fn stands_still(daemon: &Daemon) -> Result<()> {
    wait_until(BOUND, &format!("{} to stand still", daemon.name), || {
        Ok(daemon.process.is_paused().then_some(()))
    })
}

#[test]
fn an_agent_that_does_not_answer_gets_nothing_and_is_waited_for() -> Result<()> {
    let _alone = super::alone();
    let mut rig = running("silent")?;
    let agent = rig.bed.agents[1].clone();
    agent.pause();
    rig.backup("silent-1", json!({}))?;
    // bound within its lease
    let message = rig.reason("vmbackup", "silent-1", "Bound")?;
    ensure!(message.contains(NODE), "{message}");
    agent.resume();
    rig.phase("vmbackup", "silent-1", "Ready")?;
    rig.state("vmbackup", "silent-1", "Finalized")?;
    rig.phase("vmbackup", "silent-1", "Succeeded")?;

    let checkpoint = rig.checkpoint_of("silent-1")?;
    agent.pause();
    rig.kubectl(&["delete", "vmcheckpoint", &checkpoint, "--wait=false"])?;
    rig.reason("vmcheckpoint", &checkpoint, "Finalizing")?;
    agent.kill();
    wait_until(BOUND, "the lease to run out", || {
        let name = format!("silent-{}", virtmark::clock::now().as_millisecond());
        rig.backup(&name, json!({}))?;
        wait_until(BOUND, "an answer", || {
            let conditions = rig.get("vmbackup", &name)?["status"]["conditions"].clone();
            Ok((!conditions.is_null()).then_some(()))
        })?;
        let waits =
            rig.get("vmbackup", &name)?["status"]["conditions"].to_string().contains("AgentUnreachable");
        if waits {
            let message = rig.reason("vmbackup", &name, "AgentUnreachable")?;
            ensure!(message.contains("look at the agent of the node"), "{message}");
        }
        rig.kubectl(&["delete", "vmbackup", &name, "--wait=false"])?;
        Ok(waits.then_some(()))
    })?;
    rig.backup("silent-2", json!({}))?;
    rig.reason("vmbackup", "silent-2", "AgentUnreachable")?;
    restart(&mut rig, &[])?;
    rig.phase("vmbackup", "silent-2", "Ready")?;
    rig.gone("vmcheckpoint", &checkpoint)
}

#[test]
fn scratch_space_is_asked_for_first_and_its_end_comes_before_the_guests() -> Result<()> {
    let _alone = super::alone();
    let mut rig = running("cramped")?;
    rig.vm.write("vda", 0, 48 * MIB, 0x11)?;
    restart(&mut rig, &[("VIRTMARK_SCRATCH_LIMIT_MIB", "3")])?;
    rig.backup("cramped-1", json!({}))?;
    let message = rig.reason("vmbackup", "cramped-1", "ScratchSpaceLow")?;
    ensure!(message.contains("free space in the agent's state directory"), "{message}");
    restart(&mut rig, &[("VIRTMARK_SCRATCH_LIMIT_MIB", "16")])?;
    rig.phase("vmbackup", "cramped-1", "Ready")?;
    // the guest overwrites what it had: QEMU keeps the old bytes in the scratch image
    rig.vm.write("vda", 0, 24 * MIB, 0x22)?;
    rig.phase("vmbackup", "cramped-1", "Failed")?;
    let message = rig.reason("vmbackup", "cramped-1", "ScratchExhausted")?;
    ensure!(message.contains("read faster"), "{message}");
    rig.vm.write("vda", 24 * MIB, 24 * MIB, 0x33)?;
    rig.host_is_clean()?;
    ensure!(rig.bitmaps("vda")?.is_empty());
    restart(&mut rig, &[])
}

#[test]
fn a_cordoned_node_ends_its_backups_after_the_admins_grace() -> Result<()> {
    let _alone = super::alone();
    let mut rig = running("drained")?;
    restart(&mut rig, &[("VIRTMARK_DRAIN_GRACE_SECONDS", "2")])?;
    rig.backup("drained-1", json!({}))?;
    rig.phase("vmbackup", "drained-1", "Ready")?;
    rig.bed.kubectl().run(&["cordon", NODE])?;
    let ended = rig.phase("vmbackup", "drained-1", "Failed");
    rig.bed.kubectl().run(&["uncordon", NODE])?;
    ended?;
    rig.reason("vmbackup", "drained-1", "NodeDraining")?;
    rig.host_is_clean()?;
    restart(&mut rig, &[])
}

#[test]
fn a_vm_that_went_elsewhere_or_nowhere_before_its_backup_began_is_not_waited_for() -> Result<()> {
    let _alone = super::alone();
    for (name, elsewhere, reason) in [("moved", true, "VmMigrated"), ("vanished", false, "VmNotFound")] {
        let mut rig = running(name)?;
        let (source, other) = (rig.bed.hypervisors[1].clone(), rig.bed.hypervisors[0].clone());
        let xml = rig.files.path().join("domain.xml");
        std::fs::write(&xml, source.virsh(&["dumpxml", "--inactive", name])?)?;
        restart(&mut rig, &[(PAUSE_VARIABLE, "RecordStored")])?;
        let backup = format!("{name}-1");
        rig.backup(&backup, json!({}))?;
        stands_still(&rig.bed.agents[1])?;
        source.virsh(&["destroy", name])?;
        source.virsh(&["undefine", name])?;
        if elsewhere {
            other.virsh(&["define", &xml.to_string_lossy()])?;
            other.virsh(&["start", name])?;
        }
        rig.bed.agents[1].resume();
        let ended = rig.phase("vmbackup", &backup, "Failed");
        let again = ended.and_then(|_| {
            let message = rig.reason("vmbackup", &backup, reason)?;
            ensure!(!elsewhere || message.contains("node-a"), "{message}");
            rig.gone("vmcheckpoint", &rig.checkpoint_of(&backup)?)?;
            if elsewhere {
                rig.backup("moved-2", json!({}))?;
                let status = rig.phase("vmbackup", "moved-2", "Ready")?;
                ensure!(status["nodeName"] == "node-a", "{status}");
                rig.delete_made()?;
            }
            Ok(())
        });
        if elsewhere {
            other.virsh(&["destroy", name])?;
            other.virsh(&["undefine", name, "--checkpoints-metadata"])?;
        }
        again?;
        let folder = source.dir.join("agent/run");
        let uids = std::fs::read_dir(folder)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        ensure!(uids.filter(|name| name.len() == 36).count() == 0, "the scratch images are left");
        restart(&mut rig, &[])?;
    }
    Ok(())
}

#[test]
fn a_disk_that_comes_or_goes_before_its_backup_began_is_not_left_out_in_silence() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, "plugged", [Disk::qcow2("vda", 4 * MIB)])?;
    let new = Disk::qcow2("vdb", 4 * MIB);
    let named = json!({"disks": ["vda"]});
    for (number, plugs, spec, ends) in
        [(1, true, json!({}), true), (2, false, json!({}), true), (3, true, named, false)]
    {
        restart(&mut rig, &[(PAUSE_VARIABLE, "RecordStored")])?;
        let name = format!("plugged-{number}");
        rig.backup(&name, spec)?;
        stands_still(&rig.bed.agents[1])?;
        if plugs {
            rig.vm.plug(&new)?;
        } else {
            rig.vm.unplug("vdb")?;
        }
        rig.bed.agents[1].resume();
        if ends {
            rig.phase("vmbackup", &name, "Failed")?;
            let message = rig.reason("vmbackup", &name, "DisksChanged")?;
            ensure!(message.contains("vdb"), "{message}");
        } else {
            rig.phase("vmbackup", &name, "Ready")?;
            rig.state("vmbackup", &name, "Cancelled")?;
            rig.phase("vmbackup", &name, "Failed")?;
        }
        rig.host_is_clean()?;
        ensure!(rig.bitmaps("vda")?.is_empty(), "a failed backup left its bitmaps");
        // the backup that comes next is bound to what there is now
        let disks = 1 + usize::from(plugs);
        wait_until(BOUND, "the inventory to show it", || {
            let status = rig.get("lvd", "plugged")?["status"].clone();
            Ok((status["disks"].as_array().map(Vec::len) == Some(disks)).then_some(()))
        })?;
    }
    restart(&mut rig, &[])
}

#[test]
fn a_host_that_cannot_be_cleaned_says_so_until_it_can() -> Result<()> {
    let _alone = super::alone();
    let rig = running("stuck")?;
    rig.backup("stuck-1", json!({}))?;
    rig.phase("vmbackup", "stuck-1", "Ready")?;
    let uid = rig.get("vmbackup", "stuck-1")?["metadata"]["uid"].as_str().context("no uid")?.to_owned();
    let folder = rig.vm.hypervisor().dir.join("agent/run").join(uid);
    let chattr = |flag: &str| Command::new("chattr").arg(flag).arg(&folder).status();
    ensure!(chattr("+i")?.success(), "chattr +i");
    rig.state("vmbackup", "stuck-1", "Cancelled")?;
    let said = rig.reason("vmbackup", "stuck-1", "FinalizeFailed");
    ensure!(chattr("-i")?.success(), "chattr -i");
    ensure!(said?.contains("it goes on trying"));
    rig.phase("vmbackup", "stuck-1", "Failed")?;
    rig.reason("vmbackup", "stuck-1", "Cancelled")?;
    rig.host_is_clean()
}

#[test]
fn a_guest_that_cannot_be_thawed_is_told_of_and_thawed_when_it_can() -> Result<()> {
    let _alone = super::alone();
    let bed = Bed::from_env()?;
    let vm = Image::get()?.boot("chilled", &bed.hypervisors[1], [])?;
    let mut rig = Rig::of(bed, vm)?;
    restart(&mut rig, &[(PAUSE_VARIABLE, "BeginAnswered")])?;
    rig.backup("chilled-1", json!({"quiesce": {"mode": "Required", "timeoutSeconds": 2}}))?;
    stands_still(&rig.bed.agents[1])?;
    ensure!(guest::is_frozen(&rig.vm)?);
    // the guest agent of a VM that stands still answers nothing
    rig.vm.hypervisor().virsh(&["suspend", "chilled"])?;
    rig.bed.agents[1].resume();
    let message = rig.reason("vmbackup", "chilled-1", "GuestMayBeFrozen");
    rig.vm.hypervisor().virsh(&["resume", "chilled"])?;
    ensure!(message?.contains("virsh domfsthaw"));
    rig.reason("vmbackup", "chilled-1", "AwaitingFinalize")?;
    ensure!(!guest::is_frozen(&rig.vm)?);
    guest::sh(&rig.vm, "echo on > /root/it-goes && sync")?;
    rig.state("vmbackup", "chilled-1", "Cancelled")?;
    rig.phase("vmbackup", "chilled-1", "Failed")?;
    restart(&mut rig, &[])
}

#[test]
fn a_node_that_is_not_ready_is_waited_for_and_one_that_is_gone_is_not() -> Result<()> {
    let _alone = super::alone();
    let mut rig = running("lost")?;
    rig.backup("lost-0", json!({}))?;
    rig.phase("vmbackup", "lost-0", "Ready")?;
    rig.state("vmbackup", "lost-0", "Finalized")?;
    rig.phase("vmbackup", "lost-0", "Succeeded")?;
    let checkpoint = rig.checkpoint_of("lost-0")?;
    rig.reason("vmcheckpoint", &checkpoint, "BackupSucceeded")?;
    let ready = |status: &str| -> Result<()> {
        let condition =
            json!({"type": "Ready", "status": status, "reason": "Test", "message": "as a test wants it"});
        let patch = json!({"status": {"conditions": [condition]}}).to_string();
        rig.bed.kubectl().run(&["patch", "node", NODE, "--subresource=status", "-p", &patch]).map(drop)
    };
    ready("False")?;
    rig.backup("lost-1", json!({}))?;
    let waits = rig.reason("vmbackup", "lost-1", "NodeNotReady");
    ready("True")?;
    ensure!(waits?.contains("bring the node back"));
    rig.phase("vmbackup", "lost-1", "Ready")?;
    rig.phase("imagetransfer", "lost-1-vda", "Ready")?;

    // a node that is gone has no agent: it may still be heard for as long as the API server remembers its token
    rig.bed.agents[1].kill();
    rig.bed.kubectl().run(&["delete", "node", NODE])?;
    let gone = node_is_gone(&rig, &checkpoint);
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE},
        "status": {"addresses": [{"type": "InternalIP", "address": component::ADVERTISED}]}});
    rig.bed.kubectl().run_with(&["create", "-f", "-"], &node.to_string())?;
    // its token was the old Node's
    rig.bed.agents[1] = component::agent(&rig.bed.dir, &rig.bed.plane, &rig.bed.hypervisors[1])?;
    rig.bed.store()?;
    gone?;
    rig.published("Running")?;
    wait_until(BOUND, "the host to be cleaned by the agent that came back", || {
        let job = rig.vm.hypervisor().virsh(&["domjobinfo", "lost"])?;
        // the checkpoint's was left, as its Event says
        Ok((job.contains("None") && rig.bitmaps("vda")?.len() == 1).then_some(()))
    })?;
    rig.host_is_clean()?;
    rig.backup("lost-2", json!({}))?;
    rig.phase("vmbackup", "lost-2", "Ready").map(drop)
}

fn node_is_gone(rig: &Rig, checkpoint: &str) -> Result<()> {
    rig.phase("vmbackup", "lost-1", "Failed")?;
    rig.reason("vmbackup", "lost-1", "NodeLost")?;
    rig.reason("imagetransfer", "lost-1-vda", "NodeLost")?;
    rig.published("NodeLost")?;
    for (kind, name) in [("vmbackup", "lost-1"), ("vmcheckpoint", checkpoint)] {
        rig.delete(kind, name)?;
        rig.told(name, "HostCleanupAbandoned")?;
    }
    Ok(())
}
