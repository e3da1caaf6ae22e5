//! LibvirtDomains: published from the agents' DomainSightings. See `publish` for how they are chosen.

pub mod publish;

use std::collections::HashSet;

use futures::future::join_all;
use k8s_openapi::jiff::SignedDuration;
use kube::api::{ListParams, ObjectMeta};
use kube::{Api, ResourceExt as _};

use self::publish::{Change, Owners, publish};
use super::backup::resolve::NodeHealth;
use super::{Context, OperatorError};
use crate::api::{self, LibvirtDomain, LibvirtDomainSpec};
use crate::clock;
use crate::cluster;
use crate::killpoint;
use crate::reason::{Because, Reason};
use crate::step::Step;

/// How many are written at once.
const AT_ONCE: usize = 16;

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
    context.note_published(&published);
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
    let owners = Owners { cluster: context.cluster.clone(), named: named.collect() };
    let changes = publish(&seen, &published, &owners, &lost, grace, clock::now());
    // a name is free again before another VM takes it; everything else is a VM's own
    let is_deletion = |change: &Change| matches!(change, Change::Delete { .. });
    let (deletions, rest): (Vec<_>, Vec<_>) = changes.into_iter().partition(is_deletion);
    for change in deletions {
        apply(change, &api, &published, context).await?;
    }
    let mut rest = rest.into_iter();
    loop {
        // each to its end, though another fails: what waits for a VM that was written must be woken
        let some = rest.by_ref().take(AT_ONCE).map(|change| apply(change, &api, &published, context));
        let done = join_all(some).await;
        if done.is_empty() {
            return Ok(());
        }
        done.into_iter().collect::<Result<(), _>>()?;
    }
}

/// Writes one change, and looks again at what waits for the VM.
async fn apply(
    change: Change,
    api: &Api<LibvirtDomain>,
    published: &[LibvirtDomain],
    context: &Context,
) -> Result<(), OperatorError> {
    let known = |name: &str| published.iter().find(|domain| domain.name_any() == name);
    let name = match change {
        Change::Delete { name } => {
            let uid = known(&name).and_then(kube::ResourceExt::uid);
            cluster::delete(api, &name, uid).await?;
            name
        }
        Change::Update { name, status } => {
            let Some(known) = known(&name) else { return Ok(()) };
            let from = known.status.as_ref().and_then(|status| status.node_name.clone());
            let is_handed_over = from.is_some() && status.node_name.is_some() && from != status.node_name;
            cluster::replace_status(api, known, *status, api::OPERATOR).await?;
            if is_handed_over {
                killpoint::reached(Step::HandOverPublished);
            }
            name
        }
        Change::Create { name, uuid, status, taken } => {
            let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
            let new = LibvirtDomain { metadata, spec: LibvirtDomainSpec { uuid }, status: None };
            cluster::create(api, &new, api::OPERATOR).await?;
            let created = api.get(&name).await?;
            if created.spec != new.spec {
                // another VM's, since the list: the next round finds another name
                tracing::warn!(vm = name, uuid = new.spec.uuid, "its name was taken meanwhile");
                return Ok(());
            }
            if let Some(taken) = taken {
                let message = format!("the name {taken} is another VM's: this one is published as {name}");
                let because = Because::new(Reason::NameTaken, message);
                context.events.tell(&created, false, "Publish", &because).await;
            }
            cluster::replace_status(api, &created, *status, api::OPERATOR).await?;
            name
        }
    };
    tracing::info!(vm = name, "published");
    if let Some(namespace) = api.namespace() {
        context.wake_vm(namespace, &name);
    }
    Ok(())
}
