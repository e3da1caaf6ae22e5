//! Puts the operator together and runs it until it is told to stop.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, channel::mpsc, stream};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::jiff::SignedDuration;
use kube::core::PartialObjectMeta;
use kube::runtime::controller::{Action as Requeue, Config as ControllerConfig};
use kube::runtime::reflector::store::Writer;
use kube::runtime::{WatchStreamExt as _, reflector, watcher};
use kube::{Api, Client, ResourceExt as _};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::config::Config;
use super::context::{Context, OperatorError};
use super::lead::{Candidate, lead};
use super::role::Role;
use super::{backup, certificates, checkpoint, domain, heartbeats, nodes, transfer};
use crate::api::{
    self, DomainSighting, DomainSightingSpec, ImageTransfer, LibvirtDomain, VmBackup, VmCheckpoint,
};
use crate::cluster::{self, Events};
use crate::probe;

/// How often the inventory is compared although no sighting changed.
const SAFETY_NET: Duration = Duration::from_secs(60);

/// How many changes of sightings are taken as one, at most.
const MEANWHILE: usize = 1024;

/// How soon to try again what could not be published, at first and in the end.
const AGAIN: Duration = Duration::from_secs(1);
const AT_MOST: Duration = Duration::from_secs(10);

/// Runs the operator until `stop`: it works while it leads.
///
/// # Errors
/// When it cannot start: no API server, no rights.
pub async fn run(config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    let role = Role::new();
    let listen = config.health_listen;
    tokio::select! {
        ended = stand(config, stop, &role) => ended,
        served = probe::serve(listen, Arc::clone(&role)) => match served.context("--health-listen")? {},
    }
}

/// Works while it leads.
async fn stand(config: Config, stop: CancellationToken, role: &Role) -> anyhow::Result<()> {
    let client = cluster::connect_counted(config.kubeconfig.as_deref(), &role.metrics).await?;
    let cluster = cluster::id(&client).await.context("the cluster's id, the uid of namespace kube-system")?;
    tracing::info!(cluster, "operator starts");
    let candidate = Candidate {
        identity: config.identity.clone(),
        namespace: config.system_namespace.clone(),
        seconds: config.lease_seconds,
    };
    lead(&client, &candidate, &stop, role, || work(&client, &cluster, &config, role)).await
}

/// All controllers. Ends only when one of them does.
async fn work(client: &Client, cluster: &str, config: &Config, role: &Role) {
    let settings = || ControllerConfig::default().concurrency(16);
    let (wake_backup, woken_backups) = mpsc::unbounded();
    let (wake_transfer, woken_transfers) = mpsc::unbounded();
    let (wake_checkpoint, woken_checkpoints) = mpsc::unbounded();
    let any = watcher::Config::default;
    let (left, mut gone) = mpsc::unbounded();
    let backups = cluster::controller(Api::<VmBackup>::all(client.clone()), any(), move |backup| {
        // a closed channel means that the operator is shutting down
        let _ = left.unbounded_send((backup.namespace().unwrap_or_default(), backup.clone()));
    });
    let transfers = cluster::controller(Api::<ImageTransfer>::all(client.clone()), any(), |_| {});
    let (checkpoint_left, mut gone_checkpoints) = mpsc::unbounded();
    let checkpoints =
        cluster::controller(Api::<VmCheckpoint>::all(client.clone()), any(), move |checkpoint| {
            let _ = checkpoint_left.unbounded_send(checkpoint.clone());
        });
    let (sightings, seen) = reflector::store();
    let context = Arc::new(Context {
        client: client.clone(),
        events: Events::new(client.clone(), api::OPERATOR, None, Arc::clone(&role.metrics)),
        cluster: cluster.to_owned(),
        system_namespace: config.system_namespace.clone(),
        tenancy: config.tenancy.clone(),
        binding: tokio::sync::Mutex::default(),
        publishing: tokio::sync::Mutex::default(),
        backups: backups.store(),
        transfers: transfers.store(),
        checkpoints: checkpoints.store(),
        sightings,
        wake_backup,
        wake_transfer,
        wake_checkpoint,
        metrics: Arc::clone(&role.metrics),
        published: Mutex::default(),
        heartbeats: Mutex::default(),
        nodes: nodes::Nodes::default(),
        inventory: tokio::sync::Notify::new(),
        failures: super::context::Failures::default(),
        secrets_deleted: super::context::Names::default(),
    });
    role.works_with(&context);
    let backups = backups
        .with_config(settings())
        .reconcile_on(woken_backups)
        .run(cluster::timed(&role.metrics, backup::reconcile), on_error, Arc::clone(&context))
        .for_each(cluster::noted(&role.metrics));
    let transfers = transfers
        .with_config(settings())
        .reconcile_on(woken_transfers)
        .run(cluster::timed(&role.metrics, transfer::reconcile), on_error, Arc::clone(&context))
        .for_each(cluster::noted(&role.metrics));
    let checkpoints = checkpoints
        .with_config(settings())
        .reconcile_on(woken_checkpoints)
        .run(cluster::timed(&role.metrics, checkpoint::reconcile), on_error, Arc::clone(&context))
        .for_each(cluster::noted(&role.metrics));
    // what hangs on a backup that was deleted by force is told of nobody else
    let hanging = async {
        while let Some((namespace, backup)) = gone.next().await {
            context.wake_vm(&namespace, &backup.spec.vm);
            context.wake_transfers(&namespace, &backup.name_any());
        }
    };
    // and its chain closes over a checkpoint that was
    let closing = async {
        while let Some(checkpoint) = gone_checkpoints.next().await {
            checkpoint::close_over(&checkpoint, &context);
            context.inventory.notify_one();
        }
    };
    tokio::select! {
        () = hanging => {}
        () = closing => {}
        () = backups => {}
        () = transfers => {}
        () = checkpoints => {}
        () = inventory(config, seen, &context) => {}
        () = sign(config, &context) => {}
        () = nodes::follow(&context) => {}
        () = heartbeats::follow(&context) => {}
        () = tell_synced(&context, role) => {}
        () = cluster::rewound(client, &config.system_namespace, &role.api) => {}
    }
}

/// Signs agents' certificates, if that is wished for.
async fn sign(config: &Config, context: &Arc<Context>) {
    if !config.sign_certificates {
        return std::future::pending().await;
    }
    let requests = Api::<CertificateSigningRequest>::all(context.client.clone());
    let ours = watcher::Config::default().fields(&format!("spec.signerName={}", api::SIGNER));
    let requests = cluster::controller(requests, ours, |_| {})
        .with_config(ControllerConfig::default().concurrency(4))
        .run(cluster::timed(&context.metrics, certificates::reconcile), on_error, Arc::clone(context))
        .for_each(cluster::noted(&context.metrics));
    tokio::select! {
        () = requests => {}
        () = certificates::follow(context) => {}
    }
}

/// Says so once all that is watched was seen, and never comes back.
async fn tell_synced(context: &Context, role: &Role) {
    let all = tokio::join!(
        context.backups.wait_until_ready(),
        context.transfers.wait_until_ready(),
        context.checkpoints.wait_until_ready(),
        context.sightings.wait_until_ready(),
    );
    if matches!(all, (Ok(()), Ok(()), Ok(()), Ok(()))) {
        role.is_synced();
    }
    std::future::pending::<()>().await;
}

/// What the inventory hears.
enum Heard {
    Nothing,
    /// One sighting.
    Sighting(Box<DomainSighting>),
    /// All of them.
    All,
    /// Anything may be otherwise.
    Much,
}

/// Follows the sightings, and publishes again what somebody deleted.
async fn inventory(config: &Config, writer: Writer<DomainSighting>, context: &Context) {
    let sightings = Api::<DomainSighting>::namespaced(context.client.clone(), &config.system_namespace);
    let domains = Api::<PartialObjectMeta<LibvirtDomain>>::namespaced(
        context.client.clone(),
        &config.domains_namespace,
    );
    let any = watcher::Config::default;
    // a list is whole only when it is done
    let seen = watcher(sightings, any()).default_backoff().reflect(writer).map_ok(|event| match event {
        watcher::Event::Init | watcher::Event::InitApply(_) => Heard::Nothing,
        watcher::Event::Apply(sighting) => Heard::Sighting(Box::new(sighting)),
        watcher::Event::InitDone => Heard::All,
        watcher::Event::Delete(_) => Heard::Much,
    });
    let deleted = watcher(domains, any()).default_backoff().map_ok(|event| match event {
        watcher::Event::Delete(_) => Heard::Much,
        _ => Heard::Nothing,
    });
    // what came meanwhile is one change: everything is compared each time
    let mut changes = stream::select(seen.boxed(), deleted.boxed()).ready_chunks(MEANWHILE);
    let grace = SignedDuration::from_secs(config.missing_grace_seconds.into());
    let (mut pause, mut next) = (SAFETY_NET, Instant::now() + SAFETY_NET);
    let (mut shown, mut complete) = (HashMap::new(), false);
    loop {
        tokio::select! {
            change = changes.next() => match change {
                None => return,
                Some(changes) => {
                    let mut changed = false;
                    for change in changes {
                        changed |= match change {
                            Ok(heard) => {
                                complete |= matches!(heard, Heard::All);
                                heed(heard, &mut shown, context)
                            }
                            Err(error) => {
                                cluster::watch_broke("the inventory", &error);
                                false
                            }
                        };
                    }
                    if !changed {
                        continue;
                    }
                }
            },
            () = context.inventory.notified() => {}
            () = tokio::time::sleep_until(next) => {}
        }
        if !complete {
            // a domain that was not heard of yet is not missing
            next = Instant::now() + SAFETY_NET;
            continue;
        }
        // what cannot be published now, in a namespace that is being deleted, say, does not hold up what is seen
        pause = match domain::publish_all(&config.domains_namespace, grace, context).await {
            Ok(()) => SAFETY_NET,
            Err(error) if error.is_conflict() => Duration::ZERO,
            Err(error) => {
                tracing::warn!(%error, "the inventory was not published");
                if pause == SAFETY_NET { AGAIN } else { (pause * 2).clamp(AGAIN, AT_MOST) }
            }
        };
        next = Instant::now() + pause;
    }
}

/// Whether the inventory may be another one because of what was heard.
fn heed(heard: Heard, shown: &mut HashMap<String, DomainSightingSpec>, context: &Context) -> bool {
    match heard {
        Heard::Nothing => false,
        Heard::Sighting(sighting) => {
            checkpoint::heed(&sighting.spec, context);
            let now = domain::publish::shown(&sighting.spec);
            // numbers that stand in VmCheckpoints only are shown nowhere else
            shown.insert(sighting.name_any(), now.clone()) != Some(now)
        }
        Heard::All | Heard::Much => {
            shown.clear();
            context.sightings.state().iter().for_each(|seen| checkpoint::heed(&seen.spec, context));
            true
        }
    }
}

fn on_error<K>(object: Arc<K>, error: &OperatorError, context: Arc<Context>) -> Requeue
where
    K: kube::Resource<DynamicType = ()>,
{
    context.metrics.failed(&K::kind(&()), error.class());
    if error.is_conflict() {
        return Requeue::requeue(Duration::from_millis(20));
    }
    if error.is_not_found() {
        return Requeue::await_change();
    }
    tracing::warn!(object = object.name_any(), kind = %K::kind(&()), %error, "tried again");
    Requeue::requeue(context.failures.again(&*object))
}
