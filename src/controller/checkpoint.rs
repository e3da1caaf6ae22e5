//! VmCheckpoints: usable once their backup succeeded; removed, with their bitmaps, when they are deleted.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::runtime::controller::Action as Requeue;
use kube::{Api, ResourceExt as _};

use super::backup::resolve::NodeHealth;
use super::context::{Parting, is_host_clean, parting};
use super::{Context, OperatorError};
use crate::api::conditions::{self, Observation, Truth};
use crate::api::{self, DomainState, LibvirtDomain, Phase, VmBackup, VmCheckpoint, VmCheckpointStatus};
use crate::clock;
use crate::cluster;
use crate::reason::{Because, Reason};

const SAFETY_NET: Duration = Duration::from_secs(60);

/// Whether an incremental can start from it.
pub fn is_usable(checkpoint: &VmCheckpoint) -> bool {
    checkpoint
        .status
        .as_ref()
        .is_some_and(|status| conditions::is_true(&status.conditions, conditions::USABLE))
}

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

fn describe(
    old: &VmCheckpointStatus,
    phase: Phase,
    because: &Because,
    generation: Option<i64>,
    now: Timestamp,
) -> VmCheckpointStatus {
    let mut new = VmCheckpointStatus { phase, observed_generation: generation, ..old.clone() };
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
        let mut object = checkpoint.clone();
        object.metadata.managed_fields = None;
        object.status = Some(new);
        cluster::replace_status(api, &object, api::OPERATOR).await?;
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
    let domain = Api::<LibvirtDomain>::namespaced(context.client.clone(), &namespace)
        .get_opt(&checkpoint.spec.vm)
        .await?;
    if checkpoint.metadata.deletion_timestamp.is_none() {
        let replaced = domain.is_some_and(|domain| domain.spec.uuid != checkpoint.spec.vm_uuid);
        if replaced && is_usable(&checkpoint) {
            let because = Because::new(Reason::VmReplaced, "another VM has the name now");
            let new = describe(&old, Phase::Failed, &because, checkpoint.metadata.generation, now);
            write(&api, &checkpoint, &old, new).await?;
            context.events.tell(&*checkpoint, true, "Check", &because).await;
        }
        return remove_unfinished(&checkpoint, &api, &context).await;
    }

    if old.node_name.is_none() {
        let here = domain.filter(|domain| domain.spec.uuid == checkpoint.spec.vm_uuid);
        let status = here.and_then(|domain| domain.status);
        let gone = status.as_ref().is_none_or(|status| status.state == Some(DomainState::Missing));
        // one whose backup failed was cleaned by its agent: its backup's reconciler releases it
        let running = unfinished(&checkpoint, &context).await?;
        if let Some(running) = running.filter(|_| !gone) {
            let message = format!("VmBackup {running} of the VM runs: the bitmaps are removed when it ends");
            let because = Because::new(Reason::CheckpointBusy, message);
            let new = describe(&old, Phase::Finalizing, &because, checkpoint.metadata.generation, now);
            write(&api, &checkpoint, &old, new).await?;
            return Ok(Requeue::requeue(Duration::from_secs(5)));
        }
        match status.and_then(|status| status.node_name).filter(|_| !gone) {
            Some(node) if context.node_health(&node).await? != NodeHealth::Gone => {
                let because =
                    Because::new(Reason::Finalizing, format!("the agent of node {node} removes the bitmaps"));
                let mut new =
                    describe(&old, Phase::Finalizing, &because, checkpoint.metadata.generation, now);
                new.node_name = Some(node);
                write(&api, &checkpoint, &old, new).await?;
                return Ok(Requeue::requeue(SAFETY_NET));
            }
            _ => {
                let message =
                    format!("the VM is gone: bitmap {} is left to its images", checkpoint.spec.bitmap);
                context
                    .events
                    .tell(&*checkpoint, false, "Delete", &Because::new(Reason::VmNotFound, message))
                    .await;
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
    Ok(Requeue::await_change())
}

/// A checkpoint that was made for a backup that was then never bound, and is gone, is nobody's.
async fn remove_unfinished(
    checkpoint: &VmCheckpoint,
    api: &Api<VmCheckpoint>,
    context: &Context,
) -> Result<Requeue, OperatorError> {
    let Some(uid) = checkpoint.labels().get(api::LABEL_BACKUP) else { return Ok(Requeue::await_change()) };
    if checkpoint.status.as_ref().is_some_and(|status| !status.conditions.is_empty()) {
        return Ok(Requeue::requeue(SAFETY_NET));
    }
    let backups =
        Api::<VmBackup>::namespaced(context.client.clone(), &checkpoint.namespace().unwrap_or_default());
    let of_vm = ListParams::default().fields(&format!("spec.vm={}", checkpoint.spec.vm));
    if !backups.list(&of_vm).await?.iter().any(|backup| backup.uid().as_ref() == Some(uid)) {
        cluster::delete(api, &checkpoint.name_any(), checkpoint.uid()).await?;
    }
    Ok(Requeue::requeue(SAFETY_NET))
}

/// The name of an unfinished, bound backup of the checkpoint's VM.
async fn unfinished(checkpoint: &VmCheckpoint, context: &Context) -> Result<Option<String>, OperatorError> {
    let namespace = checkpoint.namespace().unwrap_or_default();
    let backups = Api::<VmBackup>::namespaced(context.client.clone(), &namespace);
    let of_vm = ListParams::default().fields(&format!("spec.vm={}", checkpoint.spec.vm));
    let backups = backups.list(&of_vm).await?;
    let unfinished = backups.iter().find(|backup| {
        backup.status.as_ref().is_some_and(|status| status.node_name.is_some() && !status.phase.is_terminal())
    });
    Ok(unfinished.map(kube::ResourceExt::name_any))
}
