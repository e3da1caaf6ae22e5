//! What is done for an upload, step by step: each can be repeated. It decides nothing, and writes no status.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Secret;
use kube::Api;

use super::record::Upload;
use super::server::{Server, ServerError};
use super::volume::VolumeError;
use super::{Serving, server, volume};
use crate::agent::backup::act::HostError;
use crate::agent::context::DRAIN;
use crate::agent::transfer::status::Standing;
use crate::agent::transfer::{secret, secret_name, uncertified};
use crate::agent::{AgentError, Context};
use crate::api::{AGENT, ImageTransfer, ImageTransferStatus};
use crate::cluster;
use crate::imageio::{Coverage, End, SharedCoverage};
use crate::reason::{Because, Reason};

/// How soon it is looked again whether a server has ended.
const AGAIN: Duration = Duration::from_millis(20);

/// What ends the upload, apart from what is to be tried again: that libvirt does not answer.
pub(super) fn settled<T>(done: Result<T, VolumeError>) -> Result<Result<T, Because>, AgentError> {
    match done {
        Ok(done) => Ok(Ok(done)),
        Err(VolumeError::Refused(because)) => Ok(Err(because)),
        Err(VolumeError::Host(HostError::Libvirt(error))) if error.is_unreachable() => Err(error.into()),
        Err(VolumeError::Host(error)) => Ok(Err(hypervisor(&error))),
    }
}

pub(super) fn hypervisor(error: &dyn std::error::Error) -> Because {
    Because::new(Reason::HypervisorError, error.to_string())
}

/// Makes the volume, and serves it.
pub(super) async fn make(
    upload: &mut Upload,
    context: &Context,
) -> Result<Result<Serving, Because>, AgentError> {
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
pub(super) async fn answer(
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
        return Ok(uncertified());
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
pub(super) async fn close(uid: &str, serving: Option<Serving>, context: &Context) -> Result<(), Because> {
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
pub(super) async fn publish(upload: &Upload, context: &Context) -> Result<Result<(), Because>, AgentError> {
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
pub(super) async fn discard(
    upload: &Upload,
    serving: Option<Serving>,
    context: &Context,
) -> Result<(), AgentError> {
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
