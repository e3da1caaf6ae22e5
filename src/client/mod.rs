//! `virtmark`, the client: reads the disks of a backup into files that can be restored, and looks after those files. It
//! never decides what a backup is: it makes the same objects that anybody makes with kubectl, and reads them as a stock
//! ovirt-imageio client does.
//!
//! ```text
//!  I/O       args -> command -> backup, steps -> download -> images (HTTP)    target (qcow2, raw)
//!                            |             \-> publish   folder (a restore point on disk)
//!                            \-> verify, restore, look
//!                            \-> rewrite -> staging (a restore point that gives way to its successor)   transfer
//!            kubernetes (objects, watches, tickets)   interrupt   screen
//!  values    manifest  chain  names  extents  plan  progress  words  output  record
//!            state  resume  inventory  explain  exit  reshape  moves  transfer_state
//! ```
//!
//! The values are functions of values: no file, no socket, no clock.

pub mod args;
pub mod backup;
pub mod chain;
pub mod chain_line;
pub mod command;
pub mod download;
pub mod exit;
pub mod explain;
pub mod extents;
#[cfg(test)]
mod fake;
pub mod folder;
pub mod images;
pub mod interrupt;
pub mod inventory;
pub mod kubernetes;
pub mod look;
pub mod manifest;
pub mod moves;
pub mod names;
pub mod output;
pub mod plan;
pub mod progress;
pub mod publish;
pub mod record;
pub mod reshape;
pub mod restore;
pub mod resume;
pub mod rewrite;
pub mod screen;
pub mod spool;
pub mod staging;
pub mod state;
pub mod steps;
pub mod store;
pub mod target;
#[cfg(test)]
mod tests;
pub mod transfer;
pub mod transfer_line;
pub mod transfer_state;
pub mod verify;
pub mod words;

pub use command::main;
