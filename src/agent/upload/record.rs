//! An upload, as the state directory keeps it, and the machine that it goes through. Pure; it reads and writes nothing.
//!
//! ```text
//!            made, served       Finalized            flushed, server gone      checked, named
//!  Planned ---------------> Open ---------> Closing ---------------------> Closed -----------> Succeeded
//!     |                      |                |                              |
//!     | cancelled, refused   | cancelled,     | the server died,             | not what was said,
//!     |                      | server died    | cannot flush                 | name taken
//!     +----------------------+----------------+------------------------------+----> Discarding ----> Ended
//! ```
//!
//! What a server of the volume took and did not flush may die with it, so that one that died is never replaced: its upload
//! fails. From Closed on every byte is on the disk.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::agent::transfer::Wish;
use crate::api::{Phase, VolumeFormat, is_volume_name};
use crate::imageio::{Access, Ticket};
use crate::reason::Because;

/// One upload into a new volume.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// Uid of the ImageTransfer.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The libvirt pool.
    pub pool: String,
    /// The pool's folder.
    pub folder: PathBuf,
    /// Which folder that is: another one, an empty mount point say, has other files.
    pub place: Inode,
    /// Which file the volume is, once it is made.
    pub file: Option<Inode>,
    /// The name of the volume.
    pub volume: String,
    /// Its format.
    pub format: VolumeFormat,
    /// Bytes that the guest will see.
    pub size: u64,
    /// How far it went.
    pub stage: Stage,
    /// The ticket.
    pub ticket: Ticket,
    /// Which of the transfer's Secrets has it.
    pub secret: u32,
    /// That Secret may have been made.
    pub announced: bool,
}

/// A file or a folder, whatever its name: its device and its number there.
pub type Inode = (u64, u64);

/// How far an upload went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// A file may have been begun.
    Planned,
    /// It is served under a temporary name.
    Open,
    /// The client is done; the server of the volume is being ended.
    Closing,
    /// All bytes are on the disk, under the temporary name.
    Closed,
    /// The volume has its name, and libvirt knows of it.
    Succeeded,
    /// It is being removed.
    Discarding(Phase, Because),
    /// Nothing is left of it.
    Ended(Phase, Because),
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Make the volume, and serve it.
    Make,
    /// Have the ticket answer.
    Answer,
    /// Have the ticket answer no request for now.
    Pause(Because),
    /// Flush, and end the server.
    Close,
    /// Check the volume, and give it its name.
    Publish,
    /// Remove it: this will have been its end.
    Discard(Phase, Because),
    /// It ended.
    Tell(Phase, Because),
}

impl Stage {
    /// Whether it came to its end.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Succeeded | Self::Ended(..))
    }

    /// What is to be done next. `interrupted`: why the server of the volume is not the one that was begun, where it is not.
    /// `is_over`: it was told already that it ended, for its node was lost.
    pub fn next(&self, wish: &Wish, interrupted: Option<Because>, is_over: bool) -> Next {
        match (self, wish) {
            (Self::Succeeded, _) => Next::Tell(Phase::Succeeded, done()),
            (Self::Ended(phase, because), _) => Next::Tell(*phase, because.clone()),
            (Self::Discarding(phase, because), _) => Next::Discard(*phase, because.clone()),
            (Self::Closed, Wish::End(phase, because)) if is_over => Next::Discard(*phase, because.clone()),
            // the client said that it is done, and it is: a change of mind comes too late
            (Self::Closed, _) => Next::Publish,
            (_, Wish::End(phase @ Phase::Cancelled, because)) => Next::Discard(*phase, because.clone()),
            (Self::Planned, _) => Next::Make,
            (Self::Open | Self::Closing, _) if let Some(because) = interrupted => {
                Next::Discard(Phase::Failed, because)
            }
            (Self::Closing, _) | (Self::Open, Wish::End(..)) => Next::Close,
            (Self::Open, Wish::Pause(because)) => Next::Pause(because.clone()),
            (Self::Open, Wish::Open) => Next::Answer,
        }
    }
}

fn done() -> Because {
    Because::new(crate::reason::Reason::Finalized, "the volume is whole, and has its name")
}

impl Upload {
    /// The volume's file while it is not whole. Its name is no volume's that a user may give.
    pub fn partial(&self) -> PathBuf {
        self.folder.join(format!(".virtmark-{}.partial", self.uid))
    }

    /// The volume's file.
    pub fn path(&self) -> PathBuf {
        self.folder.join(&self.volume)
    }

    /// What of it cannot be so in a record that an agent wrote: it would lead to other files.
    pub fn unsound(&self) -> Option<&'static str> {
        let Ticket { transfer, size, access, .. } = &self.ticket;
        match () {
            () if !is_volume_name(&self.volume) => Some("volume"),
            () if !self.folder.is_absolute() => Some("folder"),
            () if *transfer != self.uid || *size != self.size || *access == Access::Read => Some("ticket"),
            () => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::reason::Reason;

    fn why(reason: Reason) -> Because {
        Because::new(reason, "")
    }

    fn stages() -> impl Strategy<Value = Stage> {
        prop_oneof![
            Just(Stage::Planned),
            Just(Stage::Open),
            Just(Stage::Closing),
            Just(Stage::Closed),
            Just(Stage::Succeeded),
            Just(Stage::Discarding(Phase::Failed, why(Reason::ImageCorrupt))),
            Just(Stage::Ended(Phase::Cancelled, why(Reason::Cancelled))),
        ]
    }

    fn wishes() -> impl Strategy<Value = Wish> {
        prop_oneof![
            Just(Wish::Open),
            Just(Wish::Pause(why(Reason::Paused))),
            Just(Wish::End(Phase::Succeeded, why(Reason::Finalized))),
            Just(Wish::End(Phase::Cancelled, why(Reason::Cancelled))),
        ]
    }

    /// The stage after what was to be done was done, or failed.
    fn after(stage: &Stage, next: &Next, fails: bool) -> Stage {
        match next {
            Next::Discard(phase, because) => Stage::Ended(*phase, because.clone()),
            Next::Answer | Next::Pause(_) | Next::Tell(..) => stage.clone(),
            Next::Make | Next::Close | Next::Publish if fails => {
                Stage::Discarding(Phase::Failed, why(Reason::HypervisorError))
            }
            Next::Make => Stage::Open,
            Next::Close => Stage::Closed,
            Next::Publish => Stage::Succeeded,
        }
    }

    proptest! {
        /// Whatever the user wants, and whatever dies: what succeeded was closed while the server was the one that took the
        /// bytes, and an end never goes back.
        #[test]
        fn only_what_was_flushed_succeeds(rounds: Vec<(bool, bool)>, wishes in prop::collection::vec(wishes(), 40)) {
            let (mut stage, mut lost) = (Stage::Planned, false);
            for ((dies, fails), wish) in rounds.into_iter().zip(wishes) {
                lost = (lost || dies) && matches!(stage, Stage::Open | Stage::Closing);
                let interrupted = lost.then(|| why(Reason::UploadInterrupted));
                let next = stage.next(&wish, interrupted, false);
                prop_assert!(!lost || matches!(next, Next::Discard(..)), "{stage:?} {next:?}");
                let then = after(&stage, &next, fails);
                if stage.is_over() {
                    prop_assert_eq!(&then, &stage);
                }
                if then == Stage::Succeeded && stage != then {
                    prop_assert_eq!(&stage, &Stage::Closed);
                }
                stage = then;
            }
        }

        /// Nothing is removed, and no end told, that nobody wanted or that did not go wrong.
        #[test]
        fn nothing_is_removed_for_nothing(stage in stages(), wish in wishes()) {
            if let Next::Discard(..) = stage.next(&wish, None, false) {
                let wanted = matches!(wish, Wish::End(Phase::Cancelled, _));
                prop_assert!(wanted || matches!(stage, Stage::Discarding(..)));
            }
        }
    }
}
