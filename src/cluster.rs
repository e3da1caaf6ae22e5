//! Watching and writing to the Kubernetes API: the only file that names its parameters. It decides nothing.
//!
//! Status is written whole, at the resourceVersion it was computed from; a conflict means compute again.

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::{BoxFuture, FutureExt as _, Ready, ready};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::client::ClientBuilder;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::object::HasStatus;
use kube::runtime::controller::{Action as Requeue, Error as ControllerError};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::utils::Backoff;
use kube::runtime::{Controller, WatchStreamExt as _, reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::api::{DesiredState, DomainSighting, FINALIZER, OPERATOR, VmBackup};
use crate::metrics::Metrics;
use crate::metrics::requests::Counting;
use crate::probe::Sign;
use crate::reason::{Because, Reason};

/// How often the operator looks whether the store was put back.
const LOOK: Duration = Duration::from_secs(5);

/// Replaces the status of `object` by a new one.
///
/// # Errors
/// A conflict when the object changed since it was read, or whatever the API server says.
pub async fn replace_status<K>(
    api: &Api<K>,
    object: &K,
    status: K::Status,
    manager: &str,
) -> Result<K, kube::Error>
where
    K: Resource + HasStatus + Clone + Debug + Serialize + DeserializeOwned,
{
    let mut object = object.clone();
    // the API server knows them, and they are longer than all the rest
    object.meta_mut().managed_fields = None;
    *object.status_mut() = Some(status);
    let params = PostParams { field_manager: Some(manager.to_owned()), ..PostParams::default() };
    let written = api.replace_status(&object.name_any(), &params, &object).await?;
    saw(written.meta().resource_version.as_deref());
    Ok(written)
}

/// Whether `object` is what the API server has now. A watch is often behind our own last write: asking first
/// costs a read, where a conflict costs a write.
///
/// # Errors
/// Whatever the API server says.
pub async fn is_newest<K>(api: &Api<K>, object: &K) -> Result<bool, kube::Error>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    let newest = api.get_metadata_opt(&object.name_any()).await?;
    Ok(newest.is_some_and(|newest| newest.metadata.resource_version == object.resource_version()))
}

/// A controller of what `config` selects. `left` hears of what leaves the watch, by whatever door: it is selected no
/// more, it was deleted, or it was deleted by force, which nobody was asked about. While the API server is away the watch
/// waits, and nothing else: `Controller::new` would hold back every other trigger too, libvirt's events among them.
pub fn controller<K>(
    api: Api<K>,
    config: watcher::Config,
    left: impl Fn(&K) + Send + 'static,
) -> Controller<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let changes =
        watcher(api, config).backoff(Patience::default()).reflect(writer).inspect(move |event| match event {
            Ok(watcher::Event::Delete(object)) => left(object),
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                saw(object.meta().resource_version.as_deref());
            }
            _ => {}
        });
    let changes = changes.applied_objects().filter_map(|change| async {
        change.inspect_err(|error| watch_broke(&K::kind(&()), error)).ok().map(Ok)
    });
    Controller::for_stream(changes, reader)
}

/// Logs that the watch of `what` broke; it begins anew by itself. That it began at a version that the API server has no more, as it
/// does soon after that one's start, is no news.
pub fn watch_broke(what: &str, error: &watcher::Error) {
    match error {
        watcher::Error::WatchError(status) if status.code == 410 => {
            tracing::debug!(%error, "watching {what}");
        }
        _ => tracing::warn!(%error, "watching {what}"),
    }
}

/// A reconciler whose looks at objects are timed in `metrics`.
pub fn timed<K, C, F>(
    metrics: &Arc<Metrics>,
    reconcile: impl Fn(Arc<K>, Arc<C>) -> F,
) -> impl FnMut(Arc<K>, Arc<C>) -> BoxFuture<'static, F::Output>
where
    K: Resource<DynamicType = ()>,
    F: Future + Send + 'static,
{
    let metrics = Arc::clone(metrics);
    move |object, context| {
        let (metrics, look) = (Arc::clone(&metrics), reconcile(object, context));
        async move { metrics.timed(&K::kind(&()), look).await }.boxed()
    }
}

/// Notes in `metrics` what a controller says beside the errors of its reconciler, which that one is told of itself.
pub fn noted<K, E>(metrics: &Arc<Metrics>) -> impl FnMut(Looked<K, E>) -> Ready<()>
where
    K: Resource<DynamicType = ()>,
    E: std::error::Error + 'static,
{
    metrics.watches(&K::kind(&()));
    let metrics = Arc::clone(metrics);
    move |result| {
        match result {
            Ok(_) | Err(ControllerError::ObjectNotFound(_) | ControllerError::ReconcilerFailed(..)) => {}
            Err(error) => {
                let kind = K::kind(&());
                metrics.failed(&kind, "watch");
                tracing::warn!(%kind, %error, "watching");
            }
        }
        ready(())
    }
}

/// What a controller says of one look at an object.
type Looked<K, E> = Result<(ObjectRef<K>, Requeue), ControllerError<E, watcher::Error>>;

/// How long a watch waits before it asks again: longer each time, never long, and never all at once.
#[derive(Default)]
struct Patience {
    failures: u32,
}

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let most = 250 << self.failures;
        self.failures = (self.failures + 1).min(4);
        Some(Duration::from_millis(rand::random_range(most / 2..=most)))
    }
}

impl Backoff for Patience {
    fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Creates `object`. Answers false when one of this name is there already.
///
/// # Errors
/// Whatever else the API server says.
pub async fn create<K>(api: &Api<K>, object: &K, manager: &str) -> Result<bool, kube::Error>
where
    K: Resource + Clone + Debug + Serialize + DeserializeOwned,
{
    let params = PostParams { field_manager: Some(manager.to_owned()), ..PostParams::default() };
    match api.create(&params, object).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes Events in the name of one component.
#[derive(Clone)]
pub struct Events {
    recorder: Recorder,
    metrics: Arc<Metrics>,
}

impl Events {
    /// Events of `component`, running as `instance`; they are counted in `metrics`.
    pub fn new(client: Client, component: &str, instance: Option<String>, metrics: Arc<Metrics>) -> Self {
        let reporter = Reporter { controller: component.to_owned(), instance };
        Self { recorder: Recorder::new(client, reporter), metrics }
    }

    /// Tells of a transition of `object`. An Event that cannot be written is logged, and no more: the
    /// status has the same words.
    pub async fn tell<K>(&self, object: &K, warning: bool, action: &str, because: &Because)
    where
        K: Resource<DynamicType = ()>,
    {
        self.say(object, warning, action, because.reason, &because.shown()).await;
    }

    /// The same in words that are a condition's already.
    pub async fn say<K>(&self, object: &K, warning: bool, action: &str, reason: Reason, words: &str)
    where
        K: Resource<DynamicType = ()>,
    {
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: reason.as_str().to_owned(),
            note: Some(words.chars().take(1000).collect()),
            action: action.to_owned(),
            secondary: None,
        };
        self.metrics.told(&K::kind(&()), reason.as_str(), warning);
        if let Err(error) = self.recorder.publish(&event, &object.object_ref(&())).await {
            tracing::warn!(%error, %reason, "an Event was not written");
        }
    }
}

/// Adds our finalizer, unless it is there.
///
/// # Errors
/// A conflict when the object changed meanwhile, or whatever the API server says.
pub async fn hold<K>(api: &Api<K>, object: &K) -> Result<K, kube::Error>
where
    K: Resource + Clone + Debug + Serialize + DeserializeOwned,
{
    if object.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        return Ok(object.clone());
    }
    let mut finalizers = object.finalizers().to_vec();
    finalizers.push(FINALIZER.to_owned());
    finalize(api, object, &finalizers).await
}

/// Removes our finalizer. An object that is gone is released.
///
/// # Errors
/// A conflict when the object changed meanwhile, or whatever the API server says.
pub async fn release<K>(api: &Api<K>, object: &K) -> Result<(), kube::Error>
where
    K: Resource + Clone + Debug + Serialize + DeserializeOwned,
{
    let left: Vec<_> =
        object.finalizers().iter().filter(|finalizer| *finalizer != FINALIZER).cloned().collect();
    if left.len() == object.finalizers().len() {
        return Ok(());
    }
    gone(finalize(api, object, &left).await.map(drop))
}

async fn finalize<K>(api: &Api<K>, object: &K, finalizers: &[String]) -> Result<K, kube::Error>
where
    K: Resource + Clone + Debug + Serialize + DeserializeOwned,
{
    // a merge patch at the resourceVersion that was read: a finalizer of somebody else is never lost
    let metadata = json!({"finalizers": finalizers, "resourceVersion": object.resource_version()});
    let params = PatchParams { field_manager: Some(OPERATOR.to_owned()), ..PatchParams::default() };
    api.patch(&object.name_any(), &params, &Patch::Merge(json!({"metadata": metadata}))).await
}

/// Cancels a backup in its user's place, if it is still as it was read; answers whether it was.
///
/// # Errors
/// Whatever else the API server says.
pub async fn cancel(client: &Client, backup: &VmBackup) -> Result<bool, kube::Error> {
    let api = Api::<VmBackup>::namespaced(client.clone(), &backup.namespace().unwrap_or_default());
    let wish = json!({"metadata": {"resourceVersion": backup.resource_version()},
        "spec": {"state": DesiredState::Cancelled}});
    let params = PatchParams { field_manager: Some(OPERATOR.to_owned()), ..PatchParams::default() };
    match api.patch(&backup.name_any(), &params, &Patch::Merge(wish)).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Deletes the object of this name and uid. One that is gone is deleted.
///
/// # Errors
/// Whatever else the API server says.
pub async fn delete<K>(api: &Api<K>, name: &str, uid: Option<String>) -> Result<(), kube::Error>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    let preconditions = uid.map(|uid| Preconditions { uid: Some(uid), resource_version: None });
    gone(api.delete(name, &DeleteParams { preconditions, ..DeleteParams::default() }).await.map(drop))
}

fn gone(result: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(error) if is_absent(&error) => Ok(()),
        other => other,
    }
}

/// What a process says that ends because the store was [put back](Asked::went_back).
pub const REWOUND: &str = "the API server's store was put back to an earlier state: what was watched is no more, so this starts \
    anew";

/// The newest version of the API server's store that this process has seen, in whatever it watched or wrote.
static NEWEST: AtomicU64 = AtomicU64::new(0);

fn parsed(version: Option<&str>) -> Option<u64> {
    version?.parse().ok()
}

/// Notes the version of something that was watched or written.
fn saw(version: Option<&str>) {
    if let Some(version) = parsed(version) {
        NEWEST.fetch_max(version, Ordering::Relaxed);
    }
}

/// The newest version that had been seen when the API server was asked for something: the store has no older one to tell.
#[derive(Clone, Copy, Debug)]
pub struct Asked(u64);

impl Asked {
    /// Before the request is sent: what is seen until the answer comes may be newer than that.
    pub fn now() -> Self {
        Self(NEWEST.load(Ordering::Relaxed))
    }

    /// Whether the store was put back to an earlier state meanwhile, as when etcd is restored. `version` is the answer's, and
    /// the store's own of that moment; these only grow. Watches go on from versions that are to come then, and see nothing
    /// until they do.
    pub fn went_back(self, version: Option<&str>) -> bool {
        saw(version);
        parsed(version).is_some_and(|version| version < self.0)
    }
}

/// Comes back once the API server's store was put back to an earlier state. Each answer is a sign of the API server.
pub async fn rewound(client: &Client, namespace: &str, sign: &Sign) {
    let any = Api::<DomainSighting>::namespaced(client.clone(), namespace);
    loop {
        tokio::time::sleep(LOOK).await;
        let asked = Asked::now();
        let list = any.list_metadata(&ListParams::default().limit(1)).await;
        sign.note(&list);
        // the list's own version is the store's
        if let Ok(list) = list
            && asked.went_back(list.metadata.resource_version.as_deref())
        {
            // whoever reads from now on is not behind
            NEWEST.store(0, Ordering::Relaxed);
            tracing::error!("{REWOUND}");
            return;
        }
    }
}

/// Whether the kind `K` itself is being removed, and all its objects with it.
///
/// # Errors
/// Whatever the API server says.
pub async fn is_being_removed<K>(client: &Client) -> Result<bool, kube::Error>
where
    K: Resource<DynamicType = ()>,
{
    let name = format!("{}.{}", K::plural(&()), K::group(&()));
    let definition = Api::<CustomResourceDefinition>::all(client.clone()).get_metadata_opt(&name).await?;
    Ok(definition.is_none_or(|definition| definition.metadata.deletion_timestamp.is_some()))
}

/// The objects that `chosen` selects. Of a kind that is gone there are none: whoever cleans up after it does not wait for it.
///
/// # Errors
/// Whatever else the API server says.
pub async fn remaining<K>(api: &Api<K>, chosen: &ListParams) -> Result<Vec<K>, kube::Error>
where
    K: Clone + DeserializeOwned + Debug,
{
    match api.list(chosen).await {
        Ok(list) => Ok(list.items),
        Err(error) if is_absent(&error) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The object of this name; `None` also when its kind is gone.
///
/// # Errors
/// Whatever else the API server says.
pub async fn find<K>(api: &Api<K>, name: &str) -> Result<Option<K>, kube::Error>
where
    K: Clone + DeserializeOwned + Debug,
{
    match api.get(name).await {
        Ok(found) => Ok(Some(found)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether an object is not there, or its kind is not: that answer is no Status, and `Status::is_not_found` of kube 5.0 does
/// not know it by its code.
pub fn is_absent(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// A client for the API server that `kubeconfig` names, or the environment does, or the pod runs under.
///
/// # Errors
/// When there is none.
pub async fn connect(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    Ok(Client::try_from(config(kubeconfig, None).await?)?)
}

/// The same, with every request counted in `metrics`.
///
/// # Errors
/// When there is none.
pub async fn connect_counted(kubeconfig: Option<&Path>, metrics: &Arc<Metrics>) -> anyhow::Result<Client> {
    let stack = ClientBuilder::try_from(config(kubeconfig, None).await?)?;
    Ok(stack.with_layer(&Counting(Arc::clone(metrics))).build())
}

/// How to reach the API server that `kubeconfig` names, or the environment does, or the pod runs under; by a `context` of the
/// kubeconfig, or its current one.
///
/// # Errors
/// When none of them can be used.
pub async fn config(kubeconfig: Option<&Path>, context: Option<&str>) -> anyhow::Result<kube::Config> {
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    Ok(match (kubeconfig, context) {
        (Some(path), _) => {
            kube::Config::from_custom_kubeconfig(Kubeconfig::read_from(path)?, &options).await?
        }
        (None, Some(_)) => kube::Config::from_kubeconfig(&options).await?,
        (None, None) => kube::Config::infer().await?,
    })
}

/// The cluster's id: the first 8 hex digits of the uid of its namespace kube-system.
///
/// # Errors
/// Whatever the API server says.
pub async fn id(client: &Client) -> Result<String, kube::Error> {
    let system = Api::<Namespace>::all(client.clone()).get("kube-system").await?;
    Ok(system.uid().unwrap_or_default().chars().filter(char::is_ascii_hexdigit).take(8).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_only_grow_unless_the_store_was_put_back() {
        let before = Asked::now();
        assert!(!before.went_back(Some("7")));
        let asked = Asked::now();
        // seen on a watch before the answer came
        saw(Some("21"));
        assert!(!asked.went_back(Some("20")));
        assert!(!asked.went_back(Some("opaque")) && !asked.went_back(None));
        assert!(Asked::now().went_back(Some("20")), "21 was there before it was asked");
    }

    #[test]
    fn a_watch_asks_again_within_seconds_however_long_the_api_server_was_away() {
        let mut patience = Patience::default();
        let waits: Vec<_> = patience.by_ref().take(100).map(|wait| wait.as_millis()).collect();
        assert!((125..=250).contains(&waits[0]), "{waits:?}");
        assert!(waits[4..].iter().all(|wait| (2000..=4000).contains(wait)), "{waits:?}");
        patience.reset();
        assert!(patience.next().is_some_and(|wait| wait.as_millis() <= 250));
    }
}
