//! The checklist, case by case.

use serde_json::json;

use super::*;
use crate::api::{LibvirtDomainStatus, Phase, VmBackupStatus};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// A healthy node, and nobody else.
fn facts(domain: Option<&LibvirtDomain>, now: i64) -> Facts<'_> {
    Facts { domain, others: &[], checkpoints: &[], node: NodeHealth::Up, agent_answers: true, now: at(now) }
}

fn backup(name: &str, created: i64, spec: serde_json::Value) -> VmBackup {
    let mut whole = json!({"vm": "db01", "startDeadlineSeconds": 100});
    for (key, value) in spec.as_object().unwrap() {
        whole[key] = value.clone();
    }
    serde_json::from_value(json!({
        "apiVersion": "virtmark.dev/v1alpha1",
        "kind": "VmBackup",
        "metadata": {"name": name, "namespace": "vms", "uid": format!("uid-{name}"),
            "creationTimestamp": at(created).to_string()},
        "spec": whole,
    }))
    .unwrap()
}

fn disk(target: &str, backup: BackupSupport) -> DomainDisk {
    DomainDisk {
        target: target.into(),
        serial: None,
        size: Some(1 << 20),
        format: "qcow2".into(),
        backing_chain: vec![],
        backup,
        reason: Some("it is shareable".into()),
    }
}

fn domain(state: DomainState) -> LibvirtDomain {
    let mut domain: LibvirtDomain = serde_json::from_value(json!({
        "apiVersion": "virtmark.dev/v1alpha1",
        "kind": "LibvirtDomain",
        "metadata": {"name": "db01", "namespace": "vms"},
        "spec": {"uuid": "11111111-2222-4333-8444-555555555555"},
    }))
    .unwrap();
    domain.status = Some(LibvirtDomainStatus {
        state: Some(state),
        node_name: Some("node-a".into()),
        disks: vec![
            disk("vda", BackupSupport::Incremental),
            disk("vdb", BackupSupport::Full),
            disk("vdc", BackupSupport::Unsupported),
        ],
        ..LibvirtDomainStatus::default()
    });
    domain
}

fn with_status(mut backup: VmBackup, phase: Phase, node: Option<&str>) -> VmBackup {
    backup.status =
        Some(VmBackupStatus { phase, node_name: node.map(str::to_owned), ..VmBackupStatus::default() });
    backup
}

fn says(verdict: &Verdict) -> (&'static str, Option<Reason>) {
    match verdict {
        Verdict::Bind(_) => ("bind", None),
        Verdict::Wait(because) => ("wait", Some(because.reason)),
        Verdict::Fail(because) => ("fail", Some(because.reason)),
    }
}

#[test]
fn every_refusal_has_its_reason() {
    let running = domain(DomainState::Running);
    let table = [
        ("all well", json!({}), Some(DomainState::Running), NodeHealth::Up, 1, ("bind", None)),
        ("paused is running", json!({}), Some(DomainState::Paused), NodeHealth::Up, 1, ("bind", None)),
        ("no VM", json!({}), None, NodeHealth::Up, 1, ("fail", Some(Reason::VmNotFound))),
        (
            "missing",
            json!({}),
            Some(DomainState::Missing),
            NodeHealth::Up,
            1,
            ("fail", Some(Reason::VmNotFound)),
        ),
        ("off", json!({}), Some(DomainState::Off), NodeHealth::Up, 1, ("wait", Some(Reason::VmNotRunning))),
        (
            "off, refused",
            json!({"offline": "Refuse"}),
            Some(DomainState::Off),
            NodeHealth::Up,
            1,
            ("fail", Some(Reason::VmNotRunning)),
        ),
        (
            "off for too long",
            json!({}),
            Some(DomainState::Off),
            NodeHealth::Up,
            100,
            ("fail", Some(Reason::StartDeadlineExceeded)),
        ),
        ("busy", json!({}), Some(DomainState::Busy), NodeHealth::Up, 99, ("wait", Some(Reason::VmBusy))),
        (
            "node down",
            json!({}),
            Some(DomainState::NodeLost),
            NodeHealth::Gone,
            1,
            ("wait", Some(Reason::NodeNotReady)),
        ),
        (
            "node not ready",
            json!({}),
            Some(DomainState::Running),
            NodeHealth::NotReady,
            1,
            ("wait", Some(Reason::NodeNotReady)),
        ),
        (
            "unknown disk",
            json!({"disks": ["vda", "vdx"]}),
            Some(DomainState::Off),
            NodeHealth::Up,
            1,
            ("fail", Some(Reason::DiskNotFound)),
        ),
        (
            "unsupported disk",
            json!({"disks": ["vdc"]}),
            Some(DomainState::Running),
            NodeHealth::Up,
            1,
            ("fail", Some(Reason::DiskNotSupported)),
        ),
        (
            "cancelled",
            json!({"state": "Cancelled"}),
            Some(DomainState::Off),
            NodeHealth::Up,
            1,
            ("fail", Some(Reason::Cancelled)),
        ),
    ];
    for (what, spec, state, node, now, expected) in table {
        let found = state.map(domain);
        let facts = Facts { node, ..facts(found.as_ref(), now) };
        assert_eq!(says(&resolve(&backup("a", 0, spec), &facts)), expected, "{what}");
    }
    let silent = Facts { agent_answers: false, ..facts(Some(&running), 1) };
    let verdict = resolve(&backup("a", 0, json!({})), &silent);
    assert_eq!(says(&verdict), ("wait", Some(Reason::AgentUnreachable)));
    let mut bare = running;
    bare.status.as_mut().unwrap().disks.retain(|disk| disk.backup == BackupSupport::Unsupported);
    let facts = facts(Some(&bare), 1);
    let verdict = resolve(&backup("a", 0, json!({})), &facts);
    assert_eq!(says(&verdict), ("fail", Some(Reason::DiskNotSupported)), "no disk at all");
}

#[test]
fn takes_every_disk_that_can_be_backed_up_in_the_domains_order() {
    let domain = domain(DomainState::Running);
    let facts = facts(Some(&domain), 1);
    let names = |spec| match resolve(&backup("a", 0, spec), &facts) {
        Verdict::Bind(binding) => {
            let bitmaps: Vec<_> = binding.in_checkpoint.iter().map(|disk| disk.target.clone()).collect();
            (binding.disks.iter().map(|disk| disk.name.clone()).collect::<Vec<_>>(), bitmaps)
        }
        other => panic!("{other:?}"),
    };
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert_eq!(names(json!({})), (owned(&["vda", "vdb"]), owned(&["vda"])));
    assert_eq!(names(json!({"disks": ["vdb", "vda"]})), (owned(&["vda", "vdb"]), owned(&["vda"])));
    assert_eq!(names(json!({"disks": ["vdb"]})), (owned(&["vdb"]), owned(&[])));
}

#[test]
fn one_unfinished_backup_a_vm_and_never_two_that_wait_for_each_other() {
    let domain = domain(DomainState::Running);
    let new = |name, created| backup(name, created, json!({}));
    let bound = with_status(new("b", 9), Phase::Initializing, Some("node-a"));
    let done = with_status(new("b", 0), Phase::Failed, Some("node-a"));
    let cases = [
        ("an older one", new("b", 1), true),
        ("a younger one", new("b", 3), false),
        ("a bound one, younger", bound, true),
        ("a finished one", done, false),
        ("a cancelled one, older", backup("b", 1, json!({"state": "Cancelled"})), false),
    ];
    for (what, other, waits) in cases {
        let verdict = |backup: &VmBackup, other: &VmBackup| {
            let others = [other.clone(), backup.clone()];
            resolve(backup, &Facts { others: &others, ..facts(Some(&domain), 20) })
        };
        let mine = verdict(&new("a", 2), &other);
        assert_eq!(matches!(mine, Verdict::Wait(_)), waits, "{what}: {mine:?}");
        if let Verdict::Wait(because) = mine {
            assert!(because.message.contains("VmBackup b "), "says for whom: {}", because.message);
        }
    }
    let (a, b) = (new("a", 2), new("b", 2));
    let waits = |one: &VmBackup, other: &VmBackup| {
        let others = [other.clone()];
        let facts = Facts { others: &others, ..facts(Some(&domain), 3) };
        matches!(resolve(one, &facts), Verdict::Wait(_))
    };
    assert!(waits(&a, &b) != waits(&b, &a), "of two of the same second exactly one waits");
}
