//! What is wanted of an ImageTransfer now: a pure function of its spec, its status and how long nobody used its ticket.
//!
//! ```text
//!            state Paused, or unused and Pause
//!   Open ------------------------------------> Pause
//!    ^  |                                        |
//!    |  +--- state, deletion, unused and Cancel -+--> End
//!    +------- state Running, spec changed -------+
//! ```

use std::time::Duration;

use crate::api::{ImageTransfer, Phase, TimeoutPolicy, TransferState};
use crate::reason::{Because, Reason};

/// Seconds without a request after which an upload ends that says nothing of it: a day. It has no backup that ends.
const UPLOAD_SECONDS: i32 = 86_400;

/// What is wanted of a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The ticket answers.
    Open,
    /// The ticket answers no request for now.
    Pause(Because),
    /// It ends in this phase.
    End(Phase, Because),
}

/// What is wanted. `idle`: for how long the ticket was not used; `None` where there is none yet.
///
/// A transfer that was paused because nobody used it stays so until its spec is changed: only that tells that somebody is there.
pub fn wish(transfer: &ImageTransfer, idle: Option<Duration>) -> Wish {
    let status = transfer.status.as_ref();
    let cancelled = |reason, why: String| Wish::End(Phase::Cancelled, Because::new(reason, why));
    // one that the operator ended while this agent was away is ended here too
    let ended = status.is_some_and(|status| status.phase.is_terminal());
    if ended || transfer.metadata.deletion_timestamp.is_some() {
        return cancelled(Reason::Cancelled, "the user cancelled it".to_owned());
    }
    match transfer.spec.state {
        TransferState::Cancelled => cancelled(Reason::Cancelled, "the user cancelled it".to_owned()),
        TransferState::Finalized => {
            let because = Because::new(Reason::Finalized, "the client says that it is done");
            Wish::End(Phase::Succeeded, because)
        }
        TransferState::Paused => Wish::Pause(Because::new(Reason::Paused, "the user paused it")),
        TransferState::Running => {
            let of_upload = transfer.spec.volume.as_ref().map(|_| UPLOAD_SECONDS);
            let bound = transfer.spec.inactivity_timeout_seconds.or(of_upload);
            let Some(bound) = bound.and_then(|seconds| u64::try_from(seconds).ok()) else {
                return Wish::Open;
            };
            let paused = status.filter(|status| status.phase == Phase::Paused);
            let told =
                paused.is_some_and(|status| status.observed_generation == transfer.metadata.generation);
            // while it was paused nobody could use it: its time begins anew
            let unused = paused.is_none() && idle.is_some_and(|idle| idle >= Duration::from_secs(bound));
            match transfer.spec.timeout_policy {
                TimeoutPolicy::Pause if told || unused => {
                    Wish::Pause(Because::new(Reason::Paused, format!("no request for {bound} s")))
                }
                TimeoutPolicy::Cancel if unused => {
                    cancelled(Reason::TransferInactive, format!("no request for {bound} s"))
                }
                TimeoutPolicy::Cancel | TimeoutPolicy::Pause => Wish::Open,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use serde_json::{Value, json};

    use super::*;
    use crate::clock;

    /// The second generation of a transfer.
    fn transfer(more: &Value, phase: Phase, observed: i64) -> ImageTransfer {
        let mut spec = json!({"backup": "b", "disk": "vda"});
        for (key, value) in more.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        let status = json!({"phase": phase, "observedGeneration": observed});
        serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "ImageTransfer",
            "metadata": {"name": "t", "generation": 2}, "spec": spec, "status": status}))
        .unwrap()
    }

    fn named(wish: &Wish) -> String {
        match wish {
            Wish::Open => "open".to_owned(),
            Wish::Pause(because) => format!("pause {}", because.reason),
            Wish::End(phase, because) => format!("{} {}", phase.as_str(), because.reason),
        }
    }

    #[test]
    fn state_and_time_decide() {
        let pause = json!({"inactivityTimeoutSeconds": 60, "timeoutPolicy": "Pause"});
        let cancel = json!({"inactivityTimeoutSeconds": 60});
        for (spec, phase, observed, idle, wanted) in [
            (json!({}), Phase::Initializing, 2, None, "open"),
            (json!({}), Phase::Ready, 2, Some(9_999), "open"),
            (json!({"state": "Paused"}), Phase::Ready, 1, Some(0), "pause Paused"),
            (json!({"state": "Paused"}), Phase::Paused, 2, Some(9), "pause Paused"),
            (json!({"state": "Running"}), Phase::Paused, 1, Some(9), "open"),
            (json!({"state": "Finalized"}), Phase::Paused, 1, Some(9), "Succeeded Finalized"),
            (json!({"state": "Cancelled"}), Phase::Paused, 1, Some(9), "Cancelled Cancelled"),
            (json!({}), Phase::Failed, 2, None, "Cancelled Cancelled"),
            (cancel.clone(), Phase::Ready, 2, Some(59), "open"),
            (cancel.clone(), Phase::Ready, 2, Some(60), "Cancelled TransferInactive"),
            (cancel.clone(), Phase::Ready, 2, None, "open"),
            // paused by its user, and then not any more: its time begins anew
            (cancel, Phase::Paused, 1, Some(9_999), "open"),
            (pause.clone(), Phase::Ready, 2, Some(59), "open"),
            (pause.clone(), Phase::Ready, 2, Some(60), "pause Paused"),
            // an agent that is new does not know of the time
            (pause.clone(), Phase::Paused, 2, Some(0), "pause Paused"),
            (pause.clone(), Phase::Paused, 2, None, "pause Paused"),
            (pause, Phase::Paused, 1, Some(9_999), "open"),
        ] {
            let transfer = transfer(&spec, phase, observed);
            let found = wish(&transfer, idle.map(Duration::from_secs));
            assert_eq!(named(&found), wanted, "{spec} {phase:?} observed {observed} idle {idle:?}");
        }
    }

    #[test]
    fn what_is_deleted_is_cancelled() {
        let mut going = transfer(&json!({"state": "Paused"}), Phase::Paused, 2);
        going.metadata.deletion_timestamp = Some(Time(clock::now()));
        assert_eq!(named(&wish(&going, None)), "Cancelled Cancelled");
    }
}
