//! Uploads of this node: an ImageTransfer that makes a libvirt volume, from an empty file to one that has its name.
//!
//! `record` has the machine, `plan` its begin, `perform` its steps, `volume` the file, `server` the qemu-nbd that writes it; here they
//! are put together. It writes the status of ImageTransfers and their Secrets, and never touches a volume that was there before.

mod perform;
mod plan;
mod record;
mod server;
mod volume;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kube::runtime::controller::Action as Requeue;
use kube::{Api, ResourceExt as _};

use self::perform::{answer, close, discard, make, publish};
use self::plan::plan;
use self::record::Next;
pub use self::record::{Stage, Upload};
use self::server::Server;
use super::context::DRAIN;
use super::state::{StateDir, StateError};
use super::transfer::status::{Observed, Standing};
use super::transfer::{SOON, api, wish, write};
use super::{AgentError, Context};
use crate::api::{ImageTransfer, ImageTransferStatus, NewVolume, Phase, conditions};
use crate::clock;
use crate::cluster;
use crate::imageio::{End, SharedCoverage};
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
                Err((phase, because)) => break Standing::Ended(phase, because),
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
    if !upload.stage.is_over() {
        discard(&upload, serving.take(), context).await?;
    }
    state.forget_upload(uid)?;
    context.uploads.forget(uid);
    Ok(())
}
