//! backup
pub mod decide;
pub mod life;
pub mod status;
