//! What an agent plans for a backup that was bound to its node, from the objects. It does nothing on the host.

use std::sync::Arc;

use kube::{Api, ResourceExt as _};

use super::life::{Held, Life, Outcome};
use crate::agent::registry::Live;
use crate::agent::state::{Base, PlannedDisk, Record};
use crate::agent::{AgentError, Context};
use crate::api::{
    BITMAP_PREFIX, DiskMode, InvalidCheckpointPolicy, Phase, VmBackup, VmBackupStatus, VmCheckpoint,
};
use crate::reason::{Because, Reason};

/// The record of a backup that was just bound. `None` when there is nothing to do for it here.
pub(super) async fn adopt(
    backup: &VmBackup,
    status: &VmBackupStatus,
    context: &Context,
) -> Result<Option<Arc<Live>>, AgentError> {
    let (Some(uid), Some(namespace), Some(vm_uuid)) =
        (backup.uid(), backup.namespace(), status.vm_uuid.clone())
    else {
        return Ok(None);
    };
    // the API may be one that was put back to a state of before: never again what succeeded
    if let Some(record) = context.host.state.succeeded(&uid)?.filter(|record| record.vm_uuid == vm_uuid) {
        tracing::info!(backup = uid, vm = record.vm, "it had succeeded already");
        return Ok(Some(context.registry.insert(&uid, Live::new(record))));
    }
    let checkpoints = Api::<VmCheckpoint>::namespaced(context.client.clone(), &namespace);
    let find = async |name: &Option<String>| -> Result<Option<VmCheckpoint>, AgentError> {
        let Some(name) = name else { return Ok(None) };
        let found = checkpoints.get_opt(name).await?;
        if found.is_none() && backup.metadata.deletion_timestamp.is_none() && !status.phase.is_terminal() {
            return Err(AgentError::NoCheckpoint(name.clone()));
        }
        Ok(found)
    };
    let to = find(&status.to_checkpoint).await?;
    let marks = to.as_ref().map(|checkpoint| checkpoint.spec.marks()).unwrap_or_default();
    let bitmap = to.map(|checkpoint| checkpoint.spec.bitmap);
    let base = find(&status.from_checkpoint).await?.map(|checkpoint| Base {
        // what libvirt knows of ours was left by an earlier try of ours
        noted: checkpoint.spec.bitmap.starts_with(BITMAP_PREFIX).then_some(false),
        marks: checkpoint.spec.marks(),
        sizes: checkpoint.spec.sizes(),
        bitmap: checkpoint.spec.bitmap,
        created: checkpoint.spec.creation_time.0.as_second(),
        strict: backup.spec.on_invalid_checkpoint == InvalidCheckpointPolicy::Fail,
    });
    let quiesce = backup.spec.quiesce.clone().unwrap_or_default();
    let disks = status.disks.iter().map(|disk| PlannedDisk {
        target: disk.name.clone(),
        size: disk.size.and_then(|size| u64::try_from(size).ok()).unwrap_or_default(),
        image: None,
        in_checkpoint: disk.in_checkpoint,
        incremental: disk.mode == DiskMode::Incremental,
        full_because: disk.mode_reason.map(|reason| (reason, disk.mode_message.clone())),
        changed_from: None,
        mark: marks.get(&disk.name).cloned(),
    });
    let mut life = Life { from_base: base.is_some(), ..Life::default() };
    if matches!(status.phase, Phase::Ready | Phase::Finalizing) {
        // never a second point in time: what was read of the first one is not known any more
        let message = "this agent's record of it is lost: what was served is not known";
        life.held =
            Held { files: true, checkpoint: bitmap.is_some(), base: base.is_some(), ..Held::default() };
        life.end(Outcome::Failed(Because::new(Reason::HypervisorError, message)));
    }
    let record = Record {
        uid: uid.clone(),
        namespace,
        name: backup.name_any(),
        vm: backup.spec.vm.clone(),
        vm_uuid,
        bitmap,
        base,
        disks: disks.collect(),
        all_disks: backup.spec.disks.is_none(),
        marked: false,
        qemu: None,
        quiesce: quiesce.mode,
        quiesce_seconds: quiesce.timeout_seconds,
        life,
    };
    Ok(Some(context.registry.insert(&uid, Live::new(record))))
}
