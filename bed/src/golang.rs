//! Builds Go programs. It does not keep them: `cache` does.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Builds `package` of the module in `dir` into `dir`/`name`.
///
/// # Errors
/// When Go is missing, or the build fails.
pub fn build(dir: &Path, name: &str, package: &str, link_flags: &str) -> Result<()> {
    let built = Command::new("go")
        .args(["build", "-trimpath", "-ldflags", link_flags, "-o", name, package])
        .env("CGO_ENABLED", "0")
        .current_dir(dir)
        .status()
        .context("go cannot be run: install Go 1.26 from https://go.dev/dl")?;
    if !built.success() {
        bail!("go build of {name} failed");
    }
    Ok(())
}
