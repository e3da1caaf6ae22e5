//! Every kind through every phase, on a real cluster and hypervisor.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark::killpoint::PAUSE_VARIABLE;
use virtmark_bed::{Bed, Disk, Plan, wait_until};

use super::expected::ROWS;
use super::rig::{BOUND, MIB, Rig};
use super::stage::{NODE, Stage};
use super::{golden, health, reapply};

#[test]
fn every_phase_is_what_the_table_says_and_no_manifest_disturbs_it() -> Result<()> {
    let bed = Bed::from_env()?;
    let off = Plan::new("gitops-off").disk(Disk::qcow2("vda", MIB)).define(&bed.hypervisors[NODE])?;
    let rig = Rig::off_on(NODE, "gitops", [Disk::qcow2("vda", 16 * MIB)])?;
    rig.vm.start()?;
    rig.published("Running")?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    let mut stage = Stage::new(rig);
    stage.published("gitops-off", "Off")?;

    unseen(&mut stage)?;
    before_the_agent(&mut stage)?;
    domains(&mut stage)?;
    let manifest = ready(&mut stage)?;
    finalizing(&mut stage)?;
    ended(&mut stage, &manifest)?;
    deleted(&mut stage)?;
    replaced(&mut stage)?;
    drop(off);

    let objects: Vec<&Value> = ROWS.iter().map(|row| &stage.recorded[row.kind][row.state]).collect();
    for (row, answer) in ROWS.iter().zip(health::ask(&health::argocd_cm()?, objects)?) {
        let what = format!("{} {}: {answer:?}", row.kind, row.state);
        ensure!(answer.kstatus.status == row.kstatus, "{what}");
        ensure!(answer.argo.as_ref().is_some_and(|argo| argo.status == row.argo), "{what}");
    }
    golden::settle(&stage.recorded, &stage.rig.bed.dir)
}

/// Nobody has looked at them yet.
fn unseen(stage: &mut Stage) -> Result<()> {
    Stage::stop(&stage.rig.bed.operator)?;
    stage.apply("vmbackup", "VmBackup", "gitops-1", &json!({"vm": "gitops"}))?;
    let nowhere = json!({"backup": "gitops-none", "disk": "vda"});
    stage.apply("imagetransfer", "ImageTransfer", "gitops-nowhere", &nowhere)?;
    stage.record(&[("VmBackup", "unseen", "gitops-1"), ("ImageTransfer", "unseen", "gitops-nowhere")])
}

/// The operator does its part; the agent stands still.
fn before_the_agent(stage: &mut Stage) -> Result<()> {
    Stage::stop(stage.agent())?;
    stage.rig.bed.operator.resume();
    stage.rig.reason("vmbackup", "gitops-1", "Bound")?;
    stage.apply("vmbackup", "VmBackup", "gitops-2", &json!({"vm": "gitops"}))?;
    stage.apply("vmbackup", "VmBackup", "gitops-off", &json!({"vm": "gitops-off"}))?;
    stage.apply("vmbackup", "VmBackup", "gitops-nobody", &json!({"vm": "gitops-nobody"}))?;
    let no_disk = json!({"backup": "gitops-1", "disk": "vdx"});
    stage.apply("imagetransfer", "ImageTransfer", "gitops-vdx", &no_disk)?;
    let rig = &stage.rig;
    rig.reason("vmbackup", "gitops-2", "BackupAlreadyRunning")?;
    rig.reason("vmbackup", "gitops-off", "VmNotRunning")?;
    rig.phase("vmbackup", "gitops-nobody", "Failed")?;
    rig.reason("imagetransfer", "gitops-nowhere", "BackupNotFound")?;
    rig.phase("imagetransfer", "gitops-vdx", "Failed")?;
    wait_until(BOUND, "the transfer to be bound", || {
        let node = rig.get("imagetransfer", "gitops-1-vda")?["status"]["nodeName"].clone();
        Ok((!node.is_null()).then_some(()))
    })?;
    let checkpoint = stage.rig.checkpoint_of("gitops-1")?;
    stage.record(&[
        ("VmBackup", "bound", "gitops-1"),
        ("VmBackup", "waiting-backup-already-running", "gitops-2"),
        ("VmBackup", "waiting-vm-not-running", "gitops-off"),
        ("VmBackup", "failed", "gitops-nobody"),
        ("ImageTransfer", "waiting-backup-not-found", "gitops-nowhere"),
        ("ImageTransfer", "waiting-backup-not-ready", "gitops-1-vda"),
        ("ImageTransfer", "failed", "gitops-vdx"),
        ("VmCheckpoint", "initializing", &checkpoint),
    ])
}

/// What libvirt of this node says, and what agents of other nodes would say.
fn domains(stage: &mut Stage) -> Result<()> {
    let disks = json!([{"target": "vda", "format": "qcow2", "size": MIB, "backup": "Incremental"}]);
    let cdrom = json!([{"target": "sda", "format": "raw", "backup": "Unsupported", "reason": "it is empty"}]);
    for node in ["gitops-node", "gitops-lost"] {
        let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}});
        stage.rig.made("node", node);
        stage.rig.bed.kubectl().apply(&object.to_string())?;
    }
    let uuid = |number: u8| format!("{number:08x}-1111-4111-8111-111111111111");
    stage.sight("gitops-lost", "gitops-node-lost", &uuid(1), "Running", &disks)?;
    stage.sight("gitops-node", "gitops-missing", &uuid(2), "Running", &disks)?;
    stage.rig.kubectl(&["delete", "node", "gitops-lost"])?;
    stage.unsight("gitops-missing")?;
    stage.sight("gitops-node", "gitops-paused", &uuid(3), "Paused", &disks)?;
    stage.sight("gitops-node", "gitops-busy", &uuid(4), "Busy", &disks)?;
    stage.sight("gitops-node", "gitops-unsupported", &uuid(5), "Running", &cdrom)?;
    stage.published("gitops-missing", "Missing")?;
    stage.published("gitops-node-lost", "NodeLost")?;
    stage.record(&[
        ("LibvirtDomain", "running", "gitops"),
        ("LibvirtDomain", "off", "gitops-off"),
        ("LibvirtDomain", "paused", "gitops-paused"),
        ("LibvirtDomain", "busy", "gitops-busy"),
        ("LibvirtDomain", "unsupported", "gitops-unsupported"),
        ("LibvirtDomain", "missing", "gitops-missing"),
        ("LibvirtDomain", "node-lost", "gitops-node-lost"),
    ])
}

/// The agent works, until it has ended a job.
fn ready(stage: &mut Stage) -> Result<Value> {
    stage.agent().restart(&[(PAUSE_VARIABLE, "JobAborted")])?;
    stage.rig.bed.store()?;
    let of_first = |more: Value| {
        let mut spec = json!({"backup": "gitops-1", "disk": "vda"});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    stage.apply("imagetransfer", "ImageTransfer", "gitops-nbd", &of_first(json!({"protocol": "Nbd"})))?;
    stage.apply("imagetransfer", "ImageTransfer", "gitops-cancelled", &of_first(json!({})))?;
    stage.apply("imagetransfer", "ImageTransfer", "gitops-succeeded", &of_first(json!({})))?;
    let paused = of_first(json!({"state": "Paused"}));
    stage.apply("imagetransfer", "ImageTransfer", "gitops-paused", &paused)?;
    let rig = &stage.rig;
    rig.phase("vmbackup", "gitops-1", "Ready")?;
    rig.phase("imagetransfer", "gitops-paused", "Paused")?;
    for transfer in ["gitops-1-vda", "gitops-nbd", "gitops-cancelled", "gitops-succeeded"] {
        rig.phase("imagetransfer", transfer, "Ready")?;
    }
    stage.record(&[
        ("VmBackup", "ready", "gitops-1"),
        ("ImageTransfer", "ready", "gitops-1-vda"),
        ("ImageTransfer", "ready-nbd", "gitops-nbd"),
        ("ImageTransfer", "paused", "gitops-paused"),
    ])?;

    let rig = &stage.rig;
    rig.state("imagetransfer", "gitops-cancelled", "Cancelled")?;
    rig.state("imagetransfer", "gitops-succeeded", "Finalized")?;
    rig.phase("imagetransfer", "gitops-cancelled", "Cancelled")?;
    rig.phase("imagetransfer", "gitops-succeeded", "Succeeded")?;
    stage.record(&[
        ("ImageTransfer", "cancelled", "gitops-cancelled"),
        ("ImageTransfer", "succeeded", "gitops-succeeded"),
    ])?;

    stage.rig.state("imagetransfer", "gitops-succeeded", "Cancelled")?;
    stage.rig.state("vmbackup", "gitops-1", "Finalized")?;
    stage.rig.reason("vmbackup", "gitops-1", "TransfersIncomplete")?;
    stage.answered("imagetransfer", "gitops-succeeded")?;
    stage.record(&[
        ("VmBackup", "transfers-incomplete", "gitops-1"),
        ("ImageTransfer", "succeeded-and-changed", "gitops-succeeded"),
    ])?;
    Ok(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmBackup",
        "metadata": {"name": "gitops-1", "namespace": "vms"}, "spec": {"vm": "gitops"}}))
}

/// Something is in the way of the clean-up.
fn finalizing(stage: &mut Stage) -> Result<()> {
    read_data(stage, "gitops-1-vda")?;
    let agent = stage.agent().clone();
    wait_until(BOUND, "the agent to stop where it has ended the job", || {
        Ok(agent.process.is_paused().then_some(()))
    })?;
    let uid =
        stage.rig.get("vmbackup", "gitops-1")?["metadata"]["uid"].as_str().context("no uid")?.to_owned();
    let run = stage.rig.vm.hypervisor().dir.join("agent/run").join(uid);
    let chattr = |flag: &str| Command::new("chattr").arg(flag).arg(&run).status();
    ensure!(chattr("+i")?.success(), "chattr +i");
    agent.resume();
    let stuck = stage.rig.phase("vmbackup", "gitops-1", "Finalizing");
    let recorded = stuck.and_then(|_| stage.record(&[("VmBackup", "finalizing", "gitops-1")]));
    ensure!(chattr("-i")?.success(), "chattr -i");
    recorded?;
    stage.rig.phase("vmbackup", "gitops-1", "Succeeded").map(drop)
}

/// What has ended, and what people and Flux do to it.
fn ended(stage: &mut Stage, manifest: &Value) -> Result<()> {
    let rig = &stage.rig;
    rig.state("vmbackup", "gitops-off", "Cancelled")?;
    rig.phase("vmbackup", "gitops-off", "Failed")?;
    let checkpoint = stage.rig.checkpoint_of("gitops-1")?;
    stage.rig.phase("vmcheckpoint", &checkpoint, "Ready")?;
    stage.record(&[
        ("VmBackup", "succeeded", "gitops-1"),
        ("VmBackup", "cancelled", "gitops-off"),
        ("VmCheckpoint", "ready", &checkpoint),
    ])?;

    let patch =
        ["patch", "vmbackup", "gitops-1", "--type=merge", "-p", r#"{"spec":{"clientIdleSeconds":60}}"#];
    stage.rig.kubectl(&patch)?;
    stage.answered("vmbackup", "gitops-1")?;
    stage.record(&[("VmBackup", "succeeded-and-changed", "gitops-1")])?;

    // Flux takes what kubectl set, and would set the state back: that is refused. So is a replacement.
    reapply::take_over_from_kubectl(&stage.rig, "vmbackup.virtmark.dev/gitops-1")?;
    for answer in [reapply::as_flux(&stage.rig, manifest), reapply::replace(&stage.rig, manifest)] {
        let refusal = answer.expect_err("the state went back").to_string();
        ensure!(refusal.contains("state goes one way"), "{refusal}");
    }
    // what another manager set is left to it
    let rig = &stage.rig;
    rig.phase("vmbackup", "gitops-2", "Ready")?;
    let finalized = r#"{"spec":{"state":"Finalized"}}"#;
    let by = "--field-manager=backup-client";
    rig.kubectl(&["patch", "vmbackup", "gitops-2", by, "--type=merge", "-p", finalized])?;
    reapply::take_over_from_kubectl(rig, "vmbackup.virtmark.dev/gitops-2")?;
    let mut second = manifest.clone();
    second["metadata"]["name"] = json!("gitops-2");
    reapply::as_flux(rig, &second)?;
    ensure!(rig.get("vmbackup", "gitops-2")?["spec"]["state"] == "Finalized");
    read_data(stage, "gitops-2-vda")?;
    stage.rig.phase("vmbackup", "gitops-2", "Succeeded").map(drop)
}

/// Deletions that wait for the agent.
fn deleted(stage: &mut Stage) -> Result<()> {
    stage.apply("vmbackup", "VmBackup", "gitops-3", &json!({"vm": "gitops"}))?;
    stage.rig.phase("vmbackup", "gitops-3", "Ready")?;
    stage.rig.phase("imagetransfer", "gitops-3-vda", "Ready")?;
    let checkpoint = stage.rig.checkpoint_of("gitops-1")?;
    Stage::stop(stage.agent())?;
    for (kind, name) in
        [("vmcheckpoint", checkpoint.as_str()), ("vmbackup", "gitops-3"), ("imagetransfer", "gitops-3-vda")]
    {
        stage.rig.kubectl(&["delete", kind, name, "--wait=false"])?;
    }
    stage.rig.reason("vmcheckpoint", &checkpoint, "CheckpointBusy")?;
    stage.record(&[
        ("VmBackup", "deleting", "gitops-3"),
        ("ImageTransfer", "deleting", "gitops-3-vda"),
        ("VmCheckpoint", "deleting-busy", &checkpoint),
    ])?;
    // the agent ends the backup, and stands still again before the operator gives it the checkpoint
    Stage::stop(&stage.rig.bed.operator)?;
    stage.agent().resume();
    stage.rig.phase("vmbackup", "gitops-3", "Failed")?;
    Stage::stop(stage.agent())?;
    stage.rig.bed.operator.resume();
    stage.rig.gone("vmbackup", "gitops-3")?;
    stage.rig.reason("vmcheckpoint", &checkpoint, "Finalizing")?;
    stage.record(&[("VmCheckpoint", "deleting", &checkpoint)])?;
    stage.agent().resume();
    stage.rig.gone("vmcheckpoint", &checkpoint)
}

/// Another VM has the name now.
fn replaced(stage: &mut Stage) -> Result<()> {
    let checkpoint = stage.rig.checkpoint_of("gitops-2")?;
    let hypervisor = stage.rig.vm.hypervisor().clone();
    let other = Plan::new("gitops-other").disk(Disk::qcow2("vda", MIB)).define(&hypervisor)?;
    drop(std::mem::replace(&mut stage.rig.vm, other));
    stage.rig.vm = Plan::new("gitops").disk(Disk::qcow2("vda", MIB)).define(&hypervisor)?;
    stage.rig.published("Off")?;
    stage.rig.bed.operator.restart(&[])?;
    stage.rig.bed.store()?;
    stage.rig.reason("vmcheckpoint", &checkpoint, "VmReplaced")?;
    stage.record(&[("VmCheckpoint", "failed", &checkpoint)])?;
    stage.rig.delete("vmcheckpoint", &checkpoint)
}

/// Reads what the VM wrote, and no more: a finalized backup ends as soon as that was read, and its tickets with it.
fn read_data(stage: &Stage, transfer: &str) -> Result<()> {
    let range = format!("Range: bytes=0-{}", MIB - 1);
    let answer = stage.rig.ticket(transfer)?.curl(&["-H", &range])?;
    ensure!(answer == "206", "{answer}");
    Ok(())
}
