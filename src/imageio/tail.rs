//! Where on a disk a cut may begin that its dirty bitmap does not show.
//!
//! A disk that is cut and grown back reads zero from the cut on, and QEMU drops the dirty bits there: what is clean then
//! and reads zero may have been anything at the checkpoint. Nobody may have seen the disk while it was small. But nothing
//! of what was there is left, so behind the last clean byte that is not zero, and nowhere before it, a cut may have been.
//! From there on all is taken for changed: on a disk that was never cut that is the empty end of it, zero as it was, and no
//! more is read than the last cluster that did not change.
//!
//! ```text
//!    clean data | dirty | clean data | dirty | zero, clean | dirty | zero, clean |   the end of the disk
//!                                    ^ a cut may have been anywhere from here on
//! ```

use std::collections::VecDeque;

use crate::extent::Extent;
use crate::nbd::{Client, Export, NbdError};

/// Bytes whose extents are asked for first; then twice as many, and so on.
const FIRST: u64 = 64 << 20;
/// The most, which is what one request is about.
const LARGEST: u64 = 2 << 30;
/// Extents of such a range that are held.
const HELD: usize = 4096;
/// Bytes of a read.
const READ: u64 = 1 << 20;
/// Bytes that are read, at most. Clean data that is zero as far as this is seen on hardly any disk: it was written so.
const ALL_READ: u64 = 256 << 20;
/// The smallest piece of a disk that one bit of a bitmap of QEMU's stands for. It is as large as a cluster, but not where an
/// image was copied to another with larger ones.
const GRANULE: u64 = 4 << 10;
const SECTOR: u64 = 512;

/// The first byte from which on everything must be taken for changed, whatever the dirty bitmap says. `cluster` is the
/// cluster size of the image that is written.
pub async fn unsure_from(export: &Export, cluster: u64) -> Result<u64, NbdError> {
    let export = Export { changed_from: None, ..export.clone() };
    let size = Client::connect(&export).await?.size();
    let (mut end, mut window, mut left) = (size, FIRST, ALL_READ);
    while end > 0 {
        let (from, clean) = clean_data(&export, end.saturating_sub(window), end).await?;
        for extent in clean.into_iter().rev() {
            let mut behind = extent.end();
            while behind > extent.start {
                let start = extent.start.max(behind.saturating_sub(READ));
                let Some(rest) = left.checked_sub(behind - start) else { return Ok(0) };
                left = rest;
                if let Some(last) = last_set(&read(&export, start, behind - start).await?) {
                    return Ok(settled(start + last, cluster, size));
                }
                behind = start;
            }
        }
        (end, window) = (from, LARGEST.min(2 * window));
    }
    Ok(0)
}

/// What follows from the last clean byte that is not zero. In a cluster that is larger than what a bit may stand for the cut
/// may have been before it: QEMU keeps the cluster, its bytes come back, and its dirty bits do not.
fn settled(last: u64, cluster: u64, size: u64) -> u64 {
    if cluster > GRANULE { last - last % cluster } else { (last + 1).next_multiple_of(SECTOR).min(size) }
}

/// The last extents within a range that did not change and are not known to be zero, and where those begin that were all
/// held.
async fn clean_data(export: &Export, start: u64, end: u64) -> Result<(u64, VecDeque<Extent>), NbdError> {
    let mut extents = Client::connect(export).await?.block_status(start)?;
    let (mut from, mut held) = (start, VecDeque::new());
    while let Some(extent) = extents.next().await.transpose()? {
        if extent.start >= end {
            break;
        }
        if extent.dirty() || extent.zero() {
            continue;
        }
        if held.len() == HELD {
            held.pop_front();
            from = held.front().map_or(extent.start, |first: &Extent| first.start);
        }
        held.push_back(Extent { length: extent.end().min(end) - extent.start, ..extent });
    }
    Ok((from, held))
}

async fn read(export: &Export, start: u64, length: u64) -> Result<Vec<u8>, NbdError> {
    let mut stream = Client::connect(export).await?.read_stream(start, length)?;
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.next().await.transpose()? {
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// The place of the last byte that is not zero.
fn last_set(bytes: &[u8]) -> Option<u64> {
    bytes.iter().rposition(|byte| *byte != 0).and_then(|last| u64::try_from(last).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_behind_the_last_byte_or_with_large_clusters_all_of_its_cluster() {
        let (mib, size) = (1 << 20, 8 << 20);
        let cases = [
            (mib - 1, 4096, mib),
            (mib, 4096, mib + 512),
            (mib + 600, 512, mib + 1024),
            (size - 100, 4096, size),
            (mib - 1, 65536, mib - 65536),
            (mib, 65536, mib),
            (mib + 600, 2 * mib, 0),
            (3 * mib, 2 * mib, 2 * mib),
            (size - 1, 2 * mib, 6 * mib),
            (mib + 131_072 + 5, 131_072, mib + 131_072),
        ];
        for (last, cluster, expected) in cases {
            assert_eq!(settled(last, cluster, size), expected, "{last} {cluster}");
        }
        assert_eq!(settled(699, 512, 700), 700, "a disk that is no multiple of a sector");
        assert_eq!((last_set(&[0, 3, 0, 0]), last_set(&[0; 9]), last_set(&[])), (Some(1), None, None));
    }
}
