//! What the agent's reconcilers share, and the few things that more than one of them does.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::ListParams;
use kube::{Api, Client};

use super::backup::act::{Host, HostError};
use super::certificate::Certificate;
use super::cordon::Cordon;
use super::health::Health;
use super::registry::{Live, Registry};
use super::state::{Record, StateError};
use super::survey::{AFTER_BACKUP, Survey};
use super::transfer::StoredTicket;
use super::upload::Uploads;
use crate::api::DomainSighting;
use crate::cluster::Events;
use crate::imageio::{self, Coverage, Drained, End, SharedCoverage, Tickets};
use crate::libvirt::{LibvirtError, xml};
use crate::nbd::{Export, NbdError};

/// How long an ended ticket's requests may take to notice.
pub(super) const DRAIN: Duration = Duration::from_secs(10);

/// What a reconciler could not do.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The API server said no, or nothing.
    #[error("the Kubernetes API: {0}")]
    Api(#[source] Box<kube::Error>),
    /// The state directory cannot be used.
    #[error("the state directory: {0}")]
    State(#[from] StateError),
    /// The host cannot be asked.
    #[error(transparent)]
    Host(#[from] HostError),
    /// libvirt cannot be asked.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// The export cannot be read.
    #[error("the NBD export of disk {disk}: {source}")]
    Export {
        /// Which disk.
        disk: String,
        /// Why.
        source: NbdError,
    },
    /// The checkpoint that the operator made is not there.
    #[error("VmCheckpoint {0} does not exist")]
    NoCheckpoint(String),
    /// The operating system gave no random bytes.
    #[error("no random bytes for a ticket: {0}")]
    Random(#[source] std::io::Error),
    /// A ticket ended, and what it permitted to write may be written still.
    #[error(
        "what was written with the ticket of a transfer is not all answered for: {0:?}; its end waits for the storage"
    )]
    Written(Drained),
    /// A blocking thread died.
    #[error("a host action did not come back")]
    Lost,
}

impl From<kube::Error> for AgentError {
    fn from(error: kube::Error) -> Self {
        Self::Api(Box::new(error))
    }
}

impl AgentError {
    /// What went wrong, in a word, for metrics.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Api(_) if self.is_conflict() => "conflict",
            Self::Api(_) if self.is_not_found() => "not_found",
            Self::Api(_) => "api",
            Self::State(_) => "state_directory",
            Self::Host(_) => "host",
            Self::Libvirt(_) => "libvirt",
            Self::Export { .. } => "nbd",
            Self::NoCheckpoint(_) => "no_checkpoint",
            Self::Random(_) => "random",
            Self::Written(_) => "written",
            Self::Lost => "lost",
        }
    }

    /// The object changed while its status was computed: compute again at once.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Api(error) if matches!(&**error, kube::Error::Api(status) if status.is_conflict()))
    }

    /// The object is gone. Where its kind is, that is tried again: it may come back.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Api(error) if matches!(&**error, kube::Error::Api(status) if status.is_not_found()))
    }
}

/// What the reconcilers share.
pub struct Context {
    /// The Kubernetes API.
    pub client: Client,
    /// This node's name.
    pub node: String,
    /// The operator's namespace, where the sightings are.
    pub system_namespace: String,
    /// Since when the node is cordoned.
    pub cordon: Cordon,
    /// How long a backup may go on after that.
    pub drain_grace: SignedDuration,
    /// libvirt and the agent's directories.
    pub host: Host,
    /// The backups of this node.
    pub(super) registry: Registry,
    /// What is known of the domains' bitmaps.
    pub(super) survey: Survey,
    /// Whether it can do its work, and what it counted.
    pub health: Arc<Health>,
    /// The image server's tickets.
    pub tickets: Tickets,
    /// The volumes that are being uploaded.
    pub(super) uploads: Uploads,
    /// Events in this agent's name.
    pub events: Events,
    /// `host:port` that clients are told.
    pub advertised: String,
    /// Path of the image server's unix socket.
    pub unix_socket: String,
    /// What the image server proves itself with.
    pub(super) certificate: Certificate,
}

impl Context {
    /// Runs a blocking call off the async threads.
    ///
    /// # Errors
    /// The call's own, or [`AgentError::Lost`] when it died.
    pub async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, AgentError> {
        Ok(tokio::task::spawn_blocking(call).await.map_err(|_| AgentError::Lost)??)
    }

    /// The nodes that say that a domain runs there.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    pub async fn told_by(&self, vm_uuid: &str) -> Result<Vec<String>, AgentError> {
        let sightings = Api::<DomainSighting>::namespaced(self.client.clone(), &self.system_namespace);
        let seen =
            sightings.list(&ListParams::default()).await?.items.into_iter().map(|sighting| sighting.spec);
        let active = seen.filter(|seen| seen.uuid == vm_uuid && seen.state.is_active());
        Ok(active.map(|seen| seen.node_name).collect())
    }

    /// The NBD export of a disk of a backup that runs.
    ///
    /// # Errors
    /// When the record's uid is none.
    pub fn export(&self, record: &Record, disk: &str) -> Result<Export, AgentError> {
        let socket = self.host.state.socket_of(&record.uid)?;
        let incremental = record.disks.iter().find(|planned| planned.target == disk && planned.incremental);
        let bitmap = incremental.map(|_| xml::dirty_context(disk));
        // all of it while that is not known
        let changed_from = incremental.map(|planned| planned.changed_from.unwrap_or(0));
        Ok(Export { socket, name: disk.to_owned(), bitmap, changed_from })
    }

    /// The coverage of a disk: what was stored of it, or nothing served yet.
    pub fn coverage(&self, live: &Live, record: &Record, disk: &str) -> Arc<SharedCoverage> {
        let size =
            record.disks.iter().find(|planned| planned.target == disk).map_or(0, |planned| planned.size);
        live.coverage(disk, || {
            let stored = self.host.state.coverage(&record.uid, disk);
            let kept = stored.and_then(|bytes| Coverage::decode(&bytes, size).ok());
            kept.unwrap_or_else(|| Coverage::new(size))
        })
    }

    /// Counts the bytes of a disk that must be read and were not.
    ///
    /// # Errors
    /// When the export cannot be read.
    pub async fn unread(&self, live: &Live, record: &Record, disk: &str) -> Result<u64, AgentError> {
        let coverage = self.coverage(live, record, disk);
        let export = self.export(record, disk)?;
        let unread = imageio::missing(&export, &coverage).await;
        unread.map_err(|source| AgentError::Export { disk: disk.to_owned(), source })
    }

    /// Counts them, and notes how many.
    ///
    /// # Errors
    /// When the export cannot be read.
    pub async fn count_missing(&self, live: &Live, record: &Record, disk: &str) -> Result<(), AgentError> {
        live.count_missing(disk, self.unread(live, record, disk).await?);
        Ok(())
    }

    /// When a client last asked for something of this backup, as far as its tickets tell.
    pub fn last_request(&self, live: &Live, now: Timestamp) -> Option<Timestamp> {
        for transfer in live.tickets() {
            if let Some(stats) = self.tickets.stats(&transfer).filter(|stats| stats.ever_used)
                && let Ok(idle) = SignedDuration::try_from(stats.idle)
                && let Ok(when) = now.checked_sub(idle)
            {
                live.requested(when);
            }
        }
        live.last_request()
    }

    /// Stores what was served of each disk: what is not stored counts as unread after a crash. Whether all is stored.
    pub fn store_coverage(&self, uid: &str, live: &Live) -> bool {
        let mut stored = true;
        for (disk, encoded) in live.to_store() {
            if let Err(error) = self.host.state.store_coverage(uid, &disk, &encoded) {
                tracing::warn!(backup = uid, disk, %error, "coverage was not stored");
                live.not_stored(&disk);
                stored = false;
            }
        }
        stored
    }

    /// Ends every ticket of a backup, and waits a little for their requests.
    pub async fn end_tickets(&self, uid: &str) {
        let stored = self.host.state.tickets::<StoredTicket>(uid).unwrap_or_default();
        for (transfer, _) in stored {
            self.tickets.end(&transfer, End::Removed);
            if self.tickets.drained(&transfer, DRAIN).await != Drained::Over {
                tracing::warn!(backup = uid, transfer, "requests on an ended ticket go on");
            }
        }
    }

    /// Forgets what the state directory has of a backup that ended. Its transfers still ask the registry
    /// how it ended; the sweep forgets it there.
    pub fn release(&self, uid: &str) {
        self.registry.unclaim(uid);
        self.health.forget_freeze(uid);
        if let Some(live) = self.registry.find(uid) {
            live.released.store(true, Ordering::Relaxed);
            self.survey.ask(&live.vm_uuid, AFTER_BACKUP);
        }
        if let Err(error) = self.host.state.forget(uid) {
            tracing::warn!(backup = uid, %error, "the record of an ended backup was not removed");
        }
    }

    /// Looks at a backup again.
    pub fn wake_backup(&self, uid: &str) {
        self.registry.wake(uid);
    }

    /// The backup with this uid, if it lives here.
    pub(super) fn live(&self, uid: &str) -> Option<Arc<Live>> {
        self.registry.find(uid)
    }
}
