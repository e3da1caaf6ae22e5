//! What the user's wish, the clock and the coverage make of a backup's life. Pure: `now` is an argument.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::life::{Life, Outcome, Stage};
use crate::api::{DesiredState, DomainState, OfflinePolicy, VmBackupSpec};
use crate::reason::{Because, Reason};

/// What was gathered for the decision.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The object is being deleted.
    pub deleting: bool,
    /// When the object was created.
    pub created: Timestamp,
    /// The domain's state here; `None` when this libvirt does not know it.
    pub domain: Option<DomainState>,
    /// Disks that a block job holds.
    pub block_jobs: &'a [String],
    /// A backup job of somebody else runs on the domain.
    pub foreign_job: bool,
    /// Per disk, bytes that must be read and were not; known only once finalize was asked for.
    pub missing: Option<&'a [(String, u64)]>,
    /// When a client last asked for something, or the backup became Ready.
    pub last_request: Timestamp,
    /// The time.
    pub now: Timestamp,
}

/// How the backup must end now, if it must.
pub fn ending(spec: &VmBackupSpec, life: &Life, facts: &Facts<'_>) -> Option<Outcome> {
    let failed = |reason, message: String| Some(Outcome::Failed(Because::new(reason, message)));
    if facts.deleting {
        return failed(Reason::Deleted, "the VmBackup was deleted".to_owned());
    }
    if spec.state == DesiredState::Cancelled {
        return failed(Reason::Cancelled, "the user cancelled it".to_owned());
    }
    let Some(ready_at) = life.ready_at.filter(|_| life.stage == Stage::Begun) else {
        if facts.now >= deadline(facts.created, spec.start_deadline_seconds) {
            let why = hold(spec, life, facts).map(|because| format!(", last because of {because}"));
            let message =
                format!("not Ready within {} s{}", spec.start_deadline_seconds, why.unwrap_or_default());
            return failed(Reason::StartDeadlineExceeded, message);
        }
        if facts.domain == Some(DomainState::Off) && spec.offline == OfflinePolicy::Refuse {
            return failed(Reason::VmNotRunning, "the VM is off, and offline is Refuse".to_owned());
        }
        return None;
    };
    if spec.state == DesiredState::Finalized
        && facts.missing.is_some_and(|m| m.iter().all(|(_, bytes)| *bytes == 0))
    {
        return Some(Outcome::Succeeded);
    }
    if facts.now >= deadline(ready_at, spec.ready_deadline_seconds) {
        let unread = facts.missing.map(incomplete).map(|what| format!("; still unread: {what}"));
        let message =
            format!("not finalized within {} s{}", spec.ready_deadline_seconds, unread.unwrap_or_default());
        return failed(Reason::ReadyDeadlineExceeded, message);
    }
    if facts.now >= deadline(facts.last_request, spec.client_idle_seconds) {
        let message = format!("no client asked for anything for {} s", spec.client_idle_seconds);
        return failed(Reason::ClientIdle, message);
    }
    None
}

/// Why nothing may be begun on the host yet.
pub fn hold(spec: &VmBackupSpec, life: &Life, facts: &Facts<'_>) -> Option<Because> {
    if life.stage >= Stage::Quiesced || life.outcome.is_some() {
        return None;
    }
    let because = |reason, message: &str| Some(Because::new(reason, message));
    match facts.domain {
        None => return because(Reason::VmBusy, "the VM is not on this node at the moment"),
        Some(DomainState::Running | DomainState::Paused) => {}
        Some(DomainState::Busy) => {
            return because(Reason::VmBusy, "the VM is starting, stopping, migrating or paused by an error");
        }
        Some(DomainState::Off | DomainState::Missing | DomainState::NodeLost) => {
            let wait = Reason::VmNotRunning;
            return (spec.offline == OfflinePolicy::Wait).then(|| Because::new(wait, "the VM is off"));
        }
    }
    if facts.foreign_job {
        return because(
            Reason::BackupAlreadyRunning,
            "a backup job that is not Virtmark's runs on the VM (virsh domjobinfo shows it)",
        );
    }
    if let Some(disk) = facts.block_jobs.first() {
        return Some(Because::new(Reason::DisksLocked, format!("a block job runs on disk {disk}")));
    }
    None
}

/// `vda: 65536 bytes, vdb: 1 bytes`.
pub fn incomplete(missing: &[(String, u64)]) -> String {
    let unread = missing.iter().filter(|(_, bytes)| *bytes > 0);
    unread.map(|(disk, bytes)| format!("{disk}: {bytes} bytes")).collect::<Vec<_>>().join(", ")
}

/// When to look again although nothing happened.
pub fn next_due(spec: &VmBackupSpec, life: &Life, facts: &Facts<'_>) -> Option<Timestamp> {
    if life.outcome.is_some() {
        return None;
    }
    match life.ready_at {
        None => Some(deadline(facts.created, spec.start_deadline_seconds)),
        Some(ready_at) => {
            let ready = deadline(ready_at, spec.ready_deadline_seconds);
            Some(ready.min(deadline(facts.last_request, spec.client_idle_seconds)))
        }
    }
}

fn deadline(from: Timestamp, seconds: i32) -> Timestamp {
    from.checked_add(SignedDuration::from_secs(seconds.into())).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn spec(json: &str) -> VmBackupSpec {
        let mut value = serde_json::json!({"vm": "db01", "startDeadlineSeconds": 100, "readyDeadlineSeconds": 1000,
            "clientIdleSeconds": 50});
        let extra: serde_json::Value = serde_json::from_str(json).unwrap();
        for (key, field) in extra.as_object().unwrap() {
            value[key] = field.clone();
        }
        serde_json::from_value(value).unwrap()
    }

    fn ready() -> Life {
        Life { stage: Stage::Begun, ready_at: Some(at(10)), ..Life::default() }
    }

    fn facts(now: i64) -> Facts<'static> {
        Facts {
            deleting: false,
            created: at(0),
            domain: Some(DomainState::Running),
            block_jobs: &[],
            foreign_job: false,
            missing: None,
            last_request: at(10),
            now: at(now),
        }
    }

    fn ends(spec_json: &str, life: &Life, facts: &Facts<'_>) -> Option<String> {
        ending(&spec(spec_json), life, facts).map(|outcome| match outcome {
            Outcome::Succeeded => "Succeeded".to_owned(),
            Outcome::Failed(because) => because.reason.to_string(),
        })
    }

    #[test]
    fn ends_when_it_must_and_no_sooner() {
        let whole = [("vda".to_owned(), 0)];
        let part = [("vda".to_owned(), 0), ("vdb".to_owned(), 7)];
        let (new, up) = (Life::default(), ready());
        let off = Facts { domain: Some(DomainState::Off), ..facts(11) };
        let table: &[(&str, &str, &Life, Facts<'_>, Option<&str>)] = &[
            ("nothing happens", "{}", &new, facts(99), None),
            ("too late to start", "{}", &new, facts(100), Some("StartDeadlineExceeded")),
            ("a ready one has no start deadline", r#"{"clientIdleSeconds":999}"#, &up, facts(500), None),
            ("cancelled", r#"{"state":"Cancelled"}"#, &new, facts(1), Some("Cancelled")),
            ("cancelled when ready", r#"{"state":"Cancelled"}"#, &up, facts(11), Some("Cancelled")),
            ("deleted", "{}", &up, Facts { deleting: true, ..facts(11) }, Some("Deleted")),
            ("finalized early is no end", r#"{"state":"Finalized"}"#, &new, facts(11), None),
            ("finalized, unknown coverage", r#"{"state":"Finalized"}"#, &up, facts(11), None),
            (
                "finalized, unread",
                r#"{"state":"Finalized"}"#,
                &up,
                Facts { missing: Some(&part), ..facts(11) },
                None,
            ),
            (
                "finalized, read",
                r#"{"state":"Finalized"}"#,
                &up,
                Facts { missing: Some(&whole), ..facts(11) },
                Some("Succeeded"),
            ),
            ("read, not finalized", "{}", &up, Facts { missing: Some(&whole), ..facts(11) }, None),
            ("idle", "{}", &up, facts(60), Some("ClientIdle")),
            ("not idle", "{}", &up, Facts { last_request: at(11), ..facts(60) }, None),
            (
                "not finalized in time",
                "{}",
                &up,
                Facts { last_request: at(1009), ..facts(1010) },
                Some("ReadyDeadlineExceeded"),
            ),
            ("off, refused", r#"{"offline":"Refuse"}"#, &new, off.clone(), Some("VmNotRunning")),
            ("off, waits", "{}", &new, off, None),
        ];
        for (what, json, life, facts, expected) in table {
            assert_eq!(ends(json, life, facts).as_deref(), *expected, "{what}");
        }
    }

    #[test]
    fn waits_while_the_vm_cannot_be_backed_up() {
        let jobs = ["vdb".to_owned()];
        let cases = [
            (facts(1), None),
            (Facts { domain: Some(DomainState::Paused), ..facts(1) }, None),
            (Facts { domain: None, ..facts(1) }, Some(Reason::VmBusy)),
            (Facts { domain: Some(DomainState::Busy), ..facts(1) }, Some(Reason::VmBusy)),
            (Facts { domain: Some(DomainState::Off), ..facts(1) }, Some(Reason::VmNotRunning)),
            (Facts { foreign_job: true, ..facts(1) }, Some(Reason::BackupAlreadyRunning)),
            (Facts { block_jobs: &jobs, ..facts(1) }, Some(Reason::DisksLocked)),
        ];
        for (facts, expected) in cases {
            let held = hold(&spec("{}"), &Life::default(), &facts).map(|because| because.reason);
            assert_eq!(held, expected, "{facts:?}");
            assert_eq!(hold(&spec("{}"), &ready(), &facts), None, "a job that runs is not held");
        }
    }

    #[test]
    fn looks_again_at_the_earliest_deadline() {
        assert_eq!(next_due(&spec("{}"), &Life::default(), &facts(1)), Some(at(100)));
        assert_eq!(next_due(&spec("{}"), &ready(), &facts(11)), Some(at(60)));
        let long = spec(r#"{"clientIdleSeconds":5000}"#);
        assert_eq!(next_due(&long, &ready(), &facts(11)), Some(at(1010)));
    }
}
