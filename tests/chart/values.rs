//! Every value does something: with another one than the default the rendering is another one.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::chart::{file, render};

const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Another value than the default, where adding one or negating will not do, by how its path ends.
fn others() -> Vec<(&'static str, Value)> {
    vec![
        ("/commonLabels", json!({"team": "storage"})),
        ("/imagePullSecrets", json!([{"name": "registry"}])),
        ("/domainsNamespace/name", json!("machines")),
        ("/rbac/aggregateViewTo", json!(["view", "edit"])),
        ("/rbac/aggregateBackupTo", json!([])),
        ("/libvirt/socketDir", json!("/srv/libvirt")),
        ("/libvirt/uri", json!("qemu:///system?socket=/run/libvirt/virtqemud-sock")),
        ("/log/format", json!("text")),
        ("/log/filter", json!("debug")),
        ("/networkPolicy/clients", json!([{"ipBlock": {"cidr": "192.0.2.0/24"}}])),
        ("/networkPolicy/scrapers", json!([{"podSelector": {"matchLabels": {"app": "prometheus"}}}])),
        ("/networkPolicy/apiServerPorts", json!([6443])),
        ("/interval", json!("1m")),
        ("/podMonitor/labels", json!({"release": "prometheus"})),
        ("/serviceMonitor/labels", json!({"release": "prometheus"})),
        ("/prometheusRule/labels", json!({"release": "prometheus"})),
        ("/labels/grafana_dashboard", json!("yes")),
        ("/dashboard/annotations", json!({"grafana_folder": "VMs"})),
        ("/image/registry", json!("registry.example.com:5000")),
        ("/image/repository", json!("mirror/virtmark")),
        ("/image/tag", json!("v9")),
        ("/image/digest", json!(DIGEST)),
        ("/image/pullPolicy", json!("Always")),
        ("/extraArgs", json!(["--log-format=text"])),
        ("/extraEnv", json!([{"name": "TZ", "value": "UTC"}])),
        ("/podLabels", json!({"team": "storage"})),
        ("/podAnnotations", json!({"example.com/scrape": "true"})),
        ("/cpu", json!("1")),
        ("/memory", json!("2Gi")),
        ("/priorityClassName", json!("")),
        ("/kubernetes.io~1os", json!("plan9")),
        (
            "/affinity",
            json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms":
                [{"matchExpressions": [{"key": "hypervisor", "operator": "Exists"}]}]}}}),
        ),
        ("/tolerations", json!([{"key": "hypervisor", "operator": "Exists"}])),
        (
            "/topologySpread",
            json!([{"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}]),
        ),
        ("/operator/updateStrategy/type", json!("Recreate")),
        ("/agent/updateStrategy/type", json!("OnDelete")),
        ("/maxSurge", json!("50%")),
        ("/stateDir", json!("/srv/virtmark")),
        ("/runDir", json!("/srv/virtmark-run")),
        ("/imageDirs", json!(["/var/lib/libvirt/images", "/srv/vms"])),
        ("/listenAddress", json!("$(HOST_IP)")),
        ("/advertise", json!("$(NODE_NAME).example.com")),
        ("/tls/secretName", json!("image-server")),
        ("/tls/issuer", json!("Signer")),
        ("/tls/trust", json!("SystemTrust")),
        ("/scratchLimitMib", json!(1_048_576)),
        ("/tenancy/namespaces", json!({"vms": {"pools": ["default"]}})),
        ("/seLinuxOptions", json!({"type": "spc_t"})),
    ]
}

/// What else must be set for a value to matter.
fn context(path: &str) -> Value {
    match path {
        "/agent/tls/trust" => json!({"agent": {"tls": {"secretName": "image-server"}}}),
        _ => match path.strip_prefix("/monitoring/").and_then(|rest| rest.split_once('/')) {
            Some((one, rest)) if rest != "enabled" => json!({"monitoring": {one: {"enabled": true}}}),
            _ => json!({}),
        },
    }
}

/// The values of the file, by their path: what is no map, or an empty one.
fn leaves(values: &Value, path: &str, into: &mut Vec<(String, Value)>) {
    match values.as_object().filter(|map| !map.is_empty()) {
        Some(map) => {
            for (key, value) in map {
                leaves(value, &format!("{path}/{}", key.replace('/', "~1")), into);
            }
        }
        None => into.push((path.to_owned(), values.clone())),
    }
}

/// With the value at a path that is another one; the maps on the way are made.
fn put(mut into: &mut Value, path: &str, value: Value) {
    for key in path.split('/').skip(1) {
        into = &mut into[key.replace("~1", "/")];
    }
    *into = value;
}

/// Every value of the file, and another one for it.
fn changes() -> Result<Vec<(String, Value)>> {
    let defaults: Value = serde_saphyr::from_str(&file("values.yaml")?)?;
    let (mut all, mut changes) = (Vec::new(), Vec::new());
    leaves(&defaults, "", &mut all);
    let (others, mut used) = (others(), BTreeSet::new());
    for (path, default) in all {
        let other = match others.iter().find(|(end, _)| path.ends_with(end)) {
            Some((end, other)) => {
                used.insert(*end);
                other.clone()
            }
            None => match &default {
                Value::Bool(on) => json!(!on),
                Value::Number(number) => json!(number.as_i64().context("no integer")? + 1),
                _ => anyhow::bail!("{path} has a new kind of value: say in `others` what else it may be"),
            },
        };
        ensure!(other != default, "{path}");
        changes.push((path, other));
    }
    let unused: Vec<_> = others.iter().filter(|(end, _)| !used.contains(end)).map(|(end, _)| *end).collect();
    ensure!(unused.is_empty(), "no such values: {unused:?}");
    Ok(changes)
}

#[test]
fn every_value_does_something() -> Result<()> {
    let mut idle = Vec::new();
    for (path, other) in changes()? {
        let before = context(&path);
        let mut after = before.clone();
        put(&mut after, &path, other);
        let rendered = render(&after).with_context(|| path.clone())?;
        if rendered == render(&before)? {
            idle.push(path);
        }
    }
    ensure!(idle.is_empty(), "these do nothing: {idle:?}");
    Ok(())
}

/// All of them at once.
pub fn all_changed() -> Result<Value> {
    let mut all = json!({});
    for (path, other) in changes()? {
        put(&mut all, &path, other);
    }
    Ok(all)
}
