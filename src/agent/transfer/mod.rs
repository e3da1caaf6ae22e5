//! ImageTransfers of this node: a ticket for each, as long as its backup can be read.

pub mod status;
mod ticket;
mod wish;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use kube::api::ListParams;
use kube::runtime::controller::Action as Requeue;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt as _};

use self::status::{Observed, PROGRESS_SECONDS, Standing};
pub use self::ticket::{StoredTicket, believed, secret, secret_name, uncertified};
use self::ticket::{open, pause};
pub use self::wish::{Wish, wish};
use super::backup::life::Outcome;
use super::context::DRAIN;
use super::registry::Live;
use super::state::Record;
use super::{AgentError, Context, upload};
use crate::api::{self, ImageTransfer, ImageTransferStatus, Phase, Protocol, VmBackup, conditions};
use crate::clock;
use crate::cluster;
use crate::imageio::End;
use crate::reason::{Because, Reason};

/// How soon to look again at a transfer whose backup this agent has not taken up yet.
pub(super) const SOON: Duration = Duration::from_millis(200);

/// Brings one transfer as far as it can get now.
///
/// # Errors
/// What could not be gathered or written; the caller tries again.
pub async fn reconcile(transfer: Arc<ImageTransfer>, context: Arc<Context>) -> Result<Requeue, AgentError> {
    let (Some(uid), Some(old)) = (transfer.uid(), transfer.status.clone()) else {
        return Ok(Requeue::await_change());
    };
    if old.node_name.as_deref() != Some(&context.node) {
        return Ok(Requeue::await_change());
    }
    if let Some(volume) = &transfer.spec.volume {
        return upload::reconcile(&transfer, &uid, &old, volume, &context).await;
    }
    let Some(backup_uid) = old.backup_uid.clone() else { return Ok(Requeue::await_change()) };
    if conditions::is_true(&old.conditions, conditions::HOST_CLEAN) {
        return Ok(Requeue::await_change());
    }
    context.registry.follow(&backup_uid, ObjectRef::from_obj(&*transfer));

    let Some(live) = context.live(&backup_uid) else {
        return match ended_elsewhere(&transfer, &backup_uid, &context).await? {
            Some(standing) => {
                context.tickets.end(&uid, End::Canceled);
                let observed = observe(&transfer, standing, None, None, &context);
                write(&transfer, &old, observed, &context).await
            }
            None => Ok(Requeue::requeue(SOON)),
        };
    };
    let record = live.record.lock().await;
    let wish = || wish(&transfer, context.tickets.stats(&uid).map(|stats| stats.idle));
    let wanted = wish();
    let standing = match (&record.life.outcome, wanted.clone()) {
        (Some(outcome), _) => after(outcome),
        (None, Wish::End(Phase::Cancelled, because)) => Standing::Ended(Phase::Cancelled, because),
        (None, _) if !record.life.is_serving() => waiting("the backup is not Ready yet"),
        (None, Wish::End(phase, because)) => Standing::Ended(phase, because),
        (None, Wish::Pause(because)) => Standing::Paused(because),
        (None, Wish::Open) => open(&transfer, &uid, &live, &record, &context).await?,
    };
    let ends = matches!(standing, Standing::Ended(..));
    let closes = match &standing {
        Standing::Ended(..) => record.life.outcome.is_none(),
        Standing::Paused(_) => old.phase != Phase::Paused,
        Standing::Waiting(_) | Standing::Open { .. } => false,
    };
    // in the newer one, which is on its way here, something else may be wanted; or somebody used it meanwhile
    if closes && (!cluster::is_newest(&api(&transfer, &context), &*transfer).await? || wish() != wanted) {
        return Ok(Requeue::requeue(SOON));
    }
    match &standing {
        Standing::Ended(..) => end(&transfer, &uid, &live, &record, &standing, &context).await?,
        Standing::Paused(_) => pause(&uid, &record, &context)?,
        Standing::Waiting(_) | Standing::Open { .. } => {}
    }
    let observed = observe(&transfer, standing, Some(&live), Some(&record), &context);
    drop(record);
    let requeue = write(&transfer, &old, observed, &context).await;
    if ends {
        context.wake_backup(&backup_uid);
    }
    requeue
}

fn waiting(why: &str) -> Standing {
    Standing::Waiting(Because::new(Reason::BackupNotReady, why))
}

pub(super) fn api(transfer: &ImageTransfer, context: &Context) -> Api<ImageTransfer> {
    Api::namespaced(context.client.clone(), &transfer.namespace().unwrap_or_default())
}

/// Closes the ways to the bytes of the backup `uid` whose transfers are gone without a word: deleted by force.
///
/// # Errors
/// When the API server cannot be asked, or a ticket cannot be forgotten.
pub async fn close_gone(uid: &str, live: &Live, context: &Context) -> Result<(), AgentError> {
    let tickets = live.tickets().into_iter().filter(|transfer| context.tickets.stats(transfer).is_some());
    let open: Vec<_> = tickets.chain(live.unseen_transfers()).collect();
    if open.is_empty() {
        return Ok(());
    }
    let (namespace, name) = (live.object.namespace.clone().unwrap_or_default(), &live.object.name);
    let api = Api::<ImageTransfer>::namespaced(context.client.clone(), &namespace);
    let of_backup = ListParams::default().fields(&format!("spec.backup={name}"));
    let known: HashSet<_> =
        api.list_metadata(&of_backup).await?.iter().filter_map(|transfer| transfer.uid()).collect();
    for transfer in open.iter().filter(|transfer| !known.contains(*transfer)) {
        context.last_request(live, clock::now());
        context.tickets.end(transfer, End::Canceled);
        live.unseen(transfer, false);
        context.host.state.remove_ticket(uid, transfer)?;
    }
    Ok(())
}

/// What an ended backup makes of its transfers.
fn after(outcome: &Outcome) -> Standing {
    match outcome {
        Outcome::Succeeded => {
            Standing::Ended(Phase::Succeeded, Because::new(Reason::Finalized, "the backup was finalized"))
        }
        Outcome::Failed(because) => {
            let phase = match because.reason {
                Reason::Cancelled | Reason::Deleted => Phase::Cancelled,
                _ => Phase::Failed,
            };
            let reason = if phase == Phase::Cancelled { because.reason } else { Reason::TransferFailed };
            Standing::Ended(phase, Because::new(reason, format!("the backup ended: {because}")))
        }
    }
}

/// What the API knows of a backup that does not live here. `None` while it may still come to live here.
async fn ended_elsewhere(
    transfer: &ImageTransfer,
    backup_uid: &str,
    context: &Context,
) -> Result<Option<Standing>, AgentError> {
    let namespace = transfer.namespace().unwrap_or_default();
    let api = Api::<VmBackup>::namespaced(context.client.clone(), &namespace);
    let backup = api
        .get_opt(transfer.spec.backup())
        .await?
        .filter(|backup| backup.uid().as_deref() == Some(backup_uid));
    let Some(backup) = backup else {
        let because = Because::new(Reason::TransferFailed, "the backup is gone");
        return Ok(Some(Standing::Ended(Phase::Failed, because)));
    };
    let status = backup.status.unwrap_or_default();
    if !status.phase.is_terminal() {
        return Ok(None);
    }
    let ready = conditions::get(&status.conditions, conditions::READY);
    let reason = ready.and_then(|ready| Reason::ALL.iter().copied().find(|r| r.as_str() == ready.reason));
    Ok(Some(match status.phase {
        Phase::Succeeded => after(&Outcome::Succeeded),
        _ => {
            let message = ready.map(|ready| ready.message.clone()).unwrap_or_default();
            after(&Outcome::Failed(Because::new(reason.unwrap_or(Reason::TransferFailed), message)))
        }
    }))
}

/// Closes the way to the bytes, waits for those in flight, and counts what was read.
async fn end(
    transfer: &ImageTransfer,
    uid: &str,
    live: &Live,
    record: &Record,
    standing: &Standing,
    context: &Context,
) -> Result<(), AgentError> {
    let finalized = matches!(standing, Standing::Ended(Phase::Succeeded, _));
    // a ticket that is gone tells no more when it was used
    context.last_request(live, clock::now());
    context.tickets.end(uid, if finalized { End::Removed } else { End::Canceled });
    let drained = context.tickets.drained(uid, DRAIN).await;
    if !drained.is_settled() {
        return Err(AgentError::Written(drained));
    }
    live.unseen(uid, false);
    let disk = transfer.spec.disk();
    if finalized && record.life.is_serving() && record.disks.iter().any(|planned| planned.target == disk) {
        if transfer.spec.protocol == Protocol::Nbd {
            // its client reads QEMU's socket, which nobody sees: finalizing is its word for it
            context.coverage(live, record, disk).mark_all();
        }
        context.count_missing(live, record, disk).await?;
        context.store_coverage(&record.uid, live);
    }
    context.host.state.remove_ticket(&record.uid, uid)?;
    Ok(())
}

fn observe(
    transfer: &ImageTransfer,
    standing: Standing,
    live: Option<&Live>,
    record: Option<&Record>,
    context: &Context,
) -> Observed {
    let disk = transfer.spec.disk();
    let known = live.zip(record).filter(|(_, record)| record.life.ready_at.is_some());
    let planned = known.and_then(|(_, record)| record.disks.iter().find(|planned| planned.target == disk));
    let seen = planned.is_some() && transfer.spec.protocol == Protocol::Imageio;
    let transferred = known
        .filter(|_| seen && !matches!(standing, Standing::Waiting(_)))
        .map(|(live, record)| context.coverage(live, record, disk).transferred());
    let required = known.and_then(|(live, _)| live.required(disk));
    Observed {
        generation: transfer.metadata.generation,
        standing,
        size: planned.map(|planned| planned.size),
        transferred,
        required,
        now: clock::now(),
    }
}

/// Writes the status of a transfer where that is worth it, and says when to look again.
///
/// # Errors
/// What the API server says; the caller tries again.
pub(super) async fn write(
    transfer: &ImageTransfer,
    old: &ImageTransferStatus,
    observed: Observed,
    context: &Context,
) -> Result<Requeue, AgentError> {
    let new = status::status(old, &observed);
    // the reflector's copy is as old as our last write at most; progress alone is told by the timer's pace
    let since = if new.phase == old.phase { PROGRESS_SECONDS } else { 0 };
    if status::is_worth_writing(old, &new, since) {
        let api = api(transfer, context);
        if !cluster::is_newest(&api, transfer).await? {
            // the newer one is on its way here
            return Ok(Requeue::requeue(SOON));
        }
        cluster::replace_status(&api, transfer, new.clone(), api::AGENT).await?;
        if new.phase != old.phase {
            let (backup, uid) =
                (new.backup_uid.clone().unwrap_or_default(), transfer.uid().unwrap_or_default());
            tracing::info!(backup, transfer = uid, disk = transfer.spec.disk(), phase = ?new.phase, "transfer");
            if let Standing::Paused(because) | Standing::Ended(_, because) = &observed.standing
                && (transfer.spec.volume.is_some()
                    || [Reason::Paused, Reason::TransferInactive].contains(&because.reason))
            {
                let warning = new.phase == Phase::Failed || because.reason == Reason::TransferInactive;
                context.events.tell(transfer, warning, "Transfer", because).await;
            }
        }
    }
    Ok(match new.phase {
        Phase::Ready => Requeue::requeue(Duration::from_secs(PROGRESS_SECONDS.unsigned_abs())),
        Phase::Initializing => Requeue::requeue(Duration::from_secs(30)),
        _ => Requeue::await_change(),
    })
}
