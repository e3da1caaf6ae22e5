//! The same manifest again, as kubectl, Argo CD and Flux do it: never refused, and nothing changes.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::{kubectl, wait_until};

use super::expected::CONDITIONS;
use super::rig::{BOUND, Rig};

/// How a tool applies, and shows differences.
struct Tool {
    applies: &'static [&'static [&'static str]],
    diff: &'static [&'static str],
}

const FLUX: &[&str] = &["apply", "--server-side", "--field-manager=kustomize-controller"];

/// kubectl's client-side apply, and server-side apply by two field managers. kubectl itself moves between the two by
/// adding and removing its annotation.
const TOOLS: [Tool; 2] = [
    Tool { applies: &[&["apply"]], diff: &["diff"] },
    Tool {
        applies: &[&["apply", "--server-side", "--field-manager=argocd-controller"], FLUX],
        diff: &["diff", "--server-side", "--field-manager=argocd-controller"],
    },
];

/// `vmbackup.virtmark.dev/name`.
pub fn reference(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!("{}.virtmark.dev/{}", text(&object["kind"]).to_lowercase(), text(&object["metadata"]["name"]))
}

fn list(manifests: &[Value]) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": manifests}).to_string()
}

fn run(rig: &Rig, arguments: &[&str], manifests: &[Value]) -> Result<String> {
    let input = ["-n", "vms", "-f", "-"];
    rig.bed.kubectl().run_with(&[arguments, &input].concat(), &list(manifests))
}

/// The objects, as the API server serves them.
pub fn served(rig: &Rig, references: &[String]) -> Result<Vec<Value>> {
    let mut arguments = vec!["get", "--show-managed-fields", "-o", "json"];
    arguments.extend(references.iter().map(String::as_str));
    let mut found: Value = serde_json::from_str(&rig.kubectl(&arguments)?)?;
    match found.get_mut("items").map(Value::take) {
        Some(Value::Array(items)) => Ok(items),
        _ => Ok(vec![found]),
    }
}

/// Makes an object.
pub fn apply(rig: &Rig, manifest: &Value) -> Result<String> {
    run(rig, TOOLS[0].applies[0], std::slice::from_ref(manifest))
}

/// Applies the manifests of objects that stand still, with each tool. It is never refused. Going over to a tool leaves
/// generation and spec as they are; from then on not one write comes of it: the resourceVersion stays. Answers the
/// objects.
pub fn changes_nothing(rig: &Rig, manifests: &[Value]) -> Result<Vec<Value>> {
    let references: Vec<String> = manifests.iter().map(reference).collect();
    let mut objects = served(rig, &references)?;
    for tool in &TOOLS {
        apply_all(rig, tool, manifests)?;
        objects = wait_until(BOUND, "objects to stand still", || {
            let before = served(rig, &references)?;
            apply_all(rig, tool, manifests)?;
            run(rig, tool.diff, manifests)?;
            let after = served(rig, &references)?;
            for ((first, before), after) in objects.iter().zip(&before).zip(&after) {
                same_wish(first, before)?;
                same_wish(before, after)?;
                let moved = before["status"] != after["status"]
                    || before["metadata"]["finalizers"] != after["metadata"]["finalizers"];
                if moved {
                    // a controller wrote meanwhile: look again
                    return Ok(None);
                }
                ensure!(before == after, "applying it again wrote it:\n{before}\n{after}");
            }
            Ok(Some(after))
        })?;
    }
    Ok(objects)
}

fn apply_all(rig: &Rig, tool: &Tool, manifests: &[Value]) -> Result<()> {
    tool.applies.iter().try_for_each(|apply| run(rig, apply, manifests).map(drop))
}

fn same_wish(before: &Value, after: &Value) -> Result<()> {
    for part in ["/spec", "/metadata/generation", "/metadata/labels", "/metadata/uid"] {
        ensure!(
            before.pointer(part) == after.pointer(part),
            "applying it again changed {part}:\n{before}\n{after}"
        );
    }
    Ok(())
}

/// For which of the objects `kubectl wait` finds each condition True.
pub fn waited_for(rig: &Rig, references: &[String]) -> Result<Vec<(&'static str, Vec<String>)>> {
    let kubeconfig = &rig.bed.plane.kubeconfig;
    let of = |condition: &'static str| -> Result<(&'static str, Vec<String>)> {
        let mut kubectl = Command::new("kubectl");
        kubectl.env("PATH", kubectl::search_path()?).arg("--kubeconfig").arg(kubeconfig);
        kubectl.args(["wait", "-n", "vms", "--timeout=0s"]).arg(format!("--for=condition={condition}"));
        let output = kubectl.args(references).output()?;
        let said = String::from_utf8(output.stdout)?;
        let met: Vec<String> =
            said.lines().filter_map(|line| line.strip_suffix(" condition met")).map(str::to_owned).collect();
        ensure!(output.status.success() == (met.len() == references.len()), "{condition}: {said}");
        Ok((condition, met))
    };
    std::thread::scope(|scope| {
        let asked = CONDITIONS.map(|condition| scope.spawn(move || of(condition)));
        asked.into_iter().map(|asked| asked.join().map_err(|_| anyhow::anyhow!("a thread died"))?).collect()
    })
}

/// Does what Flux does before it applies: fields that people set with kubectl become its own. What it then leaves out
/// of its manifest it removes.
pub fn take_over_from_kubectl(rig: &Rig, reference: &str) -> Result<()> {
    let object = served(rig, &[reference.to_owned()])?.remove(0);
    let entries = object["metadata"]["managedFields"].as_array().cloned().context("no managedFields")?;
    let text = |entry: &Value, key: &str| entry[key].as_str().unwrap_or_default().to_owned();
    let is_flux = |entry: &Value| text(entry, "manager") == "kustomize-controller";
    let is_taken =
        |entry: &Value| text(entry, "manager").starts_with("kubectl") && entry["subresource"].is_null();
    let mut flux = entries.iter().find(|entry| is_flux(entry)).cloned().context("Flux never applied it")?;
    for entry in entries.iter().filter(|entry| is_taken(entry)) {
        unite(&mut flux["fieldsV1"], &entry["fieldsV1"]);
    }
    let others = entries.iter().filter(|entry| !is_flux(entry) && !is_taken(entry)).cloned();
    let fields: Vec<Value> = others.chain([flux]).collect();
    let patch = json!([{"op": "replace", "path": "/metadata/managedFields", "value": fields}]).to_string();
    rig.kubectl(&["patch", reference, "--type=json", "-p", &patch]).map(drop)
}

fn unite(into: &mut Value, from: &Value) {
    let (Some(into), Some(from)) = (into.as_object_mut(), from.as_object()) else { return };
    for (key, value) in from {
        unite(into.entry(key.clone()).or_insert_with(|| json!({})), value);
    }
}

/// Applies as Flux.
pub fn as_flux(rig: &Rig, manifest: &Value) -> Result<String> {
    run(rig, FLUX, std::slice::from_ref(manifest))
}

/// Replaces, as Argo CD does with the option Replace=true.
pub fn replace(rig: &Rig, manifest: &Value) -> Result<String> {
    run(rig, &["replace"], std::slice::from_ref(manifest))
}
