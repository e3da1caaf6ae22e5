//! What becomes of a restore point that a process left, or had to leave: a function of what is here, of its VmBackup, and of what
//! is wanted now. It does none of it.

use kube::ResourceExt as _;

use super::backup::Wanted;
use super::state::State;
use crate::api::{LABEL_OWNER, Phase, VmBackup};

/// What is done with what is here of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// All of it is here, and nobody can cancel it any more: it becomes a restore point.
    Publish,
    /// Its VmBackup is on its way.
    GoOn,
    /// It never will be one.
    Remove,
}

/// What is next, with the VmBackup as it is now; `None` when it is gone. One that Succeeded, or that is gone, keeps what was read of
/// it: somebody may have counted on it.
#[must_use]
pub fn next(state: &State, found: Option<&VmBackup>) -> Next {
    let is_whole = state.whole().is_ok();
    match found.map(VmBackup::phase) {
        None | Some(Phase::Succeeded) if is_whole => Next::Publish,
        // somebody else finalized it: what is not here cannot be read any more
        None | Some(Phase::Succeeded | Phase::Failed | Phase::Cancelled) => Next::Remove,
        Some(Phase::Finalizing) if !is_whole => Next::Remove,
        Some(Phase::Finalizing | Phase::Initializing | Phase::Ready | Phase::Paused) => Next::GoOn,
    }
}

/// In what the backup that was begun is not the one that is wanted, as the command line names it.
#[must_use]
pub fn unlike(state: &State, backup: &VmBackup, wanted: &Wanted) -> Option<&'static str> {
    let spec = &backup.spec;
    let sorted = |disks: &[String]| {
        let mut disks = disks.to_vec();
        disks.sort();
        disks.dedup();
        disks
    };
    let differs = [
        (state.kind != wanted.kind, "full or incremental"),
        (state.format != wanted.format, "--format"),
        (sorted(spec.disks.as_deref().unwrap_or_default()) != sorted(&wanted.disks), "--disk"),
        (backup.labels().get(LABEL_OWNER) != wanted.owner.as_ref(), "--owner"),
        (spec.max_checkpoints != wanted.max_checkpoints, "--max-checkpoints"),
        (spec.quiesce.as_ref().map(|quiesce| quiesce.mode) != wanted.quiesce, "--quiesce"),
    ];
    differs.into_iter().find_map(|(differs, option)| differs.then_some(option))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::download::How;
    use super::super::images::Way;
    use super::super::manifest::DiskFormat;
    use super::super::record;
    use super::super::state::Kind;
    use super::super::state::tests::{backup, state};
    use super::*;
    use crate::api::QuiesceMode;

    /// A backup of all of `db01`, for the tests of others.
    pub(crate) fn wanted() -> Wanted {
        Wanted {
            vm: "db01".to_owned(),
            to: "/points".into(),
            kind: Kind::Auto,
            format: DiskFormat::Qcow2,
            disks: Vec::new(),
            owner: None,
            max_checkpoints: None,
            quiesce: None,
            start_seconds: 600,
            how: How { workers: 1, way: Way::Auto },
        }
    }

    #[test]
    fn what_was_read_to_its_end_goes_only_with_a_backup_that_failed() {
        use Next::{GoOn, Publish, Remove};
        let rows = [
            // phase, when all is here, when not
            (None, Publish, Remove),
            (Some("Initializing"), GoOn, GoOn),
            (Some("Ready"), GoOn, GoOn),
            (Some("Finalizing"), GoOn, Remove),
            (Some("Succeeded"), Publish, Remove),
            (Some("Failed"), Remove, Remove),
            (Some("Cancelled"), Remove, Remove),
        ];
        for (phase, whole, cut) in rows {
            let found = phase.map(|phase| backup("db01-1", "u", phase, &["vda"]));
            let mut state = state(Some(&backup("db01-1", "u", "Ready", &["vda"])));
            assert_eq!(next(&state, found.as_ref()), whole, "{phase:?}, whole");
            state.disks.entry("vda".to_owned()).and_modify(|disk| disk.complete = false);
            assert_eq!(next(&state, found.as_ref()), cut, "{phase:?}, cut");
            state.backup = None;
            assert_eq!(next(&state, found.as_ref()), cut, "{phase:?}, never Ready");
        }
    }

    #[test]
    fn whatever_was_asked_for_must_be_asked_for_again() {
        let with = |change: fn(&mut Wanted)| {
            let mut wanted = wanted();
            change(&mut wanted);
            wanted
        };
        let rows = [
            (with(|_| {}), None),
            (with(|wanted| wanted.start_seconds = 1), None),
            (with(|wanted| wanted.kind = Kind::Full), Some("full or incremental")),
            (with(|wanted| wanted.format = DiskFormat::Raw), Some("--format")),
            (with(|wanted| wanted.disks = vec!["vda".to_owned()]), Some("--disk")),
            (with(|wanted| wanted.owner = Some("me".to_owned())), Some("--owner")),
            (with(|wanted| wanted.max_checkpoints = Some(2)), Some("--max-checkpoints")),
            (with(|wanted| wanted.quiesce = Some(QuiesceMode::Required)), Some("--quiesce")),
        ];
        let made = |wanted: &Wanted| {
            let spec = record::spec(wanted, None);
            let mut state = state(None);
            (state.kind, state.format) = (wanted.kind, wanted.format);
            (state, record::object("db01-1", spec, wanted.owner.as_deref(), Some("r")))
        };
        for (other, option) in rows {
            // either way round, and never of itself
            let (state, object) = made(&wanted());
            assert_eq!(unlike(&state, &object, &other), option);
            let (state, object) = made(&other);
            assert_eq!(unlike(&state, &object, &wanted()), option);
            assert_eq!(unlike(&state, &object, &other), None);
        }
        let both = |first: &str, second: &str| {
            let mut wanted = wanted();
            wanted.disks = vec![first.to_owned(), second.to_owned()];
            wanted
        };
        let (state, object) = made(&both("vda", "vdb"));
        assert_eq!(unlike(&state, &object, &both("vdb", "vda")), None, "in any order");
    }
}
