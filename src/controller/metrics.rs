//! What the operator that leads tells Prometheus at a scrape, from the objects that it watches. Pure.
//!
//! Of each VM that is published: when it was last backed up, where an incremental can start, and what is not done. A VM that is
//! no more has no series.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

use super::heartbeats::Heartbeat;
use crate::api::{ImageTransfer, LibvirtDomain, Phase, VmBackup, VmBackupStatus, VmCheckpoint, conditions};
use crate::metrics::{Metric, Sample};

/// A VM as it is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    namespace: String,
    name: String,
    uuid: String,
    state: &'static str,
    /// The point in time of its last backup that succeeded; the backup itself may be deleted.
    last_backup: Option<Timestamp>,
}

impl Vm {
    /// What is known of a LibvirtDomain.
    pub fn of(domain: &LibvirtDomain) -> Self {
        let status = domain.status.as_ref();
        Self {
            namespace: domain.namespace().unwrap_or_default(),
            name: domain.name_any(),
            uuid: domain.spec.uuid.clone(),
            state: status.and_then(|status| status.state).map_or("Unknown", |state| state.as_str()),
            last_backup: status.and_then(|status| Some(status.last_backup_time.as_ref()?.0)),
        }
    }
}

/// What exists.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The VMs.
    pub vms: &'a [Vm],
    /// All VmBackups.
    pub backups: &'a [Arc<VmBackup>],
    /// All ImageTransfers.
    pub transfers: &'a [Arc<ImageTransfer>],
    /// All VmCheckpoints.
    pub checkpoints: &'a [Arc<VmCheckpoint>],
    /// The last sign of life of each node's agent.
    pub heartbeats: &'a BTreeMap<String, Heartbeat>,
    /// The time.
    pub now: Timestamp,
}

/// Of one that does not lead.
pub fn standby() -> Vec<Sample> {
    vec![Sample::count(Metric::Leader, [], 0)]
}

/// Of one that leads, and has not seen everything yet.
pub fn unsynced() -> Vec<Sample> {
    vec![Sample::count(Metric::Leader, [], 1)]
}

/// Of the one that leads: one sample a series.
pub fn samples(facts: &Facts<'_>) -> Vec<Sample> {
    let mut samples = unsynced();
    let mut states = BTreeMap::new();
    for vm in facts.vms {
        *states.entry(vm.state).or_insert(0) += 1;
    }
    samples.extend(of_vms(facts));
    samples.extend(states.into_iter().map(|(state, count)| Sample::count(Metric::Vms, [state], count)));
    let phases = facts.backups.iter().map(|backup| backup.phase());
    samples.extend(by_phase(Metric::Backups, phases));
    let phases = facts
        .transfers
        .iter()
        .map(|transfer| transfer.status.as_ref().map(|status| status.phase).unwrap_or_default());
    samples.extend(by_phase(Metric::Transfers, phases));
    for usable in [true, false] {
        let count = facts.checkpoints.iter().filter(|checkpoint| checkpoint.is_usable() == usable).count();
        samples.push(Sample::count(
            Metric::Checkpoints,
            [if usable { "true" } else { "false" }],
            number(count),
        ));
    }
    for (node, heartbeat) in facts.heartbeats {
        samples.push(Sample::new(Metric::Heartbeat, [node], seconds(heartbeat.at)));
        samples.push(Sample::count(Metric::AgentUp, [node], u64::from(heartbeat.holds(facts.now))));
    }
    samples
}

/// What is told of one VM.
struct Told<'a> {
    vm: &'a Vm,
    last: Option<Timestamp>,
    newest: Option<Timestamp>,
    /// How many backups are not done, by phase and reason.
    unfinished: BTreeMap<(&'static str, &'a str), u64>,
}

impl<'a> Told<'a> {
    fn of(vm: &'a Vm) -> Self {
        Self { vm, last: vm.last_backup, newest: None, unfinished: BTreeMap::new() }
    }

    fn backup(&mut self, backup: &'a VmBackup) {
        let (phase, status) = (backup.phase(), backup.status.as_ref());
        if phase.is_terminal() {
            let is_its = |status: &&VmBackupStatus| status.vm_uuid.as_ref() == Some(&self.vm.uuid);
            if let Some(status) = status.filter(is_its).filter(|_| phase == Phase::Succeeded) {
                self.last = self.last.max(status.ready_time.as_ref().map(|time| time.0));
            }
            return;
        }
        let ready = status.and_then(|status| conditions::get(&status.conditions, conditions::READY));
        // one that nobody looked at yet has no reason
        let reason = ready.map_or("None", |ready| ready.reason.as_str());
        *self.unfinished.entry((phase.as_str(), reason)).or_insert(0) += 1;
    }

    fn checkpoint(&mut self, checkpoint: &VmCheckpoint) {
        if checkpoint.spec.vm_uuid == self.vm.uuid && checkpoint.is_usable() {
            self.newest = self.newest.max(Some(checkpoint.spec.creation_time.0));
        }
    }

    fn samples(self) -> impl Iterator<Item = Sample> {
        let (namespace, name) = (self.vm.namespace.as_str(), self.vm.name.as_str());
        let time = move |metric: Metric, at: Timestamp| Sample::new(metric, [namespace, name], seconds(at));
        let last = self.last.map(|last| time(Metric::LastBackup, last));
        let newest = self.newest.map(|newest| time(Metric::UsableCheckpoint, newest));
        let unfinished = self.unfinished.into_iter().map(move |((phase, reason), count)| {
            Sample::count(Metric::UnfinishedBackups, [namespace, name, phase, reason], count)
        });
        last.into_iter().chain(newest).chain(unfinished)
    }
}

/// What is told of the VMs: each object is looked at once, for there may be many.
fn of_vms(facts: &Facts<'_>) -> Vec<Sample> {
    let named = facts.vms.iter().map(|vm| ((vm.namespace.as_str(), vm.name.as_str()), Told::of(vm)));
    let mut vms: BTreeMap<_, _> = named.collect();
    for backup in facts.backups {
        let namespace = backup.metadata.namespace.as_deref().unwrap_or_default();
        if let Some(told) = vms.get_mut(&(namespace, backup.spec.vm.as_str())) {
            told.backup(backup);
        }
    }
    for checkpoint in facts.checkpoints {
        let namespace = checkpoint.metadata.namespace.as_deref().unwrap_or_default();
        if let Some(told) = vms.get_mut(&(namespace, checkpoint.spec.vm.as_str())) {
            told.checkpoint(checkpoint);
        }
    }
    vms.into_values().flat_map(Told::samples).collect()
}

/// How many there are of every phase, of those that there are none of too.
fn by_phase(metric: Metric, phases: impl Iterator<Item = Phase>) -> impl Iterator<Item = Sample> {
    let phases: Vec<_> = phases.collect();
    Phase::ALL.iter().map(move |phase| {
        let count = phases.iter().filter(|other| *other == phase).count();
        Sample::count(metric, [phase.as_str()], number(count))
    })
}

fn number(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[allow(clippy::cast_precision_loss, reason = "a time in milliseconds fits")]
fn seconds(at: Timestamp) -> f64 {
    at.as_millisecond() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::SignedDuration;
    use serde_json::{Value, json};

    use super::*;

    const UUID: &str = "7a1c8f5e-0000-4000-8000-000000000001";

    fn backup(name: &str, vm: &str, status: &Value) -> Arc<VmBackup> {
        let object = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmBackup",
            "metadata": {"name": name, "namespace": "vms"}, "spec": {"vm": vm}, "status": status});
        Arc::new(serde_json::from_value(object).unwrap())
    }

    fn checkpoint(name: &str, uuid: &str, second: u32, usable: &str) -> Arc<VmCheckpoint> {
        let object = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmCheckpoint",
            "metadata": {"name": name, "namespace": "vms"},
            "spec": {"vm": "db01", "vmUuid": uuid, "bitmap": name, "disks": [],
                "creationTime": format!("1970-01-01T00:00:{second:02}Z")},
            "status": {"phase": "Ready", "conditions": [{"type": "Usable", "status": usable, "reason": "r",
                "message": "", "lastTransitionTime": "1970-01-01T00:00:00Z"}]}});
        Arc::new(serde_json::from_value(object).unwrap())
    }

    fn domain(status: &Value) -> Vm {
        let object = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "LibvirtDomain",
            "metadata": {"name": "db01", "namespace": "vms"}, "spec": {"uuid": UUID}, "status": status});
        Vm::of(&serde_json::from_value(object).unwrap())
    }

    fn succeeded(uuid: &str, second: u32) -> Value {
        json!({"phase": "Succeeded", "vmUuid": uuid, "readyTime": format!("1970-01-01T00:00:{second:02}Z")})
    }

    fn facts<'a>(
        vms: &'a [Vm],
        backups: &'a [Arc<VmBackup>],
        checkpoints: &'a [Arc<VmCheckpoint>],
        heartbeats: &'a BTreeMap<String, Heartbeat>,
    ) -> Facts<'a> {
        let now = Timestamp::from_second(100).unwrap();
        Facts { vms, backups, transfers: &[], checkpoints, heartbeats, now }
    }

    fn of(samples: &[Sample], metric: Metric) -> Vec<(String, f64)> {
        let found = samples.iter().filter(|sample| sample.metric == metric);
        found.map(|sample| (sample.values.join(" "), sample.value)).collect()
    }

    #[test]
    fn the_last_backup_is_known_though_its_object_is_gone_and_another_vms_does_not_count() {
        let none = BTreeMap::new();
        let vm = [domain(&json!({"state": "Running", "lastBackupTime": "1970-01-01T00:00:10Z"}))];
        let last =
            |backups: &[Arc<VmBackup>]| of(&samples(&facts(&vm, backups, &[], &none)), Metric::LastBackup);
        assert_eq!(last(&[]), [("vms db01".to_owned(), 10.0)]);
        assert_eq!(last(&[backup("b", "db01", &succeeded(UUID, 20))]), [("vms db01".to_owned(), 20.0)]);
        let failed = json!({"phase": "Failed", "vmUuid": UUID, "readyTime": "1970-01-01T00:00:30Z"});
        let others = [
            backup("replaced", "db01", &succeeded("another", 30)),
            backup("other", "db02", &succeeded(UUID, 30)),
            backup("failed", "db01", &failed),
        ];
        assert_eq!(last(&others), [("vms db01".to_owned(), 10.0)]);
        let never = [domain(&json!({}))];
        assert!(of(&samples(&facts(&never, &[], &[], &none)), Metric::LastBackup).is_empty());
        assert_eq!(of(&samples(&facts(&never, &[], &[], &none)), Metric::Vms), [("Unknown".to_owned(), 1.0)]);
        let gone = of(
            &samples(&facts(&[], &[backup("b", "db01", &succeeded(UUID, 20))], &[], &none)),
            Metric::LastBackup,
        );
        assert!(gone.is_empty(), "a VM that is no more needs no backup");
    }

    #[test]
    fn a_chain_without_a_usable_checkpoint_has_no_time() {
        let none = BTreeMap::new();
        let vm = [domain(&json!({"state": "Off"}))];
        let newest = |checkpoints: &[Arc<VmCheckpoint>]| {
            of(&samples(&facts(&vm, &[], checkpoints, &none)), Metric::UsableCheckpoint)
        };
        let broken = checkpoint("c", UUID, 30, "False");
        assert!(newest(&[Arc::clone(&broken), checkpoint("d", "another", 40, "True")]).is_empty());
        let whole = [checkpoint("a", UUID, 10, "True"), checkpoint("b", UUID, 20, "True"), broken];
        assert_eq!(newest(&whole), [("vms db01".to_owned(), 20.0)]);
        let counted = of(&samples(&facts(&vm, &[], &whole, &none)), Metric::Checkpoints);
        assert_eq!(counted, [("true".to_owned(), 2.0), ("false".to_owned(), 1.0)]);
    }

    #[test]
    fn what_is_not_done_is_told_with_its_reason() {
        let beat =
            |at| Heartbeat { at: Timestamp::from_second(at).unwrap(), lasts: SignedDuration::from_secs(40) };
        let heartbeats = BTreeMap::from([("node-a".to_owned(), beat(5)), ("node-b".to_owned(), beat(60))]);
        let vm = [domain(&json!({}))];
        let stuck = json!({"phase": "Finalizing", "conditions": [{"type": "Ready", "status": "False",
            "reason": "FinalizeFailed", "message": "", "lastTransitionTime": "1970-01-01T00:00:00Z"}]});
        let backups = [
            backup("a", "db01", &stuck),
            backup("b", "db01", &json!({"observedGeneration": -1})),
            backup("c", "db01", &succeeded(UUID, 1)),
        ];
        let samples = samples(&facts(&vm, &backups, &[], &heartbeats));
        let expected = [
            ("vms db01 Finalizing FinalizeFailed".to_owned(), 1.0),
            ("vms db01 Initializing None".to_owned(), 1.0),
        ];
        assert_eq!(of(&samples, Metric::UnfinishedBackups), expected);
        let told = of(&samples, Metric::Heartbeat);
        assert_eq!(told, [("node-a".to_owned(), 5.0), ("node-b".to_owned(), 60.0)]);
        let up = of(&samples, Metric::AgentUp);
        assert_eq!(up, [("node-a".to_owned(), 0.0), ("node-b".to_owned(), 1.0)]);
        let phases = of(&samples, Metric::Backups);
        assert_eq!(phases.len(), Phase::ALL.len());
        assert!(
            phases.contains(&("Ready".to_owned(), 0.0)) && phases.contains(&("Succeeded".to_owned(), 1.0))
        );
        assert_eq!(of(&samples, Metric::Leader), [(String::new(), 1.0)]);
        assert_eq!(of(&standby(), Metric::Leader), [(String::new(), 0.0)]);
    }
}
