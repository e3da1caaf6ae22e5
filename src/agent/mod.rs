//! The agent: does the work of its node's backups, next to its libvirt.
//!
//! ```text
//!   libvirt events ---> registry ---> backup, transfer, checkpoint reconcilers ---> status
//!                         |                 |
//!   state directory <-----+           libvirt, qemu-img        tickets ---> image server
//!                                           |
//!   DomainSightings <--- inventory <--- survey of bitmaps
//! ```
//!
//! It writes only the status of objects that the operator bound to its node, its own DomainSightings, and
//! new ticket Secrets. It never writes spec, metadata or finalizers, and never talks to the operator.

pub mod backup;
mod certificate;
pub mod checkpoint;
pub mod config;
mod context;
mod cordon;
mod folder;
mod health;
mod heartbeat;
mod image;
pub mod inventory;
mod looks;
mod metrics;
mod registry;
mod run;
mod scratch;
pub mod state;
mod survey;
pub mod transfer;
pub mod upload;

pub use context::{AgentError, Context};
pub use run::run;
