//! What the chart renders to: the same kinds, roles and policies as `crds/` and `deploy/`; the same each time.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::chart::{CHART, NAMESPACE, file, helm, objects, render};

#[test]
fn helm_finds_nothing_wrong() -> Result<()> {
    helm(&["lint", "--strict", CHART]).map(drop)
}

#[test]
fn its_versions_are_those_of_the_code() -> Result<()> {
    let chart: Value = serde_saphyr::from_str(&file("Chart.yaml")?)?;
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!((&chart["version"], &chart["appVersion"]), (&json!(version), &json!(version)));
    let images = chart["annotations"]["artifacthub.io/images"].as_str().context("images")?;
    for name in ["operator", "agent"] {
        ensure!(images.contains(&format!("ghcr.io/virtmark/{name}:{version}\n")), "{images}");
    }
    let listed: Vec<Value> =
        serde_saphyr::from_str(chart["annotations"]["artifacthub.io/crds"].as_str().context("crds")?)?;
    let mut listed: Vec<_> = listed.iter().map(|crd| crd["name"].as_str().unwrap_or_default()).collect();
    let ours = by_name(&of_folder("crds")?);
    listed.sort_unstable();
    assert_eq!(listed, ours.keys().map(|(_, name)| name.as_str()).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn kinds_roles_and_policies_are_those_of_crds_and_deploy() -> Result<()> {
    let made = ["CustomResourceDefinition", "ServiceAccount", "Role", "RoleBinding", "ClusterRole"];
    let made = made.into_iter().chain([
        "ClusterRoleBinding",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    ]);
    let made: Vec<_> = made.collect();
    let mut rendered = objects(&render(&json!({}))?)?;
    rendered.retain(|object| made.iter().any(|kind| object["kind"] == *kind));
    for object in &mut rendered {
        let metadata = object["metadata"].as_object_mut().context("metadata")?;
        ensure!(metadata.remove("labels").is_some(), "{metadata:?}");
        metadata.remove("annotations");
    }
    let plain = [of_folder("crds")?, of_folder("deploy")?].concat();
    let (rendered, plain) = (by_name(&rendered), by_name(&plain));
    assert_eq!(rendered.keys().collect::<Vec<_>>(), plain.keys().collect::<Vec<_>>());
    for (name, object) in plain {
        assert_eq!(rendered[&name], object, "{name:?}");
    }
    Ok(())
}

#[test]
fn another_namespace_is_named_everywhere() -> Result<()> {
    let rendered = helm(&["template", "other", CHART, "--namespace", "0815"])?;
    ensure!(!rendered.contains(NAMESPACE), "the default namespace is still named");
    for object in objects(&rendered)? {
        let namespace = &object["metadata"]["namespace"];
        ensure!(namespace.is_null() || namespace == "0815", "{object}");
    }
    Ok(())
}

#[test]
fn it_renders_the_same_each_time_and_asks_nobody() -> Result<()> {
    assert_eq!(render(&json!({}))?, render(&json!({}))?);
    let mut templates = Vec::new();
    all_files(&format!("{CHART}/templates"), &mut templates)?;
    let asks = regex::Regex::new(
        r"\b(lookup|getHostByName|now|date|htodate|ago|rand\w+|shuffle|uuidv4|gen\w+|derivePassword|htpasswd|bcrypt|env|expandenv|Capabilities)\b",
    )?;
    let actions = regex::Regex::new(r"\{\{[^}]*\}\}")?;
    let comments = regex::Regex::new(r"\{\{-? ?/\*[^}]*\*/ ?-?\}\}")?;
    for (path, text) in templates {
        for action in actions.find_iter(&comments.replace_all(&text, "")) {
            ensure!(!asks.is_match(action.as_str()), "{path}: {}", action.as_str());
        }
    }
    Ok(())
}

#[test]
fn kinds_can_be_left_out_and_are_kept_by_default() -> Result<()> {
    let kinds = |values: Value| -> Result<Vec<Value>> {
        let mut kinds = objects(&render(&values)?)?;
        kinds.retain(|object| object["kind"] == "CustomResourceDefinition");
        Ok(kinds)
    };
    let kept = |crd: &Value| crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep";
    let (by_default, let_go) = (kinds(json!({}))?, kinds(json!({"crds": {"keep": false}}))?);
    ensure!(by_default.len() == 5 && by_default.iter().all(kept));
    ensure!(let_go.len() == 5 && !let_go.iter().any(kept));
    ensure!(kinds(json!({"crds": {"enabled": false}}))?.is_empty());
    Ok(())
}

fn of_folder(folder: &str) -> Result<Vec<Value>> {
    let mut files = Vec::new();
    all_files(folder, &mut files)?;
    let found: Vec<_> = files.iter().map(|(_, text)| objects(text)).collect::<Result<_>>()?;
    Ok(found.concat())
}

fn all_files(folder: &str, into: &mut Vec<(String, String)>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.to_string_lossy().into_owned();
        if path.is_dir() {
            all_files(&name, into)?;
        } else {
            into.push((name, fs::read_to_string(&path)?));
        }
    }
    Ok(())
}

fn by_name(objects: &[Value]) -> BTreeMap<(String, String), Value> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let named = objects
        .iter()
        .map(|object| ((text(&object["kind"]), text(&object["metadata"]["name"])), object.clone()));
    named.collect()
}
