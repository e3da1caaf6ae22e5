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
//! the operations, never for connections.
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

use super::coverage::Coverage;
use super::progress::Progress;
use super::ticket::{Denied, End, Ticket, TicketId};
use crate::nbd::Client;

/// Most canceled transfers that are remembered.
const REMEMBERED: usize = 4096;

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
    /// The connections that run an operation, by the operation's number.
    active: BTreeMap<u64, (CancellationToken, Progress)>,
    next: u64,
    slots: Vec<Weak<Slot>>,
    rested: Instant,
    ever_used: bool,
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
        for (connection, _) in entry.active.values() {
            connection.cancel();
        }
        let slots = std::mem::take(&mut entry.slots);
        if end == End::Removed && entry.active.is_empty() {
            entries.remove(transfer);
        }
        let forgettable =
            |entry: &Entry| matches!(entry.end, Some((End::Canceled, _))) && entry.active.is_empty();
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

    /// Waits until no operation runs on the transfer's ticket, at most so long; whether it is so.
    pub async fn drained(&self, transfer: &str, within: Duration) -> bool {
        let drained = async {
            loop {
                let ended = self.0.ended.notified();
                tokio::pin!(ended);
                ended.as_mut().enable();
                if self.lock().get(transfer).is_none_or(|entry| entry.active.is_empty()) {
                    return;
                }
                ended.await;
            }
        };
        tokio::time::timeout(within, drained).await.is_ok()
    }

    /// Whether an operation runs on the transfer's ticket whose connection moved within that time: a client that is gone
    /// without a word does not count for long.
    #[must_use]
    pub fn moves(&self, transfer: &str, within: Duration) -> bool {
        let entries = self.lock();
        let active = entries.get(transfer).into_iter().flat_map(|entry| entry.active.values());
        active.into_iter().any(|(_, progress)| progress.last().elapsed() < within)
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
        entry.active.insert(number, (cut.clone(), progress.clone()));
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
        if entry.active.is_empty() && matches!(entry.end, Some((End::Removed, _))) {
            entries.remove(transfer);
        }
        drop(entries);
        self.0.ended.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An operation that runs on a ticket; ends when dropped.
#[derive(Debug)]
pub(super) struct Operation {
    pub(super) ticket: Arc<Ticket>,
    pub(super) coverage: Arc<SharedCoverage>,
    number: u64,
    tickets: Tickets,
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.tickets.finish(&self.ticket.transfer, self.number);
    }
}

/// Where an HTTP connection keeps its NBD connection between requests.
#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    client: Option<Client>,
    closed: bool,
}

impl Slot {
    /// Takes the connection, if one is kept.
    pub(super) fn take(&self) -> Option<Client> {
        self.lock().client.take()
    }

    /// Keeps a connection for the next request, unless the ticket ended.
    pub(super) fn keep(&self, client: Client) {
        let mut kept = self.lock();
        if !kept.closed {
            kept.client = Some(client);
        }
    }

    /// The ticket ended.
    pub(super) fn closed(&self) -> bool {
        self.lock().closed
    }

    fn close(&self) {
        let mut kept = self.lock();
        kept.closed = true;
        kept.client = None;
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::imageio::Access;
    use crate::nbd::Export;

    fn ticket(transfer: &str) -> Ticket {
        Ticket {
            id: TicketId::random().unwrap(),
            transfer: transfer.to_owned(),
            backup: "b".to_owned(),
            disk: "vda".to_owned(),
            access: Access::Read,
            size: 100,
            export: Export { socket: "/none".into(), name: String::new(), bitmap: None, changed_from: None },
            dirty: false,
            filename: None,
        }
    }

    fn added(tickets: &Tickets, transfer: &str) -> String {
        let ticket = ticket(transfer);
        let id = ticket.id.expose();
        tickets.add(ticket, SharedCoverage::new(Coverage::new(100)));
        id
    }

    #[tokio::test(start_paused = true)]
    async fn a_ticket_lives_is_canceled_and_removed() {
        let tickets = Tickets::default();
        let (cut, progress) = (CancellationToken::new(), Progress::new());
        let id = added(&tickets, "t1");
        let other = added(&tickets, "t2");
        assert_eq!(tickets.begin("nonsense", &cut, &progress).unwrap_err(), Denied::NoSuchTicket);
        assert!(!tickets.stats("t1").unwrap().ever_used);

        let operation = tickets.begin(&id, &cut, &progress).unwrap();
        assert_eq!(operation.ticket.transfer, "t1");
        tokio::time::advance(Duration::from_secs(5)).await;
        let stats = tickets.stats("t1").unwrap();
        assert_eq!((stats.active, stats.idle, stats.ever_used), (1, Duration::ZERO, true));
        let within = Duration::from_secs(5);
        assert!(!tickets.moves("t1", within), "nothing moved for 5 s");
        progress.moved();
        assert!(tickets.moves("t1", within));
        drop(operation);
        assert!(!tickets.moves("t1", within), "it ended");
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(tickets.stats("t1").unwrap().idle, Duration::from_secs(5));

        let operation = tickets.begin(&id, &cut, &progress).unwrap();
        tickets.end("t1", End::Canceled);
        assert!(cut.is_cancelled());
        assert!(!tickets.drained("t1", Duration::from_secs(1)).await);
        drop(operation);
        assert!(tickets.drained("t1", Duration::from_secs(1)).await);
        let canceled = Denied::Canceled { transfer: "t1".to_owned() };
        assert_eq!(tickets.begin(&id, &cut, &progress).unwrap_err(), canceled);

        tickets.end("t1", End::Removed);
        tickets.end("t1", End::Removed);
        assert_eq!(tickets.begin(&id, &cut, &progress).unwrap_err(), Denied::NoSuchTicket);
        assert_eq!(tickets.stats("t1"), None);
        assert!(tickets.begin(&other, &cut, &progress).is_ok());
    }

    #[tokio::test]
    async fn removal_waits_for_what_runs_and_adding_again_revives() {
        let tickets = Tickets::default();
        let (cut, progress) = (CancellationToken::new(), Progress::new());
        let id = added(&tickets, "t1");
        let operation = tickets.begin(&id, &cut, &progress).unwrap();
        tickets.end("t1", End::Removed);
        assert_eq!(tickets.begin(&id, &cut, &progress).unwrap_err(), Denied::NoSuchTicket);
        let waiting = tickets.clone();
        let drained = tokio::spawn(async move { waiting.drained("t1", Duration::from_secs(5)).await });
        tokio::task::yield_now().await;
        drop(operation);
        assert!(drained.await.unwrap());
        assert_eq!(tickets.stats("t1"), None);
        let id = added(&tickets, "t1");
        assert!(tickets.begin(&id, &CancellationToken::new(), &progress).is_ok());
    }

    #[tokio::test]
    async fn canceled_transfers_are_remembered_up_to_a_bound() {
        let tickets = Tickets::default();
        for n in 0..=REMEMBERED {
            let transfer = n.to_string();
            added(&tickets, &transfer);
            tickets.end(&transfer, End::Canceled);
        }
        assert_eq!(tickets.lock().len(), REMEMBERED);
        assert_eq!(tickets.stats("0"), None);
    }
}
