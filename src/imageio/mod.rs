//! The image server: the read half of ovirt-imageio's images API over NBD exports.
//!
//! - [`wire`] and [`route`]: the API's texts and which operation a request asks for, pure;
//! - [`ticket`] and [`tickets`]: who may read what, and what runs;
//! - [`coverage`] and [`required`]: what was served, and what a backup needs.
//!
//! It knows nothing of Kubernetes or libvirt, and never writes to a disk.

mod body;
mod connection;
pub mod coverage;
mod journal;
pub mod required;
pub mod route;
pub mod serve;
mod service;
pub mod ticket;
pub mod tickets;
pub mod tls;
pub mod wire;

pub use coverage::Coverage;
pub use required::missing;
pub use serve::{BindError, Config, ImageServer};
pub use ticket::{End, Ticket, TicketId};
pub use tickets::{SharedCoverage, Stats, Tickets};
