//! What the operator's reconcilers share.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::channel::mpsc::UnboundedSender;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::ListParams;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Client, Resource, ResourceExt as _};

use super::backup::resolve::NodeHealth;
use super::heartbeats::Heartbeat;
use super::metrics::Vm;
use super::nodes;
use super::tenancy::{Tenancy, TenancyError};
use crate::api::conditions;
use crate::api::{self, DomainSighting, ImageTransfer, LibvirtDomain, VmBackup, VmCheckpoint};
use crate::clock;
use crate::cluster::Events;
use crate::metrics::Metrics;
use crate::x509::X509Error;

/// How long a deletion waits for an agent before the finalizer is released all the same.
pub const ABANDON: SignedDuration = SignedDuration::from_secs(120);

/// What a reconciler could not do.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The API server said no, or nothing.
    #[error("the Kubernetes API: {0}")]
    Api(#[source] Box<kube::Error>),
    /// The CA cannot be read.
    #[error(
        "Secret virtmark-ca: {0}; delete it to have another CA made, whose certificates agents ask for at once"
    )]
    Authority(#[source] X509Error),
    /// A certificate cannot be made.
    #[error(transparent)]
    Certificate(#[from] X509Error),
}

impl From<kube::Error> for OperatorError {
    fn from(error: kube::Error) -> Self {
        Self::Api(Box::new(error))
    }
}

impl OperatorError {
    fn status(&self) -> Option<&kube::core::Status> {
        match self {
            Self::Api(error) => match &**error {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            Self::Authority(_) | Self::Certificate(_) => None,
        }
    }

    /// What went wrong, in a word, for metrics.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Api(_) if self.is_conflict() => "conflict",
            Self::Api(_) if self.is_not_found() => "not_found",
            Self::Api(_) => "api",
            Self::Authority(_) | Self::Certificate(_) => "certificate",
        }
    }

    /// The object changed while its status was computed: compute again at once.
    pub fn is_conflict(&self) -> bool {
        self.status().is_some_and(|status| status.is_conflict())
    }

    /// The object is gone. Where its kind is, that is tried again: it may come back.
    pub fn is_not_found(&self) -> bool {
        self.status().is_some_and(|status| status.is_not_found())
    }
}

/// Selects the VmBackups, or VmCheckpoints, of the VM with this name.
pub fn of_vm(vm: &str) -> ListParams {
    ListParams::default().fields(&format!("spec.vm={vm}"))
}

/// What the reconcilers share.
pub struct Context {
    /// The Kubernetes API.
    pub client: Client,
    /// Events in the operator's name.
    pub events: Events,
    /// The first 8 hex digits of the cluster's id (the uid of namespace kube-system).
    pub cluster: String,
    /// The operator's namespace.
    pub system_namespace: String,
    /// The file that says what namespaces may do beyond backing up.
    pub tenancy: Option<PathBuf>,
    /// Held from the check that no other backup of a VM runs until one is bound.
    pub binding: tokio::sync::Mutex<()>,
    /// Held while the agents' CA is read, made and published.
    pub(super) publishing: tokio::sync::Mutex<()>,
    pub(super) backups: Store<VmBackup>,
    pub(super) transfers: Store<ImageTransfer>,
    pub(super) checkpoints: Store<VmCheckpoint>,
    pub(super) sightings: Store<DomainSighting>,
    pub(super) wake_backup: UnboundedSender<ObjectRef<VmBackup>>,
    pub(super) wake_transfer: UnboundedSender<ObjectRef<ImageTransfer>>,
    pub(super) wake_checkpoint: UnboundedSender<ObjectRef<VmCheckpoint>>,
    /// What was counted.
    pub metrics: Arc<Metrics>,
    /// The VMs as they were last published.
    pub(super) published: Mutex<Vec<Vm>>,
    /// The last sign of life of each node's agent.
    pub(super) heartbeats: Mutex<BTreeMap<String, Heartbeat>>,
    /// The Nodes, watched.
    pub(super) nodes: nodes::Nodes,
    /// Wakes the inventory: a node came, went, or changed its health; a checkpoint came or went.
    pub(super) inventory: tokio::sync::Notify,
    pub(super) failures: Failures,
    pub(super) secrets_deleted: Names,
}

impl Context {
    /// Looks again at everything that waits for the VM `vm`: its backups, its checkpoints.
    pub fn wake_vm(&self, namespace: &str, vm: &str) {
        let of_vm = |of: &str, in_: Option<String>| of == vm && in_.as_deref() == Some(namespace);
        for backup in self.backups.state() {
            let unfinished = !backup.status.as_ref().is_some_and(|status| status.phase.is_terminal());
            if unfinished && of_vm(&backup.spec.vm, backup.namespace()) {
                // a closed channel means that the operator is shutting down, here and below
                let _ = self.wake_backup.unbounded_send(ObjectRef::from_obj(&*backup));
            }
        }
        for checkpoint in self.checkpoints.state() {
            if of_vm(&checkpoint.spec.vm, checkpoint.namespace()) {
                let _ = self.wake_checkpoint.unbounded_send(ObjectRef::from_obj(&*checkpoint));
            }
        }
    }

    /// Notes the VMs that are published, for metrics.
    pub(super) fn note_published(&self, domains: &[LibvirtDomain]) {
        *self.published.lock().unwrap_or_else(PoisonError::into_inner) = domains.iter().map(Vm::of).collect();
    }

    /// Looks again at a checkpoint.
    pub fn wake_checkpoint(&self, checkpoint: &VmCheckpoint) {
        // a closed channel means that the operator is shutting down
        let _ = self.wake_checkpoint.unbounded_send(ObjectRef::from_obj(checkpoint));
    }

    /// Looks again at the transfers that name a backup.
    pub fn wake_transfers(&self, namespace: &str, backup: &str) {
        for transfer in self.transfers.state() {
            if transfer.spec.backup() == backup && transfer.namespace().as_deref() == Some(namespace) {
                let _ = self.wake_transfer.unbounded_send(ObjectRef::from_obj(&*transfer));
            }
        }
    }

    /// Looks again at everything: a node changed.
    pub fn wake_all(&self) {
        self.inventory.notify_one();
        for backup in self.backups.state() {
            let _ = self.wake_backup.unbounded_send(ObjectRef::from_obj(&*backup));
        }
        for transfer in self.transfers.state() {
            let _ = self.wake_transfer.unbounded_send(ObjectRef::from_obj(&*transfer));
        }
        for checkpoint in self.checkpoints.state() {
            let _ = self.wake_checkpoint.unbounded_send(ObjectRef::from_obj(&*checkpoint));
        }
    }

    /// Whether a node can be worked on.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    pub async fn node_health(&self, name: &str) -> Result<NodeHealth, OperatorError> {
        if let Some(health) = self.nodes.health(name) {
            return Ok(health);
        }
        let node = Api::<Node>::all(self.client.clone()).get_opt(name).await?;
        Ok(node.map_or(NodeHealth::Gone, |node| nodes::health(&node)))
    }

    /// What namespaces may do beyond backing up, as the admin's file says now.
    ///
    /// # Errors
    /// When it cannot be read, or says anything else.
    pub async fn tenancy(&self) -> Result<Tenancy, TenancyError> {
        let path = self.tenancy.as_deref();
        let read = match path {
            Some(path) => tokio::fs::read_to_string(path).await,
            None => Ok(String::new()),
        };
        Tenancy::said(path, read)
    }

    /// Whether the agent of a node says that it lives.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    pub async fn agent_answers(&self, node: &str) -> Result<bool, OperatorError> {
        let leases = Api::<Lease>::namespaced(self.client.clone(), &self.system_namespace);
        let lease = leases.get_opt(&api::agent_lease(node)).await?;
        let heartbeat = lease.as_ref().and_then(Heartbeat::of);
        Ok(heartbeat.is_some_and(|heartbeat| heartbeat.holds(clock::now())))
    }
}

/// Whether an object that is being deleted may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// Nothing of it is on a host.
    Clean,
    /// Its agent is still at it.
    Wait,
    /// Its agent did not answer in time, or its node is gone: something may be left.
    Abandon,
}

/// Whether an object that is being deleted may go. Pure.
pub fn parting(
    bound: bool,
    host_clean: bool,
    node: NodeHealth,
    deleted: Option<Timestamp>,
    now: Timestamp,
) -> Parting {
    if !bound || host_clean {
        return Parting::Clean;
    }
    let overdue = deleted.is_some_and(|since| now.duration_since(since) >= ABANDON);
    if node == NodeHealth::Gone || overdue { Parting::Abandon } else { Parting::Wait }
}

/// Whether the agent said that nothing is left on its host.
pub fn is_host_clean(conditions: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition]) -> bool {
    conditions::is_true(conditions, conditions::HOST_CLEAN)
}

/// Names of what was done already, so that it is not asked for again.
#[derive(Default)]
pub struct Names(Mutex<HashSet<String>>);

impl Names {
    fn names(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `name` was done.
    pub fn contains(&self, name: &str) -> bool {
        self.names().contains(name)
    }

    /// `name` was done.
    pub fn insert(&self, name: &str) {
        self.names().insert(name.to_owned());
    }

    /// `name` is of no interest any more.
    pub fn remove(&self, name: &str) {
        self.names().remove(name);
    }
}

/// How often each object failed in a row, for a pause that grows.
#[derive(Default)]
pub struct Failures(Mutex<HashMap<String, u32>>);

impl Failures {
    /// One more: the pause before the next try.
    pub fn again<K: Resource>(&self, object: &K) -> Duration {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(object.uid().unwrap_or_default()).or_default();
        *count = count.saturating_add(1).min(9);
        Duration::from_millis(500 << *count).min(Duration::from_secs(120))
    }

    /// It went well.
    pub fn clear<K: Resource>(&self, object: &K) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.remove(&object.uid().unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finalizer_never_wedges() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let (up, gone) = (NodeHealth::Up, NodeHealth::Gone);
        let cases = [
            ("never bound", parting(false, false, up, Some(at(0)), at(0)), Parting::Clean),
            ("the agent cleaned", parting(true, true, up, Some(at(0)), at(0)), Parting::Clean),
            ("the agent is at it", parting(true, false, up, Some(at(0)), at(119)), Parting::Wait),
            (
                "the agent is not Ready",
                parting(true, false, NodeHealth::NotReady, Some(at(0)), at(1)),
                Parting::Wait,
            ),
            ("the agent is silent", parting(true, false, up, Some(at(0)), at(120)), Parting::Abandon),
            ("the node is gone", parting(true, false, gone, Some(at(0)), at(0)), Parting::Abandon),
            ("gone, but it was clean", parting(true, true, gone, Some(at(0)), at(0)), Parting::Clean),
        ];
        for (what, found, expected) in cases {
            assert_eq!(found, expected, "{what}");
        }
    }
}
