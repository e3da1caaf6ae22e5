//! A real Prometheus, which scrapes the operator and the agents of a bed each second.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::controlplane::free_ports;
use virtmark_bed::daemon::Daemon;
use virtmark_bed::{Bed, wait_until};

use super::rig::BOUND;

/// Where a daemon serves its health and metrics.
pub fn health_of(daemon: &Daemon) -> Result<&str> {
    daemon.argument("--health-listen").with_context(|| format!("{} has no --health-listen", daemon.name))
}

/// The answer of an HTTP server: status and body.
pub fn get(address: &str, path: &str) -> Result<(u16, String)> {
    let url = format!("http://{address}{path}");
    let output =
        Command::new("curl").args(["-sS", "--max-time", "20", "-w", "\n%{http_code}", &url]).output()?;
    ensure!(output.status.success(), "{url}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let (body, status) = text.rsplit_once('\n').context("no status")?;
    Ok((status.parse()?, body.to_owned()))
}

pub struct Prometheus {
    process: Child,
    address: String,
    targets: usize,
    _dir: tempfile::TempDir,
}

impl Prometheus {
    pub fn of(bed: &Bed, rules: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let daemons = std::iter::once(&bed.operator).chain(&bed.agents);
        let targets = daemons.map(health_of).collect::<Result<Vec<_>>>()?;
        let count = targets.len();
        let config = json!({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [fs::canonicalize(rules)?],
            "scrape_configs": [{"job_name": "virtmark", "static_configs": [{"targets": targets}]}],
        });
        let file = dir.path().join("prometheus.yml");
        fs::write(&file, config.to_string())?;
        let [port] = free_ports()?;
        let address = format!("127.0.0.1:{port}");
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null())
            .spawn()
            .context("prometheus: run `make test`")?;
        let prometheus = Self { process, address, targets: count, _dir: dir };
        wait_until(BOUND, "Prometheus to be ready", || {
            Ok(get(&prometheus.address, "/-/ready").is_ok_and(|(status, _)| status == 200).then_some(()))
        })?;
        Ok(prometheus)
    }

    /// Waits until every target is scraped without an error.
    pub fn scrapes_all(&self) -> Result<()> {
        wait_until(BOUND, "all targets to be scraped", || {
            let targets = self.api("targets?state=active")?;
            let targets = targets["activeTargets"].as_array().cloned().unwrap_or_default();
            let bad = targets.iter().find(|target| target["health"] == "down");
            ensure!(bad.is_none(), "a target cannot be scraped: {bad:?}");
            let up = targets.iter().filter(|target| target["health"] == "up");
            Ok((up.count() == self.targets).then_some(()))
        })
    }

    pub fn api(&self, path: &str) -> Result<Value> {
        let (status, body) = get(&self.address, &format!("/api/v1/{path}"))?;
        ensure!(status == 200, "{path}: {status} {body}");
        Ok(serde_json::from_str::<Value>(&body)?["data"].take())
    }

    /// The values that a query has now, which are numbers.
    pub fn values(&self, query: &str) -> Result<Vec<f64>> {
        let query = format!(
            "query?query={}",
            percent_encoding::utf8_percent_encode(query, percent_encoding::NON_ALPHANUMERIC)
        );
        let found = self.api(&query)?;
        let result = found["result"].as_array().cloned().unwrap_or_default();
        let values = result.iter().filter_map(|series| series["value"][1].as_str()?.parse::<f64>().ok());
        Ok(values.filter(|value| !value.is_nan()).collect())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
