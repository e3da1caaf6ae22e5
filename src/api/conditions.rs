//! Conditions as pure values: set one, read one. The transition time moves only when the status does, so
//! that an unchanged world computes an unchanged status.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use super::Phase;
use crate::reason::Because;

/// The disks can be read, or the object ended well.
pub const READY: &str = "Ready";
/// The object is on its way; kstatus answers InProgress while it is True.
pub const RECONCILING: &str = "Reconciling";
/// The object failed for good; kstatus answers Failed while it is True.
pub const STALLED: &str = "Stalled";
/// The outcome of a one-shot object; Unknown while it runs.
pub const SUCCEEDED: &str = "Succeeded";
/// Nothing of the object is left on its node: its finalizer may go.
pub const HOST_CLEAN: &str = "HostClean";
/// The guest's file systems were frozen at the point in time.
pub const QUIESCED: &str = "Quiesced";
/// An incremental backup can start from the checkpoint.
pub const USABLE: &str = "Usable";

/// The three values of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Not known yet.
    Unknown,
}

impl Truth {
    /// As Kubernetes writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// Sets the condition `kind`. Keeps the transition time unless its status changes.
pub fn set(
    conditions: &mut Vec<Condition>,
    kind: &str,
    truth: Truth,
    reason: &str,
    message: &str,
    generation: Option<i64>,
    now: Timestamp,
) {
    let status = truth.as_str();
    let since = conditions
        .iter()
        .find(|c| c.type_ == kind && c.status == status)
        .map_or_else(|| Time(whole_seconds(now)), |c| c.last_transition_time.clone());
    let condition = Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.chars().take(1024).collect(),
        observed_generation: generation,
        last_transition_time: since,
    };
    match conditions.iter_mut().find(|c| c.type_ == kind) {
        Some(old) => *old = condition,
        None => conditions.push(condition),
    }
}

/// Whether the condition `kind` is True.
pub fn is_true(conditions: &[Condition], kind: &str) -> bool {
    conditions.iter().any(|c| c.type_ == kind && c.status == "True")
}

/// The condition `kind`, if it is there.
pub fn get<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.type_ == kind)
}

/// Kubernetes stores whole seconds: what is finer would differ after a round trip.
pub fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

/// When and for which generation something was observed.
#[derive(Clone, Copy, Debug)]
pub struct Observation {
    /// The object's generation.
    pub generation: Option<i64>,
    /// The time.
    pub now: Timestamp,
}

/// How an object stands: what Ready, Reconciling and Stalled, which every kind has, say together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing can be used yet.
    OnItsWay,
    /// It can be used, and is not done.
    InUse,
    /// As it should be.
    Good,
    /// It stays as it is until somebody outside does something, and no time runs: a VM that is off.
    Idle,
    /// Failed for good.
    Stuck,
}

impl Standing {
    /// Of an object that is done when it succeeded.
    fn of_one_shot(phase: Phase) -> Self {
        match phase {
            Phase::Initializing | Phase::Finalizing | Phase::Paused => Self::OnItsWay,
            Phase::Ready => Self::InUse,
            Phase::Succeeded => Self::Good,
            Phase::Failed | Phase::Cancelled => Self::Stuck,
        }
    }

    /// Of an object that is there to stay.
    fn of_lasting(phase: Phase) -> Self {
        match phase {
            Phase::Ready => Self::Good,
            phase => Self::of_one_shot(phase),
        }
    }
}

/// Sets Ready, Reconciling and Stalled.
pub fn stand(
    conditions: &mut Vec<Condition>,
    standing: Standing,
    reason: &str,
    message: &str,
    seen: Observation,
) {
    for (kind, holds) in [
        (READY, matches!(standing, Standing::Good | Standing::InUse)),
        (RECONCILING, matches!(standing, Standing::OnItsWay | Standing::InUse)),
        (STALLED, standing == Standing::Stuck),
    ] {
        let truth = if holds { Truth::True } else { Truth::False };
        set(conditions, kind, truth, reason, message, seen.generation, seen.now);
    }
}

/// The conditions of an object that is there to stay, which follow from its phase.
pub fn lasting(conditions: &mut Vec<Condition>, phase: Phase, because: &Because, seen: Observation) {
    stand(conditions, Standing::of_lasting(phase), because.reason.as_str(), &because.shown(), seen);
}

/// The four conditions of a one-shot object, which follow from its phase: Ready while it can be read and
/// after success, Reconciling until its end, Stalled when it ended otherwise, Succeeded once it did.
pub fn one_shot(conditions: &mut Vec<Condition>, phase: Phase, because: &Because, seen: Observation) {
    let (reason, message) = (because.reason.as_str(), because.shown());
    stand(conditions, Standing::of_one_shot(phase), reason, &message, seen);
    let succeeded = match phase {
        Phase::Succeeded => Truth::True,
        Phase::Failed | Phase::Cancelled => Truth::False,
        _ => Truth::Unknown,
    };
    set(conditions, SUCCEEDED, succeeded, reason, &message, seen.generation, seen.now);
}

/// The spec of an object that has ended was changed: what is said of it holds for the new one too.
pub fn reaffirm(conditions: &mut [Condition], generation: Option<i64>) {
    for condition in conditions {
        condition.observed_generation = generation;
    }
}

/// Says that nothing of the object is left on a host.
pub fn host_clean(conditions: &mut Vec<Condition>, message: &str, seen: Observation) {
    set(conditions, HOST_CLEAN, Truth::True, "Cleaned", message, seen.generation, seen.now);
}
