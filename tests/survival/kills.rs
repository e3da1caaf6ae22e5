//! SIGKILL after each step of a backup, of the process that took it and of both: `docs/restarts.md` says what the
//! successor finds and does. The steps of other scenes are in `chain_kills.rs`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark::killpoint::VARIABLE;
use virtmark::step::{Component, Scene, Step};
use virtmark_bed::daemon::Daemon;
use virtmark_bed::guest::{self, Image};
use virtmark_bed::{Bed, Disk, compare, wait_until};

use super::chain::restore;
use super::history::History;
use super::rig::{BOUND, MIB, Rig, merge};

/// The disks that are backed up.
const DISKS: [&str; 2] = ["vdb", "vdc"];

/// How many objects the base is: its VmBackup and its VmCheckpoint.
const OF_BASE: usize = 2;

/// What the user does once the backup is Ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Reads everything, and finalizes.
    Finalize,
    /// The same, of a VM without a guest agent.
    FinalizeBare,
    Cancel,
    Delete,
    /// Pulls the VM's plug.
    PowerOff,
}

impl Way {
    fn finalizes(self) -> bool {
        matches!(self, Self::Finalize | Self::FinalizeBare)
    }
}

/// Whether a backup in which this step is met, or after which only one process dies, starts from the base. All that die
/// together are incremental, all that die alone full, where it makes no difference to the step.
fn starts_from_base(step: Step, both: bool) -> bool {
    both || matches!(step, Step::BaseRedefined | Step::BaseForgotten)
}

/// How a step is reached: which way, and after how many times of passing it.
fn reached_by(step: Step) -> Vec<(Way, u32)> {
    match step {
        Step::CheckpointRemoved => vec![(Way::Cancel, 0)],
        Step::Frozen => vec![(Way::Finalize, 0), (Way::FinalizeBare, 0)],
        Step::BitmapRemoved => vec![(Way::PowerOff, 0), (Way::PowerOff, 1)],
        Step::Settled | Step::FinalizerRemoved => vec![(Way::Delete, 0)],
        _ => vec![(Way::Finalize, 0)],
    }
}

/// A process that is about to die, and the other one.
struct Doomed {
    dies: Daemon,
    other: Daemon,
    both: bool,
}

impl Doomed {
    /// The process that takes `step`, made to die when it has passed it so often; the agent is that of `hypervisor`.
    fn at(rig: &Rig, (step, passes): (Step, u32), hypervisor: usize, both: bool) -> Result<Self> {
        let (operator, agent) = (rig.bed.operator.clone(), rig.bed.agents[hypervisor].clone());
        let (mut dies, other) = match step.component() {
            Component::Operator => (operator, agent),
            Component::Agent => (agent, operator),
        };
        dies.restart(&[(VARIABLE, &format!("{step}:{passes}"))])?;
        Ok(Self { dies, other, both })
    }

    /// Waits for the death, and starts the successors; also of one that did not die, for the tests that come after.
    fn succeed(mut self) -> Result<(Daemon, Daemon, Result<()>)> {
        let died = wait_until(BOUND, &format!("{} to die", self.dies.name), || {
            Ok((!self.dies.process.is_alive()).then_some(()))
        });
        if self.both {
            self.other.restart(&[])?;
        }
        self.dies.restart(&[])?;
        Ok((self.dies, self.other, died))
    }
}

#[test]
fn a_backup_survives_the_death_of_its_processes_after_every_step() -> Result<()> {
    let _alone = super::alone();
    let bed = Bed::from_env()?;
    let disks = DISKS.map(|target| Disk::qcow2(target, 32 * MIB));
    let vm = Image::get()?.boot("survivor", &bed.hypervisors[1], disks.clone())?;
    let mut frozen = Rig::of(bed, vm)?;
    let mut bare = Rig::off_on(1, "survivor-bare", disks)?;
    let bases = [base(&frozen)?, base(&bare)?];
    let history = History::watch(&frozen.bed)?;
    let (mut count, started) = (0, Instant::now());
    for both in [false, true] {
        for &step in Step::ALL.iter().filter(|step| step.scene() == Scene::Backup) {
            for (way, passes) in reached_by(step) {
                let (rig, base) = match way {
                    Way::PowerOff | Way::FinalizeBare => (&mut bare, &bases[1]),
                    _ => (&mut frozen, &bases[0]),
                };
                let base = starts_from_base(step, both).then_some(base.as_str());
                if rig.vm.state()? != "running" {
                    rig.vm.start()?;
                    rig.published("Running")?;
                }
                count += 1;
                let began = Instant::now();
                let killed = if both { "both" } else { "one" };
                survive(rig, base, (step, passes), way, both, count)
                    .with_context(|| format!("killed {killed} after {step}:{passes} ({way:?})"))?;
                println!("{step}:{passes} {way:?} {killed}: {} ms", began.elapsed().as_millis());
            }
        }
    }
    println!(
        "{count} kills in {} s; {} versions, none went back",
        started.elapsed().as_secs(),
        history.check()?
    );
    Ok(())
}

/// A full backup of the VM, for others to start from; answers its checkpoint.
fn base(rig: &Rig) -> Result<String> {
    let name = format!("{}-base", rig.vm.name);
    if rig.vm.state()? != "running" {
        rig.vm.start()?;
        rig.published("Running")?;
    }
    rig.backup(&name, json!({"quiesce": {"mode": "None"}, "disks": DISKS}))?;
    rig.phase("vmbackup", &name, "Ready")?;
    let checkpoint = rig.checkpoint_of(&name)?;
    rig.made("vmcheckpoint", &checkpoint);
    for disk in DISKS {
        let then = rig.vm.remember(disk)?;
        restore(&rig.ticket(&format!("{name}-{disk}"))?, false, &image(rig, disk))?;
        compare(&then, &image(rig, disk), "raw")?;
    }
    rig.state("vmbackup", &name, "Finalized")?;
    rig.phase("vmbackup", &name, "Succeeded")?;
    Ok(checkpoint)
}

/// What was restored of a disk: every incremental that starts from the base has all that those before it had.
fn image(rig: &Rig, disk: &str) -> PathBuf {
    rig.files.path().join(format!("{disk}.raw"))
}

/// Does `work`, in the middle of which the process dies that takes `step`, with `both` the other one too, and is
/// succeeded.
pub(super) fn while_killed(
    rig: &mut Rig,
    (step, passes): (Step, u32),
    hypervisor: usize,
    both: bool,
    work: impl FnOnce(&mut Rig) -> Result<()>,
) -> Result<()> {
    // another VM's rig may have started other processes meanwhile
    rig.bed = Bed::from_env()?;
    let doomed = Doomed::at(rig, (step, passes), hypervisor, both)?;
    let reviver = std::thread::spawn(move || doomed.succeed());
    let worked = work(rig);
    let (dies, other, died) = reviver.join().map_err(|_| anyhow::anyhow!("the reviver died"))??;
    match step.component() {
        Component::Operator => (rig.bed.operator, rig.bed.agents[hypervisor]) = (dies, other),
        Component::Agent => (rig.bed.agents[hypervisor], rig.bed.operator) = (dies, other),
    }
    rig.bed.store()?;
    let failed = match (died, worked) {
        (Ok(()), Ok(())) => return Ok(()),
        (Err(died), Err(worked)) => died.context(format!("{worked:#}")),
        (Err(error), Ok(())) | (Ok(()), Err(error)) => error,
    };
    Err(failed.context(last_words(&rig.bed)))
}

/// The ends of the logs of operator and agents: where a test fails on another machine they are all that is left of it.
fn last_words(bed: &Bed) -> String {
    let end = |daemon: &Daemon| {
        let log = daemon.log();
        let mut lines: Vec<_> = log.lines().rev().take(20).collect();
        lines.reverse();
        format!("{}:\n{}\n", daemon.name, lines.join("\n"))
    };
    std::iter::once(&bed.operator).chain(&bed.agents).map(end).collect()
}

fn survive(
    rig: &mut Rig,
    base: Option<&str>,
    (step, passes): (Step, u32),
    way: Way,
    both: bool,
    number: u8,
) -> Result<()> {
    let name = format!("survivor-{number}-{}", step.as_str().to_lowercase());
    let quiesce = if rig.vm.name == "survivor" { "Required" } else { "BestEffort" };
    for disk in DISKS {
        rig.vm.write(disk, u64::from(number) * 65536, 3 * MIB, number)?;
    }
    let kept = rig.bitmaps("vdb")?.len();

    while_killed(rig, (step, passes), 1, both, |rig| live(rig, &name, base, way, quiesce))?;
    left_clean(rig, &name, way, kept)?;
    rig.delete_made_after(OF_BASE)
}

/// The user's part. Whoever dies meanwhile, it is the same.
fn live(rig: &Rig, name: &str, base: Option<&str>, way: Way, quiesce: &str) -> Result<()> {
    let mut spec = json!({"disks": DISKS, "quiesce": {"mode": quiesce}});
    if let Some(base) = base {
        merge(&mut spec, json!({"type": "Incremental", "fromCheckpoint": base}));
    }
    rig.backup(name, spec)?;
    let status = rig.phase("vmbackup", name, "Ready")?;
    let expected = if base.is_some() { "Incremental" } else { "Full" };
    for disk in status["disks"].as_array().into_iter().flatten() {
        ensure!(disk["mode"] == expected, "not {expected}: {disk}");
    }
    if quiesce == "Required" {
        wait_until(Duration::from_secs(20), "the guest to be thawed", || {
            Ok((!guest::is_frozen(&rig.vm)?).then_some(()))
        })?;
    }
    let then = DISKS.map(|disk| rig.vm.remember(disk));
    rig.vm.write("vdb", 0, MIB, 0xee)?;
    match way {
        Way::Finalize | Way::FinalizeBare => {
            for (disk, then) in DISKS.into_iter().zip(then) {
                let (then, transfer) = (then?, format!("{name}-{disk}"));
                let read = || match base {
                    None => rig.read(&transfer, &then),
                    Some(_) => {
                        restore(&rig.ticket(&transfer)?, true, &image(rig, disk))?;
                        compare(&then, &image(rig, disk), "raw")
                    }
                };
                wait_until(BOUND, &format!("{disk} to be read"), || Ok(read().ok()))?;
            }
            rig.state("vmbackup", name, "Finalized")?;
            rig.phase("vmbackup", name, "Succeeded").map(drop)
        }
        Way::Cancel => {
            rig.state("vmbackup", name, "Cancelled")?;
            rig.reason("vmbackup", name, "Cancelled").map(drop)
        }
        Way::Delete => {
            rig.kubectl(&["delete", "vmbackup", name, "--wait=false"])?;
            rig.gone("vmbackup", name)
        }
        Way::PowerOff => {
            rig.vm.destroy()?;
            rig.reason("vmbackup", name, "VmStopped").map(drop)
        }
    }
}

/// Nothing is left but what the backup was for.
fn left_clean(rig: &Rig, name: &str, way: Way, kept: usize) -> Result<()> {
    let named = |items: Vec<Value>| -> Vec<Value> {
        let starts = |item: &Value| item["metadata"]["name"].as_str().unwrap_or_default().starts_with(name);
        items.into_iter().filter(starts).collect()
    };
    let mut seen = String::new();
    wait_until(BOUND, "the host to be clean, the Secrets gone, the checkpoint settled", || {
        let secrets = rig.list("secrets", "")?.len();
        let checkpoints = named(rig.list("vmcheckpoints", "")?);
        let usable = checkpoints.iter().all(|checkpoint| {
            let conditions = checkpoint["status"]["conditions"].as_array().cloned().unwrap_or_default();
            conditions.iter().any(|c| c["type"] == "Usable" && c["status"] == "True")
        });
        let expected = usize::from(way.finalizes());
        let host = rig.host_is_clean();
        let is_clean = secrets == 0 && usable && checkpoints.len() == expected && host.is_ok();
        seen = format!("{secrets} Secrets, host {host:?}, checkpoints {checkpoints:?}");
        Ok(is_clean.then_some(()))
    })
    .with_context(|| seen.clone())?;
    rig.host_is_clean()?;
    let bitmaps = [rig.bitmaps("vdb")?, rig.bitmaps("vdc")?];
    for bitmaps in &bitmaps {
        ensure!(bitmaps.len() == kept + usize::from(way.finalizes()), "bitmaps are left: {bitmaps:?}");
    }
    if way.finalizes() {
        for transfer in named(rig.list("imagetransfers", "")?) {
            ensure!(transfer["status"]["phase"] == "Succeeded", "{transfer}");
        }
        for checkpoint in named(rig.list("vmcheckpoints", "")?) {
            let name = checkpoint["metadata"]["name"].as_str().unwrap_or_default();
            rig.delete("vmcheckpoint", name)?;
        }
        ensure!(rig.bitmaps("vdb")?.len() == kept, "a deleted checkpoint's bitmap is left");
    }
    Ok(())
}
