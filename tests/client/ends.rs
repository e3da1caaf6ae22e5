//! The client ends in the middle: by a kill, by Ctrl-C.

use anyhow::{Result, ensure};
use rustix::process::Signal;
use virtmark_bed::{Disk, compare};

use super::process::{Client, remember};
use super::rig::{MIB, Rig};

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
