//! virtmark

pub mod extent;
pub mod nbd;
