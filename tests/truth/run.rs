//! Lets a history happen to a real VM, and sees that nothing of it is left. It decides nothing about what happens:
//! `history.rs` does.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use virtmark::api::{LibvirtDomain, VmBackup, VmCheckpoint};
use virtmark_bed::disks::info;
use virtmark_bed::{Bed, Disk, Plan, Vm};

use super::chain::Zeroes;
use super::history::{DiskPlan, History, MOST_DISKS, Step, Who};
use super::rig::{host_is_clean, objects::Objects};
use super::tally::Tally;

pub(super) const TARGETS: [&str; MOST_DISKS] = ["vda", "vdb", "vdc"];

/// The largest that a disk grows.
const LARGEST: u64 = 12 << 20;

/// What all histories share.
pub struct World {
    bed: Mutex<Bed>,
    pub(super) objects: Objects,
    /// Kills so far, by whichever history: they meet the backups of all.
    pub(super) kills: AtomicUsize,
}

impl World {
    /// The bed's.
    pub fn of_env() -> Result<Self> {
        let bed = Bed::from_env()?;
        let objects = Objects::of(&bed)?;
        Ok(Self { bed: Mutex::new(bed), objects, kills: AtomicUsize::new(0) })
    }

    /// Kills a process with SIGKILL and starts its successor.
    pub(super) fn kill(&self, who: Who, node: usize) -> Result<()> {
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.kills.fetch_add(1, Ordering::Relaxed);
        match who {
            Who::Agent => bed.agents[node].restart(&[])?,
            Who::Operator => bed.operator.restart(&[])?,
        }
        bed.store()
    }

    /// What a history came to. `zeroes` is for those who want to see that a mistake is noticed.
    ///
    /// # Errors
    /// A wrong byte, a backup that ended as nothing explains, something that was left.
    pub fn run(&self, history: &History, zeroes: Zeroes) -> Result<Tally> {
        // of this process, whatever the test: names are taken once
        static NAMES: AtomicUsize = AtomicUsize::new(0);
        let number = NAMES.fetch_add(1, Ordering::Relaxed);
        let bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let node = number % bed.hypervisors.len();
        let plan = history.disks.iter().zip(TARGETS).map(|(plan, target)| disk(target, *plan));
        let name = format!("truth-{number}-{:x}", history.seed);
        let vm = plan.fold(Plan::new(&name), Plan::disk).start(&bed.hypervisors[node])?;
        let mut run = Run {
            world: self,
            node,
            vm,
            zeroes,
            files: tempfile::tempdir()?,
            tally: Tally { histories: 1, ..Tally::default() },
            backups: Vec::new(),
            checkpoints: Vec::new(),
            restored: BTreeMap::new(),
        };
        run.settle()?;
        for (number, step) in history.steps.iter().enumerate() {
            let began = Instant::now();
            run.step(step).with_context(|| format!("step {number}, {step:?}"))?;
            if std::env::var_os("VERBOSE").is_some() {
                println!("{name} {number} {} ms {step:?}", began.elapsed().as_millis());
            }
        }
        run.end()?;
        Ok(run.tally.clone())
    }
}

fn disk(target: &str, plan: DiskPlan) -> Disk {
    match plan.cluster {
        Some(cluster) => Disk::qcow2(target, plan.size).clusters(cluster),
        None => Disk::raw(target, plan.size),
    }
}

/// A checkpoint that a backup left.
pub(super) struct Checkpoint {
    pub(super) name: String,
    pub(super) bitmap: String,
}

/// One history on its way.
pub(super) struct Run<'a> {
    pub(super) world: &'a World,
    pub(super) node: usize,
    pub(super) vm: Vm,
    pub(super) zeroes: Zeroes,
    pub(super) files: tempfile::TempDir,
    pub(super) tally: Tally,
    /// Name and uid.
    pub(super) backups: Vec<(String, String)>,
    pub(super) checkpoints: Vec<Checkpoint>,
    /// By checkpoint and disk, the image as it was at that point.
    pub(super) restored: BTreeMap<(String, String), PathBuf>,
}

impl Run<'_> {
    pub(super) fn objects(&self) -> &Objects {
        &self.world.objects
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        let vm = &self.vm;
        let target = |disk: &u8| TARGETS[usize::from(*disk) % MOST_DISKS];
        match step {
            Step::Write { .. } | Step::Zero { .. } | Step::Discard { .. } => guest(vm, step)?,
            Step::Backup(backup) => self.backup(backup)?,
            Step::Restart { off } => {
                vm.destroy()?;
                off.iter().try_for_each(|step| self.step(step).with_context(|| format!("{step:?}")))?;
                self.vm.start()?;
            }
            Step::KillVm => {
                self.targets().iter().try_for_each(|target| vm.flush(target))?;
                vm.kill()?;
                vm.start()?;
            }
            Step::DeleteCheckpoint { which } => {
                if let Some(at) = self.which(*which) {
                    let gone = self.checkpoints.remove(at);
                    self.objects().delete::<VmCheckpoint>(&gone.name)?;
                    self.objects().gone::<VmCheckpoint>(&gone.name)?;
                    self.no_bitmap_is_left()?;
                }
            }
            Step::Grow { disk, by, settle } => {
                let target = target(disk);
                let size = fs::metadata(vm.mirror(target)).map_or(u64::MAX, |mirror| mirror.len());
                if !self.has(target) || size.saturating_add(*by) > LARGEST {
                    return Ok(());
                }
                vm.resize(target, size + by)?;
                if *settle {
                    self.settle()?;
                }
            }
            Step::Cut { disk, keep } => {
                // whole clusters, of whatever size: of one that is cut through QEMU keeps what the guest must not count on
                let (target, piece) = (target(disk), 2 << 20);
                let size = fs::metadata(vm.mirror(target)).map_or(0, |mirror| mirror.len());
                let kept = piece * (1 + u64::from(*keep) % (size / piece).max(1));
                if !self.has(target) || kept >= size {
                    return Ok(());
                }
                vm.resize(target, kept)?;
                vm.resize(target, size)?;
            }
            Step::Exchange { one, other } => {
                let (one, other) = (target(one), target(other));
                if one == other || !self.can_be_swapped(one)? || !self.can_be_swapped(other)? {
                    return Ok(());
                }
                for of in [Vm::image, Vm::mirror] {
                    let (one, other, aside) = (of(vm, one), of(vm, other), of(vm, "aside"));
                    fs::rename(&one, &aside)?;
                    fs::rename(&other, &one)?;
                    fs::rename(&aside, &other)?;
                }
            }
            Step::Copy { from, to } => {
                let (from, to) = (target(from), target(to));
                if from == to || !self.can_be_swapped(from)? || !self.can_be_swapped(to)? {
                    return Ok(());
                }
                for of in [Vm::image, Vm::mirror] {
                    fs::copy(of(vm, from), of(vm, to))?;
                }
            }
            Step::Plug { disk: number, plan } => {
                if !self.has(target(number)) {
                    vm.plug(&disk(target(number), *plan))?;
                    self.settle()?;
                }
            }
            Step::Unplug { disk } => {
                if self.has(target(disk)) && self.targets().len() > 1 {
                    vm.unplug(target(disk))?;
                    self.settle()?;
                }
            }
            Step::Snapshot => {
                vm.snapshot(&self.targets())?;
                self.settle()?;
            }
            Step::Commit => {
                self.targets().iter().try_for_each(|target| vm.commit(target))?;
                self.settle()?;
            }
            Step::Kill { who } => {
                self.tally.kills += 1;
                self.world.kill(*who, self.node)?;
            }
            Step::Migrate => self.migrate()?,
        }
        self.tally.steps += 1;
        Ok(())
    }

    /// Whether a disk is one qcow2 image, which no QEMU has.
    fn can_be_swapped(&self, target: &str) -> Result<bool> {
        if self.vm.runs()? || !self.has(target) {
            return Ok(false);
        }
        let image = self.vm.active(target)?;
        Ok(image == self.vm.image(target) && info(&image)?["format"] == "qcow2")
    }

    fn migrate(&mut self) -> Result<()> {
        let hypervisors = self.world.bed.lock().unwrap_or_else(PoisonError::into_inner).hypervisors.clone();
        let next = (self.node + 1) % hypervisors.len();
        let to = &hypervisors[next];
        if self.vm.runs()? {
            self.vm.migrate(to, &[])?;
        } else {
            self.vm.define_on(to)?;
        }
        self.node = next;
        self.settle()
    }

    pub(super) fn has(&self, target: &str) -> bool {
        self.vm.active(target).is_ok()
    }

    fn targets(&self) -> Vec<&'static str> {
        TARGETS.into_iter().filter(|target| self.has(target)).collect()
    }

    pub(super) fn which(&self, which: u8) -> Option<usize> {
        usize::from(which).checked_rem(self.checkpoints.len())
    }

    /// Waits until the inventory says what there is.
    fn settle(&self) -> Result<()> {
        let disks: Vec<_> = self
            .targets()
            .into_iter()
            .map(|target| {
                let image = info(&self.vm.active(target)?)?;
                let size = fs::metadata(self.vm.mirror(target))?.len();
                Ok((target, image["format"].as_str().unwrap_or_default().to_owned(), size))
            })
            .collect::<Result<_>>()?;
        self.objects()
            .until::<LibvirtDomain>(&self.vm.name, &format!("show {disks:?}"), |domain| {
                let shown = domain["status"]["disks"].as_array().cloned().unwrap_or_default();
                domain["status"]["nodeName"] == self.vm.hypervisor().name.as_str()
                    && shown.len() == disks.len()
                    && shown.iter().zip(&disks).all(|(shown, (target, format, size))| {
                        shown["target"] == *target && shown["format"] == *format && shown["size"] == *size
                    })
            })
            .map(drop)
    }

    /// Nothing is left of what is not a checkpoint any more, in any image.
    pub(super) fn no_bitmap_is_left(&self) -> Result<()> {
        let mut found = Vec::new();
        if self.vm.runs()? {
            found.extend(self.vm.live_bitmaps()?);
        } else {
            for target in self.targets() {
                for layer in self.vm.layers(target)? {
                    let image = info(&layer)?;
                    let bitmaps = image["format-specific"]["data"]["bitmaps"].as_array().cloned();
                    let names = bitmaps.unwrap_or_default();
                    found.extend(names.iter().filter_map(|bitmap| Some(bitmap["name"].as_str()?.to_owned())));
                }
            }
        }
        let left: Vec<_> = found
            .iter()
            .filter(|name| name.starts_with("virtmark-"))
            // and its mark in each of several disks
            .filter(|name| {
                !self.checkpoints.iter().any(|checkpoint| {
                    name.strip_prefix(&checkpoint.bitmap)
                        .is_some_and(|mark| mark.is_empty() || mark.starts_with('.'))
                })
            })
            .collect();
        ensure!(left.is_empty(), "bitmaps are left: {left:?}");
        Ok(())
    }

    /// All is over: nothing is left, then nothing at all.
    fn end(&mut self) -> Result<()> {
        let uids: Vec<_> = self.backups.iter().map(|(_, uid)| uid.clone()).collect();
        host_is_clean(&self.vm, &uids)?;
        for (name, _) in &self.backups {
            self.objects().delete::<VmBackup>(name)?;
        }
        let checkpoints = std::mem::take(&mut self.checkpoints);
        for checkpoint in &checkpoints {
            self.objects().delete::<VmCheckpoint>(&checkpoint.name)?;
        }
        for checkpoint in &checkpoints {
            self.objects().gone::<VmCheckpoint>(&checkpoint.name)?;
        }
        for (name, _) in std::mem::take(&mut self.backups) {
            self.objects().gone::<VmBackup>(&name)?;
        }
        self.no_bitmap_is_left()?;
        self.vm.destroy()?;
        self.no_bitmap_is_left().context("in the images")
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        // a history that failed says why already
        for (name, _) in &self.backups {
            let _ = self.objects().delete::<VmBackup>(name);
        }
        for checkpoint in &self.checkpoints {
            let _ = self.objects().delete::<VmCheckpoint>(&checkpoint.name);
        }
        for (name, _) in &self.backups {
            let _ = self.objects().gone::<VmBackup>(name);
        }
    }
}

/// What the guest does.
pub(super) fn guest(vm: &Vm, step: &Step) -> Result<()> {
    let (Step::Write { disk, at, length, .. }
    | Step::Zero { disk, at, length }
    | Step::Discard { disk, at, length }) = step
    else {
        return Ok(());
    };
    let targets: Vec<_> = TARGETS.into_iter().filter(|target| vm.active(target).is_ok()).collect();
    let target = targets[usize::from(*disk) % targets.len()];
    let size = fs::metadata(vm.mirror(target))?.len();
    let at = at % size;
    let length = (*length).min(size - at);
    match step {
        Step::Write { pattern, .. } => vm.write(target, at, length, *pattern),
        Step::Zero { .. } => vm.zero(target, at, length),
        _ => vm.discard(target, at, length),
    }
}
