//! VmBackups: gather, resolve, desired, apply, status. The operator's part of their life.

pub mod base;
pub mod desired;
pub mod resolve;
pub mod status;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::ListParams;
use kube::runtime::controller::Action as Requeue;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Resource as _, ResourceExt as _};

use self::resolve::{Binding, Facts, NodeHealth, Verdict, resolve};
use super::chain::{Chain, owner};
use super::context::{Parting, is_host_clean, of_vm, parting};
use super::{Context, OperatorError, checkpoint};
use crate::api::{
    self, BackupType, DomainSighting, DomainState, FullReason, ImageTransfer, LibvirtDomain, Phase,
    TransferPolicy, VmBackup, VmBackupStatus, VmCheckpoint,
};
use crate::clock;
use crate::cluster;
use crate::killpoint;
use crate::reason::{Because, Reason};
use crate::step::Step;

/// How long after a deadline the agent is given to end the backup itself.
const GRACE: SignedDuration = SignedDuration::from_secs(60);

/// How soon to look again at what is about to go.
const SOON: Duration = Duration::from_millis(250);

/// How soon to ask again whether an agent lives.
const AGENT: Duration = Duration::from_secs(2);

/// How soon to look again although nothing was heard.
const SAFETY_NET: Duration = Duration::from_secs(60);

/// Brings one backup as far as the operator can.
///
/// # Errors
/// What the API server says; the caller tries again.
pub async fn reconcile(backup: Arc<VmBackup>, context: Arc<Context>) -> Result<Requeue, OperatorError> {
    let (namespace, name) = (backup.namespace().unwrap_or_default(), backup.name_any());
    let old = backup.status.clone().unwrap_or_default();
    let requeue = if backup.metadata.deletion_timestamp.is_some() {
        part(&backup, &old, &context).await?
    } else if old.phase.is_terminal() {
        finish(&backup, &old, &context).await?
    } else if old.node_name.is_some() {
        accompany(&backup, &old, &context).await?
    } else {
        start(&backup, &old, &context).await?
    };
    context.wake_transfers(&namespace, &name);
    context.failures.clear(&*backup);
    Ok(requeue)
}

fn api(backup: &VmBackup, context: &Context) -> Api<VmBackup> {
    Api::namespaced(context.client.clone(), &backup.namespace().unwrap_or_default())
}

/// Not bound yet: through the checklist, and bind it.
async fn start(seen: &VmBackup, old: &VmBackupStatus, context: &Context) -> Result<Requeue, OperatorError> {
    let api = api(seen, context);
    let namespace = seen.namespace().unwrap_or_default();
    let domains = Api::<LibvirtDomain>::namespaced(context.client.clone(), &namespace);
    let domain = domains.get_opt(&seen.spec.vm).await?;
    if let Some(domain) = &domain
        && is_stale(domain, context).await?
    {
        return Ok(Requeue::requeue(SOON));
    }
    let node = domain.as_ref().and_then(|domain| domain.status.as_ref()?.node_name.clone());
    let (node, agent_answers) = match node {
        Some(node) => (context.node_health(&node).await?, context.agent_answers(&node).await?),
        None => (NodeHealth::Gone, false),
    };

    // from the look at the others until the bind, nobody else binds
    let _guard = context.binding.lock().await;
    let of_vm = of_vm(&seen.spec.vm);
    let others = api.list(&of_vm).await?.items;
    let Some(backup) = others.iter().find(|other| other.uid() == seen.uid()).cloned() else {
        return Ok(Requeue::await_change());
    };
    if backup.resource_version() != seen.resource_version() {
        // the store is behind; the newer one is on its way here
        return Ok(Requeue::requeue(Duration::from_millis(20)));
    }
    let checkpoints = Api::<VmCheckpoint>::namespaced(context.client.clone(), &namespace);
    let checkpoints = match backup.spec.backup_type {
        BackupType::Full => checkpoints.list(&of_vm).await?.items,
        // by the namespace: one that is named and of another VM is told from one that is not there
        BackupType::Incremental => checkpoints.list(&ListParams::default()).await?.items,
    };
    let now = clock::now();
    let facts = Facts {
        domain: domain.as_ref(),
        others: &others,
        checkpoints: &checkpoints,
        node,
        agent_answers,
        now,
    };
    let generation = backup.metadata.generation;
    match resolve(&backup, &facts) {
        Verdict::Bind(binding) => Ok(Requeue::requeue(bind(&api, &backup, old, &binding, context).await?)),
        Verdict::Wait(because) => {
            let new = status::waiting(old, &because, generation, now);
            write(&api, &backup, old, new, &because, true, context).await?;
            // nobody tells when an agent comes back
            let again = if because.reason == Reason::AgentUnreachable { AGENT } else { SAFETY_NET };
            let due = resolve::start_deadline(&backup, now);
            Ok(Requeue::requeue(clock::until(due, now).min(again)))
        }
        Verdict::Fail(because) => {
            let new = status::failed(old, &because, true, generation, now);
            write(&api, &backup, old, new, &because, true, context).await?;
            Ok(Requeue::await_change())
        }
    }
}

/// Whether a domain that is published as active on a node is no longer told of so by that node: it is about to be published
/// anew. Who makes a backup because one ended with `VmMigrated` would have it bound to the old node again.
async fn is_stale(domain: &LibvirtDomain, context: &Context) -> Result<bool, OperatorError> {
    let Some(status) =
        domain.status.as_ref().filter(|status| status.state.is_some_and(DomainState::is_active))
    else {
        return Ok(false);
    };
    let Some(node) = &status.node_name else { return Ok(false) };
    let sightings = Api::<DomainSighting>::namespaced(context.client.clone(), &context.system_namespace);
    let sighting = sightings.get_opt(&api::sighting_name(node, &domain.spec.uuid)).await?;
    Ok(!sighting.is_some_and(|sighting| sighting.spec.state.is_active()))
}

/// Finalizer, checkpoint, bind: in this order, so that whoever sees the bind finds the rest.
async fn bind(
    api: &Api<VmBackup>,
    backup: &VmBackup,
    old: &VmBackupStatus,
    binding: &Binding,
    context: &Context,
) -> Result<Duration, OperatorError> {
    killpoint::reached(Step::Validated);
    let held = cluster::hold(api, backup).await?;
    killpoint::reached(Step::Held);
    let now = clock::now();
    let checkpoint = desired::checkpoint(&held, binding, &context.cluster);
    if let Some(checkpoint) = &checkpoint {
        let checkpoints =
            Api::<VmCheckpoint>::namespaced(context.client.clone(), &held.namespace().unwrap_or_default());
        cluster::create(&checkpoints, checkpoint, api::OPERATOR).await?;
        killpoint::reached(Step::CheckpointMade);
    }
    let named = checkpoint.map(|checkpoint| checkpoint.name_any());
    let new = status::bound(old, binding, named, held.metadata.generation, now);
    let bound = replace(api, &held, new).await?;
    tracing::info!(backup = bound.uid(), vm = bound.spec.vm, node = binding.node, "bound");
    killpoint::reached(Step::Bound);
    make_transfers(&bound, context).await
}

/// Makes the transfers that are not there. Answers when to look again: soon, while one of the same name
/// is on its way out.
async fn make_transfers(backup: &VmBackup, context: &Context) -> Result<Duration, OperatorError> {
    let mut again = SAFETY_NET;
    if backup.spec.transfers != TransferPolicy::Auto {
        return Ok(again);
    }
    let api =
        Api::<ImageTransfer>::namespaced(context.client.clone(), &backup.namespace().unwrap_or_default());
    for transfer in desired::transfers(backup) {
        let name = transfer.name_any();
        let is_ours = |known: &ImageTransfer| known.labels().get(api::LABEL_BACKUP) == backup.uid().as_ref();
        if context.transfers.get(&ObjectRef::from_obj(&transfer)).is_some_and(|known| is_ours(&known)) {
            continue;
        }
        // the store is often behind our own write: asking costs a read, a second create a write
        let known = api.get_opt(&name).await?;
        if known.is_none() && cluster::create(&api, &transfer, api::OPERATOR).await? {
            killpoint::reached(Step::TransferMade);
            continue;
        }
        let is_going = |known: &ImageTransfer| {
            // one that was made with an earlier backup of this name goes with that
            let is_anothers = known.labels().contains_key(api::LABEL_BACKUP) && !is_ours(known);
            known.metadata.deletion_timestamp.is_some() || is_anothers
        };
        if known.as_ref().is_none_or(is_going) {
            again = SOON;
        } else if !known.as_ref().is_some_and(is_ours) {
            let message = format!(
                "ImageTransfer {name} is there already, and was not made with this backup: delete it"
            );
            tracing::warn!(backup = backup.uid(), "{message}");
            context
                .events
                .tell(backup, true, "Transfer", &Because::new(Reason::TransferFailed, message))
                .await;
        }
    }
    Ok(again)
}

/// Bound: its agent works. Make what it needs, and step in only when the agent cannot.
async fn accompany(
    backup: &VmBackup,
    old: &VmBackupStatus,
    context: &Context,
) -> Result<Requeue, OperatorError> {
    let again = make_transfers(backup, context).await?;
    let now = clock::now();
    let node = context.node_health(old.node_name.as_deref().unwrap_or_default()).await?;
    let replaced = old.phase == Phase::Initializing && is_replaced(backup, old, context).await?;
    let Some(because) = given_up(backup, old, node, replaced, now) else {
        return Ok(Requeue::requeue(again));
    };
    let new = status::failed(old, &because, false, backup.metadata.generation, now);
    write(&api(backup, context), backup, old, new, &because, true, context).await?;
    Ok(Requeue::requeue(Duration::ZERO))
}

/// Whether the VM's name is another VM's by now: its agent sees only that the one it was bound to is not there.
async fn is_replaced(
    backup: &VmBackup,
    status: &VmBackupStatus,
    context: &Context,
) -> Result<bool, OperatorError> {
    let namespace = backup.namespace().unwrap_or_default();
    let domains = Api::<LibvirtDomain>::namespaced(context.client.clone(), &namespace);
    let domain = domains.get_opt(&backup.spec.vm).await?;
    Ok(domain.is_some_and(|domain| Some(&domain.spec.uuid) != status.vm_uuid.as_ref()))
}

/// Why a bound backup is ended without its agent. Pure.
fn given_up(
    backup: &VmBackup,
    status: &VmBackupStatus,
    node: NodeHealth,
    replaced: bool,
    now: Timestamp,
) -> Option<Because> {
    let name = status.node_name.as_deref().unwrap_or_default();
    if node == NodeHealth::Gone {
        return Some(Because::new(Reason::NodeLost, format!("node {name} is gone")));
    }
    if replaced {
        let message = format!("the name {} is another VM's now", backup.spec.vm);
        return Some(Because::new(Reason::VmReplaced, message));
    }
    let silent = |what: &str| format!("not {what} in time, and the agent of node {name} does not answer");
    let late = |due: Timestamp| due.checked_add(GRACE).is_ok_and(|due| now >= due);
    match &status.ready_time {
        None if late(resolve::start_deadline(backup, now)) => {
            Some(Because::new(Reason::StartDeadlineExceeded, silent("Ready")))
        }
        Some(ready) => {
            let bound = SignedDuration::from_secs(backup.spec.ready_deadline_seconds.into());
            let due = ready.0.checked_add(bound).unwrap_or(Timestamp::MAX);
            late(due).then(|| Because::new(Reason::ReadyDeadlineExceeded, silent("finalized")))
        }
        None => None,
    }
}

/// Ended: what hangs on it is settled, and it goes when its time has come.
async fn finish(
    backup: &VmBackup,
    old: &VmBackupStatus,
    context: &Context,
) -> Result<Requeue, OperatorError> {
    let namespace = backup.namespace().unwrap_or_default();
    settle(backup, old, is_host_clean(&old.conditions), context).await?;
    context.wake_vm(&namespace, &backup.spec.vm);
    let reaffirmed = status::reaffirmed(old, backup.metadata.generation);
    if reaffirmed != *old {
        replace(&api(backup, context), backup, reaffirmed).await?;
    }
    let now = clock::now();
    let (Some(ttl), Some(ended)) = (backup.spec.ttl_seconds_after_finished, &old.completion_time) else {
        return Ok(Requeue::await_change());
    };
    let due = ended.0.checked_add(SignedDuration::from_secs(ttl.into())).unwrap_or(Timestamp::MAX);
    if now < due {
        return Ok(Requeue::requeue(clock::until(due, now)));
    }
    tracing::info!(backup = backup.uid(), vm = backup.spec.vm, "deleted after ttlSecondsAfterFinished");
    cluster::delete(&api(backup, context), &backup.name_any(), backup.uid()).await?;
    Ok(Requeue::await_change())
}

/// Makes the checkpoint a base, or removes it; tells the inventory. `free`: nothing of it is on a host any more, or
/// nobody will clean the host.
async fn settle(
    backup: &VmBackup,
    status: &VmBackupStatus,
    free: bool,
    context: &Context,
) -> Result<(), OperatorError> {
    let namespace = backup.namespace().unwrap_or_default();
    if status.phase == Phase::Succeeded {
        let domains = Api::<LibvirtDomain>::namespaced(context.client.clone(), &namespace);
        if let Some(domain) = cluster::find(&domains, &backup.spec.vm).await?
            && Some(&domain.spec.uuid) == status.vm_uuid.as_ref()
        {
            let mut new = domain.status.clone().unwrap_or_default();
            if new.last_backup_time.as_ref().map(|time| time.0)
                < status.ready_time.as_ref().map(|time| time.0)
            {
                new.last_backup = Some(backup.name_any());
                new.last_backup_time.clone_from(&status.ready_time);
                cluster::replace_status(&domains, &domain, new, api::OPERATOR).await?;
            }
        }
    }
    let checkpoints = Api::<VmCheckpoint>::namespaced(context.client.clone(), &namespace);
    if let Some(base) = &status.from_checkpoint {
        let broken = status.disks.iter().filter(|disk| disk.mode_reason == Some(FullReason::BitmapInvalid));
        let broken: Vec<_> =
            broken.map(|disk| (disk.name.clone(), disk.mode_message.clone().unwrap_or_default())).collect();
        checkpoint::invalidate(&checkpoints, base, &broken, context).await?;
    }
    // one that was made, and then not bound, has its deterministic name
    let name = status.to_checkpoint.clone().unwrap_or_else(|| desired::checkpoint_name(backup));
    let Some(found) = cluster::find(&checkpoints, &name).await? else { return Ok(()) };
    if status.phase == Phase::Succeeded {
        checkpoint::make_usable(&checkpoints, &found, clock::now()).await?;
        killpoint::reached(Step::CheckpointUsable);
        return remove_excess(backup, &found, &checkpoints, context).await;
    }
    if found.is_usable() || !free {
        return Ok(());
    }
    if found.meta().deletion_timestamp.is_none() {
        cluster::delete(&checkpoints, &name, found.uid()).await?;
    }
    if let Some(found) = cluster::find(&checkpoints, &name).await? {
        cluster::release(&checkpoints, &found).await?;
    }
    Ok(())
}

/// Deletes the checkpoints that are more than a backup that succeeded, and made `last`, wants kept.
async fn remove_excess(
    backup: &VmBackup,
    last: &VmCheckpoint,
    checkpoints: &Api<VmCheckpoint>,
    context: &Context,
) -> Result<(), OperatorError> {
    let Some(most) = backup.spec.max_checkpoints.and_then(|most| usize::try_from(most).ok()) else {
        return Ok(());
    };
    let of_vm = of_vm(&backup.spec.vm);
    let all = checkpoints.list(&of_vm).await?.items;
    let chain = Chain::of(&last.spec.vm_uuid, owner(last.labels()), &all);
    let others = api(backup, context).list(&of_vm).await?.items;
    let in_use = |name: &str| others.iter().any(|other| base::may_start_from(other, name));
    for excess in chain.excess(&last.name_any(), most, in_use) {
        let name = excess.name_any();
        cluster::delete(checkpoints, &name, excess.uid()).await?;
        let message = format!("VmCheckpoint {name} is deleted: maxCheckpoints is {most}");
        tracing::info!(backup = backup.uid(), vm = backup.spec.vm, "{message}");
        let because = Because::new(Reason::TooManyCheckpoints, message);
        context.events.tell(backup, false, "Prune", &because).await;
    }
    Ok(())
}

/// Being deleted: its host first, then what hangs on it, then its finalizer.
async fn part(backup: &VmBackup, old: &VmBackupStatus, context: &Context) -> Result<Requeue, OperatorError> {
    let namespace = backup.namespace().unwrap_or_default();
    let node = match &old.node_name {
        Some(node) => context.node_health(node).await?,
        None => NodeHealth::Up,
    };
    let deleted = backup.metadata.deletion_timestamp.as_ref().map(|time| time.0);
    let parting =
        parting(old.node_name.is_some(), is_host_clean(&old.conditions), node, deleted, clock::now());
    match parting {
        Parting::Wait => return Ok(Requeue::requeue(Duration::from_secs(5))),
        Parting::Abandon => {
            let node = old.node_name.as_deref().unwrap_or_default();
            let message = format!(
                "the agent of node {node} did not clean up: a backup job, scratch images and the bitmap of \
                 checkpoint {} may be left there",
                old.to_checkpoint.as_deref().unwrap_or("(none)")
            );
            tracing::warn!(backup = backup.uid(), vm = backup.spec.vm, "{message}");
            context
                .events
                .tell(backup, true, "Delete", &Because::new(Reason::HostCleanupAbandoned, message))
                .await;
        }
        Parting::Clean => {}
    }
    let transfers = Api::<ImageTransfer>::namespaced(context.client.clone(), &namespace);
    let uid = backup.uid().unwrap_or_default();
    let of_backup = ListParams::default().labels(&format!("{}={uid}", api::LABEL_BACKUP));
    for transfer in cluster::remaining(&transfers, &of_backup).await? {
        if transfer.meta().deletion_timestamp.is_none() {
            cluster::delete(&transfers, &transfer.name_any(), transfer.uid()).await?;
        }
    }
    // the parting says that the host is clean, or will not be cleaned
    settle(backup, old, true, context).await?;
    killpoint::reached(Step::Settled);
    cluster::release(&api(backup, context), backup).await?;
    killpoint::reached(Step::FinalizerRemoved);
    context.wake_vm(&namespace, &backup.spec.vm);
    Ok(Requeue::await_change())
}

async fn write(
    api: &Api<VmBackup>,
    backup: &VmBackup,
    old: &VmBackupStatus,
    new: VmBackupStatus,
    because: &Because,
    warning: bool,
    context: &Context,
) -> Result<(), OperatorError> {
    if new == *old {
        return Ok(());
    }
    let phase = new.phase;
    replace(api, backup, new).await?;
    if phase.is_terminal() && !old.phase.is_terminal() {
        let kind = backup.spec.backup_type.as_str();
        context.metrics.ended(kind, phase.as_str(), because.reason.as_str());
    }
    tracing::info!(backup = backup.uid(), vm = backup.spec.vm, "{because}");
    context.events.tell(backup, warning, "Validate", because).await;
    Ok(())
}

async fn replace(
    api: &Api<VmBackup>,
    backup: &VmBackup,
    new: VmBackupStatus,
) -> Result<VmBackup, OperatorError> {
    Ok(cluster::replace_status(api, backup, new, api::OPERATOR).await?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_bound_backup_is_ended_without_its_agent_only_when_that_cannot() {
        let backup: VmBackup = serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1",
            "kind": "VmBackup", "metadata": {"name": "b", "creationTimestamp": "1970-01-01T00:00:00Z"},
            "spec": {"vm": "db01", "startDeadlineSeconds": 100, "readyDeadlineSeconds": 1000}}))
        .unwrap();
        let waits: VmBackupStatus = serde_json::from_value(json!({"nodeName": "node-a"})).unwrap();
        let ready: VmBackupStatus = serde_json::from_value(
            json!({"nodeName": "node-a", "phase": "Ready", "readyTime": "1970-01-01T00:00:50Z"}),
        )
        .unwrap();
        let (up, gone) = (NodeHealth::Up, NodeHealth::Gone);
        let cases = [
            ("its agent has time", &waits, up, false, 159, None),
            ("not Ready, and silent", &waits, up, false, 160, Some(Reason::StartDeadlineExceeded)),
            ("Ready", &ready, up, false, 1109, None),
            ("not finalized, and silent", &ready, up, false, 1110, Some(Reason::ReadyDeadlineExceeded)),
            ("its node is gone", &ready, gone, false, 1, Some(Reason::NodeLost)),
            ("its VM is another", &waits, up, true, 1, Some(Reason::VmReplaced)),
            ("a node that is NotReady may come back", &ready, NodeHealth::NotReady, false, 1, None),
        ];
        for (what, status, node, replaced, now, expected) in cases {
            let now = Timestamp::from_second(now).unwrap();
            let found = given_up(&backup, status, node, replaced, now).map(|because| because.reason);
            assert_eq!(found, expected, "{what}");
        }
    }
}
