//! Looks after the bitmaps of this node's domains, so that what is wrong with a checkpoint is known before the next backup,
//! and what has changed since it can be seen: at a change of a domain's state, after a backup, when it is asked to, and else
//! now and then. One domain at a time, for a part of its time only.
//!
//! What it finds is told in the domain's sighting. It writes no status, and never looks while a backup of the domain lives:
//! libvirt's note of a checkpoint is that backup's then.

mod look;
mod report;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::channel::mpsc::UnboundedSender;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use tokio::sync::{Notify, OwnedMutexGuard};
use tokio::time::Instant;

use self::look::{Answer, Headers, Question, look};
use self::report::Wanted;
use super::{AgentError, Context};
use crate::api::conditions::{self, USABLE};
use crate::api::{DomainSightingSpec, DomainState, Phase, SightedCheckpoint, VmCheckpoint, bitmap_prefix};
use crate::cluster;

/// How soon a domain is looked at whose state changed: it often changes again at once.
const SETTLED: Duration = Duration::from_secs(1);

/// How soon it is looked at after a backup: the operator has to judge the checkpoint first.
pub const AFTER_BACKUP: Duration = Duration::from_secs(2);

/// How soon it is tried again when there was no time for it.
const NOT_NOW: Duration = Duration::from_secs(10);

/// How long after a look that found a bitmap broken another one must agree.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// Every how many looks the headers of images that a QEMU has are read again.
const HEADERS: u32 = 12;

/// For every second of looking so many of rest.
const REST: u32 = 4;

/// What is known of the domains, and when each is to be looked at.
#[derive(Default)]
pub struct Survey {
    domains: Mutex<HashMap<String, Surveyed>>,
    wake: Notify,
}

struct Surveyed {
    due: Instant,
    /// What of the sighting, when it changes, calls for a look.
    like: Likeness,
    headers: Option<Headers>,
    looks: u32,
    /// How many looks in a row found a checkpoint that the operator has yet to judge.
    unjudged: u32,
    report: Option<Vec<SightedCheckpoint>>,
    turn: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Clone, PartialEq, Eq)]
struct Likeness {
    state: DomainState,
    qemu: Option<u32>,
    disks: Vec<(String, Option<String>)>,
}

impl Survey {
    fn domains(&self) -> MutexGuard<'_, HashMap<String, Surveyed>> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a domain that libvirt has, with libvirt's number of its QEMU.
    pub fn seen(&self, spec: &DomainSightingSpec, qemu: Option<u32>) {
        let mut domains = self.domains();
        let top = |disk: &crate::api::DomainDisk| disk.backing_chain.first().map(|top| top.file.clone());
        let disks = spec.disks.iter().map(|disk| (disk.target.clone(), top(disk))).collect();
        let like = Likeness { state: spec.state, qemu, disks };
        let soon = Instant::now() + SETTLED;
        match domains.get_mut(&spec.uuid) {
            None => {
                let new = Surveyed {
                    due: soon,
                    like,
                    headers: None,
                    looks: 0,
                    unjudged: 0,
                    report: None,
                    turn: Arc::default(),
                };
                domains.insert(spec.uuid.clone(), new);
            }
            Some(known) if known.like != like => {
                known.like = like;
                known.headers = None;
                known.due = known.due.min(soon);
            }
            Some(_) => return,
        }
        self.wake.notify_one();
    }

    /// Forgets the domains that libvirt has no more.
    pub fn gone(&self, is_gone: impl Fn(&str) -> bool) {
        self.domains().retain(|uuid, _| !is_gone(uuid));
    }

    /// Has a domain looked at within `within`, its images too.
    pub fn ask(&self, vm_uuid: &str, within: Duration) {
        if let Some(known) = self.domains().get_mut(vm_uuid) {
            known.due = known.due.min(Instant::now() + within);
            known.headers = None;
            known.unjudged = 0;
            self.wake.notify_one();
        }
    }

    /// What was found last; `None` before the first look.
    pub fn report(&self, vm_uuid: &str) -> Option<Vec<SightedCheckpoint>> {
        self.domains().get(vm_uuid)?.report.clone()
    }

    /// Waits until nobody else makes libvirt know, or forget, checkpoints of a domain, and keeps others from it.
    pub async fn turn(&self, vm_uuid: &str) -> Option<OwnedMutexGuard<()>> {
        let turn = Arc::clone(&self.domains().get(vm_uuid)?.turn);
        Some(turn.lock_owned().await)
    }

    fn put_off(&self, vm_uuid: &str, pause: Duration) {
        if let Some(known) = self.domains().get_mut(vm_uuid) {
            known.due = Instant::now() + pause;
        }
    }

    /// When to look again: soon, and then less and less so, while the operator has a checkpoint to judge; a backup may be at work
    /// on another node.
    fn again(&self, vm_uuid: &str, unjudged: bool, next: Duration) -> Duration {
        let mut domains = self.domains();
        let Some(known) = domains.get_mut(vm_uuid) else { return next };
        if !unjudged {
            known.unjudged = 0;
            return next;
        }
        known.unjudged = (known.unjudged + 1).min(16);
        (AFTER_BACKUP * (1 << (known.unjudged - 1))).min(next)
    }

    /// The domain that is due, or when one is.
    fn next(&self) -> Result<String, Option<Instant>> {
        let domains = self.domains();
        let next = domains.iter().min_by_key(|(_, known)| known.due);
        match next {
            Some((uuid, known)) if known.due <= Instant::now() => Ok(uuid.clone()),
            other => Err(other.map(|(_, known)| known.due)),
        }
    }

    async fn due(&self) -> String {
        loop {
            let due = match self.next() {
                Ok(uuid) => return uuid,
                Err(due) => due,
            };
            let far = || Instant::now() + Duration::from_secs(3600);
            tokio::select! {
                () = tokio::time::sleep_until(due.unwrap_or_else(far)) => {}
                () = self.wake.notified() => {}
            }
        }
    }

    /// The headers that were read before, unless it is time to read them again.
    fn headers(&self, vm_uuid: &str) -> Option<Headers> {
        let mut domains = self.domains();
        let known = domains.get_mut(vm_uuid)?;
        known.looks = known.looks.wrapping_add(1);
        if known.looks.is_multiple_of(HEADERS) { None } else { known.headers.clone() }
    }

    fn keep(&self, vm_uuid: &str, wanted: &[Wanted], answer: Answer) {
        let mut domains = self.domains();
        let Some(known) = domains.get_mut(vm_uuid) else { return };
        known.headers = Some(answer.headers);
        known.report = Some(answer.found.report(wanted, known.report.as_deref()));
    }
}

/// Looks, for ever; `told` hears of each domain that was looked at.
pub async fn watch(context: &Context, cadence: Duration, told: UnboundedSender<String>) {
    let survey = &context.survey;
    let mut cluster = None;
    loop {
        let uuid = survey.due().await;
        if context.registry.is_claimed(&uuid) {
            // the end of that backup asks for a look
            survey.put_off(&uuid, NOT_NOW);
            continue;
        }
        let began = Instant::now();
        // no two agents at the same time, nor this one's domains
        let next = cadence.mul_f64(rand::random_range(0.8..1.2));
        survey.put_off(&uuid, next);
        match examine(&uuid, &mut cluster, context).await {
            Ok(Looked::Done { unjudged }) => {
                survey.put_off(&uuid, survey.again(&uuid, unjudged, next));
                // a closed channel means that the agent is shutting down
                let _ = told.unbounded_send(uuid);
            }
            Ok(Looked::NotNow) => survey.put_off(&uuid, NOT_NOW.min(next)),
            Err(error) => {
                tracing::warn!(domain = uuid, %error, "its bitmaps could not be looked at");
                survey.put_off(&uuid, NOT_NOW.min(next));
            }
        }
        tokio::time::sleep((began.elapsed() * REST).min(SETTLED)).await;
    }
}

enum Looked {
    /// With a checkpoint that the operator has yet to judge, or without.
    Done {
        unjudged: bool,
    },
    NotNow,
}

async fn examine(
    vm_uuid: &str,
    cluster: &mut Option<String>,
    context: &Context,
) -> Result<Looked, AgentError> {
    let id = match cluster {
        Some(id) => id.clone(),
        None => cluster.insert(cluster::id(&context.client).await?).clone(),
    };
    let of_vm = ListParams::default().fields(&format!("spec.vmUuid={vm_uuid}"));
    let checkpoints = Api::<VmCheckpoint>::all(context.client.clone()).list(&of_vm).await?.items;
    let wanted: Vec<_> =
        checkpoints.iter().filter(|one| is_wanted(one, &context.node)).filter_map(wanted).collect();
    let unjudged = checkpoints.iter().any(|one| {
        one.status.as_ref().is_none_or(|status| status.conditions.is_empty())
            && one.metadata.deletion_timestamp.is_none()
    });
    let mut headers = context.survey.headers(vm_uuid);
    let mut ask = async |locked| {
        let question = Question {
            vm_uuid: vm_uuid.to_owned(),
            wanted: wanted.clone(),
            prefix: bitmap_prefix(&id),
            headers: headers.take(),
            locked,
        };
        let (host, registry) = (context.host.clone(), context.registry.clone());
        let Some(turn) = context.survey.turn(vm_uuid).await else { return Ok(None) };
        let looked = move || {
            // held until libvirt knows no more than before, also when nobody waits for the answer any more
            let _turn = turn;
            look(&host, &question, &|| registry.is_claimed(&question.vm_uuid))
        };
        context.blocking(looked).await
    };
    let Some(mut answer) = ask(false).await? else { return Ok(Looked::NotNow) };
    if answer.found.is_doubtful(&wanted) {
        let runs_elsewhere =
            !answer.active && context.told_by(vm_uuid).await?.iter().any(|node| *node != context.node);
        if runs_elsewhere {
            answer.found = answer.found.unconfirmed();
        } else {
            tokio::time::sleep(SECOND_LOOK).await;
            let Some(second) = ask(true).await? else { return Ok(Looked::NotNow) };
            let same = second.active == answer.active;
            let found = answer.found.confirmed_by(second.found);
            let found = if same { found } else { found.unconfirmed() };
            answer = Answer { found, active: second.active, headers: second.headers };
        }
    }
    context.survey.keep(vm_uuid, &wanted, answer);
    Ok(Looked::Done { unjudged })
}

/// Only what the operator judged, or has bound to this node to be looked at: anybody may write any uuid into a spec.
fn is_wanted(checkpoint: &VmCheckpoint, node: &str) -> bool {
    let Some(status) = &checkpoint.status else { return false };
    let judged = conditions::is_true(&status.conditions, USABLE) && status.phase == Phase::Ready;
    let asked = status.phase == Phase::Initializing && status.node_name.as_deref() == Some(node);
    (judged || asked) && checkpoint.metadata.deletion_timestamp.is_none()
}

fn wanted(checkpoint: &VmCheckpoint) -> Option<Wanted> {
    let known = checkpoint.status.iter().flat_map(|status| &status.disks);
    let broken: Vec<_> =
        known.filter(|disk| disk.consistent == Some(false)).map(|disk| disk.target.as_str()).collect();
    let targets = checkpoint.spec.disks.iter().map(|disk| disk.target.clone());
    Some(Wanted {
        uid: checkpoint.uid()?,
        name: checkpoint.spec.bitmap.clone(),
        targets: targets.filter(|target| !broken.contains(&target.as_str())).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "00000000-0000-4000-8000-000000000001";

    fn domain(state: &str) -> DomainSightingSpec {
        serde_json::from_value(
            serde_json::json!({"nodeName": "n", "uuid": UUID, "name": "db01", "state": state}),
        )
        .unwrap()
    }

    fn due_in(survey: &Survey) -> Duration {
        match survey.next() {
            Ok(_) => Duration::ZERO,
            Err(due) => due.unwrap().saturating_duration_since(Instant::now()),
        }
    }

    #[test]
    fn a_domain_is_looked_at_when_it_changes_and_when_it_is_asked_for() {
        let (survey, hour) = (Survey::default(), Duration::from_secs(3600));
        let seen = |state, qemu| survey.seen(&domain(state), qemu);
        assert_eq!(survey.next(), Err(None));
        seen("Running", Some(1));
        assert!(due_in(&survey) <= SETTLED, "it is new");
        survey.put_off(UUID, hour);
        seen("Running", Some(1));
        assert!(due_in(&survey) > SETTLED, "nothing is new");
        seen("Running", Some(2));
        assert!(due_in(&survey) <= SETTLED, "it was started again");
        survey.put_off(UUID, hour);
        seen("Paused", Some(2));
        assert!(due_in(&survey) <= SETTLED, "its state is another");
        survey.put_off(UUID, hour);
        survey.ask(UUID, Duration::ZERO);
        assert_eq!(survey.next(), Ok(UUID.to_owned()));
        survey.ask("another", Duration::ZERO);
        survey.gone(|_| true);
        assert_eq!(survey.next(), Err(None), "it is gone");
    }

    #[test]
    fn a_checkpoint_that_is_not_judged_yet_is_waited_for_less_and_less() {
        let (survey, cadence) = (Survey::default(), Duration::from_secs(300));
        survey.seen(&domain("Running"), Some(1));
        let pauses: Vec<_> = (0..9).map(|_| survey.again(UUID, true, cadence).as_secs()).collect();
        assert_eq!(pauses, [2, 4, 8, 16, 32, 64, 128, 256, 300]);
        survey.ask(UUID, AFTER_BACKUP);
        assert_eq!(survey.again(UUID, true, cadence), AFTER_BACKUP, "a backup has ended");
        assert_eq!(survey.again(UUID, false, cadence), cadence);
    }
}
