//! The status of a bound VmBackup: a pure function of the old one, its record and what was observed.
//!
//! `status(status(x)) == status(x)`: what does not change the world's description writes nothing.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::decide::incomplete;
use super::life::{Action, Life, Outcome, Quiet, Stage};
use crate::agent::state::Record;
use crate::api::conditions::{self, Observation, Truth};
use crate::api::{BackupDisk, DesiredState, DiskMode, NbdExport, Phase, VmBackupStatus};
use crate::reason::{Because, Reason};

/// What the status is computed from, beside the old one.
#[derive(Clone, Debug)]
pub struct Observed<'a> {
    /// The object's generation.
    pub generation: Option<i64>,
    /// What the user wants.
    pub wish: DesiredState,
    /// The backup on its host.
    pub record: &'a Record,
    /// Path of the NBD socket.
    pub socket: &'a str,
    /// Why nothing may be begun yet.
    pub hold: Option<&'a Because>,
    /// Per disk, bytes that must be read and were not, as far as known.
    pub missing: &'a [(String, u64)],
    /// It was finalized, and nothing is missing.
    pub is_read: bool,
    /// The time.
    pub now: Timestamp,
}

/// The phase that a life has come to.
pub fn phase(life: &Life) -> Phase {
    match &life.outcome {
        Some(_) if !life.is_ended() => Phase::Finalizing,
        Some(Outcome::Succeeded) => Phase::Succeeded,
        Some(Outcome::Failed(_)) => Phase::Failed,
        None if life.stage == Stage::Begun => Phase::Ready,
        None => Phase::Initializing,
    }
}

/// What the Ready condition says.
fn ready_because(observed: &Observed<'_>, phase: Phase) -> Because {
    let life = &observed.record.life;
    match (phase, &life.outcome) {
        (Phase::Finalizing, _) => match life.deferred.first() {
            Some((Action::Thaw, why)) => Because::new(Reason::GuestMayBeFrozen, why.message.clone()),
            Some((_, why)) => Because::new(Reason::FinalizeFailed, why.message.clone()),
            None => Because::new(Reason::Finalizing, "cleaning the host"),
        },
        (_, Some(Outcome::Failed(because))) => because.clone(),
        (_, Some(Outcome::Succeeded)) => {
            Because::new(Reason::Finalized, "every byte that had to be read was read")
        }
        (Phase::Ready, None)
            if let Some((_, why)) = life.deferred.iter().find(|(a, _)| *a == Action::Thaw) =>
        {
            Because::new(Reason::GuestMayBeFrozen, why.message.clone())
        }
        (Phase::Ready, None) if observed.wish == DesiredState::Finalized => {
            let unread = incomplete(observed.missing);
            let message = match unread.as_str() {
                "" if observed.is_read => {
                    "finalized, and all is read that must be: a client's request is not answered \
                    yet; finalizing its ImageTransfer cuts it off"
                        .to_owned()
                }
                "" => "finalized: what was read is not stored yet, and cannot be counted".to_owned(),
                unread => format!("finalized, but not yet read: {unread}"),
            };
            Because::new(Reason::TransfersIncomplete, message)
        }
        (Phase::Ready, None) => Because::new(Reason::AwaitingFinalize, "the disks can be read"),
        _ => observed
            .hold
            .cloned()
            .unwrap_or_else(|| Because::new(Reason::Bound, "the agent prepares the backup on its host")),
    }
}

/// The whole status.
pub fn status(old: &VmBackupStatus, observed: &Observed<'_>) -> VmBackupStatus {
    let record = observed.record;
    let life = &record.life;
    let phase = phase(life);
    let mut new = old.clone();
    new.observed_generation = observed.generation;
    new.phase = phase;
    new.ready_time =
        old.ready_time.clone().or_else(|| life.ready_at.map(|at| Time(conditions::whole_seconds(at))));
    new.frozen_milliseconds = life.frozen_milliseconds();
    if phase.is_terminal() && new.completion_time.is_none() {
        new.completion_time = Some(Time(conditions::whole_seconds(observed.now)));
    }
    new.disks = record.disks.iter().map(|disk| one_disk(disk, observed, phase)).collect();
    if life.ready_at.is_some() {
        let read = observed.missing.iter().filter(|(_, bytes)| *bytes == 0).count();
        new.progress = Some(format!("{read}/{}", record.disks.len()));
    }

    let because = ready_because(observed, phase);
    let seen = Observation { generation: observed.generation, now: observed.now };
    conditions::one_shot(&mut new.conditions, phase, &because, seen);
    let quiet = match &life.quiet {
        Quiet::Unknown => None,
        Quiet::Frozen => {
            Some((Truth::True, "Frozen", "the guest's file systems were frozen at the point in time"))
        }
        Quiet::Not(why) => Some((Truth::False, "NotFrozen", why.as_str())),
    };
    if let Some((truth, reason, message)) = quiet {
        let (kind, generation) = (conditions::QUIESCED, observed.generation);
        conditions::set(&mut new.conditions, kind, truth, reason, message, generation, observed.now);
    }
    if phase.is_terminal() {
        conditions::host_clean(&mut new.conditions, "nothing of this backup is left on the node", seen);
    }
    new
}

fn one_disk(disk: &crate::agent::state::PlannedDisk, observed: &Observed<'_>, phase: Phase) -> BackupDisk {
    let missing = observed.missing.iter().find(|(target, _)| *target == disk.target).map(|(_, bytes)| *bytes);
    let export = NbdExport {
        socket: observed.socket.to_owned(),
        export: disk.target.clone(),
        changed_from: disk.changed_from.and_then(|from| i64::try_from(from).ok()),
    };
    BackupDisk {
        name: disk.target.clone(),
        mode: if disk.incremental { DiskMode::Incremental } else { DiskMode::Full },
        mode_reason: disk.full_because.as_ref().map(|(reason, _)| *reason),
        mode_message: disk.full_because.as_ref().and_then(|(_, message)| message.clone()),
        size: (disk.size > 0).then(|| i64::try_from(disk.size).unwrap_or(i64::MAX)),
        in_checkpoint: disk.in_checkpoint,
        missing_bytes: missing.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
        nbd: (phase == Phase::Ready).then_some(export),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::backup::decide::is_read;
    use crate::agent::backup::life::Held;
    use crate::agent::state::PlannedDisk;
    use crate::api::QuiesceMode;

    fn record(life: Life) -> Record {
        let disk = |target: &str, in_checkpoint| PlannedDisk {
            target: target.to_owned(),
            size: 1 << 20,
            image: None,
            in_checkpoint,
            incremental: false,
            full_because: None,
            changed_from: None,
            mark: None,
        };
        Record {
            uid: "u".into(),
            namespace: "n".into(),
            name: "b".into(),
            vm: "v".into(),
            vm_uuid: "w".into(),
            bitmap: Some("m".into()),
            base: None,
            disks: vec![disk("vda", true), disk("vdb", false)],
            all_disks: false,
            marked: false,
            qemu: None,
            quiesce: QuiesceMode::BestEffort,
            quiesce_seconds: 10,
            life,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn seen(
        old: &VmBackupStatus,
        life: Life,
        wish: DesiredState,
        missing: &[(String, u64)],
        now: i64,
    ) -> VmBackupStatus {
        let record = record(life);
        let observed = Observed {
            generation: Some(1),
            wish,
            record: &record,
            socket: "/s",
            hold: None,
            missing,
            is_read: !missing.is_empty() && is_read(missing),
            now: at(now),
        };
        status(old, &observed)
    }

    fn ready_reason(status: &VmBackupStatus) -> (String, String) {
        let ready = conditions::get(&status.conditions, conditions::READY).unwrap();
        (ready.status.clone(), ready.reason.clone())
    }

    #[test]
    fn a_finalize_that_waits_says_for_what() {
        let begun = Life { stage: Stage::Begun, ready_at: Some(at(5)), ..Life::default() };
        let (part, whole) = ([("vda".to_owned(), 0), ("vdb".to_owned(), 4)], [("vda".to_owned(), 0)]);
        for (missing, words) in [
            (&part[..], "not yet read: vdb: 4 bytes"),
            (&whole[..], "a client's request"),
            (&[], "cannot be counted"),
        ] {
            let old = VmBackupStatus::default();
            let status = seen(&old, begun.clone(), DesiredState::Finalized, missing, 7);
            let ready = conditions::get(&status.conditions, conditions::READY).unwrap();
            assert!(ready.message.contains(words), "{}", ready.message);
        }
    }

    #[test]
    fn says_what_is_so_and_says_it_once() {
        let begun = Life { stage: Stage::Begun, ready_at: Some(at(5)), ..Life::default() };
        let ending = |outcome, job| Life {
            outcome: Some(outcome),
            held: Held { job, ..Held::default() },
            ..begun.clone()
        };
        let stopped = Outcome::Failed(Because::new(Reason::VmStopped, "gone"));
        let unread = [("vda".to_owned(), 0), ("vdb".to_owned(), 4)];
        let running = DesiredState::Running;
        let cases = [
            (Life::default(), running, Phase::Initializing, "False", "Bound"),
            (begun.clone(), running, Phase::Ready, "True", "AwaitingFinalize"),
            (begun.clone(), DesiredState::Finalized, Phase::Ready, "True", "TransfersIncomplete"),
            (ending(Outcome::Succeeded, true), running, Phase::Finalizing, "False", "Finalizing"),
            (ending(Outcome::Succeeded, false), running, Phase::Succeeded, "True", "Finalized"),
            (ending(stopped.clone(), true), running, Phase::Finalizing, "False", "Finalizing"),
            (ending(stopped, false), running, Phase::Failed, "False", "VmStopped"),
        ];
        for (life, wish, phase, truth, reason) in cases {
            let first = seen(&VmBackupStatus::default(), life.clone(), wish, &unread, 7);
            assert_eq!(first.phase, phase);
            assert_eq!(ready_reason(&first), (truth.to_owned(), reason.to_owned()));
            let again = seen(&first, life, wish, &unread, 900);
            assert_eq!(first, again, "an unchanged world is described in the same words, times included");
            assert_eq!(phase.is_terminal(), conditions::is_true(&first.conditions, conditions::HOST_CLEAN));
            assert_eq!(!phase.is_terminal(), conditions::is_true(&first.conditions, conditions::RECONCILING));
            assert_eq!(phase == Phase::Failed, conditions::is_true(&first.conditions, conditions::STALLED));
        }
    }

    #[test]
    fn incomplete_transfers_name_disk_and_bytes() {
        let begun = Life { stage: Stage::Begun, ready_at: Some(at(5)), ..Life::default() };
        let unread = [("vda".to_owned(), 0), ("vdb".to_owned(), 4)];
        let status = seen(&VmBackupStatus::default(), begun, DesiredState::Finalized, &unread, 7);
        let ready = conditions::get(&status.conditions, conditions::READY).unwrap();
        assert!(ready.message.contains("vdb: 4 bytes"), "{}", ready.message);
        assert_eq!(status.progress.as_deref(), Some("1/2"));
    }
}
