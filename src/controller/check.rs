//! Says whether an installation works: VMs are served, an operator leads, agents answer. It reads only, with the
//! operator's own rights; `helm test` runs it.

use std::time::Duration;

use anyhow::bail;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};
use tokio::time::Instant;

use super::config::Config;
use super::heartbeats::Heartbeat;
use super::lead::LEASE;
use crate::api::{self, LibvirtDomain};
use crate::{clock, cluster};

/// How long a new installation may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How soon to look again.
const AGAIN: Duration = Duration::from_secs(1);

/// What was seen.
#[derive(Debug)]
struct Seen {
    vms: usize,
    leads: bool,
    nodes: Vec<(String, bool)>,
}

impl Seen {
    /// What is wrong, in words. Pure. A node without libvirt has no agent: one that answers will do.
    fn complaint(&self) -> Option<&'static str> {
        if !self.leads {
            return Some("no operator leads: look at the logs of deployment/virtmark-operator");
        }
        let answers = self.nodes.iter().any(|(_, answers)| *answers);
        (!answers).then_some("no agent answers: look at daemonset/virtmark-agent, and its pods' logs")
    }
}

/// Looks until all is well, or for a minute; tells what it saw on standard output.
///
/// # Errors
/// What is wrong.
pub async fn check(config: &Config) -> anyhow::Result<()> {
    let client = cluster::connect(config.kubeconfig.as_deref()).await?;
    let until = Instant::now() + PATIENCE;
    loop {
        let looked = look(&client, config).await;
        let waits = match &looked {
            Ok(seen) => seen.complaint().is_some(),
            Err(_) => true,
        };
        if waits && Instant::now() < until {
            tokio::time::sleep(AGAIN).await;
            continue;
        }
        let seen = looked?;
        println!("{} VMs are served in namespace {}", seen.vms, config.domains_namespace);
        for (node, answers) in &seen.nodes {
            println!("node {node}: {}", if *answers { "its agent answers" } else { "no agent answers" });
        }
        return match seen.complaint() {
            Some(complaint) => bail!(complaint),
            None => Ok(()),
        };
    }
}

async fn look(client: &Client, config: &Config) -> Result<Seen, kube::Error> {
    let domains = Api::<LibvirtDomain>::namespaced(client.clone(), &config.domains_namespace);
    let vms = domains.list_metadata(&ListParams::default()).await?.items.len();
    let leases = Api::<Lease>::namespaced(client.clone(), &config.system_namespace);
    let renewed = async |name: &str| {
        let lease = leases.get_opt(name).await?;
        let heartbeat = lease.as_ref().and_then(Heartbeat::of);
        Ok::<_, kube::Error>(heartbeat.is_some_and(|heartbeat| heartbeat.holds(clock::now())))
    };
    let leads = renewed(LEASE).await?;
    let mut nodes = Vec::new();
    for node in Api::<Node>::all(client.clone()).list_metadata(&ListParams::default()).await? {
        let name = node.name_any();
        let answers = renewed(&api::agent_lease(&name)).await?;
        nodes.push((name, answers));
    }
    Ok(Seen { vms, leads, nodes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_well_when_an_operator_leads_and_one_agent_answers() {
        let seen = |leads, answers: &[bool]| {
            let nodes = answers.iter().map(|answers| ("node".to_owned(), *answers)).collect();
            Seen { vms: 0, leads, nodes }.complaint()
        };
        assert_eq!(seen(true, &[false, true]), None, "a node may have no libvirt, and a cluster no VM");
        assert!(seen(false, &[true]).unwrap().contains("no operator"));
        assert!(seen(true, &[false]).unwrap().contains("no agent"));
        assert!(seen(true, &[]).unwrap().contains("no agent"));
    }
}
