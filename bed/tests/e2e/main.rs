//! Users' stories on a real cluster: the chart, installed with Helm on two nodes with kubelets and libvirts of their own;
//! operator and agents are pods of the images that the Dockerfile makes. `make e2e` brings it up.
//!
//! Each test installs the chart and uninstalls it; they run one after the other.

mod events;
mod reader;
mod release;
mod story;
mod uninstall;
mod upgrade;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The cluster, for one test alone.
fn alone() -> MutexGuard<'static, ()> {
    static CLUSTER: Mutex<()> = Mutex::new(());
    CLUSTER.lock().unwrap_or_else(PoisonError::into_inner)
}
