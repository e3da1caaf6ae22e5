//! Over the recorded objects, without a cluster.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use virtmark_bed::kubectl;

use super::expected::{CONDITIONS, ROWS, table};
use super::{golden, health};

#[test]
fn kstatus_and_argo_cd_say_of_every_recorded_object_what_the_table_says() -> Result<()> {
    let objects = golden::load()?;
    let recorded: usize = objects.values().map(|states| states.len()).sum();
    assert_eq!(recorded, ROWS.len(), "a phase is recorded that the table does not have");
    let object = |kind: &str, state: &str| -> Result<&Value> {
        objects.get(kind).and_then(|states| states.get(state)).with_context(|| format!("no {kind} {state}"))
    };
    let found: Vec<&Value> = ROWS.iter().map(|row| object(row.kind, row.state)).collect::<Result<_>>()?;
    for ((row, object), answer) in
        ROWS.iter().zip(&found).zip(health::ask(&health::argocd_cm()?, found.iter().copied())?)
    {
        let what = format!("{} {}: {answer:?}", row.kind, row.state);
        assert_eq!(answer.kstatus.status, row.kstatus, "{what}");
        let argo = answer.argo.as_ref().context("argocd-cm has no health for this kind")?;
        assert_eq!(argo.status, row.argo, "{what}");
        assert!(!argo.message.is_empty() && !answer.kstatus.message.is_empty(), "{what}");
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let generation = &object["metadata"]["generation"];
        let holds = |kind: &&&str| {
            let is = |c: &Value| c["type"] == **kind && c["status"] == "True";
            conditions.iter().any(|c| is(c) && c["observedGeneration"] == *generation)
        };
        let held: Vec<&str> = CONDITIONS.iter().filter(holds).copied().collect();
        assert_eq!(held, row.conditions, "{what}");
    }
    Ok(())
}

/// A sync wave goes on when its objects are Healthy, Flux and Helm when they are Current: only then may a backup be used.
#[test]
fn only_what_is_done_is_healthy_and_what_will_never_be_done_is_not_waited_for() {
    for row in ROWS {
        let one_shot = ["VmBackup", "ImageTransfer"].contains(&row.kind);
        let succeeded = row.conditions.contains(&"Succeeded");
        assert!(!one_shot || succeeded == (row.argo == "Healthy"), "{} {}", row.kind, row.state);
        assert_eq!(row.argo == "Healthy", row.kstatus == "Current", "{} {}", row.kind, row.state);
        assert_eq!(row.argo == "Degraded", row.kstatus == "Failed", "{} {}", row.kind, row.state);
        assert_eq!(row.argo == "Degraded", row.conditions.contains(&"Stalled"), "{} {}", row.kind, row.state);
    }
}

#[test]
fn an_object_of_another_generation_or_without_conditions_is_not_done() -> Result<()> {
    let ready = &golden::load()?["VmBackup"]["succeeded"];
    let mut changed = ready.clone();
    changed["metadata"]["generation"] = json!(99);
    let mut bare = ready.clone();
    bare["status"] = json!({"observedGeneration": ready["metadata"]["generation"]});
    let mut none = ready.clone();
    none["status"] = Value::Null;
    let answers = health::ask(&health::argocd_cm()?, [&changed, &bare, &none])?;
    assert_eq!(answers[0].kstatus.status, "InProgress");
    for answer in answers {
        assert_eq!(answer.argo.map(|said| said.status), Some("Progressing".to_owned()));
    }
    Ok(())
}

/// Argo CD gives a health script neither the string library nor the machine.
#[test]
fn the_interpreter_is_as_bare_as_argo_cds() -> Result<()> {
    let object = &golden::load()?["VmBackup"]["ready"];
    let argo = |script: &str| -> Result<String> {
        let said = health::ask(&health::with_script(script), [object])?.remove(0).argo;
        said.map(|said| format!("{} {}", said.status, said.message)).context("no answer")
    };
    for script in [
        "return {status = string.upper('healthy')}",
        "return {status = 'Healthy', message = os.getenv('HOME')}",
        "return {status = 'Fine'}",
        "return 'Healthy'",
        "while true do end",
    ] {
        let said = argo(script)?;
        assert!(said.starts_with("Unknown "), "{script}: {said}");
    }
    assert_eq!(argo("return {status = 'Healthy', message = obj.spec.vm}")?, "Healthy gitops");
    let sighting =
        json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "DomainSighting", "metadata": {"name": "s"}});
    assert!(health::ask(&health::argocd_cm()?, [&sighting])?[0].argo.is_none(), "it is internal");
    Ok(())
}

/// The command of docs/gitops.md, on a file instead of a cluster.
#[test]
fn kubectl_merges_the_script_into_an_argocd_cm() -> Result<()> {
    let mut base = tempfile::NamedTempFile::new()?;
    let theirs = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"url": "https://argo"},
        "metadata": {"name": "argocd-cm", "namespace": "argocd"}});
    base.write_all(theirs.to_string().as_bytes())?;
    let patch = "--patch-file=gitops/argocd/argocd-cm.yaml";
    let output = Command::new("kubectl")
        .env("PATH", kubectl::search_path()?)
        .args(["patch", "--local", "--type=merge", "-o", "json", patch, "-f"])
        .arg(base.path())
        .output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let merged: Value = serde_json::from_slice(&output.stdout)?;
    let mut data = merged["data"].as_object().cloned().context("no data")?;
    assert_eq!(data.remove("url"), Some(json!("https://argo")), "what was there stays");
    assert_eq!(Value::Object(data.clone()), health::argocd_cm()?["data"]);
    let kinds: BTreeSet<&str> =
        data.keys().filter_map(|key| key.split_once('_').map(|(_, kind)| kind)).collect();
    assert_eq!(kinds, ROWS.iter().map(|row| row.kind).collect(), "a kind has no health");
    Ok(())
}

#[test]
fn the_page_has_the_table_that_is_tested() -> Result<()> {
    let path = "docs/gitops.md";
    let marks = ("<!-- the table of tests/gitops/expected.rs -->\n", "<!-- end of the table -->\n");
    let page = std::fs::read_to_string(path)?;
    let (before, rest) = page.split_once(marks.0).context("the page has no place for the table")?;
    let (kept, after) = rest.split_once(marks.1).context("the table has no end")?;
    if golden::is_to_be_written() {
        std::fs::write(path, format!("{before}{}{}{}{after}", marks.0, table(), marks.1))?;
        return Ok(());
    }
    assert_eq!(kept, table(), "VIRTMARK_GOLDEN=write cargo test --test gitops");
    Ok(())
}
