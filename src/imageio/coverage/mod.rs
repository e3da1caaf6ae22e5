//! Which bytes of a disk were served, or need not be: the knowledge that decides whether a backup is complete.
//!
//! **It never claims more than was served.** What it cannot keep counts as not served. Bytes that were seen to read as
//! zero are excused for good: the disk is one of the past, so they stay zero, whatever QEMU calls them later.
//!
//! ```text
//! granules  | 1 | 1 | 0 | 1 | 0 |      one bit a granule: all of it was served
//! partial           [==  =]            exact ranges of the others, at most 65,536 on the disk
//! ```
//!
//! A granule is 4 KiB, and on disks above 128 GiB the smallest power of two with which the bits fit into
//! 4 MiB. Ranges beyond the bound are forgotten; the client that reads them again completes the granule.
//! This module has no clock, no lock and no file; [`codec`] is its form at rest.

use std::collections::BTreeMap;
use std::ops::Range;

pub mod codec;

/// Smallest granule, in bytes.
pub const GRANULE: u64 = 4096;
/// Most granules of a disk: 4 MiB of bits.
pub const MAX_GRANULES: u64 = 8 * (4 << 20);
/// Most ranges kept of granules that were served in part.
pub const MAX_PARTIAL: usize = 65_536;

/// Which bytes of one disk were served, see the module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Coverage {
    size: u64,
    granule: u64,
    /// One bit a granule, lowest first.
    bits: Vec<u64>,
    /// Disjoint ranges `start -> end`, each inside one granule whose bit is not set.
    partial: BTreeMap<u64, u64>,
    /// Bytes that were served or excused.
    settled: u64,
    /// Those of them that were excused first.
    excused: u64,
}

impl Coverage {
    /// Nothing of a disk of `size` bytes was served.
    #[must_use]
    pub fn new(size: u64) -> Coverage {
        let granule = size.div_ceil(MAX_GRANULES).max(GRANULE).next_power_of_two();
        // At most MAX_GRANULES / 64 words, so that it fits any usize.
        let words = usize::try_from(size.div_ceil(granule).div_ceil(64)).unwrap_or(usize::MAX);
        Coverage { size, granule, bits: vec![0; words], partial: BTreeMap::new(), settled: 0, excused: 0 }
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that were served and had not been excused, each counted once.
    #[must_use]
    pub fn transferred(&self) -> u64 {
        self.settled - self.excused
    }

    /// Bytes that are not missing: it grows whenever something changes.
    #[must_use]
    pub fn settled(&self) -> u64 {
        self.settled
    }

    /// The bytes from `start` to before `end` read as zero, so that nobody has to read them.
    pub fn excuse(&mut self, start: u64, end: u64) {
        let before = self.settled;
        self.mark(start, end);
        self.excused += self.settled - before;
    }

    /// The bytes from `start` to before `end` were served; what is beyond the disk is ignored.
    pub fn mark(&mut self, start: u64, end: u64) {
        let end = end.min(self.size);
        if start >= end {
            return;
        }
        let (first, last) = (start / self.granule, (end - 1) / self.granule);
        let head = self.bounds(first);
        if first == last {
            return self.mark_within(first, start, end);
        }
        let tail = self.bounds(last);
        self.mark_within(first, start, head.end);
        self.mark_whole(first + 1..last);
        self.mark_within(last, tail.start, end);
    }

    /// Every byte was served, as a client says that read them elsewhere.
    pub fn mark_all(&mut self) {
        self.mark(0, self.size);
    }

    /// Bytes of the `required` ranges (each `start` to before `end`, not overlapping each other) that were
    /// neither served nor excused. Ranges beyond the disk were not.
    #[must_use]
    pub fn missing(&self, required: impl IntoIterator<Item = (u64, u64)>) -> u64 {
        required.into_iter().map(|(start, end)| self.missing_in(start, end)).fold(0, u64::saturating_add)
    }

    /// Bytes from `start` to before `end` that were neither served nor excused.
    #[must_use]
    pub fn missing_in(&self, start: u64, end: u64) -> u64 {
        end.saturating_sub(start) - self.served_in(start, end.min(self.size))
    }

    fn served_in(&self, start: u64, end: u64) -> u64 {
        if start >= end {
            return 0;
        }
        let (first, last) = (start / self.granule, (end - 1) / self.granule);
        let edges = if first == last { [Some(first), None] } else { [Some(first), Some(last)] };
        let mut served = 0;
        for granule in edges.into_iter().flatten().filter(|granule| self.is_set(*granule)) {
            let bounds = self.bounds(granule);
            served += bounds.end.min(end) - bounds.start.max(start);
        }
        // Only the last granule of the disk is short, and it can only be an edge.
        served += self.count(first + 1..last) * self.granule;
        let before = self.partial.range(..start).next_back().map(|(_, stop)| (*stop).min(end));
        served += before.map_or(0, |stop| stop.saturating_sub(start));
        served + self.partial.range(start..end).map(|(from, to)| (*to).min(end) - from).sum::<u64>()
    }

    /// The bytes of a granule.
    fn bounds(&self, granule: u64) -> Range<u64> {
        let start = granule * self.granule;
        start..start.saturating_add(self.granule).min(self.size)
    }

    fn is_set(&self, granule: u64) -> bool {
        let (word, mask) = place(granule);
        self.bits.get(word).is_some_and(|bits| bits & mask != 0)
    }

    /// How many granules of the range are set.
    fn count(&self, granules: Range<u64>) -> u64 {
        let mut set = 0;
        for (word, mask) in words(granules) {
            set += u64::from((self.bits[word] & mask).count_ones());
        }
        set
    }

    /// A range inside one granule was served.
    fn mark_within(&mut self, granule: u64, mut start: u64, mut end: u64) {
        if self.is_set(granule) {
            return;
        }
        let bounds = self.bounds(granule);
        let from = match self.partial.range(bounds.start..start).next_back() {
            Some((from, to)) if *to >= start => *from,
            _ => start,
        };
        let touching: Vec<(u64, u64)> = self
            .partial
            .range(from..=end)
            .map(|(from, to)| (*from, *to))
            .filter(|(from, _)| *from < bounds.end)
            .collect();
        if touching.is_empty()
            && self.partial.len() >= MAX_PARTIAL
            && (start, end) != (bounds.start, bounds.end)
        {
            return;
        }
        for (from, to) in touching {
            self.partial.remove(&from);
            self.settled -= to - from;
            start = start.min(from);
            end = end.max(to);
        }
        self.settled += end - start;
        if (start, end) == (bounds.start, bounds.end) {
            let (word, mask) = place(granule);
            self.bits[word] |= mask;
        } else {
            self.partial.insert(start, end);
        }
    }

    /// Whole granules were served, none of them the disk's last.
    fn mark_whole(&mut self, granules: Range<u64>) {
        if granules.is_empty() {
            return;
        }
        let bytes = granules.start * self.granule..granules.end * self.granule;
        while let Some((from, to)) = self.partial.range(bytes.clone()).next().map(|(from, to)| (*from, *to)) {
            self.partial.remove(&from);
            self.settled -= to - from;
        }
        for (word, mask) in words(granules) {
            let new = mask & !self.bits[word];
            self.bits[word] |= new;
            self.settled += u64::from(new.count_ones()) * self.granule;
        }
    }
}

/// The word and the bit of a granule.
fn place(granule: u64) -> (usize, u64) {
    (usize::try_from(granule / 64).unwrap_or(usize::MAX), 1 << (granule % 64))
}

/// The words that hold a range of granules, each with the bits of the range.
fn words(granules: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let mut at = granules.start;
    std::iter::from_fn(move || {
        if at >= granules.end {
            return None;
        }
        let (word, _) = place(at);
        let bits = (64 - at % 64).min(granules.end - at);
        let mask = (u64::MAX >> (64 - bits)) << (at % 64);
        at += bits;
        Some((word, mask))
    })
}

#[cfg(test)]
mod tests;
