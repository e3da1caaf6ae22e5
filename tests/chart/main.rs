//! The Helm chart, by Helm itself: what it refuses, what every value does, that it says what `crds/` and `deploy/` say,
//! and that a real API server takes what it renders. All but `server` need no cluster.
//!
//! `VIRTMARK_GOLDEN=write` writes `pods.yaml`, the pods of the default values, instead of comparing it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod chart;
mod pods;
mod rendered;
mod schema;
mod server;
mod values;
