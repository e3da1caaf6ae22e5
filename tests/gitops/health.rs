//! The Go program in `health/`: what kstatus and Argo CD say of objects.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use virtmark_bed::{cache, golang};

const SOURCES: [(&str, &str); 3] = [
    ("go.mod", include_str!("health/go.mod")),
    ("go.sum", include_str!("health/go.sum")),
    ("main.go", include_str!("health/main.go")),
];

/// A status and the words with it.
#[derive(Debug, Deserialize)]
pub struct Said {
    pub status: String,
    pub message: String,
}

/// What both say of one object.
#[derive(Debug, Deserialize)]
pub struct Answer {
    pub kstatus: Said,
    pub argo: Option<Said>,
}

/// The argocd-cm that is shipped.
pub fn argocd_cm() -> Result<Value> {
    let path = "gitops/argocd/argocd-cm.yaml";
    Ok(serde_saphyr::from_str(&fs::read_to_string(path)?)?)
}

/// An argocd-cm with another script for VmBackups.
pub fn with_script(script: &str) -> Value {
    json!({"data": {"resource.customizations.health.virtmark.dev_VmBackup": script}})
}

/// What kstatus says of the objects, and Argo CD with this argocd-cm.
pub fn ask<'a>(config: &Value, objects: impl IntoIterator<Item = &'a Value>) -> Result<Vec<Answer>> {
    let lines: Vec<String> = objects.into_iter().map(Value::to_string).collect();
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(config.to_string().as_bytes())?;
    let mut child = Command::new(program()?)
        .arg(file.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().context("no stdin")?;
    let text = lines.join("\n");
    let writer = std::thread::spawn(move || input.write_all(text.as_bytes()));
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    writer.join().map_err(|_| anyhow::anyhow!("the writer died"))??;
    let said = String::from_utf8(output.stdout)?;
    let answers: Vec<Answer> = said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(answers.len() == lines.len(), "{} answers to {} objects", answers.len(), lines.len());
    Ok(answers)
}

fn program() -> Result<PathBuf> {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let made_from = SOURCES.map(|(_, text)| text);
    let dir = cache::keyed("gitops-health", &made_from, |dir| {
        eprintln!("building kstatus and a Lua interpreter, once on this machine: about half a minute");
        for (name, text) in SOURCES {
            fs::write(dir.join(name), text)?;
        }
        golang::build(dir, "health", ".", "-s -w")
    })?;
    Ok(dir.join("health"))
}
