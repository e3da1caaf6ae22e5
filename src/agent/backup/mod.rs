//! Backups of this node: the life of one, what decides its end, what is done on the host, what is told.

pub mod act;
mod adopt;
mod begun;
pub mod decide;
pub mod life;
pub mod mark;
mod perform;
pub mod reconcile;
pub mod scratch;
pub mod status;
