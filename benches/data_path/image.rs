//! The images that are served.

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use rand::{RngCore as _, SeedableRng as _};

/// Bytes of a cluster of the qcow2 image.
const CLUSTER: u64 = 64 << 10;
/// Entries of its second-level tables: each is one cluster.
const ENTRIES: u64 = CLUSTER / 8;

/// A raw image of `pieces` times `piece` bytes of data, each followed by a hole of that size; where the data
/// is.
pub(crate) fn raw(path: &Path, pieces: u64, piece: u64) -> Result<Vec<Range<u64>>> {
    let mut file = File::create_new(path)?;
    file.set_len(2 * pieces * piece)?;
    let data: Vec<_> = (0..pieces).map(|number| 2 * number * piece..(2 * number + 1) * piece).collect();
    // The same numbers each time, so that two runs serve the same bytes. They cannot be compressed.
    let mut random = rand::rngs::StdRng::seed_from_u64(0x7669_7274);
    let mut block = vec![0; 1 << 20];
    for range in &data {
        file.seek(SeekFrom::Start(range.start))?;
        let mut left = range.end - range.start;
        while left > 0 {
            let length = usize::try_from(left)?.min(block.len());
            random.fill_bytes(&mut block[..length]);
            file.write_all(&block[..length])?;
            left -= length as u64;
        }
    }
    Ok(data)
}

/// A qcow2 image of so many extents: its clusters are data and hole in turn.
///
/// All data is the same cluster, so that a disk of 8 GiB takes little memory and no time. QEMU reads it as any
/// other image; only a check of its reference counts would find fault.
pub(crate) fn alternating(path: &Path, extents: u64) -> Result<()> {
    let tables = extents.div_ceil(ENTRIES);
    // header, reference count table, first-level table, second-level tables, data
    let at = |cluster: u64| cluster * CLUSTER;
    let (counts, first, second) = (at(1), at(2), at(3));
    let data = at(3 + tables);
    let mut file = File::create_new(path)?;
    file.set_len(data + CLUSTER)?;
    let mut header = Vec::new();
    header.extend_from_slice(b"QFI\xfb");
    header.extend_from_slice(&3_u32.to_be_bytes()); // version
    header.extend_from_slice(&[0; 12]); // no backing file
    header.extend_from_slice(&CLUSTER.ilog2().to_be_bytes());
    header.extend_from_slice(&(extents * CLUSTER).to_be_bytes());
    header.extend_from_slice(&0_u32.to_be_bytes()); // not encrypted
    header.extend_from_slice(&u32::try_from(tables)?.to_be_bytes());
    header.extend_from_slice(&first.to_be_bytes());
    header.extend_from_slice(&counts.to_be_bytes());
    header.extend_from_slice(&1_u32.to_be_bytes()); // clusters of reference count table
    header.extend_from_slice(&[0; 12]); // no snapshots
    header.extend_from_slice(&[0; 24]); // no features
    header.extend_from_slice(&4_u32.to_be_bytes()); // 16 bits a reference count
    header.extend_from_slice(&104_u32.to_be_bytes()); // bytes of this header
    header.extend_from_slice(&[0; 8]); // no extensions
    file.write_all(&header)?;
    file.seek(SeekFrom::Start(first))?;
    for table in 0..tables {
        file.write_all(&(second + table * CLUSTER).to_be_bytes())?;
    }
    file.seek(SeekFrom::Start(second))?;
    let entries: Vec<u8> =
        (0..extents).flat_map(|number| (if number % 2 == 0 { data } else { 0 }).to_be_bytes()).collect();
    file.write_all(&entries)?;
    Ok(())
}
