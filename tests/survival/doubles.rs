//! Two of what there is one of: two agents on one node, two VMs of one name, two lives of one backup.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use virtmark::killpoint::VARIABLE;
use virtmark_bed::component;
use virtmark_bed::daemon::Daemon;
use virtmark_bed::{Disk, wait_until};

use super::history::History;
use super::rig::{BOUND, MIB, Rig};

/// A process that ends with the test.
struct Ends(Daemon);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.process.end();
    }
}

#[test]
fn a_second_agent_on_a_node_waits_for_the_end_of_the_first() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, "agents", [Disk::qcow2("vda", 8 * MIB)])?;
    rig.vm.write("vda", 0, MIB, 0x44)?;
    let history = History::watch(&rig.bed)?;
    rig.backup("agents-1", json!({}))?;
    let ticket = rig.ticket("agents-1-vda")?;
    let then = rig.vm.remember("vda")?;

    let before = rig.bed.agents[1].log().len();
    let said =
        |rig: &Rig, what: &str| rig.bed.agents[1].log().get(before..).unwrap_or_default().contains(what);
    let second = Ends(component::agent(&rig.bed.dir, &rig.bed.plane, rig.vm.hypervisor())?);
    wait_until(BOUND, "the second agent to say that it waits", || {
        Ok(said(&rig, "another agent works with this state directory").then_some(()))
    })?;
    ensure!(!said(&rig, "backup adopted"), "it took up what is the first one's");
    ensure!(ticket.curl(&["-H", "Range: bytes=0-0"])? == "206", "the first one serves no more");
    // one that stands still is still the first
    rig.bed.agents[1].pause();
    ensure!(second.0.process.is_alive() && !said(&rig, "backup adopted"));
    rig.bed.agents[1].resume();

    let began = Instant::now();
    rig.bed.agents[1].kill();
    wait_until(BOUND, "the second agent to take over", || Ok(said(&rig, "backup adopted").then_some(())))?;
    let taken = began.elapsed();
    // it listens elsewhere, but for the socket, and knows the ticket
    let id = ticket.url.rsplit('/').next().context("no id")?;
    let url = format!("http://localhost/images/{id}");
    let (image, socket) =
        (rig.files.path().join("agents.raw"), ticket.unix_socket.to_string_lossy().into_owned());
    let image_path = image.to_string_lossy().into_owned();
    wait_until(BOUND, "the second agent to serve", || {
        let read = ticket.curl_at(&url, &["--unix-socket", &socket, "-o", &image_path]);
        Ok(read.ok().filter(|status| status == "200").map(drop))
    })?;
    virtmark_bed::compare(&then, &image, "raw")?;
    rig.state("vmbackup", "agents-1", "Finalized")?;
    rig.phase("vmbackup", "agents-1", "Succeeded")?;
    rig.host_is_clean()?;
    drop(second);
    rig.bed.agents[1].restart(&[])?;
    rig.bed.store()?;
    println!(
        "the second agent took over {} ms after the first one's end; {} versions",
        taken.as_millis(),
        history.check()?
    );
    Ok(())
}

#[test]
fn a_backup_bound_to_a_vm_never_works_on_another_of_its_name() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, "renewed", [Disk::qcow2("vda", 8 * MIB)])?;
    let history = History::watch(&rig.bed)?;
    // bound, and not seen by its agent yet
    rig.bed.agents[1].pause();
    rig.backup("renewed-1", json!({"quiesce": {"mode": "None"}}))?;
    rig.reason("vmbackup", "renewed-1", "Bound")?;
    // another VM, with the same name and disks
    let node = rig.vm.hypervisor().clone();
    let xml = node.virsh(&["dumpxml", "--inactive", "renewed"])?;
    let (old, new) = (rig.vm.uuid.clone(), "5eed0000-0000-4000-8000-000000000002");
    rig.vm.destroy()?;
    node.virsh(&["undefine", "renewed"])?;
    let file = rig.files.path().join("new.xml");
    std::fs::write(&file, xml.replace(&old, new))?;
    node.virsh(&["define", &file.to_string_lossy()])?;
    rig.vm.uuid = new.to_owned();
    rig.vm.start()?;
    rig.bed.agents[1].resume();
    rig.published("Running")?;
    rig.reason("vmbackup", "renewed-1", "VmReplaced")?;
    ensure!(rig.bitmaps("vda")?.is_empty(), "a backup of the old VM worked on the new one");

    rig.backup("renewed-2", json!({"quiesce": {"mode": "None"}}))?;
    let status = rig.phase("vmbackup", "renewed-2", "Ready")?;
    ensure!(status["vmUuid"] == new, "{status}");
    rig.state("vmbackup", "renewed-2", "Finalized")?;
    rig.phase("vmbackup", "renewed-2", "Succeeded")?;
    rig.host_is_clean()?;
    // and once it is replaced again, its checkpoint is no base
    let checkpoint = status["toCheckpoint"].as_str().context("no checkpoint")?.to_owned();
    rig.vm.destroy()?;
    node.virsh(&["undefine", "renewed"])?;
    std::fs::write(&file, xml)?;
    node.virsh(&["define", &file.to_string_lossy()])?;
    rig.vm.uuid = old;
    rig.published("Off")?;
    wait_until(BOUND, "the checkpoint to be no base", || {
        let conditions = rig.get("vmcheckpoint", &checkpoint)?["status"]["conditions"].clone();
        let usable = conditions
            .as_array()
            .into_iter()
            .flatten()
            .find(|condition| condition["type"] == "Usable")
            .cloned();
        Ok(usable.filter(|usable| usable["reason"] == "VmReplaced" && usable["status"] == "False").map(drop))
    })?;
    rig.delete("vmcheckpoint", &checkpoint)?;
    println!("{} versions, none went back", history.check()?);
    Ok(())
}

#[test]
fn a_backup_whose_record_and_job_are_lost_is_not_begun_again() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, "forgotten", [Disk::qcow2("vda", 8 * MIB)])?;
    let history = History::watch(&rig.bed)?;
    // the Secret is made then, and its name told to nobody
    rig.bed.agents[1].restart(&[(VARIABLE, "SecretMade:0")])?;
    rig.backup("forgotten-1", json!({"quiesce": {"mode": "None"}}))?;
    rig.phase("vmbackup", "forgotten-1", "Ready")?;
    wait_until(BOUND, "the agent to die", || Ok((!rig.bed.agents[1].process.is_alive()).then_some(())))?;
    ensure!(rig.list("secrets", "")?.len() == 1, "the Secret is made");
    rig.vm.destroy()?;
    std::fs::remove_dir_all(rig.vm.hypervisor().dir.join("agent/state/backups"))?;
    rig.vm.start()?;
    rig.bed.agents[1].restart(&[])?;
    rig.bed.store()?;
    let message = rig.reason("vmbackup", "forgotten-1", "HypervisorError")?;
    ensure!(message.contains("record"), "{message}");
    wait_until(BOUND, "the bitmap, and the Secret, to go", || {
        Ok((rig.bitmaps("vda")?.is_empty() && rig.list("secrets", "")?.is_empty()).then_some(()))
    })?;
    rig.host_is_clean()?;
    println!("{} versions, none went back", history.check()?);
    Ok(())
}
