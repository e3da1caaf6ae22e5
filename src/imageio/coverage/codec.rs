//! The form of a [`Coverage`] at rest, for the agent's state directory.
//!
//! ```text
//! "vmkcov02"  size  granule  settled  excused  partial  runs     8 bytes each, little endian
//! partial * (start, end)                                     bytes
//! runs * (first, behind)                                     granules that are settled; or, where that is shorter,
//!                                                            runs = 2^64 - 1 and all the bits, 8 bytes each
//! FNV-1a of all that is before
//! ```
//!
//! Runs, since most disks are read in long ones: what must be written every few seconds stays small. With the bits
//! it is never more than 4 MiB and the partial ranges. The checksum finds a file that was torn or cut, not one that
//! somebody made. Whatever cannot be decoded counts as not served.

use std::ops::Range;

use super::{Coverage, MAX_PARTIAL};

const MAGIC: &[u8; 8] = b"vmkcov02";
/// Instead of a number of runs: the bits follow.
const BITS: u64 = u64::MAX;

/// Why bytes are no coverage; it must then be taken as empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    /// Another format or version.
    #[error("not a coverage file of this version; the disk counts as not read")]
    Foreign,
    /// Cut or damaged.
    #[error("the coverage file is damaged; the disk counts as not read")]
    Damaged,
    /// Of a disk of another size.
    #[error("the coverage file is of a disk of {found} bytes, not {expected}; the disk counts as not read")]
    OtherSize {
        /// Bytes of the disk in the file.
        found: u64,
        /// Bytes of the disk at hand.
        expected: u64,
    },
}

impl Coverage {
    /// The bytes to keep.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let most = self.bits.len() / 2;
        let runs: Vec<Range<u64>> = self.runs().take(most + 1).collect();
        let (count, runs, bits) = if runs.len() > most {
            (BITS, &[][..], &self.bits[..])
        } else {
            (runs.len() as u64, &runs[..], &[][..])
        };
        let mut out = Vec::with_capacity(64 + 16 * (self.partial.len() + runs.len()) + 8 * bits.len());
        out.extend_from_slice(MAGIC);
        let counts = [self.size, self.granule, self.settled, self.excused, self.partial.len() as u64, count];
        let partial = self.partial.iter().flat_map(|(start, end)| [*start, *end]);
        let runs = runs.iter().flat_map(|run| [run.start, run.end]).chain(bits.iter().copied());
        for number in counts.into_iter().chain(partial).chain(runs) {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&fnv(&out).to_le_bytes());
        out
    }

    /// What [`Coverage::encode`] wrote of a disk of `size` bytes.
    pub fn decode(bytes: &[u8], size: u64) -> Result<Coverage, DecodeError> {
        let body = bytes.strip_prefix(MAGIC).ok_or(DecodeError::Foreign)?;
        let (kept, sum) =
            bytes.split_last_chunk::<8>().map(|(kept, sum)| (kept, *sum)).ok_or(DecodeError::Damaged)?;
        if u64::from_le_bytes(sum) != fnv(kept) || !bytes.len().is_multiple_of(8) {
            return Err(DecodeError::Damaged);
        }
        let mut numbers =
            body.chunks_exact(8).map(|chunk| chunk.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)));
        let mut next = || numbers.next().ok_or(DecodeError::Damaged);
        let (found, granule, settled, excused) = (next()?, next()?, next()?, next()?);
        let (partial, runs) = (next()?, next()?);
        if found != size {
            return Err(DecodeError::OtherSize { found, expected: size });
        }
        let mut coverage = Coverage::new(size);
        let numbers_left = (bytes.len() as u64 / 8).checked_sub(8);
        let behind = if runs == BITS { Some(coverage.bits.len() as u64) } else { runs.checked_mul(2) };
        let announced =
            partial.checked_mul(2).zip(behind).and_then(|(ranges, behind)| ranges.checked_add(behind));
        if granule != coverage.granule
            || partial > MAX_PARTIAL as u64
            || announced.is_none()
            || announced != numbers_left
        {
            return Err(DecodeError::Damaged);
        }
        for _ in 0..partial {
            let (start, end) = (next()?, next()?);
            if start >= end || end > size {
                return Err(DecodeError::Damaged);
            }
            coverage.mark(start, end);
        }
        if runs == BITS {
            let mut served = Coverage::new(size);
            for word in &mut served.bits {
                *word = next()?;
            }
            for run in served.runs() {
                coverage.mark(run.start * granule, run.end.saturating_mul(granule));
            }
        }
        for _ in 0..if runs == BITS { 0 } else { runs } {
            let (first, behind) = (next()?, next()?);
            if first >= behind || behind > size.div_ceil(granule) {
                return Err(DecodeError::Damaged);
            }
            coverage.mark(first * granule, behind.saturating_mul(granule));
        }
        if coverage.settled != settled || excused > settled {
            return Err(DecodeError::Damaged);
        }
        coverage.excused = excused;
        Ok(coverage)
    }

    /// The runs of granules that are settled.
    fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let granules = self.size.div_ceil(self.granule);
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.seek(at, granules, true)?;
            let end = self.seek(start, granules, false).unwrap_or(granules);
            at = end;
            Some(start..end)
        })
    }

    /// The first granule from `at` on whose bit is `wanted`.
    fn seek(&self, mut at: u64, granules: u64, wanted: bool) -> Option<u64> {
        while at < granules {
            let (word, _) = super::place(at);
            let bits = if wanted { self.bits[word] } else { !self.bits[word] } >> (at % 64);
            if bits != 0 {
                return Some(at + u64::from(bits.trailing_zeros())).filter(|at| *at < granules);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
