//! Publishes what this node's libvirt says of its domains, as DomainSightings. The operator makes the
//! LibvirtDomains that users see out of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use futures::StreamExt as _;
use futures::channel::mpsc::UnboundedReceiver;
use kube::api::{ListParams, ObjectMeta, PostParams};
use kube::{Api, ResourceExt as _};
use tokio::time::Instant;

use super::looks::{Looks, Which};
use super::{AgentError, Context};
use crate::api::{self, DomainSighting, DomainSightingSpec};
use crate::cluster;
use crate::killpoint;
use crate::libvirt::xml::Domain;
use crate::libvirt::{Libvirt, LibvirtError, Listed, Notice};
use crate::step::Step;

/// As libvirt prints it.
fn is_uuid(text: &str) -> bool {
    let fits = |(at, byte)| match at {
        8 | 13 | 18 | 23 => byte == b'-',
        _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
    };
    text.len() == 36 && text.bytes().enumerate().all(fits)
}

/// The sighting of one domain, `None` of one that the inventory cannot hold. Pure.
pub fn sighting(node: &str, listed: &Listed) -> Option<DomainSightingSpec> {
    let domain = Domain::parse(&listed.xml).ok()?;
    let size = |target: &str| listed.sizes.iter().find(|(name, _)| name == target).map(|(_, size)| *size);
    // one sighting that the API server refuses would keep every other domain out of the inventory; libvirt's
    // own rules are narrower than these
    if !is_uuid(&domain.uuid) || domain.name.is_empty() {
        return None;
    }
    let disks = domain.inventoried().map(|disk| disk.sighted(size(&disk.target.dev)));
    Some(DomainSightingSpec {
        node_name: node.to_owned(),
        uuid: domain.uuid.clone(),
        name: domain.name.chars().take(1024).collect(),
        state: listed.state,
        disks: disks.collect(),
        checkpoints: None,
    })
}

/// For how long what was read is believed: somebody may delete it.
const BELIEVED: Duration = Duration::from_secs(60);

/// How soon what could not be published is tried again.
const UNPUBLISHED: Duration = Duration::from_secs(1);

/// What this agent last wrote, by domain uuid: equal sightings are not written again.
struct Inventory {
    read: Instant,
    api: Api<DomainSighting>,
    namespace: String,
    written: HashMap<String, DomainSighting>,
}

impl Inventory {
    /// Reads what was written before, in this node's name.
    ///
    /// # Errors
    /// What the API server says.
    async fn load(context: &Context, namespace: &str) -> Result<Self, AgentError> {
        let api = Api::<DomainSighting>::namespaced(context.client.clone(), namespace);
        let ours = ListParams::default().fields(&format!("spec.nodeName={}", context.node));
        let written = api.list(&ours).await?.into_iter().map(|s| (s.spec.uuid.clone(), s)).collect();
        Ok(Self { read: Instant::now(), api, namespace: namespace.to_owned(), written })
    }

    /// When it is to be read again.
    fn due(&self) -> Instant {
        self.read + BELIEVED
    }

    /// Makes the sightings of these domains say what libvirt says now.
    ///
    /// # Errors
    /// When libvirt or the API server cannot be asked; a call for all goes on where this one stopped.
    async fn publish(&mut self, which: Which, context: &Context) -> Result<(), AgentError> {
        let (host, looked_at) = (context.host.clone(), which.clone());
        let listed = context.blocking(move || Ok(listed(&host.libvirt, &looked_at)?)).await?;
        let mut seen = BTreeMap::new();
        for listed in listed {
            if let Some(spec) = sighting(&context.node, &listed) {
                context.survey.seen(&spec, listed.qemu);
                seen.insert(spec.uuid.clone(), spec);
            }
        }
        let is_gone = |uuid: &str| match &which {
            Which::These(these) => these.contains(uuid) && !seen.contains_key(uuid),
            Which::All => !seen.contains_key(uuid),
        };
        context.survey.gone(is_gone);
        let gone: Vec<String> = self.written.keys().filter(|uuid| is_gone(uuid)).cloned().collect();
        for uuid in gone {
            cluster::delete(&self.api, &api::sighting_name(&context.node, &uuid), None).await?;
            killpoint::reached(Step::SightingDeleted);
            tracing::info!(domain = uuid, "domain gone");
            self.written.remove(&uuid);
        }
        for (uuid, mut spec) in seen {
            // before the first look what an earlier process found stands
            let told = || self.written.get(&uuid).and_then(|written| written.spec.checkpoints.clone());
            spec.checkpoints = context.survey.report(&uuid).or_else(told);
            if self.written.get(&uuid).is_some_and(|written| written.spec == spec) {
                continue;
            }
            tracing::info!(domain = uuid, name = spec.name, state = ?spec.state, "domain seen");
            let written = self.write(&context.node, spec).await?;
            self.written.insert(uuid, written);
        }
        Ok(())
    }

    /// Adds what a look at a domain's bitmaps found to what was published of it.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    async fn publish_look(&mut self, uuid: &str, context: &Context) -> Result<(), AgentError> {
        let Some(written) = self.written.get(uuid) else { return Ok(()) };
        let checkpoints = context.survey.report(uuid);
        if checkpoints.is_none() || written.spec.checkpoints == checkpoints {
            return Ok(());
        }
        let spec = DomainSightingSpec { checkpoints, ..written.spec.clone() };
        let written = self.write(&context.node, spec).await?;
        self.written.insert(uuid.to_owned(), written);
        Ok(())
    }

    async fn write(&self, node: &str, spec: DomainSightingSpec) -> Result<DomainSighting, AgentError> {
        let params = PostParams { field_manager: Some(api::AGENT.to_owned()), ..PostParams::default() };
        let name = api::sighting_name(node, &spec.uuid);
        let known = match self.written.get(&spec.uuid) {
            Some(known) => Some(known.clone()),
            None => self.api.get_opt(&name).await?,
        };
        if let Some(mut known) = known {
            known.spec = spec.clone();
            known.metadata.managed_fields = None;
            match self.api.replace(&known.name_any(), &params, &known).await {
                Ok(written) => return Ok(written),
                Err(error) if cluster::is_absent(&error) => {}
                Err(kube::Error::Api(status)) if status.is_conflict() => {
                    let mut fresh = self.api.get(&name).await?;
                    fresh.spec = spec;
                    return Ok(self.api.replace(&name, &params, &fresh).await?);
                }
                Err(error) => return Err(error.into()),
            }
        }
        let metadata =
            ObjectMeta { name: Some(name), namespace: Some(self.namespace.clone()), ..ObjectMeta::default() };
        let created = self.api.create(&params, &DomainSighting { metadata, spec }).await?;
        killpoint::reached(Step::SightingMade);
        Ok(created)
    }
}

/// What libvirt has of these domains.
fn listed(libvirt: &Libvirt, which: &Which) -> Result<Vec<Listed>, LibvirtError> {
    match which {
        Which::These(these) => these.iter().filter_map(|uuid| libvirt.lookup(uuid).transpose()).collect(),
        Which::All => libvirt.domains(),
    }
}

/// Publishes what libvirt says whenever `notices` say that it changed, and once in a while; and what was found of the bitmaps of
/// the domains that are `looked` at. Comes back when libvirt is watched no more.
pub async fn follow(
    context: &Context,
    namespace: &str,
    mut notices: UnboundedReceiver<Notice>,
    mut looked: UnboundedReceiver<String>,
) {
    let (mut inventory, mut looks) = (None, Looks::from(Instant::now() + BELIEVED));
    loop {
        let heard = tokio::select! {
            heard = tokio::time::timeout_at(looks.next(), notices.next()) => heard,
            Some(uuid) = looked.next() => {
                if let Err(error) = publish_look(&mut inventory, &uuid, context).await {
                    tracing::warn!(%error, "what was seen of a domain's bitmaps was not published");
                    (inventory, looks.due) = (None, Instant::now() + UNPUBLISHED);
                }
                continue;
            }
        };
        let (mut which, mut heard) = match heard {
            Ok(None) => return,
            Ok(Some(notice)) => (Which::none(), heed(context, notice)),
            Err(_) => (looks.settled(Instant::now()).unwrap_or(Which::All), Which::none()),
        };
        while let Ok(more) = notices.try_recv() {
            heard.join(heed(context, more));
        }
        if which == Which::All && inventory.is_some() {
            // the safety net, when libvirt says nothing
            context.registry.wake_domain(None);
        }
        if heard != Which::none() {
            looks.heard(&heard, Instant::now());
            which.join(heard);
        }
        looks.due = match publish(&mut inventory, which, context, namespace).await {
            Ok(due) => due,
            Err(error) => {
                tracing::warn!(%error, "the inventory was not published");
                inventory = None;
                Instant::now() + UNPUBLISHED
            }
        };
    }
}

/// Has backups look again at what libvirt says has changed; answers which domains that are.
fn heed(context: &Context, notice: Notice) -> Which {
    match notice {
        Notice::Domain(uuid) => {
            context.registry.wake_domain(Some(&uuid));
            Which::These(BTreeSet::from([uuid]))
        }
        Notice::Everything => {
            context.registry.wake_domain(None);
            Which::All
        }
        Notice::Disconnected(why) => {
            tracing::warn!(why, "libvirt cannot be reached");
            Which::All
        }
    }
}

/// Publishes what libvirt says of these domains; answers when to do so for all although libvirt says nothing.
async fn publish(
    inventory: &mut Option<Inventory>,
    which: Which,
    context: &Context,
    namespace: &str,
) -> Result<Instant, AgentError> {
    let (loaded, which) = match inventory {
        Some(loaded) if Instant::now() < loaded.due() => (loaded, which),
        // what was written before may be of domains that are gone since
        _ => (inventory.insert(Inventory::load(context, namespace).await?), Which::All),
    };
    loaded.publish(which, context).await?;
    Ok(loaded.due())
}

/// Publishes what a look at a domain's bitmaps found.
async fn publish_look(
    inventory: &mut Option<Inventory>,
    vm_uuid: &str,
    context: &Context,
) -> Result<(), AgentError> {
    match inventory {
        Some(loaded) => loaded.publish_look(vm_uuid, context).await,
        // what is not loaded is published as a whole, and soon
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::DomainState;

    fn seen(from: &str, to: &str) -> Option<DomainSightingSpec> {
        let xml = include_str!("../../tests/golden/domain-live.xml").replace(from, to);
        sighting("node-a", &Listed { state: DomainState::Running, qemu: Some(1), xml, sizes: vec![] })
    }

    #[test]
    fn what_the_api_server_would_refuse_is_not_sent_to_it() {
        let targets = |spec: DomainSightingSpec| -> Vec<String> {
            spec.disks.into_iter().map(|disk| disk.target).collect()
        };
        assert_eq!(targets(seen("", "").unwrap()), ["vda", "vdb", "vdc", "vdd", "sda"]);
        assert_eq!(targets(seen("dev='vdb'", "dev='vda'").unwrap()), ["vda", "vdc", "vdd", "sda"]);
        assert_eq!(targets(seen("dev='vdb'", "dev='../vdb'").unwrap()), ["vda", "vdc", "vdd", "sda"]);
        assert!(seen("11111111-2222", "..").is_none());
        assert!(seen("11111111-2222", "1111111F-2222").is_none());
        assert_eq!(seen("tricky", &"x".repeat(2000)).unwrap().name.len(), 1024);
    }
}
