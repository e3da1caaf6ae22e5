//! Two operators: the one that leads stands still at a step until its lease is another's, and then goes on with what
//! it had in hand. Never two jobs, nothing made twice, no status goes back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use virtmark::killpoint::PAUSE_VARIABLE;
use virtmark::step::Step;
use virtmark_bed::component;
use virtmark_bed::daemon::Daemon;
use virtmark_bed::{Disk, wait_until};

use super::history::History;
use super::rig::{BOUND, MIB, Rig};

/// What happens while the leader stands still, once the other one leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meanwhile {
    /// The backup becomes Ready, and is finalized after the other went on.
    Ready,
    /// It has Succeeded.
    Succeeded,
    /// It is cancelled.
    Cancelled,
    /// It is deleted.
    Deleted,
    /// It is deleted, and its name used again at once.
    NameUsedAgain,
}

const CASES: [(Step, Meanwhile); 7] = [
    (Step::Validated, Meanwhile::Ready),
    (Step::Held, Meanwhile::Cancelled),
    (Step::CheckpointMade, Meanwhile::Deleted),
    (Step::Bound, Meanwhile::NameUsedAgain),
    (Step::TransferMade, Meanwhile::Deleted),
    (Step::CheckpointUsable, Meanwhile::Succeeded),
    (Step::Settled, Meanwhile::NameUsedAgain),
];

/// Two operators, of which one leads. In the end the bed's own is alone again.
struct Pair {
    rig: Rig,
    second: Daemon,
}

impl Pair {
    fn of(rig: Rig) -> Result<Self> {
        let second = component::operator(&rig.bed.dir, &rig.bed.plane, "operator-second")?;
        Ok(Self { rig, second })
    }

    /// The leader of the two, who must be the bed's own operator when `own`.
    fn leads(&self, own: bool) -> Result<bool> {
        let daemon = if own { &self.rig.bed.operator } else { &self.second };
        Ok(self.rig.objects.leader()?.as_ref() == Some(&daemon.name))
    }

    fn until_leads(&self, own: bool) -> Result<()> {
        wait_until(BOUND, "the lease to be taken", || Ok(self.leads(own)?.then_some(())))
    }

    /// Makes the second one the leader, by telling the first to stop; answers how long the lease was free.
    fn hand_over(&mut self, step: Step) -> Result<Duration> {
        let starts = |daemon: &Daemon| daemon.log().matches("operator starts").count();
        let before = starts(&self.second);
        self.second.restart(&[(PAUSE_VARIABLE, step.as_str())])?;
        wait_until(BOUND, "the second operator to start", || {
            Ok((starts(&self.second) > before).then_some(()))
        })?;
        let began = Instant::now();
        self.rig.bed.operator.process.end();
        self.until_leads(false)?;
        let free = began.elapsed();
        self.rig.bed.operator.restart(&[])?;
        self.rig.bed.store()?;
        Ok(free)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.second.resume();
        self.second.process.end();
    }
}

#[test]
fn a_leader_that_stood_still_past_its_lease_does_nothing_twice() -> Result<()> {
    let _alone = super::alone();
    let disks = ["vda", "vdb"].map(|target| Disk::qcow2(target, 32 * MIB));
    let rig = Rig::running_on(1, "twice", disks)?;
    let history = History::watch(&rig.bed)?;
    let mut pair = Pair::of(rig)?;
    for (number, (step, meanwhile)) in (1_u8..).zip(CASES) {
        let began = Instant::now();
        let (free, taken) = stand_still(&mut pair, number, step, meanwhile)
            .with_context(|| format!("stood still after {step}, meanwhile {meanwhile:?}"))?;
        println!(
            "{step} {meanwhile:?}: {} ms (lease given up: free for {} ms; stood still: taken after {} ms)",
            began.elapsed().as_millis(),
            free.as_millis(),
            taken.as_millis()
        );
        history.check()?;
    }
    // one that is told to stop leaves the lease, and the bed's own goes on alone
    pair.second.process.end();
    pair.until_leads(true)?;
    println!("{} versions, none went back", history.check()?);
    Ok(())
}

fn stand_still(
    pair: &mut Pair,
    number: u8,
    step: Step,
    meanwhile: Meanwhile,
) -> Result<(Duration, Duration)> {
    let free = pair.hand_over(step)?;
    let name = format!("twice-{number}");
    pair.rig.vm.write("vda", 0, MIB, number)?;
    let before = pair.rig.bed.agents[1].log().len();
    pair.rig.backup(&name, json!({}))?;
    let uid = uid_of(&pair.rig, &name)?;
    let at_the_end = matches!(step, Step::CheckpointUsable | Step::Settled);
    if at_the_end {
        pair.rig.phase("vmbackup", &name, "Ready")?;
        if step == Step::Settled {
            pair.rig.kubectl(&["delete", "vmbackup", &name, "--wait=false"])?;
        } else {
            finish(&pair.rig, &name)?;
        }
    }
    wait_until(BOUND, "the leader to stand still", || Ok(pair.second.process.is_paused().then_some(())))?;
    let stood = Instant::now();
    pair.until_leads(true)?;
    let taken = stood.elapsed();

    let rig = &pair.rig;
    let mut uids = vec![uid];
    match meanwhile {
        Meanwhile::Ready => rig.phase("vmbackup", &name, "Ready").map(drop)?,
        Meanwhile::Succeeded => rig.phase("vmbackup", &name, "Succeeded").map(drop)?,
        Meanwhile::Cancelled => {
            rig.state("vmbackup", &name, "Cancelled")?;
            rig.reason("vmbackup", &name, "Cancelled")?;
        }
        Meanwhile::Deleted => {
            rig.kubectl(&["delete", "vmbackup", &name, "--ignore-not-found", "--timeout=30s"]).map(drop)?;
        }
        Meanwhile::NameUsedAgain => {
            rig.kubectl(&["delete", "vmbackup", &name, "--ignore-not-found", "--timeout=30s"])?;
            rig.backup(&name, json!({}))?;
            uids.push(uid_of(rig, &name)?);
            rig.phase("vmbackup", &name, "Ready")?;
        }
    }

    let said = |pair: &Pair| pair.second.log().matches("leads no more").count();
    let already = said(pair);
    pair.second.resume();
    wait_until(BOUND, "the resumed operator to see that it leads no more", || {
        Ok((said(pair) > already).then_some(()))
    })?;
    let rig = &pair.rig;
    match meanwhile {
        Meanwhile::Ready | Meanwhile::NameUsedAgain => finish(rig, &name)?,
        _ => {}
    }
    left(rig, &name, &uids, before)?;
    Ok((free, taken))
}

fn uid_of(rig: &Rig, name: &str) -> Result<String> {
    Ok(rig.get("vmbackup", name)?["metadata"]["uid"].as_str().context("no uid")?.to_owned())
}

/// Reads both disks, finalizes, and waits for the end.
fn finish(rig: &Rig, name: &str) -> Result<()> {
    for disk in ["vda", "vdb"] {
        let then = rig.vm.remember(disk)?;
        wait_until(BOUND, &format!("{disk} to be read"), || {
            Ok(rig.read(&format!("{name}-{disk}"), &then).ok())
        })?;
    }
    rig.state("vmbackup", name, "Finalized")?;
    rig.phase("vmbackup", name, "Succeeded").map(drop)
}

/// Each backup began once at most, has one checkpoint and two transfers if it succeeded, and else nothing.
fn left(rig: &Rig, name: &str, uids: &[String], before: usize) -> Result<()> {
    let log = rig.bed.agents[1].log();
    let mut begins = BTreeMap::<&str, usize>::new();
    for line in log.get(before..).unwrap_or_default().lines().filter(|line| line.contains("action=Begin")) {
        for uid in uids.iter().filter(|uid| line.contains(uid.as_str())) {
            *begins.entry(uid).or_default() += 1;
        }
    }
    ensure!(begins.values().all(|count| *count == 1), "a job was begun twice: {begins:?}");

    let backup = rig.get("vmbackup", name)?;
    let succeeded = backup["status"]["phase"] == "Succeeded";
    let named = |kind: &str| -> Result<Vec<String>> {
        let about = format!("{name}-");
        let names = rig.list(kind, "")?.into_iter();
        let names = names.filter_map(|found| found["metadata"]["name"].as_str().map(str::to_owned));
        Ok(names.filter(|found| found.starts_with(&about)).collect())
    };
    wait_until(BOUND, "everything to be settled", || {
        let (checkpoints, transfers) = (named("vmcheckpoints")?, named("imagetransfers")?);
        let bitmaps = rig.bitmaps("vda")?.len();
        let secrets = rig.list("secrets", "")?;
        let expected = usize::from(succeeded);
        // a cancelled one's transfers stay with it
        let ended = transfers.is_empty() || (!backup.is_null() && transfers.len() <= 2);
        Ok((checkpoints.len() == expected
            && bitmaps == expected
            && (!succeeded || transfers.len() == 2)
            && ended
            && secrets.is_empty())
        .then_some(()))
    })
    .with_context(|| {
        let (checkpoints, transfers) = (named("vmcheckpoints"), named("imagetransfers"));
        let (bitmaps, secrets) = (rig.bitmaps("vda"), rig.list("secrets", ""));
        let secrets = secrets.map(|found| found.into_iter().map(|found| found["metadata"].clone()).collect());
        let secrets: Result<Vec<_>> = secrets;
        format!(
            "{}: checkpoints {checkpoints:?}, transfers {transfers:?}, bitmaps {bitmaps:?}, secrets {secrets:?}",
            backup["status"]
        )
    })?;
    rig.host_is_clean()?;
    for reason in rig.events(name)?.iter().fold(BTreeMap::<String, usize>::new(), |mut counts, reason| {
        *counts.entry(reason.clone()).or_default() += 1;
        counts
    }) {
        // one of each operator, and of each object that had the name
        ensure!(reason.1 <= 2 * uids.len(), "Event {reason:?} too often");
    }
    for checkpoint in named("vmcheckpoints")? {
        rig.delete("vmcheckpoint", &checkpoint)?;
    }
    ensure!(rig.bitmaps("vda")?.is_empty(), "a bitmap is left");
    rig.delete_made()
}
