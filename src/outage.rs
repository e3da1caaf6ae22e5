//! What a backup comes to when something outside goes away: one table, shared by the tests that take it away and by
//! `docs/outages.md`.
//!
//! It never does anything, and no decision reads it: the controllers come to these ends by themselves.

use crate::reason::Reason;

/// What goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// libvirtd is killed and comes back, then is restarted politely. QEMUs go on.
    Libvirtd,
    /// etcd is killed and comes back.
    Etcd,
    /// The API server hangs, then is gone: a minute in all.
    ApiServer,
    /// The VM is undefined: it is transient while it runs.
    Undefined,
    /// The VM is powered off.
    PoweredOff,
    /// The VM's QEMU is killed.
    QemuKilled,
}

impl Outage {
    /// All of them.
    pub const ALL: &[Self] =
        &[Self::Libvirtd, Self::Etcd, Self::ApiServer, Self::Undefined, Self::PoweredOff, Self::QemuKilled];

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Libvirtd => "libvirtd restarts",
            Self::Etcd => "etcd restarts",
            Self::ApiServer => "the API server is gone for a minute",
            Self::Undefined => "the VM is undefined",
            Self::PoweredOff => "the VM is powered off",
            Self::QemuKilled => "QEMU is killed",
        }
    }

    /// Whether the VM has no QEMU any more.
    pub fn stops_the_vm(self) -> bool {
        matches!(self, Self::PoweredOff | Self::QemuKilled)
    }
}

macro_rules! moments {
    ($($name:ident $words:literal, $natural:literal;)+) => {
        /// Where the backup, or the deletion of a checkpoint, stands.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Moment { $(#[doc = $words] $name,)+ }

        impl Moment {
            /// All of them, in the order of a backup's life.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// In words.
            pub fn words(self) -> &'static str {
                match self { $(Self::$name => $words,)+ }
            }

            /// What it comes to when nothing goes wrong.
            pub fn natural(self) -> &'static str {
                match self { $(Self::$name => $natural,)+ }
            }
        }
    };
}

moments! {
    VmOff "Initializing, waits for the VM to run", "Succeeded";
    Queued "Initializing, waits for another backup", "Succeeded";
    Bound "Initializing, bound, nothing made yet", "Succeeded";
    Frozen "Initializing, the guest is frozen", "Succeeded";
    Beginning "Initializing, the begin is called, not answered", "Succeeded";
    Ready "Ready, idle", "Succeeded";
    Reading "Ready, in the middle of a read", "Succeeded";
    Unread "Ready, finalized, not wholly read", "Succeeded";
    Finalizing "Finalizing, the job runs still", "Succeeded";
    JobEnded "Finalizing, the job is ended", "Succeeded";
    Forgotten "Finalizing, libvirt's note of the checkpoint is dropped", "Succeeded";
    Failing "Finalizing after a cancel, the bitmaps are there still", "Failed `Cancelled`";
    Deleting "being deleted, the files are there still", "gone";
    Succeeded "Succeeded", "Succeeded";
    Failed "Failed", "Failed `Cancelled`";
    CheckpointHeld "a VmCheckpoint being deleted, waits for a backup", "gone";
    CheckpointGoing "a VmCheckpoint being deleted, QEMU is at it", "gone";
}

/// What it comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As if nothing had happened.
    Natural,
    /// It waits, with this reason, until the VM runs again; then as if nothing had happened.
    Waits(Reason),
    /// It fails, with this reason.
    Fails(Reason),
}

/// What a backup that stands at `moment` comes to.
pub fn end(moment: Moment, outage: Outage) -> End {
    match moment {
        Moment::VmOff => match outage {
            Outage::Undefined => End::Fails(Reason::VmNotFound),
            _ => End::Natural,
        },
        Moment::Queued => match outage {
            Outage::PoweredOff | Outage::QemuKilled => End::Waits(Reason::VmNotRunning),
            _ => End::Natural,
        },
        // libvirt 11.3 loses track of a job that it was killed in, and of nothing else
        Moment::Beginning if outage == Outage::Libvirtd => End::Waits(Reason::VmBusy),
        Moment::Bound | Moment::Frozen | Moment::Beginning => match outage {
            Outage::PoweredOff | Outage::QemuKilled => End::Waits(Reason::VmNotRunning),
            _ => End::Natural,
        },
        Moment::Ready | Moment::Reading | Moment::Unread if outage.stops_the_vm() => {
            End::Fails(Reason::VmStopped)
        }
        _ => End::Natural,
    }
}
