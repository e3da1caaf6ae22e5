//! Follows the Nodes, and looks again at what waits for one, or works on one, when its health changes.

use std::collections::HashMap;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, ResourceExt as _};

use super::Context;
use super::backup::resolve::NodeHealth;
use crate::cluster;

/// Follows them, for ever.
pub async fn follow(context: &Context) {
    let mut known: HashMap<String, NodeHealth> = HashMap::new();
    let nodes = Api::<Node>::all(context.client.clone());
    let mut events = watcher(nodes, watcher::Config::default()).default_backoff().boxed();
    while let Some(event) = events.next().await {
        let changed = match event {
            Ok(Event::Apply(node) | Event::InitApply(node)) => {
                let health = health(&node);
                known.insert(node.name_any(), health).is_some_and(|before| before != health)
            }
            Ok(Event::Delete(node)) => known.remove(&node.name_any()).is_some(),
            // what was deleted while nobody watched is found by everybody's safety net
            Ok(Event::Init | Event::InitDone) => false,
            Err(error) => {
                cluster::watch_broke("Nodes", &error);
                false
            }
        };
        if changed {
            context.wake_all();
        }
    }
}

/// What a Node object says of its health.
pub fn health(node: &Node) -> NodeHealth {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let not_ready =
        conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status != "True");
    if not_ready { NodeHealth::NotReady } else { NodeHealth::Up }
}
