//! kubectl, as a person would type it.

use std::env;
use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::controlplane;
use crate::nodes::network::Network;

/// The PATH of this process, and behind it the folder of a kubectl of ours where the machine has none.
///
/// # Errors
/// When one must be built, and cannot be.
pub fn search_path() -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    if env::split_paths(&path).any(|folder| folder.join("kubectl").exists()) {
        return Ok(path);
    }
    let ours = controlplane::kubectl_binary()?;
    Ok(env::join_paths(env::split_paths(&path).chain([ours]))?)
}

/// kubectl with one kubeconfig.
#[derive(Clone, Debug)]
pub struct Kubectl {
    kubeconfig: PathBuf,
    network: Option<Network>,
}

impl Kubectl {
    /// kubectl with this kubeconfig, in the network where its server is, if that is not the machine's own.
    pub fn new(kubeconfig: &Path, network: Option<&Network>) -> Self {
        Self { kubeconfig: kubeconfig.to_owned(), network: network.cloned() }
    }

    /// Runs it, and answers what it printed.
    ///
    /// # Errors
    /// When it fails: with what it printed to standard error.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.run_with(arguments, "")
    }

    /// Runs it with `input` on its standard input.
    ///
    /// # Errors
    /// When it fails: with what it printed to standard error.
    pub fn run_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let within = self.network.as_ref().map(|network| network.command("kubectl"));
        let mut child = within
            .unwrap_or_else(|| Command::new("kubectl"))
            .env("PATH", search_path()?)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("kubectl cannot be run")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("kubectl {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Applies YAML or JSON.
    ///
    /// # Errors
    /// When it is refused.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        self.run_with(&["apply", "-f", "-"], manifest)
    }

    /// One object, or a list, as JSON.
    ///
    /// # Errors
    /// When there is none.
    pub fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let mut with_output = arguments.to_vec();
        with_output.extend(["-o", "json"]);
        serde_json::from_str(&self.run(&with_output)?).context("kubectl printed no JSON")
    }
}
