//! Manifests of our kinds in pages: the types take them, and the schemas know every field. The rules in CEL are left to
//! `tests/cluster/crds.rs`, which asks a server.

use anyhow::{Context as _, Result};
use regex::Regex;
use serde::de::DeserializeOwned;
use serde_json::Value;
use virtmark::api;

use super::page::Page;

/// The YAML of a page, each with its line: blocks, and what commands are given on their standard input.
pub fn of(page: &Page) -> Vec<(usize, String)> {
    let given = Regex::new(r"(?s)<<'?(?:END|EOF)'?\n(.*?)\n(?:END|EOF)\n").unwrap();
    let mut found = Vec::new();
    for (line, language, text) in &page.blocks {
        if language == "yaml" {
            found.push((*line, text.clone()));
        } else if language == "sh" {
            let inputs = given.captures_iter(text).filter_map(|input| input.get(1));
            let inputs = inputs.filter(|input| input.as_str().starts_with("apiVersion:"));
            found.extend(inputs.map(|input| (*line, input.as_str().to_owned())));
        }
    }
    found
}

/// The kinds of ours in a YAML text, and what is wrong with them.
///
/// # Errors
/// When it is no YAML.
pub fn faults(yaml: &str) -> Result<(Vec<String>, Vec<String>)> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).context("no YAML")?;
    let (mut kinds, mut faults) = (Vec::new(), Vec::new());
    for document in documents {
        let version = document["apiVersion"].as_str().unwrap_or_default();
        let Some(version) = version.strip_prefix(api::GROUP).and_then(|rest| rest.strip_prefix('/')) else {
            continue;
        };
        let kind = document["kind"].as_str().unwrap_or_default().to_owned();
        let Some(schema) = schema(&kind, version)? else {
            faults.push(format!("there is no kind {kind} of version {version}"));
            continue;
        };
        unfit(&document, &schema, &kind, &mut faults);
        faults.extend(typed(&kind, document).err().map(|error| format!("{kind}: {error}")));
        kinds.push(kind);
    }
    Ok((kinds, faults))
}

fn schema(kind: &str, version: &str) -> Result<Option<Value>> {
    let crds = api::crds();
    let Some(crd) = crds.iter().find(|crd| crd.spec.names.kind == kind) else { return Ok(None) };
    let served = crd.spec.versions.iter().find(|served| served.name == version);
    let schema = served.and_then(|served| served.schema.as_ref()).map(|schema| &schema.open_api_v3_schema);
    Ok(schema.map(serde_json::to_value).transpose()?)
}

fn typed(kind: &str, document: Value) -> serde_json::Result<()> {
    fn is<K: DeserializeOwned>(document: Value) -> serde_json::Result<()> {
        serde_json::from_value::<K>(document).map(drop)
    }
    match kind {
        "VmBackup" => is::<api::VmBackup>(document),
        "VmCheckpoint" => is::<api::VmCheckpoint>(document),
        "ImageTransfer" => is::<api::ImageTransfer>(document),
        "LibvirtDomain" => is::<api::LibvirtDomain>(document),
        "DomainSighting" => is::<api::DomainSighting>(document),
        _ => Ok(()),
    }
}

/// Notes where `value` is not what `schema` knows.
fn unfit(value: &Value, schema: &Value, path: &str, found: &mut Vec<String>) {
    let number = |name: &str| schema[name].as_f64();
    let beyond = value.as_f64().is_some_and(|value| {
        number("minimum").is_some_and(|least| value < least)
            || number("maximum").is_some_and(|most| value > most)
    });
    let unknown = schema["enum"].as_array().is_some_and(|known| !known.contains(value));
    let pattern = schema["pattern"].as_str().and_then(|pattern| Regex::new(pattern).ok());
    let malformed = pattern.is_some_and(|pattern| value.as_str().is_some_and(|text| !pattern.is_match(text)));
    if beyond || unknown || malformed {
        found.push(format!("{path} cannot be {value}"));
    }
    for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if value[name].is_null() {
            found.push(format!("{path}.{name} is missing"));
        }
    }
    let is_whole = !path.contains('.');
    for (name, child) in value.as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        match schema["properties"].get(name).or(schema.get("additionalProperties")) {
            Some(schema) => unfit(child, schema, &path, found),
            // the API server's own
            None if is_whole && ["apiVersion", "kind", "metadata"].contains(&name.as_str()) => {}
            None => found.push(format!("{path} is not known")),
        }
    }
    for (at, child) in value.as_array().into_iter().flatten().enumerate() {
        unfit(child, &schema["items"], &format!("{path}[{at}]"), found);
    }
}

#[test]
fn what_is_wrong_is_found() {
    let head = "apiVersion: virtmark.dev/v1alpha1\nkind: VmBackup\nmetadata: {name: a, labels: {b: c}}\n";
    let faults = |yaml: &str| faults(yaml).unwrap().1;
    assert_eq!(
        faults(&format!("{head}spec: {{vm: db01, quiesce: {{mode: None}}, disks: [vda]}}\n")),
        Vec::<String>::new()
    );
    assert_eq!(faults("apiVersion: v1\nkind: Secret\nspec: {vm: 1}\n"), Vec::<String>::new());
    for (spec, fault) in [
        ("{vm: db01, typ: Full}", "VmBackup.spec.typ is not known"),
        ("{vm: db01, quiesce: {modus: None}}", "VmBackup.spec.quiesce.modus is not known"),
        ("{vm: db01, type: Partial}", "VmBackup.spec.type cannot be \"Partial\""),
        ("{vm: DB01}", "VmBackup.spec.vm cannot be \"DB01\""),
        ("{vm: db01, startDeadlineSeconds: 0}", "VmBackup.spec.startDeadlineSeconds cannot be 0"),
        ("{type: Full}", "VmBackup.spec.vm is missing"),
    ] {
        let found = faults(&format!("{head}spec: {spec}\n"));
        assert!(found.iter().any(|found| found == fault), "{spec}: {found:?}");
    }
    let other = faults("apiVersion: virtmark.dev/v1\nkind: VmBackup\nspec: {vm: db01}\n");
    assert_eq!(other, ["there is no kind VmBackup of version v1"]);
    assert!(super::manifests::faults("a: [").is_err());
}
