//! What the user's wish, the clock and the coverage make of a backup's life. Pure: `now` is an argument.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::life::{Life, Outcome, Stage};
use super::scratch;
use crate::api::{DesiredState, DomainState, OfflinePolicy, VmBackupSpec};
use crate::reason::{Because, Reason};

/// A VM that this libvirt does not know for so long, and that runs nowhere else, is not on its way anywhere.
const ABSENT: SignedDuration = SignedDuration::from_secs(10);

/// What was gathered for the decision.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The object is being deleted.
    pub deleting: bool,
    /// When the object was created.
    pub created: Timestamp,
    /// The domain's state here; `None` when this libvirt does not know it.
    pub domain: Option<DomainState>,
    /// Since when this libvirt does not know it.
    pub absent_since: Option<Timestamp>,
    /// The other node where the domain runs.
    pub elsewhere: Option<&'a str>,
    /// This node still tells that it runs here.
    pub told_here: bool,
    /// Bytes that scratch images may take yet, before any is made.
    pub room: Option<u64>,
    /// Bytes of scratch space that the backup is expected to need.
    pub need: u64,
    /// Why it must end for want of scratch space.
    pub exhausted: Option<&'a Because>,
    /// Since when the node is cordoned.
    pub cordoned_since: Option<Timestamp>,
    /// How long a backup may go on after that.
    pub drain_grace: SignedDuration,
    /// Disks that a block job holds.
    pub block_jobs: &'a [String],
    /// The other VmBackup that works on the domain, if one does.
    pub rival: Option<&'a str>,
    /// A backup job of somebody else runs on the domain.
    pub foreign_job: bool,
    /// Another job than a backup's runs on the domain.
    pub other_job: bool,
    /// libvirt holds the domain for a job that it lost track of.
    pub lost_job: bool,
    /// Per disk, bytes that must be read and were not; known only once finalize was asked for.
    pub missing: Option<&'a [(String, u64)]>,
    /// A client's request is being answered.
    pub reading: bool,
    /// When a client last asked for something, or the backup became Ready.
    pub last_request: Timestamp,
    /// The time.
    pub now: Timestamp,
}

/// What holds a domain, that no backup can begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// A job that runs: a migration, a save.
    Runs,
    /// A job that libvirt lost track of.
    Lost,
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
        if let Some(node) = facts.elsewhere {
            // a new backup would be bound to this node again
            if facts.told_here {
                return None;
            }
            let message = format!("the VM went to node {node} before the backup began");
            return failed(Reason::VmMigrated, message);
        }
        if facts.absent_since.is_some_and(|since| facts.now.duration_since(since) >= ABSENT) {
            return failed(Reason::VmNotFound, "the VM is defined on this node no more".to_owned());
        }
        if facts.domain == Some(DomainState::Off) && spec.offline == OfflinePolicy::Refuse {
            return failed(Reason::VmNotRunning, "the VM is off, and offline is Refuse".to_owned());
        }
        return None;
    };
    let cut_short = cut_short(spec, ready_at, facts);
    let is_read = spec.state == DesiredState::Finalized && facts.missing.is_some_and(is_read);
    // a client that asked for more than what must be read, for zeroes say, gets it in the time that there is
    if is_read && (!facts.reading || cut_short.is_some()) {
        return Some(Outcome::Succeeded);
    }
    cut_short
}

/// Why a backup that is Ready ends, whatever its clients do.
fn cut_short(spec: &VmBackupSpec, ready_at: Timestamp, facts: &Facts<'_>) -> Option<Outcome> {
    let failed = |reason, message: String| Some(Outcome::Failed(Because::new(reason, message)));
    if let Some(because) = facts.exhausted {
        return Some(Outcome::Failed(because.clone()));
    }
    if drain_due(ready_at, facts).is_some_and(|due| facts.now >= due) {
        let message =
            format!("the node is cordoned, and the backup went on for {} s", facts.drain_grace.as_secs());
        return failed(Reason::NodeDraining, message);
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

/// Whether the wish that leads to an ending may have changed while it was on its way here: what was finalized may be
/// cancelled, and deadlines are moved; but what is cancelled or deleted stays so.
pub fn is_revocable(outcome: &Outcome) -> bool {
    !matches!(outcome, Outcome::Failed(because) if matches!(because.reason, Reason::Cancelled | Reason::Deleted))
}

/// Why nothing may be begun on the host yet.
pub fn hold(spec: &VmBackupSpec, life: &Life, facts: &Facts<'_>) -> Option<Because> {
    // a guest that is frozen does not wait
    if life.stage == Stage::Begun || life.held.frozen || life.outcome.is_some() {
        return None;
    }
    let because = |reason, message: &str| Some(Because::new(reason, message));
    match facts.domain.filter(|_| facts.elsewhere.is_none()) {
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
    if let Some(rival) = facts.rival {
        let message = format!("VmBackup {rival} of the same VM is not finished");
        return Some(Because::new(Reason::BackupAlreadyRunning, message));
    }
    if facts.foreign_job {
        return because(
            Reason::BackupAlreadyRunning,
            "a backup job that is not Virtmark's runs on the VM (virsh domjobinfo shows it)",
        );
    }
    if facts.other_job {
        return because(
            Reason::VmBusy,
            "libvirt works on the VM: a migration, a dump, or a backup that begins",
        );
    }
    if facts.lost_job {
        let message = "libvirtd was killed while it began a backup, and holds the VM for a job that it knows nothing of: \
            shut the VM down, restart libvirtd, start the VM";
        return because(Reason::VmBusy, message);
    }
    if let Some(disk) = facts.block_jobs.first() {
        return Some(Because::new(Reason::DisksLocked, format!("a block job runs on disk {disk}")));
    }
    facts.room.filter(|_| life.stage == Stage::New).and_then(|room| scratch::too_low(facts.need, room))
}

/// Whether nothing is missing.
pub fn is_read(missing: &[(String, u64)]) -> bool {
    missing.iter().all(|(_, bytes)| *bytes == 0)
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
            let due = ready.min(deadline(facts.last_request, spec.client_idle_seconds));
            Some(drain_due(ready_at, facts).map_or(due, |drain| drain.min(due)))
        }
    }
}

/// When a drain of the node ends a backup that is Ready: one that began on a cordoned node has its time too.
fn drain_due(ready_at: Timestamp, facts: &Facts<'_>) -> Option<Timestamp> {
    let since = facts.cordoned_since?.max(ready_at);
    Some(since.checked_add(facts.drain_grace).unwrap_or(Timestamp::MAX))
}

fn deadline(from: Timestamp, seconds: i32) -> Timestamp {
    from.checked_add(SignedDuration::from_secs(seconds.into())).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::life::Held;
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
            absent_since: None,
            elsewhere: None,
            told_here: false,
            room: Some(100),
            need: 10,
            exhausted: None,
            cordoned_since: None,
            drain_grace: SignedDuration::from_secs(20),
            block_jobs: &[],
            rival: None,
            foreign_job: false,
            other_job: false,
            lost_job: false,
            missing: None,
            reading: false,
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
        let full = Because::new(Reason::ScratchExhausted, "full");
        let absent = Facts { domain: None, absent_since: Some(at(1)), ..facts(10) };
        let moved = Facts { elsewhere: Some("b"), ..off.clone() };
        let cordoned = |since, now| Facts { cordoned_since: Some(at(since)), ..facts(now) };
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
            (
                "finalized, read, and a client is not done",
                r#"{"state":"Finalized"}"#,
                &up,
                Facts { missing: Some(&whole), reading: true, ..facts(11) },
                None,
            ),
            (
                "finalized, read, and a client was not done in time",
                r#"{"state":"Finalized"}"#,
                &up,
                Facts { missing: Some(&whole), reading: true, last_request: at(1009), ..facts(1010) },
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
            ("absent for a moment", "{}", &new, absent.clone(), None),
            ("absent for good", "{}", &new, Facts { now: at(11), ..absent.clone() }, Some("VmNotFound")),
            (
                "on another node",
                "{}",
                &new,
                Facts { elsewhere: Some("b"), ..absent.clone() },
                Some("VmMigrated"),
            ),
            (
                "on another node, and still told of here",
                "{}",
                &new,
                Facts { elsewhere: Some("b"), told_here: true, now: at(11), ..absent },
                None,
            ),
            (
                "off here, on on another node",
                r#"{"offline":"Refuse"}"#,
                &new,
                moved.clone(),
                Some("VmMigrated"),
            ),
            (
                "off here, on on another node, and still told of here",
                r#"{"offline":"Refuse"}"#,
                &new,
                Facts { told_here: true, ..moved },
                None,
            ),
            (
                "no scratch space",
                "{}",
                &up,
                Facts { exhausted: Some(&full), ..facts(11) },
                Some("ScratchExhausted"),
            ),
            (
                "no scratch space, and all is read",
                r#"{"state":"Finalized"}"#,
                &up,
                Facts { exhausted: Some(&full), missing: Some(&whole), ..facts(11) },
                Some("Succeeded"),
            ),
            ("cordoned, within its time", "{}", &up, cordoned(15, 34), None),
            ("cordoned for too long", "{}", &up, cordoned(15, 35), Some("NodeDraining")),
            ("begun on a cordoned node", "{}", &up, cordoned(1, 29), None),
            ("begun on a cordoned node, too long ago", "{}", &up, cordoned(1, 30), Some("NodeDraining")),
            ("cordoned before it began", "{}", &new, cordoned(1, 90), None),
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
            (
                Facts { domain: Some(DomainState::Off), elsewhere: Some("b"), ..facts(1) },
                Some(Reason::VmBusy),
            ),
            (Facts { domain: Some(DomainState::Off), ..facts(1) }, Some(Reason::VmNotRunning)),
            (Facts { rival: Some("db01-a"), ..facts(1) }, Some(Reason::BackupAlreadyRunning)),
            (Facts { foreign_job: true, ..facts(1) }, Some(Reason::BackupAlreadyRunning)),
            (Facts { other_job: true, ..facts(1) }, Some(Reason::VmBusy)),
            (Facts { lost_job: true, ..facts(1) }, Some(Reason::VmBusy)),
            (Facts { block_jobs: &jobs, ..facts(1) }, Some(Reason::DisksLocked)),
            (Facts { room: Some(9), ..facts(1) }, Some(Reason::ScratchSpaceLow)),
            (Facts { room: None, ..facts(1) }, None),
        ];
        for (facts, expected) in cases {
            let held = hold(&spec("{}"), &Life::default(), &facts).map(|because| because.reason);
            assert_eq!(held, expected, "{facts:?}");
            assert_eq!(hold(&spec("{}"), &ready(), &facts), None, "a job that runs is not held");
            let again = Life { stage: Stage::Quiesced, ..Life::default() };
            let held = hold(&spec("{}"), &again, &facts).map(|because| because.reason);
            let expected = expected.filter(|reason| *reason != Reason::ScratchSpaceLow);
            assert_eq!(
                held, expected,
                "a begin that did not come back, and is made again: its images are there"
            );
            let frozen = Life { held: Held { frozen: true, ..Held::default() }, ..again };
            assert_eq!(hold(&spec("{}"), &frozen, &facts), None, "a frozen guest does not wait");
        }
    }

    #[test]
    fn looks_again_at_the_earliest_deadline() {
        assert_eq!(next_due(&spec("{}"), &Life::default(), &facts(1)), Some(at(100)));
        assert_eq!(next_due(&spec("{}"), &ready(), &facts(11)), Some(at(60)));
        let cordoned = Facts { cordoned_since: Some(at(11)), ..facts(12) };
        assert_eq!(next_due(&spec("{}"), &ready(), &cordoned), Some(at(31)));
        let long = spec(r#"{"clientIdleSeconds":5000}"#);
        assert_eq!(next_due(&long, &ready(), &facts(11)), Some(at(1010)));
    }
}
