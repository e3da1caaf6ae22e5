//! Helm, built with Go and kept in the cache. It renders and installs charts, and knows none.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

use crate::cache;
use crate::golang;

const GO_MOD: &str = include_str!("../helm/go.mod");
const GO_SUM: &str = include_str!("../helm/go.sum");
const PACKAGE: &str = "helm.sh/helm/v4/cmd/helm";

/// `helm`; built the first time (about half a minute on 2 cores).
///
/// # Errors
/// When Go is missing, or the build fails.
pub fn binary() -> Result<PathBuf> {
    let dir = cache::keyed("helm", &[GO_MOD, GO_SUM], |dir| {
        eprintln!("building helm, once on this machine: about half a minute");
        fs::write(dir.join("go.mod"), GO_MOD)?;
        fs::write(dir.join("go.sum"), GO_SUM)?;
        golang::build(dir, "helm", PACKAGE, "-s -w")
    })?;
    Ok(dir.join("helm"))
}
