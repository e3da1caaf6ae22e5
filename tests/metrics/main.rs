//! Health, metrics, alerts and the dashboard: what is told, and that every query finds something to tell.
//!
//! Alerts are tried by `promtool` on made-up histories; queries by a real Prometheus that scrapes a bed during backups.
#![allow(clippy::unwrap_used, reason = "tests")]

mod alerts;
mod dashboard;
mod probes;
mod prometheus;
#[path = "../cluster/rig.rs"]
#[allow(dead_code, reason = "the cluster tests use the rest")]
mod rig;
mod scrape;
