//! A history of a VM, as a value: its disks, and what happens to them, made of a seed. Pure: it does nothing.
//!
//! Every number in a step is taken modulo what there is when the step is done, and a step that cannot be done is passed
//! over. So a history stays one when steps are taken out of it.

use std::fmt;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

const SECTOR: u64 = 512;
const CLUSTER: u64 = 65536;
const MIB: u64 = 1 << 20;

/// The most disks that a VM has: vda, vdb, vdc.
pub const MOST_DISKS: usize = DISKS as usize;

const DISKS: u8 = 3;

/// A VM, and what happens to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// What it was made of.
    pub seed: u64,
    /// The disks that the VM has from the beginning.
    pub disks: Vec<DiskPlan>,
    /// What happens, one after the other.
    pub steps: Vec<Step>,
}

/// A disk to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskPlan {
    /// Its size in bytes.
    pub size: u64,
    /// The cluster size of a qcow2 one; a raw one has none.
    pub cluster: Option<u64>,
}

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Step {
    /// The guest writes one byte all over a range.
    Write { disk: u8, at: u64, length: u64, pattern: u8 },
    /// The guest zeroes a range.
    Zero { disk: u8, at: u64, length: u64 },
    /// The guest discards a range.
    Discard { disk: u8, at: u64, length: u64 },
    /// A backup, from its creation to its end.
    Backup(Backup),
    /// The VM is off for a while, and starts again.
    Restart { off: Vec<Step> },
    /// The VM's QEMU is killed, after the guest flushed, and the VM starts again.
    KillVm,
    /// A checkpoint is deleted, and its bitmaps with it.
    DeleteCheckpoint { which: u8 },
    /// A disk grows; whether the inventory is waited for.
    Grow { disk: u8, by: u64, settle: bool },
    /// A disk is cut to some of its pieces of 2 MiB, and grown back at once.
    Cut { disk: u8, keep: u8 },
    /// The images of two disks take each other's place, while the VM is off.
    Exchange { one: u8, other: u8 },
    /// A disk's image is overwritten by a copy of another's, while the VM is off.
    Copy { from: u8, to: u8 },
    /// A disk that the VM has not is made, and plugged.
    Plug { disk: u8, plan: DiskPlan },
    /// A disk is unplugged, and its image removed.
    Unplug { disk: u8 },
    /// An external snapshot of all disks: from here on an overlay is written.
    Snapshot,
    /// What the overlays have is committed to the images below them, and they are removed.
    Commit,
    /// SIGKILL of a process that all VMs share, and a successor.
    Kill { who: Who },
    /// The VM goes to the other hypervisor, live; or, where it is off, is defined there instead.
    Migrate,
}

/// Whom a kill meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Who {
    Agent,
    Operator,
}

/// One backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Backup {
    /// Whose: chains of owners do not meet, unless a base is named.
    pub owner: u8,
    /// Where it starts.
    pub base: Base,
    /// The disks that are named, as bits; 0 names none, which means all.
    pub disks: u8,
    /// A kill so many milliseconds after the backup was created.
    pub kill: Option<(Who, u16)>,
    /// What the guest and others do while it is Ready.
    pub meanwhile: Vec<Step>,
    /// How it ends.
    pub end: End,
}

/// Where a backup starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Base {
    /// Nowhere: it is full.
    None,
    /// The newest usable checkpoint of its owner.
    Newest,
    /// One of those that there are, named.
    Named(u8),
}

/// How a backup ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum End {
    /// Read, and finalized.
    Finalize,
    /// Cancelled before it is Ready.
    CancelEarly,
    /// Cancelled once one disk was read.
    Cancel,
    /// Deleted once one disk was read.
    Delete,
    /// It fails, for the VM is stopped; it starts again.
    PowerOff,
}

impl fmt::Display for History {
    /// In the form that `HISTORY=` takes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl History {
    /// The history of a seed.
    pub fn of(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut maker = Maker { random: &mut random, recent: Vec::new(), pattern: 0 };
        let count = *[1, 2, 2, 3].choose(maker.random).unwrap_or(&1);
        let mut disks: Vec<_> = (0..count).map(|_| maker.disk()).collect();
        // of one size as often as not: then nothing but its mark tells one image from another
        if maker.random.random() {
            let size = disks[0].size;
            disks.iter_mut().for_each(|disk| disk.size = size);
        }
        // a raw one among them now and then, but never alone
        disks[0].cluster.get_or_insert(CLUSTER);
        let mut steps = maker.writes(4);
        steps.push(Step::Backup(Backup {
            base: Base::None,
            kill: None,
            end: End::Finalize,
            ..maker.backup()
        }));
        for _ in 0..maker.random.random_range(2..=4) {
            for _ in 0..maker.random.random_range(1..=2) {
                steps.push(maker.between());
            }
            steps.extend(maker.writes(3));
            steps.push(Step::Backup(maker.backup()));
        }
        // the last one is always a point
        if let Some(Step::Backup(last)) = steps.last_mut() {
            last.end = End::Finalize;
        }
        Self { seed, disks, steps }
    }

    /// How many backups are in it.
    pub fn backups(&self) -> usize {
        self.steps.iter().filter(|step| matches!(step, Step::Backup(_))).count()
    }
}

struct Maker<'a> {
    random: &'a mut StdRng,
    recent: Vec<(u8, u64, u64)>,
    pattern: u8,
}

impl Maker<'_> {
    fn one_in(&mut self, count: u32) -> bool {
        self.random.random_ratio(1, count)
    }

    fn disk(&mut self) -> DiskPlan {
        let size = self.random.random_range(2..=8) * MIB
            + *[0, 0, 0, SECTOR, CLUSTER - SECTOR].choose(self.random).unwrap_or(&0);
        let clusters = [Some(CLUSTER), Some(CLUSTER), Some(CLUSTER), Some(4096), Some(2 * MIB), None];
        DiskPlan { size, cluster: *clusters.choose(self.random).unwrap_or(&None) }
    }

    /// Where something is written: near what was written before as often as not, aligned as often as not.
    fn range(&mut self) -> (u8, u64, u64) {
        let unit = *[SECTOR, 4096, CLUSTER, CLUSTER].choose(self.random).unwrap_or(&SECTOR);
        let mut length = unit * self.random.random_range(1..=8);
        if self.one_in(4) {
            length = (length + self.random.random_range(1..=16) * CLUSTER).saturating_sub(SECTOR);
        }
        let (disk, mut at) = match self.recent.choose(self.random) {
            Some(&(disk, at, before)) if self.random.random() => {
                let shift = *[0, SECTOR, 4096, CLUSTER].choose(self.random).unwrap_or(&0);
                let back: bool = self.random.random();
                let edge = if self.random.random() { at } else { at + before };
                (disk, if back { edge.saturating_sub(shift) } else { edge + shift })
            }
            _ => {
                let disk = self.random.random_range(0..DISKS);
                (disk, self.random.random_range(0..16 * MIB / unit) * unit)
            }
        };
        if self.one_in(3) {
            at = at.saturating_sub(SECTOR);
        }
        self.recent.push((disk, at, length));
        if self.recent.len() > 6 {
            self.recent.remove(0);
        }
        (disk, at, length)
    }

    fn io(&mut self) -> Step {
        let (disk, at, length) = self.range();
        match self.random.random_range(0..10) {
            0..5 => {
                // never zero, which is another step
                self.pattern = self.pattern % 255 + 1;
                Step::Write { disk, at, length, pattern: self.pattern }
            }
            5..8 => Step::Zero { disk, at, length },
            _ => Step::Discard { disk, at, length },
        }
    }

    fn writes(&mut self, most: usize) -> Vec<Step> {
        (0..self.random.random_range(1..=most)).map(|_| self.io()).collect()
    }

    fn who(&mut self) -> Who {
        if self.random.random() { Who::Agent } else { Who::Operator }
    }

    fn backup(&mut self) -> Backup {
        let base = match self.random.random_range(0..10) {
            0 => Base::None,
            1..6 => Base::Newest,
            _ => Base::Named(self.random.random()),
        };
        let owner = u8::from(self.one_in(4));
        let disks = if self.one_in(5) { self.random.random_range(1..1 << DISKS) } else { 0 };
        let kill = self.one_in(8).then(|| (self.who(), self.random.random_range(0..1500)));
        let mut meanwhile = self.writes(2);
        if self.one_in(8) {
            meanwhile.push(Step::DeleteCheckpoint { which: self.random.random() });
        }
        if self.one_in(12) {
            let who = self.who();
            meanwhile.insert(self.random.random_range(0..=meanwhile.len()), Step::Kill { who });
        }
        let end = match self.random.random_range(0..20) {
            0 => End::CancelEarly,
            1 => End::Cancel,
            2 => End::Delete,
            3 => End::PowerOff,
            _ => End::Finalize,
        };
        Backup { owner, base, disks, kill, meanwhile, end }
    }

    /// What happens between two backups, beside writes.
    fn between(&mut self) -> Step {
        match self.random.random_range(0..25) {
            0..4 => Step::Restart { off: self.off() },
            4 => Step::KillVm,
            5..8 => Step::DeleteCheckpoint { which: self.random.random() },
            8..10 => self.grow(),
            10..12 => Step::Plug { disk: self.random.random_range(0..DISKS), plan: self.disk() },
            12..14 => Step::Unplug { disk: self.random.random_range(1..DISKS) },
            14..16 => Step::Snapshot,
            16..18 => Step::Commit,
            18 => Step::Kill { who: self.who() },
            19..22 => Step::Migrate,
            22..24 => self.cut(),
            _ => self.io(),
        }
    }

    /// What happens while the VM is off.
    fn off(&mut self) -> Vec<Step> {
        if self.one_in(3) {
            return Vec::new();
        }
        let (one, other) = (self.random.random_range(0..DISKS), self.random.random_range(0..DISKS));
        vec![match self.random.random_range(0..9) {
            0 => Step::DeleteCheckpoint { which: self.random.random() },
            1 => self.grow(),
            2 => Step::Plug { disk: self.random.random_range(0..DISKS), plan: self.disk() },
            3 => Step::Unplug { disk: self.random.random_range(1..DISKS) },
            4 => Step::Migrate,
            5 => self.cut(),
            6 => Step::Exchange { one, other },
            7 => Step::Copy { from: one, to: other },
            _ => Step::Kill { who: self.who() },
        }]
    }

    fn cut(&mut self) -> Step {
        Step::Cut { disk: self.random.random_range(0..DISKS), keep: self.random.random() }
    }

    fn grow(&mut self) -> Step {
        let by = *[SECTOR, CLUSTER, MIB, MIB + SECTOR].choose(self.random).unwrap_or(&MIB);
        Step::Grow { disk: self.random.random_range(0..DISKS), by, settle: self.random.random() }
    }
}

#[test]
fn a_history_is_made_of_its_seed_alone_and_can_be_printed_and_read() {
    for seed in 0..200 {
        let history = History::of(seed);
        assert_eq!(history, History::of(seed));
        assert_eq!(serde_json::from_str::<History>(&history.to_string()).unwrap(), history);
    }
    assert_ne!(History::of(1).steps, History::of(2).steps);
}

#[test]
fn histories_have_every_kind_of_step_and_no_more_than_a_few_backups() {
    let kinds = |step: &Step| -> Vec<String> {
        let name = |step: &Step| format!("{step:?}").split([' ', '(']).next().unwrap_or_default().to_owned();
        let inner = match step {
            Step::Backup(backup) => {
                backup.meanwhile.iter().map(|step| format!("during {}", name(step))).collect()
            }
            Step::Restart { off } => off.iter().map(|step| format!("off {}", name(step))).collect(),
            _ => Vec::new(),
        };
        [inner, vec![name(step)]].concat()
    };
    let mut seen = std::collections::BTreeMap::<String, usize>::new();
    let mut ends = std::collections::BTreeSet::new();
    for seed in 0..300 {
        let history = History::of(seed);
        assert!((3..=5).contains(&history.backups()), "{history}");
        assert!(history.disks[0].cluster.is_some(), "a first disk that keeps bitmaps: {history}");
        for step in &history.steps {
            kinds(step).into_iter().for_each(|kind| *seen.entry(kind).or_default() += 1);
            if let Step::Backup(backup) = step {
                ends.insert(format!("{:?}", backup.end));
            }
        }
    }
    let expected = [
        "Write",
        "Zero",
        "Discard",
        "Backup",
        "Restart",
        "KillVm",
        "DeleteCheckpoint",
        "Grow",
        "Plug",
        "Unplug",
        "Snapshot",
        "Commit",
        "Kill",
        "Migrate",
        "Cut",
        "during Write",
        "during Zero",
        "during Discard",
        "during DeleteCheckpoint",
        "during Kill",
        "off DeleteCheckpoint",
        "off Grow",
        "off Plug",
        "off Unplug",
        "off Kill",
        "off Migrate",
        "off Cut",
        "off Exchange",
        "off Copy",
    ];
    for kind in expected {
        assert!(seen.get(kind).is_some_and(|count| *count >= 3), "{kind} is hardly ever made: {seen:?}");
    }
    assert_eq!(ends.len(), 5, "{ends:?}");
}
