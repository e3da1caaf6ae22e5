//! The chart: its files, and what Helm makes of it.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use virtmark_bed::helm;

/// Where it is.
pub const CHART: &str = "charts/virtmark";

/// The namespace that it is rendered for.
pub const NAMESPACE: &str = "virtmark-system";

/// One of its files.
pub fn file(name: &str) -> Result<String> {
    let path = format!("{CHART}/{name}");
    fs::read_to_string(&path).context(path)
}

/// Runs helm, on no cluster and with no settings of this machine's user; answers what it prints.
///
/// # Errors
/// Its words, when it fails.
pub fn helm(arguments: &[&str]) -> Result<String> {
    let home = tempfile::tempdir()?;
    let output = Command::new(helm::binary()?)
        .args(arguments)
        .env("KUBECONFIG", "/dev/null")
        .env("HELM_CONFIG_HOME", home.path())
        .env("HELM_CACHE_HOME", home.path())
        .env("HELM_DATA_HOME", home.path())
        .output()
        .context("helm cannot be run")?;
    if !output.status.success() {
        bail!("helm {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// The text that the chart renders to with `values` besides its defaults.
///
/// # Errors
/// Helm's words.
pub fn render(values: &Value) -> Result<String> {
    let mut stored = tempfile::NamedTempFile::new()?;
    // JSON is YAML
    serde_json::to_writer(&mut stored, values)?;
    let path = stored.path().to_string_lossy().into_owned();
    helm(&["template", "virtmark", CHART, "--namespace", NAMESPACE, "--values", &path])
}

/// Every object in YAML of several documents.
///
/// # Errors
/// When it is no YAML.
pub fn objects(yaml: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml)?;
    Ok(documents.into_iter().filter(|object| !object.is_null()).collect())
}

/// The one of this kind and name.
pub fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let mut found =
        objects.iter().filter(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.next().with_context(|| format!("no {kind} {name}"))
}
