//! Processes die at any moment: what lives goes on with their successors. On the second hypervisor, whose
//! agent no other test needs; one test, so that nothing here runs beside it.

use anyhow::Result;
use serde_json::json;
use virtmark_bed::wait_until;

use super::rig::{BOUND, MIB, Rig, small};

#[test]
fn a_reader_goes_on_with_the_ticket_it_has_when_the_agent_was_killed() -> Result<()> {
    let mut rig = Rig::off_on(1, "restarted", small())?;
    rig.vm.start()?;
    rig.published("Running")?;
    rig.vm.write("vda", 0, 8 * MIB, 0x11)?;
    rig.backup("restarted-1", json!({}))?;
    let ticket = rig.ticket("restarted-1-vda")?;
    let then = rig.vm.remember("vda")?;
    rig.vm.write("vda", 0, MIB, 0xee)?;
    assert_eq!(ticket.curl(&["-H", "Range: bytes=0-4194303"])?, "206");

    rig.bed.restart_agent(1)?;
    wait_until(BOUND, "the agent to serve again", || Ok(ticket.curl(&["-H", "Range: bytes=0-0"]).ok()))?;
    assert_eq!(rig.get("vmbackup", "restarted-1")?["status"]["phase"], "Ready");
    rig.state("vmbackup", "restarted-1", "Finalized")?;
    rig.reason("vmbackup", "restarted-1", "TransfersIncomplete")?;
    rig.read("restarted-1-vda", &then)?;
    rig.phase("vmbackup", "restarted-1", "Succeeded")?;
    rig.host_is_clean()?;

    // gone while nobody was looking: the successor cleans the host all the same
    rig.backup("restarted-2", json!({}))?;
    rig.phase("vmbackup", "restarted-2", "Ready")?;
    assert_eq!(rig.bitmaps("vda")?.len(), 2);
    rig.bed.agents[1].kill();
    rig.kubectl(&[
        "patch",
        "vmbackup",
        "restarted-2",
        "--type=merge",
        "-p",
        r#"{"metadata":{"finalizers":null}}"#,
    ])?;
    rig.kubectl(&["delete", "vmbackup", "restarted-2", "--timeout=30s"])?;
    rig.bed.restart_agent(1)?;
    wait_until(BOUND, "the host to be cleaned after an object that is gone", || {
        let job = rig.vm.hypervisor().virsh(&["domjobinfo", "restarted"])?;
        Ok((job.contains("None") && rig.bitmaps("vda")?.len() == 1).then_some(()))
    })?;
    rig.host_is_clean()
}
