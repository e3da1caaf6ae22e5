//! A real Debian guest: frozen for the point in time, thawed in every path.

use anyhow::Result;
use serde_json::json;
use virtmark_bed::Bed;
use virtmark_bed::guest::{self, Image};

use super::rig::{Rig, Ticket};

#[test]
fn a_guest_is_frozen_for_the_point_in_time_and_thawed() -> Result<()> {
    let bed = Bed::from_env()?;
    let vm = Image::get()?.boot("debian", &bed.hypervisors[0], [])?;
    guest::sh(&vm, "dd if=/dev/urandom of=/root/data bs=1M count=8 && sync")?;
    let rig = Rig::of(bed, vm)?;
    rig.backup("debian-1", json!({"quiesce": {"mode": "Required"}}))?;
    let status = rig.phase("vmbackup", "debian-1", "Ready")?;
    assert!(!guest::is_frozen(&rig.vm)?, "thawed before anybody reads");
    guest::sh(&rig.vm, "echo the guest goes on > /root/more && sync")?;
    let frozen = status["frozenMilliseconds"].as_i64().unwrap_or(-1);
    assert!((1..10_000).contains(&frozen), "{status}");
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    assert!(conditions.iter().any(|c| c["type"] == "Quiesced" && c["status"] == "True"), "{conditions:?}");
    let ticket: Ticket = rig.ticket("debian-1-vda")?;
    let image = rig.files.path().join("debian.raw");
    assert_eq!(ticket.curl(&["-o", &image.to_string_lossy()])?, "200");
    // a file system that was frozen needs no recovery
    let check = std::process::Command::new("e2fsck").args(["-f", "-n"]).arg(&image).output()?;
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    rig.state("vmbackup", "debian-1", "Finalized")?;
    rig.phase("vmbackup", "debian-1", "Succeeded")?;
    rig.host_is_clean()
}

#[test]
fn a_required_freeze_without_an_agent_is_refused() -> Result<()> {
    let rig = Rig::running("agentless", super::rig::small())?;
    rig.backup("agentless-1", json!({"quiesce": {"mode": "Required"}}))?;
    rig.phase("vmbackup", "agentless-1", "Failed")?;
    let message = rig.reason("vmbackup", "agentless-1", "QuiesceFailed")?;
    assert!(message.contains("no guest agent is connected"), "{message}");
    rig.host_is_clean()?;
    assert!(rig.bitmaps("vda")?.is_empty());
    Ok(())
}
