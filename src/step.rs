//! The steps after which a process may die, of a backup, of a checkpoint's removal and of a VM's hand-over to another
//! node, and what its successor makes of it: one closed list, shared by the code that takes them, the tests that kill
//! there, and `docs/restarts.md`.
//!
//! It never does anything: `killpoint` dies, and only in builds made for tests.

use std::fmt;

/// Who takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// The operator.
    Operator,
    /// The agent of the VM's node.
    Agent,
}

/// What a step is one of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scene {
    /// A backup.
    Backup,
    /// A checkpoint that is deleted.
    Removal,
    /// A VM that went to another node.
    HandOver,
}

macro_rules! steps {
    ($($scene:ident { $($name:ident $component:ident $done:literal, $finds:literal, $does:literal;)+ })+) => {
        /// A step after which a process may die.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step { $($(#[doc = $done] $name,)+)+ }

        impl Step {
            /// All of them, scene by scene, in the order in which they are taken.
            pub const ALL: &[Self] = &[$($(Self::$name,)+)+];

            /// Its name.
            pub fn as_str(self) -> &'static str {
                match self { $($(Self::$name => stringify!($name),)+)+ }
            }

            /// What it is one of.
            pub fn scene(self) -> Scene {
                match self { $($(Self::$name => Scene::$scene,)+)+ }
            }

            /// Who takes it.
            pub fn component(self) -> Component {
                match self { $($(Self::$name => Component::$component,)+)+ }
            }

            /// What was just done.
            pub fn done(self) -> &'static str {
                match self { $($(Self::$name => $done,)+)+ }
            }

            /// What the successor finds.
            pub fn finds(self) -> &'static str {
                match self { $($(Self::$name => $finds,)+)+ }
            }

            /// What the successor does.
            pub fn does(self) -> &'static str {
                match self { $($(Self::$name => $does,)+)+ }
            }
        }
    };
}

steps! {
    Backup {
        Validated Operator "the checklist was passed",
            "an unbound VmBackup", "goes through the checklist again";
        Held Operator "the VmBackup has its finalizer",
            "an unbound VmBackup with a finalizer", "goes through the checklist again";
        CheckpointMade Operator "the VmCheckpoint is made",
            "an unbound VmBackup, and the checkpoint at its deterministic name", "binds it with that checkpoint";
        Bound Operator "the VmBackup is bound to its node",
            "a bound VmBackup without transfers", "makes the transfers; the agent did not wait for it";
        TransferMade Operator "the first ImageTransfer is made",
            "some of the transfers", "makes the others";
        TransferBound Operator "an ImageTransfer is bound",
            "a bound transfer", "binds the others";
        RecordStored Agent "the record is in the state directory",
            "a record that says files may be there", "makes them again";
        ScratchMade Agent "the scratch images are made",
            "a record that says files may be there", "makes them again";
        BaseRedefined Agent "libvirt knows the checkpoint that an incremental backup starts from",
            "a record that says files may be there, libvirt's note of that checkpoint", "redefines it";
        Frozen Agent "the guest is frozen",
            "a record that says the guest may be frozen, no job", "thaws at once, then freezes again";
        BeginIntended Agent "the begin is noted, not called",
            "a record that says a job may run, no job", "thaws, removes a checkpoint if there is one, begins again";
        BeginCalled Agent "the begin is called, not answered",
            "our job, or none and perhaps its checkpoint", "thaws; adopts the job, or begins again";
        BeginAnswered Agent "the begin is answered, not noted",
            "our job, by its socket's path", "thaws, adopts the job";
        Thawed Agent "the guest is thawed",
            "our job; a record that says the guest may be frozen", "thaws again, serves";
        ReadyWritten Agent "the status says Ready",
            "our job", "serves";
        TicketStored Agent "a ticket is in the state directory",
            "a ticket without a Secret", "makes the Secret with that ticket";
        SecretMade Agent "a ticket's Secret is made",
            "a Secret of the number that it stored", "serves that ticket";
        FinalizeSeen Agent "the finalize is seen, every byte was read",
            "our job, the coverage of at most five seconds ago",
            "counts again; what was not stored must be read again, and it says so";
        JobAborted Agent "the job is ended",
            "a record that says a job may run, no job", "removes the rest";
        CheckpointForgotten Agent "libvirt's note of the checkpoint is dropped",
            "the bitmaps, which stay", "removes the files";
        BaseForgotten Agent "libvirt's note of the checkpoint that it started from is dropped",
            "the bitmaps, which stay", "removes the files";
        BitmapRemoved Agent "the bitmap of one disk is removed (VM off)",
            "a failed backup's other bitmaps", "removes them";
        CheckpointRemoved Agent "the failed backup's checkpoint and bitmaps are removed",
            "no checkpoint", "removes the files";
        FilesRemoved Agent "scratch images and socket are removed",
            "a record of an ended backup", "writes the status";
        TerminalWritten Agent "the status says how it ended",
            "a record of a backup that the API calls ended", "forgets it";
        CheckpointUsable Operator "the checkpoint is usable",
            "a usable checkpoint", "goes on with the Secrets";
        SecretDeleted Operator "a ticket's Secret is deleted",
            "an ended transfer without Secret", "nothing";
        Settled Operator "a deleted VmBackup's checkpoint is settled",
            "a VmBackup with a finalizer, its host clean", "removes the finalizer";
        FinalizerRemoved Operator "the finalizer is removed",
            "nothing", "nothing";
    }
    Removal {
        RemovalBound Operator "the deleted VmCheckpoint is bound to its VM's node",
            "a bound VmCheckpoint", "nothing; the agent did not wait for it";
        BitmapDeleted Agent "the bitmap of one disk is deleted (VM running)",
            "the bitmaps of the other disks", "deletes them";
        RemovalWritten Agent "the status says that the bitmaps are gone",
            "a VmCheckpoint whose host is clean", "nothing";
        CheckpointReleased Operator "the VmCheckpoint's finalizer is removed",
            "nothing", "nothing";
    }
    HandOver {
        SightingMade Agent "the node that the VM came to says so",
            "a VM that is seen on two nodes, or on this one", "nothing";
        SightingDeleted Agent "the node that the VM left says so",
            "no VM, and no sighting", "nothing";
        HandOverPublished Operator "the LibvirtDomain names the other node",
            "a LibvirtDomain that says what is seen", "nothing";
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
