//! A backup of a history, from its creation to its end: the client's part of it, which rebuilds each point from what
//! transfers serve alone, and the guest's meanwhile.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use virtmark::api::{VmBackup, VmCheckpoint};
use virtmark_bed::{Vm, wait_until};

use super::chain::restore_with;
use super::history::{self, Base, End, Step};
use super::rig::{BOUND, merge};
use super::run::{Checkpoint, Run, TARGETS, guest};
use super::tally::Tally;

/// How long a backup that was read again is given to see it.
const RECOUNTED: Duration = Duration::from_secs(5);

impl Run<'_> {
    /// A backup from its creation to its end.
    pub(super) fn backup(&mut self, plan: &history::Backup) -> Result<()> {
        let name = format!("{}-{}", self.vm.name, self.backups.len());
        let kills = self.world.kills.load(Ordering::Relaxed);
        let created = self.objects().create::<VmBackup>(&name, &labels(plan.owner), &self.spec(plan))?;
        let uid = created["metadata"]["uid"].as_str().context("no uid")?.to_owned();
        self.backups.push((name.clone(), uid));
        let (world, node) = (self.world, self.node);
        let deleted = std::thread::scope(|scope| {
            let killer = plan.kill.map(|(who, after)| {
                scope.spawn(move || {
                    // no condition is waited for: a kill may come at any time
                    sleep(Duration::from_millis(after.into()));
                    world.kill(who, node)
                })
            });
            let done = self.live(&name, plan, kills);
            let killed = killer.map(|killer| killer.join().map_err(|_| anyhow!("the killer died")));
            killed.transpose()?.transpose()?;
            done
        })?;
        self.tally.kills += usize::from(plan.kill.is_some());
        for name in deleted {
            self.objects().gone::<VmCheckpoint>(&name)?;
        }
        self.no_bitmap_is_left()?;
        ensure!(self.vm.state()? == "running", "the guest was left {}", self.vm.state()?);
        Ok(())
    }

    fn spec(&self, plan: &history::Backup) -> Value {
        let mut spec = json!({"vm": self.vm.name, "quiesce": {"mode": "None"}});
        let base = match plan.base {
            Base::None => json!({}),
            Base::Newest => json!({"type": "Incremental"}),
            Base::Named(which) => match self.which(which) {
                Some(at) => json!({"type": "Incremental", "fromCheckpoint": self.checkpoints[at].name}),
                None => json!({"type": "Incremental"}),
            },
        };
        merge(&mut spec, base);
        let named = TARGETS.into_iter().enumerate().filter(|(at, _)| plan.disks >> at & 1 == 1);
        let named: Vec<_> = named.map(|(_, target)| target).filter(|target| self.has(target)).collect();
        if !named.is_empty() {
            merge(&mut spec, json!({"disks": named}));
        }
        spec
    }

    /// The user's part, and the guest's. Answers the checkpoints that were deleted meanwhile. `kills`: how many there had
    /// been when the backup was made.
    fn live(&mut self, name: &str, plan: &history::Backup, kills: usize) -> Result<Vec<String>> {
        if plan.end == End::CancelEarly {
            self.objects().state::<VmBackup>(name, "Cancelled")?;
            self.failed(name, "Cancelled")?;
            return Ok(Vec::new());
        }
        let status = self.phase(name, "Ready")?;
        // nothing was written since the backup was made
        let point = Point::of(&self.vm, &status)?;
        let (vm, world, node) = (&self.vm, self.world, self.node);
        let mut to_delete: Vec<_> = plan
            .meanwhile
            .iter()
            .filter_map(|step| match step {
                Step::DeleteCheckpoint { which } => self.which(*which),
                _ => None,
            })
            .collect();
        to_delete.dedup();
        let doomed: Vec<_> = to_delete.iter().map(|at| self.checkpoints[*at].name.clone()).collect();
        let read_all = plan.end == End::Finalize;
        let read = std::thread::scope(|scope| {
            let others = scope.spawn(|| -> Result<()> {
                doomed.iter().try_for_each(|name| world.objects.delete::<VmCheckpoint>(name))?;
                for step in &plan.meanwhile {
                    match step {
                        Step::Kill { who } => world.kill(*who, node)?,
                        step => guest(vm, step).with_context(|| format!("meanwhile {step:?}"))?,
                    }
                }
                Ok(())
            });
            let read = self.read(name, &point, read_all, 0);
            others.join().map_err(|_| anyhow!("the guest's thread died"))??;
            read
        })?;
        self.tally.kills += plan.meanwhile.iter().filter(|step| matches!(step, Step::Kill { .. })).count();
        match plan.end {
            End::Finalize => self.finalize(name, &point, read, kills)?,
            End::Cancel => {
                self.objects().state::<VmBackup>(name, "Cancelled")?;
                self.failed(name, "Cancelled")?;
            }
            End::Delete => {
                self.objects().delete::<VmBackup>(name)?;
                self.objects().gone::<VmBackup>(name)?;
                Tally::count(&mut self.tally.backups, "deleted");
            }
            End::PowerOff => {
                self.vm.destroy()?;
                self.failed(name, "VmStopped")?;
                self.vm.start()?;
            }
            End::CancelEarly => {}
        }
        self.checkpoints.retain(|checkpoint| !doomed.contains(&checkpoint.name));
        Ok(doomed)
    }

    /// Rebuilds the disks of a point, or the first one, and compares. `again`: which time that is.
    fn read(&self, name: &str, point: &Point, all: bool, again: usize) -> Result<Rebuilt> {
        let mut rebuilt = Rebuilt::default();
        for disk in point.disks.iter().take(if all { usize::MAX } else { 1 }) {
            let image = self.files.path().join(format!("{name}-{}-{again}.raw", disk.name));
            let base = match &point.base {
                Some(base) if disk.incremental => {
                    let base = self.restored.get(&(base.clone(), disk.name.clone()));
                    Some(base.with_context(|| format!("{name}: {} was never read in its base", disk.name))?)
                }
                None if disk.incremental => bail!("{name}: {} is incremental, and has no base", disk.name),
                _ => None,
            };
            let mut last = None;
            let transfer = format!("{name}-{}", disk.name);
            // whoever was killed meanwhile comes back: a client tries again
            let read = wait_until(BOUND, &format!("{transfer} to be read"), || {
                match base {
                    Some(base) => fs::copy(base, &image).map(drop)?,
                    None => fs::write(&image, [])?,
                }
                let ticket = self.objects().ticket(&transfer, self.files.path())?;
                match restore_with(&ticket, disk.incremental, &image, self.zeroes) {
                    Ok(done) => Ok(Some(done)),
                    Err(error) => {
                        last = Some(format!("{error:#}"));
                        Ok(None)
                    }
                }
            });
            let read = read.with_context(|| format!("the last try: {last:?}"))?;
            let found = fs::read(&image)?;
            if let Some(at) = first_difference(&disk.then, &found) {
                bail!(
                    "DIFFERENCE: {name}: {} ({}, from {:?}) at byte {at}: it was {:?}, and is rebuilt as {:?}; of {} \
                     bytes, rebuilt {}; {read:?}",
                    disk.name,
                    disk.mode,
                    point.base,
                    disk.then.get(at),
                    found.get(at),
                    disk.then.len(),
                    found.len()
                );
            }
            rebuilt.bytes += u64::try_from(found.len())?;
            rebuilt.images.push((disk.name.clone(), image));
        }
        Ok(rebuilt)
    }

    fn finalize(&mut self, name: &str, point: &Point, mut read: Rebuilt, kills: usize) -> Result<()> {
        self.objects().state::<VmBackup>(name, "Finalized")?;
        let mut again = 0;
        let status = loop {
            let object = self.objects().until::<VmBackup>(name, "be Succeeded", |object| {
                let status = &object["status"];
                let unread = condition(status, "Reconciling")["reason"] == "TransfersIncomplete";
                is_terminal(status) || (unread && status["phase"] == "Ready")
            })?;
            if is_terminal(&object["status"]) {
                break object["status"].clone();
            }
            // what was served just before a kill counts as unread; nothing else does that was read
            let killed = self.world.kills.load(Ordering::Relaxed) > kills;
            ensure!(killed, "{name} was read as its extents say, and is not whole: {object}");
            again += 1;
            match self.read(name, point, true, again) {
                Ok(rebuilt) => {
                    read = rebuilt;
                    // it is counted again after a while
                    let _ =
                        self.objects().until_within::<VmBackup>(RECOUNTED, name, "be Succeeded", |object| {
                            is_terminal(&object["status"])
                        });
                }
                // it may be whole before all was read again, and what serves it gone
                Err(error) => {
                    ensure!(again < 9 && !error.to_string().contains("DIFFERENCE"), "again: {error:#}");
                }
            }
        };
        self.tally.again += usize::from(again > 0);
        ensure!(status["phase"] == "Succeeded", "{name} was finalized: {status}");
        Tally::count(&mut self.tally.backups, "Succeeded");
        self.tally.points += point.disks.len();
        self.tally.bytes += read.bytes;
        for disk in &point.disks {
            Tally::count(&mut self.tally.modes, &disk.mode);
        }
        let Some(checkpoint) = status["toCheckpoint"].as_str() else { return Ok(()) };
        let object = self.objects().until::<VmCheckpoint>(checkpoint, "be usable", |object| {
            condition(&object["status"], "Usable")["status"] == "True"
        })?;
        let bitmap = object["spec"]["bitmap"].as_str().context("no bitmap")?.to_owned();
        self.checkpoints.push(Checkpoint { name: checkpoint.to_owned(), bitmap });
        for (disk, image) in read.images {
            self.restored.insert((checkpoint.to_owned(), disk), image);
        }
        Ok(())
    }

    /// Waits for a phase of a backup; answers its status.
    fn phase(&self, name: &str, phase: &str) -> Result<Value> {
        let object = self.objects().until::<VmBackup>(name, &format!("be {phase}"), |object| {
            object["status"]["phase"] == phase || is_terminal(&object["status"])
        })?;
        let status = object["status"].clone();
        ensure!(status["phase"] == phase, "{name} is not {phase}: {status}");
        Ok(status)
    }

    /// Waits until a backup failed for this reason, and nothing of it is left.
    fn failed(&mut self, name: &str, reason: &str) -> Result<()> {
        let status = self.phase(name, "Failed")?;
        let ready = condition(&status, "Ready");
        ensure!(ready["reason"] == reason, "{name} failed: {ready}");
        let checkpoint = status["toCheckpoint"].as_str();
        checkpoint.map_or(Ok(()), |checkpoint| self.objects().gone::<VmCheckpoint>(checkpoint))?;
        Tally::count(&mut self.tally.backups, reason);
        Ok(())
    }
}

/// What the disks of a backup held when it began.
struct Point {
    base: Option<String>,
    disks: Vec<PointDisk>,
}

struct PointDisk {
    name: String,
    incremental: bool,
    /// With the reason when it is a full one.
    mode: String,
    then: Vec<u8>,
}

/// What was rebuilt of a point.
#[derive(Default)]
struct Rebuilt {
    bytes: u64,
    images: Vec<(String, PathBuf)>,
}

impl Point {
    fn of(vm: &Vm, status: &Value) -> Result<Self> {
        let disks = status["disks"].as_array().context("no disks")?;
        let disks = disks.iter().map(|disk| {
            let text = |key: &str| disk[key].as_str().unwrap_or_default();
            let mode = format!("{} {}", text("mode"), text("modeReason")).trim().to_owned();
            let (name, incremental) = (text("name").to_owned(), text("mode") == "Incremental");
            let then = fs::read(vm.mirror(&name))?;
            ensure!(
                disk["size"] == then.len(),
                "{name} has {} bytes, and its backup says {disk}",
                then.len()
            );
            Ok(PointDisk { name, incremental, mode, then })
        });
        let base = status["fromCheckpoint"].as_str().map(str::to_owned);
        Ok(Self { base, disks: disks.collect::<Result<_>>()? })
    }
}

/// Where two disks differ, if they do.
fn first_difference(one: &[u8], other: &[u8]) -> Option<usize> {
    if one == other {
        return None;
    }
    let differs = one.iter().zip(other).position(|(one, other)| one != other);
    Some(differs.unwrap_or(one.len().min(other.len())))
}

fn labels(owner: u8) -> Value {
    if owner == 0 { json!({}) } else { json!({"virtmark.dev/owner": format!("owner-{owner}")}) }
}

fn condition(status: &Value, kind: &str) -> Value {
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    conditions.into_iter().find(|condition| condition["type"] == kind).unwrap_or_default()
}

fn is_terminal(status: &Value) -> bool {
    ["Succeeded", "Failed"].contains(&status["phase"].as_str().unwrap_or_default())
}
