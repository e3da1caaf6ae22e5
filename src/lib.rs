//! Virtmark: incremental, snapshot-less backup of running libvirt/QEMU virtual machines from Kubernetes.
//!
//! ```text
//!  floor 4  assemblies   controller             agent                  client
//!  floor 3  ports        cluster clock killpoint metrics probe telemetry    nbd::client  imageio::serve  libvirt
//!  floor 2  decisions    controller::{chain,health,import,certificates::{decide,authorities},*::{resolve,desired,status}}
//!                        agent::backup::{life,decide,scratch,status}  agent::certificate::renewal
//!                        imageio::{ticket,coverage,route}
//!  floor 1  formats      api   nbd::{proto,handshake,transmission}   imageio::wire   libvirt::xml   x509
//!  floor 0  vocabulary   extent   reason   step   outage   metrics::metric
//! ```
//!
//! A floor uses those below it, never one above: `tests/floors.rs` says who may import whom.

pub mod access;
#[cfg(feature = "agent")]
pub mod agent;
pub mod api;
pub mod chart;
pub mod client;
pub mod clock;
pub mod cluster;
pub mod controller;
pub mod extent;
pub mod imageio;
pub mod killpoint;
#[cfg(feature = "agent")]
pub mod libvirt;
pub mod metrics;
pub mod nbd;
pub mod outage;
pub mod probe;
pub mod reason;
pub mod step;
pub mod tables;
pub mod telemetry;
pub mod x509;
