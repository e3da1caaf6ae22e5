//! Follows this node's own Node object: since when it is cordoned, for a drain that must not wait for a backup.

use std::sync::{Mutex, MutexGuard, PoisonError};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::runtime::{WatchStreamExt as _, watcher};

use super::Context;
use crate::clock;
use crate::cluster;

/// Since when the node is cordoned, as far as this process saw.
#[derive(Debug, Default)]
pub struct Cordon(Mutex<Option<Timestamp>>);

impl Cordon {
    fn held(&self) -> MutexGuard<'_, Option<Timestamp>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when; `None` when it is not.
    pub fn since(&self) -> Option<Timestamp> {
        *self.held()
    }

    /// Notes what the Node says at `now`; answers whether that is news.
    fn note(&self, cordoned: bool, now: Timestamp) -> bool {
        let mut since = self.held();
        let news = since.is_some() != cordoned;
        if news {
            *since = cordoned.then_some(now);
        }
        news
    }
}

/// Follows the Node, for ever, and looks again at this node's backups when it is cordoned or uncordoned.
pub async fn follow(context: &Context) {
    let own = watcher::Config::default().fields(&format!("metadata.name={}", context.node));
    let nodes = Api::<Node>::all(context.client.clone());
    let mut events = watcher(nodes, own).default_backoff().applied_objects().boxed();
    while let Some(event) = events.next().await {
        match event {
            Ok(node) => {
                let cordoned = node.spec.and_then(|spec| spec.unschedulable).unwrap_or_default();
                if context.cordon.note(cordoned, clock::now()) {
                    tracing::info!(cordoned, "the node's cordon changed");
                    context.registry.wake_domain(None);
                }
            }
            Err(error) => cluster::watch_broke("this node's Node", &error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_from_when_it_was_cordoned_first() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let cordon = Cordon::default();
        assert!(!cordon.note(false, at(1)));
        assert!(cordon.note(true, at(2)));
        assert!(!cordon.note(true, at(3)));
        assert_eq!(cordon.since(), Some(at(2)));
        assert!(cordon.note(false, at(4)));
        assert_eq!(cordon.since(), None);
    }
}
