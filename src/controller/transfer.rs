//! ImageTransfers: bound to their backup's node, uploads to the node that they name; their ticket Secrets are deleted when they
//! end.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::Action as Requeue;
use kube::{Api, ResourceExt as _};

use super::backup::resolve::NodeHealth;
use super::context::{Parting, is_host_clean, parting};
use super::{Context, OperatorError, upload};
use crate::api::conditions::{self, Observation};
use crate::api::{self, ImageTransfer, ImageTransferStatus, NewVolume, Phase, TransferState, VmBackup};
use crate::clock;
use crate::cluster;
use crate::killpoint;
use crate::reason::{Because, Reason};
use crate::step::Step;

const SAFETY_NET: Duration = Duration::from_secs(60);

/// Whether a transfer was made with a backup that is gone: a later one of the same name makes its own. Pure.
fn is_orphan(transfer: &ImageTransfer, backup: Option<&VmBackup>) -> bool {
    let made_for = transfer.labels().get(api::LABEL_BACKUP);
    // an upload is made with none, whatever its labels say
    transfer.spec.volume.is_none()
        && made_for.is_some()
        && made_for != backup.and_then(|backup| backup.metadata.uid.as_ref())
}

/// What the operator makes of a transfer that is not bound. Pure.
fn resolve(
    transfer: &ImageTransfer,
    backup: Option<&VmBackup>,
) -> Result<(String, String), (Phase, Because)> {
    let wait = |reason, message: String| Err((Phase::Initializing, Because::new(reason, message)));
    let fail = |phase, reason, message: String| Err((phase, Because::new(reason, message)));
    if transfer.spec.state == TransferState::Cancelled {
        return fail(Phase::Cancelled, Reason::Cancelled, "cancelled before it was bound".to_owned());
    }
    let name = transfer.spec.backup();
    let Some(backup) = backup else {
        return wait(Reason::BackupNotFound, format!("there is no VmBackup {name} in this namespace"));
    };
    let status = backup.status.clone().unwrap_or_default();
    if status.phase.is_terminal() {
        return fail(Phase::Failed, Reason::TransferFailed, format!("VmBackup {name} has ended already"));
    }
    let (Some(node), Some(uid)) = (status.node_name, backup.uid()) else {
        return wait(Reason::BackupNotReady, format!("VmBackup {name} is not bound to a node yet"));
    };
    let disk = transfer.spec.disk();
    if !status.disks.iter().any(|known| known.name == disk) {
        let has: Vec<_> = status.disks.iter().map(|disk| disk.name.as_str()).collect();
        let message = format!("VmBackup {name} has no disk {disk}, it has {}", has.join(", "));
        return fail(Phase::Failed, Reason::DiskNotFound, message);
    }
    Ok((node, uid))
}

fn describe(
    old: &ImageTransferStatus,
    phase: Phase,
    because: &Because,
    generation: Option<i64>,
    now: Timestamp,
) -> ImageTransferStatus {
    let mut new = ImageTransferStatus { phase, observed_generation: generation, ..old.clone() };
    if phase.is_terminal() {
        new.completion_time.get_or_insert_with(|| Time(conditions::whole_seconds(now)));
    }
    conditions::one_shot(&mut new.conditions, phase, because, Observation { generation, now });
    new
}

/// Ended, and its spec was changed since: that changes nothing, and is answered.
fn reaffirmed(old: &ImageTransferStatus, generation: Option<i64>) -> ImageTransferStatus {
    let mut new = ImageTransferStatus { observed_generation: generation, ..old.clone() };
    conditions::reaffirm(&mut new.conditions, generation);
    new
}

async fn replace(
    api: &Api<ImageTransfer>,
    transfer: &ImageTransfer,
    new: ImageTransferStatus,
) -> Result<(), OperatorError> {
    cluster::replace_status(api, transfer, new, api::OPERATOR).await?;
    Ok(())
}

/// Brings one transfer as far as the operator can.
///
/// # Errors
/// What the API server says; the caller tries again.
pub async fn reconcile(
    transfer: Arc<ImageTransfer>,
    context: Arc<Context>,
) -> Result<Requeue, OperatorError> {
    let namespace = transfer.namespace().unwrap_or_default();
    let api = Api::<ImageTransfer>::namespaced(context.client.clone(), &namespace);
    let old = transfer.status.clone().unwrap_or_default();
    if old.phase.is_terminal() {
        delete_secrets(&transfer, &old, &context).await?;
    }
    if transfer.metadata.deletion_timestamp.is_some() {
        return part(&transfer, &old, &api, &context).await;
    }
    let is_done = old.phase.is_terminal();
    if let Some(node) = old.node_name.as_ref().filter(|_| !is_done) {
        return watch_node(&transfer, node, &old, &api, &context).await;
    }
    let found = match &transfer.spec.volume {
        Some(_) => None,
        None => {
            let backups = Api::<VmBackup>::namespaced(context.client.clone(), &namespace);
            backups.get_opt(transfer.spec.backup()).await?
        }
    };
    let newest = cluster::is_newest(&api, &*transfer).await?;
    if is_orphan(&transfer, found.as_ref()) {
        cluster::delete(&api, &transfer.name_any(), transfer.uid()).await?;
        return Ok(Requeue::await_change());
    }
    if is_done {
        let new = reaffirmed(&old, transfer.metadata.generation);
        if new != old {
            replace(&api, &transfer, new).await?;
        }
        return Ok(Requeue::await_change());
    }
    if !newest {
        // the newer one is on its way here
        return Ok(Requeue::requeue(Duration::from_millis(50)));
    }
    let (generation, now) = (transfer.metadata.generation, clock::now());
    let bound = match &transfer.spec.volume {
        Some(volume) => place_upload(&transfer, volume, &context).await?,
        None => resolve(&transfer, found.as_ref()).map(|(node, uid)| {
            (node, Some(uid), Because::new(Reason::BackupNotReady, "the backup is not Ready yet"))
        }),
    };
    let new = match bound {
        Ok((node, backup_uid, because)) => {
            let bound = describe(&old, Phase::Initializing, &because, generation, now);
            ImageTransferStatus { node_name: Some(node), backup_uid, ..bound }
        }
        Err((phase, because)) => {
            let new = describe(&old, phase, &because, generation, now);
            if new != old && phase.is_terminal() {
                context.events.tell(&*transfer, true, "Validate", &because).await;
            }
            new
        }
    };
    if new != old {
        let held = if new.node_name.is_some() {
            cluster::hold(&api, &*transfer).await?
        } else {
            (*transfer).clone()
        };
        replace(&api, &held, new.clone()).await?;
        tracing::info!(backup = new.backup_uid, transfer = transfer.uid(), disk = transfer.spec.disk, phase = ?new.phase, "transfer");
        if new.node_name.is_some() {
            killpoint::reached(Step::TransferBound);
        }
    }
    context.failures.clear(&*transfer);
    Ok(if new.phase.is_terminal() { Requeue::await_change() } else { Requeue::requeue(SAFETY_NET) })
}

/// The node of an upload, no backup, and what it waits for there; or why it has none yet.
async fn place_upload(
    transfer: &ImageTransfer,
    volume: &NewVolume,
    context: &Context,
) -> Result<Result<(String, Option<String>, Because), (Phase, Because)>, OperatorError> {
    let tenancy = context.tenancy().await;
    let node = context.node_health(&volume.node_name).await?;
    let answers = context.agent_answers(&volume.node_name).await?;
    let placed = upload::place(transfer, volume, &tenancy, node, answers);
    Ok(placed.map(|node| {
        let because =
            Because::new(Reason::Bound, format!("bound to node {node}; its agent makes the volume"));
        (node, None, because)
    }))
}

/// Bound: its agent works. When the node is gone, the operator ends it.
async fn watch_node(
    transfer: &ImageTransfer,
    node: &str,
    old: &ImageTransferStatus,
    api: &Api<ImageTransfer>,
    context: &Context,
) -> Result<Requeue, OperatorError> {
    if context.node_health(node).await? == NodeHealth::Gone {
        let because = Because::new(Reason::NodeLost, format!("node {node} is gone"));
        let new = describe(old, Phase::Failed, &because, transfer.metadata.generation, clock::now());
        replace(api, transfer, new).await?;
        context.events.tell(transfer, true, "Transfer", &because).await;
    }
    Ok(Requeue::requeue(SAFETY_NET))
}

/// How many of a transfer's Secrets are looked for at most.
const SECRETS: usize = 16;

/// The Secrets that may be there of a transfer, the one that holds good first. The agent wrote its name: only one that it may
/// have made for this very transfer. One that did not live to write it, and lost all that it knew, made the first; one that
/// lost what it knew, or does not believe it, made a further one beside those before it. Pure.
fn secrets_of(uid: Option<String>, status: &ImageTransferStatus) -> Vec<String> {
    let Some(ours) = uid.map(|uid| format!("ticket-{uid}-")) else { return Vec::new() };
    let first = || status.node_name.as_ref().map(|_| format!("{ours}1"));
    let told = status.ticket_secret.clone().or_else(first).filter(|name| name.starts_with(&ours));
    let Some(told) = told else { return Vec::new() };
    let number = told.strip_prefix(&ours).and_then(|number| number.parse::<u32>().ok()).unwrap_or(0);
    let earlier = (1..number).rev().take(SECRETS - 1).map(|number| format!("{ours}{number}"));
    std::iter::once(told).chain(earlier).collect()
}

/// The ticket's Secrets go when its transfer ended: their URLs answer no more.
async fn delete_secrets(
    transfer: &ImageTransfer,
    status: &ImageTransferStatus,
    context: &Context,
) -> Result<(), OperatorError> {
    let secrets =
        Api::<Secret>::namespaced(context.client.clone(), &transfer.namespace().unwrap_or_default());
    for name in secrets_of(transfer.uid(), status) {
        if context.secrets_deleted.contains(&name) {
            continue;
        }
        // by its name alone: the operator reads no Secret, and nobody else's has the transfer's uid in its name
        cluster::delete(&secrets, &name, None).await?;
        context.secrets_deleted.insert(&name);
        tracing::info!(backup = status.backup_uid, transfer = transfer.uid(), "ticket Secret deleted");
        killpoint::reached(Step::SecretDeleted);
    }
    Ok(())
}

async fn part(
    transfer: &ImageTransfer,
    old: &ImageTransferStatus,
    api: &Api<ImageTransfer>,
    context: &Context,
) -> Result<Requeue, OperatorError> {
    let node = match &old.node_name {
        Some(node) => context.node_health(node).await?,
        None => NodeHealth::Up,
    };
    let deleted = transfer.metadata.deletion_timestamp.as_ref().map(|time| time.0);
    let bound = old.node_name.is_some();
    match parting(bound, is_host_clean(&old.conditions), node, deleted, clock::now()) {
        Parting::Wait => return Ok(Requeue::requeue(Duration::from_secs(5))),
        Parting::Abandon => {
            let message = "the agent did not answer: the ticket may still be open on its node";
            let because = Because::new(Reason::HostCleanupAbandoned, message);
            context.events.tell(transfer, true, "Delete", &because).await;
        }
        Parting::Clean => {}
    }
    delete_secrets(transfer, old, context).await?;
    cluster::release(api, transfer).await?;
    for name in secrets_of(transfer.uid(), old) {
        context.secrets_deleted.remove(&name);
    }
    Ok(Requeue::await_change())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn transfer(state: &str) -> ImageTransfer {
        serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "ImageTransfer",
            "metadata": {"name": "t", "namespace": "vms"},
            "spec": {"backup": "b", "disk": "vda", "state": state}}))
        .unwrap()
    }

    fn backup(status: serde_json::Value) -> VmBackup {
        serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmBackup",
            "metadata": {"name": "b", "namespace": "vms", "uid": "u"}, "spec": {"vm": "db01"}, "status": status}))
        .unwrap()
    }

    #[test]
    fn secrets_are_its_own_transfers_also_when_nobody_lived_to_tell_their_names() {
        let of = |status| secrets_of(Some("u".to_owned()), &serde_json::from_value(status).unwrap());
        assert!(of(json!({})).is_empty(), "no agent ever knew of one");
        assert_eq!(of(json!({"nodeName": "node-a"})), ["ticket-u-1"]);
        let told = |name: &str| of(json!({"nodeName": "node-a", "ticketSecret": name}));
        assert_eq!(told("ticket-u-3"), ["ticket-u-3", "ticket-u-2", "ticket-u-1"]);
        assert_eq!(told("ticket-u-x"), ["ticket-u-x"]);
        let many = told(&format!("ticket-u-{}", u32::MAX));
        assert_eq!((many.len(), many.last().unwrap().as_str()), (SECRETS, "ticket-u-4294967280"));
        assert!(told("ticket-v-1").is_empty(), "another's");
        assert!(told("db-password").is_empty());
    }

    #[test]
    fn waits_for_its_backup_and_fails_when_that_cannot_help() {
        let bound = backup(json!({"phase": "Ready", "nodeName": "node-a",
            "disks": [{"name": "vda", "mode": "Full", "inCheckpoint": true}]}));
        let other = backup(json!({"phase": "Ready", "nodeName": "node-a",
            "disks": [{"name": "vdb", "mode": "Full", "inCheckpoint": true}]}));
        let ended = backup(json!({"phase": "Failed", "nodeName": "node-a"}));
        let unbound = backup(json!({"phase": "Initializing"}));
        let cases = [
            ("no backup", "Running", None, Err((Phase::Initializing, Reason::BackupNotFound))),
            ("not bound", "Running", Some(&unbound), Err((Phase::Initializing, Reason::BackupNotReady))),
            ("bound", "Running", Some(&bound), Ok(())),
            ("ended", "Running", Some(&ended), Err((Phase::Failed, Reason::TransferFailed))),
            ("no such disk", "Running", Some(&other), Err((Phase::Failed, Reason::DiskNotFound))),
            ("cancelled", "Cancelled", Some(&bound), Err((Phase::Cancelled, Reason::Cancelled))),
        ];
        for (what, state, backup, expected) in cases {
            let found =
                resolve(&transfer(state), backup).map(drop).map_err(|(phase, why)| (phase, why.reason));
            assert_eq!(found, expected, "{what}");
        }
    }

    #[test]
    fn what_was_made_with_a_backup_goes_with_it() {
        let bound = backup(json!({"phase": "Ready", "nodeName": "node-a"}));
        let mut transfer = transfer("Running");
        assert!(!is_orphan(&transfer, None), "a user's own waits for its backup");
        for (what, label, backup, expected) in [
            ("made with this one", "u", Some(&bound), false),
            ("the name was used again", "old", Some(&bound), true),
            ("the backup is gone", "u", None, true),
        ] {
            transfer.labels_mut().insert(api::LABEL_BACKUP.to_owned(), label.to_owned());
            assert_eq!(is_orphan(&transfer, backup), expected, "{what}");
        }
    }
}
