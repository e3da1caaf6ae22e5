//! LibvirtDomains: published from the agents' DomainSightings. See `publish` for how they are chosen.

pub mod publish;

use std::collections::HashSet;

use k8s_openapi::jiff::SignedDuration;
use kube::api::{ListParams, ObjectMeta};
use kube::{Api, ResourceExt as _};

use self::publish::{Change, Marks, publish};
use super::backup::resolve::NodeHealth;
use super::{Context, OperatorError};
use crate::api::{self, LibvirtDomain, LibvirtDomainSpec};
use crate::clock;
use crate::cluster;
use crate::killpoint;
use crate::reason::{Because, Reason};
use crate::step::Step;

/// Makes the LibvirtDomains say what the sightings say.
///
/// # Errors
/// What the API server says; the caller tries again.
pub async fn publish_all(
    namespace: &str,
    grace: SignedDuration,
    context: &Context,
) -> Result<(), OperatorError> {
    let api = Api::<LibvirtDomain>::namespaced(context.client.clone(), namespace);
    let published = api.list(&ListParams::default()).await?.items;
    let seen: Vec<_> = context.sightings.state().iter().map(|sighting| sighting.spec.clone()).collect();
    let holders = published.iter().filter_map(|domain| domain.status.as_ref()?.node_name.clone());
    let nodes: HashSet<String> =
        seen.iter().map(|sighting| sighting.node_name.clone()).chain(holders).collect();
    let mut lost = HashSet::new();
    for node in nodes {
        if context.node_health(&node).await? == NodeHealth::Gone {
            lost.insert(node);
        }
    }
    let checkpoints = context.checkpoints.state();
    let here = checkpoints.iter().filter(|checkpoint| checkpoint.namespace().as_deref() == Some(namespace));
    let named = here.map(|checkpoint| {
        let spec = &checkpoint.spec;
        ((spec.vm_uuid.clone(), spec.bitmap.clone()), checkpoint.name_any())
    });
    let marks = Marks { cluster: context.cluster.clone(), named: named.collect() };
    for change in publish(&seen, &published, &marks, &lost, grace, clock::now()) {
        let name = match change {
            Change::Delete { name } => {
                let uid = published
                    .iter()
                    .find(|domain| domain.name_any() == name)
                    .and_then(kube::ResourceExt::uid);
                cluster::delete(&api, &name, uid).await?;
                name
            }
            Change::Update { name, status } => {
                let Some(known) = published.iter().find(|domain| domain.name_any() == name) else { continue };
                let from = known.status.as_ref().and_then(|status| status.node_name.clone());
                let is_handed_over = from.is_some() && status.node_name.is_some() && from != status.node_name;
                cluster::replace_status(&api, known, *status, api::OPERATOR).await?;
                if is_handed_over {
                    killpoint::reached(Step::HandOverPublished);
                }
                name
            }
            Change::Create { name, uuid, status, taken } => {
                let metadata = ObjectMeta {
                    name: Some(name.clone()),
                    namespace: Some(namespace.to_owned()),
                    ..ObjectMeta::default()
                };
                let new = LibvirtDomain { metadata, spec: LibvirtDomainSpec { uuid }, status: None };
                cluster::create(&api, &new, api::OPERATOR).await?;
                let created = api.get(&name).await?;
                if created.spec != new.spec {
                    // another VM's, since the list: the next round finds another name
                    tracing::warn!(vm = name, uuid = new.spec.uuid, "its name was taken meanwhile");
                    continue;
                }
                if let Some(taken) = taken {
                    let message =
                        format!("the name {taken} is another VM's: this one is published as {name}");
                    context
                        .events
                        .tell(&created, false, "Publish", &Because::new(Reason::NameTaken, message))
                        .await;
                }
                cluster::replace_status(&api, &created, *status, api::OPERATOR).await?;
                name
            }
        };
        tracing::info!(vm = name, "published");
        context.wake_vm(namespace, &name);
    }
    Ok(())
}
