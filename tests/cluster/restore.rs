//! A small rebuilder: a disk as it was, from what a transfer serves alone. It shares nothing with the product.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::rig::Ticket;

/// What was put over an image, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Of data that was read.
    pub read: u64,
    /// Of zeroes that nobody had to read.
    pub zeroed: u64,
}

/// Puts what a transfer serves over `image`, by its extents: with `incremental` what is dirty, without all of it. What is
/// zero is zeroed, and never left as it was.
pub fn restore(ticket: &Ticket, incremental: bool, image: &Path) -> Result<Restored> {
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
    for extent in list.iter().filter(|extent| !incremental || extent["dirty"] == true) {
        let (start, length) = (number(extent, "start")?, number(extent, "length")?);
        let bytes = if extent["zero"] == true {
            restored.zeroed += length;
            vec![0; usize::try_from(length)?]
        } else {
            let range = format!("Range: bytes={start}-{}", start + length - 1);
            let said = ticket.curl(&["-H", &range, "-o", &part.to_string_lossy()])?;
            ensure!(said == "206", "{range}: HTTP {said}");
            restored.read += length;
            fs::read(&part)?
        };
        file.write_all_at(&bytes, start)?;
    }
    Ok(restored)
}
