//! What can go wrong between the client and an NBD server, in words for whoever runs the backup. It never repeats bytes of a
//! disk.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::client::CONNECT_TIMEOUT;
use super::handshake::HandshakeError;
use super::transmission::{ProtocolError, ServerError};

/// Why an export cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// No connection.
    #[error("cannot connect to the NBD server at {}; is the backup still running?", socket.display())]
    Connect {
        /// Path of the socket.
        socket: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The server did not shake hands in [`CONNECT_TIMEOUT`].
    #[error("the NBD server at {} did not answer within {} s", socket.display(), CONNECT_TIMEOUT.as_secs())]
    ConnectTimeout {
        /// Path of the socket.
        socket: PathBuf,
    },
    /// The handshake failed.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The connection broke.
    #[error("the connection to the NBD server broke")]
    Io(#[from] io::Error),
    /// The server closed the connection.
    #[error("the NBD server closed the connection; the backup or its QEMU ended")]
    Closed,
    /// Nothing came for [`super::client::REPLY_TIMEOUT`], or [`super::client::SLOW_REPLY_TIMEOUT`].
    #[error("the NBD server was silent for {} s; its storage may hang", silent.as_secs())]
    ReplyTimeout {
        /// So long.
        silent: Duration,
    },
    /// The connection was closed over requests without an answer: which of them are done, and when, is unknown.
    #[error(
        "the NBD server owes the answer to {requests} requests, and may do them at any time until it ends: end it before its \
         image is used"
    )]
    Unanswered {
        /// How many.
        requests: usize,
    },
    /// The server broke the protocol.
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(#[from] ProtocolError),
    /// The server could not do what was asked.
    #[error("the NBD server failed to {what} at offset {offset}: {error}")]
    Server {
        /// "read", say, or "write".
        what: &'static str,
        /// Bytes from the start of the export.
        offset: u64,
        /// Its error.
        error: ServerError,
    },
    /// A range outside the export.
    #[error("bytes {offset}+{length} are outside the export of {size} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Bytes of the export.
        size: u64,
    },
    /// A write to an export that has none.
    #[error("the NBD export is read-only")]
    ReadOnly,
    /// A write that the server wants whole blocks for.
    #[error("bytes {offset}+{length} are no whole blocks of {block} bytes, which the NBD server insists on")]
    Unaligned {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Bytes of a block.
        block: u32,
    },
    /// A call that was dropped in its middle, or failed, came before.
    #[error("an earlier write was given up in its middle")]
    GivenUp,
}
