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
    ($($(#[doc = $doc:literal])+ $name:ident $retry:ident $kinds:literal, $next:literal,)+) => {
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

            /// The kinds of the objects that it is told of, for the documents.
            pub fn kinds(self) -> &'static str {
                match self { $(Self::$name => $kinds,)+ }
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
    /// It was bound to its node; the agent there goes on.
    Bound Wait "VmBackup, ImageTransfer", "wait",
    /// The disks can be read; the object is done once it is finalized.
    AwaitingFinalize Wait "VmBackup", "read every disk, then set spec.state to Finalized",
    /// It was finalized while bytes that had to be read were not, or while a client was being answered.
    TransfersIncomplete Wait "VmBackup", "read what is missing, or set spec.state to Cancelled",
    /// The backup that this transfer belongs to is not Ready yet.
    BackupNotReady Wait "ImageTransfer", "wait, or look at the backup's reason",
    /// The backup that this transfer names does not exist yet.
    BackupNotFound Wait "ImageTransfer", "create the VmBackup, or correct spec.backup",
    /// The host is being cleaned.
    Finalizing Wait "VmBackup, VmCheckpoint", "wait",
    /// The backup succeeded: an incremental can start here.
    BackupSucceeded Wait "VmCheckpoint", "nothing to do",
    /// The bitmap that it names was found, and is whole: an incremental can start here.
    Imported Wait "VmCheckpoint", "nothing to do",
    /// The agent of the VM's node looks for the bitmap that it names.
    Importing Wait "VmCheckpoint", "wait",
    /// The ticket answers: the bytes can be read.
    TicketReady Wait "ImageTransfer", "read the URL from the Secret named in status.ticketSecret",

    /// The ticket answers no request for now: the user wants that, or nobody used it for inactivityTimeoutSeconds.
    Paused Wait "ImageTransfer", "set spec.state to Running; where it is that already, change inactivityTimeoutSeconds",

    // ended well
    /// It was finalized with every byte read.
    Finalized Never "VmBackup, ImageTransfer", "nothing to do",
    /// The user cancelled it.
    Cancelled Never "VmBackup, ImageTransfer", "make a new one when you want to try again",
    /// It was deleted before it ended.
    Deleted Never "VmBackup, ImageTransfer", "nothing to do",

    // waiting to start
    /// The VM is off.
    VmNotRunning Wait "VmBackup, LibvirtDomain", "start the VM, or set offline to Refuse to fail at once",
    /// Another backup of this VM is not finished.
    BackupAlreadyRunning Wait "VmBackup", "finalize or cancel the other backup",
    /// The VM is paused by an error, migrating, starting or shutting down.
    VmBusy Wait "VmBackup, LibvirtDomain", "wait until the VM runs",
    /// A block job or snapshot holds the VM's disks.
    DisksLocked Wait "VmBackup", "wait until the block job ends",
    /// The VM's node is not Ready.
    NodeNotReady Wait "VmBackup, ImageTransfer", "bring the node back",
    /// The agent of the node does not answer.
    AgentUnreachable Wait "VmBackup, ImageTransfer", "look at the agent of the node",
    /// A backup of the VM runs, and the checkpoint cannot be removed meanwhile.
    CheckpointBusy Wait "VmCheckpoint", "wait until the backup ends",
    /// The directory for scratch disks has too little space.
    ScratchSpaceLow Wait "VmBackup", "free space in the agent's state directory",
    /// What the operator was told of tenants cannot be read, so that nobody may anything.
    TenancyUnreadable Wait "ImageTransfer", "have an admin mend the operator's tenancy file as the message says",

    // refused
    /// No LibvirtDomain of this name is in this namespace.
    VmNotFound Never "VmBackup, VmCheckpoint, LibvirtDomain", "list the VMs with kubectl get lvd",
    /// A disk that was named does not exist in the VM.
    DiskNotFound Never "VmBackup, VmCheckpoint, ImageTransfer", "list the disks in the LibvirtDomain's status.disks",
    /// The VM lost or got a disk while the backup was on its way to the node.
    DisksChanged Never "VmBackup", "make a new backup: it has the disks of now",
    /// A disk that was named cannot be backed up, or the VM has none that can.
    DiskNotSupported Never "VmBackup, LibvirtDomain", "leave the disk out of spec.disks, or change it as the message says",
    /// No such VmCheckpoint, or no usable one to start from.
    CheckpointNotFound Never "VmBackup", "list the checkpoints with kubectl get vmcp, or set type to Full",
    /// The checkpoint that was named, or is to be imported, is another VM's.
    CheckpointOfOtherVm Never "VmBackup, VmCheckpoint", "name a checkpoint of this VM: correct spec.fromCheckpoint, or spec.vmUuid",
    /// Another VmCheckpoint names the same bitmap.
    BitmapTaken Never "VmCheckpoint", "use the other one, and delete this one: the bitmap stays",
    /// The checkpoint's bitmaps are missing or inconsistent, or its backup did not succeed.
    CheckpointInvalid Never "VmBackup, VmCheckpoint", "delete it, and make a full backup, which starts a new chain",
    /// A disk cannot start from the checkpoint, and onInvalidCheckpoint is Fail.
    DiskNotInCheckpoint Never "VmBackup", "set onInvalidCheckpoint to FullBackup, or make a full backup",
    /// libvirt does not take the checkpoint, and onInvalidCheckpoint is Fail.
    RedefineFailed Never "VmBackup", "set onInvalidCheckpoint to FullBackup, or make a full backup",
    /// No disk can keep a dirty bitmap and onInvalidCheckpoint is Fail, or this libvirt or QEMU knows no backups.
    IncrementalNotSupported Never "VmBackup", "convert a disk to qcow2, set type to Full, or upgrade the hypervisor as the message says",
    /// The guest could not be frozen, and quiesce.mode is Required.
    QuiesceFailed Never "VmBackup", "check the guest agent, or set quiesce.mode to BestEffort",
    /// The VM was replaced by another one of the same name.
    VmReplaced Never "VmCheckpoint", "make a new backup: it starts a new chain",
    /// Who asked may not back this VM up. Refused at admission: no object is made.
    NotPermitted Never "VmBackup, VmCheckpoint", "have an admin grant the verb backup on the LibvirtDomain (ClusterRole virtmark-backup)",
    /// This namespace may not make volumes in the pool.
    PoolNotAllowed Never "ImageTransfer", "have an admin allow the pool for this namespace (the chart's tenancy)",
    /// The node has no such pool, or it is not active, or of a type or in a folder that cannot be used.
    PoolNotUsable Never "ImageTransfer", "name an active pool of type dir, fs or netfs in a folder of agent.imageDirs",
    /// The pool may not have room for the volume beside what was promised to others.
    PoolSpaceLow Never "ImageTransfer", "free space in the pool, or name another one",
    /// The pool has a volume of this name, or another upload makes one.
    VolumeExists Never "ImageTransfer", "take another name, or delete the volume; nothing of it was changed",
    /// The backup was not Ready within startDeadlineSeconds.
    StartDeadlineExceeded Never "VmBackup", "look at the last reason in the message, then make a new backup",

    // told of what was done for the user
    /// More checkpoints than maxCheckpoints: such as cannot be used any more, and then the oldest, are deleted.
    TooManyCheckpoints Never "VmBackup", "nothing to do",

    /// The object is gone, and its bitmap stays: it is not this cluster's Virtmark's, was not imported, or another VmCheckpoint
    /// names it.
    BitmapKept Never "VmCheckpoint", "remove it with what made it, if nobody needs it",

    // told of the inventory
    /// Two domains have the same name: this one is published with the start of its uuid added.
    NameTaken Never "LibvirtDomain", "rename one of the two domains",

    // ended otherwise
    /// The VM was stopped, or crashed, while it was being backed up.
    VmStopped Never "VmBackup", "make a new backup once the VM runs",
    /// The VM went to another node before its backup began.
    VmMigrated Never "VmBackup", "make a new backup: it is bound to the node where the VM is now",
    /// Its node is cordoned, and the admin's drain grace is over.
    NodeDraining Never "VmBackup", "make a new backup once the VM is on another node, or the node is uncordoned",
    /// Writes of the guest filled the scratch space.
    ScratchExhausted Never "VmBackup", "give the agent more scratch space, or read faster",
    /// The backup was not finalized within readyDeadlineSeconds.
    ReadyDeadlineExceeded Never "VmBackup", "make a new backup, and finalize it in time",
    /// No client asked for anything for clientIdleSeconds.
    ClientIdle Never "VmBackup", "make a new backup, and read it",
    /// Nobody used the ticket for inactivityTimeoutSeconds, and timeoutPolicy is Cancel.
    TransferInactive Never "ImageTransfer", "make a new one, and read it",
    /// What serves the volume died while bytes were uploaded: some may not be in it.
    UploadInterrupted Never "ImageTransfer", "upload it again, with a new ImageTransfer",
    /// The volume that was uploaded is not of the format and size that were said, or qemu-img finds errors in it.
    ImageCorrupt Never "ImageTransfer", "look at the node's storage, then upload it again",
    /// The backup ended, and this transfer with it.
    TransferFailed Never "ImageTransfer", "look at the backup, then make a new one",
    /// The node is gone.
    NodeLost Never "VmBackup, ImageTransfer, LibvirtDomain", "make a new backup where the VM runs now",
    /// libvirt ended the backup job, or refused it; or QEMU's tools refused a volume.
    HypervisorError Never "VmBackup, ImageTransfer", "read libvirt's words in the message",
    /// The host could not be cleaned yet; tried again.
    FinalizeFailed Wait "VmBackup, VmCheckpoint", "look at the agent's log; it goes on trying",
    /// The guest's file systems may still be frozen; thawing goes on.
    GuestMayBeFrozen Wait "VmBackup", "run virsh domfsthaw on the node if the guest hangs",
    /// The finalizer was released although the host could not be reached.
    HostCleanupAbandoned Never "VmBackup, ImageTransfer, VmCheckpoint", "check the node for leftovers named in the message when it is back",
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
