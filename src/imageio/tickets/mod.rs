//! The tickets that are valid now, and what runs on them.
//!
//! ```text
//!            add                 end(Canceled | Paused)
//!  (none) --------> live ----------------------------> ended      requests: "Transfer=X was canceled", "expired"
//!     ^              |  begin -> Operation (active)        |
//!     |              |<--------------- add -----------------+
//!     +--------------+---- end(Removed), operations cut ---+      requests: "No such ticket"
//! ```
//!
//! Ending a ticket cuts the connections that run an operation on it (a cut stream is seen by the client as
//! cut: it is never shortened silently), and closes the NBD connections that idle HTTP connections keep for
//! it. The HTTP connections stay and hear of the end at their next request. [`Tickets::drained`] waits for
//! the operations, never for connections; one that writes ends when the storage has answered for all that it was given. Where the
//! storage did not, the ticket stays doubtful, whatever comes: see [`Drained`].
//!
//! One lock, held for a few map operations and never across an await. Ids are compared in constant time,
//! with every ticket, whether one matched or not.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use subtle::ConstantTimeEq as _;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub(super) use self::operation::{Doubtful, Operation};
pub use self::shared::SharedCoverage;
pub(super) use self::slot::Slot;
use super::progress::Progress;
use super::ticket::{Denied, End, Ticket, TicketId};

mod operation;
mod shared;
mod slot;

/// Most canceled transfers that are remembered.
const REMEMBERED: usize = 4096;

/// What is known of a transfer's ticket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stats {
    /// Bytes of the disk that were served, each counted once, over all transfers that share its coverage.
    pub transferred: u64,
    /// Operations running.
    pub active: u32,
    /// HTTP connections that have used the ticket and are open.
    pub connections: u32,
    /// Time since the last operation ended, or since the ticket was added; zero while one runs.
    pub idle: Duration,
    /// An operation was permitted at least once.
    pub ever_used: bool,
}

/// What [`Tickets::drained`] waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "what goes on may write to the disk"]
pub enum Drained {
    /// No operation runs.
    Over,
    /// Some do, that only read.
    Reading,
    /// Some do, that write.
    Writing,
    /// None does, but the storage owes an answer: it may write to the disk until its NBD server has ended.
    Doubtful,
}

impl Drained {
    /// Whether nothing that the ticket permitted can be written any more, so that the disk may be given to others.
    #[must_use]
    pub fn is_settled(self) -> bool {
        matches!(self, Drained::Over | Drained::Reading)
    }
}

/// The tickets; clones are handles of the same.
#[derive(Clone, Debug, Default)]
pub struct Tickets(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    entries: Mutex<BTreeMap<String, Entry>>,
    ended: Notify,
}

#[derive(Debug)]
struct Entry {
    ticket: Arc<Ticket>,
    coverage: Arc<SharedCoverage>,
    end: Option<(End, Instant)>,
    /// By the operation's number.
    active: BTreeMap<u64, Active>,
    next: u64,
    slots: Vec<Weak<Slot>>,
    rested: Instant,
    ever_used: bool,
    /// The storage owes an answer to what was written with it.
    doubtful: bool,
}

/// An operation, and the connection that runs it.
#[derive(Debug)]
struct Active {
    cut: CancellationToken,
    progress: Progress,
    writes: Option<Writes>,
}

/// What an operation writes, also while it waits for its turn.
#[derive(Clone, Copy, Debug)]
struct Writes {
    start: u64,
    end: u64,
    /// It waits for its client.
    receiving: bool,
}

impl Entry {
    /// What is to be known of it when its ticket ended.
    fn is_forgotten(&self) -> bool {
        self.active.is_empty() && !self.doubtful && matches!(self.end, Some((End::Removed, _)))
    }
}

impl Tickets {
    /// Makes a ticket valid, with the coverage of its disk. Adding one again replaces it and keeps what runs
    /// on it; a paused or canceled transfer becomes valid again.
    pub fn add(&self, ticket: Ticket, coverage: Arc<SharedCoverage>) {
        info!(
            backup = ticket.backup,
            transfer = ticket.transfer,
            disk = ticket.disk,
            size = ticket.size,
            "ADD"
        );
        let mut entries = self.lock();
        let ticket = Arc::new(ticket);
        if let Some(entry) = entries.get_mut(&ticket.transfer) {
            if entry.end.take().is_some() {
                entry.rested = Instant::now();
            }
            (entry.ticket, entry.coverage) = (ticket, coverage);
            return;
        }
        let entry = Entry {
            ticket: Arc::clone(&ticket),
            coverage,
            end: None,
            active: BTreeMap::new(),
            next: 0,
            slots: Vec::new(),
            rested: Instant::now(),
            ever_used: false,
            doubtful: false,
        };
        entries.insert(ticket.transfer.clone(), entry);
    }

    /// Ends the ticket of a transfer and cuts what runs on it; one that is unknown is ended already.
    pub fn end(&self, transfer: &str, end: End) {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(transfer) else { return };
        if entry.end.is_none_or(|(before, _)| before != end) {
            let ticket = &entry.ticket;
            info!(
                backup = ticket.backup,
                transfer,
                disk = ticket.disk,
                ?end,
                active = entry.active.len(),
                "REMOVE"
            );
        }
        entry.end = Some((end, Instant::now()));
        for active in entry.active.values() {
            active.cut.cancel();
        }
        let slots = std::mem::take(&mut entry.slots);
        if entry.is_forgotten() {
            entries.remove(transfer);
        }
        let forgettable = |entry: &Entry| {
            matches!(entry.end, Some((End::Canceled | End::Removed, _))) && entry.active.is_empty()
        };
        let canceled: Vec<_> = entries.iter().filter(|(_, entry)| forgettable(entry)).collect();
        if canceled.len() > REMEMBERED {
            let oldest = canceled.into_iter().min_by_key(|(_, entry)| entry.end.map(|(_, at)| at));
            if let Some(transfer) = oldest.map(|(transfer, _)| transfer.clone()) {
                entries.remove(&transfer);
            }
        }
        drop(entries);
        for slot in slots.iter().filter_map(Weak::upgrade) {
            slot.close();
        }
        self.0.ended.notify_waiters();
    }

    /// Waits until no operation runs on the transfer's ticket, at most so long; how it stands then.
    pub async fn drained(&self, transfer: &str, within: Duration) -> Drained {
        self.wait(within, |entries| entries.get(transfer).is_none_or(|entry| entry.active.is_empty())).await;
        match self.lock().get(transfer) {
            Some(entry) if entry.active.values().any(|active| active.writes.is_some()) => Drained::Writing,
            Some(entry) if entry.doubtful => Drained::Doubtful,
            Some(entry) if !entry.active.is_empty() => Drained::Reading,
            _ => Drained::Over,
        }
    }

    /// Waits until nothing is written with any ticket, at most so long.
    pub(super) async fn settled(&self, within: Duration) {
        let writes = |entry: &Entry| entry.active.values().any(|active| active.writes.is_some());
        self.wait(within, |entries| !entries.values().any(writes)).await;
    }

    async fn wait(&self, within: Duration, done: impl Fn(&BTreeMap<String, Entry>) -> bool) {
        let waited = async {
            loop {
                let ended = self.0.ended.notified();
                tokio::pin!(ended);
                ended.as_mut().enable();
                if done(&self.lock()) {
                    return;
                }
                ended.await;
            }
        };
        // in time or not: the caller looks
        let _ = tokio::time::timeout(within, waited).await;
    }

    /// Whether an operation runs on the transfer's ticket whose connection moved within that time: a client that is gone
    /// without a word does not count for long.
    #[must_use]
    pub fn moves(&self, transfer: &str, within: Duration) -> bool {
        let entries = self.lock();
        let active = entries.get(transfer).into_iter().flat_map(|entry| entry.active.values());
        active.into_iter().any(|active| active.progress.last().elapsed() < within)
    }

    /// What is known of a transfer's ticket; `None` when there is none.
    #[must_use]
    pub fn stats(&self, transfer: &str) -> Option<Stats> {
        let mut entries = self.lock();
        let entry = entries.get_mut(transfer)?;
        entry.slots.retain(|slot| slot.strong_count() > 0);
        Some(Stats {
            transferred: entry.coverage.transferred(),
            active: u32::try_from(entry.active.len()).unwrap_or(u32::MAX),
            connections: u32::try_from(entry.slots.len()).unwrap_or(u32::MAX),
            idle: if entry.active.is_empty() { entry.rested.elapsed() } else { Duration::ZERO },
            ever_used: entry.ever_used,
        })
    }

    /// Whether the transfer's ticket is valid.
    #[must_use]
    pub fn is_valid(&self, transfer: &str) -> bool {
        self.lock().get(transfer).is_some_and(|entry| entry.end.is_none())
    }

    /// How many tickets are valid.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().values().filter(|entry| entry.end.is_none()).count()
    }

    /// Begins an operation with the ticket of this id, for a connection that is cut by `cut`.
    pub(super) fn begin(
        &self,
        id: &str,
        cut: &CancellationToken,
        progress: &Progress,
    ) -> Result<Operation, Denied> {
        let id = TicketId::parse(id).map_err(|_| Denied::NoSuchTicket)?;
        let mut entries = self.lock();
        let mut found = None;
        for (transfer, entry) in entries.iter() {
            if bool::from(entry.ticket.id.ct_eq(&id)) {
                found = Some(transfer.clone());
            }
        }
        let entry = found.and_then(|transfer| entries.get_mut(&transfer)).ok_or(Denied::NoSuchTicket)?;
        match entry.end {
            None => {}
            Some((End::Canceled, _)) => {
                return Err(Denied::Canceled { transfer: entry.ticket.transfer.clone() });
            }
            Some((End::Paused, _)) => {
                return Err(Denied::Expired { transfer: entry.ticket.transfer.clone() });
            }
            Some((End::Removed, _)) => return Err(Denied::NoSuchTicket),
        }
        let number = entry.next;
        entry.next += 1;
        let active = Active { cut: cut.clone(), progress: progress.clone(), writes: None };
        entry.active.insert(number, active);
        entry.ever_used = true;
        Ok(Operation {
            ticket: Arc::clone(&entry.ticket),
            coverage: Arc::clone(&entry.coverage),
            number,
            tickets: self.clone(),
        })
    }

    /// A place for an HTTP connection's NBD connection for this ticket, emptied when the ticket ends.
    pub(super) fn slot(&self, transfer: &str) -> Arc<Slot> {
        let slot = Arc::new(Slot::default());
        let mut entries = self.lock();
        match entries.get_mut(transfer).filter(|entry| entry.end.is_none()) {
            Some(entry) => {
                entry.slots.retain(|slot| slot.strong_count() > 0);
                entry.slots.push(Arc::downgrade(&slot));
            }
            None => slot.close(),
        }
        slot
    }

    fn finish(&self, transfer: &str, number: u64) {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(transfer) else { return };
        entry.active.remove(&number);
        entry.rested = Instant::now();
        if entry.is_forgotten() {
            entries.remove(transfer);
        }
        drop(entries);
        self.0.ended.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
