//! Backups of one VM applied at once, under one operator and under two that both think that they lead; beside a job of
//! somebody else; bound twice by mistake. One job at a time, the others say whom they wait for, all end well in turn.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use virtmark_bed::component::{VM_NAMESPACE, binary_dir};
use virtmark_bed::daemon::Daemon;
use virtmark_bed::{Disk, wait_until};

use super::history::History;
use super::rig::{BOUND, MIB, Rig};

/// Rounds under one operator, and under two.
const ROUNDS: [usize; 2] = [3, 2];
const VMS: [&str; 4] = ["once-a", "once-b", "once-c", "once-d"];

/// An operator that leads beside the bed's own: its lease is in another namespace, and so is its inventory.
struct Rogue(Daemon);

impl Rogue {
    fn start(rig: &Rig) -> Result<Self> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "rogue"}});
        rig.bed.kubectl().apply(&namespace.to_string())?;
        let kubeconfig = rig.bed.plane.kubeconfig.to_string_lossy().into_owned();
        let arguments =
            ["--kubeconfig", &kubeconfig, "--system-namespace", "rogue", "--domains-namespace", "rogue"];
        let binary = binary_dir()?.join("operator");
        let daemon =
            Daemon::start("operator-rogue", &binary, arguments.map(str::to_owned).to_vec(), &rig.bed.dir)?;
        wait_until(BOUND, "the rogue to lead", || Ok(daemon.log().contains("leads").then_some(())))?;
        Ok(Self(daemon))
    }
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.0.process.end();
    }
}

#[test]
fn backups_of_one_vm_applied_at_once_run_one_after_the_other() -> Result<()> {
    let _alone = super::alone();
    let rigs = VMS.map(|name| Rig::running_on(1, name, [Disk::qcow2("vda", 8 * MIB)]));
    let rigs = rigs.into_iter().collect::<Result<Vec<_>>>()?;
    let rig = rigs.first().context("no VM")?;
    let history = History::watch(&rig.bed)?;
    let mut pairs = 0;
    for (operators, rounds) in (1..).zip(ROUNDS) {
        let _rogue = (operators == 2).then(|| Rogue::start(rig)).transpose()?;
        for round in 0..rounds {
            let began = Instant::now();
            let names = apply(rig, operators, round)?;
            let waited = in_turn(rig, &names)?;
            pairs += VMS.len();
            println!(
                "{} pairs at once, {operators} operators: {} ms, {waited} said for whom they waited",
                VMS.len(),
                began.elapsed().as_millis()
            );
            history.check()?;
        }
    }
    println!("{pairs} pairs, {} versions, none went back", history.check()?);
    rigs.iter().try_for_each(Rig::host_is_clean)
}

/// One manifest with two backups of each VM; answers their names.
fn apply(rig: &Rig, operators: usize, round: usize) -> Result<Vec<String>> {
    let both =
        VMS.iter().flat_map(|vm| ["1", "2"].map(|which| (vm, format!("{vm}-{operators}-{round}-{which}"))));
    let (items, names): (Vec<Value>, Vec<String>) = both
        .map(|(vm, name)| {
            let object = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmBackup",
                "metadata": {"name": name, "namespace": VM_NAMESPACE},
                "spec": {"vm": vm, "quiesce": {"mode": "None"}}});
            (object, name)
        })
        .unzip();
    rig.bed.kubectl().apply(&json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string())?;
    Ok(names)
}

/// Finalizes each as it comes to be Ready, until all Succeeded: never two of a VM at once. Answers how many were seen
/// to wait for their other by name; deletes all in the end.
fn in_turn(rig: &Rig, names: &[String]) -> Result<usize> {
    let (mut finalized, mut waited) = (BTreeSet::new(), BTreeSet::new());
    let mut uids = BTreeMap::new();
    wait_until(BOUND, "all to succeed in turn", || {
        let items = rig.list("vmbackups", "")?;
        let ours: BTreeMap<&str, &Value> = items
            .iter()
            .filter_map(|item| Some((item["metadata"]["name"].as_str()?, item)))
            .filter(|(name, _)| names.iter().any(|ours| ours == name))
            .collect();
        let phase =
            |name: &str| ours.get(name).and_then(|item| item["status"]["phase"].as_str()).unwrap_or_default();
        for (&name, item) in &ours {
            uids.insert(
                item["metadata"]["uid"].as_str().unwrap_or_default().to_owned(),
                item["spec"]["vm"].clone(),
            );
            let other = other_of(name);
            match phase(name) {
                "Failed" => bail!("{name} failed: {}", item["status"]),
                "Ready" => {
                    let is_up = |name: &str| ["Ready", "Finalizing"].contains(&phase(name));
                    ensure!(!is_up(&other), "{name} and {other} are up at once");
                    if finalized.insert(name.to_owned()) {
                        rig.state("vmbackup", name, "Finalized")?;
                    }
                }
                _ => {}
            }
            let conditions = item["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let ready =
                conditions.into_iter().find(|condition| condition["type"] == "Ready").unwrap_or_default();
            if ready["reason"] == "BackupAlreadyRunning" {
                let message = ready["message"].as_str().unwrap_or_default();
                ensure!(message.contains(&other), "{name} does not say for whom it waits: {message}");
                waited.insert(name.to_owned());
            }
        }
        Ok((ours.len() == names.len() && ours.keys().all(|name| phase(name) == "Succeeded")).then_some(()))
    })?;
    jobs_took_turns(&rig.bed.agents[1].log(), &uids)?;
    let all: Vec<&str> = ["delete", "vmbackup"].into_iter().chain(names.iter().map(String::as_str)).collect();
    rig.kubectl(&all)?;
    rig.kubectl(&["delete", "vmcheckpoints", "--all", "--timeout=60s"])?;
    Ok(waited.len())
}

fn other_of(name: &str) -> String {
    match name.strip_suffix('1') {
        Some(stem) => format!("{stem}2"),
        None => format!("{}1", name.strip_suffix('2').unwrap_or(name)),
    }
}

/// In the agent's log, a VM's next job begins only after its last one was ended; each begins once.
fn jobs_took_turns(log: &str, uids: &BTreeMap<String, Value>) -> Result<()> {
    let mut runs = BTreeMap::<String, &str>::new();
    let mut begun = BTreeSet::new();
    for line in log.lines().filter(|line| line.contains("host action")) {
        let Some((uid, vm)) = uids.iter().find(|(uid, _)| line.contains(uid.as_str())) else { continue };
        if line.contains("action=Begin") {
            ensure!(begun.insert(uid), "{uid} began twice");
            let other = runs.insert(vm.to_string(), uid);
            ensure!(other.is_none(), "{uid} began while {other:?} of VM {vm} ran");
        } else if line.contains("action=AbortJob") {
            ensure!(runs.remove(&vm.to_string()) == Some(uid), "{uid} ended what was not its own");
        }
    }
    ensure!(begun.len() == uids.len(), "{} of {} began", begun.len(), uids.len());
    Ok(())
}

#[test]
fn a_job_of_somebody_else_and_a_backup_bound_twice_are_waited_for() -> Result<()> {
    let _alone = super::alone();
    let rig = Rig::running_on(1, "foreign", [Disk::qcow2("vda", 8 * MIB)])?;
    let history = History::watch(&rig.bed)?;
    let node = rig.vm.hypervisor();
    let job = rig.files.path().join("job.xml");
    // where QEMU's user may make a socket
    let folder = node.dir.join("foreign");
    std::fs::create_dir_all(&folder)?;
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o777))?;
    let socket = folder.join("foreign.sock");
    std::fs::write(
        &job,
        format!(
            "<domainbackup mode='pull'><server transport='unix' socket='{}'/></domainbackup>",
            socket.display()
        ),
    )?;
    node.virsh(&["backup-begin", "foreign", &job.to_string_lossy()])?;
    let backup = |name| rig.backup(name, json!({"quiesce": {"mode": "None"}}));
    backup("foreign-1")?;
    let message = rig.reason("vmbackup", "foreign-1", "BackupAlreadyRunning")?;
    ensure!(message.contains("not Virtmark's"), "{message}");
    // of two that are made in the same second either may be first
    backup("foreign-2")?;
    let message = rig.reason("vmbackup", "foreign-2", "BackupAlreadyRunning")?;
    ensure!(message.contains("foreign-1"), "{message}");
    ensure!(
        node.virsh(&["backup-dumpxml", "foreign"])?.contains("foreign.sock"),
        "the foreign job was touched"
    );
    let began = Instant::now();
    node.virsh(&["domjobabort", "foreign"])?;
    rig.phase("vmbackup", "foreign-1", "Ready")?;
    println!("a foreign job ended: Ready after {} ms", began.elapsed().as_millis());

    // as an operator would that did not see the first one: the agent lets only one of them work
    rig.reason("vmbackup", "foreign-2", "BackupAlreadyRunning")?;
    let first = rig.get("vmbackup", "foreign-1")?["status"].clone();
    let mut bound = json!({"status": {"phase": "Initializing"}});
    for field in ["nodeName", "vmUuid", "startTime"] {
        bound["status"][field] = first[field].clone();
    }
    bound["status"]["disks"] = json!([{"name": "vda", "mode": "Full", "inCheckpoint": false}]);
    let patch = ["patch", "vmbackup", "foreign-2", "--subresource=status", "--type=merge", "-p"];
    rig.kubectl(&[&patch[..], &[&bound.to_string()]].concat())?;
    let agent = &rig.bed.agents[1];
    wait_until(BOUND, "the agent to say for whom the second one waits", || {
        let object = rig.get("vmbackup", "foreign-2")?;
        let by_agent =
            object["status"]["disks"][0]["size"].is_null() && object["status"]["progress"].is_null();
        let message = rig.reason("vmbackup", "foreign-2", "BackupAlreadyRunning")?;
        Ok((by_agent && message.contains("foreign-1")).then_some(()))
    })?;
    rig.state("vmbackup", "foreign-1", "Finalized")?;
    rig.phase("vmbackup", "foreign-1", "Succeeded")?;
    let began = Instant::now();
    rig.phase("vmbackup", "foreign-2", "Ready")?;
    ensure!(began.elapsed() < Duration::from_secs(20), "it was not woken");
    rig.state("vmbackup", "foreign-2", "Finalized")?;
    rig.phase("vmbackup", "foreign-2", "Succeeded")?;
    ensure!(!agent.log().contains("panicked"), "the agent panicked");
    println!("{} versions, none went back", history.check()?);
    rig.kubectl(&["delete", "vmcheckpoints", "--all", "--timeout=60s"])?;
    rig.host_is_clean()
}
