//! Virtmark: incremental, snapshot-less backup of running libvirt/QEMU virtual machines from Kubernetes.

#[cfg(feature = "agent")]
pub mod agent;
pub mod api;
#[cfg(feature = "agent")]
pub mod libvirt;
pub mod reason;
