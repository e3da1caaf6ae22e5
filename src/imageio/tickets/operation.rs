//! An operation that runs on a ticket, and when it is its turn to write.
//!
//! What one ticket writes to the same bytes is written in the order in which it was asked for: a client that asks again, since it
//! was not answered, must not have its new bytes overwritten by the old ones, which may be in flight still, whatever became of
//! its connection. So who writes waits for what was asked before, to the last answer of the storage. It does not wait for a client
//! that said nothing for a while: that connection is cut. It moves no bytes.

use std::sync::Arc;
use std::time::Duration;

use super::super::ticket::Ticket;
use super::{Active, SharedCoverage, Tickets, Writes};

/// Time that a connection may stand still in the way of another one.
const STILL: Duration = Duration::from_secs(5);
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// An operation; ends when dropped.
#[derive(Debug)]
pub(in crate::imageio) struct Operation {
    pub(in crate::imageio) ticket: Arc<Ticket>,
    pub(in crate::imageio) coverage: Arc<SharedCoverage>,
    pub(super) number: u64,
    pub(super) tickets: Tickets,
}

/// The storage owes an answer to an earlier write: what is written now may be overwritten by it at any time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::imageio) struct Doubtful;

impl Operation {
    /// Waits for its turn to write these bytes.
    pub(in crate::imageio) async fn turn(&self, offset: u64, length: u64) -> Result<(), Doubtful> {
        let (start, end) = (offset, offset.saturating_add(length));
        self.change(|active| active.writes = Some(Writes { start, end, receiving: true }));
        loop {
            let ended = self.tickets.0.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if self.is_next(start, end)? {
                return Ok(());
            }
            // in time or not: it is looked at again
            let _ = tokio::time::timeout(LOOK, ended).await;
        }
    }

    /// It waits for its client no more: it ends by itself.
    pub(in crate::imageio) fn received(&self) {
        self.change(|active| {
            if let Some(writes) = &mut active.writes {
                writes.receiving = false;
            }
        });
    }

    /// Nothing more of it is written, though its client has not its answer yet.
    pub(in crate::imageio) fn written(&self) {
        self.change(|active| active.writes = None);
        self.tickets.0.ended.notify_waiters();
    }

    /// The storage owes an answer to it: nothing more is written with the ticket, and who owns it is told.
    pub(in crate::imageio) fn doubt(&self) {
        if let Some(entry) = self.tickets.lock().get_mut(&self.ticket.transfer) {
            entry.doubtful = true;
        }
    }

    fn is_next(&self, start: u64, end: u64) -> Result<bool, Doubtful> {
        let entries = self.tickets.lock();
        let Some(entry) = entries.get(&self.ticket.transfer) else { return Ok(true) };
        if entry.doubtful {
            return Err(Doubtful);
        }
        let mut next = true;
        for active in entry.active.range(..self.number).map(|(_, active)| active) {
            let Some(writes) = active.writes.filter(|writes| writes.start < end && start < writes.end) else {
                continue;
            };
            next = false;
            if writes.receiving && active.progress.last().elapsed() >= STILL {
                active.cut.cancel();
            }
        }
        Ok(next)
    }

    fn change(&self, change: impl FnOnce(&mut Active)) {
        let mut entries = self.tickets.lock();
        let entry = entries.get_mut(&self.ticket.transfer);
        if let Some(active) = entry.and_then(|entry| entry.active.get_mut(&self.number)) {
            change(active);
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.tickets.finish(&self.ticket.transfer, self.number);
    }
}
