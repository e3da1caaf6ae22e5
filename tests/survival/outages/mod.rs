//! What goes away besides our own processes: libvirtd, QEMU, the VM, the API server, etcd. `docs/outages.md` says what a
//! backup comes to, for each moment of its life; here each cell of that table is seen to hold.
//!
//! One outage hits backups in all moments at once. An agent built with `killpoints` lets single backups stand still in
//! the short ones.

mod cell;
mod end;
mod stand;
mod strike;

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use virtmark::killpoint::HOLD_VARIABLE;
use virtmark::outage::{Moment, Outage};
use virtmark_bed::{Bed, guest, wait_until};

use self::cell::Cell;
use super::rig::objects::Objects;

/// How long an API server that has just been away may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long the API server hangs, and how long it is gone then.
const HANGS: Duration = Duration::from_secs(15);
const GONE: Duration = Duration::from_secs(46);

#[test]
fn an_outage_at_any_moment_of_a_backup_ends_as_the_table_says() -> Result<()> {
    let _alone = super::alone();
    let mut bed = Bed::from_env()?;
    let objects = Arc::new(Objects::of(&bed)?.patient(PATIENCE));
    let holds = tempfile::tempdir()?;
    let holding = holds.path().to_string_lossy().into_owned();
    let environment = [(HOLD_VARIABLE, holding.as_str())];
    bed.agents[1].restart(&environment)?;
    bed.store()?;
    let mut cells = std::thread::scope(|scope| {
        let new = |moment| {
            scope.spawn({
                let bed = &bed;
                let (holds, objects) = (holds.path(), Arc::clone(&objects));
                move || Cell::new(moment, bed, objects, holds)
            })
        };
        let started: Vec<_> = chosen().map(new).collect();
        started.into_iter().map(|cell| cell.join().expect("a cell is made")).collect::<Result<Vec<_>>>()
    })?;
    let whole = Instant::now();
    for outage in outages() {
        let began = Instant::now();
        round(&mut bed, &mut cells, outage)?;
        println!("{}: {} s", outage.words(), began.elapsed().as_secs());
    }
    if let Some(frozen) = cells.iter_mut().find(|cell| cell.moment == Moment::Frozen) {
        thawed_without_api_server(&mut bed, frozen, &environment)?;
    }
    println!("all in {} s", whole.elapsed().as_secs());
    drop(cells);
    bed.agents[1].restart(&[])?;
    bed.store()
}

/// All, or those that `VIRTMARK_OUTAGES` and `VIRTMARK_MOMENTS` name: for whoever looks into one of them.
fn outages() -> impl Iterator<Item = Outage> {
    let named = std::env::var("VIRTMARK_OUTAGES").unwrap_or_default();
    Outage::ALL
        .iter()
        .copied()
        .filter(move |outage| named.is_empty() || named.contains(&format!("{outage:?}")))
}

fn chosen() -> impl Iterator<Item = Moment> {
    let named = std::env::var("VIRTMARK_MOMENTS").unwrap_or_default();
    Moment::ALL
        .iter()
        .copied()
        .filter(move |moment| named.is_empty() || named.split(',').any(|name| name == format!("{moment:?}")))
}

/// One outage, for backups in every moment.
fn round(bed: &mut Bed, cells: &mut [Cell], outage: Outage) -> Result<()> {
    let count = cells.len();
    let all = || Barrier::new(count + 1);
    let gates = Gates { stand: all(), still: all(), struck: all(), hit: all(), over: all() };
    let ended: Vec<_> = std::thread::scope(|scope| {
        let gates = &gates;
        let running: Vec<_> =
            cells.iter_mut().map(|cell| scope.spawn(move || through(cell, outage, gates))).collect();
        gates.stand.wait();
        gates.still.wait();
        let inflicted = inflict(bed, outage, gates);
        gates.over.wait();
        let ended = running
            .into_iter()
            .map(|cell| cell.join().unwrap_or_else(|_| Err(anyhow::anyhow!("it panicked"))));
        std::iter::once(inflicted).chain(ended).collect()
    });
    for result in &ended {
        if let Err(error) = result {
            println!("{error:#}");
        }
    }
    bed.store()?;
    ended.into_iter().collect()
}

/// What all wait for: that every backup stands where it is to stand, that the outage has begun, that everybody has
/// done what is to be done in it, that it is over.
struct Gates {
    stand: Barrier,
    still: Barrier,
    struck: Barrier,
    hit: Barrier,
    over: Barrier,
}

/// One cell. It passes every gate, also when it failed.
fn through(cell: &mut Cell, outage: Outage, gates: &Gates) -> Result<()> {
    let moment = cell.moment;
    let said = |what: &str| format!("{outage:?} while {moment:?}: {what}");
    let stood = cell.stand(outage);
    gates.stand.wait();
    let stood = stood.and_then(|()| cell.stand_still()).with_context(|| said("to get there"));
    gates.still.wait();
    gates.struck.wait();
    let began = Instant::now();
    let hit = stood.and_then(|()| cell.hit(outage).with_context(|| said("the outage")));
    let hit = hit.map(|()| began.elapsed());
    gates.hit.wait();
    gates.over.wait();
    let hit = hit?;
    let began = Instant::now();
    cell.ends(outage).with_context(|| said("its end"))?;
    println!("{outage:?} while {moment:?}: {} + {} ms", hit.as_millis(), began.elapsed().as_millis());
    Ok(())
}

/// Takes away what all share, opens the gate, and brings it back.
fn inflict(bed: &mut Bed, outage: Outage, gates: &Gates) -> Result<()> {
    let node = &bed.hypervisors[1];
    let began = Instant::now();
    let after =
        |time: Duration| wait_until(time * 2, "time to pass", || Ok((began.elapsed() > time).then_some(())));
    let old = match outage {
        Outage::Libvirtd => Some(node.end_libvirtd(false)),
        Outage::Etcd => {
            bed.plane.etcd.kill();
            None
        }
        Outage::ApiServer => {
            bed.plane.apiserver.pause();
            None
        }
        Outage::Undefined | Outage::PoweredOff | Outage::QemuKilled => None,
    };
    gates.struck.wait();
    gates.hit.wait();
    match outage {
        Outage::Libvirtd => {
            if let Some(old) = old {
                node.libvirtd_after(&old?)?;
            }
            let old = node.end_libvirtd(true)?;
            node.libvirtd_after(&old)
        }
        Outage::Etcd => {
            bed.plane.etcd.restart(&[])?;
            bed.plane.ready()
        }
        Outage::ApiServer => {
            after(HANGS)?;
            bed.plane.apiserver.kill();
            after(HANGS + GONE)?;
            bed.plane.apiserver.restart(&[])?;
            bed.plane.ready()
        }
        Outage::Undefined | Outage::PoweredOff | Outage::QemuKilled => Ok(()),
    }
}

/// An agent that dies while the guest is frozen thaws it when it comes back, although the API server is away.
fn thawed_without_api_server(bed: &mut Bed, cell: &mut Cell, environment: &[(&str, &str)]) -> Result<()> {
    cell.stand(Outage::ApiServer)?;
    bed.plane.apiserver.kill();
    bed.agents[1].kill();
    let frozen = guest::is_frozen(&cell.vm);
    bed.agents[1].restart(environment)?;
    let thawed = cell.is_thawed();
    cell.release()?;
    bed.plane.apiserver.restart(&[])?;
    bed.plane.ready()?;
    bed.store()?;
    ensure!(frozen?, "the guest was not frozen");
    thawed.context("the agent came back, and the API server did not")?;
    // a ticket would take its time: see docs/outages.md
    cell.cancel()
}
