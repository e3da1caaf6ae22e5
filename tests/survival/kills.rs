//! SIGKILL after each step of a backup, of the process that took it and of both: `docs/restarts.md` says what the
//! successor finds and does.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark::killpoint::VARIABLE;
use virtmark::step::{Component, Step};
use virtmark_bed::daemon::Daemon;
use virtmark_bed::guest::{self, Image};
use virtmark_bed::{Bed, Disk, wait_until};

use super::history::History;
use super::rig::{BOUND, MIB, Rig};

/// What the user does once the backup is Ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Reads everything, and finalizes.
    Finalize,
    Cancel,
    Delete,
    /// Pulls the VM's plug.
    PowerOff,
}

/// How a step is reached: which way, and after how many times of passing it.
fn reached_by(step: Step) -> Vec<(Way, u32)> {
    match step {
        Step::CheckpointRemoved => vec![(Way::Cancel, 0)],
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
    /// Waits for the death, and starts the successors.
    fn succeed(mut self) -> Result<(Daemon, Daemon)> {
        wait_until(BOUND, &format!("{} to die", self.dies.name), || {
            Ok((!self.dies.process.is_alive()).then_some(()))
        })?;
        if self.both {
            self.other.restart(&[])?;
        }
        self.dies.restart(&[])?;
        Ok((self.dies, self.other))
    }
}

#[test]
fn a_backup_survives_the_death_of_its_processes_after_every_step() -> Result<()> {
    let _alone = super::alone();
    let bed = Bed::from_env()?;
    let disks = ["vdb", "vdc"].map(|target| Disk::qcow2(target, 32 * MIB));
    let vm = Image::get()?.boot("survivor", &bed.hypervisors[1], disks.clone())?;
    let mut frozen = Rig::of(bed, vm)?;
    let mut bare = Rig::off_on(1, "survivor-bare", disks)?;
    let history = History::watch(&frozen.bed)?;
    let (mut count, started) = (0, Instant::now());
    for both in [false, true] {
        for &step in Step::ALL {
            for (way, passes) in reached_by(step) {
                let rig = if way == Way::PowerOff { &mut bare } else { &mut frozen };
                if rig.vm.state()? != "running" {
                    rig.vm.start()?;
                    rig.published("Running")?;
                }
                count += 1;
                let began = Instant::now();
                let killed = if both { "both" } else { "one" };
                survive(rig, step, passes, way, both, count)
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

fn survive(rig: &mut Rig, step: Step, passes: u32, way: Way, both: bool, number: u8) -> Result<()> {
    // the other VM's rig may have started other processes meanwhile
    rig.bed = Bed::from_env()?;
    let name = format!("survivor-{number}-{}", step.as_str().to_lowercase());
    let quiesce = if rig.vm.name == "survivor" { "Required" } else { "None" };
    for disk in ["vdb", "vdc"] {
        rig.vm.write(disk, u64::from(number) * 65536, 3 * MIB, number)?;
    }
    let kept = rig.bitmaps("vdb")?.len();

    let (mut dies, other) = match step.component() {
        Component::Operator => (rig.bed.operator.clone(), rig.bed.agents[1].clone()),
        Component::Agent => (rig.bed.agents[1].clone(), rig.bed.operator.clone()),
    };
    dies.restart(&[(VARIABLE, &format!("{step}:{passes}"))])?;
    let doomed = Doomed { dies, other, both };
    let reviver = std::thread::spawn(move || doomed.succeed());
    let lived = live(rig, &name, way, quiesce);
    let (dies, other) = reviver.join().map_err(|_| anyhow::anyhow!("the reviver died"))??;
    match step.component() {
        Component::Operator => (rig.bed.operator, rig.bed.agents[1]) = (dies, other),
        Component::Agent => (rig.bed.agents[1], rig.bed.operator) = (dies, other),
    }
    rig.bed.store()?;
    lived?;
    left_clean(rig, &name, way, kept)
}

/// The user's part. Whoever dies meanwhile, it is the same.
fn live(rig: &Rig, name: &str, way: Way, quiesce: &str) -> Result<()> {
    rig.backup(name, json!({"disks": ["vdb", "vdc"], "quiesce": {"mode": quiesce}}))?;
    rig.phase("vmbackup", name, "Ready")?;
    if quiesce == "Required" {
        wait_until(Duration::from_secs(20), "the guest to be thawed", || {
            Ok((!guest::is_frozen(&rig.vm)?).then_some(()))
        })?;
    }
    let then = ["vdb", "vdc"].map(|disk| rig.vm.remember(disk));
    rig.vm.write("vdb", 0, MIB, 0xee)?;
    match way {
        Way::Finalize => {
            for (disk, then) in ["vdb", "vdc"].into_iter().zip(then) {
                let then = then?;
                wait_until(BOUND, &format!("{disk} to be read"), || {
                    Ok(rig.read(&format!("{name}-{disk}"), &then).ok())
                })?;
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
    let named = |list: Value| -> Vec<Value> {
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let starts = |item: &Value| item["metadata"]["name"].as_str().unwrap_or_default().starts_with(name);
        items.into_iter().filter(starts).collect()
    };
    let list = |kind: &str| -> Result<Value> {
        Ok(serde_json::from_str(&rig.kubectl(&["get", kind, "-o", "json"])?)?)
    };
    wait_until(BOUND, "the host to be clean, the Secrets gone, the checkpoint settled", || {
        let secrets = list("secrets")?["items"].as_array().map_or(0, Vec::len);
        let checkpoints = named(list("vmcheckpoints")?);
        let usable = checkpoints.iter().all(|checkpoint| {
            let conditions = checkpoint["status"]["conditions"].as_array().cloned().unwrap_or_default();
            conditions.iter().any(|c| c["type"] == "Usable" && c["status"] == "True")
        });
        let expected = usize::from(way == Way::Finalize);
        Ok((secrets == 0 && usable && checkpoints.len() == expected && rig.host_is_clean().is_ok())
            .then_some(()))
    })?;
    rig.host_is_clean()?;
    let bitmaps = [rig.bitmaps("vdb")?, rig.bitmaps("vdc")?];
    for bitmaps in &bitmaps {
        ensure!(bitmaps.len() == kept + usize::from(way == Way::Finalize), "bitmaps are left: {bitmaps:?}");
    }
    if way == Way::Finalize {
        for transfer in named(list("imagetransfers")?) {
            ensure!(transfer["status"]["phase"] == "Succeeded", "{transfer}");
        }
        for checkpoint in named(list("vmcheckpoints")?) {
            let name = checkpoint["metadata"]["name"].as_str().unwrap_or_default();
            rig.kubectl(&["delete", "vmcheckpoint", name, "--timeout=30s"])?;
        }
        ensure!(rig.bitmaps("vdb")?.len() == kept, "a deleted checkpoint's bitmap is left");
    }
    rig.delete_made()
}
