//! What this operator is among several, for probes and Prometheus: on its way, one that waits, or the one that leads.
//!
//! ```text
//!   starting --the lease is another's--> waiting --it is ours--> leading, caches fill --> leading
//!      ^                                                                                     |
//!      +------------------------------- the lease is lost -----------------------------------+
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::Context;
use super::metrics::{self, Facts};
use crate::clock;
use crate::metrics::{By, Metrics, Sample};
use crate::probe::{Check, Sign, Subject};

/// For how long an answer of the API server holds: it is asked something each five seconds, or more often.
const HOLDS: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug)]
enum Standing {
    Starting,
    /// For the lease, which is another's.
    Waiting,
    /// Leads; whether its caches are full.
    Leading(bool),
}

/// What this operator is, and what it counted.
pub struct Role {
    /// What it counted.
    pub metrics: Arc<Metrics>,
    /// The API server answers.
    pub(super) api: Sign,
    standing: Mutex<Standing>,
    /// What it works with, while it does.
    context: Mutex<Weak<Context>>,
}

impl Role {
    /// Starting.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            metrics: Arc::new(Metrics::new(By::Operator)),
            api: Sign::new("kubernetes-api", HOLDS),
            standing: Mutex::new(Standing::Starting),
            context: Mutex::default(),
        })
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lease is another's, and it waits for it.
    pub(super) fn waits(&self) {
        *self.standing() = Standing::Waiting;
    }

    /// The lease is its own.
    pub(super) fn leads(&self) {
        self.api.good();
        *self.standing() = Standing::Leading(false);
    }

    /// The lease is lost.
    pub(super) fn starts_over(&self) {
        *self.standing() = Standing::Starting;
    }

    /// It works with this.
    pub(super) fn works_with(&self, context: &Arc<Context>) {
        *self.context.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(context);
    }

    /// Its caches are full.
    pub(super) fn is_synced(&self) {
        let mut standing = self.standing();
        if matches!(*standing, Standing::Leading(_)) {
            *standing = Standing::Leading(true);
        }
    }
}

impl Subject for Role {
    fn checks(&self) -> Vec<Check> {
        let (lease, caches) = match *self.standing() {
            Standing::Starting => (Some("it was not asked for yet".to_owned()), None),
            Standing::Waiting | Standing::Leading(true) => (None, None),
            Standing::Leading(false) => (None, Some("they are being filled".to_owned())),
        };
        vec![self.api.check(), Check { name: "lease", wrong: lease }, Check { name: "caches", wrong: caches }]
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    async fn samples(&self) -> Vec<Sample> {
        let Standing::Leading(synced) = *self.standing() else { return metrics::standby() };
        // half of what exists would look like a loss
        let context = self.context.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        let Some(context) = context.filter(|_| synced) else { return metrics::unsynced() };
        let vms = context.published.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let heartbeats = context.heartbeats.lock().unwrap_or_else(PoisonError::into_inner).clone();
        metrics::samples(&Facts {
            vms: &vms,
            backups: &context.backups.state(),
            transfers: &context.transfers.state(),
            checkpoints: &context.checkpoints.state(),
            heartbeats: &heartbeats,
            now: clock::now(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_ready(role: &Role) -> bool {
        role.checks().iter().all(|check| check.wrong.is_none())
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_ready_as_a_leader_with_full_caches_or_as_one_that_could_become_it() {
        let role = Role::new();
        role.api.good();
        assert!(!is_ready(&role), "starting");
        role.is_synced();
        assert!(!is_ready(&role), "late word of an earlier time as the leader");
        role.waits();
        assert!(is_ready(&role));
        role.leads();
        assert!(!is_ready(&role), "its caches are empty");
        role.is_synced();
        assert!(is_ready(&role));
        tokio::time::advance(HOLDS + Duration::from_secs(1)).await;
        assert!(!is_ready(&role), "the API server does not answer");
        role.api.good();
        assert!(is_ready(&role));
        role.starts_over();
        assert!(!is_ready(&role), "the lease is lost");
    }
}
