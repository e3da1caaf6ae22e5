//! The CEL rules, run without an API server: what is refused at creation, and what must not change. And what the
//! conditions of each phase are.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::conditions::Observation;
use super::*;
use crate::reason::{Because, Reason};

fn backup(name: &str, spec: Value) -> VmBackup {
    let metadata = json!({"name": name, "namespace": "vms"});
    let object = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmBackup", "metadata": metadata, "spec": spec});
    serde_json::from_value(object).unwrap()
}

fn with(change: Value) -> VmBackup {
    let mut spec = json!({"vm": "db01", "disks": ["vda"], "quiesce": {"mode": "None"}});
    for (key, value) in change.as_object().unwrap() {
        spec[key] = value.clone();
    }
    backup("b", spec)
}

#[test]
fn a_name_that_leaves_no_room_for_its_transfers_is_refused() {
    backup(&"x".repeat(180), json!({"vm": "db01"})).validate_cel().unwrap();
    let refused = backup(&"x".repeat(181), json!({"vm": "db01"})).validate_cel();
    assert!(format!("{:?}", refused.unwrap_err()).contains("at most 180"));
}

#[test]
fn what_a_backup_is_about_never_changes() {
    let old = with(json!({}));
    for (change, words) in [
        (json!({"vm": "db02"}), "vm is immutable"),
        (json!({"disks": ["vdb"]}), "disks is immutable"),
        (json!({"disks": null}), "disks is immutable"),
        (json!({"quiesce": {"mode": "Required"}}), "quiesce is immutable"),
        (json!({"quiesce": null}), "quiesce is immutable"),
        (json!({"offline": "Refuse"}), "offline is immutable"),
        (json!({"type": "Incremental"}), "type is immutable"),
        (json!({"onInvalidCheckpoint": "Fail"}), "onInvalidCheckpoint is immutable"),
        (json!({"transfers": "Manual"}), "transfers is immutable"),
        (json!({"maxCheckpoints": 1}), "maxCheckpoints is immutable"),
    ] {
        let refused = with(change.clone()).validate_cel_update(&old);
        let said = format!("{:?}", refused.expect_err(&change.to_string()));
        assert!(said.contains(words), "{change}: {said}");
    }
    for change in [
        json!({}),
        json!({"clientIdleSeconds": 1}),
        json!({"readyDeadlineSeconds": 1}),
        json!({"startDeadlineSeconds": 1}),
        json!({"ttlSecondsAfterFinished": 1}),
    ] {
        assert!(with(change.clone()).validate_cel_update(&old).is_ok(), "{change} was refused");
    }
}

#[test]
fn a_base_is_for_an_incremental_and_stays_the_same() {
    let from = |kind: &str, name: &str| with(json!({"type": kind, "fromCheckpoint": name}));
    from("Incremental", "a").validate_cel().unwrap();
    let refused = format!("{:?}", from("Full", "a").validate_cel().unwrap_err());
    assert!(refused.contains("needs type Incremental"), "{refused}");
    let moved = from("Incremental", "b").validate_cel_update(&from("Incremental", "a"));
    assert!(format!("{:?}", moved.unwrap_err()).contains("fromCheckpoint is immutable"));
}

#[test]
fn state_goes_one_way() {
    let states = ["Running", "Finalized", "Cancelled"];
    for (from, old) in states.iter().enumerate() {
        for (to, new) in states.iter().enumerate() {
            let (before, after) = (with(json!({"state": old})), with(json!({"state": new})));
            assert_eq!(after.validate_cel_update(&before).is_ok(), to >= from, "{old} to {new}");
            let transfer = |state: &str| transfer(json!({"state": state}));
            let moved = transfer(new).validate_cel_update(&transfer(old));
            assert_eq!(moved.is_ok(), to >= from, "transfer: {old} to {new}");
        }
        let paused = transfer(json!({"state": "Paused"}));
        let other = transfer(json!({"state": old}));
        assert!(other.validate_cel_update(&paused).is_ok(), "transfer: Paused to {old}");
        assert_eq!(
            paused.validate_cel_update(&other).is_ok(),
            *old == "Running",
            "transfer: {old} to Paused"
        );
    }
}

fn transfer(more: Value) -> ImageTransfer {
    let mut spec = json!({"backup": "b", "disk": "vda"});
    if let (Some(spec), Value::Object(more)) = (spec.as_object_mut(), more) {
        spec.extend(more);
    }
    serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "ImageTransfer",
        "metadata": {"name": "t"}, "spec": spec}))
    .unwrap()
}

#[test]
fn what_qemu_serves_itself_has_no_time_and_no_pause() {
    for (nbd, refusal) in [
        (json!({"protocol": "Nbd", "state": "Paused"}), "cannot be paused"),
        (json!({"protocol": "Nbd", "inactivityTimeoutSeconds": 60}), "needs protocol Imageio"),
    ] {
        let refused = format!("{:?}", transfer(nbd.clone()).validate_cel().unwrap_err());
        assert!(refused.contains(refusal), "{nbd}: {refused}");
    }
    transfer(json!({"protocol": "Nbd"})).validate_cel().unwrap();
    let all = json!({"state": "Paused", "inactivityTimeoutSeconds": 60, "timeoutPolicy": "Pause"});
    transfer(all).validate_cel().unwrap();
}

#[test]
fn every_node_of_every_schema_is_typed_and_bounded() {
    fn walk(path: &str, node: &Value, found: &mut Vec<String>) {
        let opaque = node.get("x-kubernetes-int-or-string").is_some();
        match node.get("type").and_then(Value::as_str) {
            None if !opaque => found.push(format!("{path} has no type")),
            Some("array") if node.get("maxItems").is_none() => found.push(format!("{path} has no maxItems")),
            Some("string") => {
                let bounded = ["maxLength", "enum", "format"].iter().any(|bound| node.get(bound).is_some());
                // the conditions' own schema is Kubernetes'
                if !bounded && !path.contains(".conditions") {
                    found.push(format!("{path} has no bound"));
                }
            }
            _ => {}
        }
        for (name, child) in node.get("properties").and_then(Value::as_object).into_iter().flatten() {
            walk(&format!("{path}.{name}"), child, found);
        }
        if let Some(items) = node.get("items") {
            assert!(items.is_object(), "{path}: a tuple is no structural schema");
            walk(&format!("{path}[]"), items, found);
        }
    }
    let mut found = Vec::new();
    for crd in crds() {
        let schema = serde_json::to_value(&crd.spec.versions[0].schema).unwrap();
        let schema = &schema["openAPIV3Schema"]["properties"];
        for part in ["spec", "status"] {
            if let Some(node) = schema.get(part) {
                walk(&format!("{}.{part}", crd.spec.names.kind), node, &mut found);
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn every_reason_says_what_it_means_and_what_to_do() {
    use crate::reason::Reason;
    for reason in Reason::ALL {
        assert!(!reason.meaning().is_empty() && !reason.next_step().is_empty(), "{reason}");
        assert!(reason.as_str().chars().all(char::is_alphanumeric), "{reason} is CamelCase");
    }
}

/// kstatus calls an object without a status, and one without a condition that it knows, done.
#[test]
fn an_object_that_nobody_has_looked_at_is_not_done() {
    for crd in crds() {
        for version in &crd.spec.versions {
            let schema = version.schema.as_ref().and_then(|schema| schema.open_api_v3_schema.as_ref());
            let properties = schema.and_then(|schema| schema.properties.as_ref()).unwrap();
            let default = properties.get("status").map(|status| status.default.clone().unwrap().0);
            let expected =
                (crd.spec.names.kind != "DomainSighting").then(|| json!({"observedGeneration": -1}));
            assert_eq!(default, expected, "{}", crd.spec.names.kind);
        }
    }
}

#[test]
fn what_lasts_is_done_when_it_is_ready_and_what_is_one_shot_when_it_succeeded() {
    let said = |say: fn(&mut Vec<Condition>, Phase, &Because, Observation), phase| {
        let mut conditions = Vec::new();
        let because = Because::new(Reason::Bound, "");
        let seen = Observation { generation: Some(1), now: Timestamp::UNIX_EPOCH };
        say(&mut conditions, phase, &because, seen);
        [conditions::READY, conditions::RECONCILING, conditions::STALLED]
            .map(|kind| conditions::is_true(&conditions, kind))
    };
    for (phase, lasting, one_shot) in [
        (Phase::Initializing, [false, true, false], [false, true, false]),
        (Phase::Ready, [true, false, false], [true, true, false]),
        (Phase::Finalizing, [false, true, false], [false, true, false]),
        (Phase::Succeeded, [true, false, false], [true, false, false]),
        (Phase::Failed, [false, false, true], [false, false, true]),
        (Phase::Cancelled, [false, false, true], [false, false, true]),
    ] {
        assert_eq!(said(conditions::lasting, phase), lasting, "{phase:?}");
        assert_eq!(said(conditions::one_shot, phase), one_shot, "{phase:?}");
    }
}

#[test]
fn a_transfer_reads_a_backup_or_makes_a_volume() {
    let volume = json!({"nodeName": "n", "pool": "p", "name": "v", "size": 512});
    for (spec, refusal) in [
        (json!({"direction": "Upload"}), "an upload names a new volume"),
        (json!({"direction": "Upload", "volume": volume}), "an upload names a new volume"),
        (json!({"volume": volume}), "a download names a backup"),
    ] {
        // over the backup and disk that every transfer of these tests has
        let refused = format!("{:?}", transfer(spec.clone()).validate_cel().unwrap_err());
        assert!(refused.contains(refusal), "{spec}: {refused}");
    }
    let upload = |more: serde_json::Value| {
        let mut upload = transfer(json!({"direction": "Upload", "volume": volume}));
        (upload.spec.backup, upload.spec.disk) = (None, None);
        if more["protocol"] == "Nbd" {
            upload.spec.protocol = super::Protocol::Nbd;
        }
        upload
    };
    upload(json!({})).validate_cel().unwrap();
    let refused = format!("{:?}", upload(json!({"protocol": "Nbd"})).validate_cel().unwrap_err());
    assert!(refused.contains("needs protocol Imageio"), "{refused}");
}
