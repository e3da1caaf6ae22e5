//! Against a real API server, a real libvirt and QEMU, and the operator and agents as users run them.
//!
//! Each test has VMs and objects of its own, by names of its own, so that all run at once on one bed
//! (`make test`, or `make up` and what it prints).

mod access;
mod backups;
mod bitmaps;
mod certificates;
mod chain;
mod checkpoints;
mod costs;
mod crds;
mod disks;
mod guests;
mod imports;
mod incremental;
mod inventory;
mod limits;
mod migration;
mod pool;
mod reasons;
mod refusals;
mod rig;
mod transfers;
mod uploads;
