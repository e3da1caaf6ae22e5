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

/// The four conditions of a one-shot object, which follow from its phase: Ready while it can be read and
/// after success, Reconciling until its end, Stalled when it ended otherwise, Succeeded once it did.
pub fn one_shot(conditions: &mut Vec<Condition>, phase: Phase, because: &Because, seen: Observation) {
    let truth = |holds: bool| if holds { Truth::True } else { Truth::False };
    let ended_otherwise = matches!(phase, Phase::Failed | Phase::Cancelled);
    let succeeded = match phase {
        Phase::Succeeded => Truth::True,
        _ if ended_otherwise => Truth::False,
        _ => Truth::Unknown,
    };
    let (reason, message) = (because.reason.as_str(), because.shown());
    for (kind, truth) in [
        (READY, truth(matches!(phase, Phase::Ready | Phase::Succeeded))),
        (RECONCILING, truth(!phase.is_terminal())),
        (STALLED, truth(ended_otherwise)),
        (SUCCEEDED, succeeded),
    ] {
        set(conditions, kind, truth, reason, &message, seen.generation, seen.now);
    }
}

/// Says that nothing of the object is left on a host.
pub fn host_clean(conditions: &mut Vec<Condition>, message: &str, seen: Observation) {
    set(conditions, HOST_CLEAN, Truth::True, "Cleaned", message, seen.generation, seen.now);
}
