//! Writing to the Kubernetes API: the only file that names its parameters. It decides nothing.
//!
//! Status is written whole, at the resourceVersion it was computed from; a conflict means compute again.

use std::fmt::Debug;

use kube::api::PostParams;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::reason::Because;

/// Replaces the status of `object`, which holds the new one.
///
/// # Errors
/// A conflict when the object changed meanwhile, or whatever the API server says.
pub async fn replace_status<K>(api: &Api<K>, object: &K, manager: &str) -> Result<K, kube::Error>
where
    K: Resource + Clone + Debug + Serialize + DeserializeOwned,
{
    let params = PostParams { field_manager: Some(manager.to_owned()), ..PostParams::default() };
    api.replace_status(&object.name_any(), &params, object).await
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
pub struct Events(Recorder);

impl Events {
    /// Events of `component`, running as `instance`.
    pub fn new(client: Client, component: &str, instance: Option<String>) -> Self {
        Self(Recorder::new(client, Reporter { controller: component.to_owned(), instance }))
    }

    /// Tells of a transition of `object`. An Event that cannot be written is logged, and no more: the
    /// status has the same words.
    pub async fn tell<K>(&self, object: &K, warning: bool, action: &str, because: &Because)
    where
        K: Resource<DynamicType = ()>,
    {
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: because.reason.as_str().to_owned(),
            note: Some(because.shown().chars().take(1000).collect()),
            action: action.to_owned(),
            secondary: None,
        };
        if let Err(error) = self.0.publish(&event, &object.object_ref(&())).await {
            tracing::warn!(%error, reason = %because.reason, "an Event was not written");
        }
    }
}
