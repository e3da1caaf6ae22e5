//! SIGKILL after each step of a checkpoint's deletion and of a VM's hand-over to another node, of the process that took
//! it and of both: the chain goes on, and every point of it is what the guest had.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark::step::{Scene, Step};
use virtmark_bed::component::SYSTEM_NAMESPACE;
use virtmark_bed::{Disk, wait_until};

use super::chain::{Chain, Point};
use super::kills::while_killed;
use super::rig::{BOUND, MIB, Rig};

/// The disks of the VM.
const DISKS: [&str; 2] = ["vda", "vdb"];

fn steps(scene: Scene) -> impl Iterator<Item = (bool, Step)> {
    let of =
        move |both| Step::ALL.iter().filter(move |step| step.scene() == scene).map(move |step| (both, *step));
    of(false).chain(of(true))
}

/// One more point of the chain, which must be an incremental of the newest.
fn take(rig: &Rig, points: &mut Vec<Point>, number: u8) -> Result<()> {
    for disk in DISKS {
        rig.vm.write(disk, u64::from(number) * 65536, MIB, number)?;
    }
    let spec = match points.last() {
        Some(_) => json!({"type": "Incremental", "onInvalidCheckpoint": "Fail"}),
        None => json!({}),
    };
    let name = format!("{}-{number}", rig.vm.name);
    let point = Chain::of(rig, "killed").take(&name, spec, || rig.vm.write("vda", 0, 65536, number))?;
    ensure!(point.base() == points.last().map_or("", Point::checkpoint), "{}", point.status);
    points.push(point);
    Ok(())
}

/// Each disk has the bitmaps of these points, and no other.
fn holds(rig: &Rig, points: &[Point]) -> Result<()> {
    let bitmap = |point: &Point| -> Result<String> {
        let checkpoint = rig.get("vmcheckpoint", point.checkpoint())?;
        Ok(checkpoint["spec"]["bitmap"].as_str().context("no bitmap")?.to_owned())
    };
    let expected = points.iter().map(bitmap).collect::<Result<BTreeSet<_>>>()?;
    for disk in DISKS {
        let found: BTreeSet<_> = rig.bitmaps(disk)?.into_iter().collect();
        ensure!(found == expected, "{disk} has {found:?}, not {expected:?}");
    }
    Ok(())
}

/// The nodes that say that they have the VM.
fn seen_by(rig: &Rig) -> Result<Vec<String>> {
    let said = rig.bed.kubectl().run(&["get", "domainsightings", "-n", SYSTEM_NAMESPACE, "-o", "json"])?;
    let said: Value = serde_json::from_str(&said)?;
    let ours = said["items"].as_array().into_iter().flatten().map(|sighting| &sighting["spec"]);
    let ours = ours.filter(|spec| spec["uuid"] == rig.vm.uuid.as_str());
    Ok(ours.map(|spec| spec["nodeName"].as_str().unwrap_or_default().to_owned()).collect())
}

#[test]
fn a_chain_survives_the_death_of_its_processes_while_a_checkpoint_is_deleted() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, "shortened", DISKS.map(|target| Disk::qcow2(target, 16 * MIB)))?;
    let mut points = Vec::new();
    (1..=2).try_for_each(|number| take(&rig, &mut points, number))?;
    let mut number = 2;
    // the bitmap of the first disk, and that of the second; and the same of a VM that is off
    let passes = |step| if matches!(step, Step::BitmapDeleted | Step::BitmapRemoved) { 0..2 } else { 0..1 };
    let off = [false, true].map(|both| (both, Step::BitmapRemoved));
    for (both, step) in steps(Scene::Removal).chain(off) {
        for passes in passes(step) {
            number += 1;
            take(&rig, &mut points, number)?;
            let began = Instant::now();
            let middle = points.remove(1);
            if step == Step::BitmapRemoved {
                rig.vm.destroy()?;
                rig.published("Off")?;
            }
            while_killed(&mut rig, (step, passes), 1, both, |rig| {
                rig.delete("vmcheckpoint", middle.checkpoint())
            })
            .with_context(|| format!("{step}:{passes}, both: {both}"))?;
            if step == Step::BitmapRemoved {
                rig.vm.start()?;
                rig.published("Running")?;
            }
            holds(&rig, &points).with_context(|| format!("after {step}:{passes}, both: {both}"))?;
            wait_until(BOUND, "the chain to close over it", || {
                let status = rig.get("vmcheckpoint", points[1].checkpoint())?["status"].clone();
                Ok((status["parent"] == points[0].checkpoint() && status["base"] == "Next").then_some(()))
            })?;
            println!(
                "{step}:{passes} {}: {} ms",
                if both { "both" } else { "one" },
                began.elapsed().as_millis()
            );
        }
    }
    take(&rig, &mut points, number + 1)
}

#[test]
fn a_chain_survives_the_death_of_its_processes_while_its_vm_is_handed_over() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(0, "passed-on", DISKS.map(|target| Disk::qcow2(target, 16 * MIB)))?;
    let (mut points, mut number, mut at) = (Vec::new(), 1, 0);
    take(&rig, &mut points, number)?;
    for (both, step) in steps(Scene::HandOver) {
        number += 1;
        let (from, to) = (at, 1 - at);
        let began = Instant::now();
        let dies = if step == Step::SightingDeleted { from } else { to };
        let hypervisor = rig.bed.hypervisors[to].clone();
        while_killed(&mut rig, (step, 0), dies, both, |rig| {
            rig.vm.migrate(&hypervisor, &[])?;
            wait_until(BOUND, "the VM to be handed over", || {
                let status = rig.get("lvd", &rig.vm.name)?["status"].clone();
                // also on the side that it left: whoever says first that the VM came would not say it a second time
                let is_here = status["nodeName"] == hypervisor.name.as_str() && status["state"] == "Running";
                Ok((is_here && seen_by(rig)? == [hypervisor.name.as_str()]).then_some(()))
            })
        })
        .with_context(|| format!("{step}, both: {both}"))?;
        at = to;
        take(&rig, &mut points, number).with_context(|| format!("after {step}, both: {both}"))?;
        ensure!(points[points.len() - 1].status["nodeName"] == hypervisor.name.as_str());
        println!("{step} {}: {} ms", if both { "both" } else { "one" }, began.elapsed().as_millis());
    }
    holds(&rig, &points)
}
