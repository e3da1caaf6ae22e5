//! The client ends in the middle: by a kill, by Ctrl-C; and what it left is gone on with, or kept, or is no more.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use virtmark_bed::{Disk, compare};

use super::process::{Client, Running, remember};
use super::rig::{BOUND, MIB, Rig};

/// A VM with enough data to be caught in the middle.
fn large(name: &str) -> Result<Rig> {
    let rig = Rig::running(name, [Disk::qcow2("vda", 512 * MIB)])?;
    for part in 0..4 {
        rig.vm.write("vda", part * 120 * MIB, 100 * MIB, 0x31)?;
    }
    Ok(rig)
}

#[test]
fn a_client_that_is_killed_leaves_no_backup_and_its_successor_goes_on() -> Result<()> {
    let rig = large("clikilled")?;
    let client = Client::of(&rig);
    let then = remember(&rig, "vda", "killed")?;
    let arguments = ["backup", "clikilled", "--max-workers", "1", "--to", client.path()];
    let mut running = client.start(&arguments)?;
    let backup = client.reads(&mut running, "vda.full.qcow2", 40 * MIB)?;
    running.signal(Signal::KILL)?;
    running.end()?;
    assert_eq!(client.names()?, [format!(".{backup}.partial")], "nothing that looks complete");
    for command in ["verify", "restore"] {
        let to = rig.files.path().join("no");
        let to = to.to_string_lossy();
        let more: &[&str] = if command == "restore" { &["--to", &to] } else { &[] };
        let said = client.run(&[&[command, client.path()], more].concat())?;
        assert_eq!(said.code, 3, "{command}: {}", said.err);
    }
    // one that is asked for otherwise is another one, and takes nothing of it
    let said = client.run(&[&arguments[..], &["--owner", "another"]].concat())?;
    assert_eq!(said.code, 2, "{}", said.err);
    ensure!(said.err.contains("another --owner"), "{}", said.err);
    assert_eq!(client.names()?, [format!(".{backup}.partial")]);
    // what the guest writes now is not in it
    rig.vm.write("vda", 0, MIB, 0x77)?;
    let said = client.done(&arguments)?;
    ensure!(said.err.contains("Going on with"), "{}", said.err);
    let point = client.point(said.out.trim())?;
    assert_eq!(point.name(), backup);
    compare(&then, &point.file("vda"), "qcow2")?;
    client.done(&["verify", client.path()])?;
    rig.host_is_clean()?;
    // and the next one lies over it
    let then = remember(&rig, "vda", "after")?;
    let next = client.take(&["clikilled"])?;
    assert_eq!(next.mode("vda"), "Incremental");
    compare(&then, &next.file("vda"), "qcow2")
}

#[test]
fn ctrl_c_cancels_the_backup_and_leaves_nothing() -> Result<()> {
    let rig = large("cliinterrupted")?;
    let client = Client::of(&rig);
    let arguments = ["backup", "full", "cliinterrupted", "--max-workers", "1", "--to", client.path()];
    let mut running = client.start(&arguments)?;
    let backup = client.reads(&mut running, "vda.full.qcow2", 40 * MIB)?;
    client.note(&backup);
    running.signal(Signal::INT)?;
    let said = running.end()?;
    assert_eq!(said.code, 130, "{}", said.err);
    assert_eq!(client.names()?, Vec::<String>::new(), "{}", said.err);
    rig.phase("vmbackup", &backup, "Failed")?;
    rig.reason("vmbackup", &backup, "Cancelled")?;
    rig.host_is_clean()
}

/// Stops a client that has read all, and has its VmBackup succeed meanwhile; the VmBackup's name.
fn succeeds_behind(rig: &Rig, client: &Client<'_>, running: &mut Running) -> Result<String> {
    let began = Instant::now();
    // at once: it is about to finalize, and the end of that is not waited for
    while !running.words().contains("vda is read") {
        if let Some(code) = running.ended()? {
            bail!("it ended with {code} before: {}", running.words());
        }
        ensure!(began.elapsed() < BOUND, "it does not read: {}", running.words());
        std::thread::park_timeout(Duration::from_millis(1));
    }
    running.signal(Signal::STOP)?;
    let names = client.names()?;
    let name = names.first().map(|name| name.trim_matches('.').trim_end_matches(".partial").to_owned());
    let backup = name.unwrap_or_default();
    assert_eq!(names, [format!(".{backup}.partial")], "it was stopped too late: {}", running.words());
    client.note(&backup);
    rig.state("vmbackup", &backup, "Finalized")?;
    rig.phase("vmbackup", &backup, "Succeeded")?;
    Ok(backup)
}

#[test]
fn ctrl_c_that_comes_too_late_keeps_what_was_read() -> Result<()> {
    let rig = large("clitoolate")?;
    let client = Client::of(&rig);
    let then = remember(&rig, "vda", "toolate")?;
    let mut running = client.start(&["backup", "full", "clitoolate", "--to", client.path()])?;
    let backup = succeeds_behind(&rig, &client, &mut running)?;
    running.signal(Signal::INT)?;
    running.signal(Signal::CONT)?;
    let said = running.end()?;
    assert_eq!(said.code, 0, "{}", said.err);
    let point = client.point(said.out.trim())?;
    assert_eq!((point.name(), &point.manifest["backup"]["outcome"]), (backup, &json!("Succeeded")));
    compare(&then, &point.file("vda"), "qcow2")?;
    client.done(&["verify", client.path()])?;
    // the next one lies over it: the server took it for kept, and so it is
    let then = remember(&rig, "vda", "next")?;
    let next = client.take(&["incremental", "clitoolate"])?;
    compare(&then, &next.file("vda"), "qcow2")
}

#[test]
fn what_was_read_of_a_backup_that_succeeded_outlives_client_and_object() -> Result<()> {
    let rig = large("cligone")?;
    let client = Client::of(&rig);
    let then = remember(&rig, "vda", "gone")?;
    let arguments = ["backup", "cligone", "--to", client.path()];
    let mut running = client.start(&arguments)?;
    let backup = succeeds_behind(&rig, &client, &mut running)?;
    running.signal(Signal::KILL)?;
    running.end()?;
    rig.delete("vmbackup", &backup)?;
    let said = client.done(&arguments)?;
    let point = client.point(said.out.trim())?;
    assert_eq!(point.name(), backup);
    // as it was seen last
    ensure!(["Read", "Succeeded"].map(Value::from).contains(&point.manifest["backup"]["outcome"]));
    compare(&then, &point.file("vda"), "qcow2")?;
    let then = remember(&rig, "vda", "next")?;
    let next = client.take(&["incremental", "cligone"])?;
    compare(&then, &next.file("vda"), "qcow2")
}

#[test]
fn a_backup_that_has_the_name_of_an_earlier_one_is_read_from_its_begin() -> Result<()> {
    let rig = large("cliagain")?;
    let client = Client::of(&rig);
    let name = "cliagain-mine";
    let arguments =
        ["backup", "download", "cliagain", "--backup", name, "--max-workers", "1", "--to", client.path()];
    rig.backup(name, json!({"vm": "cliagain"}))?;
    rig.phase("vmbackup", name, "Ready")?;
    let mut running = client.start(&arguments)?;
    client.reads(&mut running, "vda.full.qcow2", 60 * MIB)?;
    running.signal(Signal::KILL)?;
    running.end()?;
    rig.delete("vmbackup", name)?;
    // what was read is of before
    rig.vm.write("vda", 0, 100 * MIB, 0x99)?;
    let then = remember(&rig, "vda", "again")?;
    rig.backup(name, json!({"vm": "cliagain"}))?;
    rig.phase("vmbackup", name, "Ready")?;
    let said = client.done(&arguments)?;
    ensure!(said.err.contains("Removing what is left"), "{}", said.err);
    compare(&then, &client.point(said.out.trim())?.file("vda"), "qcow2")?;
    client.done(&["backup", "stop", "cliagain", name])?;
    rig.host_is_clean()
}
