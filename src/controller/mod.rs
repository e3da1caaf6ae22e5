//! The operator: validates backups, binds them to nodes, keeps finalizers and publishes the inventory.
//!
//! ```text
//!   VmBackup       gather -> resolve -> desired -> apply -> status     until it is bound; again when it ends
//!   ImageTransfer  bind; delete its ticket Secret when it ends
//!   VmCheckpoint   usable once its backup Succeeded, or once an import was found whole; followed by what is seen of
//!                  its bitmaps; bound to a node to have them removed, or looked for
//!   DomainSighting -> LibvirtDomain
//!   CertificateSigningRequest  of agents: decide -> approve and sign, or deny
//! ```
//!
//! It never talks to libvirt, to an agent, or to an image server. Losing it loses nothing.

pub mod backup;
pub mod certificates;
pub mod chain;
mod check;
pub mod checkpoint;
pub mod config;
mod context;
pub mod domain;
pub mod health;
mod heartbeats;
pub mod import;
mod lead;
mod metrics;
mod nodes;
mod role;
mod run;
pub mod tenancy;
pub mod transfer;
mod uninstall;
pub mod upload;

pub use check::check;
pub use context::{Context, OperatorError};
pub use run::run;
pub use uninstall::end_backups;
