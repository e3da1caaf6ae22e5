//! What values.schema.json refuses, in which words, and that it says of each value what values.yaml says.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::chart::{file, render};

/// Values that are refused, and what Helm's words name.
fn refused() -> Vec<(Value, &'static str)> {
    let agent = |key: &str, value: Value| json!({"agent": {key: value}});
    vec![
        (json!({"replicas": 3}), "replicas"),
        (json!({"operator": {"replica": 3}}), "replica"),
        (json!({"operator": {"image": {"name": "x"}}}), "name"),
        (json!({"operator": {"replicas": "3"}}), "/operator/replicas"),
        (json!({"operator": {"replicas": -1}}), "/operator/replicas"),
        (json!({"operator": {"leaseSeconds": 2}}), "/operator/leaseSeconds"),
        (json!({"operator": {"podDisruptionBudget": {"minAvailable": 1}}}), "minAvailable"),
        (
            json!({"operator": {"podDisruptionBudget": {"maxUnavailable": "half"}}}),
            "/operator/podDisruptionBudget",
        ),
        (json!({"operator": {"image": {"digest": "sha256:0"}}}), "/operator/image/digest"),
        (json!({"operator": {"image": {"pullPolicy": "Sometimes"}}}), "/operator/image/pullPolicy"),
        (json!({"operator": {"extraArgs": ["-x"]}}), "/operator/extraArgs/0"),
        (json!({"operator": {"extraEnv": [{"value": "x"}]}}), "/operator/extraEnv/0"),
        (json!({"operator": {"tolerations": [{"operator": "Always"}]}}), "/operator/tolerations/0"),
        (agent("port", json!(0)), "/agent/port"),
        (agent("port", json!(65536)), "/agent/port"),
        (agent("stateDir", json!("var/lib/virtmark")), "/agent/stateDir"),
        (agent("stateDir", json!("/var/lib/../../etc")), "/agent/stateDir"),
        (agent("stateDir", json!("/")), "/agent/stateDir"),
        (agent("runDir", json!(format!("/{}", "r".repeat(60)))), "/agent/runDir"),
        (agent("imageDirs", json!(["/srv/a b"])), "/agent/imageDirs/0"),
        (agent("imageDirs", json!(["/srv", "/srv"])), "/agent/imageDirs"),
        (agent("advertise", json!("node:54322")), "/agent/advertise"),
        (agent("advertise", json!("$(POD_IP)")), "/agent/advertise"),
        (agent("listenAddress", json!("::")), "/agent/listenAddress"),
        (agent("scratchLimitMib", json!(0)), "/agent/scratchLimitMib"),
        (agent("heartbeatSeconds", json!(601)), "/agent/heartbeatSeconds"),
        (agent("lookSeconds", json!(0)), "/agent/lookSeconds"),
        (agent("tls", json!({"trust": "Nobody"})), "/agent/tls/trust"),
        (agent("tls", json!({"issuer": "signer"})), "/agent/tls/issuer"),
        (agent("privileged", json!(true)), "privileged"),
        (agent("updateStrategy", json!({"type": "Recreate"})), "/agent/updateStrategy/type"),
        (json!({"commonLabels": {"team": "a b"}}), "/commonLabels/team"),
        (json!({"domainsNamespace": {"name": "VMs"}}), "/domainsNamespace/name"),
        (json!({"libvirt": {"uri": "qemu+ssh://other/system"}}), "/libvirt/uri"),
        (json!({"libvirt": {"socketDir": "run/libvirt"}}), "/libvirt/socketDir"),
        (json!({"log": {"format": "xml"}}), "/log/format"),
        (json!({"tenancy": {"namespaces": {"vms": {"pool": ["default"]}}}}), "pool"),
        (
            json!({"tenancy": {"namespaces": {"vms": {"pools": ["../etc"]}}}}),
            "/tenancy/namespaces/vms/pools/0",
        ),
        (json!({"uninstall": {"cancelBackupsSeconds": -1}}), "/uninstall/cancelBackupsSeconds"),
        (json!({"networkPolicy": {"clients": [{}]}}), "/networkPolicy/clients/0"),
        (json!({"rbac": {"aggregateBackupTo": ["view"]}}), "/rbac/aggregateBackupTo/0"),
        (json!({"imagePullSecrets": ["registry"]}), "/imagePullSecrets/0"),
    ]
}

#[test]
fn what_cannot_be_is_refused_and_named() -> Result<()> {
    for (values, named) in refused() {
        let Err(refusal) = render(&values) else { anyhow::bail!("{values} was taken") };
        let refusal = format!("{refusal:#}");
        ensure!(refusal.contains("schema"), "{values}: {refusal}");
        ensure!(refusal.contains(named), "{values} is refused without naming {named}: {refusal}");
    }
    Ok(())
}

#[test]
fn what_a_parent_chart_hands_down_is_taken() -> Result<()> {
    assert_eq!(render(&json!({"global": {"any": "thing"}}))?, render(&json!({}))?);
    Ok(())
}

#[test]
fn no_map_takes_keys_that_it_does_not_know() -> Result<()> {
    let schema: Value = serde_json::from_str(&file("values.schema.json")?)?;
    let mut maps = 0;
    visit(&schema, &mut |node| {
        if node.get("properties").is_some() {
            maps += 1;
            assert_eq!(node["additionalProperties"], json!(false), "{node}");
        }
    });
    ensure!(maps > 10, "{maps} maps: this test looks at the wrong place");
    Ok(())
}

#[test]
fn each_value_has_one_description() -> Result<()> {
    let schema: Value = serde_json::from_str(&file("values.schema.json")?)?;
    let documented = comments(&file("values.yaml")?);
    let defaults: Value = serde_saphyr::from_str(&file("values.yaml")?)?;
    let described = descriptions(&schema, "", &schema);
    for (path, text) in &documented {
        let words = described.get(path).with_context(|| format!("{path} is not in the schema"))?;
        assert_eq!(words.as_deref(), Some(text.as_str()), "{path}: values.yaml and the schema differ");
    }
    for (path, words) in &described {
        ensure!(words.is_some(), "{path} has no description in the schema");
        ensure!(
            path == "/global" || defaults.pointer(path).is_some(),
            "{path} has no default in values.yaml"
        );
        let is_section = described.keys().any(|other| other.starts_with(&format!("{path}/")));
        let of_an_image = path.contains("/image/");
        ensure!(
            is_section || of_an_image || path == "/global" || documented.contains_key(path),
            "{path} has no comment in values.yaml"
        );
    }
    Ok(())
}

/// The comment above each value, by its path.
fn comments(yaml: &str) -> BTreeMap<String, String> {
    let (mut found, mut at, mut comment) = (BTreeMap::new(), Vec::<&str>::new(), String::new());
    for line in yaml.lines() {
        let text = line.trim_start();
        if let Some(begun) = text.strip_prefix("# -- ") {
            begun.clone_into(&mut comment);
        } else if let Some(more) = text.strip_prefix("# ").filter(|_| !comment.is_empty()) {
            comment = format!("{comment} {more}");
        } else if let Some((key, _)) = text.split_once(':').filter(|(key, _)| !key.contains(['-', ' '])) {
            at.truncate((line.len() - text.len()) / 2);
            at.push(key);
            if !comment.is_empty() {
                found.insert(format!("/{}", at.join("/")), std::mem::take(&mut comment));
            }
        }
    }
    found
}

/// Every value of ours that the schema knows, by its path, and what it says of it.
fn descriptions(schema: &Value, path: &str, node: &Value) -> BTreeMap<String, Option<String>> {
    let mut found = BTreeMap::new();
    let target = |node: &Value| {
        let name = node["$ref"].as_str().or(node["allOf"][0]["$ref"].as_str())?;
        schema.pointer(name.trim_start_matches('#')).cloned()
    };
    for (key, child) in node["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}/{key}");
        let target = target(child);
        let words =
            child["description"].as_str().or(target.as_ref().and_then(|node| node["description"].as_str()));
        found.insert(path.clone(), words.map(str::to_owned));
        // what is Kubernetes' own is described there
        let is_ours = !["resources", "affinity", "seLinuxOptions", "updateStrategy"].contains(&key.as_str());
        if is_ours {
            found.extend(descriptions(schema, &path, target.as_ref().unwrap_or(child)));
        }
    }
    found
}

fn visit(node: &Value, look: &mut dyn FnMut(&Value)) {
    look(node);
    match node {
        Value::Object(map) => map.values().for_each(|child| visit(child, look)),
        Value::Array(list) => list.iter().for_each(|child| visit(child, look)),
        _ => {}
    }
}
