//! What becomes of a transfer that nothing is stored of: an upload, or its end. It makes no file.

use kube::ResourceExt as _;

use super::perform::settled;
use super::record::{Stage, Upload};
use super::{server, volume};
use crate::agent::transfer::Wish;
use crate::agent::{AgentError, Context};
use crate::api::{ImageTransfer, ImageTransferStatus, NewVolume, Phase};
use crate::imageio::{Access, Ticket, TicketId};
use crate::reason::{Because, Reason};

/// What becomes of a transfer that nothing is stored of; in which phase it ends and why, if it does.
pub(super) async fn plan(
    transfer: &ImageTransfer,
    uid: &str,
    old: &ImageTransferStatus,
    volume: &NewVolume,
    wanted: &Wish,
    context: &Context,
) -> Result<Result<Upload, (Phase, Because)>, AgentError> {
    if let Wish::End(phase @ Phase::Cancelled, because) = wanted {
        return Ok(Err((*phase, because.clone())));
    }
    let failed = |because| Ok(Err((Phase::Failed, because)));
    if old.ticket_secret.is_some() {
        let why =
            "this node knows nothing of the upload any more: look for its .virtmark-*.partial in the pool";
        return failed(Because::new(Reason::UploadInterrupted, why));
    }
    let state = &context.host.state;
    let others = state.uploads()?.into_iter().filter_map(|other| state.upload(&other).ok().flatten());
    let going_on = others.filter(|other| !other.stage.is_over());
    let mut promised = 0_u64;
    for other in going_on.filter(|other| other.pool == volume.pool) {
        promised = promised.saturating_add(other.size);
        if other.volume == volume.name {
            let why = format!("another upload makes volume {} in pool {}", volume.name, volume.pool);
            return failed(Because::new(Reason::VolumeExists, why));
        }
    }
    let (host, wanted) = (context.host.clone(), volume.clone());
    let (folder, place) =
        match settled(context.blocking(move || Ok(volume::folder(&host, &wanted, promised))).await?)? {
            Ok(found) => found,
            Err(because) => return failed(because),
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
