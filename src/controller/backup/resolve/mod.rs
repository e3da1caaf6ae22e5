//! Why can't this backup start? The checklist, in order, as a pure function of what was gathered.

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;

use super::base;
use crate::api::{
    BackupDisk, BackupSupport, DesiredState, DiskMode, DomainDisk, DomainState, LibvirtDomain, OfflinePolicy,
    VmBackup, VmCheckpoint,
};
use crate::controller::chain::{Chain, owner};
use crate::reason::{Because, Reason, Retry};

/// What was gathered.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The VM named in the spec, if there is one.
    pub domain: Option<&'a LibvirtDomain>,
    /// The other VmBackups of that VM in the namespace.
    pub others: &'a [VmBackup],
    /// The VmCheckpoints in the namespace; of a full backup, those that name its VM at the least.
    pub checkpoints: &'a [VmCheckpoint],
    /// Whether the VM's node is there and not NotReady.
    pub node: NodeHealth,
    /// Whether that node's agent says that it lives.
    pub agent_answers: bool,
    /// The time.
    pub now: Timestamp,
}

/// A Node object, as far as a backup cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeHealth {
    /// It is there, and does not say that it is not Ready.
    Up,
    /// Its Ready condition is not True.
    NotReady,
    /// There is no such Node.
    Gone,
}

/// What is bound.
#[derive(Clone, Debug, PartialEq)]
pub struct Binding {
    /// The node.
    pub node: String,
    /// The VM's libvirt uuid.
    pub vm_uuid: String,
    /// The disks.
    pub disks: Vec<BackupDisk>,
    /// The checkpoint that some of them start from.
    pub from_checkpoint: Option<String>,
    /// Those of them that can keep a bitmap.
    pub in_checkpoint: Vec<DomainDisk>,
    /// The newest checkpoint of the VM and the owner, which the new one follows.
    pub parent: Option<String>,
    /// When the new one is made.
    pub checkpoint_time: Timestamp,
}

/// What the checklist says.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// All is well.
    Bind(Binding),
    /// Not now.
    Wait(Because),
    /// Never.
    Fail(Because),
}

/// Goes through the checklist.
pub fn resolve(backup: &VmBackup, facts: &Facts<'_>) -> Verdict {
    if backup.spec.state == DesiredState::Cancelled {
        return Verdict::Fail(Because::new(Reason::Cancelled, "cancelled before it was bound"));
    }
    match check(backup, facts) {
        Ok(binding) => Verdict::Bind(binding),
        Err(because) if because.reason.retry() == Retry::Never => Verdict::Fail(because),
        Err(because) if facts.now >= start_deadline(backup, facts.now) => {
            let message = format!(
                "not Ready within {} s, last because of {because}",
                backup.spec.start_deadline_seconds
            );
            Verdict::Fail(Because::new(Reason::StartDeadlineExceeded, message))
        }
        Err(because) => match (because.reason, backup.spec.offline) {
            (Reason::VmNotRunning, OfflinePolicy::Refuse) => {
                Verdict::Fail(Because::new(Reason::VmNotRunning, "the VM is off, and offline is Refuse"))
            }
            _ => Verdict::Wait(because),
        },
    }
}

/// When the backup must be Ready.
pub fn start_deadline(backup: &VmBackup, now: Timestamp) -> Timestamp {
    let created = backup.creation_timestamp().map_or(now, |created| created.0);
    let bound = SignedDuration::from_secs(backup.spec.start_deadline_seconds.into());
    created.checked_add(bound).unwrap_or(Timestamp::MAX)
}

fn check(backup: &VmBackup, facts: &Facts<'_>) -> Result<Binding, Because> {
    let vm = &backup.spec.vm;
    let no = |reason, message: String| Err(Because::new(reason, message));
    let Some(domain) = facts.domain else {
        return no(Reason::VmNotFound, format!("no LibvirtDomain {vm} in this namespace"));
    };
    let status = domain.status.as_ref();
    // a mistake in the spec is told before anything is waited for
    let disks = choose(backup, status.map(|status| status.disks.as_slice()).unwrap_or_default())?;
    match status.and_then(|status| status.state) {
        Some(DomainState::Running | DomainState::Paused) => {}
        Some(DomainState::Off) => return no(Reason::VmNotRunning, format!("VM {vm} is off")),
        Some(DomainState::Missing) => {
            return no(Reason::VmNotFound, format!("no node's libvirt knows VM {vm} any more"));
        }
        Some(DomainState::NodeLost) => {
            return no(Reason::NodeNotReady, format!("the node of VM {vm} is down"));
        }
        Some(DomainState::Busy) | None => {
            return no(
                Reason::VmBusy,
                format!("VM {vm} is starting, stopping, migrating or paused by an error"),
            );
        }
    }
    let Some(node) = status.and_then(|status| status.node_name.clone()) else {
        return no(Reason::VmBusy, format!("VM {vm} is on no node at the moment"));
    };
    if facts.node != NodeHealth::Up {
        return no(Reason::NodeNotReady, format!("node {node} is not Ready"));
    }
    if !facts.agent_answers {
        return no(Reason::AgentUnreachable, format!("the agent of node {node} does not answer"));
    }
    if let Some(other) = facts.others.iter().find(|other| goes_first(other, backup)) {
        let message = format!("VmBackup {} of the same VM is not finished", other.name_any());
        return no(Reason::BackupAlreadyRunning, message);
    }
    bind(backup, node, domain.spec.uuid.clone(), &disks, facts)
}

/// How each disk is read, and from where.
fn bind(
    backup: &VmBackup,
    node: String,
    vm_uuid: String,
    disks: &[DomainDisk],
    facts: &Facts<'_>,
) -> Result<Binding, Because> {
    let base = base::choose(backup, &vm_uuid, disks, facts.checkpoints)?;
    let mut bound = Vec::with_capacity(disks.len());
    for disk in disks {
        let mode = base::mode(backup, disk, base)?;
        bound.push(BackupDisk {
            name: disk.target.clone(),
            mode: mode.mode,
            mode_reason: mode.reason,
            mode_message: mode.message,
            size: disk.size,
            in_checkpoint: disk.backup == BackupSupport::Incremental,
            missing_bytes: None,
            nbd: None,
        });
    }
    let starts = bound.iter().any(|disk| disk.mode == DiskMode::Incremental);
    let from_checkpoint = base.filter(|_| starts).map(kube::ResourceExt::name_any);
    let in_checkpoint =
        disks.iter().filter(|disk| disk.backup == BackupSupport::Incremental).cloned().collect();
    let chain = Chain::of(&vm_uuid, owner(backup.labels()), facts.checkpoints);
    let parent = chain.newest().map(kube::ResourceExt::name_any);
    let checkpoint_time = chain.next_time(facts.now);
    Ok(Binding { node, vm_uuid, disks: bound, from_checkpoint, in_checkpoint, parent, checkpoint_time })
}

/// The disks to back up, in the domain's order.
fn choose(backup: &VmBackup, disks: &[DomainDisk]) -> Result<Vec<DomainDisk>, Because> {
    let vm = &backup.spec.vm;
    let Some(named) = &backup.spec.disks else {
        let supported: Vec<_> =
            disks.iter().filter(|disk| disk.backup != BackupSupport::Unsupported).cloned().collect();
        if supported.is_empty() {
            let message = format!("VM {vm} has no disk that can be backed up");
            return Err(Because::new(Reason::DiskNotSupported, message));
        }
        return Ok(supported);
    };
    for name in named {
        let Some(disk) = disks.iter().find(|disk| disk.target == *name) else {
            let has: Vec<_> = disks.iter().map(|disk| disk.target.as_str()).collect();
            let message = format!("VM {vm} has no disk {name}, it has {}", has.join(", "));
            return Err(Because::new(Reason::DiskNotFound, message));
        };
        if disk.backup == BackupSupport::Unsupported {
            let why = disk.reason.as_deref().unwrap_or("it cannot be backed up");
            return Err(Because::new(Reason::DiskNotSupported, format!("disk {name}: {why}")));
        }
    }
    Ok(disks.iter().filter(|disk| named.contains(&disk.target)).cloned().collect())
}

/// Whether `other`, unfinished, is bound already, or older: then `backup` waits for it. The uid decides
/// between two of the same second, so that never both wait.
fn goes_first(other: &VmBackup, backup: &VmBackup) -> bool {
    let status = other.status.as_ref();
    if other.uid() == backup.uid() || status.is_some_and(|status| status.phase.is_terminal()) {
        return false;
    }
    if status.is_some_and(|status| status.node_name.is_some()) {
        return true;
    }
    let order = |backup: &VmBackup| (backup.creation_timestamp().map(|time| time.0), backup.uid());
    other.metadata.deletion_timestamp.is_none()
        && other.spec.state != DesiredState::Cancelled
        && order(other) < order(backup)
}

#[cfg(test)]
mod tests;
