//! Removal of a VmCheckpoint's bitmaps, when its object is being deleted and was bound to this node. One that was bound to
//! it to be imported is looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kube::runtime::controller::Action as Requeue;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Resource as _, ResourceExt as _};

use super::backup::mark::BitmapDisk;
use super::{AgentError, Context};
use crate::api::conditions::{self, Observation, Truth};
use crate::api::{
    self, BackupSupport, CheckpointDiskStatus, Phase, VmCheckpoint, VmCheckpointSpec, VmCheckpointStatus,
};
use crate::clock;
use crate::cluster;
use crate::killpoint;
use crate::libvirt::xml::Domain;
use crate::reason::{Because, Reason};
use crate::step::Step;

/// How soon a removal that failed is tried again although no event came.
const AGAIN: Duration = Duration::from_secs(10);

/// How soon to look again when the watch was behind.
const SOON: Duration = Duration::from_millis(20);

/// Removes the bitmaps of a checkpoint that is being deleted, and says so.
///
/// # Errors
/// What could not be gathered or written; the caller tries again.
pub async fn reconcile(checkpoint: Arc<VmCheckpoint>, context: Arc<Context>) -> Result<Requeue, AgentError> {
    let old = checkpoint.status.clone().unwrap_or_default();
    let reference = ObjectRef::from_obj(&*checkpoint);
    let ours = old.node_name.as_deref() == Some(&context.node);
    if ours && old.phase == Phase::Initializing {
        // bound to be looked at, before it is imported: what is found is told in the VM's sighting
        context.survey.ask(&checkpoint.spec.vm_uuid, Duration::ZERO);
        return Ok(Requeue::requeue(AGAIN));
    }
    let clean = conditions::is_true(&old.conditions, conditions::HOST_CLEAN);
    if !ours || clean || checkpoint.meta().deletion_timestamp.is_none() {
        context.registry.removed(&reference);
        return Ok(Requeue::await_change());
    }
    let api =
        Api::<VmCheckpoint>::namespaced(context.client.clone(), &checkpoint.namespace().unwrap_or_default());
    if !cluster::is_newest(&api, &*checkpoint).await? {
        // once its host is clean it may be gone at any time, and nobody would clean up after another try
        return Ok(Requeue::requeue(SOON));
    }
    context.registry.await_removal(reference);
    let (host, spec) = (context.host.clone(), checkpoint.spec.clone());
    let turn = context.survey.turn(&spec.vm_uuid).await;
    let removed = context
        .blocking(move || {
            // libvirt is told of it for a moment, and nobody may have it forget that
            let _turn = turn;
            let listed = host.libvirt.lookup(&spec.vm_uuid)?;
            let domain = listed.and_then(|listed| Domain::parse(&listed.xml).ok());
            let disks = bitmap_disks(&spec, domain.as_ref());
            host.delete_checkpoint(&spec.vm_uuid, &spec.bitmap, &disks)
        })
        .await;
    let because = match &removed {
        Ok(true) => Because::new(Reason::Finalizing, "the bitmaps are gone"),
        Ok(false) => Because::new(Reason::VmNotFound, "the VM is gone: the bitmaps are left to its images"),
        Err(error) => Because::new(Reason::FinalizeFailed, error.to_string()),
    };
    if removed.is_ok() {
        context.survey.ask(&checkpoint.spec.vm_uuid, Duration::from_secs(1));
    }
    tracing::info!(checkpoint = checkpoint.name_any(), vm = checkpoint.spec.vm, "{because}");
    let new = status(&checkpoint, &old, removed.is_ok(), &because);
    if new != old {
        cluster::replace_status(&api, &*checkpoint, new, api::AGENT).await?;
        if removed.is_ok() {
            killpoint::reached(Step::RemovalWritten);
        }
    }
    Ok(if removed.is_ok() { Requeue::await_change() } else { Requeue::requeue(AGAIN) })
}

/// Where bitmaps of a checkpoint may be: in its disks, and in whatever else can keep one, for images may have been exchanged.
fn bitmap_disks(spec: &VmCheckpointSpec, domain: Option<&Domain>) -> Vec<BitmapDisk> {
    let marks = spec.marks();
    let known: Vec<_> = domain.into_iter().flat_map(|domain| &domain.devices.disks).collect();
    let images = known.iter().filter(|disk| disk.sighted(None).backup == BackupSupport::Incremental);
    let images: BTreeMap<_, _> =
        images.filter_map(|disk| Some((disk.target.dev.as_str(), PathBuf::from(disk.path()?)))).collect();
    let targets: BTreeSet<_> =
        spec.disks.iter().map(|disk| disk.target.as_str()).chain(images.keys().copied()).collect();
    let disk = |target: &str| BitmapDisk {
        target: target.to_owned(),
        image: images.get(target).cloned(),
        mark: marks.get(target).cloned(),
    };
    targets.into_iter().map(disk).collect()
}

fn status(
    checkpoint: &VmCheckpoint,
    old: &VmCheckpointStatus,
    clean: bool,
    because: &Because,
) -> VmCheckpointStatus {
    let generation = checkpoint.metadata.generation;
    let mut new =
        VmCheckpointStatus { phase: Phase::Finalizing, observed_generation: generation, ..old.clone() };
    let failed = |target: &str| CheckpointDiskStatus {
        target: target.to_owned(),
        message: because.shown(),
        ..CheckpointDiskStatus::default()
    };
    new.disks = match clean {
        true => Vec::new(),
        false => checkpoint.spec.disks.iter().map(|disk| failed(&disk.target)).collect(),
    };
    let seen = Observation { generation, now: clock::now() };
    conditions::lasting(&mut new.conditions, new.phase, because, seen);
    let mut set = |kind, truth| {
        let (reason, message) = (because.reason.as_str(), because.shown());
        conditions::set(&mut new.conditions, kind, truth, reason, &message, generation, seen.now);
    };
    set(conditions::USABLE, Truth::False);
    set(conditions::HOST_CLEAN, if clean { Truth::True } else { Truth::False });
    new
}
