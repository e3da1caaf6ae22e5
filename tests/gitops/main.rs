//! What GitOps tools make of Virtmark's objects in every phase: kstatus by its own library, Argo CD's health by its
//! own Lua interpreter, kubectl's apply, diff and wait.
//!
//! `objects/` holds one object of every phase, as a real API server served it. `phases` makes them anew, on a real
//! hypervisor, and compares; it stops and restarts operator and agent, so it has the bed to itself. The rest needs no
//! cluster. `VIRTMARK_GOLDEN=write` writes the objects and the table of docs/gitops.md instead of comparing them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod expected;
mod golden;
mod health;
mod offline;
mod phases;
mod reapply;
#[path = "../cluster/rig.rs"]
#[allow(dead_code, reason = "the cluster tests use the rest")]
mod rig;
mod stage;
