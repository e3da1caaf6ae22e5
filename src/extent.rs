//! Runs of a disk's bytes that share the same facts: the algebra that every data path uses.
//!
//! An NBD server describes a disk once per *meta context* (what is allocated, what is dirty), each time
//! as its own sequence of runs, cut where that context happens to change and sometimes ending early.
//! This module lays such sequences over each other, cuts the result to the disk's size and joins equal
//! neighbours:
//!
//! ```text
//! allocation  |  data      |   zero          |   data   |
//! dirty       | clean |       dirty     |     clean        |
//! zip         | d c   |d d |  z d       |z c |  d c     |          ends with the shorter one
//! ```
//!
//! Everything here is lazy, allocates nothing and knows nothing of NBD, of files or of async.

/// Facts about a run of bytes, as a set of flags. The empty set means plain data.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Flags(u8);

impl Flags {
    /// Nothing is known but that the bytes must be read: data.
    pub const DATA: Flags = Flags(0);
    /// Every byte reads as zero (`NBD_STATE_ZERO` of `base:allocation`).
    pub const ZERO: Flags = Flags(1);
    /// No layer of the exported chain allocates the bytes (`qemu:allocation-depth` is 0).
    pub const HOLE: Flags = Flags(1 << 1);
    /// The bytes changed since the checkpoint (bit 0 of `qemu:dirty-bitmap:*`).
    pub const DIRTY: Flags = Flags(1 << 2);

    /// True when every flag of `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// The flags of both sets.
    #[must_use]
    pub const fn union(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }

    /// The flags that are in both sets.
    #[must_use]
    pub const fn intersection(self, other: Flags) -> Flags {
        Flags(self.0 & other.0)
    }
}

impl std::fmt::Debug for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = [(Flags::ZERO, "zero"), (Flags::HOLE, "hole"), (Flags::DIRTY, "dirty")];
        let mut set = f.debug_set();
        for (flag, name) in names {
            if self.contains(flag) {
                set.entry(&format_args!("{name}"));
            }
        }
        set.finish()
    }
}

/// A length in bytes with its facts; a sequence of runs starts wherever its user says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Bytes.
    pub length: u64,
    /// What holds for each of them.
    pub flags: Flags,
}

/// A run that knows where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Offset of the first byte on the disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// What holds for each of them.
    pub flags: Flags,
}

impl Extent {
    /// The offset behind the last byte.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }

    /// Every byte reads as zero.
    #[must_use]
    pub const fn zero(&self) -> bool {
        self.flags.contains(Flags::ZERO)
    }

    /// Not allocated in any layer of the exported chain.
    #[must_use]
    pub const fn hole(&self) -> bool {
        self.flags.contains(Flags::HOLE)
    }

    /// Changed since the checkpoint.
    #[must_use]
    pub const fn dirty(&self) -> bool {
        self.flags.contains(Flags::DIRTY)
    }

    /// The same bytes with only the facts in `mask`.
    #[must_use]
    pub const fn masked(self, mask: Flags) -> Extent {
        Extent { flags: self.flags.intersection(mask), ..self }
    }
}

/// Lays two sequences that start at the same byte over each other: cut at every boundary of either, facts
/// united. Ends with the shorter one; runs of no length are skipped.
pub fn zip<A, B>(a: A, b: B) -> impl Iterator<Item = Run> + use<A, B>
where
    A: IntoIterator<Item = Run>,
    B: IntoIterator<Item = Run>,
{
    let mut a = a.into_iter().filter(|run| run.length > 0);
    let mut b = b.into_iter().filter(|run| run.length > 0);
    let (mut left, mut right): (Option<Run>, Option<Run>) = (None, None);
    std::iter::from_fn(move || {
        let x = left.take().or_else(|| a.next())?;
        let y = right.take().or_else(|| b.next())?;
        let length = x.length.min(y.length);
        left = rest(x, length);
        right = rest(y, length);
        Some(Run { length, flags: x.flags.union(y.flags) })
    })
}

/// What is left of `run` behind its first `taken` bytes.
fn rest(run: Run, taken: u64) -> Option<Run> {
    (run.length > taken).then(|| Run { length: run.length - taken, flags: run.flags })
}

/// Gives runs their place, from `start` on, and cuts them at `size`.
pub fn place<I>(start: u64, size: u64, runs: I) -> impl Iterator<Item = Extent> + use<I>
where
    I: IntoIterator<Item = Run>,
{
    let mut runs = runs.into_iter();
    let mut at = start;
    std::iter::from_fn(move || {
        loop {
            if at >= size {
                return None;
            }
            let run = runs.next()?;
            let length = run.length.min(size - at);
            if length > 0 {
                let extent = Extent { start: at, length, flags: run.flags };
                at += length;
                return Some(extent);
            }
        }
    })
}

/// Adds `flags` to every byte from `from` on; an extent that lies across is cut in two.
pub fn raise<I>(extents: I, from: u64, flags: Flags) -> impl Iterator<Item = Extent> + use<I>
where
    I: IntoIterator<Item = Extent>,
{
    extents.into_iter().flat_map(move |extent| {
        let below = from.saturating_sub(extent.start).min(extent.length);
        let head = Extent { length: below, ..extent };
        let rest = extent.length - below;
        let tail = Extent { start: extent.start + below, length: rest, flags: extent.flags.union(flags) };
        [head, tail].into_iter().filter(|part| part.length > 0)
    })
}

/// Joins neighbours with equal facts, one extent at a time: for streams that cannot be iterators.
///
/// Holds one extent. What is pushed must begin where the last one ended, or it is not joined.
#[derive(Debug, Default)]
pub struct Coalescer {
    held: Option<Extent>,
}

impl Coalescer {
    /// Takes the next extent; gives back the one before it when they cannot be joined.
    pub fn push(&mut self, next: Extent) -> Option<Extent> {
        if next.length == 0 {
            return None;
        }
        match &mut self.held {
            Some(held) if held.end() == next.start && held.flags == next.flags => {
                held.length += next.length;
                None
            }
            held => held.replace(next),
        }
    }

    /// The last extent, when no more will come.
    pub fn finish(&mut self) -> Option<Extent> {
        self.held.take()
    }
}

/// Joins neighbours with equal facts.
pub fn coalesce<I>(extents: I) -> impl Iterator<Item = Extent> + use<I>
where
    I: IntoIterator<Item = Extent>,
{
    let mut extents = extents.into_iter();
    let mut joined = Coalescer::default();
    std::iter::from_fn(move || {
        for next in extents.by_ref() {
            if let Some(done) = joined.push(next) {
                return Some(done);
            }
        }
        joined.finish()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs(max: u64) -> impl Strategy<Value = Vec<Run>> {
        let run = (0..max, 0..8u8).prop_map(|(length, flags)| Run { length, flags: Flags(flags) });
        proptest::collection::vec(run, 0..24)
    }

    fn bytes(runs: &[Run]) -> Vec<Flags> {
        runs.iter().flat_map(|run| (0..run.length).map(|_| run.flags)).collect()
    }

    fn bytes_of(extents: &[Extent]) -> Vec<Flags> {
        extents.iter().flat_map(|extent| (0..extent.length).map(|_| extent.flags)).collect()
    }

    proptest! {
        #[test]
        fn zip_unites_byte_by_byte(a in runs(40), b in runs(40)) {
            let zipped: Vec<Run> = zip(a.clone(), b.clone()).collect();
            let model: Vec<Flags> =
                bytes(&a).into_iter().zip(bytes(&b)).map(|(x, y)| x.union(y)).collect();
            prop_assert_eq!(bytes(&zipped), model);
            prop_assert!(zipped.iter().all(|run| run.length > 0));
        }

        #[test]
        fn raised_from_a_byte_on_and_nowhere_else(a in runs(40), from in 0..600u64) {
            let raised: Vec<Extent> = raise(place(0, 600, a.clone()), from, Flags::DIRTY).collect();
            let mut model = bytes(&a);
            model.truncate(600);
            let from = usize::try_from(from).unwrap().min(model.len());
            model[from..].iter_mut().for_each(|flags| *flags = flags.union(Flags::DIRTY));
            prop_assert_eq!(bytes_of(&raised), model);
            let mut at = 0;
            for extent in &raised {
                prop_assert!(extent.start == at && extent.length > 0);
                at = extent.end();
            }
        }

        #[test]
        fn placed_and_coalesced_is_sorted_gapless_minimal(a in runs(40), start in 0..50u64, size in 0..600u64) {
            let extents: Vec<Extent> = coalesce(place(start, size, a.clone())).collect();
            let mut model = bytes(&a);
            model.truncate(usize::try_from(size.saturating_sub(start)).unwrap());
            prop_assert_eq!(bytes_of(&extents), model);
            let mut at = start;
            for pair in extents.windows(2) {
                prop_assert_ne!(pair[0].flags, pair[1].flags);
            }
            for extent in &extents {
                prop_assert_eq!(extent.start, at);
                prop_assert!(extent.length > 0 && extent.end() <= size);
                at = extent.end();
            }
        }
    }

    #[test]
    fn a_gap_is_never_joined() {
        let data = |start| Extent { start, length: 1, flags: Flags::DATA };
        assert_eq!(coalesce([data(0), data(2)]).count(), 2);
    }

    #[test]
    fn lengths_near_the_end_of_u64_do_not_wrap() {
        let huge = Run { length: u64::MAX, flags: Flags::ZERO };
        let placed: Vec<_> = place(u64::MAX - 4, u64::MAX, [huge, huge]).collect();
        assert_eq!(placed, [Extent { start: u64::MAX - 4, length: 4, flags: Flags::ZERO }]);
        assert_eq!(placed[0].end(), u64::MAX);
    }
}
