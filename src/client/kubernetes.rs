//! The objects of a backup, as the client makes, watches and ends them. It decides nothing of them, and never prints a ticket.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::exit::Failure;
use super::images::Ticket;
use super::screen::Screen;
use crate::api::{DesiredState, ImageTransfer, LibvirtDomain, Phase, VmBackup, VmCheckpoint, conditions};

/// The field manager of the client's writes.
pub const CLIENT: &str = "virtmark-client";

/// The annotation by which a client knows its own VmBackup.
pub const RUN: &str = "virtmark.dev/client-run";

/// A value of that annotation that no other has.
#[must_use]
pub fn run() -> String {
    format!("{:016x}", rand::random::<u64>())
}

/// How long an API server that does not answer is asked again to make a backup, and the time for each answer.
const MAKE: Duration = Duration::from_secs(30);
/// Between two times.
const AGAIN: Duration = Duration::from_secs(1);

/// An API server and a namespace of it.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    /// The namespace.
    pub namespace: String,
}

impl Cluster {
    /// Connects as kubectl would: `kubeconfig`, or `$KUBECONFIG`, or `~/.kube/config`, or the pod that this runs in.
    ///
    /// # Errors
    /// When none of them can be used.
    pub async fn connect(
        kubeconfig: Option<&Path>,
        context: Option<&str>,
        namespace: Option<&str>,
    ) -> Result<Self, Failure> {
        let config = crate::cluster::config(kubeconfig, context)
            .await
            .map_err(|error| Failure::Api(format!("no usable kubeconfig: {error:#}; give --kubeconfig")))?;
        let namespace = namespace.map_or_else(|| config.default_namespace.clone(), str::to_owned);
        Ok(Self::over(Client::try_from(config)?, &namespace))
    }

    /// Over a connection that is there.
    #[must_use]
    pub fn over(client: Client, namespace: &str) -> Self {
        Self { client, namespace: namespace.to_owned() }
    }

    /// A namespace of an API server that a test answers for.
    #[cfg(test)]
    pub(super) fn with(client: Client, namespace: &str) -> Self {
        Self { client, namespace: namespace.to_owned() }
    }

    /// The objects of a kind.
    #[must_use]
    pub fn of<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The object of this name.
    ///
    /// # Errors
    /// The API server's, and [`Failure::NotFound`] with what to do.
    pub async fn get<K>(&self, name: &str, hint: &str) -> Result<K, Failure>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let found = crate::cluster::find(&self.of::<K>(), name).await?;
        found.ok_or_else(|| {
            let kind = K::kind(&());
            Failure::NotFound(format!("there is no {kind} {name} in namespace {}; {hint}", self.namespace))
        })
    }

    /// The VM of this name.
    ///
    /// # Errors
    /// The API server's, and when there is none.
    pub async fn domain(&self, vm: &str) -> Result<LibvirtDomain, Failure> {
        self.get(vm, "list the VMs with kubectl get lvd, or give -n NAMESPACE").await
    }

    /// The checkpoint, if it can be a base.
    ///
    /// # Errors
    /// The API server's.
    pub async fn usable(&self, name: &str) -> Result<Option<VmCheckpoint>, Failure> {
        let found = crate::cluster::find(&self.of::<VmCheckpoint>(), name).await?;
        Ok(found.filter(VmCheckpoint::is_base))
    }

    /// The VmBackup as it is now; `None` when it is gone, also when there is another one of its name.
    ///
    /// # Errors
    /// The API server's.
    pub async fn now(&self, backup: &VmBackup) -> Result<Option<VmBackup>, Failure> {
        let found = crate::cluster::find(&self.of::<VmBackup>(), &backup.name_any()).await?;
        Ok(found.filter(|found| found.uid() == backup.uid()))
    }

    /// Makes a VmBackup of ours, once, whatever becomes of the answers: its annotation tells it from another of its name. It is not
    /// to be given up in between, since it may be made then.
    ///
    /// # Errors
    /// Why it was not made, or [`Failure::Unanswered`].
    pub async fn make(&self, object: &VmBackup) -> Result<VmBackup, Failure> {
        let params = PostParams { field_manager: Some(CLIENT.to_owned()), ..PostParams::default() };
        let (api, name, began) = (self.of::<VmBackup>(), object.name_any(), Instant::now());
        let is_ours = |found: &VmBackup| found.annotations().get(RUN) == object.annotations().get(RUN);
        loop {
            let error = match tokio::time::timeout(MAKE, api.create(&params, object)).await {
                Ok(Ok(made)) => return Ok(made),
                Ok(Err(kube::Error::Api(status))) if status.is_already_exists() => {
                    match crate::cluster::find(&api, &name).await {
                        Ok(Some(found)) if is_ours(&found) => return Ok(found),
                        Ok(_) => return Err(kube::Error::Api(status).into()),
                        Err(error) => Failure::from(error),
                    }
                }
                Ok(Err(kube::Error::Api(status))) if is_final(status.code) => {
                    return Err(kube::Error::Api(status).into());
                }
                Ok(Err(error)) => error.into(),
                Err(_) => Failure::Api(format!("no answer within {} s", MAKE.as_secs())),
            };
            if began.elapsed() > MAKE {
                return Err(Failure::Unanswered { what: format!("VmBackup {name}"), why: error.to_string() });
            }
            tracing::debug!(%error, "making VmBackup {name} again");
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Says what is wanted of a backup: of this one, and not of another of its name.
    ///
    /// # Errors
    /// The API server's.
    pub async fn want(&self, backup: &VmBackup, state: DesiredState) -> Result<(), Failure> {
        let params = PatchParams { field_manager: Some(CLIENT.to_owned()), ..PatchParams::default() };
        let wish = Patch::Merge(json!({"metadata": {"uid": backup.uid()}, "spec": {"state": state}}));
        self.of::<VmBackup>().patch(&backup.name_any(), &params, &wish).await?;
        Ok(())
    }

    /// Watches an object until `holds` answers something, or an error. `None` is an object that is not there.
    ///
    /// # Errors
    /// What `holds` says, when permission is missing, and [`Failure::Late`].
    pub async fn until<K, T>(
        &self,
        name: &str,
        bound: Duration,
        mut holds: impl FnMut(Option<&K>) -> Result<Option<T>, Failure>,
    ) -> Result<T, Failure>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Debug
            + DeserializeOwned
            + Send
            + 'static,
    {
        let kind = K::kind(&());
        let watch = async {
            let mut seen = Box::pin(watcher::watch_object(self.of::<K>(), name).default_backoff());
            while let Some(seen) = seen.next().await {
                match seen {
                    Ok(object) => {
                        if let Some(answer) = holds(object.as_ref())? {
                            return Ok(answer);
                        }
                    }
                    Err(watcher::Error::InitialListFailed(error)) if is_refusal(&error) => {
                        return Err(error.into());
                    }
                    // it is watched again
                    Err(error) => tracing::debug!(%error, "watching {kind} {name}"),
                }
            }
            Err(Failure::Api(format!("nobody watches {kind} {name} any more")))
        };
        let late = |_| {
            let words = format!(
                "{kind} {name} is not there yet after {} s; look with kubectl describe",
                bound.as_secs()
            );
            Failure::Late(words)
        };
        tokio::time::timeout(bound, watch).await.map_err(late)?
    }

    /// Waits until the disks of a backup can be read, or could be: it may be past that. Each new reason to wait is said.
    ///
    /// # Errors
    /// When it ends instead, with its reason.
    pub async fn ready(
        &self,
        backup: &VmBackup,
        bound: Duration,
        screen: &Screen,
    ) -> Result<VmBackup, Failure> {
        let mut told = String::new();
        self.until::<VmBackup, _>(&backup.name_any(), bound, |object| {
            let object = present(object, backup)?;
            let status = object.status.clone().unwrap_or_default();
            if matches!(status.phase, Phase::Ready | Phase::Finalizing | Phase::Succeeded) {
                return Ok(Some(object.clone()));
            }
            running(object)?;
            if let Some(ready) = conditions::get(&status.conditions, conditions::READY)
                && told != ready.reason
            {
                told.clone_from(&ready.reason);
                screen.say(format!("Waiting: {}: {}", ready.reason, ready.message));
            }
            Ok(None)
        })
        .await
    }

    /// Waits until a backup that was finalized has succeeded.
    ///
    /// # Errors
    /// When it ends otherwise, with its reason.
    pub async fn succeeded(&self, backup: &VmBackup, bound: Duration) -> Result<VmBackup, Failure> {
        self.until::<VmBackup, _>(&backup.name_any(), bound, |object| {
            let object = present(object, backup)?;
            match object.phase() {
                Phase::Succeeded => Ok(Some(object.clone())),
                Phase::Failed | Phase::Cancelled => Err(refused(object)),
                _ => Ok(None),
            }
        })
        .await
    }

    /// Waits until a backup has ended in any way, and answers how; `None` when it is gone.
    ///
    /// # Errors
    /// When that takes too long.
    pub async fn ended(&self, backup: &VmBackup, bound: Duration) -> Result<Option<VmBackup>, Failure> {
        self.until::<VmBackup, _>(&backup.name_any(), bound, |object| match present(object, backup) {
            Err(_) => Ok(Some(None)),
            Ok(object) => Ok(object.phase().is_terminal().then(|| Some(object.clone()))),
        })
        .await
    }

    /// Comes back, with its reason, when a backup that is being read ends.
    pub async fn lost(&self, backup: &VmBackup) -> Failure {
        let forever = Duration::from_secs(365 * 86_400);
        let name = backup.name_any();
        let lost = self.until::<VmBackup, Failure>(&name, forever, |object| {
            running(present(object, backup)?).map(|()| None)
        });
        lost.await.unwrap_or_else(|failure| failure)
    }

    /// The ticket of a disk of a backup, once it can be used. A transfer that reads of another backup of that name is not it.
    ///
    /// # Errors
    /// When the transfer ends instead, or its Secret may not be read.
    pub async fn ticket(&self, backup: &VmBackup, disk: &str, bound: Duration) -> Result<Ticket, Failure> {
        let transfer = &format!("{}-{disk}", backup.name_any());
        let secret = self.until::<ImageTransfer, String>(transfer, bound, |object| {
            let Some(status) = object.and_then(|object| object.status.as_ref()) else { return Ok(None) };
            if status.backup_uid != backup.uid() {
                return Ok(None);
            }
            if status.phase.is_terminal() {
                return Err(because("ImageTransfer", transfer, &status.conditions));
            }
            Ok(status.ticket_secret.clone().filter(|_| status.phase == Phase::Ready))
        });
        let secret: Secret = self.get(&secret.await?, "the transfer has ended").await?;
        let data = secret.data.unwrap_or_default();
        let text = |key: &str| data.get(key).map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned());
        let socket = text("unixSocket").filter(|path| !path.is_empty()).map(PathBuf::from);
        let ca = data.get("ca.crt").map(|bytes| bytes.0.as_slice()).unwrap_or_default();
        Ok(Ticket::new(&text("url").unwrap_or_default(), ca, socket)?)
    }
}

fn is_refusal(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 401 | 403 | 404))
}

/// Whether the API server will not think otherwise of a request, and did nothing.
fn is_final(code: u16) -> bool {
    (400..500).contains(&code) && !matches!(code, 408 | 429)
}

/// The object, when it is still that one: another one of its name holds another point in time.
fn present<'a>(object: Option<&'a VmBackup>, backup: &VmBackup) -> Result<&'a VmBackup, Failure> {
    object.filter(|object| object.uid() == backup.uid()).ok_or_else(|| {
        Failure::NotFound(format!("VmBackup {} is gone: somebody deleted it", backup.name_any()))
    })
}

/// An error once the backup has ended, or is to end, otherwise than well.
fn running(backup: &VmBackup) -> Result<(), Failure> {
    let phase = backup.phase();
    let ends = phase.is_terminal() && phase != Phase::Succeeded;
    if ends || backup.metadata.deletion_timestamp.is_some() {
        return Err(refused(backup));
    }
    Ok(())
}

/// Why a backup ended.
#[must_use]
pub fn refused(backup: &VmBackup) -> Failure {
    let told = backup.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    because("VmBackup", &backup.name_any(), told)
}

/// Why an object ended, by its conditions.
pub(super) fn because(kind: &str, name: &str, told: &[Condition]) -> Failure {
    let what = format!("{kind} {name}");
    match conditions::get(told, conditions::READY) {
        Some(ready) => {
            Failure::Refused { what, reason: ready.reason.clone(), message: ready.message.clone() }
        }
        None => Failure::Refused {
            what,
            reason: "Deleted".to_owned(),
            message: "it ended before anything was said of it".to_owned(),
        },
    }
}

/// Waits for `work`, unless the user wants no more.
///
/// # Errors
/// The work's, and [`Failure::Interrupted`].
pub async fn unless<T>(
    stop: &CancellationToken,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    tokio::select! {
        biased;
        () = stop.cancelled() => Err(Failure::Interrupted),
        done = work => done,
    }
}
