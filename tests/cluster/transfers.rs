//! ImageTransfers that users make, their tickets, and NBD.

use std::fs::File;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use serde_json::json;
use virtmark_bed::{Disk, compare, wait_until};

use super::chain::restore;
use super::rig::{BOUND, MIB, Rig, small};

#[test]
fn a_transfer_may_be_applied_before_its_backup() -> Result<()> {
    let rig = Rig::running("manual", small())?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.transfer("manual-t", &json!({"backup": "manual-1", "disk": "vda"}))?;
    rig.reason("imagetransfer", "manual-t", "BackupNotFound")?;
    rig.backup("manual-1", json!({"transfers": "Manual"}))?;
    rig.read("manual-t", &rig.vm.remember("vda")?)?;
    rig.transfer("manual-x", &json!({"backup": "manual-1", "disk": "vdx"}))?;
    rig.phase("imagetransfer", "manual-x", "Failed")?;
    let message = rig.reason("imagetransfer", "manual-x", "DiskNotFound")?;
    assert!(message.contains("it has vda"), "{message}");
    rig.state("vmbackup", "manual-1", "Finalized")?;
    rig.phase("vmbackup", "manual-1", "Succeeded")?;
    rig.phase("imagetransfer", "manual-t", "Succeeded")?;
    rig.transfer("manual-late", &json!({"backup": "manual-1", "disk": "vda"}))?;
    rig.phase("imagetransfer", "manual-late", "Failed")?;
    rig.reason("imagetransfer", "manual-late", "TransferFailed").map(drop)
}

#[test]
fn an_ended_ticket_answers_as_imageios_does() -> Result<()> {
    let rig = Rig::running("tickets", small())?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.backup("tickets-1", json!({"transfers": "Manual"}))?;
    for transfer in ["tickets-a", "tickets-b"] {
        rig.transfer(transfer, &json!({"backup": "tickets-1", "disk": "vda"}))?;
    }
    let (finalized, cancelled) = (rig.ticket("tickets-a")?, rig.ticket("tickets-b")?);
    assert_eq!(finalized.curl(&[])?, "200");
    let local = finalized.url.split_once("/images/").map(|(_, id)| format!("http://localhost/images/{id}"));
    let socket = finalized.unix_socket.to_string_lossy().into_owned();
    assert_eq!(finalized.curl_at(&local.unwrap_or_default(), &["--unix-socket", &socket])?, "200");
    rig.state("imagetransfer", "tickets-a", "Finalized")?;
    rig.state("imagetransfer", "tickets-b", "Cancelled")?;
    rig.phase("imagetransfer", "tickets-a", "Succeeded")?;
    rig.phase("imagetransfer", "tickets-b", "Cancelled")?;
    assert_eq!(finalized.curl(&[])?, "403");
    assert_eq!(cancelled.curl(&[])?, "403");
    rig.gone("secret", &finalized.secret)?;
    rig.gone("secret", &cancelled.secret)?;
    assert_eq!(
        rig.get("vmbackup", "tickets-1")?["status"]["phase"],
        "Ready",
        "a transfer's end is not the backup's"
    );
    rig.state("vmbackup", "tickets-1", "Finalized")?;
    rig.phase("vmbackup", "tickets-1", "Succeeded").map(drop)
}

#[test]
fn a_client_on_the_node_may_read_nbd_and_says_so() -> Result<()> {
    let rig = Rig::running("nbd", small())?;
    rig.vm.write("vda", 3 * MIB, 5 * MIB, 0x77)?;
    rig.backup("nbd-1", json!({"transfers": "Manual"}))?;
    rig.transfer("nbd-t", &json!({"backup": "nbd-1", "disk": "vda", "protocol": "Nbd"}))?;
    let status = rig.phase("imagetransfer", "nbd-t", "Ready")?;
    assert!(status["ticketSecret"].is_null(), "no ticket is needed");
    let text = |key: &str| status["nbd"][key].as_str().unwrap_or_default().to_owned();
    let uri = format!("nbd+unix:///{}?socket={}", text("export"), text("socket"));
    let image = rig.files.path().join("nbd.raw");
    let copied = Command::new("nbdcopy").arg(&uri).arg(&image).output()?;
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    compare(&rig.vm.remember("vda")?, &image, "raw")?;
    rig.state("vmbackup", "nbd-1", "Finalized")?;
    rig.reason("vmbackup", "nbd-1", "TransfersIncomplete")?;
    rig.state("imagetransfer", "nbd-t", "Finalized")?;
    rig.phase("vmbackup", "nbd-1", "Succeeded")?;
    rig.host_is_clean()
}

#[test]
fn what_was_zero_when_it_was_asked_for_need_not_be_read() -> Result<()> {
    let rig = Rig::running("zeroes", [Disk::qcow2("vda", 64 * MIB).clusters(4096)])?;
    let image = rig.files.path().join("zeroes.raw");
    rig.vm.write("vda", 0, MIB, 0x11)?;
    for (backup, mode) in [("zeroes-1", "Full"), ("zeroes-2", "Incremental")] {
        rig.vm.write("vda", 4 * MIB, 4096, 0x22)?;
        rig.vm.zero("vda", 4 * MIB + 4096, MIB)?;
        rig.backup(backup, json!({"type": mode}))?;
        let then = rig.vm.remember("vda")?;
        let transfer = format!("{backup}-vda");
        File::options().create(true).append(true).open(&image)?;
        restore(&rig.ticket(&transfer)?, mode == "Incremental", &image)?;
        compare(&then, &image, "raw")?;
        // QEMU copies 64 KiB out of the way: its export calls their zeroes data from here on
        rig.vm.write("vda", 4 * MIB + 8192, 512, 0x33)?;
        rig.state("vmbackup", backup, "Finalized")?;
        rig.phase("vmbackup", backup, "Succeeded")?;
        assert_eq!(rig.phase("imagetransfer", &transfer, "Succeeded")?["progress"], "100%", "{backup}");
        rig.made("vmcheckpoint", &rig.checkpoint_of(backup)?);
    }
    rig.host_is_clean()
}

#[test]
fn a_transfer_is_paused_and_goes_on_with_the_same_ticket() -> Result<()> {
    let rig = Rig::running("paused", small())?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.backup("paused-1", json!({}))?;
    let transfer = "paused-1-vda";
    let ticket = rig.ticket(transfer)?;
    let then = rig.vm.remember("vda")?;
    assert_eq!(ticket.curl(&[])?, "200");
    let spec = |spec: serde_json::Value| {
        rig.kubectl(&["patch", "imgt", transfer, "--type=merge", "-p", &json!({"spec": spec}).to_string()])
    };

    // the time of the pause does not count
    spec(json!({"inactivityTimeoutSeconds": 5, "state": "Paused"}))?;
    let status = rig.phase("imagetransfer", transfer, "Paused")?;
    assert_eq!(status["ticketSecret"], ticket.secret.as_str(), "it stays the same");
    let answer = rig.files.path().join("answer");
    assert_eq!(ticket.curl(&["-o", &answer.to_string_lossy()])?, "403");
    let answer = std::fs::read_to_string(&answer)?;
    assert!(answer.contains("expired"), "as imageio says it: {answer}");
    let paused = Instant::now();
    wait_until(BOUND, "more than its time to pass", || Ok((paused.elapsed().as_secs() >= 6).then_some(())))?;
    rig.state("imagetransfer", transfer, "Running")?;
    rig.phase("imagetransfer", transfer, "Ready")?;
    assert_eq!(ticket.curl(&[])?, "200");

    spec(json!({"inactivityTimeoutSeconds": 1, "timeoutPolicy": "Pause"}))?;
    rig.phase("imagetransfer", transfer, "Paused")?;
    let message = rig.reason("imagetransfer", transfer, "Paused")?;
    assert!(message.contains("no request for 1 s"), "{message}");
    assert_eq!(ticket.curl(&[])?, "403");
    // oVirt's extend
    spec(json!({"inactivityTimeoutSeconds": 600}))?;
    rig.phase("imagetransfer", transfer, "Ready")?;
    assert_eq!(ticket.curl(&[])?, "200");
    rig.read(transfer, &then)?;
    rig.state("vmbackup", "paused-1", "Finalized")?;
    rig.phase("vmbackup", "paused-1", "Succeeded")?;
    rig.made("vmcheckpoint", &rig.checkpoint_of("paused-1")?);
    rig.phase("imagetransfer", transfer, "Succeeded").map(drop)
}

#[test]
fn a_transfer_that_nobody_uses_ends_and_its_backup_does_not() -> Result<()> {
    let rig = Rig::running("unused", small())?;
    rig.backup("unused-1", json!({"transfers": "Manual"}))?;
    let once = json!({"backup": "unused-1", "disk": "vda", "inactivityTimeoutSeconds": 1});
    rig.transfer("unused-t", &once)?;
    rig.phase("imagetransfer", "unused-t", "Cancelled")?;
    rig.reason("imagetransfer", "unused-t", "TransferInactive")?;
    assert_eq!(rig.get("vmbackup", "unused-1")?["status"]["phase"], "Ready");
    // one that waits paused from its birth has no ticket yet
    rig.transfer("unused-p", &json!({"backup": "unused-1", "disk": "vda", "state": "Paused"}))?;
    assert!(rig.phase("imagetransfer", "unused-p", "Paused")?["ticketSecret"].is_null());
    rig.state("imagetransfer", "unused-p", "Running")?;
    assert_eq!(rig.ticket("unused-p")?.curl(&[])?, "200");
    rig.state("vmbackup", "unused-1", "Cancelled")?;
    rig.phase("vmbackup", "unused-1", "Failed")?;
    rig.phase("imagetransfer", "unused-p", "Cancelled")?;
    rig.host_is_clean()
}
