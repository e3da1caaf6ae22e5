//! backup
pub mod decide;
pub mod life;
