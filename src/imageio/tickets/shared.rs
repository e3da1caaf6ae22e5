//! The coverage of a disk in the hands of several: its transfers, the server, and whoever keeps it. It adds nothing but the lock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::imageio::coverage::Coverage;

/// The coverage of a disk, shared by its transfers, the server and whoever keeps it.
#[derive(Debug)]
pub struct SharedCoverage(Mutex<Coverage>);

impl SharedCoverage {
    /// Shares `coverage`.
    #[must_use]
    pub fn new(coverage: Coverage) -> Arc<SharedCoverage> {
        Arc::new(SharedCoverage(Mutex::new(coverage)))
    }

    /// See [`Coverage::mark`].
    pub fn mark(&self, start: u64, end: u64) {
        self.lock().mark(start, end);
    }

    /// See [`Coverage::excuse`].
    pub fn excuse(&self, start: u64, end: u64) {
        self.lock().excuse(start, end);
    }

    /// See [`Coverage::mark_all`].
    pub fn mark_all(&self) {
        self.lock().mark_all();
    }

    /// See [`Coverage::missing_in`].
    #[must_use]
    pub fn missing_in(&self, start: u64, end: u64) -> u64 {
        self.lock().missing_in(start, end)
    }

    /// See [`Coverage::transferred`].
    #[must_use]
    pub fn transferred(&self) -> u64 {
        self.lock().transferred()
    }

    /// See [`Coverage::settled`].
    #[must_use]
    pub fn settled(&self) -> u64 {
        self.lock().settled()
    }

    /// See [`Coverage::encode`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.lock().encode()
    }

    /// A copy of it as it is now.
    #[must_use]
    pub fn snapshot(&self) -> Coverage {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Coverage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
