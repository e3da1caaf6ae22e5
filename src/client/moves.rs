//! In what order folders are renamed when a restore point changes or goes, and what is done after a kill in between: names in,
//! names out. After each single move every restore point is there and whole, or [`mend`] brings it back. It moves nothing
//! itself.
//!
//! ```text
//!  in one step      NAME <-> .NAME.chain-new                               then what is hidden is removed
//!  in two           NAME -> .NAME.chain-old, .NAME.chain-new -> NAME       the same
//!  for good         NAME -> .NAME.chain-gone, its manifest, the rest
//! ```

use super::names::{Aside, aside};

/// One move, of folders beside each other. A kill finds it done or not begun; only a removal is found in its middle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Move {
    /// Two folders change places.
    Exchange(String, String),
    /// A folder gets a name that is free.
    Rename(String, String),
    /// All moves until now are on stable storage.
    Sync,
    /// The manifest of a folder is removed, for good: it is no restore point any more.
    Forget(String),
    /// A folder is removed with all in it.
    Remove(String),
}

/// A restore point gives way to its successor, which is whole in the folder beside.
#[must_use]
pub fn exchange(point: &str) -> Vec<Move> {
    let new = aside(point, Aside::New);
    vec![Move::Exchange(point.to_owned(), new.clone()), Move::Sync, Move::Remove(new)]
}

/// The same where two folders cannot change places in one step (NFS).
#[must_use]
pub fn replace(point: &str) -> Vec<Move> {
    let (new, old) = (aside(point, Aside::New), aside(point, Aside::Old));
    vec![
        Move::Rename(point.to_owned(), old.clone()),
        Move::Sync,
        Move::Rename(new, point.to_owned()),
        Move::Sync,
        Move::Remove(old),
    ]
}

/// A restore point is set aside: then it is looked whether somebody began to lie over it meanwhile.
#[must_use]
pub fn leave(point: &str) -> Vec<Move> {
    vec![Move::Rename(point.to_owned(), aside(point, Aside::Gone)), Move::Sync]
}

/// A restore point that was set aside comes back.
#[must_use]
pub fn back(point: &str) -> Vec<Move> {
    vec![Move::Rename(aside(point, Aside::Gone), point.to_owned()), Move::Sync]
}

/// A restore point that was set aside is removed.
#[must_use]
pub fn remove(point: &str) -> Vec<Move> {
    let gone = aside(point, Aside::Gone);
    vec![Move::Forget(gone.clone()), Move::Remove(gone)]
}

/// What a process that was killed left of a restore point.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Whether the restore point itself is there.
    pub is_there: bool,
    /// The folders beside it.
    pub asides: Vec<Aside>,
    /// Of one that was set aside: whether its manifest is there still.
    pub has_manifest: bool,
    /// Whether something lies over it, or may.
    pub is_needed: bool,
}

/// Puts in order what was left.
#[must_use]
pub fn mend(point: &str, left: &Left) -> Vec<Move> {
    let has = |kind| left.asides.contains(&kind);
    let folder = |kind| aside(point, kind);
    let mut moves = Vec::new();
    match (left.is_there, has(Aside::Old)) {
        (true, true) => moves.push(Move::Remove(folder(Aside::Old))),
        // between the two renames: the old one is whole
        (false, true) => moves.extend([Move::Rename(folder(Aside::Old), point.to_owned()), Move::Sync]),
        (_, false) => {}
    }
    if has(Aside::New) {
        moves.push(Move::Remove(folder(Aside::New)));
    }
    if has(Aside::Gone) {
        let is_back = !left.is_there && !has(Aside::Old) && left.has_manifest && left.is_needed;
        moves.extend(if is_back { back(point) } else { remove(point) });
    }
    moves
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// What a folder holds. `Half` is one whose removal was cut.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Held {
        Before,
        After,
        Forgotten,
        Half,
    }

    type Folders = BTreeMap<String, Held>;

    /// Makes one move as a file system does, and says no where that would.
    fn make(folders: &mut Folders, one: &Move) {
        match one {
            Move::Exchange(a, b) => {
                let (held_a, held_b) = (folders[a], folders[b]);
                folders.insert(a.clone(), held_b);
                folders.insert(b.clone(), held_a);
            }
            Move::Rename(from, to) => {
                assert!(!folders.contains_key(to), "{to} is there");
                let held = folders.remove(from).unwrap();
                folders.insert(to.clone(), held);
            }
            Move::Sync => {}
            Move::Forget(folder) => {
                if let Some(held) = folders.get_mut(folder) {
                    *held = Held::Forgotten;
                }
            }
            Move::Remove(folder) => {
                folders.remove(folder);
            }
        }
    }

    /// The moves until a kill; with `half`, the one that was under way is a removal in its middle.
    fn until(folders: &mut Folders, moves: &[Move], kill: usize, half: bool) {
        for one in &moves[..kill.min(moves.len())] {
            make(folders, one);
        }
        if half
            && let Some(Move::Remove(folder)) = moves.get(kill)
            && let Some(held) = folders.get_mut(folder)
        {
            *held = Held::Half;
        }
    }

    fn left(folders: &Folders, is_needed: bool) -> Left {
        let all = [Aside::New, Aside::Old, Aside::Gone];
        let gone = folders.get(&aside("p", Aside::Gone));
        Left {
            is_there: folders.contains_key("p"),
            asides: all.into_iter().filter(|kind| folders.contains_key(&aside("p", *kind))).collect(),
            has_manifest: gone.is_some_and(|held| matches!(held, Held::Before | Held::After)),
            is_needed,
        }
    }

    fn replaced() -> Folders {
        Folders::from([("p".to_owned(), Held::Before), (aside("p", Aside::New), Held::After)])
    }

    #[test]
    fn in_one_step_it_is_there_after_every_move_and_in_two_after_all_but_one() {
        for (moves, missing) in [(exchange("p"), 0), (replace("p"), 2)] {
            let mut folders = replaced();
            let mut seen = 0;
            for one in &moves {
                make(&mut folders, one);
                seen += usize::from(!folders.contains_key("p"));
            }
            assert_eq!(folders, Folders::from([("p".to_owned(), Held::After)]));
            assert_eq!(seen, missing, "the first rename, and that it is on stable storage");
        }
    }

    #[test]
    fn what_is_removed_loses_its_manifest_only_when_it_is_aside_for_good() {
        let mut folders = Folders::from([("p".to_owned(), Held::Before)]);
        for one in leave("p") {
            make(&mut folders, &one);
        }
        assert_eq!(folders, Folders::from([(aside("p", Aside::Gone), Held::Before)]));
        let mut again = folders.clone();
        back("p").iter().for_each(|one| make(&mut again, one));
        assert_eq!(again, Folders::from([("p".to_owned(), Held::Before)]));
        remove("p").iter().for_each(|one| make(&mut folders, one));
        assert!(folders.is_empty());
    }

    proptest! {
        /// A process is killed, and those that are to mend it too, one after the other.
        #[test]
        fn whatever_is_killed_is_whole_once_one_mends_to_the_end(
            steps in any::<bool>(),
            removed in any::<bool>(),
            needed in any::<bool>(),
            kills in prop::collection::vec((0..8_usize, any::<bool>()), 1..5),
        ) {
            let (mut folders, mut moves) = match (removed, steps) {
                (true, _) => {
                    let moves = leave("p").into_iter().chain(remove("p")).collect();
                    (Folders::from([("p".to_owned(), Held::Before)]), moves)
                }
                (false, true) => (replaced(), replace("p")),
                (false, false) => (replaced(), exchange("p")),
            };
            for (kill, half) in kills {
                until(&mut folders, &moves, kill, half);
                if !removed {
                    // what is there, or comes back, is whole
                    let old = folders.get(&aside("p", Aside::Old));
                    let held = folders.get("p").or(old);
                    prop_assert!(matches!(held, Some(Held::Before | Held::After)), "{:?}", folders);
                }
                moves = mend("p", &left(&folders, needed));
            }
            // this one is not killed
            moves.iter().for_each(|one| make(&mut folders, one));
            prop_assert_eq!(mend("p", &left(&folders, needed)), vec![]);
            let names: Vec<_> = folders.keys().collect();
            match removed {
                true => prop_assert!(folders.is_empty() || folders == Folders::from([("p".to_owned(), Held::Before)])),
                false => prop_assert!(names == ["p"] && matches!(folders["p"], Held::Before | Held::After)),
            }
        }
    }
}
