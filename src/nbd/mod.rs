//! The NBD client: reads the export of a QEMU or a qemu-nbd, and asks which of its bytes matter.
//!
//! - [`proto`] numbers and codecs, [`handshake`] and [`transmission`] the two phases as machines without a
//!   socket, [`status`] block status maps;
//! - [`client`] moves bytes between them and a unix socket.
//!
//! It reads only: no command that could change an export is ever sent. It knows nothing of HTTP, libvirt or
//! Kubernetes.

pub mod client;
pub mod handshake;
pub mod proto;
pub mod status;
pub mod transmission;

pub use client::{Client, Export, NbdError, ReadStream, StatusStream};
