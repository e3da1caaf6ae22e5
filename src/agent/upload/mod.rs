//! Uploads of this node: an ImageTransfer that makes a libvirt volume, from an empty file to one that has its name.
//!
//! `record` has the machine, `volume` the file, `server` the qemu-nbd that writes it; here they are put together. It writes
//! the status of ImageTransfers and their Secrets, and never touches a volume that was there before.

mod record;
mod server;
mod volume;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Secret;
use kube::runtime::controller::Action as Requeue;
use kube::{Api, ResourceExt as _};

use self::record::Next;
pub use self::record::{Stage, Upload};
use self::server::{Server, ServerError};
use self::volume::VolumeError;
use super::backup::act::HostError;
use super::context::DRAIN;
use super::state::{StateDir, StateError};
use super::transfer::status::{Observed, Standing};
use super::transfer::{SOON, Wish, api, secret, secret_name, wish, write};
use super::{AgentError, Context};
use crate::api::{AGENT, ImageTransfer, ImageTransferStatus, NewVolume, Phase, conditions};
use crate::clock;
use crate::cluster;
use crate::imageio::{Access, Coverage, End, SharedCoverage, Ticket, TicketId};
use crate::reason::{Because, Reason};

/// The servers of the volumes that are being uploaded, each locked by whoever works on its upload.
#[derive(Debug, Default)]
pub struct Uploads(Mutex<HashMap<String, Arc<Slot>>>);

type Slot = tokio::sync::Mutex<Option<Serving>>;

/// A volume that is served, and what was written of it.
#[derive(Debug)]
struct Serving {
    server: Server,
    coverage: Arc<SharedCoverage>,
}

/// How often it is looked for uploads whose transfers are gone.
const DOUBT: Duration = Duration::from_secs(60);

/// How soon it is looked again whether a server has ended.
const AGAIN: Duration = Duration::from_millis(20);

impl Uploads {
    fn slot(&self, uid: &str) -> Arc<Slot> {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(slots.entry(uid.to_owned()).or_default())
    }

    fn forget(&self, uid: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

/// Ends the servers that an earlier process of this agent left. It does not wait for their end.
///
/// # Errors
/// When the state directory cannot be read.
pub fn end_leftovers(state: &StateDir) -> Result<(), AgentError> {
    for uid in state.uploads()? {
        server::end_leftover(&state.run_of(&uid)?);
    }
    Ok(())
}

/// Brings one upload that is bound to this node as far as it can get now.
///
/// # Errors
/// What could not be gathered, done or written; the caller tries again.
pub async fn reconcile(
    transfer: &ImageTransfer,
    uid: &str,
    old: &ImageTransferStatus,
    volume: &NewVolume,
    context: &Context,
) -> Result<Requeue, AgentError> {
    let state = &context.host.state;
    if conditions::is_true(&old.conditions, conditions::HOST_CLEAN) {
        state.forget_upload(uid)?;
        context.uploads.forget(uid);
        return Ok(Requeue::await_change());
    }
    if volume.node_name != context.node {
        return Ok(Requeue::await_change());
    }
    let slot = context.uploads.slot(uid);
    let mut serving = slot.lock().await;
    let wish = || wish(transfer, context.tickets.stats(uid).map(|stats| stats.idle));
    let mut transferred = None;
    let standing = loop {
        let wanted = wish();
        let mut upload = match state.upload(uid) {
            Ok(Some(upload)) => upload,
            Err(error @ (StateError::Content { .. } | StateError::Foreign { .. })) => {
                let why = format!("{error}: a file .virtmark-{uid}.partial may be left in the pool");
                break Standing::Ended(Phase::Failed, Because::new(Reason::UploadInterrupted, why));
            }
            Err(error) => return Err(error.into()),
            Ok(None) => match plan(transfer, uid, old, volume, &wanted, context).await? {
                Ok(upload) => upload,
                Err(because) => {
                    let cancelled = matches!(because.reason, Reason::Cancelled | Reason::TransferInactive);
                    let phase = if cancelled { Phase::Cancelled } else { Phase::Failed };
                    break Standing::Ended(phase, because);
                }
            },
        };
        let next = upload.stage.next(&wanted, interrupted(serving.as_mut()), old.phase.is_terminal());
        let closes = match &next {
            Next::Close | Next::Discard(..) => !matches!(upload.stage, Stage::Discarding(..)),
            Next::Pause(_) => old.phase != Phase::Paused,
            Next::Make | Next::Answer | Next::Publish | Next::Tell(..) => false,
        };
        // in the newer one, which is on its way here, something else may be wanted; or somebody used it meanwhile
        if closes && (!cluster::is_newest(&api(transfer, context), transfer).await? || wish() != wanted) {
            return Ok(Requeue::requeue(SOON));
        }
        // a request that goes on would be cut
        if next == Next::Close && context.tickets.moves(uid, DRAIN) {
            return Ok(Requeue::requeue(SOON));
        }
        match next {
            Next::Answer => break answer(transfer, old, &mut upload, serving.as_ref(), context).await?,
            Next::Pause(because) => {
                context.tickets.end(uid, End::Paused);
                break Standing::Paused(because);
            }
            Next::Tell(phase, because) => break Standing::Ended(phase, because),
            Next::Discard(phase, because) => {
                upload.stage = Stage::Discarding(phase, because.clone());
                state.store_upload(&upload)?;
                discard(&upload, serving.take(), context).await?;
                upload.stage = Stage::Ended(phase, because);
            }
            Next::Make => {
                let made = make(&mut upload, context).await?;
                let made = made.map(|made| *serving = Some(made));
                take(&mut upload, made, Stage::Open);
            }
            Next::Close => {
                upload.stage = Stage::Closing;
                state.store_upload(&upload)?;
                transferred = serving.as_ref().map(|serving| serving.coverage.transferred());
                take(&mut upload, close(uid, serving.take(), context).await, Stage::Closed);
            }
            Next::Publish => {
                let published = publish(&upload, context).await?;
                take(&mut upload, published, Stage::Succeeded);
            }
        }
        tracing::info!(transfer = uid, volume = upload.volume, stage = ?upload.stage, "upload");
        state.store_upload(&upload)?;
    };
    let transferred = serving.as_ref().map(|serving| serving.coverage.transferred()).or(transferred);
    drop(serving);
    let done = matches!(standing, Standing::Ended(Phase::Succeeded, _));
    let observed = Observed {
        generation: transfer.metadata.generation,
        standing,
        size: u64::try_from(volume.size).ok(),
        transferred: transferred
            .or_else(|| old.transferred_bytes.and_then(|bytes| u64::try_from(bytes).ok())),
        // what was never written is zero, and there all the same
        required: if done { Some(0) } else { None },
        now: clock::now(),
    };
    write(transfer, old, observed, context).await
}

fn take(upload: &mut Upload, done: Result<(), Because>, then: Stage) {
    upload.stage = match done {
        Ok(()) => then,
        Err(because) => Stage::Discarding(Phase::Failed, because),
    };
}

/// Why the server of the volume is not the one that was begun, where it is not.
fn interrupted(serving: Option<&mut Serving>) -> Option<Because> {
    let why = match serving {
        None => "the agent was started anew in the middle of the upload".to_owned(),
        Some(serving) => serving.server.interrupted()?.to_string(),
    };
    Some(Because::new(Reason::UploadInterrupted, format!("{why}: what was written last may be lost")))
}

/// What becomes of a transfer that nothing is stored of; why it ends, if it does.
async fn plan(
    transfer: &ImageTransfer,
    uid: &str,
    old: &ImageTransferStatus,
    volume: &NewVolume,
    wanted: &Wish,
    context: &Context,
) -> Result<Result<Upload, Because>, AgentError> {
    if let Wish::End(Phase::Cancelled, because) = wanted {
        return Ok(Err(because.clone()));
    }
    if old.ticket_secret.is_some() {
        let why =
            "this node knows nothing of the upload any more: look for its .virtmark-*.partial in the pool";
        return Ok(Err(Because::new(Reason::UploadInterrupted, why)));
    }
    let state = &context.host.state;
    let others = state.uploads()?.into_iter().filter_map(|other| state.upload(&other).ok().flatten());
    let going_on = others.filter(|other| !matches!(other.stage, Stage::Succeeded | Stage::Ended(..)));
    let mut promised = 0_u64;
    for other in going_on.filter(|other| other.pool == volume.pool) {
        promised = promised.saturating_add(other.size);
        if other.volume == volume.name {
            let why = format!("another upload makes volume {} in pool {}", volume.name, volume.pool);
            return Ok(Err(Because::new(Reason::VolumeExists, why)));
        }
    }
    let (host, wanted) = (context.host.clone(), volume.clone());
    let (folder, place) =
        match settled(context.blocking(move || Ok(volume::folder(&host, &wanted, promised))).await?)? {
            Ok(found) => found,
            Err(because) => return Ok(Err(because)),
        };
    let size = u64::try_from(volume.size).unwrap_or_default();
    let upload = Upload {
        uid: uid.to_owned(),
        namespace: transfer.namespace().unwrap_or_default(),
        name: transfer.name_any(),
        pool: volume.pool.clone(),
        folder,
        place,
        file: None,
        volume: volume.name.clone(),
        format: volume.format,
        size,
        stage: Stage::Planned,
        ticket: Ticket {
            id: TicketId::random().map_err(AgentError::Random)?,
            transfer: uid.to_owned(),
            backup: String::new(),
            disk: volume.name.clone(),
            access: Access::Write { sparse: true },
            size,
            export: server::export(&state.run_of(uid)?),
            dirty: false,
            filename: None,
        },
        secret: 1,
        announced: false,
    };
    state.store_upload(&upload)?;
    Ok(Ok(upload))
}

/// What ends the upload, apart from what is to be tried again: that libvirt does not answer.
fn settled<T>(done: Result<T, VolumeError>) -> Result<Result<T, Because>, AgentError> {
    match done {
        Ok(done) => Ok(Ok(done)),
        Err(VolumeError::Refused(because)) => Ok(Err(because)),
        Err(VolumeError::Host(HostError::Libvirt(error))) if error.is_unreachable() => Err(error.into()),
        Err(VolumeError::Host(error)) => Ok(Err(hypervisor(&error))),
    }
}

fn hypervisor(error: &dyn std::error::Error) -> Because {
    Because::new(Reason::HypervisorError, error.to_string())
}

/// Makes the volume, and serves it.
async fn make(upload: &mut Upload, context: &Context) -> Result<Result<Serving, Because>, AgentError> {
    let run = context.host.state.make_run(&upload.uid)?;
    let planned = upload.clone();
    match context.blocking(move || Ok(volume::make(&planned))).await? {
        Ok(file) => upload.file = Some(file),
        Err(error) => return Ok(Err(hypervisor(&error))),
    }
    let started = Server::start(&upload.partial(), upload.format, &run).await;
    let coverage = SharedCoverage::new(Coverage::new(upload.size));
    Ok(started.map(|server| Serving { server, coverage }).map_err(|error| hypervisor(&error)))
}

/// Has the ticket answer, and tells of it in a Secret.
async fn answer(
    transfer: &ImageTransfer,
    old: &ImageTransferStatus,
    upload: &mut Upload,
    serving: Option<&Serving>,
    context: &Context,
) -> Result<Standing, AgentError> {
    let uid = upload.uid.clone();
    let open = |number| Standing::Open { secret: Some(secret_name(&uid, number)), nbd: None };
    let told = old.ticket_secret.as_ref() == Some(&secret_name(&uid, upload.secret));
    if told && context.tickets.is_valid(&uid) {
        return Ok(open(upload.secret));
    }
    let Some(ca) = context.certificate.ca() else {
        let why = "the node's image server waits for its certificate";
        return Ok(Standing::Waiting(Because::new(Reason::BackupNotReady, why)));
    };
    if !told {
        let secrets = Api::<Secret>::namespaced(context.client.clone(), &upload.namespace);
        loop {
            // stored first: a Secret of this number that is there already is then known to be ours
            let ours = std::mem::replace(&mut upload.announced, true);
            context.host.state.store_upload(upload)?;
            let secret = secret(transfer, &upload.ticket, upload.secret, &ca, context);
            if cluster::create(&secrets, &secret, AGENT).await? || ours {
                break;
            }
            // of a ticket that was lost
            (upload.secret, upload.announced) = (upload.secret + 1, false);
        }
    }
    if let Some(serving) = serving {
        context.tickets.add(upload.ticket.clone(), Arc::clone(&serving.coverage));
    }
    Ok(open(upload.secret))
}

/// Puts all that was written on the disk, and ends the server: from here on nothing can reach the volume.
async fn close(uid: &str, serving: Option<Serving>, context: &Context) -> Result<(), Because> {
    context.tickets.end(uid, End::Removed);
    let drained = context.tickets.drained(uid, DRAIN).await;
    let interrupted = |why: String| Because::new(Reason::UploadInterrupted, why);
    let Some(Serving { server, .. }) = serving else {
        return Err(interrupted("its server is gone".to_owned()));
    };
    if !drained.is_settled() {
        // it ends with its last connection
        drop(server);
        return Err(interrupted(format!("the volume's storage did not answer for {} s", DRAIN.as_secs())));
    }
    server.close().await.map_err(|error| interrupted(error.to_string()))
}

/// Checks the volume, gives it its name, and has libvirt see it.
async fn publish(upload: &Upload, context: &Context) -> Result<Result<(), Because>, AgentError> {
    let (upload, libvirt) = (upload.clone(), context.host.libvirt.clone());
    let named = context.blocking(move || {
        let named = volume::publish(&upload);
        if named.is_ok()
            && let Err(error) = libvirt.refresh_pool(&upload.pool)
        {
            // the volume is there, and libvirt finds it when it looks next
            tracing::warn!(pool = upload.pool, %error, "the pool was not refreshed: run virsh pool-refresh");
        }
        Ok(named)
    });
    match named.await? {
        Ok(()) => Ok(Ok(())),
        Err(VolumeError::Refused(because)) => Ok(Err(because)),
        // all bytes are on the disk, and maybe under their name: only the volume itself is a reason to remove it
        Err(VolumeError::Host(error)) => Err(error.into()),
    }
}

/// Removes what there is of an upload on the host.
async fn discard(upload: &Upload, serving: Option<Serving>, context: &Context) -> Result<(), AgentError> {
    let uid = &upload.uid;
    context.tickets.end(uid, End::Canceled);
    if !context.tickets.drained(uid, DRAIN).await.is_settled() {
        tracing::warn!(transfer = uid, "requests on an ended ticket go on");
    }
    if let Some(Serving { server, .. }) = serving
        && let Err(error) = server.kill().await
    {
        tracing::warn!(transfer = uid, %error, "its storage holds it");
    }
    let (upload, host) = (upload.clone(), context.host.clone());
    let cleaned = context.blocking(move || {
        let run = host.state.run_of(&upload.uid)?;
        remove(&upload, &run)?;
        Ok(host.state.remove_run(&upload.uid)?)
    });
    cleaned.await
}

fn remove(upload: &Upload, run: &Path) -> Result<(), HostError> {
    let begun = Instant::now();
    while server::end_leftover(run) {
        if begun.elapsed() > DRAIN {
            let source = std::io::Error::other(ServerError::Lingers);
            return Err(HostError::Io { path: upload.partial(), source });
        }
        std::thread::sleep(AGAIN);
    }
    volume::remove(upload)
}

/// Removes uploads whose transfers are gone without a word, deleted by force: for ever.
pub async fn follow(context: &Context) {
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + SOON, DOUBT);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let uids = context.host.state.uploads().unwrap_or_else(|error| {
            tracing::warn!(%error, "it is not known which uploads there are");
            Vec::new()
        });
        for uid in uids {
            if let Err(error) = clean_gone(&uid, context).await {
                tracing::warn!(transfer = uid, %error, "an upload may be left whose object is gone");
            }
        }
    }
}

async fn clean_gone(uid: &str, context: &Context) -> Result<(), AgentError> {
    let state = &context.host.state;
    let slot = context.uploads.slot(uid);
    // locked means busy: its reconciler sees to it
    let Ok(mut serving) = slot.try_lock() else { return Ok(()) };
    let Some(upload) = state.upload(uid)? else {
        context.uploads.forget(uid);
        return Ok(());
    };
    let transfers = Api::<ImageTransfer>::namespaced(context.client.clone(), &upload.namespace);
    let found = transfers.get_opt(&upload.name).await?;
    if found.is_some_and(|found| found.uid().as_deref() == Some(uid)) {
        return Ok(());
    }
    tracing::warn!(
        transfer = uid,
        volume = upload.volume,
        "its ImageTransfer is gone: what is left is removed"
    );
    if !matches!(upload.stage, Stage::Succeeded | Stage::Ended(..)) {
        discard(&upload, serving.take(), context).await?;
    }
    state.forget_upload(uid)?;
    context.uploads.forget(uid);
    Ok(())
}
