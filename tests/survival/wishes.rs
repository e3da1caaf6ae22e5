//! Wishes that race: finalize with cancel, and edits of the spec in every phase. What stands in the spec is what came of
//! it, and every edit is answered.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::jiff::Timestamp;
use rand::Rng as _;
use serde_json::{Value, json};
use virtmark::killpoint::PAUSE_VARIABLE;
use virtmark::step::Step;
use virtmark_bed::{Disk, wait_until};

use super::history::History;
use super::rig::{BOUND, MIB, Rig};

const ROUNDS: usize = 4;

#[test]
fn what_stands_in_the_spec_is_what_came_of_it() -> Result<()> {
    let _alone = super::alone();
    let rigs =
        ["torn-a", "torn-b", "torn-c"].map(|name| Rig::running_on(1, name, [Disk::qcow2("vda", 8 * MIB)]));
    let mut rigs = rigs.into_iter().collect::<Result<Vec<_>>>()?;
    let history = History::watch(&rigs.first().context("none")?.bed)?;
    let history = &history;
    let mut ends = Vec::new();
    for round in 0..ROUNDS {
        let ended = std::thread::scope(|scope| {
            let torn: Vec<_> =
                rigs.iter_mut().map(|rig| scope.spawn(move || tear(rig, history, round))).collect();
            torn.into_iter()
                .map(|one| one.join().unwrap_or_else(|_| bail!("a round died")))
                .collect::<Result<Vec<_>>>()
        })?;
        ends.extend(ended.into_iter().flatten());
    }
    let finalized = ends.iter().filter(|finalized| **finalized).count();
    println!(
        "{} races of finalize and cancel: finalized {finalized}, cancelled {}; {} versions, none went back",
        ends.len(),
        ends.len() - finalized,
        history.check()?
    );
    Ok(())
}

/// One backup and one more transfer of it, each finalized and cancelled at once. Whether they were finalized.
fn tear(rig: &Rig, history: &History, round: usize) -> Result<[bool; 2]> {
    let name = format!("{}-{round}", rig.vm.name);
    let transfer = format!("{name}-more");
    rig.backup(&name, json!({"quiesce": {"mode": "None"}}))?;
    rig.transfer(&transfer, &json!({"backup": name, "disk": "vda"}))?;
    rig.phase("vmbackup", &name, "Ready")?;
    rig.phase("imagetransfer", &transfer, "Ready")?;
    race(rig, "imagetransfer", &transfer)?;
    let transferred = judge(rig, history, "ImageTransfer", &transfer)?;
    race(rig, "vmbackup", &name)?;
    let finalized = judge(rig, history, "VmBackup", &name)?;
    wait_until(BOUND, "the bitmap to stay or go", || {
        Ok((rig.bitmaps("vda")?.len() == usize::from(finalized)).then_some(()))
    })?;
    rig.host_is_clean()?;
    if let Some(checkpoint) = rig.get("vmbackup", &name)?["status"]["toCheckpoint"].as_str() {
        rig.kubectl(&["delete", "vmcheckpoint", checkpoint, "--ignore-not-found", "--timeout=30s"])?;
    }
    Ok([transferred, finalized])
}

/// Both wishes, each after a moment of its own; one may be refused.
fn race(rig: &Rig, kind: &str, name: &str) -> Result<()> {
    let [first, second] = [(); 2].map(|()| Duration::from_millis(rand::rng().random_range(0..120)));
    std::thread::scope(|scope| {
        let wish = |state: &'static str, after: Duration| {
            let kubectl = rig.bed.kubectl();
            scope.spawn(move || {
                sleep(after);
                let patch = json!({"spec": {"state": state}}).to_string();
                let (kind, name) = (kind.to_owned(), name.to_owned());
                kubectl.run(&["-n", "vms", "patch", &kind, &name, "--type=merge", "-p", &patch])
            })
        };
        let (finalize, cancel) = (wish("Finalized", first), wish("Cancelled", second));
        let (finalized, cancelled) = (finalize.join(), cancel.join());
        match finalized {
            Ok(Err(error)) if !error.to_string().contains("state goes one way") => return Err(error),
            Err(_) => bail!("a patch died"),
            _ => {}
        }
        // a cancel is never refused
        cancelled.unwrap_or_else(|_| bail!("a patch died")).map(drop)
    })
}

/// Whether it was finalized; an error when that does not agree with the spec.
fn judge(rig: &Rig, history: &History, kind: &str, name: &str) -> Result<bool> {
    let ended = wait_until(BOUND, &format!("{kind} {name} to end"), || {
        let object = rig.get(kind, name)?;
        let phase = object["status"]["phase"].as_str().unwrap_or_default();
        let answered = object["status"]["observedGeneration"] == object["metadata"]["generation"];
        Ok((answered && ["Succeeded", "Failed", "Cancelled"].contains(&phase)).then_some(object.clone()))
    })?;
    history.check()?;
    let succeeded = ended["status"]["phase"] == "Succeeded";
    ensure!(ended["spec"]["state"] == "Cancelled", "a cancel that was not refused does not stand: {ended}");
    let versions = history.versions(kind, name);
    let first =
        versions.iter().find(|version| version["spec"]["state"] == "Cancelled").context("no cancel")?;
    let phase = first["status"]["phase"].as_str().unwrap_or_default();
    // a cancel is obeyed unless the finalize was obeyed before it, and the status said so
    let too_late = phase == "Finalizing" || phase == "Succeeded";
    ensure!(succeeded == too_late, "{kind} {name} was {phase} when it was cancelled, and is {ended}");
    let wished = versions.iter().any(|version| version["spec"]["state"] == "Finalized");
    ensure!(!succeeded || wished, "{kind} {name} succeeded, and nobody had finalized it");
    Ok(succeeded)
}

#[test]
fn every_edit_is_answered_or_refused_in_every_phase() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::off_on(1, "edited", [Disk::qcow2("vda", 16 * MIB)])?;
    let history = History::watch(&rig.bed)?;
    rig.backup("edited-1", json!({"disks": ["vda"], "quiesce": {"mode": "None"}, "transfers": "Manual"}))?;
    rig.reason("vmbackup", "edited-1", "VmNotRunning")?;
    rig.transfer("edited-t", &json!({"backup": "edited-1", "disk": "vda"}))?;
    edit_all(&rig, "waiting")?;

    // bound, and its agent stands still: answered once it goes on
    rig.bed.agents[1].restart(&[(PAUSE_VARIABLE, Step::BeginIntended.as_str())])?;
    rig.bed.store()?;
    rig.vm.start()?;
    let agent = rig.bed.agents[1].process.clone();
    wait_until(BOUND, "the agent to stand still", || Ok(agent.is_paused().then_some(())))?;
    edit(&rig, json!({"startDeadlineSeconds": 7_201, "clientIdleSeconds": 1_000}))?;
    refuse(&rig, "bound")?;
    rig.vm.write("vda", 0, MIB, 0x33)?;
    rig.bed.agents[1].resume();
    answered(&rig, "bound, after the agent went on")?;
    rig.phase("vmbackup", "edited-1", "Ready")?;
    edit_all(&rig, "Ready")?;

    // a bound that was moved while the agent stood still past the old one is the one that counts
    let ready = rig.get("vmbackup", "edited-1")?["status"]["readyTime"].clone();
    let bound = seconds_since(&ready)? + 10;
    edit(&rig, json!({"readyDeadlineSeconds": bound}))?;
    answered(&rig, "a short bound")?;
    rig.bed.agents[1].pause();
    edit(&rig, json!({"readyDeadlineSeconds": 86_000}))?;
    past(&rig, &ready, bound + 1)?;
    rig.bed.agents[1].resume();
    answered(&rig, "a bound moved in time")?;
    ensure!(
        rig.get("vmbackup", "edited-1")?["status"]["phase"] == "Ready",
        "ended by a bound that was moved"
    );

    // finalized: incomplete, then read
    rig.state("vmbackup", "edited-1", "Finalized")?;
    rig.reason("vmbackup", "edited-1", "TransfersIncomplete")?;
    edit_all(&rig, "finalized, incomplete")?;
    super::readers::read_finalized(&rig, "edited-1", "edited-t", &rig.vm.remember("vda")?)?;
    rig.phase("imagetransfer", "edited-t", "Succeeded")?;
    edit_all(&rig, "Succeeded")?;
    rig.state("imagetransfer", "edited-t", "Cancelled")?;
    answered(&rig, "a transfer that had ended")?;
    ensure!(rig.get("imagetransfer", "edited-t")?["status"]["phase"] == "Succeeded");
    let checkpoint = rig.get("vmbackup", "edited-1")?["status"]["toCheckpoint"].clone();
    let checkpoint = checkpoint.as_str().context("no checkpoint")?;
    let moved = r#"{"spec":{"bitmap":"other"}}"#;
    ensure!(rig.kubectl(&["patch", "vmcheckpoint", checkpoint, "--type=merge", "-p", moved]).is_err());
    edit(&rig, json!({"ttlSecondsAfterFinished": 0}))?;
    rig.gone("vmbackup", "edited-1")?;
    rig.delete("vmcheckpoint", checkpoint)?;

    // never bound, ended, edited
    rig.vm.destroy()?;
    rig.published("Off")?;
    rig.backup("edited-1", json!({"offline": "Refuse", "transfers": "Manual"}))?;
    rig.reason("vmbackup", "edited-1", "VmNotRunning")?;
    rig.phase("vmbackup", "edited-1", "Failed")?;
    edit(&rig, json!({"clientIdleSeconds": 77}))?;
    answered(&rig, "ended, never bound")?;
    println!("{} versions, none went back", history.check()?);
    Ok(())
}

/// Every mutable field but `state`; and every immutable one.
fn edit_all(rig: &Rig, when: &str) -> Result<()> {
    let some = rand::rng().random_range(4_000..50_000);
    for field in
        ["startDeadlineSeconds", "readyDeadlineSeconds", "clientIdleSeconds", "ttlSecondsAfterFinished"]
    {
        edit(rig, json!({field: some}))?;
    }
    answered(rig, when)?;
    refuse(rig, when)
}

fn edit(rig: &Rig, spec: Value) -> Result<()> {
    let patch = json!({"spec": spec}).to_string();
    rig.kubectl(&["patch", "vmbackup", "edited-1", "--type=merge", "-p", &patch]).map(drop)
}

/// Waits until the status answers the newest generation.
fn answered(rig: &Rig, when: &str) -> Result<()> {
    for (kind, name) in [("vmbackup", "edited-1"), ("imagetransfer", "edited-t")] {
        wait_until(BOUND, &format!("{kind} {name} to be answered ({when})"), || {
            let object = rig.get(kind, name)?;
            let (is, seen) = (&object["metadata"]["generation"], &object["status"]["observedGeneration"]);
            Ok((object.is_null() || is == seen).then_some(()))
        })?;
    }
    Ok(())
}

fn refuse(rig: &Rig, when: &str) -> Result<()> {
    let backup = [
        json!({"vm": "other"}),
        json!({"disks": ["vdb"]}),
        json!({"disks": null}),
        json!({"quiesce": {"mode": "Required"}}),
        json!({"quiesce": null}),
        json!({"offline": "Refuse"}),
        json!({"transfers": "Auto"}),
    ];
    let transfer = [json!({"backup": "other"}), json!({"disk": "vdb"}), json!({"protocol": "Nbd"})];
    let both = backup
        .iter()
        .map(|spec| ("vmbackup", "edited-1", spec))
        .chain(transfer.iter().map(|spec| ("imagetransfer", "edited-t", spec)));
    for (kind, name, spec) in both {
        let patch = json!({"spec": spec}).to_string();
        match rig.kubectl(&["patch", kind, name, "--type=merge", "-p", &patch]) {
            Ok(_) => bail!("{when}: {kind} took {patch}"),
            Err(error) => ensure!(error.to_string().contains("immutable"), "{when}: {patch}: {error}"),
        }
    }
    Ok(())
}

/// Waits until `seconds` after a time that a status tells.
fn past(rig: &Rig, time: &Value, seconds: i64) -> Result<()> {
    wait_until(BOUND, &format!("{seconds} s after {time} of {}", rig.vm.name), || {
        Ok((seconds_since(time)? > seconds).then_some(()))
    })
}

fn seconds_since(time: &Value) -> Result<i64> {
    let time: Timestamp = time.as_str().context("no time")?.parse()?;
    Ok(Timestamp::now().as_second() - time.as_second())
}
