//! The log of one connection: one line when a ticket first permits it something, one when it closes.
//!
//! The time of a read is told apart as imageio does: waiting for the storage, and writing to the socket.
//! That answers "is my storage slow or my network". Names the transfer, never the ticket's id. A
//! connection that no ticket permitted anything is logged at debug level only: port scans and probes.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info};

use super::ticket::Ticket;

/// Counts of one connection.
#[derive(Debug)]
pub(super) struct Journal {
    number: u64,
    client: String,
    begun: Instant,
    /// Backup, transfer and disk of the last ticket.
    named: Option<(String, String, String)>,
    pub(super) requests: u64,
    pub(super) refused: u64,
    pub(super) reads: Count,
    pub(super) extents: Count,
    pub(super) writes: Count,
    pub(super) zeroes: Count,
    pub(super) flushes: Count,
    /// Of `reads`: waiting for the storage.
    pub(super) storage: Duration,
    /// Of `reads`: encrypting, and waiting for the client to take it.
    pub(super) socket: Duration,
}

/// Operations of one kind.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Count {
    pub(super) operations: u64,
    pub(super) bytes: u64,
    pub(super) time: Duration,
}

impl Count {
    /// One more.
    pub(super) fn add(&mut self, bytes: u64, time: Duration) {
        self.operations += 1;
        self.bytes += bytes;
        self.time += time;
    }
}

impl Journal {
    pub(super) fn new(number: u64, client: String) -> Journal {
        debug!(connection = number, client, "ACCEPT");
        Journal {
            number,
            client,
            begun: Instant::now(),
            named: None,
            requests: 0,
            refused: 0,
            reads: Count::default(),
            extents: Count::default(),
            writes: Count::default(),
            zeroes: Count::default(),
            flushes: Count::default(),
            storage: Duration::ZERO,
            socket: Duration::ZERO,
        }
    }

    /// A ticket permitted a request.
    pub(super) fn authorized(&mut self, ticket: &Ticket) {
        let Ticket { backup, transfer, disk, .. } = ticket;
        if self.named.is_none() {
            info!(connection = self.number, client = self.client, backup, transfer, disk, "OPEN");
        }
        if self.named.as_ref().is_none_or(|(_, named, _)| named != transfer) {
            self.named = Some((backup.clone(), transfer.clone(), disk.clone()));
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let connection = self.number;
        let Some((backup, transfer, disk)) = &self.named else {
            debug!(
                connection,
                client = self.client,
                requests = self.requests,
                refused = self.refused,
                "CLOSE"
            );
            return;
        };
        info!(
            connection,
            client = self.client,
            backup,
            transfer,
            disk,
            seconds = self.begun.elapsed().as_secs_f64(),
            requests = self.requests,
            refused = self.refused,
            read_ops = self.reads.operations,
            read_bytes = self.reads.bytes,
            read_seconds = self.reads.time.as_secs_f64(),
            read_mib_per_second = rate(self.reads.bytes, self.reads.time),
            storage_seconds = self.storage.as_secs_f64(),
            storage_mib_per_second = rate(self.reads.bytes, self.storage),
            socket_seconds = self.socket.as_secs_f64(),
            socket_mib_per_second = rate(self.reads.bytes, self.socket),
            extents_ops = self.extents.operations,
            extents_bytes = self.extents.bytes,
            extents_seconds = self.extents.time.as_secs_f64(),
            write_ops = self.writes.operations,
            write_bytes = self.writes.bytes,
            write_seconds = self.writes.time.as_secs_f64(),
            write_mib_per_second = rate(self.writes.bytes, self.writes.time),
            zero_ops = self.zeroes.operations,
            zero_bytes = self.zeroes.bytes,
            zero_seconds = self.zeroes.time.as_secs_f64(),
            flush_ops = self.flushes.operations,
            flush_seconds = self.flushes.time.as_secs_f64(),
            "CLOSE"
        );
    }
}

/// MiB a second, whole; 0 when no time passed.
fn rate(bytes: u64, time: Duration) -> u64 {
    let a_second = u128::from(bytes) * 1_000_000 / time.as_micros().max(1);
    if time.is_zero() { 0 } else { u64::try_from(a_second >> 20).unwrap_or(u64::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_of_short_and_long_times() {
        assert_eq!(rate(1 << 20, Duration::from_micros(500)), 2000);
        assert_eq!(rate(1 << 40, Duration::from_secs(1024)), 1024);
        assert_eq!(rate(5, Duration::ZERO), 0);
    }
}
