//! The status of a bound ImageTransfer: a pure function of the old one and what was observed.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::api::conditions::{self, Observation};
use crate::api::{ImageTransferStatus, NbdExport, Phase};
use crate::reason::{Because, Reason};

/// Seconds between two writes of progress alone.
pub const PROGRESS_SECONDS: i64 = 5;

/// What a clean host is told with.
const CLEAN: &str = "the ticket is gone from the node";

/// Where a transfer stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is not ready yet: why.
    Waiting(Because),
    /// The bytes can be read.
    Open {
        /// The Secret with the ticket (protocol Imageio).
        secret: Option<String>,
        /// The export (protocol Nbd).
        nbd: Option<NbdExport>,
    },
    /// The bytes cannot be read for now.
    Paused(Because),
    /// It ended.
    Ended(Phase, Because),
}

/// What the status is computed from, beside the old one.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The object's generation.
    pub generation: Option<i64>,
    /// Where it stands.
    pub standing: Standing,
    /// The disk's virtual size in bytes, once known.
    pub size: Option<u64>,
    /// Bytes of the disk that were served so far, as far as this agent sees.
    pub transferred: Option<u64>,
    /// Bytes that must be read, of the whole disk, once known.
    pub required: Option<u64>,
    /// The time.
    pub now: Timestamp,
}

/// The whole status.
pub fn status(old: &ImageTransferStatus, observed: &Observed) -> ImageTransferStatus {
    let mut new = old.clone();
    let seen = Observation { generation: observed.generation, now: observed.now };
    if old.phase.is_terminal() {
        // its end is told already, by the operator while this agent was away: only say that the host is clean now
        if matches!(observed.standing, Standing::Ended(..)) {
            conditions::host_clean(&mut new.conditions, CLEAN, seen);
        }
        return new;
    }
    new.observed_generation = observed.generation;
    let as_i64 = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    new.size = observed.size.map(as_i64).or(new.size);
    if let Some(transferred) = observed.transferred {
        new.transferred_bytes = Some(as_i64(transferred));
        let whole = observed.required.or(observed.size).unwrap_or_default();
        new.progress = Some(percent(transferred, whole));
    }
    let because = match &observed.standing {
        Standing::Waiting(why) => {
            new.phase = Phase::Initializing;
            why.clone()
        }
        Standing::Open { secret, nbd } => {
            new.phase = Phase::Ready;
            new.ticket_secret.clone_from(secret);
            new.nbd.clone_from(nbd);
            match nbd {
                None => Because::new(Reason::TicketReady, "the ticket answers"),
                Some(_) => Because::new(Reason::AwaitingFinalize, "the export answers on the node's socket"),
            }
        }
        Standing::Paused(because) => {
            new.phase = Phase::Paused;
            because.clone()
        }
        Standing::Ended(phase, because) => {
            new.phase = *phase;
            new.nbd = None;
            if new.completion_time.is_none() {
                new.completion_time = Some(Time(conditions::whole_seconds(observed.now)));
            }
            because.clone()
        }
    };
    conditions::one_shot(&mut new.conditions, new.phase, &because, seen);
    if new.phase.is_terminal() {
        conditions::host_clean(&mut new.conditions, CLEAN, seen);
    }
    new
}

/// Whether `new` is worth a write: not when only the progress moved, by less than 1 % or too soon after
/// the last write, `since` seconds ago.
pub fn is_worth_writing(old: &ImageTransferStatus, new: &ImageTransferStatus, since: i64) -> bool {
    let mut without = new.clone();
    without.transferred_bytes = old.transferred_bytes;
    without.progress.clone_from(&old.progress);
    if without != *old {
        return true;
    }
    let moved = new.transferred_bytes.unwrap_or(0) - old.transferred_bytes.unwrap_or(0);
    since >= PROGRESS_SECONDS && moved > 0 && moved >= new.size.unwrap_or(0) / 100
}

fn percent(part: u64, whole: u64) -> String {
    match part.min(whole).checked_mul(100).and_then(|hundred| hundred.checked_div(whole)) {
        Some(percent) => format!("{percent}%"),
        None => "100%".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_was_told_is_not_told_again() {
        let at = Timestamp::from_second(9).unwrap();
        let ended = |because| Observed {
            generation: Some(2),
            standing: Standing::Ended(Phase::Cancelled, because),
            size: Some(1),
            transferred: Some(1),
            required: None,
            now: at,
        };
        let lost = ImageTransferStatus { phase: Phase::Failed, ..ImageTransferStatus::default() };
        let new = status(&lost, &ended(Because::new(Reason::Cancelled, "later")));
        assert!(conditions::is_true(&new.conditions, conditions::HOST_CLEAN));
        assert_eq!(ImageTransferStatus { conditions: vec![], ..new }, lost);
    }

    fn observed(standing: Standing, transferred: u64, now: i64) -> Observed {
        Observed {
            generation: Some(1),
            standing,
            size: Some(1000),
            transferred: Some(transferred),
            required: Some(500),
            now: Timestamp::from_second(now).unwrap(),
        }
    }

    fn open() -> Standing {
        Standing::Open { secret: Some("ticket-u-1".to_owned()), nbd: None }
    }

    #[test]
    fn an_unchanged_transfer_has_an_unchanged_status() {
        let ended = Standing::Ended(Phase::Cancelled, Because::new(Reason::Cancelled, "by the user"));
        for (standing, phase) in [
            (Standing::Waiting(Because::new(Reason::BackupNotReady, "wait")), Phase::Initializing),
            (open(), Phase::Ready),
            (Standing::Paused(Because::new(Reason::Paused, "by the user")), Phase::Paused),
            (ended, Phase::Cancelled),
        ] {
            let first = status(&ImageTransferStatus::default(), &observed(standing.clone(), 5, 1));
            assert_eq!(first.phase, phase);
            assert_eq!(first, status(&first, &observed(standing, 5, 99)));
            assert_eq!(phase.is_terminal(), conditions::is_true(&first.conditions, conditions::HOST_CLEAN));
        }
    }

    #[test]
    fn progress_is_written_seldom() {
        let first = status(&ImageTransferStatus::default(), &observed(open(), 0, 1));
        let at = |bytes| status(&first, &observed(open(), bytes, 2));
        assert_eq!(at(250).progress.as_deref(), Some("50%"), "of what must be read");
        assert!(!is_worth_writing(&first, &at(250), 4), "too soon");
        assert!(is_worth_writing(&first, &at(250), 5));
        assert!(!is_worth_writing(&first, &at(9), 5), "under 1 %");
        let done = status(
            &first,
            &observed(Standing::Ended(Phase::Succeeded, Because::new(Reason::Finalized, "")), 9, 2),
        );
        assert!(is_worth_writing(&first, &done, 0), "an end is told at once");
    }
}
