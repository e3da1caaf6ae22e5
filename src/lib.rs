//! Virtmark: incremental, snapshot-less backup of running libvirt/QEMU virtual machines from Kubernetes.

pub mod api;
pub mod reason;
