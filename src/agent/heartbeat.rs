//! Tells, by a Lease of its own, that this node's agent lives: the operator binds nothing to one that does not.
//!
//! It tells that the agent reaches the API server, and no more: what libvirt says is in the sightings.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, Patch, PatchParams};
use kube::{Api, Client};

use crate::api;
use crate::clock;
use crate::cluster;
use crate::probe::Sign;

/// A lease holds for this many beats, so that one that is late is not missed.
pub const BEATS: u16 = 4;

/// Renews the Lease of `node` every `seconds`, until the API server's store was put back to an earlier state. Each answer is a
/// sign of the API server.
pub async fn beat(client: Client, namespace: &str, node: &str, seconds: u16, sign: &Sign) {
    let leases = Api::<Lease>::namespaced(client, namespace);
    let params = PatchParams::apply(api::AGENT).force();
    loop {
        let lease = lease(node, seconds, clock::now());
        let name = api::agent_lease(node);
        let asked = cluster::Asked::now();
        let renewed = leases.patch(&name, &params, &Patch::Apply(&lease)).await;
        sign.note(&renewed);
        let beat = Duration::from_secs(seconds.into());
        // one that failed is tried again soon: a store that was put back is known by what it says before others have written much
        let pause = if renewed.is_ok() { beat } else { beat / 4 };
        match renewed {
            Ok(lease) if asked.went_back(lease.metadata.resource_version.as_deref()) => return,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "the agent's Lease was not renewed: nothing new is bound to this node meanwhile");
            }
        }
        tokio::time::sleep(pause).await;
    }
}

fn lease(node: &str, seconds: u16, now: Timestamp) -> Lease {
    let metadata = ObjectMeta { name: Some(api::agent_lease(node)), ..ObjectMeta::default() };
    let spec = LeaseSpec {
        holder_identity: Some(node.to_owned()),
        lease_duration_seconds: Some(i32::from(seconds) * i32::from(BEATS)),
        renew_time: Some(MicroTime(now)),
        ..LeaseSpec::default()
    };
    Lease { metadata, spec: Some(spec) }
}
