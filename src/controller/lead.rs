//! One operator of several leads: the holder of a Lease works, the others wait.
//!
//! ```text
//!   waiting --lease is ours--> leading --lease is another's, or cannot be renewed--> waiting
//! ```
//!
//! One that is told to stop gives the lease up, and another one that waits sees that within a second.
//!
//! A lease does not fence: one who lost it may still have a write on its way. What keeps two apart is the
//! resourceVersion of every write, deterministic names, and libvirt's one job a domain; the lease only keeps them
//! from doing everything twice.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client};
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder, LeaseManagerError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::role::Role;

/// The name of the Lease.
pub(super) const LEASE: &str = "virtmark-operator";

/// How soon to ask again when the API server does not answer.
const AGAIN: Duration = Duration::from_millis(500);

/// How often one that waits looks whether the lease was given up.
const LOOK: Duration = Duration::from_secs(1);

/// Who wants to lead, and for how long a lease holds.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its name, of its own: the pod's.
    pub identity: String,
    /// The namespace of the Lease.
    pub namespace: String,
    /// Seconds after which a lease that was not renewed is free.
    pub seconds: u32,
}

impl Candidate {
    /// It renews this long before the lease is free: the time it has to notice that it cannot.
    fn grace(&self) -> Duration {
        Duration::from_secs(u64::from(self.seconds) * 2 / 3)
    }

    async fn manager(&self, client: &Client) -> Result<LeaseManager, LeaseManagerError> {
        LeaseManagerBuilder::new(client.clone(), LEASE)
            .with_namespace(&self.namespace)
            .with_identity(&self.identity)
            .with_duration(self.seconds.into())
            .with_grace(self.grace().as_secs())
            .build()
            .await
    }
}

/// Does `work` whenever the lease is held, until `stop`; it is dropped where it stands when the lease is lost.
///
/// # Errors
/// When `work` ends by itself.
pub async fn lead<W: Future<Output = ()>>(
    client: &Client,
    candidate: &Candidate,
    stop: &CancellationToken,
    role: &Role,
    work: impl Fn() -> W,
) -> anyhow::Result<()> {
    loop {
        let manager = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            manager = candidate.manager(client) => manager,
        };
        let lost = async {
            match &manager {
                Ok(manager) => hold(client, manager, candidate, role, &work).await,
                Err(error) => {
                    tracing::warn!(%error, "the lease cannot be asked for");
                    tokio::time::sleep(AGAIN).await;
                    Ok(())
                }
            }
        };
        tokio::select! {
            ended = lost => ended?,
            () = stop.cancelled() => {
                if let Ok(manager) = &manager {
                    // whoever waits need not wait until it runs out
                    let _ = tokio::time::timeout(AGAIN, manager.release()).await;
                }
                return Ok(());
            }
        }
    }
}

/// Waits for the lease, and does `work` until it is lost.
async fn hold<W: Future<Output = ()>>(
    client: &Client,
    manager: &LeaseManager,
    candidate: &Candidate,
    role: &Role,
    work: impl Fn() -> W,
) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            held = asked(manager, candidate) => if held { break },
            // the manager sleeps until the lease that it saw runs out: another one asks at once
            () = given_up(client, candidate, role) => return Ok(()),
        }
    }
    role.leads();
    tracing::info!(identity = candidate.identity, "leads");
    tokio::select! {
        () = work() => anyhow::bail!("a controller ended"),
        _ = asked(manager, candidate) => tracing::warn!(identity = candidate.identity, "leads no more"),
    }
    role.starts_over();
    Ok(())
}

/// Waits until the lease is nobody's.
async fn given_up(client: &Client, candidate: &Candidate, role: &Role) {
    let leases = Api::<Lease>::namespaced(client.clone(), &candidate.namespace);
    loop {
        tokio::time::sleep(LOOK).await;
        // who cannot ask cannot lead either: the manager says so
        let lease = leases.get_opt(LEASE).await;
        role.api.note(&lease);
        let Ok(lease) = lease else { continue };
        role.waits();
        let holder = lease.and_then(|lease| lease.spec?.holder_identity);
        if holder.is_none_or(|holder| holder.is_empty()) {
            return;
        }
    }
}

/// Whether the lease is ours, once that changed. Failing to learn it for as long as the lease lasts is a no.
async fn asked(manager: &LeaseManager, candidate: &Candidate) -> bool {
    let mut failing: Option<(Instant, Instant)> = None;
    loop {
        match manager.changed().await {
            Ok(held) => return held,
            Err(error) => {
                let now = Instant::now();
                // renewals that worked lie between two errors that are far apart
                let since = failing
                    .filter(|(_, last)| now - *last < candidate.grace())
                    .map_or(now, |(since, _)| since);
                failing = Some((since, now));
                if now - since >= candidate.grace() {
                    tracing::warn!(%error, "the lease cannot be renewed");
                    return false;
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}
