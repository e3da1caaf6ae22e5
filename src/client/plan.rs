//! What is read and what is zeroed, from what the image server says of a disk: pure. Law 2 of the design is here: what is
//! dirty and zero is zeroed, never skipped.

use serde::{Deserialize, Serialize};

use super::manifest::ReadMode;
use crate::extent::Extent;

/// Most bytes of one read: a connection that breaks loses less.
pub const READ: u64 = 16 << 20;

/// Most bytes that are zeroed at once.
pub const ZERO: u64 = 1 << 30;

/// What is done with a run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// They are read, and written.
    Read,
    /// Zeroes are written; nothing is read.
    Zero,
}

/// A run of bytes and what is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its first byte.
    pub start: u64,
    /// The byte behind its last.
    pub end: u64,
    /// What is done.
    pub action: Action,
}

impl Piece {
    /// Its bytes.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.end - self.start
    }
}

/// What is done with an extent. A full image is new, and reads zero where nothing was written; an incremental one shows its
/// base there.
#[must_use]
pub fn action(mode: ReadMode, extent: &Extent) -> Option<Action> {
    match (mode, extent.zero()) {
        (ReadMode::Full, true) => None,
        (ReadMode::Full, false) => Some(Action::Read),
        (ReadMode::Incremental, _) if !extent.dirty() => None,
        (ReadMode::Incremental, true) => Some(Action::Zero),
        (ReadMode::Incremental, false) => Some(Action::Read),
    }
}

/// The context of the extents that a mode needs.
#[must_use]
pub const fn context(mode: ReadMode) -> &'static str {
    match mode {
        ReadMode::Full => "zero",
        ReadMode::Incremental => "dirty",
    }
}

/// The extents' work, neighbours of one kind joined, one at a time.
#[derive(Debug)]
pub struct Planner {
    mode: ReadMode,
    held: Option<Piece>,
    total: Total,
}

/// How much there is to do, in bytes.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// To read.
    pub read: u64,
    /// To zero.
    pub zeroed: u64,
}

impl Planner {
    /// Of a disk that is read in this mode.
    #[must_use]
    pub fn new(mode: ReadMode) -> Self {
        Self { mode, held: None, total: Total::default() }
    }

    /// Takes the next extent; answers what is done with those before it, once that is known.
    pub fn push(&mut self, extent: &Extent) -> Option<Piece> {
        let action = action(self.mode, extent)?;
        match action {
            Action::Read => self.total.read += extent.length,
            Action::Zero => self.total.zeroed += extent.length,
        }
        match &mut self.held {
            Some(held) if held.end == extent.start && held.action == action => {
                held.end = extent.end();
                None
            }
            held => held.replace(Piece { start: extent.start, end: extent.end(), action }),
        }
    }

    /// The last work, and how much there is in all.
    #[must_use]
    pub fn finish(self) -> (Option<Piece>, Total) {
        (self.held, self.total)
    }
}

/// A piece of work cut at multiples of what is done at once: the same pieces however often it is begun.
pub fn cut(piece: Piece) -> impl Iterator<Item = Piece> {
    let most = match piece.action {
        Action::Read => READ,
        Action::Zero => ZERO,
    };
    let mut start = piece.start;
    std::iter::from_fn(move || {
        let end = (start - start % most).saturating_add(most).min(piece.end);
        let next = Piece { start, end, action: piece.action };
        start = end;
        (next.start < next.end).then_some(next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Flags;

    const D: Flags = Flags::DIRTY;
    const Z: Flags = Flags::ZERO;

    fn planned(mode: ReadMode, extents: &[(u64, Flags)]) -> (Vec<(u64, u64, Action)>, Total) {
        let mut planner = Planner::new(mode);
        let mut at = 0;
        let mut pieces = Vec::new();
        for (length, flags) in extents {
            pieces.extend(planner.push(&Extent { start: at, length: *length, flags: *flags }));
            at += length;
        }
        let (last, total) = planner.finish();
        pieces.extend(last);
        (pieces.iter().map(|piece| (piece.start, piece.end, piece.action)).collect(), total)
    }

    #[test]
    fn what_is_done_with_each_kind_of_extent() {
        use Action::{Read, Zero};
        use ReadMode::{Full, Incremental};
        let hole = Flags::HOLE;
        let rows = [
            (Full, Flags::DATA, Some(Read)),
            (Full, Z, None),
            (Full, Z.union(hole), None),
            // a hole that does not read as zero is data
            (Full, hole, Some(Read)),
            (Full, D, Some(Read)),
            (Incremental, Flags::DATA, None),
            (Incremental, Z, None),
            (Incremental, D, Some(Read)),
            (Incremental, D.union(Z), Some(Zero)),
        ];
        for (mode, flags, done) in rows {
            let extent = Extent { start: 0, length: 1, flags };
            assert_eq!(action(mode, &extent), done, "{mode:?} {flags:?}");
        }
    }

    #[test]
    fn neighbours_are_joined_and_counted() {
        let (pieces, total) = planned(
            ReadMode::Incremental,
            &[(10, D), (5, D.union(Flags::HOLE)), (5, Flags::DATA), (7, D), (3, D.union(Z))],
        );
        assert_eq!(pieces, [(0, 15, Action::Read), (20, 27, Action::Read), (27, 30, Action::Zero)]);
        assert_eq!(total, Total { read: 22, zeroed: 3 });
        let (pieces, total) = planned(ReadMode::Full, &[(10, Z), (5, Flags::DATA), (5, D)]);
        assert_eq!((pieces.as_slice(), total.read), ([(10, 20, Action::Read)].as_slice(), 10));
        assert!(planned(ReadMode::Full, &[]).0.is_empty());
    }

    #[test]
    fn pieces_are_cut_at_the_same_places_and_nothing_is_lost() {
        for (start, end, action) in [
            (0, READ, Action::Read),
            (1, READ + 1, Action::Read),
            (READ - 512, 3 * READ + 512, Action::Read),
            (5, 6, Action::Zero),
            (0, 2 * ZERO + 1, Action::Zero),
            (7, 7, Action::Read),
        ] {
            let pieces: Vec<_> = cut(Piece { start, end, action }).collect();
            let mut at = start;
            for piece in &pieces {
                assert!(piece.start == at && piece.length() > 0 && piece.action == action);
                at = piece.end;
            }
            assert_eq!(at, end);
            let grid = if action == Action::Read { READ } else { ZERO };
            assert!(pieces.iter().rev().skip(1).all(|piece| piece.end % grid == 0));
        }
    }
}
