//! A backup client that loses its connection, and goes on: curl, on the nodes' network.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context as _, Result};
use base64ct::{Base64, Encoding as _};
use virtmark_bed::{compare, wait_until};

use crate::release::{BOUND, Release};

/// A reader of a disk with one ticket, which is curl.
pub struct Reader<'a> {
    release: &'a Release,
    url: String,
    /// What it has read.
    pub image: PathBuf,
}

impl<'a> Reader<'a> {
    /// One of a transfer that is Ready.
    pub fn of(release: &'a Release, transfer: &str) -> Result<Self> {
        let status = release.phase("imagetransfer", transfer, "Ready")?;
        let secret = release.get("secret", status["ticketSecret"].as_str().context("no ticket")?)?;
        let text = |key: &str| -> Result<String> {
            let encoded = secret["data"][key].as_str().with_context(|| format!("the Secret has no {key}"))?;
            let bytes = Base64::decode_vec(encoded).map_err(|error| anyhow::anyhow!("{key}: {error}"))?;
            Ok(String::from_utf8(bytes)?)
        };
        std::fs::write(release.files.path().join("ca.pem"), text("ca.crt")?)?;
        let image = release.files.path().join(format!("{transfer}.raw"));
        Ok(Self { release, url: text("url")?, image })
    }

    /// Goes on from what it has, so many bytes a second.
    pub fn go_on(&self, rate: &str) -> Result<Child> {
        let mut curl: Command = self.release.cluster.network.command("curl");
        curl.args(["-sS", "--fail", "--max-time", "120", "--limit-rate", rate, "--continue-at", "-"]);
        // a pod's address that is gone answers nothing; the next one's server may not listen yet
        curl.args(["--speed-limit", "1", "--speed-time", "5", "--cacert"]);
        curl.arg(self.release.files.path().join("ca.pem")).arg("--output").arg(&self.image).arg(&self.url);
        Ok(curl.spawn()?)
    }

    /// How many bytes it has.
    pub fn has(&self) -> u64 {
        std::fs::metadata(&self.image).map_or(0, |image| image.len())
    }

    /// Forgets what it has.
    pub fn forget(&self) -> Result<()> {
        Ok(std::fs::remove_file(&self.image)?)
    }

    /// Waits until it has read so many bytes.
    pub fn reached(&self, bytes: u64) -> Result<()> {
        wait_until(BOUND, "the reader to be in the middle", || Ok((self.has() >= bytes).then_some(())))
    }

    /// Reads the rest, and compares.
    pub fn finish(&self, then: &Path) -> Result<()> {
        wait_until(BOUND, "the image server to be there", || {
            Ok(self.go_on("1G")?.wait()?.success().then_some(()))
        })?;
        compare(then, &self.image, "raw")
    }
}
