//! What the image server did since it began, over all connections: bytes, answers, waits. It knows no client, no ticket and
//! no disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How a connection's bytes go over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// TCP with TLS.
    Tls,
    /// The unix socket.
    None,
}

impl Encryption {
    /// Both.
    pub const ALL: [Encryption; 2] = [Encryption::Tls, Encryption::None];

    /// As metrics spell it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Encryption::Tls => "tls",
            Encryption::None => "none",
        }
    }
}

/// Classes of status: 2xx, 3xx, 4xx, 5xx.
const CLASSES: [&str; 4] = ["2xx", "3xx", "4xx", "5xx"];

/// The counts; shared by the server and whoever tells them.
#[derive(Debug, Default)]
pub struct Meter {
    tls: Lane,
    plain: Lane,
    answers: [AtomicU64; CLASSES.len()],
    storage_micros: AtomicU64,
    socket_micros: AtomicU64,
}

#[derive(Debug, Default)]
struct Lane {
    bytes: AtomicU64,
    connections: AtomicU64,
}

impl Meter {
    fn lane(&self, encryption: Encryption) -> &Lane {
        match encryption {
            Encryption::Tls => &self.tls,
            Encryption::None => &self.plain,
        }
    }

    /// Bytes of disks that the kernel took.
    #[must_use]
    pub fn bytes(&self, encryption: Encryption) -> u64 {
        self.lane(encryption).bytes.load(Ordering::Relaxed)
    }

    /// Connections that are open.
    #[must_use]
    pub fn connections(&self, encryption: Encryption) -> u64 {
        self.lane(encryption).connections.load(Ordering::Relaxed)
    }

    /// Requests that were answered, by the class of the status: `2xx` say.
    pub fn answers(&self) -> impl Iterator<Item = (&'static str, u64)> {
        CLASSES.into_iter().zip(self.answers.iter().map(|count| count.load(Ordering::Relaxed)))
    }

    /// How long reads waited for the storage.
    #[must_use]
    pub fn storage(&self) -> Duration {
        Duration::from_micros(self.storage_micros.load(Ordering::Relaxed))
    }

    /// How long reads waited for their client, encryption among it.
    #[must_use]
    pub fn socket(&self) -> Duration {
        Duration::from_micros(self.socket_micros.load(Ordering::Relaxed))
    }

    pub(super) fn served(&self, encryption: Encryption, bytes: u64) {
        self.lane(encryption).bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn answered(&self, status: hyper::StatusCode) {
        let class = usize::from(status.as_u16() / 100).checked_sub(2);
        if let Some(count) = class.and_then(|class| self.answers.get(class)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn waited(&self, storage: Duration, socket: Duration) {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.storage_micros.fetch_add(micros(storage), Ordering::Relaxed);
        self.socket_micros.fetch_add(micros(socket), Ordering::Relaxed);
    }

    /// A connection is open for as long as the answer lives.
    pub(super) fn opened(self: &Arc<Self>, encryption: Encryption) -> Opened {
        self.lane(encryption).connections.fetch_add(1, Ordering::Relaxed);
        Opened { meter: Arc::clone(self), encryption }
    }
}

/// A connection that is open.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) meter: Arc<Meter>,
    pub(super) encryption: Encryption,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.meter.lane(self.encryption).connections.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lane_is_counted_by_itself() {
        let meter = Arc::new(Meter::default());
        let one = meter.opened(Encryption::Tls);
        let two = meter.opened(Encryption::Tls);
        meter.served(Encryption::None, 7);
        drop(one);
        assert_eq!((meter.connections(Encryption::Tls), meter.connections(Encryption::None)), (1, 0));
        assert_eq!((meter.bytes(Encryption::Tls), meter.bytes(Encryption::None)), (0, 7));
        drop(two);
        assert_eq!(meter.connections(Encryption::Tls), 0);
    }

    #[test]
    fn answers_are_counted_by_class() {
        let meter = Meter::default();
        for status in [100, 200, 206, 404, 416, 403, 500, 999] {
            meter.answered(hyper::StatusCode::from_u16(status).unwrap());
        }
        assert_eq!(meter.answers().collect::<Vec<_>>(), [("2xx", 2), ("3xx", 0), ("4xx", 3), ("5xx", 1)]);
    }
}
