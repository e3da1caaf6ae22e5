//! The status of a VmBackup while the operator writes it: before it is bound, and when its node is lost.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::resolve::Binding;
use crate::api::conditions::{self, Observation};
use crate::api::{Phase, VmBackupStatus};
use crate::reason::{Because, Reason};

/// Waiting, with the reason.
pub fn waiting(
    old: &VmBackupStatus,
    because: &Because,
    generation: Option<i64>,
    now: Timestamp,
) -> VmBackupStatus {
    let mut new = old.clone();
    new.phase = Phase::Initializing;
    describe(&mut new, because, generation, now);
    new
}

/// Bound to a node: from here on its agent writes.
pub fn bound(
    old: &VmBackupStatus,
    binding: &Binding,
    checkpoint: Option<String>,
    generation: Option<i64>,
    now: Timestamp,
) -> VmBackupStatus {
    let mut new = VmBackupStatus {
        phase: Phase::Initializing,
        node_name: Some(binding.node.clone()),
        vm_uuid: Some(binding.vm_uuid.clone()),
        to_checkpoint: checkpoint,
        from_checkpoint: binding.from_checkpoint.clone(),
        disks: binding.disks.clone(),
        start_time: Some(Time(conditions::whole_seconds(now))),
        ..old.clone()
    };
    let because = Because::new(Reason::Bound, format!("bound to node {}, its agent goes on", binding.node));
    describe(&mut new, &because, generation, now);
    new
}

/// Failed. `host_clean`: nothing was ever made on a host.
pub fn failed(
    old: &VmBackupStatus,
    because: &Because,
    host_clean: bool,
    generation: Option<i64>,
    now: Timestamp,
) -> VmBackupStatus {
    let mut new = old.clone();
    new.phase = Phase::Failed;
    new.completion_time.get_or_insert_with(|| Time(conditions::whole_seconds(now)));
    describe(&mut new, because, generation, now);
    if host_clean {
        conditions::host_clean(
            &mut new.conditions,
            "nothing was made on a node",
            Observation { generation, now },
        );
    }
    new
}

/// Ended, and its spec was changed since: that changes nothing, and is answered.
pub fn reaffirmed(old: &VmBackupStatus, generation: Option<i64>) -> VmBackupStatus {
    let mut new = VmBackupStatus { observed_generation: generation, ..old.clone() };
    conditions::reaffirm(&mut new.conditions, generation);
    new
}

fn describe(status: &mut VmBackupStatus, because: &Because, generation: Option<i64>, now: Timestamp) {
    status.observed_generation = generation;
    conditions::one_shot(&mut status.conditions, status.phase, because, Observation { generation, now });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_world_has_an_unchanged_status() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let because = Because::new(Reason::VmNotRunning, "VM db01 is off");
        let once = waiting(&VmBackupStatus::default(), &because, Some(1), at(1));
        assert_eq!(once, waiting(&once, &because, Some(1), at(99)));
        let ended = failed(&once, &because, true, Some(1), at(2));
        assert_eq!(ended, failed(&ended, &because, true, Some(1), at(99)));
        assert!(conditions::is_true(&ended.conditions, conditions::HOST_CLEAN));
        assert!(conditions::is_true(&ended.conditions, conditions::STALLED));
        assert!(!conditions::is_true(&ended.conditions, conditions::RECONCILING));
        let later = reaffirmed(&ended, Some(2));
        assert_eq!(later.observed_generation, Some(2), "kstatus would wait for ever");
        assert!(later.conditions.iter().all(|condition| condition.observed_generation == Some(2)));
        assert_eq!(later, reaffirmed(&later, Some(2)));
        assert_eq!(ended, reaffirmed(&later, Some(1)), "and nothing else");
    }
}
