//! What every phase of every kind must come to: the one table behind the tests and docs/gitops.md.

/// The conditions that tools wait for.
pub const CONDITIONS: [&str; 4] = ["Ready", "Reconciling", "Stalled", "Succeeded"];

/// One phase of one kind.
pub struct Row {
    pub kind: &'static str,
    /// Its name in `objects/`.
    pub state: &'static str,
    /// Its name for people.
    pub what: &'static str,
    pub kstatus: &'static str,
    pub argo: &'static str,
    /// Those of `CONDITIONS` that are True, and answer the object's generation: `kubectl wait` looks at both.
    pub conditions: &'static [&'static str],
}

macro_rules! rows {
    ($($kind:ident { $($state:literal $what:literal, $kstatus:ident, $argo:ident, [$($condition:ident)*];)+ })+) => {
        /// Every phase of every kind.
        pub const ROWS: &[Row] = &[$($(Row {
            kind: stringify!($kind),
            state: $state,
            what: $what,
            kstatus: stringify!($kstatus),
            argo: stringify!($argo),
            conditions: &[$(stringify!($condition)),*],
        },)+)+];
    };
}

rows! {
    VmBackup {
        "unseen" "just applied", InProgress, Progressing, [];
        "waiting-vm-not-running" "Initializing: `VmNotRunning`", InProgress, Progressing, [Reconciling];
        "waiting-backup-already-running" "Initializing: `BackupAlreadyRunning`", InProgress, Progressing, [Reconciling];
        "bound" "Initializing: `Bound`", InProgress, Progressing, [Reconciling];
        "ready" "Ready: `AwaitingFinalize`", InProgress, Progressing, [Ready Reconciling];
        "transfers-incomplete" "Ready: `TransfersIncomplete`", InProgress, Progressing, [Ready Reconciling];
        "finalizing" "Finalizing", InProgress, Progressing, [Reconciling];
        "succeeded" "Succeeded", Current, Healthy, [Ready Succeeded];
        "succeeded-and-changed" "Succeeded, its spec changed since", Current, Healthy, [Ready Succeeded];
        "failed" "Failed", Failed, Degraded, [Stalled];
        "cancelled" "Failed: `Cancelled`", Failed, Degraded, [Stalled];
        "deleting" "being deleted", Terminating, Progressing, [];
    }
    ImageTransfer {
        "unseen" "just applied", InProgress, Progressing, [];
        "waiting-backup-not-found" "Initializing: `BackupNotFound`", InProgress, Progressing, [Reconciling];
        "waiting-backup-not-ready" "Initializing: `BackupNotReady`", InProgress, Progressing, [Reconciling];
        "ready" "Ready: `TicketReady`", InProgress, Progressing, [Ready Reconciling];
        "ready-nbd" "Ready: `AwaitingFinalize`", InProgress, Progressing, [Ready Reconciling];
        "paused" "Paused", InProgress, Progressing, [Reconciling];
        "succeeded" "Succeeded", Current, Healthy, [Ready Succeeded];
        "succeeded-and-changed" "Succeeded, its spec changed since", Current, Healthy, [Ready Succeeded];
        "failed" "Failed", Failed, Degraded, [Stalled];
        "cancelled" "Cancelled", Failed, Degraded, [Stalled];
        "deleting" "being deleted", Terminating, Progressing, [];
    }
    VmCheckpoint {
        "initializing" "Initializing: its backup runs", InProgress, Progressing, [];
        "ready" "Ready", Current, Healthy, [Ready];
        "failed" "Failed: `VmReplaced`", Failed, Degraded, [Stalled];
        "deleting-busy" "being deleted: `CheckpointBusy`", Terminating, Progressing, [Reconciling];
        "deleting" "being deleted: `Finalizing`", Terminating, Progressing, [Reconciling];
    }
    LibvirtDomain {
        "running" "Running", Current, Healthy, [Ready];
        "paused" "Paused", Current, Healthy, [Ready];
        "busy" "Busy", InProgress, Progressing, [Reconciling];
        "off" "Off", InProgress, Suspended, [];
        "unsupported" "no disk can be backed up", Failed, Degraded, [Stalled];
        "missing" "Missing", Failed, Degraded, [Stalled];
        "node-lost" "NodeLost", Failed, Degraded, [Stalled];
    }
}

/// The row of a phase.
pub fn row(kind: &str, state: &str) -> &'static Row {
    let found = ROWS.iter().find(|row| row.kind == kind && row.state == state);
    found.unwrap_or_else(|| panic!("no row for {kind} {state}"))
}

/// The table of docs/gitops.md.
pub fn table() -> String {
    let mut table =
        "| | | kstatus | Argo CD | `kubectl wait` finds True |\n|---|---|---|---|---|\n".to_owned();
    let mut last = "";
    for row in ROWS {
        let kind = if row.kind == last { "" } else { row.kind };
        last = row.kind;
        table += &format!(
            "| {kind} | {} | {} | {} | {} |\n",
            row.what,
            row.kstatus,
            row.argo,
            row.conditions.join(", ")
        );
    }
    table
}
