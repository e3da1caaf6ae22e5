//! A reader goes on with the ticket it has, whatever dies; what was not served is never claimed to be.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use virtmark_bed::wait_until;

use super::rig::{BOUND, MIB, Rig, Ticket, small};

/// Reads a disk of a backup that was finalized before, and waits for its success: it comes as soon as all was served that must be,
/// and cuts what is read beyond that.
pub(super) fn read_finalized(rig: &Rig, backup: &str, transfer: &str, remembered: &Path) -> Result<()> {
    let read = rig.read(transfer, remembered);
    rig.phase("vmbackup", backup, "Succeeded").with_context(|| format!("it was read: {read:?}"))?;
    let differs = read.err().filter(|error| error.to_string().contains("differs from"));
    differs.map_or(Ok(()), Err)
}

#[test]
fn a_reader_goes_on_with_its_ticket_and_coverage_claims_no_more_than_was_served() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, "reader", small())?;
    rig.vm.write("vda", 0, 48 * MIB, 0x11)?;
    for (number, until) in [(1, 1), (2, 24 * MIB)] {
        let name = format!("reader-{number}");
        rig.backup(&name, json!({}))?;
        let ticket = rig.ticket(&format!("{name}-vda"))?;
        let then = rig.vm.remember("vda")?;
        rig.vm.write("vda", 0, MIB, 0xee)?;

        let image = rig.files.path().join(format!("{name}.raw"));
        let mut curl = start(&ticket, &image)?;
        let size = || fs::metadata(&image).map_or(0, |file| file.len());
        wait_until(BOUND, "bytes to come", || Ok((size() >= until).then_some(())))?;
        rig.bed.agents[1].restart(&[])?;
        rig.bed.store()?;
        let cut = curl.wait()?;
        let got = size();
        ensure!(!cut.success(), "the read was not cut: {got} bytes");

        wait_until(BOUND, "the agent to serve again", || Ok(ticket.curl(&["-H", "Range: bytes=0-0"]).ok()))?;
        ensure!(rig.get("vmbackup", &name)?["status"]["phase"] == "Ready");
        rig.state("vmbackup", &name, "Finalized")?;
        let message = rig.reason("vmbackup", &name, "TransfersIncomplete")?;
        let missing: u64 = message
            .split("vda: ")
            .nth(1)
            .and_then(|text| text.split(' ').next())
            .context("no count")?
            .parse()?;
        ensure!(missing + got >= 48 * MIB, "{missing} bytes are missing, but only {got} were received");

        // the rest, from where it was cut
        let rest = rig.files.path().join("rest.raw");
        let range = format!("Range: bytes={got}-{}", 64 * MIB - 1);
        ensure!(ticket.curl(&["-H", &range, "-o", &rest.to_string_lossy()])? == "206");
        append(&image, &rest)?;
        virtmark_bed::compare(&then, &image, "raw")?;
        // what was served, and not stored when the agent died, must be read once more
        read_finalized(&rig, &name, &format!("{name}-vda"), &then)?;
        rig.host_is_clean()?;
    }

    // gone while nobody was looking: the successor cleans the host all the same
    rig.backup("reader-3", json!({}))?;
    rig.phase("vmbackup", "reader-3", "Ready")?;
    assert_eq!(rig.bitmaps("vda")?.len(), 3);
    rig.bed.agents[1].kill();
    let unheld = r#"{"metadata":{"finalizers":null}}"#;
    rig.kubectl(&["patch", "vmbackup", "reader-3", "--type=merge", "-p", unheld])?;
    rig.delete("vmbackup", "reader-3")?;
    rig.bed.agents[1].restart(&[])?;
    rig.bed.store()?;
    wait_until(BOUND, "the host to be cleaned after an object that is gone", || {
        let job = rig.vm.hypervisor().virsh(&["domjobinfo", "reader"])?;
        Ok((job.contains("None") && rig.bitmaps("vda")?.len() == 2).then_some(()))
    })?;
    rig.host_is_clean()
}

#[test]
fn an_agent_that_is_told_to_stop_answers_to_the_end_and_its_successor_knows() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, "graceful", small())?;
    rig.vm.write("vda", 0, 48 * MIB, 0x11)?;
    rig.backup("graceful-1", json!({}))?;
    let ticket = rig.ticket("graceful-1-vda")?;
    let image = rig.files.path().join("graceful.raw");
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--limit-rate", "8M", "--max-time", "60", "-r", "0-25165823", "--cacert"])
        .arg(&ticket.ca);
    let mut reader = curl.arg("-o").arg(&image).arg(&ticket.url).spawn()?;
    let size = || fs::metadata(&image).map_or(0, |file| file.len());
    wait_until(BOUND, "bytes to come", || Ok((size() > 0).then_some(())))?;

    rig.bed.agents[1].process.signal(Signal::TERM);
    wait_until(BOUND, "the agent to take nobody else", || {
        Ok(ticket.curl(&["-H", "Range: bytes=0-0"]).is_err().then_some(()))
    })?;
    ensure!(reader.try_wait()?.is_none(), "the read had ended before: nothing was shown");
    ensure!(reader.wait()?.success(), "the read was cut after {} bytes", size());
    ensure!(size() == 24 * MIB, "{} bytes", size());
    wait_until(BOUND, "the agent to end", || Ok((!rig.bed.agents[1].process.is_alive()).then_some(())))?;
    ensure!(!rig.bed.agents[1].log().contains("panicked"), "{}", rig.bed.agents[1].log());

    // paused while there was no agent, and over the next one's restart
    rig.state("imagetransfer", "graceful-1-vda", "Paused")?;
    rig.bed.agents[1].restart(&[])?;
    rig.bed.store()?;
    rig.phase("imagetransfer", "graceful-1-vda", "Paused")?;
    for _ in 0..2 {
        wait_until(BOUND, "the agent to refuse", || {
            let said = ticket.curl(&["-H", "Range: bytes=0-0"]).ok();
            ensure!(said.as_deref().is_none_or(|said| said == "403"), "a paused ticket answers {said:?}");
            Ok(said)
        })?;
        rig.bed.agents[1].restart(&[])?;
        rig.bed.store()?;
    }
    rig.state("imagetransfer", "graceful-1-vda", "Running")?;
    wait_until(BOUND, "the agent to serve again", || {
        Ok(ticket.curl(&["-H", "Range: bytes=0-0"]).ok().filter(|said| said == "206"))
    })?;
    rig.state("vmbackup", "graceful-1", "Finalized")?;
    let message = rig.reason("vmbackup", "graceful-1", "TransfersIncomplete")?;
    ensure!(message.contains(&format!("vda: {} bytes", 24 * MIB)), "nothing served is forgotten: {message}");
    ensure!(ticket.curl(&["-r", "25165824-50331647"])? == "206");
    rig.phase("vmbackup", "graceful-1", "Succeeded")?;
    rig.host_is_clean()
}

#[test]
fn a_stored_ticket_that_permits_more_is_not_believed() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, "forged", small())?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.backup("forged-1", json!({}))?;
    let before = rig.ticket("forged-1-vda")?;
    rig.bed.agents[1].kill();
    let state = rig.vm.hypervisor().dir.join("agent/state");
    let found = Command::new("find").arg(&state).args(["-name", "ticket-*.json"]).output()?;
    let found = String::from_utf8(found.stdout)?;
    let file = Path::new(found.trim());
    let mut stored: serde_json::Value = serde_json::from_slice(&fs::read(file)?)?;
    ensure!(stored["ticket"]["access"] == "Read", "the ticket is elsewhere: {found}");
    stored["ticket"]["access"] = json!({"Write": {"sparse": false}});
    fs::write(file, serde_json::to_vec(&stored)?)?;

    rig.bed.agents[1].restart(&[])?;
    rig.bed.store()?;
    let made = |status: &serde_json::Value| Ok(status["ticketSecret"] != before.secret.as_str());
    rig.until("imagetransfer", "forged-1-vda", "have another ticket", made)?;
    ensure!(before.curl(&[])? == "403", "the ticket that was changed answers");
    let put = ["-X", "PUT", "-d", "x"];
    ensure!(rig.ticket("forged-1-vda")?.curl(&put)? == "403", "the new one permits to write");
    ensure!(rig.ticket("forged-1-vda")?.curl(&[])? == "200");
    rig.state("vmbackup", "forged-1", "Finalized")?;
    rig.phase("vmbackup", "forged-1", "Succeeded")?;
    wait_until(BOUND, "both Secrets to be gone", || Ok(rig.list("secrets", "")?.is_empty().then_some(())))?;
    rig.host_is_clean()
}

/// curl of a whole disk at 16 MiB a second.
fn start(ticket: &Ticket, image: &Path) -> Result<std::process::Child> {
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--limit-rate", "16M", "--max-time", "60", "--cacert"]).arg(&ticket.ca);
    Ok(curl.arg("-o").arg(image).arg(&ticket.url).stderr(Stdio::null()).spawn()?)
}

fn append(image: &Path, rest: &Path) -> Result<()> {
    let mut bytes = Vec::new();
    fs::File::open(rest)?.read_to_end(&mut bytes)?;
    let mut file = fs::OpenOptions::new().write(true).open(image)?;
    file.seek(SeekFrom::End(0))?;
    std::io::Write::write_all(&mut file, &bytes)?;
    Ok(())
}
