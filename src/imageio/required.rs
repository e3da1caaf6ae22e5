//! What of an export a backup must have read, and how much of it was not.
//!
//! A full backup needs every byte that may not be zero, an incremental one every dirty byte that may not be
//! zero: what `extents` reports as zero a client writes without reading.
//!
//! Zero at one time is zero for good, since an export never changes; but QEMU calls such bytes data as soon as the
//! guest writes there, since it copies the old zeroes to the scratch image first. So they are excused when seen.

use super::tickets::SharedCoverage;
use crate::extent::Extent;
use crate::nbd::{Client, Export, NbdError};

/// Whether the bytes of an extent belong to the backup; `incremental` when the export has a dirty bitmap.
fn matters(extent: &Extent, incremental: bool) -> bool {
    extent.dirty() || !incremental
}

/// Bytes of the export that must be read and were not served. Walks the export's block status, a reply at a
/// time; holds nothing else. What is zero now is excused in `coverage`: a client that was told so later than this
/// call will not read it.
pub async fn missing(export: &Export, coverage: &SharedCoverage) -> Result<u64, NbdError> {
    let client = Client::connect(export).await?;
    let incremental = export.bitmap.is_some();
    let mut extents = client.block_status(0)?;
    let mut missing: u64 = 0;
    while let Some(extent) = extents.next().await {
        let extent = extent?;
        if !matters(&extent, incremental) {
            continue;
        }
        if extent.zero() {
            coverage.excuse(extent.start, extent.end());
        } else {
            missing = missing.saturating_add(coverage.missing_in(extent.start, extent.end()));
        }
    }
    if let Some(client) = extents.into_client() {
        // The answer is known; how the server takes the goodbye does not matter.
        let _ = client.disconnect().await;
    }
    Ok(missing)
}
