//! Drives one VmBackup of this node: gather, decide, act, tell. The only I/O besides `act` and `adopt`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::runtime::controller::Action as Requeue;
use kube::{Api, ResourceExt as _};

use super::act::Job;
use super::adopt::adopt;
use super::begun;
use super::decide::{self, Facts, is_read};
use super::life::{Action, Life, Outcome, Seen, Stage};
use super::perform::{perform, reached};
use super::scratch;
use super::status::{self, Observed};
use crate::agent::registry::Live;
use crate::agent::state::Record;
use crate::agent::{AgentError, Context};
use crate::api::{self, DesiredState, Phase, VmBackup, VmBackupStatus, conditions};
use crate::clock;
use crate::cluster;
use crate::killpoint;
use crate::libvirt::xml::Domain;
use crate::reason::{Because, Reason};
use crate::step::Step;

/// How soon a deferred clean-up, or a hold, is looked at again although no event came.
const AGAIN: Duration = Duration::from_secs(5);

/// How soon to look again when the watch was behind.
const SOON: Duration = Duration::from_millis(20);

/// How long requests that run are waited for before unread bytes are counted.
const LAST_BYTES: Duration = Duration::from_millis(250);

/// How soon unread bytes are counted again after a finalize that came early.
const RECOUNT: Duration = Duration::from_secs(1);

/// How long a client may stand still before its request holds a finalize no more.
const ALIVE: Duration = Duration::from_secs(10);

/// Brings one backup as far as it can get now.
///
/// # Errors
/// What could not be gathered or written; the caller tries again.
pub async fn reconcile(mut backup: Arc<VmBackup>, context: Arc<Context>) -> Result<Requeue, AgentError> {
    let Some(uid) = backup.uid() else { return Ok(Requeue::await_change()) };
    let Some(mut old) = backup.status.clone() else { return Ok(Requeue::await_change()) };
    if old.node_name.as_deref() != Some(&context.node) {
        return Ok(Requeue::await_change());
    }
    if old.phase.is_terminal() && conditions::is_true(&old.conditions, conditions::HOST_CLEAN) {
        context.release(&uid);
        return Ok(Requeue::await_change());
    }
    let live = match context.registry.find(&uid) {
        Some(live) => live,
        None => {
            if !cluster::is_newest(&api(&backup, &context), &*backup).await? {
                // a backup that ended meanwhile must not be begun again from an old copy
                return Ok(Requeue::requeue(SOON));
            }
            match adopt(&backup, &old, &context).await? {
                Some(live) => live,
                None => return Ok(Requeue::await_change()),
            }
        }
    };
    live.confirmed.store(true, Ordering::Relaxed);
    let mut record = live.record.lock().await;
    record.life.retry();
    if old.phase.is_terminal() {
        // the operator gave this agent up; what it left is cleaned all the same
        let because = Because::new(Reason::NodeLost, "the operator ended it while this agent was away");
        record.life.end(Outcome::Failed(because));
    }

    if record.life.next() == Some(Action::Thaw) {
        // before anything is looked at: libvirt may take its time to answer
        perform(Action::Thaw, &mut record, &context).await?;
    }
    let mut gathered = gather(&backup, &live, &record, &context).await?;
    loop {
        let facts = gathered.facts(&backup, &live, &record.life);
        let seen = gathered.seen(&record);
        record.life.observe(seen, facts.now);
        let ending = decide::ending(&backup.spec, &record.life, &facts);
        if let Some(outcome) = ending.filter(|_| record.life.outcome.is_none()) {
            if outcome == Outcome::Succeeded {
                reached(Step::FinalizeSeen, &record.name).await;
                let sealed = seal(&backup, &old, &live, &record, &gathered, &context).await?;
                old = sealed.status.clone().unwrap_or(old);
                backup = Arc::new(sealed);
            } else if decide::is_revocable(&outcome) && !stands(&backup, &context).await {
                return Ok(Requeue::requeue(SOON));
            }
            record.life.end(outcome);
        }
        gathered.hold = decide::hold(&backup.spec, &record.life, &facts);
        let Some(action) = record.life.next() else { break };
        // what is held back is the way up; what an earlier process left is still put right
        if gathered.hold.is_some() && action.is_upward() {
            break;
        }
        if let Err(error) = perform(action, &mut record, &context).await {
            record.life.interrupt();
            if record.life.next() == Some(Action::Thaw) {
                // a guest does not stay frozen until this can be tried again
                perform(Action::Thaw, &mut record, &context).await?;
            }
            return Err(error);
        }
        if matches!(action, Action::Begin | Action::AbortJob) || record.qemu != gathered.qemu {
            gathered = gather(&backup, &live, &record, &context).await?;
        }
    }

    if record.life.is_serving() {
        begun::follow(&mut record, &context).await?;
        if record.life.outcome.is_some() {
            return Ok(Requeue::requeue(SOON));
        }
    }
    if record.has_succeeded() {
        context.host.state.store_succeeded(&record)?;
    }
    let phase = write_status(&backup, &old, &live, &record, &gathered, &context).await?;
    context.registry.wake_transfers(&uid);
    if phase.is_terminal() {
        drop(record);
        context.release(&uid);
        return Ok(Requeue::await_change());
    }
    Ok(requeue(&backup, &live, &record, &gathered))
}

fn api(backup: &VmBackup, context: &Context) -> Api<VmBackup> {
    Api::namespaced(context.client.clone(), &backup.namespace().unwrap_or_default())
}

/// Whether the spec that an ending was decided by is the newest. Bounds hold although the API server does not answer.
async fn stands(backup: &VmBackup, context: &Context) -> bool {
    cluster::is_newest(&api(backup, context), backup).await.unwrap_or(true)
}

/// Says that the finalize is obeyed, on the very spec that it was decided by: a cancel that came first is a conflict,
/// and one that comes later comes too late.
async fn seal(
    backup: &VmBackup,
    old: &VmBackupStatus,
    live: &Live,
    record: &Record,
    gathered: &Gathered,
    context: &Context,
) -> Result<VmBackup, AgentError> {
    let mut sealed = record.clone();
    sealed.life.end(Outcome::Succeeded);
    let new = describe(backup, old, live, &sealed, gathered, context)?;
    Ok(cluster::replace_status(&api(backup, context), backup, new, api::AGENT).await?)
}

/// Thaws a guest that was left frozen, without its object: the API server may be away for long.
///
/// # Errors
/// When the state directory cannot be used; a thaw that fails is tried again by the next call.
pub async fn thaw(live: &Live, context: &Context) -> Result<(), AgentError> {
    // held means busy: its own reconciler sees to it
    let Ok(mut record) = live.record.try_lock() else { return Ok(()) };
    record.life.retry();
    if record.life.next() == Some(Action::Thaw) {
        perform(Action::Thaw, &mut record, context).await?;
    }
    Ok(())
}

/// Cleans the host after a backup whose object does not exist any more, or is another node's now.
///
/// # Errors
/// When the API server cannot be asked, or the host: the caller tries again.
pub async fn clean_orphan(uid: &str, live: &Live, context: &Context) -> Result<(), AgentError> {
    if live.released.load(Ordering::Relaxed) {
        return Ok(());
    }
    // not held while the API server is asked: a thaw would wait for the answer
    let (namespace, name) = (live.object.namespace.clone().unwrap_or_default(), live.object.name.clone());
    let api = Api::<VmBackup>::namespaced(context.client.clone(), &namespace);
    let object = api.get_opt(&name).await?.filter(|object| object.uid().as_deref() == Some(uid));
    let node = object.and_then(|object| object.status?.node_name);
    if node.as_deref() == Some(&context.node) {
        return Ok(());
    }
    let mut record = live.record.lock().await;
    record.life.end(Outcome::Failed(Because::new(Reason::Deleted, "its VmBackup is gone")));
    record.life.retry();
    let host = context.host.clone();
    let asked = record.clone();
    let (listed, job) = context.blocking(move || host.look(&asked)).await?;
    let active = listed.is_some_and(|listed| listed.state.is_active());
    record.life.observe(Seen { active, our_job: job == Job::Ours, restarted: false }, clock::now());
    while let Some(action) = record.life.next() {
        perform(action, &mut record, context).await?;
    }
    if record.life.is_ended() {
        tracing::info!(backup = uid, vm = record.vm, "the host was cleaned after a backup that is gone");
        context.release(uid);
        context.registry.wake_transfers(uid);
        context.registry.remove(uid);
    }
    Ok(())
}

/// What was read of libvirt and the clients.
struct Gathered {
    qemu: Option<u32>,
    our_job: bool,
    domain: Option<api::DomainState>,
    block_jobs: Vec<String>,
    rival: Option<String>,
    foreign_job: bool,
    other_job: bool,
    lost_job: bool,
    missing: Option<Vec<(String, u64)>>,
    reading: bool,
    last_request: Option<Timestamp>,
    absent_since: Option<Timestamp>,
    elsewhere: Option<String>,
    told_here: bool,
    room: Option<u64>,
    need: u64,
    exhausted: Option<Because>,
    cordoned_since: Option<Timestamp>,
    drain_grace: SignedDuration,
    hold: Option<Because>,
}

impl Gathered {
    fn seen(&self, record: &Record) -> Seen {
        let restarted = self.qemu.is_some() && record.qemu.is_some() && record.qemu != self.qemu;
        Seen { active: self.qemu.is_some(), our_job: self.our_job, restarted }
    }

    fn facts<'a>(&'a self, backup: &VmBackup, live: &Live, life: &Life) -> Facts<'a> {
        let now = clock::now();
        let asked = if live.has_unseen() { Some(now) } else { self.last_request };
        Facts {
            deleting: backup.metadata.deletion_timestamp.is_some(),
            created: backup.creation_timestamp().map_or(now, |created| created.0),
            domain: self.domain,
            absent_since: self.absent_since,
            elsewhere: self.elsewhere.as_deref(),
            told_here: self.told_here,
            room: self.room,
            need: self.need,
            exhausted: self.exhausted.as_ref(),
            cordoned_since: self.cordoned_since,
            drain_grace: self.drain_grace,
            block_jobs: &self.block_jobs,
            rival: self.rival.as_deref(),
            foreign_job: self.foreign_job,
            other_job: self.other_job,
            lost_job: self.lost_job,
            missing: self.missing.as_deref(),
            reading: self.reading,
            last_request: asked.max(life.ready_at).unwrap_or(now),
            now,
        }
    }
}

async fn gather(
    backup: &VmBackup,
    live: &Live,
    record: &Record,
    context: &Context,
) -> Result<Gathered, AgentError> {
    let host = context.host.clone();
    let asked = record.clone();
    let (listed, job) = context.blocking(move || host.look(&asked)).await?;
    let qemu = listed.as_ref().and_then(|listed| listed.qemu);
    let our_job = job == Job::Ours;
    let block_jobs = listed
        .as_ref()
        .and_then(|listed| Domain::parse(&listed.xml).ok())
        .map(|domain| domain.disks_with_block_job().into_iter().map(str::to_owned).collect())
        .unwrap_or_default();
    let finalizing = backup.spec.state == DesiredState::Finalized && record.life.is_serving() && our_job;
    // a successor must not ask for what was read before the finalize
    let finalizing = finalizing && context.store_coverage(&record.uid, live);
    let rival = match record.life.outcome {
        None => context.registry.claim(&record.uid, live).map(|rival| {
            // it may be gone by force: then its end is what this one waits for
            rival.confirmed.store(false, Ordering::Relaxed);
            rival.object.name.clone()
        }),
        Some(_) => None,
    };
    let missing = match live.missing() {
        _ if !finalizing => None,
        // served is served: only a client is waited for
        missing if missing.len() == record.disks.len() && is_read(&missing) => Some(missing),
        _ => Some(count_missing(live, record, context).await?),
    };
    let starting = record.life.stage < Stage::Begun && record.life.outcome.is_none();
    let nodes = if starting && qemu.is_none() { context.told_by(&record.vm_uuid).await? } else { Vec::new() };
    let told_here = nodes.contains(&context.node);
    let elsewhere = nodes.into_iter().find(|node| *node != context.node);
    let room = if record.life.stage == Stage::New {
        let host = context.host.clone();
        let usage = context.blocking(move || Ok(host.state.scratch_usage()?)).await?;
        Some(usage.room(context.host.scratch_limit))
    } else {
        None
    };
    Ok(Gathered {
        qemu,
        our_job,
        absent_since: live.absent(listed.is_none(), clock::now()),
        elsewhere,
        told_here,
        room,
        need: scratch::need(record.disks.iter().map(|disk| disk.size)),
        exhausted: live.exhausted(),
        cordoned_since: context.cordon.since(),
        drain_grace: context.drain_grace,
        domain: listed.map(|listed| listed.state),
        block_jobs,
        rival,
        foreign_job: job == Job::Foreign,
        other_job: job == Job::Other,
        lost_job: job == Job::Lost,
        missing,
        reading: live.tickets().iter().any(|transfer| context.tickets.moves(transfer, ALIVE)),
        last_request: context.last_request(live, clock::now()),
        hold: None,
    })
}

/// Counts, disk by disk, the bytes that must be read and were not. A client that has its last byte may ask for the
/// finalize before the server knows that it went out.
async fn count_missing(
    live: &Live,
    record: &Record,
    context: &Context,
) -> Result<Vec<(String, u64)>, AgentError> {
    for transfer in live.tickets() {
        // what goes on is counted as it is
        let _ = context.tickets.drained(&transfer, LAST_BYTES).await;
    }
    for disk in &record.disks {
        context.count_missing(live, record, &disk.target).await?;
    }
    Ok(live.missing())
}

/// The status of what was gathered.
fn describe(
    backup: &VmBackup,
    old: &VmBackupStatus,
    live: &Live,
    record: &Record,
    gathered: &Gathered,
    context: &Context,
) -> Result<VmBackupStatus, AgentError> {
    let socket = context.host.state.socket_of(&record.uid).map_err(AgentError::State)?;
    let observed = Observed {
        generation: backup.metadata.generation,
        wish: backup.spec.state,
        record,
        socket: &socket.to_string_lossy(),
        hold: gathered.hold.as_ref(),
        missing: &live.missing(),
        is_read: gathered.missing.as_deref().is_some_and(is_read),
        now: clock::now(),
    };
    Ok(status::status(old, &observed))
}

async fn write_status(
    backup: &VmBackup,
    old: &VmBackupStatus,
    live: &Live,
    record: &Record,
    gathered: &Gathered,
    context: &Context,
) -> Result<Phase, AgentError> {
    let mut new = describe(backup, old, live, record, gathered, context)?;
    if old.phase.is_terminal() {
        // its end is told already: only say that the host is clean now
        let clean = conditions::get(&new.conditions, conditions::HOST_CLEAN).cloned();
        new = VmBackupStatus { conditions: old.conditions.clone(), ..old.clone() };
        new.conditions.extend(clean);
    }
    let phase = new.phase;
    if new != *old {
        cluster::replace_status(&api(backup, context), backup, new.clone(), api::AGENT).await?;
        match phase {
            Phase::Ready => killpoint::reached(Step::ReadyWritten),
            phase if phase.is_terminal() => killpoint::reached(Step::TerminalWritten),
            _ => {}
        }
        if phase.is_terminal() && !old.phase.is_terminal() {
            let reason =
                conditions::get(&new.conditions, conditions::READY).map_or("", |ready| &ready.reason);
            context.health.metrics.ended(backup.spec.backup_type.as_str(), phase.as_str(), reason);
        }
        tell(backup, old, &new, record, context).await;
    }
    Ok(phase)
}

/// An Event for each change of the reason that Ready gives.
async fn tell(
    backup: &VmBackup,
    old: &VmBackupStatus,
    new: &VmBackupStatus,
    record: &Record,
    context: &Context,
) {
    let ready = |status: &VmBackupStatus| conditions::get(&status.conditions, conditions::READY).cloned();
    let (before, Some(after)) = (ready(old), ready(new)) else { return };
    let same = before.is_some_and(|before| before.reason == after.reason);
    tracing::info!(backup = %record.uid, vm = %record.vm, phase = ?new.phase, reason = after.reason, "{}", after.message);
    let Some(reason) = Reason::ALL.iter().copied().find(|reason| reason.as_str() == after.reason) else {
        return;
    };
    if same || matches!(reason, Reason::Finalizing | Reason::Bound) {
        return;
    }
    let warning =
        new.phase == Phase::Failed || !matches!(reason, Reason::AwaitingFinalize | Reason::Finalized);
    context.events.say(backup, warning, "Backup", reason, &after.message).await;
}

fn requeue(backup: &VmBackup, live: &Live, record: &Record, gathered: &Gathered) -> Requeue {
    if !record.life.deferred.is_empty() || gathered.hold.is_some() {
        return Requeue::requeue(AGAIN);
    }
    if record.life.is_serving() && backup.spec.state == DesiredState::Finalized {
        return Requeue::requeue(RECOUNT);
    }
    let facts = gathered.facts(backup, live, &record.life);
    match decide::next_due(&backup.spec, &record.life, &facts) {
        Some(due) => Requeue::requeue(clock::until(due, facts.now).min(Duration::from_secs(30))),
        None => Requeue::requeue(AGAIN),
    }
}
