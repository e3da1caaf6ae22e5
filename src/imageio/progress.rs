//! When a connection's bytes moved last. It knows not which bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// The last movement of one connection; clones are handles of the same.
#[derive(Clone, Debug)]
pub(super) struct Progress {
    begun: Instant,
    /// Milliseconds from `begun` to the last byte that moved.
    last: Arc<AtomicU64>,
}

impl Progress {
    /// Of a connection that begins now.
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), last: Arc::default() }
    }

    /// When the connection began.
    pub(super) fn begun(&self) -> Instant {
        self.begun
    }

    /// A byte moved.
    pub(super) fn moved(&self) {
        let elapsed = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(elapsed, Ordering::Relaxed);
    }

    /// When the last byte moved; the begin before any did.
    pub(super) fn last(&self) -> Instant {
        self.begun + Duration::from_millis(self.last.load(Ordering::Relaxed))
    }
}
