//! `chain merge` and `chain rebase` on real images: random histories of data, zeroes and discards, every restore point's bytes
//! before and after; what a kill leaves after each single move, and at random times of the whole command. No cluster is needed.
#![allow(clippy::unwrap_used, reason = "tests")]

mod kills;
mod refusals;
mod rig;
mod rounds;
