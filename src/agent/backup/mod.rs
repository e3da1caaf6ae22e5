//! backup
pub mod act;
pub mod decide;
pub mod life;
pub mod status;
