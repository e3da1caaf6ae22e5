//! Chains of backups, and a small rebuilder: a disk as it was, from what transfers serve alone. It shares nothing with
//! the product.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use virtmark_bed::compare;

use super::rig::{Rig, Ticket};

/// A VM's restore points of one owner, put over each other.
pub struct Chain<'a> {
    rig: &'a Rig,
    name: &'static str,
}

/// One backup of a chain.
pub struct Point {
    /// Its status, once it succeeded.
    pub status: Value,
    /// What was put over the image of each of its disks.
    pub restored: BTreeMap<String, Restored>,
}

impl<'a> Chain<'a> {
    pub fn of(rig: &'a Rig, name: &'static str) -> Self {
        Self { rig, name }
    }

    fn image(&self, disk: &str) -> PathBuf {
        self.rig.files.path().join(format!("{}-{disk}.raw", self.name))
    }

    /// Takes a backup, rebuilds each of its disks over what was rebuilt before, and compares with what the guest had.
    /// `meanwhile` is what the guest does while the backup runs.
    pub fn take(&self, backup: &str, spec: Value, meanwhile: impl FnOnce() -> Result<()>) -> Result<Point> {
        self.rig.backup(backup, spec)?;
        let point = self.go_on(backup, meanwhile)?;
        self.rig.host_is_clean()?;
        Ok(point)
    }

    /// The same with a backup that was made already; the host is not looked at.
    pub fn go_on(&self, backup: &str, meanwhile: impl FnOnce() -> Result<()>) -> Result<Point> {
        let rig = self.rig;
        let status = rig.phase("vmbackup", backup, "Ready")?;
        let disks = status["disks"].as_array().context("no disks")?;
        let disks: Vec<_> = disks
            .iter()
            .map(|disk| {
                let name = disk["name"].as_str().context("no name")?.to_owned();
                let then = rig.vm.remember(&name)?;
                Ok((name, then, disk["mode"] == "Incremental"))
            })
            .collect::<Result<_>>()?;
        meanwhile()?;
        let mut restored = BTreeMap::new();
        for (disk, then, incremental) in disks {
            let image = self.image(&disk);
            if !incremental {
                // whatever was there: a full one needs nothing of it
                File::create(&image)?;
            }
            let ticket = rig.ticket(&format!("{backup}-{disk}"))?;
            let done = restore(&ticket, incremental, &image)?;
            compare(&then, &image, "raw").with_context(|| format!("{backup}: {disk}: {done:?}"))?;
            restored.insert(disk, done);
        }
        rig.state("vmbackup", backup, "Finalized")?;
        let status = rig.phase("vmbackup", backup, "Succeeded")?;
        if let Some(checkpoint) = status["toCheckpoint"].as_str() {
            rig.made("vmcheckpoint", checkpoint);
        }
        Ok(Point { status, restored })
    }
}

impl Point {
    /// The mode of a disk, with the reason when it is a full one.
    pub fn mode(&self, disk: &str) -> String {
        let disk = self.disk(disk);
        let text = |key: &str| disk[key].as_str().unwrap_or_default();
        format!("{} {}", text("mode"), text("modeReason")).trim().to_owned()
    }

    /// What the status says of a disk.
    pub fn disk(&self, name: &str) -> Value {
        let mut disks = self.status["disks"].as_array().into_iter().flatten();
        disks.find(|disk| disk["name"] == name).cloned().unwrap_or_default()
    }

    /// The checkpoint that it made.
    pub fn checkpoint(&self) -> &str {
        self.status["toCheckpoint"].as_str().unwrap_or_default()
    }

    /// The checkpoint that it started from.
    pub fn base(&self) -> &str {
        self.status["fromCheckpoint"].as_str().unwrap_or_default()
    }
}

/// What was put over an image, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Of data that was read.
    pub read: u64,
    /// Of zeroes that nobody had to read.
    pub zeroed: u64,
}

impl Restored {
    /// What was read, but for an odd cluster: the last one that did not change is read with what did.
    pub fn mostly_read(&self) -> u64 {
        const CLUSTER: u64 = 65536;
        self.read - self.read % (2 * CLUSTER)
    }
}

/// What is done with what is dirty and zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroes {
    /// It is zeroed.
    Write,
    /// It is left as it was: how a client restores that takes zero for nothing. To see that this is noticed.
    #[allow(dead_code, reason = "the truth tests use it")]
    Leave,
}

/// Puts what a transfer serves over `image`, by its extents: with `incremental` what is dirty, without all of it. What is
/// zero is zeroed, and never left as it was.
pub fn restore(ticket: &Ticket, incremental: bool, image: &Path) -> Result<Restored> {
    restore_with(ticket, incremental, image, Zeroes::Write)
}

/// The same with a choice of what is done with zeroes.
pub fn restore_with(ticket: &Ticket, incremental: bool, image: &Path, zeroes: Zeroes) -> Result<Restored> {
    let (extents, part) = (image.with_extension("extents"), image.with_extension("part"));
    let context = if incremental { "dirty" } else { "zero" };
    let said = ticket
        .curl_at(&format!("{}/extents?context={context}", ticket.url), &["-o", &extents.to_string_lossy()])?;
    ensure!(said == "200", "extents: HTTP {said}");
    let list: Vec<Value> = serde_json::from_slice(&fs::read(&extents)?)?;
    let number = |extent: &Value, key: &str| extent[key].as_u64().context("no number");
    let last = list.last().context("no extents")?;
    let size = number(last, "start")? + number(last, "length")?;
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(image)?;
    // a disk that has grown reads zero where it is new
    file.set_len(size)?;
    let mut restored = Restored::default();
    let mut ranges = Vec::new();
    for extent in list.iter().filter(|extent| !incremental || extent["dirty"] == true) {
        let (start, length) = (number(extent, "start")?, number(extent, "length")?);
        if extent["zero"] != true {
            ranges.push((start, length));
        } else if zeroes == Zeroes::Write {
            restored.zeroed += length;
            file.write_all_at(&vec![0; usize::try_from(length)?], start)?;
        }
    }
    for (start, length) in ranges {
        let range = format!("Range: bytes={start}-{}", start + length - 1);
        let said = ticket.curl(&["-H", &range, "-o", &part.to_string_lossy()])?;
        ensure!(said == "206", "{range}: HTTP {said}");
        restored.read += length;
        let bytes = fs::read(&part)?;
        ensure!(u64::try_from(bytes.len())? == length, "{range}: {} bytes", bytes.len());
        file.write_all_at(&bytes, start)?;
    }
    Ok(restored)
}
