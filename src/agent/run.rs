//! Puts the agent together and runs it until it is told to stop.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use futures::{StreamExt as _, channel::mpsc};
use k8s_openapi::jiff::SignedDuration;
use kube::runtime::controller::{Action as Requeue, Config as ControllerConfig};
use kube::runtime::watcher;
use kube::{Api, ResourceExt as _};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::backup::act::Host;
use super::backup::life::Held;
use super::certificate::Certificate;
use super::config::Config;
use super::context::{AgentError, Context};
use super::cordon::Cordon;
use super::health::{self, Health};
use super::registry::{Live, Registry};
use super::state::{StateDir, StateLock};
use super::survey::{self, Survey};
use super::transfer::StoredTicket;
use super::upload::{self, Uploads};
use super::{backup, checkpoint, cordon, heartbeat, inventory, scratch, transfer};
use crate::api::{self, ImageTransfer, VmBackup, VmCheckpoint};
use crate::clock;
use crate::cluster::{self, Events};
use crate::imageio::{self, BindError, End, ImageServer, Tickets};
use crate::libvirt::{self, Libvirt};
use crate::probe::{self, Sign};

/// How long an ended backup is remembered, for its transfers to learn how it ended.
const REMEMBERED: SignedDuration = SignedDuration::from_secs(60);

/// Every how many rounds each backup's object is asked for, although nothing was heard of it.
const DOUBT: u64 = 12;

/// Every how many rounds a guest is thawed whose backup's object was not seen yet.
const THAW: u64 = 2;

/// How often an address is tried that is in use.
const LISTEN: Duration = Duration::from_millis(200);

/// How often the state directory of another agent is tried.
const LOCKED: Duration = Duration::from_millis(500);

/// How often served ranges are stored.
const STORE: Duration = Duration::from_secs(5);

/// Every how many of these rounds old records are removed: once an hour.
const TIDY: u64 = 720;

/// For how long it is known what succeeded: an API server that is restored from an older copy is not believed blindly.
const SUCCEEDED: SignedDuration = SignedDuration::from_hours(7 * 24);

/// How long what is being done may take to end, once the agent is told to stop. What does not end is taken up by its
/// successor.
const LAST: Duration = Duration::from_secs(3);

/// Runs the agent until `stop`.
///
/// # Errors
/// When it cannot start: the API server, the directories or the certificate.
pub async fn run(config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    let heartbeat = Duration::from_secs((config.heartbeat_seconds * heartbeat::BEATS).into());
    let health = Health::new(heartbeat);
    let listen = config.health_listen;
    tokio::select! {
        ended = work(config, stop, &health) => ended,
        served = probe::serve(listen, Arc::clone(&health)) => match served.context("--health-listen")? {},
    }
}

async fn work(config: Config, stop: CancellationToken, health: &Arc<Health>) -> anyhow::Result<()> {
    let state = StateDir::open(&config.state_dir, &config.run_dir)?;
    let Some(_alone) = alone(&state, &config.state_dir, &stop, &health.alone).await? else { return Ok(()) };
    let client = cluster::connect_counted(config.kubeconfig.as_deref(), &health.metrics).await?;
    let certificate = Certificate::load(&config, &client).context("the image server's certificate")?;
    let tickets = Tickets::default();
    let (wake_backup, backups) = mpsc::unbounded();
    let (wake_transfer, transfers) = mpsc::unbounded();
    let (wake_checkpoint, checkpoints) = mpsc::unbounded();
    let (noticed, notices) = mpsc::unbounded();
    libvirt::watch(&config.libvirt_uri, move |notice| noticed.unbounded_send(notice).is_ok())?;
    let context = Arc::new(Context {
        client: client.clone(),
        node: config.node_name.clone(),
        system_namespace: config.system_namespace.clone(),
        cordon: Cordon::default(),
        drain_grace: SignedDuration::from_secs(config.drain_grace_seconds.into()),
        host: Host {
            libvirt: Libvirt::new(&config.libvirt_uri),
            state,
            scratch_limit: config.scratch_limit_mib.map(|mib| mib.saturating_mul(1 << 20)),
            images: Arc::default(),
        },
        registry: Registry::new(wake_backup, wake_transfer, wake_checkpoint),
        survey: Survey::default(),
        health: Arc::clone(health),
        tickets: tickets.clone(),
        uploads: Uploads::default(),
        events: Events::new(
            client.clone(),
            api::AGENT,
            Some(config.node_name.clone()),
            Arc::clone(&health.metrics),
        ),
        advertised: config.advertised(),
        unix_socket: config.unix_socket().to_string_lossy().into_owned(),
        certificate,
    });
    adopt(&context)?;
    let listen = imageio::Config {
        addresses: config.listen.clone(),
        unix_socket: Some(config.unix_socket()),
        meter: Arc::clone(&health.meter),
        ..imageio::Config::default()
    };

    let mine = watcher::Config::default().fields(&format!("status.nodeName={}", config.node_name));
    let settings = || ControllerConfig::default().concurrency(16);
    let stopped = || stop.clone().cancelled_owned();
    let (left, mut gone) = mpsc::unbounded();
    let backup_left = left.clone();
    let backup_controller =
        cluster::controller(Api::<VmBackup>::all(client.clone()), mine.clone(), move |backup| {
            tell_of(&backup_left, backup.uid());
        })
        .with_config(settings())
        .reconcile_on(backups)
        .graceful_shutdown_on(stopped())
        .run(cluster::timed(&health.metrics, backup::reconcile::reconcile), on_error, Arc::clone(&context))
        .for_each(cluster::noted(&health.metrics));
    let transfer_controller =
        cluster::controller(Api::<ImageTransfer>::all(client.clone()), mine.clone(), move |transfer| {
            tell_of(&left, transfer.status.as_ref().and_then(|status| status.backup_uid.clone()));
        })
        .with_config(settings())
        .reconcile_on(transfers)
        .graceful_shutdown_on(stopped())
        .run(cluster::timed(&health.metrics, transfer::reconcile), on_error, Arc::clone(&context))
        .for_each(cluster::noted(&health.metrics));
    let checkpoint_controller = cluster::controller(Api::<VmCheckpoint>::all(client.clone()), mine, |_| {})
        .with_config(settings())
        .reconcile_on(checkpoints)
        .graceful_shutdown_on(stopped())
        .run(cluster::timed(&health.metrics, checkpoint::reconcile), on_error, Arc::clone(&context))
        .for_each(cluster::noted(&health.metrics));

    let (looked_at, looked) = mpsc::unbounded::<String>();
    let look_every = Duration::from_secs(config.look_seconds.into());
    let kept = Arc::clone(&context);
    let keeper = async move {
        let mut ticks = tokio::time::interval_at(Instant::now() + STORE, STORE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut round = 0_u64;
        thaw(&kept).await;
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    round += 1;
                    if round.is_multiple_of(THAW) {
                        thaw(&kept).await;
                    }
                    let (host, tidies) = (kept.host.clone(), round % TIDY == 1);
                    let kept_since = clock::now() - SUCCEEDED;
                    let tidied = kept.blocking(move || {
                        if tidies {
                            host.state.forget_succeeded(kept_since)?;
                        }
                        host.remove_orphans()
                    });
                    if let Err(error) = tidied.await {
                        tracing::warn!(%error, "bitmaps of failed backups, or old records, are left");
                    }
                    // what left the watch while it was down left without a word: ask, once in a while
                    keep(&kept, round.is_multiple_of(DOUBT)).await;
                }
                Some(uid) = gone.next() => {
                    if let Some(live) = kept.registry.find(&uid) {
                        ask(&uid, &live, &kept).await;
                    }
                }
            }
        }
    };

    let reconcilers = async {
        let told = async {
            stop.cancelled().await;
            tokio::time::sleep(LAST).await;
        };
        tokio::select! {
            _ = async { tokio::join!(backup_controller, transfer_controller, checkpoint_controller) } => {}
            () = told => {}
        }
        if stop.is_cancelled() { Ok(()) } else { Err(anyhow::anyhow!("a controller ended")) }
    };
    let images = async {
        let Some(listen) = certified(listen, &context, &stop).await else { return Ok(()) };
        Ok(serve_images(listen, &tickets, &stop, &health.images).await?)
    };

    tokio::select! {
        // these two end when the agent is told to stop: readers have their answers, and all else goes on meanwhile
        ended = async { tokio::try_join!(images, reconcilers) } => { ended?; }
        () = inventory::follow(&context, &config.system_namespace, notices, looked) => {}
        () = keeper => {}
        () = heartbeat::beat(client, &config.system_namespace, &config.node_name, config.heartbeat_seconds, &health.api) => {
            keep(&context, false).await;
            anyhow::bail!(cluster::REWOUND);
        }
        () = cordon::follow(&context) => {}
        () = scratch::watch(&context) => {}
        () = upload::follow(&context) => {}
        () = health::watch(&context) => {}
        () = context.certificate.follow(&health.certificate) => {}
        () = survey::watch(&context, look_every, looked_at) => {}
    }
    keep(&context, false).await;
    Ok(())
}

/// With the certificate, once there is one; `None` when the agent is told to stop before. Transfers that waited for it go on.
async fn certified(
    listen: imageio::Config,
    context: &Context,
    stop: &CancellationToken,
) -> Option<imageio::Config> {
    if context.certificate.ca().is_none() {
        context.health.images.bad("it waits for its certificate");
    }
    let tls = tokio::select! {
        tls = context.certificate.server() => tls,
        () = stop.cancelled() => return None,
    };
    for (uid, _) in context.registry.all() {
        context.registry.wake_transfers(&uid);
    }
    Some(imageio::Config { tls: Some(tls), ..listen })
}

/// Serves images until `stop`. An address that another process still has is waited for, while everything else goes on: a
/// guest may have to be thawed.
async fn serve_images(
    listen: imageio::Config,
    tickets: &Tickets,
    stop: &CancellationToken,
    sign: &Sign,
) -> Result<(), BindError> {
    let mut told = false;
    loop {
        match ImageServer::bind(listen.clone(), tickets.clone()).await {
            Ok(server) => {
                tracing::info!(addresses = ?server.addresses(), "image server listens");
                sign.good();
                server.serve(stop.clone()).await;
                return Ok(());
            }
            Err(error) if error.is_in_use() => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "the address is in use: the image server waits for it");
                }
                sign.bad(error);
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = tokio::time::sleep(LISTEN) => {}
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Waits until no other agent works with the state directory; `None` when it is told to stop meanwhile.
async fn alone(
    state: &StateDir,
    path: &Path,
    stop: &CancellationToken,
    sign: &Sign,
) -> anyhow::Result<Option<StateLock>> {
    let mut told = false;
    loop {
        if let Some(lock) = state.lock()? {
            sign.good();
            return Ok(Some(lock));
        }
        if !told {
            told = true;
            sign.bad("another agent works with this state directory");
            tracing::warn!(
                state_dir = %path.display(),
                "another agent works with this state directory: waiting for its end (one agent a node)"
            );
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(None),
            () = tokio::time::sleep(LOCKED) => {}
        }
    }
}

fn tell_of(left: &mpsc::UnboundedSender<String>, backup: Option<String>) {
    if let Some(backup) = backup {
        // a closed channel means that the agent is shutting down
        let _ = left.unbounded_send(backup);
    }
}

/// Takes up what an earlier process of this agent left: its backups, and their tickets, so that a reader
/// can go on with the one it has.
fn adopt(context: &Context) -> anyhow::Result<()> {
    let state = &context.host.state;
    let (records, broken) = state.records()?;
    for error in broken {
        tracing::warn!(%error, "a record cannot be read: look at the state directory");
    }
    for mut record in records {
        record.life.interrupt();
        let uid = record.uid.clone();
        tracing::info!(backup = uid, vm = record.vm, stage = ?record.life.stage, "backup adopted");
        let serving = record.life.is_serving();
        let tickets = state.tickets::<StoredTicket>(&uid).unwrap_or_else(|error| {
            tracing::warn!(backup = uid, %error, "its tickets cannot be read: new ones are made");
            Vec::new()
        });
        context.health.note_freeze(&record);
        let live = context.registry.insert(&uid, Live::new(record.clone()));
        // when a client last asked died with the process that knew: its idle time starts anew
        live.requested(clock::now());
        if record.life.held != Held::default() {
            context.registry.claim(&uid, &live);
        }
        let socket = state.socket_of(&uid)?;
        for stored in transfer::believed(tickets, &record, &socket).filter(|_| serving) {
            let disk = stored.ticket.disk.clone();
            live.require(&disk, stored.required);
            live.ticketed(&stored.ticket.transfer);
            let transfer = stored.ticket.transfer.clone();
            context.tickets.add(stored.ticket, context.coverage(&live, &record, &disk));
            if stored.paused {
                context.tickets.end(&transfer, End::Paused);
            }
        }
    }
    upload::end_leftovers(state)?;
    for uid in state.stray_runs()? {
        tracing::warn!(backup = uid, "files of a backup that no record knows are removed");
        if let Err(error) = state.remove_run(&uid) {
            tracing::warn!(backup = uid, %error, "they were not");
        }
    }
    Ok(())
}

/// Thaws the guests that an earlier process may have left frozen: they do not wait for the API server. Once a backup's
/// object was seen, its reconciler does.
async fn thaw(context: &Context) {
    let unseen = |live: &Live| !live.confirmed.load(Ordering::Relaxed);
    for (uid, live) in context.registry.all().into_iter().filter(|(_, live)| unseen(live)) {
        if let Err(error) = backup::reconcile::thaw(&live, context).await {
            tracing::warn!(backup = uid, %error, "a guest may be frozen still");
        }
    }
}

/// Asks whether a backup and its transfers are still there, and cleans after what is gone.
async fn ask(uid: &str, live: &Live, context: &Context) {
    let transfers = transfer::close_gone(uid, live, context).await;
    let backup = backup::reconcile::clean_orphan(uid, live, context).await;
    for error in [transfers.err(), backup.err()].into_iter().flatten() {
        tracing::warn!(backup = uid, %error, "it is not known yet whether its object is gone");
    }
}

/// Stores what was served, tells of progress, cleans after backups whose objects are gone, and forgets
/// those that ended a while ago.
async fn keep(context: &Context, doubt: bool) {
    for (uid, live) in context.registry.all() {
        if doubt || !live.confirmed.load(Ordering::Relaxed) {
            ask(&uid, &live, context).await;
        }
        // held means busy: its own reconciler sees to it
        let Ok(record) = live.record.try_lock() else { continue };
        if record.life.is_ended() {
            let since = live.ended(clock::now());
            let told = live.released.load(Ordering::Relaxed);
            if told && clock::now().duration_since(since) > REMEMBERED {
                context.registry.remove(&uid);
            }
        } else if record.life.is_serving() {
            context.store_coverage(&uid, &live);
            context.registry.wake_transfers(&uid);
        }
    }
}

fn on_error<K: kube::Resource<DynamicType = ()>>(
    object: Arc<K>,
    error: &AgentError,
    context: Arc<Context>,
) -> Requeue {
    context.health.metrics.failed(&K::kind(&()), error.class());
    if error.is_conflict() {
        return Requeue::requeue(Duration::from_millis(20));
    }
    if error.is_not_found() {
        return Requeue::await_change();
    }
    tracing::warn!(object = object.name_any(), kind = %K::kind(&()), %error, "tried again");
    Requeue::requeue(Duration::from_secs(2))
}
