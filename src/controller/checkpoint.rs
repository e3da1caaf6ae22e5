//! VmCheckpoints: usable once their backup succeeded, or once what they name was found; told of what is seen of their
//! bitmaps; removed, with these, when they are deleted.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::Action as Requeue;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt as _};

use super::backup::resolve::NodeHealth;
use super::chain::{Chain, Place, is_accepted, owner};
use super::context::{Parting, is_host_clean, of_vm, parting};
use super::domain::publish::node_of;
use super::import::{self, Verdict};
use super::{Context, OperatorError, health};
use crate::api::conditions::{self, Observation, Truth};
use crate::api::{
    self, CheckpointDiskStatus, DomainSighting, DomainSightingSpec, LibvirtDomain, Phase, VmBackup,
    VmCheckpoint, VmCheckpointStatus,
};
use crate::clock;
use crate::cluster;
use crate::killpoint;
use crate::reason::{Because, Reason};
use crate::step::Step;

const SAFETY_NET: Duration = Duration::from_secs(60);

/// Makes it a base.
///
/// # Errors
/// What the API server says.
pub async fn make_usable(
    api: &Api<VmCheckpoint>,
    checkpoint: &VmCheckpoint,
    now: Timestamp,
) -> Result<(), OperatorError> {
    let seen = checkpoint.status.clone().unwrap_or_default();
    let judged = conditions::get(&seen.conditions, conditions::USABLE).is_some();
    if judged || checkpoint.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let because = Because::new(Reason::BackupSucceeded, "its backup succeeded with every byte read");
    let new = describe(&seen, Phase::Ready, &because, checkpoint.metadata.generation, now);
    write(api, checkpoint, &seen, new).await
}

/// Notes that the bitmaps of some disks (target, and what is wrong) are missing or inconsistent. Without any that is
/// not, no incremental starts from it any more.
///
/// # Errors
/// What the API server says.
pub async fn invalidate(
    api: &Api<VmCheckpoint>,
    name: &str,
    broken: &[(String, String)],
    context: &Context,
) -> Result<(), OperatorError> {
    if broken.is_empty() {
        return Ok(());
    }
    let Some(checkpoint) = cluster::find(api, name).await? else { return Ok(()) };
    let old = checkpoint.status.clone().unwrap_or_default();
    if checkpoint.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let new = invalidated(&checkpoint, &old, broken, clock::now());
    if checkpoint.is_usable() && !conditions::is_true(&new.conditions, conditions::USABLE) {
        context.events.tell(&checkpoint, true, "Check", &lost(&new)).await;
    }
    write(api, &checkpoint, &old, new).await
}

/// The status once the bitmaps of `broken` disks were seen to be broken. Pure.
fn invalidated(
    checkpoint: &VmCheckpoint,
    old: &VmCheckpointStatus,
    broken: &[(String, String)],
    now: Timestamp,
) -> VmCheckpointStatus {
    let mut new = old.clone();
    for (target, message) in broken {
        if new.disks.iter().any(|disk| disk.target == *target && disk.consistent == Some(false)) {
            continue;
        }
        new.disks.retain(|disk| disk.target != *target);
        let (target, message) = (target.clone(), message.chars().take(1024).collect());
        let broken = CheckpointDiskStatus { target, message, ..CheckpointDiskStatus::default() };
        new.disks.push(CheckpointDiskStatus { consistent: Some(false), ..broken });
    }
    if_lost(checkpoint, new, now)
}

/// The status of one that is a base no more, when none of its bitmaps is whole. Pure.
fn if_lost(checkpoint: &VmCheckpoint, new: VmCheckpointStatus, now: Timestamp) -> VmCheckpointStatus {
    if !health::is_lost(checkpoint, &new) {
        return new;
    }
    let new = VmCheckpointStatus { dirty: None, ..new };
    describe(&new, Phase::Failed, &lost(&new), checkpoint.metadata.generation, now)
}

fn lost(status: &VmCheckpointStatus) -> Because {
    let message = format!("none of its bitmaps is whole any more: {}", health::words(status));
    Because::new(Reason::CheckpointInvalid, message)
}

fn describe(
    old: &VmCheckpointStatus,
    phase: Phase,
    because: &Because,
    generation: Option<i64>,
    now: Timestamp,
) -> VmCheckpointStatus {
    // a base it is again only once its place was looked up
    let mut new = VmCheckpointStatus { phase, observed_generation: generation, base: None, ..old.clone() };
    conditions::lasting(&mut new.conditions, phase, because, Observation { generation, now });
    let usable = if phase == Phase::Ready { Truth::True } else { Truth::False };
    let (kind, reason, message) = (conditions::USABLE, because.reason.as_str(), because.shown());
    conditions::set(&mut new.conditions, kind, usable, reason, &message, generation, now);
    new
}

async fn write(
    api: &Api<VmCheckpoint>,
    checkpoint: &VmCheckpoint,
    old: &VmCheckpointStatus,
    new: VmCheckpointStatus,
) -> Result<(), OperatorError> {
    if new != *old {
        cluster::replace_status(api, checkpoint, new, api::OPERATOR).await?;
    }
    Ok(())
}

/// Brings one checkpoint as far as the operator can.
///
/// # Errors
/// What the API server says; the caller tries again.
pub async fn reconcile(
    checkpoint: Arc<VmCheckpoint>,
    context: Arc<Context>,
) -> Result<Requeue, OperatorError> {
    let namespace = checkpoint.namespace().unwrap_or_default();
    let api = Api::<VmCheckpoint>::namespaced(context.client.clone(), &namespace);
    let old = checkpoint.status.clone().unwrap_or_default();
    let now = clock::now();
    let domains = Api::<LibvirtDomain>::namespaced(context.client.clone(), &namespace);
    let domain = cluster::find(&domains, &checkpoint.spec.vm).await?;
    let is_its_vm = |domain: &LibvirtDomain| domain.spec.uuid == checkpoint.spec.vm_uuid;
    if checkpoint.metadata.deletion_timestamp.is_none() && import::is_pending(&checkpoint) {
        return import(&checkpoint, &api, domain.as_ref(), &context).await;
    }
    if checkpoint.metadata.deletion_timestamp.is_none() {
        let replaced = domain.as_ref().is_some_and(|domain| !is_its_vm(domain));
        if replaced && checkpoint.is_usable() {
            let because = Because::new(Reason::VmReplaced, "another VM has the name now");
            let new = describe(&old, Phase::Failed, &because, checkpoint.metadata.generation, now);
            write(&api, &checkpoint, &old, new).await?;
            context.events.tell(&*checkpoint, true, "Check", &because).await;
        } else if old.conditions.is_empty() {
            return remove_unfinished(&checkpoint, &api, &context).await;
        } else {
            let Place { parent, base } = close_over(&checkpoint, &context);
            let mut new = VmCheckpointStatus { parent, base, ..old.clone() };
            let domain = domain.filter(is_its_vm);
            let sighting = domain.as_ref().and_then(|domain| sighting_of(domain, &context));
            if let Some(seen) = sighting.as_ref().and_then(|seen| health::sighted(&seen.spec, &checkpoint))
                && health::is_followed(&old)
            {
                new = if_lost(&checkpoint, health::observed(&checkpoint, &new, seen), now);
            }
            let words = health::words(&new);
            write(&api, &checkpoint, &old, new).await?;
            if words != health::words(&old) {
                let because = Because::new(Reason::CheckpointInvalid, words);
                context.events.tell(&*checkpoint, true, "Check", &because).await;
            }
        }
        return Ok(Requeue::requeue(SAFETY_NET));
    }
    if old.node_name.is_none() && cluster::is_being_removed::<VmCheckpoint>(&context.client).await? {
        // nobody who removes the kind asked for the bitmaps: a chain goes on when its objects are applied again
        let message =
            format!("the kind is being removed: bitmap {} stays in the images", checkpoint.spec.bitmap);
        let because = Because::new(Reason::BitmapKept, message);
        context.events.tell(&*checkpoint, false, "Delete", &because).await;
        cluster::release(&api, &checkpoint).await?;
        return Ok(Requeue::await_change());
    }
    // as soon as it is to go
    close_over(&checkpoint, &context);
    let beside = beside(&checkpoint, &context);
    let kept = import::keeps_bitmaps(&checkpoint, &context.cluster, beside.iter().map(|other| &**other));
    // what an agent is told to remove it removes
    if let Some(because) = kept.filter(|_| old.phase != Phase::Finalizing) {
        context.events.tell(&*checkpoint, false, "Delete", &because).await;
        cluster::release(&api, &checkpoint).await?;
        return Ok(Requeue::await_change());
    }

    if old.node_name.is_none() || old.phase != Phase::Finalizing {
        // published here, or judged by us when it was: nobody names another's VM to have its bitmaps removed
        let is_ours = domain.as_ref().is_some_and(is_its_vm) || is_accepted(&checkpoint);
        let holder = if is_ours { holder(&checkpoint, &context).await } else { None };
        // one whose backup failed was cleaned by its agent: its backup's reconciler releases it
        let running = unfinished(&checkpoint, &context).await?;
        if let Some(running) = running.filter(|_| holder.is_some()) {
            let message = format!("VmBackup {running} of the VM runs: the bitmaps are removed when it ends");
            let because = Because::new(Reason::CheckpointBusy, message);
            let new = describe(&old, Phase::Finalizing, &because, checkpoint.metadata.generation, now);
            write(&api, &checkpoint, &old, new).await?;
            return Ok(Requeue::requeue(Duration::from_secs(5)));
        }
        match holder {
            Some(node) if context.node_health(&node).await? != NodeHealth::Gone => {
                let because =
                    Because::new(Reason::Finalizing, format!("the agent of node {node} removes the bitmaps"));
                let mut new =
                    describe(&old, Phase::Finalizing, &because, checkpoint.metadata.generation, now);
                new.node_name = Some(node);
                write(&api, &checkpoint, &old, new).await?;
                killpoint::reached(Step::RemovalBound);
                return Ok(Requeue::requeue(SAFETY_NET));
            }
            gone => {
                let bitmap = &checkpoint.spec.bitmap;
                let because = match gone {
                    Some(node) => {
                        let message =
                            format!("node {node} is gone: bitmap {bitmap} was not removed and may be left");
                        Because::new(Reason::HostCleanupAbandoned, message)
                    }
                    None => {
                        let message = format!("the VM is gone: bitmap {bitmap} is left to its images");
                        Because::new(Reason::VmNotFound, message)
                    }
                };
                context.events.tell(&*checkpoint, false, "Delete", &because).await;
                cluster::release(&api, &checkpoint).await?;
                return Ok(Requeue::await_change());
            }
        }
    }
    let node = context.node_health(old.node_name.as_deref().unwrap_or_default()).await?;
    let deleted = checkpoint.metadata.deletion_timestamp.as_ref().map(|time| time.0);
    match parting(true, is_host_clean(&old.conditions), node, deleted, now) {
        Parting::Wait => return Ok(Requeue::requeue(Duration::from_secs(5))),
        Parting::Abandon => {
            let message = format!("bitmap {} was not removed and may be left", checkpoint.spec.bitmap);
            let because = Because::new(Reason::HostCleanupAbandoned, message);
            context.events.tell(&*checkpoint, true, "Delete", &because).await;
        }
        Parting::Clean => {}
    }
    cluster::release(&api, &checkpoint).await?;
    killpoint::reached(Step::CheckpointReleased);
    Ok(Requeue::await_change())
}

/// Makes what a user wrote a base, once the agent of the VM's node has found what it names.
async fn import(
    checkpoint: &VmCheckpoint,
    api: &Api<VmCheckpoint>,
    domain: Option<&LibvirtDomain>,
    context: &Context,
) -> Result<Requeue, OperatorError> {
    let held = cluster::hold(api, checkpoint).await?;
    let old = held.status.clone().unwrap_or_default();
    let sighting = domain.and_then(|domain| sighting_of(domain, context));
    let seen = sighting.as_ref().and_then(|sighting| health::sighted(&sighting.spec, &held));
    let node = sighting.as_ref().map(|sighting| sighting.spec.node_name.clone());
    let beside = beside(&held, context);
    let verdict = import::judge(&held, domain, beside.iter().map(|other| &**other), node, seen);
    let (seen, phase, node, because) = match verdict {
        Verdict::Wait(because) => (old.clone(), Phase::Initializing, None, because),
        Verdict::Look(node, because) => (old.clone(), Phase::Initializing, Some(node), because),
        Verdict::Judged(seen, phase, because) => (*seen, phase, None, because),
    };
    let mut new = describe(&seen, phase, &because, held.metadata.generation, clock::now());
    new.node_name = node;
    let told = conditions::get(&old.conditions, conditions::USABLE).map(|usable| usable.reason.clone());
    write(api, &held, &old, new).await?;
    if told.as_deref() != Some(because.reason.as_str()) && because.reason != Reason::Importing {
        context.events.tell(&held, because.reason != Reason::Imported, "Import", &because).await;
    }
    Ok(Requeue::requeue(SAFETY_NET))
}

/// What the node says that has a domain, as far as it is published.
fn sighting_of(domain: &LibvirtDomain, context: &Context) -> Option<Arc<DomainSighting>> {
    let node = domain.status.as_ref()?.node_name.as_ref()?;
    let name = api::sighting_name(node, &domain.spec.uuid);
    context.sightings.get(&ObjectRef::new(&name).within(&context.system_namespace))
}

/// Looks again at the checkpoints whose status does not say what a sighting says of them.
pub fn heed(sighting: &DomainSightingSpec, context: &Context) {
    if !sighting.checkpoints.iter().flatten().any(|one| one.checkpoint_uid.is_some()) {
        return;
    }
    for checkpoint in context.checkpoints.state() {
        if checkpoint.spec.vm_uuid != sighting.uuid {
            continue;
        }
        let old = checkpoint.status.clone().unwrap_or_default();
        if let Some(seen) = health::sighted(sighting, &checkpoint)
            && (health::is_followed(&old) || import::is_pending(&checkpoint))
            && health::observed(&checkpoint, &old, seen) != old
        {
            context.wake_checkpoint(&checkpoint);
        }
    }
}

/// The checkpoints of its namespace.
fn beside(checkpoint: &VmCheckpoint, context: &Context) -> Vec<Arc<VmCheckpoint>> {
    let mut all = context.checkpoints.state();
    all.retain(|other| {
        other.namespace() == checkpoint.namespace() && other.spec.vm_uuid == checkpoint.spec.vm_uuid
    });
    all
}

/// Where a checkpoint stands in its chain, if it stays. The others are looked at again where they say otherwise of
/// themselves.
pub fn close_over(checkpoint: &VmCheckpoint, context: &Context) -> Place {
    let beside = beside(checkpoint, context);
    let others = beside.iter().map(|other| &**other);
    let chain = Chain::of(&checkpoint.spec.vm_uuid, owner(checkpoint.labels()), others);
    for displaced in chain.displaced().filter(|displaced| displaced.uid() != checkpoint.uid()) {
        context.wake_checkpoint(displaced);
    }
    chain.place(checkpoint)
}

/// The node that has the checkpoint's VM. Its LibvirtDomain may be gone before it, with their namespace.
async fn holder(checkpoint: &VmCheckpoint, context: &Context) -> Option<String> {
    // an error means that the operator is shutting down
    context.sightings.wait_until_ready().await.ok()?;
    let seen: Vec<_> = context.sightings.state().iter().map(|sighting| sighting.spec.clone()).collect();
    node_of(&seen, &checkpoint.spec.vm_uuid)
}

/// A checkpoint that was made for a backup that was then not bound with it, and is gone or has ended, is nobody's.
async fn remove_unfinished(
    checkpoint: &VmCheckpoint,
    api: &Api<VmCheckpoint>,
    context: &Context,
) -> Result<Requeue, OperatorError> {
    let Some(uid) = checkpoint.labels().get(api::LABEL_BACKUP) else { return Ok(Requeue::await_change()) };
    let backups =
        Api::<VmBackup>::namespaced(context.client.clone(), &checkpoint.namespace().unwrap_or_default());
    let backups = backups.list(&of_vm(&checkpoint.spec.vm)).await?;
    if !backups.iter().any(|backup| backup.uid().as_ref() == Some(uid) && may_be_bound(backup, checkpoint)) {
        cluster::delete(api, &checkpoint.name_any(), checkpoint.uid()).await?;
    }
    Ok(Requeue::requeue(SAFETY_NET))
}

/// Whether a backup has the checkpoint, or may still come to have it. What it has is settled with it: one that failed,
/// with a clean host, has none, and a checkpoint of its name was made by an operator that came too late.
fn may_be_bound(backup: &VmBackup, checkpoint: &VmCheckpoint) -> bool {
    let status = backup.status.clone().unwrap_or_default();
    let is_settled = status.phase != Phase::Succeeded && is_host_clean(&status.conditions);
    !status.phase.is_terminal() || (!is_settled && status.to_checkpoint == checkpoint.metadata.name)
}

/// The name of an unfinished, bound backup of the checkpoint's VM.
async fn unfinished(checkpoint: &VmCheckpoint, context: &Context) -> Result<Option<String>, OperatorError> {
    let namespace = checkpoint.namespace().unwrap_or_default();
    let backups = Api::<VmBackup>::namespaced(context.client.clone(), &namespace);
    let backups = cluster::remaining(&backups, &of_vm(&checkpoint.spec.vm)).await?;
    let unfinished = backups.iter().find(|backup| {
        backup.status.as_ref().is_some_and(|status| status.node_name.is_some() && !status.phase.is_terminal())
    });
    Ok(unfinished.map(kube::ResourceExt::name_any))
}
