//! Uploads: whether the namespace may make the volume, and whether its node can. It knows no libvirt; the agent does the work.

use kube::ResourceExt as _;

use super::backup::resolve::NodeHealth;
use super::tenancy::{Tenancy, TenancyError};
use crate::api::{ImageTransfer, NewVolume, Phase, TransferState};
use crate::reason::{Because, Reason};

/// Where an upload that is not bound yet goes: the node, or what it waits for or failed by. Pure.
///
/// `answers`: whether the node's agent says that it lives.
pub fn place(
    transfer: &ImageTransfer,
    volume: &NewVolume,
    tenancy: &Result<Tenancy, TenancyError>,
    node: NodeHealth,
    answers: bool,
) -> Result<String, (Phase, Because)> {
    let wait = |reason, message: String| Err((Phase::Initializing, Because::new(reason, message)));
    let fail = |phase, reason, message: String| Err((phase, Because::new(reason, message)));
    if transfer.spec.state == TransferState::Cancelled {
        return fail(Phase::Cancelled, Reason::Cancelled, "cancelled before it was bound".to_owned());
    }
    let (namespace, pool, name) = (transfer.namespace().unwrap_or_default(), &volume.pool, &volume.node_name);
    match tenancy {
        Err(error) => return wait(Reason::TenancyUnreadable, error.to_string()),
        Ok(tenancy) if !tenancy.allows_pool(&namespace, pool) => {
            let message = format!("namespace {namespace} may not make volumes in pool {pool}");
            return fail(Phase::Failed, Reason::PoolNotAllowed, message);
        }
        Ok(_) => {}
    }
    match node {
        NodeHealth::Gone => fail(Phase::Failed, Reason::NodeLost, format!("there is no node {name}")),
        NodeHealth::NotReady => wait(Reason::NodeNotReady, format!("node {name} is not Ready")),
        NodeHealth::Up if !answers => {
            wait(Reason::AgentUnreachable, format!("the agent of node {name} does not answer"))
        }
        NodeHealth::Up => Ok(name.clone()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn who_may_what_comes_before_what_is_there() {
        let transfer = |state: &str, pool: &str| -> ImageTransfer {
            serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "ImageTransfer",
                "metadata": {"name": "t", "namespace": "vms"},
                "spec": {"direction": "Upload", "state": state, "volume":
                    {"nodeName": "node-a", "pool": pool, "name": "v", "size": 512}}}))
            .unwrap()
        };
        let allowed = || serde_saphyr::from_str("namespaces: {vms: {pools: [default]}}").unwrap();
        let unreadable = || Err(TenancyError::Content { path: "t".into(), words: "no YAML".to_owned() });
        let cases = [
            ("Running", "default", Ok(allowed()), NodeHealth::Up, true, "node-a"),
            ("Cancelled", "default", Ok(allowed()), NodeHealth::Up, true, "Cancelled Cancelled"),
            ("Running", "other", Ok(allowed()), NodeHealth::Gone, true, "Failed PoolNotAllowed"),
            ("Running", "default", Ok(Tenancy::default()), NodeHealth::Up, true, "Failed PoolNotAllowed"),
            ("Running", "default", unreadable(), NodeHealth::Up, true, "Initializing TenancyUnreadable"),
            ("Running", "default", Ok(allowed()), NodeHealth::Gone, true, "Failed NodeLost"),
            ("Running", "default", Ok(allowed()), NodeHealth::NotReady, true, "Initializing NodeNotReady"),
            ("Running", "default", Ok(allowed()), NodeHealth::Up, false, "Initializing AgentUnreachable"),
        ];
        for (state, pool, tenancy, node, answers, expected) in cases {
            let transfer = transfer(state, pool);
            let volume = transfer.spec.volume.clone().unwrap();
            let said = match place(&transfer, &volume, &tenancy, node, answers) {
                Ok(node) => node,
                Err((phase, because)) => format!("{} {}", phase.as_str(), because.reason),
            };
            assert_eq!(said, expected, "{state} {pool} {node:?} {answers}");
        }
    }
}
