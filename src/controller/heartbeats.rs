//! Reads now and then when each agent last renewed its Lease, for Prometheus. What the operator does about an agent that is
//! silent it asks for itself, when it matters.

use std::sync::PoisonError;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};

use super::Context;
use crate::api;

/// How often: a scrape is seldom more often.
const EVERY: Duration = Duration::from_secs(15);

/// A sign of life of an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// When, by the clock of the agent's node.
    pub at: Timestamp,
    /// For how long it holds.
    pub lasts: SignedDuration,
}

impl Heartbeat {
    /// The last one that a Lease tells of; `None` when nobody ever renewed it.
    pub fn of(lease: &Lease) -> Option<Self> {
        let spec = lease.spec.as_ref()?;
        let lasts = SignedDuration::from_secs(spec.lease_duration_seconds.unwrap_or_default().into());
        Some(Self { at: spec.renew_time.as_ref()?.0, lasts })
    }

    /// Whether it holds. The nodes' clocks must agree better than a lease lasts.
    pub fn holds(&self, now: Timestamp) -> bool {
        now.duration_since(self.at) <= self.lasts
    }
}

/// Reads them, for ever.
pub async fn follow(context: &Context) {
    let leases = Api::<Lease>::namespaced(context.client.clone(), &context.system_namespace);
    // of a node without a name
    let prefix = api::agent_lease("");
    loop {
        match leases.list(&ListParams::default()).await {
            Ok(list) => {
                let renewed = list.iter().filter_map(|lease| {
                    let node = lease.name_any().strip_prefix(&prefix)?.to_owned();
                    Some((node, Heartbeat::of(lease)?))
                });
                let renewed = renewed.collect();
                *context.heartbeats.lock().unwrap_or_else(PoisonError::into_inner) = renewed;
            }
            Err(error) => tracing::warn!(%error, "the agents' Leases cannot be read"),
        }
        tokio::time::sleep(EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_holds_until_it_was_not_renewed_in_time() {
        let lease: Lease =
            serde_json::from_value(serde_json::json!({"metadata": {"name": "virtmark-agent-a"},
            "spec": {"leaseDurationSeconds": 40, "renewTime": "2026-11-25T00:00:00.000000Z"}}))
            .unwrap();
        let holds = |text: &str| Heartbeat::of(&lease).unwrap().holds(text.parse().unwrap());
        assert!(holds("2026-11-24T23:59:59Z"), "a clock that is behind");
        assert!(holds("2026-11-25T00:00:40Z"));
        assert!(!holds("2026-11-25T00:00:41Z"));
        assert_eq!(Heartbeat::of(&Lease::default()), None, "nobody ever renewed it");
    }
}
