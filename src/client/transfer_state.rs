//! What is written in an ImageTransfer's spec, when it holds, and transfers as lists: pure. No list but [`ticket`] has a
//! ticket in it.

use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt as _;
use serde_json::json;

use super::exit::Failure;
use super::kubernetes::because;
use super::output::{List, value};
use crate::api::{ImageTransfer, Phase, TransferState, conditions};

/// What is written in `spec.state`, one after the other, until it is `wanted`.
///
/// # Errors
/// When it ended, or is to.
pub fn steps(transfer: &ImageTransfer, wanted: TransferState) -> Result<Vec<TransferState>, Failure> {
    let status = transfer.status.clone().unwrap_or_default();
    let state = transfer.spec.state;
    let ends = |state| matches!(state, TransferState::Finalized | TransferState::Cancelled);
    let is_over = status.phase.is_terminal();
    if wanted == TransferState::Cancelled {
        return match status.phase {
            Phase::Cancelled => Ok(Vec::new()),
            _ if is_over => Err(because("ImageTransfer", &transfer.name_any(), &status.conditions)),
            _ => Ok(vec![wanted]),
        };
    }
    if is_over {
        return Err(because("ImageTransfer", &transfer.name_any(), &status.conditions));
    }
    if ends(state) {
        let words = format!("ImageTransfer {} was asked to end: it goes on no more", transfer.name_any());
        return Err(Failure::Usage(words));
    }
    // one that was paused since nobody used it goes on when its spec changes, and it says Running already
    let is_unused = wanted == TransferState::Running && state == wanted && status.phase == Phase::Paused;
    Ok(if is_unused { vec![TransferState::Paused, TransferState::Running] } else { vec![wanted] })
}

/// Whether what the spec of this generation says holds.
///
/// # Errors
/// When it ended otherwise.
pub fn reached(
    transfer: &ImageTransfer,
    generation: Option<i64>,
    wanted: TransferState,
) -> Result<Option<()>, Failure> {
    let status = transfer.status.clone().unwrap_or_default();
    let phase = status.phase;
    if phase == Phase::Cancelled && wanted == TransferState::Cancelled {
        return Ok(Some(()));
    }
    if phase.is_terminal() {
        return Err(because("ImageTransfer", &transfer.name_any(), &status.conditions));
    }
    let is_told = status.observed_generation >= generation;
    Ok(match wanted {
        TransferState::Paused => is_told && phase == Phase::Paused,
        // one whose backup is not Ready yet will be
        TransferState::Running => is_told && matches!(phase, Phase::Ready | Phase::Initializing),
        TransferState::Finalized | TransferState::Cancelled => false,
    }
    .then_some(()))
}

/// An error where so many seconds are no more than it has.
///
/// # Errors
/// How many it has; when it ended.
pub fn extended(transfer: &ImageTransfer, seconds: i32) -> Result<(), Failure> {
    let name = transfer.name_any();
    let status = transfer.status.clone().unwrap_or_default();
    if status.phase.is_terminal() {
        return Err(because("ImageTransfer", &name, &status.conditions));
    }
    match transfer.spec.inactivity_timeout_seconds {
        Some(now) if seconds > now => Ok(()),
        Some(now) => Err(Failure::Usage(format!(
            "ImageTransfer {name} may go unused for {now} s already: give more --seconds"
        ))),
        None => Err(Failure::Usage(format!(
            "ImageTransfer {name} may go unused for as long as its backup lives (its clientIdleSeconds)"
        ))),
    }
}

const COLUMNS: &[&str] = &[
    "NAME",
    "BACKUP",
    "DISK",
    "PHASE",
    "REASON",
    "PROGRESS",
    "DIRECTION",
    "STATE",
    "UNUSED-SECONDS",
    "POLICY",
    "NODE",
];

fn row(transfer: &ImageTransfer) -> Vec<String> {
    let (spec, status) = (&transfer.spec, transfer.status.clone().unwrap_or_default());
    let ready = conditions::get(&status.conditions, conditions::READY);
    vec![
        transfer.name_any(),
        spec.backup().to_owned(),
        spec.disk().to_owned(),
        status.phase.as_str().to_owned(),
        ready.map(|ready| ready.reason.clone()).unwrap_or_default(),
        status.progress.unwrap_or_default(),
        format!("{:?}", spec.direction),
        format!("{:?}", spec.state),
        spec.inactivity_timeout_seconds.map(|seconds| seconds.to_string()).unwrap_or_default(),
        format!("{:?}", spec.timeout_policy),
        status.node_name.unwrap_or_default(),
    ]
}

/// A transfer.
#[must_use]
pub fn one(transfer: &ImageTransfer) -> List<'static> {
    List { columns: COLUMNS, narrow: 6, rows: vec![row(transfer)], value: value(transfer) }
}

/// Transfers.
#[must_use]
pub fn all_of(transfers: &[ImageTransfer]) -> List<'static> {
    List { columns: COLUMNS, narrow: 6, rows: transfers.iter().map(row).collect(), value: value(&transfers) }
}

/// What is in a ticket's Secret.
#[must_use]
pub fn ticket(name: &str, secret: &Secret) -> List<'static> {
    let text = |key: &str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(key));
        bytes.map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned()).unwrap_or_default()
    };
    let (url, socket) = (text("url"), text("unixSocket"));
    let value = json!({"name": name, "url": url, "unixSocket": socket, "ca": text("ca.crt")});
    List {
        columns: &["NAME", "URL", "SOCKET"],
        narrow: 3,
        rows: vec![vec![name.to_owned(), url, socket]],
        value,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;
    use serde_json::Value;

    use super::super::output::Output;
    use super::*;

    fn transfer(spec: &Value, phase: Phase, observed: i64) -> ImageTransfer {
        let mut all = json!({"backup": "b", "disk": "vda"});
        for (key, value) in spec.as_object().into_iter().flatten() {
            all[key] = value.clone();
        }
        let ready = json!({"type": "Ready", "status": "False", "reason": "TransferInactive", "message": "no request",
            "lastTransitionTime": "2026-11-30T00:00:00Z"});
        let status = json!({"phase": phase, "observedGeneration": observed, "conditions": [ready],
            "progress": "42%", "ticketSecret": "ticket-1-1"});
        serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "ImageTransfer",
            "metadata": {"name": "t", "generation": 2}, "spec": all, "status": status}))
        .unwrap()
    }

    #[test]
    fn what_is_written_until_it_is_so() {
        use TransferState::{Cancelled, Paused, Running};
        let none = json!({});
        let paused = json!({"state": "Paused"});
        let cancelled = json!({"state": "Cancelled"});
        for (spec, phase, wanted, steps) in [
            (&none, Phase::Ready, Paused, Some(vec![Paused])),
            (&none, Phase::Ready, Running, Some(vec![Running])),
            (&paused, Phase::Paused, Running, Some(vec![Running])),
            // nobody used it, and it says Running still
            (&none, Phase::Paused, Running, Some(vec![Paused, Running])),
            (&none, Phase::Initializing, Cancelled, Some(vec![Cancelled])),
            (&cancelled, Phase::Ready, Cancelled, Some(vec![Cancelled])),
            (&cancelled, Phase::Cancelled, Cancelled, Some(vec![])),
            (&cancelled, Phase::Ready, Running, None),
            (&none, Phase::Succeeded, Paused, None),
            (&none, Phase::Failed, Cancelled, None),
        ] {
            let found = super::steps(&transfer(spec, phase, 2), wanted);
            assert_eq!(found.ok(), steps, "{spec} {phase:?} {wanted:?}");
        }
    }

    #[test]
    fn only_what_answers_the_new_spec_counts() {
        use TransferState::{Cancelled, Paused, Running};
        let none = json!({});
        for (phase, observed, wanted, holds) in [
            (Phase::Paused, 2, Paused, Some(true)),
            (Phase::Paused, 1, Paused, Some(false)),
            (Phase::Ready, 2, Paused, Some(false)),
            (Phase::Ready, 1, Running, Some(false)),
            (Phase::Ready, 3, Running, Some(true)),
            (Phase::Cancelled, 1, Cancelled, Some(true)),
            (Phase::Ready, 2, Cancelled, Some(false)),
            (Phase::Failed, 2, Running, None),
            (Phase::Succeeded, 2, Cancelled, None),
        ] {
            let found = reached(&transfer(&none, phase, observed), Some(2), wanted);
            assert_eq!(found.ok().map(|found| found.is_some()), holds, "{phase:?} {observed} {wanted:?}");
        }
        let ended = reached(&transfer(&none, Phase::Failed, 2), Some(2), Running).unwrap_err();
        assert_eq!(ended.to_string(), "ImageTransfer t: TransferInactive: no request");
    }

    #[test]
    fn more_time_is_more() {
        let has = json!({"inactivityTimeoutSeconds": 60});
        for (spec, phase, seconds, words) in [
            (&has, Phase::Ready, 61, None),
            (&has, Phase::Paused, 61, None),
            (&has, Phase::Ready, 60, Some("for 60 s already")),
            (&json!({}), Phase::Ready, 60, Some("as long as its backup lives")),
            (&has, Phase::Cancelled, 61, Some("TransferInactive")),
        ] {
            let said = extended(&transfer(spec, phase, 2), seconds).err().map(|failure| failure.to_string());
            assert_eq!(said.is_some(), words.is_some(), "{said:?}");
            assert!(said.unwrap_or_default().contains(words.unwrap_or_default()));
        }
    }

    #[test]
    fn a_ticket_is_in_its_own_list_only() {
        let data = [("url", "https://n:1/images/secret"), ("unixSocket", "/s"), ("ca.crt", "PEM")];
        let data = data.map(|(key, text)| (key.to_owned(), ByteString(text.as_bytes().to_vec())));
        let secret = Secret { data: Some(data.into()), ..Secret::default() };
        let list = ticket("t", &secret);
        assert_eq!(
            list.text(Output::Table),
            "NAME   URL                         SOCKET\nt      https://n:1/images/secret   /s\n"
        );
        assert_eq!(list.value["ca"], "PEM");
        let shown = transfer(&json!({}), Phase::Ready, 2);
        for output in [Output::Table, Output::Wide, Output::Json, Output::Yaml, Output::Name] {
            let text = one(&shown).text(output);
            assert!(!text.contains("secret/") && !text.contains("https"), "{text}");
            assert!(all_of(std::slice::from_ref(&shown)).text(output).contains('t'));
        }
        assert!(
            one(&shown)
                .text(Output::Table)
                .ends_with("t      b        vda    Ready   TransferInactive   42%\n")
        );
    }
}
