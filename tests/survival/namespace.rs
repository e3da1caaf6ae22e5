//! A namespace deleted with everything in it ends, and leaves nothing on the hosts; made again, it has its VMs again.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::component::VM_NAMESPACE;
use virtmark_bed::kubectl::Kubectl;
use virtmark_bed::{Disk, wait_until};

use super::history::History;
use super::rig::{BOUND, MIB, Rig};

/// How long the whole may take.
const END: Duration = Duration::from_secs(30);

#[test]
fn a_namespace_with_everything_in_it_ends_and_leaves_nothing() -> Result<()> {
    let _alone = super::alone();
    let vm = |name: &str| Rig::off_on(1, name, [Disk::qcow2("vda", 8 * MIB)]);
    let [read, kept, stopped, off] = ["doomed-read", "doomed-kept", "doomed-stopped", "doomed-off"].map(vm);
    let (read, kept, stopped, off) = (read?, kept?, stopped?, off?);
    let history = History::watch(&read.bed)?;
    for rig in [&read, &kept, &stopped] {
        rig.vm.start()?;
        rig.published("Running")?;
    }
    // two checkpoints with bitmaps, of a VM that runs and of one that does not
    for rig in [&kept, &stopped] {
        let name = format!("{}-1", rig.vm.name);
        rig.backup(&name, json!({}))?;
        rig.phase("vmbackup", &name, "Ready")?;
        rig.state("vmbackup", &name, "Finalized")?;
        rig.phase("vmbackup", &name, "Succeeded")?;
        ensure!(rig.bitmaps("vda")?.len() == 1);
    }
    stopped.vm.destroy()?;
    stopped.published("Off")?;
    // one that can be read, one that waits for it, one that waits for its VM, one that failed
    read.backup("doomed-read-1", json!({}))?;
    read.phase("vmbackup", "doomed-read-1", "Ready")?;
    let ticket = read.ticket("doomed-read-1-vda")?;
    read.backup("doomed-read-2", json!({}))?;
    read.reason("vmbackup", "doomed-read-2", "BackupAlreadyRunning")?;
    off.backup("doomed-off-1", json!({}))?;
    off.reason("vmbackup", "doomed-off-1", "VmNotRunning")?;
    off.backup("doomed-off-2", json!({"offline": "Refuse"}))?;
    off.phase("vmbackup", "doomed-off-2", "Failed")?;
    off.transfer("doomed-nobodys", &json!({"backup": "never", "disk": "vda"}))?;

    let took = end_namespace(&read.bed.kubectl(), VM_NAMESPACE)?;
    ensure!(took < END, "the namespace took {} s to end", took.as_secs());
    ensure!(ticket.curl(&[])? == "403", "a ticket outlived its namespace");
    for rig in [&read, &kept, &stopped, &off] {
        rig.host_is_clean()?;
        ensure!(rig.bitmaps("vda")?.is_empty(), "a bitmap of {} outlived its namespace", rig.vm.name);
    }
    let agent = read.vm.hypervisor().dir.join("agent");
    for folder in ["run", "state/backups"] {
        let left: Vec<_> = std::fs::read_dir(agent.join(folder))?.filter_map(Result::ok).collect();
        let left: Vec<_> = left.iter().filter(|entry| entry.path().is_dir()).collect();
        ensure!(left.is_empty(), "{folder} has {left:?}");
    }

    let again = Instant::now();
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": VM_NAMESPACE}});
    read.bed.kubectl().apply(&namespace.to_string())?;
    for (rig, state) in [(&read, "Running"), (&kept, "Running"), (&stopped, "Off"), (&off, "Off")] {
        rig.published(state)?;
    }
    println!(
        "the namespace ended after {} ms; made again, its VMs were published after {} ms; {} versions",
        took.as_millis(),
        again.elapsed().as_millis(),
        history.check()?
    );
    read.backup("doomed-read-1", json!({}))?;
    read.phase("vmbackup", "doomed-read-1", "Ready")?;
    read.state("vmbackup", "doomed-read-1", "Cancelled")?;
    read.reason("vmbackup", "doomed-read-1", "Cancelled").map(drop)
}

/// `kubectl delete ns`, and the part of Kubernetes' namespace controller, which the bed has not: delete all there is of
/// every kind, look again until nothing is left, and then let the namespace go.
fn end_namespace(kubectl: &Kubectl, namespace: &str) -> Result<Duration> {
    let kinds = kubectl.run(&["api-resources", "--namespaced", "--verbs=list,delete", "-o", "name"])?;
    let kinds = kinds.split_whitespace().collect::<Vec<_>>().join(",");
    let began = Instant::now();
    kubectl.run(&["delete", "ns", namespace, "--wait=false"])?;
    let mut left = String::new();
    wait_until(BOUND, "the namespace to be empty", || {
        // what is created meanwhile is refused, what is gone by now is gone
        let _ = kubectl.run(&["-n", namespace, "delete", &kinds, "--all", "--wait=false"]);
        left = kubectl.run(&["-n", namespace, "get", &kinds, "-o", "name", "--ignore-not-found"])?;
        Ok(left.trim().is_empty().then_some(()))
    })
    .with_context(|| left.clone())?;
    let mut object: Value = kubectl.json(&["get", "ns", namespace])?;
    object["spec"]["finalizers"] = json!([]);
    let path = format!("/api/v1/namespaces/{namespace}/finalize");
    kubectl.run_with(&["replace", "--raw", &path, "-f", "-"], &object.to_string())?;
    kubectl.run(&["wait", "--for=delete", &format!("ns/{namespace}"), "--timeout=10s"])?;
    Ok(began.elapsed())
}
