//! Which pieces of a disk are done, so that a download that was cut goes on where it was. It never reads a clock or a file.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::plan::{Action, Piece, Total};

/// Most pieces between the first that is not done and the last that was begun: what is stored stays small.
pub const WINDOW: usize = 64;

/// What is done of a disk, as it is stored.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// All work below this byte is done.
    pub below: u64,
    /// Pieces above it that are done: first byte, and the one behind the last.
    pub above: Vec<(u64, u64)>,
}

impl Done {
    /// Whether a piece is done.
    #[must_use]
    pub fn has(&self, piece: &Piece) -> bool {
        piece.end <= self.below
            || self.above.iter().any(|(start, end)| *start <= piece.start && piece.end <= *end)
    }
}

/// A disk's work while it is done by several workers.
#[derive(Debug, Default)]
pub struct Work {
    below: u64,
    begun: VecDeque<(Piece, bool)>,
    /// Bytes that are done.
    pub total: Total,
}

impl Work {
    /// Whether another piece may be begun.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.begun.len() < WINDOW
    }

    /// Notes that a piece was handed out. Pieces come in order.
    pub fn begin(&mut self, piece: Piece) {
        self.begun.push_back((piece, false));
    }

    /// Notes that a piece is done.
    pub fn end(&mut self, piece: &Piece) {
        if let Some(begun) = self.begun.iter_mut().find(|(begun, _)| begun == piece) {
            begun.1 = true;
            match piece.action {
                Action::Read => self.total.read += piece.length(),
                Action::Zero => self.total.zeroed += piece.length(),
            }
        }
        while let Some((piece, _)) = self.begun.pop_front_if(|(_, done)| *done) {
            self.below = piece.end;
        }
    }

    /// Notes that a piece was done by an earlier process.
    pub fn skip(&mut self, piece: Piece) {
        self.begin(piece);
        self.end(&piece);
    }

    /// What is done, to be stored.
    #[must_use]
    pub fn done(&self) -> Done {
        let above = self.begun.iter().filter(|(_, done)| *done).map(|(piece, _)| (piece.start, piece.end));
        Done { below: self.below, above: above.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(start: u64, end: u64) -> Piece {
        Piece { start, end, action: Action::Read }
    }

    #[test]
    fn what_is_done_out_of_order_is_kept_and_found_again() {
        let pieces = [piece(0, 10), piece(10, 20), piece(50, 60), piece(60, 61)];
        let mut work = Work::default();
        pieces.iter().for_each(|piece| work.begin(*piece));
        work.end(&pieces[1]);
        work.end(&pieces[3]);
        assert_eq!(work.done(), Done { below: 0, above: vec![(10, 20), (60, 61)] });
        let has: Vec<_> = pieces.iter().map(|piece| work.done().has(piece)).collect();
        assert_eq!(has, [false, true, false, true]);
        work.end(&pieces[0]);
        assert_eq!(work.done(), Done { below: 20, above: vec![(60, 61)] });
        work.end(&pieces[2]);
        assert_eq!(work.done(), Done { below: 61, above: vec![] });
        assert_eq!(work.total.read, 31);
        // twice is once
        work.end(&pieces[2]);
        assert_eq!(work.total.read, 31);
    }

    #[test]
    fn a_successor_counts_what_was_done() {
        let done = Done { below: 20, above: vec![(60, 61)] };
        let mut work = Work::default();
        for next in [piece(0, 10), piece(10, 20), piece(50, 60), piece(60, 61)] {
            if done.has(&next) { work.skip(next) } else { work.begin(next) }
        }
        assert_eq!(work.total.read, 21);
        assert_eq!(work.done(), done);
    }

    #[test]
    fn the_window_is_bounded() {
        let mut work = Work::default();
        for at in 0..WINDOW as u64 {
            assert!(work.has_room());
            work.begin(piece(at, at + 1));
        }
        assert!(!work.has_room());
        work.end(&piece(0, 1));
        assert!(work.has_room());
    }
}
