//! The alerts: `promtool` takes them, and each fires when it must, and not before.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

pub const RULES: &str = "charts/virtmark/files/rules.yaml";
const TESTS: &str = "tests/metrics/rules.yaml";

/// The alerts of the chart: name and expression.
pub fn all() -> Result<Vec<(String, String)>> {
    let file: Value = serde_saphyr::from_str(&fs::read_to_string(RULES)?)?;
    let groups = file["groups"].as_array().context("no groups")?;
    let rules = groups.iter().filter_map(|group| group["rules"].as_array()).flatten();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(rules.map(|rule| (text(&rule["alert"]), text(&rule["expr"]))).collect())
}

fn promtool(arguments: &[&str]) -> Result<(bool, String)> {
    let output = Command::new("promtool").args(arguments).output().context("promtool: run `make test`")?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

/// Runs the tests on rules that were changed.
fn tried(rules: &str, dir: &Path) -> Result<(bool, String)> {
    let changed = dir.join("rules.yaml");
    fs::write(&changed, rules)?;
    let tests = fs::read_to_string(TESTS)?;
    let (first, rest) = tests.split_once("rule_files: [").context("no rule_files")?;
    let (_, rest) = rest.split_once(']').context("no rule_files")?;
    let path = dir.join("tests.yaml");
    fs::write(&path, format!("{first}rule_files: [{}]{rest}", changed.display()))?;
    promtool(&["test", "rules", &path.to_string_lossy()])
}

#[test]
fn each_alert_fires_when_it_must_and_its_test_can_fail() -> Result<()> {
    let (good, said) = promtool(&["check", "rules", "--lint-fatal", RULES])?;
    ensure!(good, "{said}");
    let (good, said) = promtool(&["test", "rules", TESTS])?;
    ensure!(good, "{said}");

    let dir = tempfile::tempdir()?;
    let rules = fs::read_to_string(RULES)?;
    ensure!(tried(&rules, dir.path())?.0, "the copy is as good as the original");
    for (alert, _) in all()? {
        // one that never fires
        let mut file: Value = serde_saphyr::from_str(&rules)?;
        let rule = file["groups"]
            .as_array_mut()
            .context("no groups")?
            .iter_mut()
            .filter_map(|group| group["rules"].as_array_mut())
            .flatten()
            .find(|rule| rule["alert"] == alert.as_str())
            .context("no such alert")?;
        rule["expr"] = "vector(0) > 1".into();
        let (good, _) = tried(&file.to_string(), dir.path())?;
        ensure!(!good, "no test needs {alert} to fire");
    }
    Ok(())
}
