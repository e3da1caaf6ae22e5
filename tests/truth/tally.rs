//! What came of histories, in numbers. Pure.

use std::collections::BTreeMap;
use std::fmt;

/// What came of one history, or of many.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub histories: usize,
    /// Backups, by how they ended.
    pub backups: BTreeMap<String, usize>,
    /// Disks of backups that succeeded, by how they were read.
    pub modes: BTreeMap<String, usize>,
    /// Disks that were rebuilt.
    pub points: usize,
    /// Bytes of them that were compared.
    pub bytes: u64,
    /// Steps that were done, not passed over.
    pub steps: usize,
    /// Kills of an agent or an operator.
    pub kills: usize,
    /// Backups that were not whole at their first finalize.
    pub again: usize,
    /// Histories that failed.
    pub differences: usize,
}

impl Tally {
    /// Counts one more of something.
    pub fn count(counts: &mut BTreeMap<String, usize>, what: &str) {
        *counts.entry(what.to_owned()).or_default() += 1;
    }

    /// Adds what came of another.
    pub fn add(&mut self, other: &Self) {
        self.histories += other.histories;
        for (into, from) in [(&mut self.backups, &other.backups), (&mut self.modes, &other.modes)] {
            for (what, count) in from {
                *into.entry(what.clone()).or_default() += count;
            }
        }
        self.points += other.points;
        self.bytes += other.bytes;
        self.steps += other.steps;
        self.kills += other.kills;
        self.again += other.again;
        self.differences += other.differences;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |counts: &BTreeMap<String, usize>| {
            counts.iter().map(|(what, count)| format!("{count} {what}")).collect::<Vec<_>>().join(", ")
        };
        write!(
            f,
            "{} histories, {} steps, {} kills, {} backups ({}; {} read again), {} restore points ({}), {} MiB compared, {} differences",
            self.histories,
            self.steps,
            self.kills,
            self.backups.values().sum::<usize>(),
            list(&self.backups),
            self.again,
            self.points,
            list(&self.modes),
            self.bytes >> 20,
            self.differences
        )
    }
}

#[test]
fn sums_are_sums() {
    let mut one = Tally { histories: 1, points: 2, bytes: 3 << 20, ..Tally::default() };
    Tally::count(&mut one.backups, "Succeeded");
    let mut two = one.clone();
    two.add(&one);
    assert_eq!((two.histories, two.points, two.backups["Succeeded"]), (2, 4, 2));
    assert!(two.to_string().contains("6 MiB compared, 0 differences"), "{two}");
}
