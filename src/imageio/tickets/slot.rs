//! Where an HTTP connection keeps its NBD connection between requests, until the ticket ends. It opens none.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::nbd::Client;

/// The place.
#[derive(Debug, Default)]
pub(in crate::imageio) struct Slot(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    client: Option<Client>,
    closed: bool,
}

impl Slot {
    /// Takes the connection, if one is kept.
    pub(in crate::imageio) fn take(&self) -> Option<Client> {
        self.lock().client.take()
    }

    /// Keeps a connection for the next request, unless the ticket ended.
    pub(in crate::imageio) fn keep(&self, client: Client) {
        let mut kept = self.lock();
        if !kept.closed {
            kept.client = Some(client);
        }
    }

    /// The ticket ended.
    pub(in crate::imageio) fn closed(&self) -> bool {
        self.lock().closed
    }

    pub(super) fn close(&self) {
        let mut kept = self.lock();
        kept.closed = true;
        kept.client = None;
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
