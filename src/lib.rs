//! virtmark
