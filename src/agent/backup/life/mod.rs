//! The life of one backup on its host, as a value: what was done, what may still be there, what is next.
//!
//! ```text
//!   New --MakeFiles--> Prepared --(Redefine the base)--Freeze--> Quiesced --Begin--> Begun (serving)
//!     \                   |                                         |                  |
//!      \------------------+-----------------------------------------+------------------/
//!                                 | an end: wished, or forced by the world
//!                                 v
//!        Thaw, AbortJob, DeleteCheckpoint | ForgetCheckpoint, ForgetBase, RemoveFiles  --> ended
//! ```
//!
//! The way up is a stage; the way down is a list of what the host may hold. `starting` notes what a call
//! may leave behind *before* it is made, so whoever finds this record later, after any crash, knows what to
//! look for. A guest that may be frozen is thawed before anything else but the call that it was frozen for.
//! Nothing here does anything: `next` names the action, its doer reports back with `done`.

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::reason::{Because, Reason, Retry};

/// One call to the host. Each can be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Make the directories and the scratch images.
    MakeFiles,
    /// Make libvirt know the checkpoint that the backup starts from.
    Redefine,
    /// Freeze the guest's file systems.
    Freeze,
    /// Begin libvirt's backup job, with its checkpoint.
    Begin,
    /// Thaw the guest's file systems.
    Thaw,
    /// End the tickets and libvirt's job.
    AbortJob,
    /// Remove the checkpoint and its bitmaps.
    DeleteCheckpoint,
    /// Remove libvirt's note of the checkpoint; its bitmaps stay, for the next incremental.
    ForgetCheckpoint,
    /// Remove libvirt's note of the checkpoint that the backup started from; its bitmaps stay.
    ForgetBase,
    /// Remove scratch images, socket and directories.
    RemoveFiles,
}

impl Action {
    /// Whether it leads to a backup that can be read, and not to its end.
    pub fn is_upward(self) -> bool {
        matches!(self, Self::MakeFiles | Self::Redefine | Self::Freeze | Self::Begin)
    }
}

/// How far the way up went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Stage {
    /// Nothing was done.
    #[default]
    New,
    /// The files are there.
    Prepared,
    /// The guest is frozen, or is not going to be.
    Quiesced,
    /// The job runs: the disks can be read.
    Begun,
}

/// What the host may hold. Set before the call that makes it, cleared after the one that removes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Directories, scratch images, the socket.
    pub files: bool,
    /// A freeze.
    pub frozen: bool,
    /// libvirt's job.
    pub job: bool,
    /// libvirt's checkpoint.
    pub checkpoint: bool,
    /// libvirt's note of the checkpoint that the backup starts from.
    #[serde(default)]
    pub base: bool,
}

/// How the backup ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Finalized with every byte read.
    Succeeded,
    /// Anything else.
    Failed(Because),
}

/// How the guest was quiesced.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Quiet {
    /// Not decided yet.
    #[default]
    Unknown,
    /// Frozen at the point in time.
    Frozen,
    /// Not frozen, and why.
    Not(String),
}

/// What a freeze came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Freeze {
    /// The guest is frozen.
    Frozen,
    /// Nobody was asked: there is no guest agent, or the user wants no freeze.
    NotAsked(String),
    /// It failed; the guest may be frozen all the same.
    Failed(String),
}

/// What an action came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// It is done, or was done already.
    Done,
    /// What a freeze came to.
    Froze(Freeze),
    /// It was not done.
    Failed(Because),
}

/// What the world shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The domain has a QEMU on this host.
    pub active: bool,
    /// The job that runs on it is ours.
    pub our_job: bool,
    /// It is another QEMU than the one that the backup was prepared with.
    pub restarted: bool,
}

/// Thaws that fail this often end the trying: ten minutes, at one each ten seconds.
pub const THAW_TRIES: u32 = 60;

/// One backup's life.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// How far the way up went.
    pub stage: Stage,
    /// What the host may hold.
    pub held: Held,
    /// How it ends, once that is known. It never changes.
    pub outcome: Option<Outcome>,
    /// How the guest was quiesced.
    pub quiet: Quiet,
    /// When the job had begun: the point in time.
    pub ready_at: Option<Timestamp>,
    /// When the freeze was asked for, and when the thaw was done.
    pub frozen_at: Option<Timestamp>,
    /// When the thaw was done.
    pub thawed_at: Option<Timestamp>,
    /// How often a thaw failed.
    pub thaw_failures: u32,
    /// Whether it starts from a checkpoint.
    #[serde(default)]
    pub from_base: bool,
    /// Whether libvirt knows that checkpoint, as far as this process made it.
    #[serde(skip)]
    pub based: bool,
    /// What could not be done in this pass, and why: the next pass tries again.
    #[serde(skip)]
    pub deferred: Vec<(Action, Because)>,
    /// The way up was cut off, by the end of a process or a call that did not come back: what was frozen
    /// is thawed first, and then the way up starts again.
    #[serde(skip)]
    pub interrupted: bool,
}

impl Life {
    /// Whether the end has come and nothing is left on the host.
    pub fn is_ended(&self) -> bool {
        self.outcome.is_some() && self.held == Held::default()
    }

    /// Whether the disks can be read.
    pub fn is_serving(&self) -> bool {
        self.stage == Stage::Begun && self.outcome.is_none()
    }

    /// Whether a begin was called that nobody heard the answer of.
    pub fn has_lost_begin(&self) -> bool {
        self.held.job && self.stage < Stage::Begun
    }

    /// The begin took longer than the guest may stay frozen, and the guest was thawed meanwhile: what it wrote at the
    /// point in time is not quiet.
    pub fn thawed_early(&mut self, seconds: i32, required: bool) {
        let why =
            format!("libvirt took longer than {seconds} s to begin, and the guest was thawed meanwhile");
        self.froze(Freeze::Failed(why), required);
    }

    /// The process, or a call, was lost on the way.
    pub fn interrupt(&mut self) {
        self.interrupted = true;
    }

    /// A new pass: what was deferred is tried again.
    pub fn retry(&mut self) {
        self.deferred.clear();
    }

    /// The end, unless it is known already.
    pub fn end(&mut self, outcome: Outcome) {
        self.outcome.get_or_insert(outcome);
    }

    /// The next action, if there is one.
    pub fn next(&self) -> Option<Action> {
        self.wanted().find(|action| self.deferred.iter().all(|(deferred, _)| deferred != action))
    }

    fn wanted(&self) -> impl Iterator<Item = Action> {
        let ending = self.outcome.is_some();
        let thaw = self.held.frozen && (ending || self.interrupted || self.stage == Stage::Begun);
        let mut wanted = Vec::with_capacity(5);
        if thaw {
            wanted.push(Action::Thaw);
        }
        match &self.outcome {
            None if thaw && self.stage < Stage::Begun => {}
            // a begin that nobody heard the answer of, and no job: its checkpoint is in the way of the next
            None if self.held.checkpoint && self.stage < Stage::Begun && !self.held.job => {
                wanted.push(Action::DeleteCheckpoint);
            }
            None => wanted.extend(match self.stage {
                Stage::New => Some(Action::MakeFiles),
                // what a dead process made libvirt know is seen to be whole again
                Stage::Prepared | Stage::Quiesced if self.from_base && !self.based => Some(Action::Redefine),
                Stage::Prepared => Some(Action::Freeze),
                Stage::Quiesced => Some(Action::Begin),
                Stage::Begun => None,
            }),
            Some(outcome) => {
                let checkpoint = match outcome {
                    Outcome::Succeeded => Action::ForgetCheckpoint,
                    Outcome::Failed(_) => Action::DeleteCheckpoint,
                };
                let held = self.held;
                let down = [
                    (held.job, Action::AbortJob),
                    // bitmaps and files only once no job can write them
                    (held.checkpoint && !held.job, checkpoint),
                    (held.base && !held.job, Action::ForgetBase),
                    (held.files && !held.job, Action::RemoveFiles),
                ];
                wanted.extend(down.into_iter().filter(|(held, _)| *held).map(|(_, action)| action));
            }
        }
        wanted.into_iter()
    }

    /// Notes what `action` may leave on the host. Store the record, then make the call.
    pub fn starting(&mut self, action: Action, with_checkpoint: bool, now: Timestamp) {
        match action {
            Action::MakeFiles => self.held.files = true,
            Action::Freeze => {
                self.held.frozen = true;
                self.frozen_at = Some(now);
            }
            Action::Redefine => self.held.base = true,
            Action::Begin => {
                self.held.job = true;
                self.held.checkpoint = with_checkpoint;
            }
            Action::Thaw
            | Action::AbortJob
            | Action::DeleteCheckpoint
            | Action::ForgetCheckpoint
            | Action::ForgetBase
            | Action::RemoveFiles => {}
        }
    }

    /// Takes in what `action` came to. `freeze_required`: the backup fails without a freeze.
    pub fn done(&mut self, action: Action, report: Report, freeze_required: bool, now: Timestamp) {
        match (action, report) {
            (Action::MakeFiles, Report::Done) => self.stage = Stage::Prepared,
            (Action::Redefine, Report::Done) => self.based = true,
            (Action::Freeze, Report::Froze(freeze)) => self.froze(freeze, freeze_required),
            (Action::Begin, Report::Done) => {
                self.stage = Stage::Begun;
                self.ready_at = Some(now);
            }
            (action, Report::Failed(because))
                if action.is_upward() && because.reason.retry() == Retry::Never =>
            {
                self.end(Outcome::Failed(because));
            }
            (Action::Thaw, Report::Done) => self.thawed(now),
            (Action::Thaw, Report::Failed(because)) => {
                self.thaw_failures += 1;
                if self.thaw_failures >= THAW_TRIES {
                    self.held.frozen = false;
                }
                self.deferred.push((Action::Thaw, because));
            }
            (Action::AbortJob, Report::Done) => self.held.job = false,
            (Action::DeleteCheckpoint | Action::ForgetCheckpoint, Report::Done) => {
                self.held.checkpoint = false;
            }
            (Action::ForgetBase, Report::Done) => self.held.base = false,
            (Action::RemoveFiles, Report::Done) => self.held.files = false,
            (action, Report::Failed(because)) => self.deferred.push((action, because)),
            // a report that does not fit its action is a slip of its doer: try again
            (action, Report::Done | Report::Froze(_)) => {
                self.deferred.push((action, Because::new(Reason::FinalizeFailed, "an unfitting report")));
            }
        }
    }

    fn froze(&mut self, freeze: Freeze, required: bool) {
        let why = match freeze {
            Freeze::Frozen => {
                self.stage = Stage::Quiesced;
                self.quiet = Quiet::Frozen;
                return;
            }
            Freeze::NotAsked(why) => {
                self.held.frozen = false;
                self.frozen_at = None;
                why
            }
            Freeze::Failed(why) => why,
        };
        self.quiet = Quiet::Not(why.clone());
        if required {
            self.end(Outcome::Failed(Because::new(Reason::QuiesceFailed, why)));
        } else {
            self.stage = self.stage.max(Stage::Quiesced);
        }
    }

    fn thawed(&mut self, now: Timestamp) {
        self.held.frozen = false;
        self.thaw_failures = 0;
        self.thawed_at = Some(now);
        if self.interrupted {
            self.interrupted = false;
            // the freeze was for a begin that never came: freeze again
            if self.stage == Stage::Quiesced {
                self.stage = Stage::Prepared;
            }
        }
    }

    /// Takes in what the world shows.
    pub fn observe(&mut self, seen: Seen, now: Timestamp) {
        // however soon the VM was started again: the QEMU of this backup is gone
        let lives = seen.active && !seen.restarted;
        if !lives {
            self.held.frozen = false;
            self.held.job = false;
            self.deferred.retain(|(action, _)| *action != Action::Thaw);
        }
        if lives && seen.our_job {
            self.meet_job(now);
        } else if self.outcome.is_none() && self.stage < Stage::Begun {
            self.start_over(lives);
        } else if self.outcome.is_none() && lives {
            let message = "libvirt's backup job ended although nobody asked Virtmark to end it";
            self.end(Outcome::Failed(Because::new(Reason::HypervisorError, message)));
        } else if self.outcome.is_none() {
            let message = "the VM stopped while its backup ran: what was read is of no use";
            self.end(Outcome::Failed(Because::new(Reason::VmStopped, message)));
        }
        self.interrupted &= self.held.frozen;
    }

    /// No job runs, and none was known to: what a lost call may have begun is begun anew.
    fn start_over(&mut self, lives: bool) {
        if self.held.job {
            self.held.job = false;
            self.interrupted = true;
        }
        if !lives {
            // the VM may come back with other disks
            self.stage = Stage::New;
            self.based = false;
        }
    }

    /// A job of ours runs.
    fn meet_job(&mut self, now: Timestamp) {
        let known = self.stage > Stage::New;
        // whoever began it made the files too, and perhaps a checkpoint
        self.held = Held {
            files: true,
            job: true,
            checkpoint: self.held.checkpoint || !known,
            base: self.held.base || (self.from_base && !known),
            ..self.held
        };
        if self.outcome.is_some() || self.stage == Stage::Begun {
            return;
        }
        if known {
            // begun by a process that did not live to hear the answer
            self.stage = Stage::Begun;
            self.ready_at = Some(now);
        } else {
            let message = "its job runs, but this agent's record of it is lost: what was served is not known";
            self.end(Outcome::Failed(Because::new(Reason::HypervisorError, message)));
        }
    }

    /// For how long the guest was frozen, in milliseconds, once it was and is no more.
    pub fn frozen_milliseconds(&self) -> Option<i64> {
        if self.quiet != Quiet::Frozen {
            return None;
        }
        let (from, to) = (self.frozen_at?, self.thawed_at?);
        Some((to.as_millisecond() - from.as_millisecond()).max(0))
    }
}

#[cfg(test)]
mod tests;
