//! Why something waits, failed or ended: one closed list, shared by conditions, events and documents.
//!
//! A reason is a cause that a person or a program can act on. It never carries data: the message beside
//! it does. The list follows oVirt's validation keys (design, section 4).

use std::fmt;

/// What the controllers do about a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Wait for the world to change, within the deadline.
    Wait,
    /// The end: only a new object helps.
    Never,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident $retry:ident $next:literal,)+) => {
        /// Every reason there is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        pub enum Reason { $($(#[doc = $doc])+ $name,)+ }

        impl Reason {
            /// All of them, in the order of the documents.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// As conditions and events spell it.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }

            /// Whether waiting can help.
            pub fn retry(self) -> Retry {
                match self { $(Self::$name => Retry::$retry,)+ }
            }

            /// What the user can do next.
            pub fn next_step(self) -> &'static str {
                match self { $(Self::$name => $next,)+ }
            }

            /// What it means, for the documents.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)+ }
            }
        }
    };
}

reasons! {
    // on the way
    /// No controller has looked at the object yet.
    Pending Wait "wait",
    /// It was bound to its node; the agent there goes on.
    Bound Wait "wait",
    /// The disks can be read; the object is done once it is finalized.
    AwaitingFinalize Wait "read every disk, then set spec.state to Finalized",
    /// It was finalized while bytes that had to be read were not.
    TransfersIncomplete Wait "read what is missing, or set spec.state to Cancelled",
    /// The backup that this transfer belongs to is not Ready yet.
    BackupNotReady Wait "wait, or look at the backup's reason",
    /// The backup that this transfer names does not exist yet.
    BackupNotFound Wait "create the VmBackup, or correct spec.backup",
    /// The host is being cleaned.
    Finalizing Wait "wait",
    /// The backup succeeded: an incremental can start here.
    BackupSucceeded Wait "nothing to do",
    /// The ticket answers: the bytes can be read.
    TicketReady Wait "read the URL from the Secret named in status.ticketSecret",

    // ended well
    /// It was finalized with every byte read.
    Finalized Never "nothing to do",
    /// The user cancelled it.
    Cancelled Never "make a new one when you want to try again",
    /// It was deleted before it ended.
    Deleted Never "nothing to do",

    // waiting to start
    /// The VM is off.
    VmNotRunning Wait "start the VM, or set offline to Refuse to fail at once",
    /// Another backup of this VM is not finished.
    BackupAlreadyRunning Wait "finalize or cancel the other backup",
    /// The VM is paused by an error, migrating, starting or shutting down.
    VmBusy Wait "wait until the VM runs",
    /// A block job or snapshot holds the VM's disks.
    DisksLocked Wait "wait until the block job ends",
    /// The VM's node is not Ready.
    NodeNotReady Wait "bring the node back",
    /// The agent of the node does not answer.
    AgentUnreachable Wait "look at the agent of the node",
    /// A backup of the VM runs, and the checkpoint cannot be removed meanwhile.
    CheckpointBusy Wait "wait until the backup ends",
    /// The directory for scratch disks has too little space.
    ScratchSpaceLow Wait "free space in the agent's state directory",

    // refused
    /// No LibvirtDomain of this name is in this namespace.
    VmNotFound Never "list the VMs with kubectl get lvd",
    /// A disk that was named does not exist in the VM.
    DiskNotFound Never "list the disks in the LibvirtDomain's status.disks",
    /// A disk that was named cannot be backed up, or the VM has none that can.
    DiskNotSupported Never "leave the disk out of spec.disks, or change it as the message says",
    /// The libvirt or QEMU of the node cannot do this.
    IncrementalNotSupported Never "upgrade libvirt to 7.2 or newer",
    /// The guest could not be frozen, and quiesce.mode is Required.
    QuiesceFailed Never "check the guest agent, or set quiesce.mode to BestEffort",
    /// The VM was replaced by another one of the same name.
    VmReplaced Never "make a new backup: it starts a new chain",
    /// The backup was not Ready within startDeadlineSeconds.
    StartDeadlineExceeded Never "look at the last reason in the message, then make a new backup",

    // ended otherwise
    /// The VM was stopped, or crashed, while it was being backed up.
    VmStopped Never "make a new backup once the VM runs",
    /// Writes of the guest filled the scratch space.
    ScratchExhausted Never "give the agent more scratch space, or read faster",
    /// The backup was not finalized within readyDeadlineSeconds.
    ReadyDeadlineExceeded Never "make a new backup, and finalize it in time",
    /// No client asked for anything for clientIdleSeconds.
    ClientIdle Never "make a new backup, and read it",
    /// The backup ended, and this transfer with it.
    TransferFailed Never "look at the backup, then make a new one",
    /// The node is gone.
    NodeLost Never "make a new backup where the VM runs now",
    /// libvirt ended the backup job, or refused it.
    HypervisorError Never "read libvirt's words in the message",
    /// The host could not be cleaned yet; tried again.
    FinalizeFailed Wait "look at the agent's log; it goes on trying",
    /// The guest's file systems may still be frozen; thawing goes on.
    GuestMayBeFrozen Wait "run virsh domfsthaw on the node if the guest hangs",
    /// The finalizer was released although the host could not be reached.
    HostCleanupAbandoned Never "check the node for leftovers named in the message when it is back",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A reason with the words for this case.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct Because {
    /// The cause.
    pub reason: Reason,
    /// What happened, in words. The next step is appended when it is shown.
    pub message: String,
}

impl Because {
    /// A cause and its words.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// The message as a person reads it: what happened, then what to do.
    pub fn shown(&self) -> String {
        match self.reason.next_step() {
            "wait" | "nothing to do" => self.message.clone(),
            next => format!("{}; {next}", self.message),
        }
    }
}
