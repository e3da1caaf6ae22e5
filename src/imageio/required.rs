//! What of an export a backup must have read, and how much of it was not.
//!
//! A full backup needs every byte that may not be zero, an incremental one every dirty byte that may not be
//! zero: what `extents` reports as zero a client writes without reading.

use super::tickets::SharedCoverage;
use crate::extent::Extent;
use crate::nbd::{Client, Export, NbdError};

/// Whether the bytes of an extent must be read; `incremental` when the export has a dirty bitmap.
#[must_use]
pub fn required(extent: &Extent, incremental: bool) -> bool {
    !extent.zero() && (extent.dirty() || !incremental)
}

/// Bytes of the export that must be read and were not served. Walks the export's block status, a reply at a
/// time; holds nothing else.
pub async fn missing(export: &Export, coverage: &SharedCoverage) -> Result<u64, NbdError> {
    let client = Client::connect(export).await?;
    let incremental = export.bitmap.is_some();
    let mut extents = client.block_status(0)?;
    let mut missing: u64 = 0;
    while let Some(extent) = extents.next().await {
        let extent = extent?;
        if required(&extent, incremental) {
            missing = missing.saturating_add(coverage.missing_in(extent.start, extent.end()));
        }
    }
    if let Some(client) = extents.into_client() {
        // The answer is known; how the server takes the goodbye does not matter.
        let _ = client.disconnect().await;
    }
    Ok(missing)
}
