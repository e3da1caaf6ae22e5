//! RBAC: which verbs on which kinds.

use serde_json::{Value, json};

use super::{AGENT_ACCOUNT, OPERATOR_ACCOUNT};
use crate::api::{AUTHORITY, GROUP, SIGNER};

const EVENTS: &str = "events.k8s.io";
const COORDINATION: &str = "coordination.k8s.io";
const CERTIFICATES: &str = "certificates.k8s.io";
const RBAC: &str = "rbac.authorization.k8s.io";

/// Spec-level bookkeeping of our kinds, deleting ticket Secrets, signing agents' certificates; it reads no Secret but its CA's.
pub fn operator(namespace: &str) -> Vec<Value> {
    let everywhere = vec![
        rule(
            GROUP,
            &["vmbackups", "vmcheckpoints", "imagetransfers", "libvirtdomains"],
            &["get", "list", "watch"],
        ),
        // the finalizer; ttlSecondsAfterFinished
        rule(GROUP, &["vmbackups"], &["patch", "delete"]),
        // made with a backup, and removed with it
        rule(GROUP, &["vmcheckpoints", "imagetransfers"], &["create", "patch", "delete"]),
        rule(GROUP, &["libvirtdomains"], &["create", "delete"]),
        rule(
            GROUP,
            &["vmbackups/status", "vmcheckpoints/status", "imagetransfers/status", "libvirtdomains/status"],
            &["update"],
        ),
        // owner references that block deletion (OwnerReferencesPermissionEnforcement)
        rule(GROUP, &["vmbackups/finalizers"], &["update"]),
        // a policy narrows it to tickets
        rule("", &["secrets"], &["delete"]),
        rule("", &["nodes"], &["get", "list", "watch"]),
        // its uid is the cluster's id
        json!({"apiGroups": [""], "resources": ["namespaces"], "resourceNames": ["kube-system"], "verbs": ["get"]}),
        // whether the kind itself is being removed: its bitmaps stay then
        json!({"apiGroups": ["apiextensions.k8s.io"], "resources": ["customresourcedefinitions"],
            "resourceNames": ["vmcheckpoints.virtmark.dev"], "verbs": ["get"]}),
        rule(EVENTS, &["events"], &["create", "patch"]),
        // what agents ask for; admission holds it to its own signer, by the two verbs below
        rule(CERTIFICATES, &["certificatesigningrequests"], &["get", "list", "watch"]),
        rule(
            CERTIFICATES,
            &["certificatesigningrequests/approval", "certificatesigningrequests/status"],
            &["update"],
        ),
        json!({"apiGroups": [CERTIFICATES], "resources": ["signers"], "resourceNames": [SIGNER],
            "verbs": ["approve", "sign"]}),
    ];
    let here = vec![
        rule(GROUP, &["domainsightings"], &["get", "list", "watch"]),
        // its CA, and whom to trust; RBAC cannot say what may be created, a policy does
        rule("", &["secrets", "configmaps"], &["create"]),
        json!({"apiGroups": [""], "resources": ["secrets", "configmaps"], "resourceNames": [AUTHORITY],
            "verbs": ["get", "update"]}),
        // whether Helm made it, before backups are cancelled for it
        json!({"apiGroups": ["batch"], "resources": ["jobs"], "resourceNames": ["virtmark-uninstall"],
            "verbs": ["get"]}),
        // the lease by which one operator leads; the heartbeats of agents, which are told to Prometheus
        rule(COORDINATION, &["leases"], &["get", "list", "create", "update", "patch"]),
    ];
    account(namespace, OPERATOR_ACCOUNT, everywhere, here)
}

/// The status of objects bound to its node, its own sightings and heartbeat, new ticket Secrets. Policies narrow all.
pub fn agent(namespace: &str) -> Vec<Value> {
    let everywhere = vec![
        rule(GROUP, &["vmbackups", "vmcheckpoints", "imagetransfers"], &["get", "list", "watch"]),
        rule(GROUP, &["vmbackups/status", "vmcheckpoints/status", "imagetransfers/status"], &["update"]),
        rule("", &["secrets"], &["create"]),
        // whether its own is cordoned; RBAC cannot say "its own"
        rule("", &["nodes"], &["get", "list", "watch"]),
        // its uid is the cluster's id, and says which bitmaps are ours
        json!({"apiGroups": [""], "resources": ["namespaces"], "resourceNames": ["kube-system"], "verbs": ["get"]}),
        rule(EVENTS, &["events"], &["create", "patch"]),
        // its certificate; a policy narrows it to our signer
        rule(CERTIFICATES, &["certificatesigningrequests"], &["create", "get"]),
    ];
    let here = vec![
        rule(GROUP, &["domainsightings"], &["get", "list", "create", "update", "delete"]),
        // whom to trust
        json!({"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [AUTHORITY],
            "verbs": ["get", "list", "watch"]}),
        // its heartbeat
        rule(COORDINATION, &["leases"], &["create", "patch"]),
    ];
    account(namespace, AGENT_ACCOUNT, everywhere, here)
}

/// Roles to bind people and backup products to, in the namespaces where their VMs are.
pub fn users() -> Vec<Value> {
    let reads = [rule(
        GROUP,
        &["vmbackups", "vmcheckpoints", "imagetransfers", "libvirtdomains"],
        &["get", "list", "watch"],
    )];
    let writes = ["create", "patch", "update", "delete"];
    let backs_up = [
        reads[0].clone(),
        rule(GROUP, &["vmbackups", "imagetransfers"], &writes),
        // creating one imports bitmaps that are there already
        rule(GROUP, &["vmcheckpoints"], &["create", "delete"]),
        // which VMs may be backed up; name some with resourceNames, in a role of your own
        rule(GROUP, &["libvirtdomains"], &["backup"]),
        // the tickets, which are bearer secrets
        rule("", &["secrets"], &["get"]),
    ];
    vec![cluster_role("virtmark-view", &reads), cluster_role("virtmark-backup", &backs_up)]
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": [group], "resources": resources, "verbs": verbs})
}

fn cluster_role(name: &str, rules: &[Value]) -> Value {
    json!({"apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules})
}

/// A ServiceAccount with what it may do everywhere, and in its own namespace.
fn account(namespace: &str, name: &str, everywhere: Vec<Value>, here: Vec<Value>) -> Vec<Value> {
    let metadata = json!({"name": name, "namespace": namespace});
    let subjects = json!([{"kind": "ServiceAccount", "name": name, "namespace": namespace}]);
    let version = format!("{RBAC}/v1");
    vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}),
        cluster_role(name, &everywhere),
        json!({"apiVersion": version, "kind": "ClusterRoleBinding", "metadata": {"name": name},
            "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": name}, "subjects": subjects}),
        json!({"apiVersion": version, "kind": "Role", "metadata": metadata, "rules": here}),
        json!({"apiVersion": version, "kind": "RoleBinding", "metadata": metadata,
            "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": name}, "subjects": subjects}),
    ]
}
