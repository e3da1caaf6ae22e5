//! Every metric there is: its name, kind, labels, who exports it and what it says. One closed list, shared by what is
//! scraped and by `docs/metrics.md`. It counts nothing.
//!
//! Labels have few values: kinds, phases, reasons, nodes, and the VMs that are backed up. Never a ticket, a client, a path,
//! or the name of an object that comes and goes.

use std::fmt;

/// How a metric moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Up only, from the start of the process.
    Counter,
    /// Up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

/// Who exports a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The operator; most of it the one that leads.
    Operator,
    /// Each agent.
    Agent,
    /// Both.
    Both,
}

macro_rules! metrics {
    ($($(#[doc = $doc:literal])+ $id:ident $by:ident $kind:ident $name:literal [$($label:literal),*],)+) => {
        /// Every metric.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Metric { $($(#[doc = $doc])+ $id,)+ }

        impl Metric {
            /// All of them, in the order of the documents.
            pub const ALL: &[Self] = &[$(Self::$id,)+];

            /// As it is queried: a counter ends in `_total`, a unit is a base unit.
            pub fn name(self) -> &'static str {
                match self { $(Self::$id => $name,)+ }
            }

            /// How it moves.
            pub fn kind(self) -> Kind {
                match self { $(Self::$id => Kind::$kind,)+ }
            }

            /// Who exports it.
            pub fn by(self) -> By {
                match self { $(Self::$id => By::$by,)+ }
            }

            /// Names of its labels.
            pub fn labels(self) -> &'static [&'static str] {
                match self { $(Self::$id => &[$($label),*],)+ }
            }

            /// What it says.
            pub fn help(self) -> &'static str {
                match self { $(Self::$id => concat!($($doc),+).trim_ascii(),)+ }
            }
        }
    };
}

metrics! {
    // the VMs
    /// VMs in the inventory, by state; `Unknown` while no node tells.
    Vms Operator Gauge "virtmark_vms" ["state"],
    /// The point in time that the VM's last backup that succeeded holds. Absent of a VM that has none.
    LastBackup Operator Gauge "virtmark_vm_last_backup_timestamp_seconds" ["namespace", "vm"],
    /// The point in time of the VM's newest checkpoint that an incremental backup can start from. Absent when there is none.
    UsableCheckpoint Operator Gauge "virtmark_vm_usable_checkpoint_timestamp_seconds" ["namespace", "vm"],
    /// Backups of the VM that have not ended, by phase and by the reason that their condition Ready gives.
    UnfinishedBackups Operator Gauge "virtmark_vm_unfinished_backups" ["namespace", "vm", "phase", "reason"],

    // the objects
    /// VmBackups that exist, by phase.
    Backups Operator Gauge "virtmark_backups" ["phase"],
    /// ImageTransfers that exist, by phase.
    Transfers Operator Gauge "virtmark_transfers" ["phase"],
    /// VmCheckpoints that exist, by whether an incremental backup can start from them.
    Checkpoints Operator Gauge "virtmark_checkpoints" ["usable"],
    /// Backups that this process ended, by the phase and the reason that they ended with.
    Ended Both Counter "virtmark_backups_ended_total" ["type", "phase", "reason"],

    // the host
    /// Backups that the agent has in hand: something of them is on the host, or will be.
    OnHost Agent Gauge "virtmark_agent_backups" [],
    /// For how long guests were frozen, each of them once it was thawed.
    Freeze Agent Histogram "virtmark_agent_freeze_seconds" [],
    /// For how long the guest that is frozen longest is frozen, or may be; 0 when none is.
    Frozen Agent Gauge "virtmark_agent_longest_frozen_seconds" [],
    /// Bytes that all scratch images take.
    ScratchUsed Agent Gauge "virtmark_agent_scratch_used_bytes" [],
    /// Bytes that scratch images can take together before a backup is ended: the admin's limit, or what the file system has.
    ScratchLimit Agent Gauge "virtmark_agent_scratch_limit_bytes" [],
    /// Whether libvirt answers.
    LibvirtUp Agent Gauge "virtmark_agent_libvirt_up" [],
    /// Whether the node's agent renews its Lease in time: nothing is bound to one that does not.
    AgentUp Operator Gauge "virtmark_agent_up" ["node"],
    /// When each agent last renewed its Lease, by its node's clock.
    Heartbeat Operator Gauge "virtmark_agent_heartbeat_timestamp_seconds" ["node"],

    // the image server
    /// Bytes of disks that the kernel took for clients. Encrypted: `tls`; over the unix socket: `none`.
    Served Agent Counter "virtmark_imageio_bytes_total" ["direction", "encryption"],
    /// Connections that are open.
    Connections Agent Gauge "virtmark_imageio_connections" ["encryption"],
    /// Requests that were answered, by the class of the answer's status.
    Requests Agent Counter "virtmark_imageio_requests_total" ["status"],
    /// Time that reads waited for the storage.
    StorageWait Agent Counter "virtmark_imageio_storage_seconds_total" [],
    /// Time that reads waited for the client to take their bytes, encryption among it.
    SocketWait Agent Counter "virtmark_imageio_socket_seconds_total" [],
    /// Tickets that are valid.
    Tickets Agent Gauge "virtmark_imageio_tickets" [],

    // the processes
    /// 1 for the operator that leads.
    Leader Operator Gauge "virtmark_operator_leader" [],
    /// Events told, by kind of the object, reason and type (Normal, Warning).
    Told Both Counter "virtmark_events_total" ["kind", "reason", "type"],
    /// Requests to the API server, by the status of the answer; `error` when there was none.
    ApiRequests Both Counter "virtmark_api_requests_total" ["verb", "resource", "code"],
    /// How long it took to look at an object once.
    Reconcile Both Histogram "virtmark_reconcile_seconds" ["kind"],
    /// Looks at an object that ended early and are made again, by what went wrong; `watch`: the kind could not be followed.
    ReconcileErrors Both Counter "virtmark_reconcile_errors_total" ["kind", "error"],
    /// 1, with the version of the process.
    BuildInfo Both Gauge "virtmark_build_info" ["version"],
}

impl Metric {
    /// Upper bounds of a histogram's buckets, in its unit.
    pub fn buckets(self) -> &'static [f64] {
        match self {
            Self::Freeze => &[0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0],
            _ => &[0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0],
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        })
    }
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Operator => "operator",
            Self::Agent => "agent",
            Self::Both => "both",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_conventions_of_prometheus() {
        for metric in Metric::ALL {
            let name = metric.name();
            assert!(name.starts_with("virtmark_"), "{name}");
            assert_eq!(name.ends_with("_total"), metric.kind() == Kind::Counter, "{name}");
            for unit in ["_ms", "_milliseconds", "_mib", "_percent", "_minutes"] {
                assert!(!name.contains(unit), "{name}: base units");
            }
            let same = Metric::ALL.iter().filter(|other| other.name() == name).count();
            assert_eq!(same, 1, "{name}");
            for secret in ["ticket", "client", "path", "uid", "url", "id"] {
                assert!(!metric.labels().contains(&secret), "{name} has a label {secret}");
            }
        }
    }
}
