//! The NBD client: reads and writes the export of a QEMU or a qemu-nbd, and asks which of its bytes matter.
//!
//! - [`proto`] numbers and codecs, [`handshake`] and [`transmission`] the two phases as machines without a
//!   socket, [`status`] block status maps;
//! - [`client`] moves bytes between them and a unix socket, [`writer`] writes through it.
//!
//! A command that could change an export is sent by a [`Writer`] alone. It knows nothing of HTTP, libvirt or
//! Kubernetes.

pub mod client;
mod error;
pub mod handshake;
mod outbox;
pub mod proto;
pub mod status;
pub mod transmission;
pub mod writer;

pub use client::{Client, Export, ReadStream, StatusStream};
pub use error::NbdError;
pub use writer::{Writer, ZeroMode};
