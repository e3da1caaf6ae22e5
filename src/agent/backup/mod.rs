//! backup
pub mod life;
