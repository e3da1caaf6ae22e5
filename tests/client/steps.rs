//! The steps of a backup one by one, what would be read, and what is refused.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::compare;

use super::process::{Client, remember};
use super::rig::{MIB, Rig, small};

#[test]
fn a_backup_step_by_step() -> Result<()> {
    let rig = Rig::running("clisteps", small())?;
    let client = Client::of(&rig);
    rig.vm.write("vda", 3 * MIB, 2 * MIB, 0x41)?;
    let then = remember(&rig, "vda", "first")?;
    let first = client.done(&["backup", "start", "clisteps"])?.out.trim().to_owned();
    client.note(&first);
    rig.phase("vmbackup", &first, "Ready")?;
    rig.vm.write("vda", 0, MIB, 0x42)?;
    let download = ["download", "clisteps", "--backup", &first];
    let point = client.take(&download)?;
    compare(&then, &point.file("vda"), "qcow2")?;
    assert_eq!(point.manifest["backup"]["outcome"], "Read");
    rig.phase("vmbackup", &first, "Ready")?;
    for _ in 0..2 {
        client.done(&["backup", "stop", "clisteps", &first])?;
    }
    rig.phase("vmbackup", &first, "Succeeded")?;
    // once it has ended there is nothing to read
    let said = client.run(&[&["backup"], &download[..], &["--to", client.path()]].concat())?;
    assert_eq!(said.code, 4, "{}", said.err);

    let then = remember(&rig, "vda", "second")?;
    let would = client.done(&["backup", "clisteps", "--dry-run", "--to", client.path()])?.out;
    ensure!(would.contains(&format!("incremental, over {first}")) && would.contains("vda: "), "{would}");
    assert_eq!(client.names()?, std::slice::from_ref(&first), "nothing was made");
    let next = client.take(&["clisteps"])?;
    assert_eq!(next.mode("vda"), "Incremental");
    compare(&then, &next.file("vda"), "qcow2")?;

    // raw files are whole, and an incremental lies over them too
    let raw = client.take(&["full", "clisteps", "--format", "raw"])?;
    compare(&then, &raw.file("vda"), "raw")?;
    rig.vm.zero("vda", 3 * MIB, MIB)?;
    let then = remember(&rig, "vda", "third")?;
    let over = client.take(&["incremental", "clisteps"])?;
    assert_eq!(over.disk("vda")["base"], json!({"file": "vda.full.raw", "format": "raw"}));
    compare(&then, &over.file("vda"), "qcow2")?;
    client.done(&["verify", client.path()])?;
    rig.host_is_clean()?;

    // one of them alone, and one disk of it in another format
    client.done(&["verify", &over.folder.to_string_lossy()])?;
    let to = rig.files.path().join("restored");
    let to_words = to.to_string_lossy();
    let which = ["--point", &over.name(), "--to", &to_words, "--format", "qcow2", "--disk", "vda"];
    client.done(&[&["restore", client.path()], &which[..]].concat())?;
    compare(&then, &to.join("vda.qcow2"), "qcow2")?;
    let said = client.run(&[&["restore", client.path()], &which[..]].concat())?;
    assert_eq!(said.code, 2, "it is there already: {}", said.err);
    for output in ["table", "wide", "yaml"] {
        let listed = client.done(&["chain", "list", client.path(), "-o", output])?.out;
        ensure!(listed.contains(&over.name()), "{output}: {listed}");
    }
    let given_up = client.done(&["backup", "start", "clisteps"])?.out.trim().to_owned();
    client.note(&given_up);
    for _ in 0..2 {
        client.done(&["backup", "stop", "--cancel", "clisteps", &given_up])?;
    }
    rig.reason("vmbackup", &given_up, "Cancelled")?;

    // what is there, for people and for programs
    let vms = client.done(&["vms", "-o", "name"])?.out;
    ensure!(vms.lines().any(|line| line == "clisteps"), "{vms}");
    let disks: Value = serde_json::from_str(&client.done(&["disks", "clisteps", "-o", "json"])?.out)?;
    assert_eq!((&disks[0]["target"], &disks[0]["backup"]), (&json!("vda"), &json!("Incremental")));
    let said = client.done(&["explain", &over.name()])?.out;
    ensure!(said.contains("It Succeeded") && said.contains("vda is read incrementally, from"), "{said}");
    let names = || -> Result<Vec<String>> {
        let listed = client.done(&["checkpoint", "list", "clisteps", "-o", "name"])?.out;
        Ok(listed.lines().map(str::to_owned).collect())
    };
    let all = names()?;
    assert_eq!(all.len(), 4);
    let would = client.done(&["checkpoint", "purge", "clisteps", "--keep", "2", "--dry-run"])?.out;
    assert_eq!(would.lines().collect::<Vec<_>>(), all[..2]);
    assert_eq!(names()?, all);
    client.done(&["checkpoint", "purge", "clisteps", "--keep", "2"])?;
    assert_eq!(names()?, all[2..]);
    client.done(&["checkpoint", "delete", &all[2], &all[3]])?;
    assert!(rig.bitmaps("vda")?.is_empty());
    assert_eq!(client.run(&["checkpoint", "delete", &all[0]])?.code, 3);
    // without a checkpoint the next one is full
    let then = remember(&rig, "vda", "fourth")?;
    let anew = client.take(&["clisteps"])?;
    assert_eq!(anew.mode("vda"), "Full");
    compare(&then, &anew.file("vda"), "qcow2")
}

#[test]
fn what_is_refused_says_why_and_leaves_nothing() -> Result<()> {
    let rig = Rig::off("clirefused", small())?;
    let client = Client::of(&rig);
    let to = ["--to", client.path()];
    let fails = |arguments: &[&str], code: i32, words: &str| -> Result<()> {
        let said = client.run(&[&["backup"], arguments, &to].concat())?;
        assert_eq!(said.code, code, "{arguments:?}: {}", said.err);
        ensure!(said.err.contains(words), "{arguments:?}: {}", said.err);
        assert_eq!(client.names()?, Vec::<String>::new());
        Ok(())
    };
    fails(&["nothing"], 3, "kubectl get lvd")?;
    fails(&["incremental", "clirefused"], 3, "virtmark backup full")?;
    fails(&["incremental", "clirefused", "--format", "raw"], 2, "--format raw")?;
    // it is off, and stays so
    fails(&["clirefused", "--start-seconds", "2"], 4, "StartDeadlineExceeded")?;
    rig.vm.start()?;
    rig.published("Running")?;
    fails(&["clirefused", "--disk", "vdz"], 4, "DiskNotFound")?;
    for backup in rig.list("vmbackup", "")? {
        if backup["spec"]["vm"] == "clirefused" {
            client.note(backup["metadata"]["name"].as_str().unwrap_or_default());
        }
    }
    Ok(())
}
