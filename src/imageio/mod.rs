//! The image server: ovirt-imageio's images API over NBD exports.
//!
//! - [`wire`] and [`route`]: the API's texts and which operation a request asks for, pure;
//! - [`ticket`] and [`tickets`]: who may read or write what, and what runs;
//! - [`meter`]: what it did, counted;
//! - [`coverage`], [`required`] and [`tail`]: what was served, what a backup needs, and what a bitmap does not tell.
//!
//! It knows nothing of Kubernetes or libvirt, and writes only with a ticket for that.

mod body;
mod connection;
pub mod coverage;
mod journal;
pub mod meter;
mod progress;
pub mod required;
pub mod route;
pub mod serve;
mod service;
pub mod tail;
pub mod ticket;
pub mod tickets;
pub mod tls;
pub mod wire;
mod write;

pub use coverage::Coverage;
pub use meter::{Encryption, Meter};
pub use required::missing;
pub use serve::{BindError, Config, ImageServer};
pub use tail::unsure_from;
pub use ticket::{Access, End, Ticket, TicketId};
pub use tickets::{Drained, SharedCoverage, Stats, Tickets};
