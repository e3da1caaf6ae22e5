//! `helm uninstall` while backups are open: it ends them, or it removes nothing.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::{Disk, nodes, wait_until};

use crate::release::{BOUND, MIB, Release};

#[test]
fn an_uninstall_ends_the_backups_that_are_open_or_removes_nothing() -> Result<()> {
    let release = Release::install(&["uninstall.cancelBackupsSeconds=15"])?;
    let node = release.cluster.node(0)?.clone();
    let vm = release.vm("open", 0, [Disk::qcow2("vda", 64 * MIB)])?;
    vm.write("vda", 0, 8 * MIB, 0x5a)?;
    release.backup("open-1", "open", json!({}))?;
    release.phase("vmbackup", "open-1", "Ready")?;
    // of the same VM: it waits for the first, and is bound to nothing
    release.backup("open-2", "open", json!({}))?;

    let signal = |name: &str| -> Result<()> {
        let told = nodes::within(&node, "pkill")?.args([name, "-x", "agent"]).status()?;
        ensure!(told.success(), "no agent on {}", node.name);
        Ok(())
    };
    signal("-STOP")?;
    let began = Instant::now();
    let refused = release.helm(&["uninstall", "virtmark", "--wait", "--timeout", "2m"]);
    let took = began.elapsed();
    // whatever comes next, the agent goes on
    signal("-CONT")?;
    let said = release.system(&["logs", "job/virtmark-uninstall"])?;
    let refused = refused.err().context("uninstalled, and a backup was open")?;
    ensure!(said.contains("have not ended: vms/open-1 (Ready)"), "it does not say what is open: {said}");
    let there = release.system(&["get", "deployment,daemonset", "-o", "name"])?;
    ensure!(there.lines().count() == 2, "an uninstall that fails removed something: {there}");
    release.say(&format!(
        "helm uninstall while an agent hangs fails after {:.1} s ({refused:#}): {}",
        took.as_secs_f64(),
        said.trim()
    ));

    // what kubectl applies is no hook: `helm template` prints it among the others
    let job: Value =
        serde_json::from_str(&release.system(&["get", "job", "virtmark-uninstall", "-o", "json"])?)?;
    release.system(&["delete", "job", "virtmark-uninstall"])?;
    let by_hand = json!({"apiVersion": "batch/v1", "kind": "Job",
        "metadata": {"name": "virtmark-uninstall", "namespace": job["metadata"]["namespace"]},
        "spec": {"backoffLimit": 0, "template": {"spec": job["spec"]["template"]["spec"]}}});
    release.cluster.kubectl().run_with(&["apply", "-f", "-"], &by_hand.to_string())?;
    wait_until(BOUND, "a Job that is no hook to fail", || {
        let failed = ["get", "job", "virtmark-uninstall", "-o", "jsonpath={.status.failed}"];
        Ok((release.system(&failed)? == "1").then_some(()))
    })?;
    let said = release.system(&["logs", "job/virtmark-uninstall"])?;
    ensure!(said.contains("nothing was cancelled"), "{said}");

    let began = Instant::now();
    release.uninstall()?;
    release.say(&format!("helm uninstall, the agent goes on: {:.1} s", began.elapsed().as_secs_f64()));
    for name in ["open-1", "open-2"] {
        let status = release.phase("vmbackup", name, "Failed")?;
        ensure!(status.to_string().contains("Cancelled"), "{status}");
    }
    release.node_is_clean(&node)?;
    ensure!(vm.live_bitmaps()?.is_empty(), "bitmaps of no backup: {:?}", vm.live_bitmaps()?);
    for (left, what) in [
        (release.kubectl(&["get", "vmcheckpoints,secrets", "-o", "name"])?, "of the backups"),
        (release.system(&["get", "jobs,pods", "-o", "name"])?, "of the release"),
    ] {
        ensure!(left.trim().is_empty(), "left {what}: {left}");
    }

    release.upgrade(&[])?;
    release.kubectl(&["delete", "vmbackups,imagetransfers", "--all", "--timeout=60s"])?;
    release.say("installed again: what had ended can be deleted");
    release.succeeded();
    Ok(())
}
