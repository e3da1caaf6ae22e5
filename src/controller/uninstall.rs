//! Before an uninstall: cancels the backups that are open, and waits until they have ended, so that nothing of them is left
//! on a host. The chart's hook runs it, with the operator's own rights, while operator and agents still run. It deletes
//! nothing, and ends no chain.

use std::time::Duration;

use anyhow::bail;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};
use tokio::time::{Instant, sleep};

use super::chain;
use super::config::Config;
use super::context::is_host_clean;
use crate::api::{self, DesiredState, Phase, VmBackup, VmCheckpoint};
use crate::cluster;

/// How soon to look again.
const AGAIN: Duration = Duration::from_secs(1);

/// How long a backup that its user finalized has to begin with that, before it is cancelled.
const GRACE: Duration = Duration::from_secs(10);

/// What is to be done about a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Nothing: it has ended.
    Ended,
    /// Nothing: it is on its way to its end.
    Wait,
    /// It does not end by itself.
    Cancel,
}

/// What is to be done about a backup after so long a wait. Pure.
fn step(backup: &VmBackup, waited: Duration) -> Step {
    let phase = backup.status.as_ref().map(|status| status.phase).unwrap_or_default();
    if phase.is_terminal() {
        return Step::Ended;
    }
    // what is deleted ends as what is cancelled does
    if phase == Phase::Finalizing || backup.metadata.deletion_timestamp.is_some() {
        return Step::Wait;
    }
    match backup.spec.state {
        DesiredState::Running => Step::Cancel,
        DesiredState::Finalized if waited >= GRACE => Step::Cancel,
        DesiredState::Finalized | DesiredState::Cancelled => Step::Wait,
    }
}

/// Cancels what is open, in every namespace, and waits until all has ended, for at most `patience`; tells on standard
/// output what it does.
///
/// # Errors
/// Which backups are still open then, or what the API server says.
pub async fn end_backups(config: &Config, patience: Duration) -> anyhow::Result<()> {
    let client = cluster::connect(config.kubeconfig.as_deref()).await?;
    let began = Instant::now();
    loop {
        let waited = began.elapsed();
        let open = look(&client, waited).await;
        if let Ok(open) = &open
            && open.is_empty()
        {
            println!("no backup is open");
            return Ok(());
        }
        if waited < patience {
            sleep(AGAIN).await;
            continue;
        }
        let open = open?;
        bail!(
            "after {} s these have not ended: {}; see why with kubectl describe vmbackup, or uninstall with \
             --no-hooks and leave their jobs and scratch images to the hosts",
            patience.as_secs(),
            open.join(", ")
        );
    }
}

/// Whether a checkpoint is that of a backup which has ended without one, and is about to be removed by an operator. Pure.
fn is_leftover(checkpoint: &VmCheckpoint, backups: &[VmBackup]) -> bool {
    let made_with = checkpoint.labels().get(api::LABEL_BACKUP);
    let failed = |backup: &&VmBackup| {
        let status = backup.status.as_ref();
        status.is_some_and(|status| status.phase == Phase::Failed && is_host_clean(&status.conditions))
    };
    let mut failed = backups.iter().filter(failed).map(|backup| backup.metadata.uid.as_ref());
    made_with.is_some() && failed.any(|uid| uid == made_with) && !chain::is_usable(checkpoint)
}

/// Cancels what is to be cancelled; answers what has not ended, as `namespace/name (phase)`.
async fn look(client: &Client, waited: Duration) -> Result<Vec<String>, kube::Error> {
    let mut open = Vec::new();
    let (backups, checkpoints) =
        (Api::<VmBackup>::all(client.clone()), Api::<VmCheckpoint>::all(client.clone()));
    let backups = cluster::remaining(&backups, &ListParams::default()).await?;
    let checkpoints = cluster::remaining(&checkpoints, &ListParams::default()).await?;
    for checkpoint in checkpoints.iter().filter(|checkpoint| is_leftover(checkpoint, &backups)) {
        open.push(format!(
            "checkpoint {}/{}",
            checkpoint.namespace().unwrap_or_default(),
            checkpoint.name_any()
        ));
    }
    for backup in backups {
        let step = step(&backup, waited);
        if step == Step::Ended {
            continue;
        }
        let (namespace, name) = (backup.namespace().unwrap_or_default(), backup.name_any());
        let phase = backup.status.as_ref().map(|status| status.phase).unwrap_or_default();
        if step == Step::Cancel && cluster::cancel(client, &backup).await? {
            println!("{namespace}/{name} was {}: cancelled", phase.as_str());
        }
        open.push(format!("{namespace}/{name} ({})", phase.as_str()));
    }
    Ok(open)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;
    use crate::api::{VmBackupSpec, VmBackupStatus};
    use crate::clock;

    fn backup(phase: Phase, state: DesiredState) -> VmBackup {
        let spec = VmBackupSpec { state, ..serde_json::from_value(serde_json::json!({"vm": "db"})).unwrap() };
        let mut backup = VmBackup::new("nightly", spec);
        backup.status = Some(VmBackupStatus { phase, ..VmBackupStatus::default() });
        backup
    }

    #[test]
    fn what_would_not_end_by_itself_is_cancelled_and_what_would_is_waited_for() {
        use DesiredState::{Cancelled, Finalized, Running};
        for (phase, state, at_once, later) in [
            (Phase::Initializing, Running, Step::Cancel, Step::Cancel),
            (Phase::Ready, Running, Step::Cancel, Step::Cancel),
            (Phase::Ready, Finalized, Step::Wait, Step::Cancel),
            (Phase::Ready, Cancelled, Step::Wait, Step::Wait),
            (Phase::Finalizing, Running, Step::Wait, Step::Wait),
            (Phase::Finalizing, Finalized, Step::Wait, Step::Wait),
            (Phase::Succeeded, Finalized, Step::Ended, Step::Ended),
            (Phase::Failed, Running, Step::Ended, Step::Ended),
        ] {
            let backup = backup(phase, state);
            assert_eq!(step(&backup, Duration::ZERO), at_once, "{phase:?} {state:?}");
            assert_eq!(step(&backup, GRACE), later, "{phase:?} {state:?}");
        }
    }

    #[test]
    fn a_new_one_is_cancelled_and_a_deleted_one_is_waited_for() {
        let mut new = backup(Phase::Ready, DesiredState::Running);
        new.status = None;
        assert_eq!(step(&new, Duration::ZERO), Step::Cancel);
        new.metadata.deletion_timestamp = Some(Time(clock::now()));
        assert_eq!(step(&new, GRACE), Step::Wait);
    }
}
