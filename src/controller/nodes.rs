//! Follows the Nodes, and looks again at what waits for one, or works on one, when its health changes. A node that is not known
//! is asked for: nothing is ever called gone because nobody saw it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, ResourceExt as _};

use super::Context;
use super::backup::resolve::NodeHealth;
use crate::cluster;

/// The Nodes as they were seen last.
#[derive(Debug, Default)]
pub struct Nodes(Mutex<HashMap<String, Seen>>);

#[derive(Debug)]
struct Seen {
    health: NodeHealth,
    /// The watch has not broken since, nor begun anew.
    current: bool,
}

impl Nodes {
    /// The health of one that is watched; `None` of one that must be asked for.
    pub fn health(&self, name: &str) -> Option<NodeHealth> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(name).filter(|node| node.current).map(|node| node.health)
    }

    /// Takes an event of the watch, `None` when it broke; whether a node's health is another one.
    fn take(&self, event: Option<Event<Node>>) -> bool {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Some(Event::Apply(node) | Event::InitApply(node)) => {
                let now = Seen { health: health(&node), current: true };
                let health = now.health;
                seen.insert(node.name_any(), now).is_some_and(|before| before.health != health)
            }
            Some(Event::Delete(node)) => seen.remove(&node.name_any()).is_some(),
            // what was deleted while nobody watched is found by everybody's safety net
            Some(Event::Init) | None => {
                seen.values_mut().for_each(|node| node.current = false);
                false
            }
            Some(Event::InitDone) => false,
        }
    }
}

/// Follows them, for ever.
pub async fn follow(context: &Context) {
    let nodes = Api::<Node>::all(context.client.clone());
    // one that hangs without a word tells nothing for no longer than that
    let config = watcher::Config::default().timeout(60);
    let mut events = watcher(nodes, config).default_backoff().boxed();
    while let Some(event) = events.next().await {
        let event = event.inspect_err(|error| cluster::watch_broke("Nodes", error)).ok();
        if context.nodes.take(event) {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, ready: &str) -> Node {
        let conditions = json!([{"type": "Ready", "status": ready}]);
        serde_json::from_value(json!({"metadata": {"name": name}, "status": {"conditions": conditions}}))
            .unwrap()
    }

    #[test]
    fn only_what_is_watched_is_believed() {
        let nodes = Nodes::default();
        assert_eq!(nodes.health("a"), None, "it may be there");
        assert!(!nodes.take(Some(Event::InitApply(node("a", "True")))));
        assert!(!nodes.take(Some(Event::InitApply(node("b", "True")))));
        assert_eq!(nodes.health("a"), Some(NodeHealth::Up));
        assert!(nodes.take(Some(Event::Apply(node("a", "Unknown")))));
        assert_eq!(nodes.health("a"), Some(NodeHealth::NotReady));
        assert!(nodes.take(Some(Event::Delete(node("a", "Unknown")))));
        assert_eq!(nodes.health("a"), None, "gone is what the API server calls gone");
        // while the watch is broken, and until it has listed what there is
        for event in [None, Some(Event::Init)] {
            nodes.take(event);
            assert_eq!(nodes.health("b"), None);
            assert!(nodes.take(Some(Event::InitApply(node("b", "Unknown")))), "it changed meanwhile");
            assert!(nodes.take(Some(Event::Apply(node("b", "True")))));
        }
    }
}
