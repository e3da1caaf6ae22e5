//! The image server: the read half of ovirt-imageio's images API over NBD exports.

pub mod coverage;
pub mod ticket;
pub mod tickets;
