//! The client on a real cluster: what it writes is what the guest had, what it leaves when it is killed is no backup, and
//! what is damaged is found.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../cluster/rig.rs"]
#[allow(dead_code, reason = "the cluster tests use the rest")]
mod rig;

mod ends;
mod process;
mod rounds;
mod steps;
