//! Before an uninstall: cancels the backups that are open, and waits until they have ended, so that nothing of them is left
//! on a host. The chart's hook runs it, with the operator's own rights, while operator and agents still run. It deletes
//! nothing, and ends no chain.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::bail;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};
use tokio::time::{Instant, sleep};

use super::config::Config;
use super::context::is_host_clean;
use crate::api::{self, DesiredState, FINALIZER, ImageTransfer, Phase, VmBackup, VmCheckpoint};
use crate::cluster;

/// How soon to look again.
const AGAIN: Duration = Duration::from_secs(1);

/// How long a backup that its user finalized has to begin with that, before it is cancelled: at most, and half of the time that
/// there is.
const GRACE: Duration = Duration::from_secs(10);

/// The Job that runs this, by Helm's hand.
const JOB: &str = "virtmark-uninstall";

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

/// What is to be done about a backup. `graceful`: one that its user finalized may still begin with that; `nodes`: those that there
/// are. Pure.
fn step(backup: &VmBackup, graceful: bool, nodes: &BTreeSet<String>) -> Step {
    let status = backup.status.clone().unwrap_or_default();
    let on_its_way_out = backup.metadata.deletion_timestamp.is_some();
    if status.phase.is_terminal() {
        // of a node that is gone nobody will ever say so
        let clean = status.node_name.as_ref().is_none_or(|node| !nodes.contains(node));
        let clean = clean || is_host_clean(&status.conditions);
        return if clean && !is_going(&backup.metadata) { Step::Ended } else { Step::Wait };
    }
    // what is deleted ends as what is cancelled does
    if status.phase == Phase::Finalizing || on_its_way_out {
        return Step::Wait;
    }
    match backup.spec.state {
        DesiredState::Running => Step::Cancel,
        DesiredState::Finalized if !graceful => Step::Cancel,
        // it is not on a host, and never will be: that takes no operator
        DesiredState::Cancelled if status.node_name.is_none() => Step::Ended,
        DesiredState::Finalized | DesiredState::Cancelled => Step::Wait,
    }
}

/// Whether an object is deleted, and waits for an operator or an agent to let it go. Pure.
fn is_going(metadata: &ObjectMeta) -> bool {
    let held = metadata.finalizers.iter().flatten().any(|finalizer| finalizer == FINALIZER);
    metadata.deletion_timestamp.is_some() && held
}

/// Cancels what is open, in every namespace, and waits until all has ended, for at most `patience`; tells on standard
/// output what it does.
///
/// # Errors
/// Which backups are still open then, or what the API server says.
pub async fn end_backups(config: &Config, patience: Duration) -> anyhow::Result<()> {
    let client = cluster::connect(config.kubeconfig.as_deref()).await?;
    let began = Instant::now();
    // the operator does a little more for what has ended: a second look finds that done
    let mut quiet = false;
    loop {
        let waited = began.elapsed();
        let open = look(&client, config, waited < GRACE.min(patience / 2)).await;
        if let Ok(Looked::NoHook(manager)) = &open {
            bail!(
                "Job {JOB} was made by {manager} and not by Helm as a hook, so nothing is uninstalled, and nothing was cancelled: \
                 render the chart with helm template --no-hooks"
            );
        }
        if let Ok(Looked::Open(open)) = &open
            && open.is_empty()
        {
            if quiet {
                println!("no backup is open");
                return Ok(());
            }
            quiet = true;
        } else if waited >= patience {
            let Looked::Open(open) = open? else { continue };
            bail!(
                "after {} s these have not ended: {}; see why with kubectl describe, or uninstall with --no-hooks and leave \
                 their jobs and scratch images to the hosts",
                patience.as_secs(),
                open.join(", ")
            );
        } else {
            quiet = false;
        }
        sleep(AGAIN).await;
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
    made_with.is_some() && failed.any(|uid| uid == made_with) && !checkpoint.is_usable()
}

/// Who made a Job as if it were an object like others, at each apply, as `helm template | kubectl apply` does with hooks. Pure.
fn applier(job: &ObjectMeta) -> Option<&str> {
    let entries = job.managed_fields.iter().flatten().filter(|entry| entry.subresource.is_none());
    let mut managers = entries.filter_map(|entry| entry.manager.as_deref());
    managers.find(|manager| ["kubectl", "kustomize"].iter().any(|applier| manager.starts_with(applier)))
}

/// What a look found.
enum Looked {
    /// Nothing is uninstalled: who made the Job that runs this.
    NoHook(String),
    /// What has not ended, as `namespace/name (phase)`.
    Open(Vec<String>),
}

/// Cancels what is to be cancelled.
async fn look(client: &Client, config: &Config, graceful: bool) -> Result<Looked, kube::Error> {
    let jobs = Api::<Job>::namespaced(client.clone(), &config.system_namespace);
    let job = jobs.get_metadata_opt(JOB).await?;
    if let Some(manager) = job.as_ref().and_then(|job| applier(&job.metadata)) {
        return Ok(Looked::NoHook(manager.to_owned()));
    }
    let all = ListParams::default();
    let nodes = Api::<Node>::all(client.clone()).list_metadata(&all).await?;
    let nodes: BTreeSet<_> = nodes.iter().map(|node| node.name_any()).collect();
    let backups = cluster::remaining(&Api::<VmBackup>::all(client.clone()), &all).await?;
    let checkpoints = cluster::remaining(&Api::<VmCheckpoint>::all(client.clone()), &all).await?;
    let transfers = cluster::remaining(&Api::<ImageTransfer>::all(client.clone()), &all).await?;
    let mut open = Vec::new();
    let named = |kind: &str, object: &ObjectMeta| {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        format!("{kind}{}/{}", text(&object.namespace), text(&object.name))
    };
    let pending = checkpoints
        .iter()
        .filter(|checkpoint| is_going(&checkpoint.metadata) || is_leftover(checkpoint, &backups));
    let mut others: Vec<_> = pending.map(|checkpoint| named("checkpoint ", &checkpoint.metadata)).collect();
    let served = transfers.iter().filter(|transfer| {
        let node = transfer.status.as_ref().filter(|status| !status.phase.is_terminal());
        node.and_then(|status| status.node_name.as_ref()).is_some_and(|node| nodes.contains(node))
    });
    others.extend(served.map(|transfer| named("transfer ", &transfer.metadata)));
    for backup in backups {
        let step = step(&backup, graceful, &nodes);
        if step == Step::Ended {
            continue;
        }
        let name = named("", &backup.metadata);
        let phase = backup.phase().as_str();
        let mut words = format!("{name} ({phase})");
        if step == Step::Cancel {
            match cluster::cancel(client, &backup).await {
                Ok(true) => println!("{name} was {phase}: cancelled"),
                Ok(false) => {}
                // one that nobody may change does not keep the others
                Err(error) => words += &format!(", which was not cancelled: {error}"),
            }
        }
        open.push(words);
    }
    open.extend(others);
    Ok(Looked::Open(open))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use serde_json::{Value, json};

    use super::*;
    use crate::clock;

    fn backup(phase: Phase, state: DesiredState, status: &Value) -> VmBackup {
        let mut all = json!({"phase": phase, "nodeName": "node-a"});
        for (key, value) in status.as_object().into_iter().flatten() {
            all[key] = value.clone();
        }
        serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmBackup",
            "metadata": {"name": "nightly"}, "spec": {"vm": "db", "state": state}, "status": all}))
        .unwrap()
    }

    fn nodes() -> BTreeSet<String> {
        BTreeSet::from(["node-a".to_owned()])
    }

    fn condition(kind: &str, status: &str, reason: &str) -> Value {
        json!({"conditions": [{"type": kind, "status": status, "reason": reason, "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z"}]})
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
        ] {
            let backup = backup(phase, state, &json!({}));
            assert_eq!(step(&backup, true, &nodes()), at_once, "{phase:?} {state:?}");
            assert_eq!(step(&backup, false, &nodes()), later, "{phase:?} {state:?}");
        }
    }

    #[test]
    fn what_ended_has_ended_once_its_host_is_clean_or_there_is_none() {
        let ended = |status| backup(Phase::Failed, DesiredState::Running, &status);
        let step = |backup: &VmBackup| step(backup, false, &nodes());
        let mut clean = ended(condition("HostClean", "True", "HostClean"));
        assert_eq!(step(&clean), Step::Ended);
        clean.metadata.deletion_timestamp = Some(Time(clock::now()));
        assert_eq!(step(&clean), Step::Ended, "nobody holds it");
        clean.metadata.finalizers = Some(vec![FINALIZER.to_owned()]);
        assert_eq!(step(&clean), Step::Wait, "an operator lets it go");
        assert_eq!(step(&ended(json!({"nodeName": "gone"}))), Step::Ended);
        assert_eq!(step(&ended(json!({"nodeName": null}))), Step::Ended);
        let deadline = condition("Ready", "False", "ReadyDeadlineExceeded");
        assert_eq!(step(&ended(deadline)), Step::Wait, "its agent is away");
    }

    #[test]
    fn a_new_one_is_cancelled_and_a_deleted_one_is_waited_for() {
        let mut new = backup(Phase::Ready, DesiredState::Running, &json!({}));
        new.status = None;
        assert_eq!(step(&new, true, &nodes()), Step::Cancel);
        new.spec.state = DesiredState::Cancelled;
        assert_eq!(
            step(&new, true, &nodes()),
            Step::Ended,
            "it is on no host, whether an operator says so or not"
        );
        new.metadata.deletion_timestamp = Some(Time(clock::now()));
        assert_eq!(step(&new, false, &nodes()), Step::Wait);
    }

    #[test]
    fn a_job_that_was_applied_like_any_object_is_no_hook() {
        let made_by = |managers: Value| {
            let job = serde_json::from_value(json!({"name": JOB, "managedFields": managers})).unwrap();
            applier(&job).map(str::to_owned)
        };
        let controller = json!({"manager": "kube-controller-manager", "subresource": "status"});
        for (manager, applied) in [
            ("helm", false),
            ("helm-controller", false),
            ("argocd-controller", false),
            ("kubectl-client-side-apply", true),
            ("kubectl", true),
            ("kustomize-controller", true),
        ] {
            let found = made_by(json!([{"manager": manager}, controller]));
            assert_eq!(found.as_deref(), applied.then_some(manager));
        }
        let looked_at = json!({"manager": "kubectl-edit", "subresource": "status"});
        assert_eq!(made_by(json!([{"manager": "helm"}, looked_at])), None);
    }
}
