//! Whether this agent can do its work, for probes and Prometheus: libvirt and the state directory are asked now and then, the
//! API server and the image server tell by what they do.
//!
//! What does not answer is asked once, and not again while it does not: a stuck libvirt costs one thread, however often
//! somebody probes.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

use super::Context;
use super::backup::act::HostError;
use super::metrics::{self, Facts};
use super::state::Record;
use crate::clock;
use crate::imageio::Meter;
use crate::metrics::{By, Metrics, Sample};
use crate::probe::{Check, Sign, Subject};

/// How often libvirt and the state directory are asked.
const ASK: Duration = Duration::from_secs(5);
/// For how long an answer holds.
const HOLDS: Duration = Duration::from_secs(20);

/// What is known of this agent's health, and what it counted.
pub struct Health {
    /// What it counted.
    pub metrics: Arc<Metrics>,
    /// What its image server counted.
    pub(super) meter: Arc<Meter>,
    /// It works alone with its state directory.
    pub(super) alone: Sign,
    pub(super) libvirt: Sign,
    pub(super) state: Sign,
    pub(super) api: Sign,
    pub(super) images: Sign,
    pub(super) certificate: Sign,
    /// Since when guests are, or may be, frozen, by their backups' uids.
    frozen: Mutex<HashMap<String, Timestamp>>,
    context: OnceLock<Arc<Context>>,
}

impl Health {
    /// Nothing known yet, of an agent whose heartbeat holds for so long.
    pub fn new(heartbeat: Duration) -> Arc<Self> {
        Arc::new(Self {
            metrics: Arc::new(Metrics::new(By::Agent)),
            meter: Arc::default(),
            alone: Sign::new("state-directory-lock", Duration::MAX),
            libvirt: Sign::new("libvirt", HOLDS),
            state: Sign::new("state-directory", HOLDS),
            api: Sign::new("kubernetes-api", heartbeat),
            images: Sign::new("image-server", Duration::MAX),
            certificate: Sign::new("certificate", Duration::MAX),
            frozen: Mutex::default(),
            context: OnceLock::new(),
        })
    }

    fn frozen(&self) -> MutexGuard<'_, HashMap<String, Timestamp>> {
        self.frozen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes whether the guest of a backup is, or may be, frozen.
    pub(super) fn note_freeze(&self, record: &Record) {
        let mut frozen = self.frozen();
        if record.life.held.frozen {
            frozen.entry(record.uid.clone()).or_insert(record.life.frozen_at.unwrap_or_else(clock::now));
        } else if frozen.remove(&record.uid).is_some()
            && let Some(took) = record.life.frozen_milliseconds()
        {
            self.metrics.thawed(Duration::from_millis(u64::try_from(took).unwrap_or_default()));
        }
    }

    /// Nothing of a backup is on the host any more, no freeze either.
    pub(super) fn forget_freeze(&self, uid: &str) {
        self.frozen().remove(uid);
    }

    fn longest_frozen(&self, now: Timestamp) -> f64 {
        let since = self.frozen().values().min().copied();
        since.map_or(0.0, |since| now.duration_since(since).as_secs_f64().max(0.0))
    }
}

/// Asks libvirt and the state directory now and then, for ever.
pub(super) async fn watch(context: &Arc<Context>) {
    let health = &context.health;
    // only the first call finds it empty
    let _ = health.context.set(Arc::clone(context));
    let libvirt = async {
        loop {
            let host = context.host.clone();
            health.libvirt.note(&context.blocking(move || Ok::<_, HostError>(host.libvirt.ping()?)).await);
            tokio::time::sleep(ASK).await;
        }
    };
    let state = async {
        loop {
            let host = context.host.clone();
            health.state.note(&context.blocking(move || Ok::<_, HostError>(host.state.ping()?)).await);
            tokio::time::sleep(ASK).await;
        }
    };
    tokio::join!(libvirt, state);
}

impl Subject for Health {
    fn checks(&self) -> Vec<Check> {
        [&self.alone, &self.libvirt, &self.state, &self.api, &self.images, &self.certificate]
            .map(Sign::check)
            .to_vec()
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    async fn samples(&self) -> Vec<Sample> {
        let Some(context) = self.context.get() else { return Vec::new() };
        let host = context.host.clone();
        let scratch = context.blocking(move || Ok::<_, HostError>(host.state.scratch_usage()?)).await.ok();
        metrics::samples(&Facts {
            on_host: context
                .registry
                .all()
                .iter()
                .filter(|(_, live)| !live.released.load(Ordering::Relaxed))
                .count(),
            longest_frozen: self.longest_frozen(clock::now()),
            libvirt_up: self.libvirt.check().wrong.is_none(),
            scratch,
            scratch_limit: context.host.scratch_limit,
            tickets: context.tickets.count(),
            meter: &self.meter,
        })
    }
}
