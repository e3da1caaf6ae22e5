//! agent
pub mod backup;
