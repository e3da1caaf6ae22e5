//! virtmark

pub mod extent;
pub mod imageio;
pub mod nbd;
