//! agent
pub mod backup;
pub mod state;
