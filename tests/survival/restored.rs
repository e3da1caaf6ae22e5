//! The API forgets: etcd is restored from a copy, or the kinds are removed and made again. Chains go on where bitmaps
//! and objects agree, nothing of anybody's is deleted, and what does not agree says so.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::component::SYSTEM_NAMESPACE;
use virtmark_bed::daemon::Daemon;
use virtmark_bed::{Disk, wait_until};

use super::chain::Chain;
use super::rig::{BOUND, MIB, Rig};

/// The bitmap of a checkpoint.
fn bitmap(rig: &Rig, checkpoint: &str) -> Result<String> {
    let checkpoint = rig.get("vmcheckpoint", checkpoint)?;
    Ok(checkpoint["spec"]["bitmap"].as_str().context("no bitmap")?.to_owned())
}

/// The bitmaps in the disk, in the order of their names.
fn held(rig: &Rig) -> Result<Vec<String>> {
    let mut held = rig.bitmaps("vda")?;
    held.sort();
    Ok(held)
}

fn sorted<const N: usize>(names: [&String; N]) -> Vec<String> {
    let mut names = names.map(String::clone).to_vec();
    names.sort();
    names
}

/// What the inventory says of a bitmap.
fn listed(rig: &Rig, bitmap: &str) -> Result<Value> {
    let checkpoints = rig.get("lvd", &rig.vm.name)?["status"]["checkpoints"].clone();
    let found = checkpoints.as_array().into_iter().flatten().find(|found| found["name"] == bitmap);
    Ok(found.cloned().unwrap_or_default())
}

/// What a user saved of a checkpoint: what it is, without what became of it.
fn saved(rig: &Rig, checkpoint: &str) -> Result<Value> {
    let object = rig.get("vmcheckpoint", checkpoint)?;
    let metadata = json!({"name": checkpoint, "namespace": object["metadata"]["namespace"]});
    Ok(
        json!({"apiVersion": object["apiVersion"], "kind": "VmCheckpoint", "metadata": metadata, "spec": object["spec"]}),
    )
}

fn apply(rig: &Rig, object: &Value) -> Result<()> {
    rig.bed.kubectl().run_with(&["create", "-f", "-"], &object.to_string()).map(drop)
}

/// A backup that will not be a full one.
fn strict() -> Value {
    json!({"type": "Incremental", "onInvalidCheckpoint": "Fail"})
}

/// How often a process began its work; an operator does so too when it could not renew its lease for a while.
fn begun(daemon: &Daemon) -> usize {
    daemon.log().lines().filter(|line| line.contains(" leads ")).count()
}

/// Waits until a process ended by itself, and starts it as a kubelet does; or until it began anew.
fn begins_anew(daemon: &mut Daemon, begun_before: usize) -> Result<()> {
    wait_until(Duration::from_secs(60), &format!("{} to see that the API forgot", daemon.name), || {
        Ok((!daemon.process.is_alive() || begun(daemon) > begun_before).then_some(()))
    })?;
    if daemon.process.is_alive() { Ok(()) } else { daemon.restart(&[]) }
}

#[test]
fn chains_go_on_after_etcd_was_restored_from_a_copy() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, "rewound", [Disk::qcow2("vda", 16 * MIB)])?;
    let take = |rig: &Rig, number: u8, spec: Value| {
        rig.vm.write("vda", u64::from(number) * MIB, MIB, number)?;
        Chain::of(rig, "rewound").take(&format!("rewound-{number}"), spec, || Ok(()))
    };
    let first = take(&rig, 1, json!({}))?;
    let second = take(&rig, 2, strict())?;
    rig.vm.write("vda", 3 * MIB, MIB, 3)?;
    rig.backup("rewound-3", strict())?;
    rig.phase("vmbackup", "rewound-3", "Ready")?;
    let copy = rig.files.path().join("etcd");
    rig.bed.plane.save(&copy)?;

    // what the copy knows nothing of: one succeeds, one more is made, the first one is deleted
    let third = Chain::of(&rig, "rewound").go_on("rewound-3", || Ok(()))?;
    let fourth = take(&rig, 4, strict())?;
    let gone = bitmap(&rig, first.checkpoint())?;
    let kept = [&second, &third, &fourth].map(|point| bitmap(&rig, point.checkpoint()));
    let [two, three, four] = kept.map(Result::unwrap);
    let lost = saved(&rig, fourth.checkpoint())?;
    rig.delete("vmcheckpoint", first.checkpoint())?;
    assert_eq!(held(&rig)?, sorted([&two, &three, &four]));

    // an agent that saw nothing newer than the copy has nothing to forget
    let renewed = || {
        let leases =
            ["get", "leases", "virtmark-agent-node-a", "virtmark-agent-node-b", "-n", SYSTEM_NAMESPACE];
        let times = [&leases[..], &["-o", "jsonpath={.items[*].spec.renewTime}"]].concat();
        rig.bed
            .kubectl()
            .run(&times)
            .map(|times| times.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    };
    let then = renewed()?;
    wait_until(Duration::from_secs(60), "the agents to see that", || {
        let now = renewed()?;
        Ok((now.len() == 2 && now.iter().zip(&then).all(|(now, then)| now != then)).then_some(()))
    })?;

    let before = begun(&rig.bed.operator);
    rig.bed.plane.put_back(&copy)?;
    begins_anew(&mut rig.bed.operator, before)?;
    for agent in &mut rig.bed.agents {
        begins_anew(agent, 0)?;
    }
    rig.bed.store()?;
    // it ended as it did
    rig.phase("vmbackup", "rewound-3", "Succeeded")?;
    rig.reason("vmcheckpoint", third.checkpoint(), "BackupSucceeded")?;
    // the API has a checkpoint whose bitmap is gone, and a bitmap is there that it does not know
    let message = rig.reason("vmcheckpoint", first.checkpoint(), "CheckpointInvalid")?;
    ensure!(message.contains("vda"), "{message}");
    // an image tells of it once its QEMU has ended
    rig.vm.destroy()?;
    rig.vm.start()?;
    rig.published("Running")?;
    wait_until(BOUND, "the orphan to be listed", || {
        let found = listed(&rig, &four)?;
        Ok((found["owner"] == "Virtmark" && found["vmCheckpoint"].is_null()).then_some(()))
    })?;
    assert!(listed(&rig, &gone)?.is_null());
    assert_eq!(held(&rig)?, sorted([&two, &three, &four]), "nothing of anybody's is deleted");
    let fifth = take(&rig, 5, strict())?;
    assert_eq!(fifth.base(), third.checkpoint());
    // the orphan is a base again
    apply(&rig, &lost)?;
    rig.made("vmcheckpoint", fourth.checkpoint());
    rig.reason("vmcheckpoint", fourth.checkpoint(), "Imported")?;
    let from_fourth =
        json!({"fromCheckpoint": fourth.checkpoint(), "type": "Incremental", "onInvalidCheckpoint": "Fail"});
    let sixth = take(&rig, 6, from_fourth)?;
    assert_eq!((sixth.base(), sixth.restored["vda"].mostly_read()), (fourth.checkpoint(), 2 * MIB));
    // what is left over is deleted as anything is
    rig.delete("vmcheckpoint", first.checkpoint())
}

#[test]
fn chains_go_on_after_the_kinds_were_removed_and_made_again() -> Result<()> {
    let _alone = super::alone();
    let rig = Rig::running_on(1, "renewed", [Disk::qcow2("vda", 16 * MIB)])?;
    let take = |rig: &Rig, number: u8, spec: Value| {
        rig.vm.write("vda", u64::from(number) * MIB, MIB, number)?;
        Chain::of(rig, "renewed").take(&format!("renewed-{number}"), spec, || Ok(()))
    };
    take(&rig, 1, json!({}))?;
    let second = take(&rig, 2, strict())?;
    let before = held(&rig)?;
    let lost = saved(&rig, second.checkpoint())?;
    let kinds = "crds";
    rig.kubectl(&["delete", "-f", kinds, "--timeout=120s"])?;
    assert_eq!(held(&rig)?, before, "nobody asked for the bitmaps");
    rig.kubectl(&["apply", "--server-side", "-f", kinds])?;
    rig.kubectl(&["wait", "--for=condition=Established", "--timeout=30s", "-f", kinds])?;
    // the inventory is made again by those who never went away
    wait_until(Duration::from_secs(90), "the VM to be published again", || {
        Ok(rig.get("lvd", "renewed").is_ok_and(|domain| domain["status"]["state"] == "Running").then_some(()))
    })?;
    apply(&rig, &lost)?;
    rig.reason("vmcheckpoint", second.checkpoint(), "Imported")?;
    let third = take(&rig, 3, strict())?;
    assert_eq!((third.base(), third.restored["vda"].mostly_read()), (second.checkpoint(), MIB));
    assert_eq!(held(&rig)?.len(), before.len() + 1);
    rig.bed.store()
}
