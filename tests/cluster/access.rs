//! Least privilege: what RBAC and the admission policies refuse, asked with the tokens that agents, operator and
//! users really have.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::component::{SYSTEM_NAMESPACE, VM_NAMESPACE, account};
use virtmark_bed::kubectl::Kubectl;
use virtmark_bed::wait_until;

use super::rig::{BOUND, Rig, small};

/// kubectl with a token of an account, bound to a node or to none.
fn with_token(rig: &Rig, of: &str, node: Option<&str>) -> Result<Kubectl> {
    let file = format!("{of}-{}-{}", node.unwrap_or("unbound"), rig.vm.name);
    let path = account(&rig.bed.dir, &rig.bed.plane, of, &file, node)?;
    Ok(Kubectl::new(&path, None))
}

/// Says no, and says why.
fn refused<T: std::fmt::Debug>(what: &str, answer: Result<T>, why: &str) -> Result<()> {
    match answer {
        Ok(answer) => anyhow::bail!("{what}: was done: {answer:?}"),
        Err(error) => {
            let text = format!("{error:#}");
            ensure!(text.contains(why), "{what}: refused for another reason than {why:?}: {text}");
            Ok(())
        }
    }
}

fn replace_status(kubectl: &Kubectl, object: &Value) -> Result<String> {
    kubectl.run_with(&["replace", "--subresource=status", "-f", "-"], &object.to_string())
}

fn changed(object: &Value, pointer: &str, value: Value) -> Value {
    let mut object = object.clone();
    object["metadata"]["managedFields"] = Value::Null;
    set(&mut object, pointer, value);
    object
}

fn set(object: &mut Value, pointer: &str, value: Value) {
    let (parent, key) = pointer.rsplit_once('/').expect("a JSON pointer");
    object.pointer_mut(parent).expect("its parent is there")[key] = value;
}

#[test]
fn an_agent_is_held_to_its_node() -> Result<()> {
    let rig = Rig::running("guarded", small())?;
    rig.backup("guarded-1", json!({}))?;
    rig.phase("vmbackup", "guarded-1", "Ready")?;
    rig.phase("imagetransfer", "guarded-1-vda", "Ready")?;
    rig.backup("guarded-waits", json!({}))?;
    rig.reason("vmbackup", "guarded-waits", "BackupAlreadyRunning")?;
    let own = with_token(&rig, "virtmark-agent", Some("node-a"))?;
    let other = with_token(&rig, "virtmark-agent", Some("node-b"))?;
    let unbound = with_token(&rig, "virtmark-agent", None)?;
    let (backup, transfer) = (rig.get("vmbackup", "guarded-1")?, rig.get("imagetransfer", "guarded-1-vda")?);
    let waits = rig.get("vmbackup", "guarded-waits")?;

    let failed = changed(&backup, "/status/phase", json!("Failed"));
    refused("another node's status", replace_status(&other, &failed), "not bound to the token's node")?;
    refused("an unbound token", replace_status(&unbound, &failed), "the token is not bound to a node")?;
    let given = changed(&backup, "/status/nodeName", json!("node-b"));
    refused("taking it over", replace_status(&other, &given), "not bound to the token's node")?;
    refused("giving it away", replace_status(&own, &given), "cannot give an object to another node")?;
    let claimed = changed(&waits, "/status/nodeName", json!("node-b"));
    refused("claiming an unbound one", replace_status(&other, &claimed), "not bound to the token's node")?;
    let renamed = changed(&backup, "/status/toCheckpoint", json!("another"));
    refused("another checkpoint", replace_status(&own, &renamed), "cannot name another checkpoint")?;
    let stolen = changed(&transfer, "/status/ticketSecret", json!("somebody-elses"));
    refused("another Secret", replace_status(&own, &stolen), "not named after the transfer")?;

    // spec and metadata: not by themselves, and not along with a status
    for patch in [json!({"spec": {"state": "Finalized"}}), json!({"metadata": {"finalizers": null}})] {
        let arguments =
            ["-n", VM_NAMESPACE, "patch", "vmbackup", "guarded-1", "--type=merge", "-p", &patch.to_string()]
                .map(str::to_owned);
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        refused("a patch", own.run(&arguments), "forbidden")?;
    }
    let mut along = changed(&rig.get("vmbackup", "guarded-1")?, "/spec/state", json!("Finalized"));
    along["metadata"]["finalizers"] = json!([]);
    along["metadata"]["labels"] = json!({"mine": "now"});
    replace_status(&own, &along)?;
    let after = rig.get("vmbackup", "guarded-1")?;
    assert_eq!(after["spec"], backup["spec"], "a write of the status writes the status");
    assert_eq!(after["metadata"]["finalizers"], backup["metadata"]["finalizers"]);
    assert_eq!(after["metadata"]["labels"], backup["metadata"]["labels"]);

    secrets(&rig, &own, &other, &transfer)?;
    sightings(&rig, &own, &other)
}

/// A Secret as an agent makes it for `transfer`; `edit` makes it another.
fn secret(transfer: &Value, edit: &Value) -> String {
    let uid = transfer["metadata"]["uid"].as_str().unwrap_or_default();
    let mut secret = json!({"apiVersion": "v1", "kind": "Secret", "type": "virtmark.dev/ticket",
        "metadata": {"namespace": VM_NAMESPACE, "name": format!("ticket-{uid}-77"),
            "labels": {"virtmark.dev/backup-uid": "guarded"}, "ownerReferences": [{
            "apiVersion": "virtmark.dev/v1alpha1", "kind": "ImageTransfer", "uid": uid,
            "name": transfer["metadata"]["name"]}]},
        "stringData": {"url": "https://evil.example/images/x"}});
    for (pointer, value) in edit.as_object().into_iter().flatten() {
        set(&mut secret, pointer, value.clone());
    }
    secret.to_string()
}

fn secrets(rig: &Rig, own: &Kubectl, other: &Kubectl, transfer: &Value) -> Result<()> {
    let create =
        |kubectl: &Kubectl, edit: Value| kubectl.run_with(&["create", "-f", "-"], &secret(transfer, &edit));
    wait_until(BOUND, "the policy to know the transfer", || Ok(create(own, json!({})).ok().map(drop)))?;
    let name = format!("ticket-{}-77", transfer["metadata"]["uid"].as_str().context("no uid")?);
    rig.kubectl(&["delete", "secret", &name])?;
    refused("for another node's transfer", create(other, json!({})), "not bound to the token's node")?;
    refused("of another type", create(own, json!({"/type": "Opaque"})), "Secrets of tickets only")?;
    let token = json!({"/type": "kubernetes.io/service-account-token",
        "/metadata/annotations": {"kubernetes.io/service-account.name": "default"}});
    refused("a token", create(own, token), "Secrets of tickets only")?;
    let none = json!({"/metadata/ownerReferences": []});
    refused("for no transfer", create(own, none), "belongs to one ImageTransfer")?;
    let named = json!({"/metadata/name": "db-password"});
    refused("of another name", create(own, named), "belongs to one ImageTransfer")?;
    let held = json!({"/metadata/finalizers": ["virtmark.dev/mine"]});
    refused("with a finalizer", create(own, held), "no finalizers")?;
    let elsewhere = json!({"/metadata/namespace": "default"});
    refused("in another namespace", create(own, elsewhere), "denied request")?;
    let bare = json!({"/metadata/namespace": "default", "/metadata/labels": {}});
    refused("without its label", create(own, bare), "has the label")?;
    // Helm's, say: a policy that asks for transfers where there are none is for nobody else
    let others = format!("guarded-{}", rig.vm.name);
    rig.bed.kubectl().run(&["-n", "default", "create", "secret", "generic", &others])?;
    rig.bed.kubectl().run(&["-n", "default", "delete", "secret", &others])?;
    let real = transfer["status"]["ticketSecret"].as_str().context("no ticketSecret")?;
    let operator = with_token(rig, "virtmark-operator", None)?;
    for (who, kubectl) in [("agent", own), ("operator", &operator)] {
        refused(who, kubectl.run(&["-n", VM_NAMESPACE, "get", "secret", real]), "forbidden")?;
        refused(who, kubectl.run(&["-n", VM_NAMESPACE, "get", "secrets"]), "forbidden")?;
    }
    refused("an agent deletes", own.run(&["-n", VM_NAMESPACE, "delete", "secret", real]), "forbidden")?;
    rig.kubectl(&["create", "secret", "generic", "guarded-password", "--from-literal=a=b"])?;
    let deleted = operator.run(&["-n", VM_NAMESPACE, "delete", "secret", "guarded-password"]);
    rig.kubectl(&["delete", "secret", "guarded-password", "--ignore-not-found"])?;
    refused("the operator deletes another's", deleted, "Secrets of tickets only")
}

fn sightings(rig: &Rig, own: &Kubectl, other: &Kubectl) -> Result<()> {
    let name = format!("node-a.{}", rig.vm.uuid);
    let list =
        rig.bed.kubectl().run(&["-n", SYSTEM_NAMESPACE, "get", "domainsighting", &name, "-o", "json"])?;
    let real: Value = serde_json::from_str(&list)?;
    let write = |kubectl: &Kubectl, verb: &str, object: &Value| {
        kubectl.run_with(&[verb, "-f", "-"], &object.to_string())
    };
    let off = changed(&real, "/spec/state", json!("Off"));
    refused("another node's sighting", write(other, "replace", &off), "another node's")?;
    let delete = ["-n", SYSTEM_NAMESPACE, "delete", "domainsighting", &name];
    refused("deleting another node's", other.run(&delete), "another node's")?;
    let fresh = |node: &str, name: &str| {
        json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "DomainSighting",
            "metadata": {"name": name, "namespace": SYSTEM_NAMESPACE},
            "spec": {"nodeName": node, "uuid": "00000000-0000-4000-8000-000000000001", "name": "forged",
                "state": "Running", "disks": []}})
    };
    let uuid = "00000000-0000-4000-8000-000000000001";
    let forged = fresh("node-a", &format!("node-a.{uuid}"));
    refused("a forged one", write(other, "create", &forged), "its own node only")?;
    refused(
        "under another's name",
        write(other, "create", &fresh("node-b", &format!("node-a.{uuid}"))),
        "name is",
    )?;
    let mut held = changed(&real, "/spec/state", json!("Off"));
    held["metadata"]["finalizers"] = json!(["virtmark.dev/mine"]);
    refused("with a finalizer", write(own, "replace", &held), "neither finalizers")
}

#[test]
fn only_who_may_back_a_vm_up_does() -> Result<()> {
    let rig = Rig::off("permitted", small())?;
    let role = |name: &str, rules: &Value| {
        let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": SYSTEM_NAMESPACE}},
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
                "metadata": {"name": name, "namespace": VM_NAMESPACE}, "rules": rules},
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
                "metadata": {"name": name, "namespace": VM_NAMESPACE},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
                "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": SYSTEM_NAMESPACE}]}]});
        rig.bed.kubectl().run_with(&["apply", "-f", "-"], &objects.to_string())
    };
    let creates = json!({"apiGroups": ["virtmark.dev"], "resources": ["vmbackups", "vmcheckpoints"],
        "verbs": ["create", "delete"]});
    let backs_up = json!({"apiGroups": ["virtmark.dev"], "resources": ["libvirtdomains"], "verbs": ["backup"],
        "resourceNames": ["permitted"]});
    role("may-create", &json!([creates]))?;
    role("may-back-up", &json!([creates, backs_up]))?;
    let create = |account: &str, vm: &str| -> Result<String> {
        let backup = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmBackup",
            "metadata": {"name": format!("{account}-{vm}"), "namespace": VM_NAMESPACE}, "spec": {"vm": vm}});
        with_token(&rig, account, None)?.run_with(&["create", "-f", "-"], &backup.to_string())
    };
    refused("without the verb", create("may-create", "permitted"), "NotPermitted")?;
    refused("another VM", create("may-back-up", "guarded"), "NotPermitted")?;
    create("may-back-up", "permitted")?;
    rig.delete("vmbackup", "may-back-up-permitted")?;
    // and no VmCheckpoint either, for its bitmaps go with it
    let import = |account: &str, vm: &str| -> Result<String> {
        let checkpoint = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmCheckpoint",
            "metadata": {"name": format!("{account}-{vm}"), "namespace": VM_NAMESPACE},
            "spec": {"vm": vm, "vmUuid": rig.vm.uuid, "bitmap": "b", "creationTime": "2026-11-25T00:00:00Z",
                "disks": [{"target": "vda", "format": "qcow2"}]}});
        with_token(&rig, account, None)?.run_with(&["create", "-f", "-"], &checkpoint.to_string())
    };
    refused("an import without the verb", import("may-create", "permitted"), "NotPermitted")?;
    refused("an import of another VM's", import("may-back-up", "guarded"), "NotPermitted")?;
    import("may-back-up", "permitted")?;
    rig.delete("vmcheckpoint", "may-back-up-permitted")?;
    for account in ["may-create", "may-back-up"] {
        rig.kubectl(&["delete", "role,rolebinding", account])?;
        rig.bed.kubectl().run(&["-n", SYSTEM_NAMESPACE, "delete", "serviceaccount", account])?;
    }
    Ok(())
}
