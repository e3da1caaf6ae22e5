//! The four time limits.

use anyhow::Result;
use serde_json::json;

use super::rig::{MIB, Rig, small};

#[test]
fn a_backup_that_cannot_start_in_time_fails() -> Result<()> {
    let rig = Rig::off("late", small())?;
    rig.backup("late-1", json!({"startDeadlineSeconds": 2}))?;
    rig.phase("vmbackup", "late-1", "Failed")?;
    let message = rig.reason("vmbackup", "late-1", "StartDeadlineExceeded")?;
    assert!(message.contains("VmNotRunning"), "says why it waited: {message}");
    Ok(())
}

#[test]
fn a_backup_that_is_not_finalized_in_time_fails_and_leaves_nothing() -> Result<()> {
    let rig = Rig::running("slow", small())?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.backup("slow-1", json!({"readyDeadlineSeconds": 2}))?;
    rig.phase("vmbackup", "slow-1", "Ready")?;
    rig.state("vmbackup", "slow-1", "Finalized")?;
    rig.phase("vmbackup", "slow-1", "Failed")?;
    let message = rig.reason("vmbackup", "slow-1", "ReadyDeadlineExceeded")?;
    assert!(message.contains("vda: 1048576 bytes"), "says what is unread: {message}");
    rig.host_is_clean()?;
    assert!(rig.bitmaps("vda")?.is_empty());
    Ok(())
}

#[test]
fn a_client_that_asks_for_nothing_ends_the_backup_and_one_that_reads_does_not() -> Result<()> {
    let rig = Rig::running("idle", small())?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.backup("idle-1", json!({"clientIdleSeconds": 4}))?;
    let ticket = rig.ticket("idle-1-vda")?;
    let ready = std::time::Instant::now();
    // a client that reads now and then keeps it
    while ready.elapsed() < std::time::Duration::from_secs(6) {
        assert_eq!(ticket.curl(&["-H", "Range: bytes=0-0"])?, "206", "after {:?}", ready.elapsed());
        std::thread::park_timeout(std::time::Duration::from_secs(1));
    }
    rig.phase("vmbackup", "idle-1", "Failed")?;
    rig.reason("vmbackup", "idle-1", "ClientIdle")?;
    assert_eq!(ticket.curl(&[])?, "403", "the ticket is gone");
    rig.host_is_clean()
}

#[test]
fn a_finished_backup_goes_after_its_time_and_its_checkpoint_stays() -> Result<()> {
    let rig = Rig::running("brief", small())?;
    rig.backup("brief-1", json!({"ttlSecondsAfterFinished": 2}))?;
    rig.phase("vmbackup", "brief-1", "Ready")?;
    rig.state("vmbackup", "brief-1", "Finalized")?;
    let checkpoint =
        rig.get("vmbackup", "brief-1")?["status"]["toCheckpoint"].as_str().unwrap_or_default().to_owned();
    rig.gone("vmbackup", "brief-1")?;
    let kept = rig.get("vmcheckpoint", &checkpoint)?;
    assert!(!kept.is_null(), "{checkpoint} went with its backup");
    rig.delete("vmcheckpoint", &checkpoint)
}
