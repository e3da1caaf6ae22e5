//! Every version of every object while a test runs: a status never goes back, whoever dies, stands still or races.
//!
//! `History::watch` follows the API beside a test; `check` answers with each step back that it saw. It changes nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use futures::StreamExt as _;
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt as _};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use virtmark::api::{ImageTransfer, VmBackup, VmCheckpoint};
use virtmark_bed::{Bed, wait_until};

/// What is written once, and never again.
const ONCE: [&str; 9] = [
    "nodeName",
    "vmUuid",
    "toCheckpoint",
    "backupUid",
    "startTime",
    "readyTime",
    "completionTime",
    "frozenMilliseconds",
    "ticketSecret",
];

/// What was seen, and what of it is wrong.
#[derive(Default)]
struct Seen {
    /// By uid, every version, the oldest first.
    versions: BTreeMap<String, Vec<Value>>,
    wrong: Vec<String>,
    count: usize,
}

/// The versions of all VmBackups, ImageTransfers and VmCheckpoints since it was made.
pub struct History {
    seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
    bed: Bed,
}

impl History {
    /// Follows the API of `bed` until it is dropped.
    pub fn watch(bed: &Bed) -> Result<Self> {
        virtmark::telemetry::install_crypto();
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), CancellationToken::new());
        let (into, stopped, kubeconfig) = (Arc::clone(&seen), stop.clone(), bed.plane.kubeconfig.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let Ok(client) = virtmark::cluster::connect(Some(&kubeconfig)).await else { return };
                tokio::select! {
                    () = stopped.cancelled() => {}
                    _ = async { tokio::join!(
                        follow::<VmBackup>(&client, &into),
                        follow::<ImageTransfer>(&client, &into),
                        follow::<VmCheckpoint>(&client, &into),
                    ) } => {}
                }
            });
        });
        Ok(Self { seen, stop, thread: Some(thread), bed: bed.clone() })
    }

    /// Every version of one object that was seen, the oldest first; of all that had the name, one after the other.
    pub fn versions(&self, kind: &str, name: &str) -> Vec<Value> {
        let seen = lock(&self.seen);
        let of_name = seen.versions.values().filter(|versions| {
            let first = versions.first().unwrap_or(&Value::Null);
            first["kind"] == kind && first["metadata"]["name"] == name
        });
        of_name.flatten().cloned().collect()
    }

    /// Waits until what there is was seen, and answers how many versions that were.
    ///
    /// # Errors
    /// Every step back.
    pub fn check(&self) -> Result<usize> {
        let list = ["get", "vmbackups,imagetransfers,vmcheckpoints", "-A"];
        let items = self.bed.kubectl().json(&list)?["items"].as_array().cloned().unwrap_or_default();
        wait_until(Duration::from_secs(20), "the history to be whole", || {
            let seen = lock(&self.seen);
            let is_seen = |item: &Value| {
                let uid = item["metadata"]["uid"].as_str().unwrap_or_default();
                let version = &item["metadata"]["resourceVersion"];
                seen.versions.get(uid).is_some_and(|versions| {
                    versions.iter().any(|seen| seen["metadata"]["resourceVersion"] == *version)
                })
            };
            Ok(items.iter().all(is_seen).then_some(()))
        })?;
        let seen = lock(&self.seen);
        if !seen.wrong.is_empty() {
            bail!("status went back:\n{}", seen.wrong.join("\n"));
        }
        Ok(seen.count)
    }
}

impl Drop for History {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn follow<K: Resource<DynamicType = ()>>(client: &Client, seen: &Mutex<Seen>) {
    let kind = ApiResource::erase::<K>(&());
    let api = Api::<DynamicObject>::all_with(client.clone(), &kind);
    let mut events = watcher(api, watcher::Config::default()).boxed();
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                lock(seen).take(object, &kind.kind);
            }
            // an API server that is away is what some tests are about
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            Ok(_) => {}
        }
    }
}

impl Seen {
    fn take(&mut self, object: DynamicObject, kind: &str) {
        let uid = object.uid().unwrap_or_default();
        let mut version = serde_json::to_value(object).unwrap_or_default();
        version["kind"] = kind.into();
        version["metadata"]["managedFields"] = Value::Null;
        let versions = self.versions.entry(uid).or_default();
        if let Some(before) = versions.last() {
            if before["metadata"]["resourceVersion"] == version["metadata"]["resourceVersion"] {
                return;
            }
            let name = version["metadata"]["name"].as_str().unwrap_or_default();
            self.wrong.extend(
                steps_back(before, &version).into_iter().map(|what| format!("{kind} {name}: {what}")),
            );
        }
        versions.push(version);
        self.count += 1;
    }
}

/// How far an object is; an unknown phase is a slip of this test.
fn rank(version: &Value) -> Result<u8> {
    let phase = version["status"]["phase"].as_str().unwrap_or("Initializing");
    let is_checkpoint = version["kind"] == "VmCheckpoint";
    Ok(match phase {
        "Initializing" => 0,
        "Ready" => 1,
        // a checkpoint that failed is deleted like any other
        "Failed" if is_checkpoint => 2,
        "Finalizing" => 3,
        "Succeeded" | "Failed" | "Cancelled" if !is_checkpoint => 4,
        other => return Err(anyhow!("{other} is no phase")),
    })
}

/// What of a later version of an object is behind an earlier one. Pure.
fn steps_back(before: &Value, after: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    let (old, new) = (&before["status"], &after["status"]);
    match (rank(before), rank(after)) {
        (Ok(was), Ok(is)) => {
            if is < was || (was == 4 && old["phase"] != new["phase"]) {
                wrong.push(format!("phase {} became {}", old["phase"], new["phase"]));
            }
        }
        (Err(error), _) | (_, Err(error)) => wrong.push(error.to_string()),
    }
    for field in ONCE {
        if !old[field].is_null() && old[field] != new[field] {
            wrong.push(format!("{field} {} became {}", old[field], new[field]));
        }
    }
    if new["observedGeneration"].as_i64() < old["observedGeneration"].as_i64() {
        wrong.push(format!(
            "observedGeneration {} became {}",
            old["observedGeneration"], new["observedGeneration"]
        ));
    }
    for condition in old["conditions"].as_array().into_iter().flatten() {
        let kind = &condition["type"];
        let later = new["conditions"].as_array().into_iter().flatten().find(|later| later["type"] == *kind);
        let Some(later) = later else {
            wrong.push(format!("condition {kind} went"));
            continue;
        };
        let time =
            |condition: &Value| condition["lastTransitionTime"].as_str().unwrap_or_default().to_owned();
        if time(later) < time(condition) {
            wrong.push(format!(
                "condition {kind} turned at {}, and then at {}",
                time(condition),
                time(later)
            ));
        }
        if kind == "HostClean" && condition["status"] == "True" && later["status"] != "True" {
            wrong.push("the host was clean, and is no more".to_owned());
        }
        if rank(before).is_ok_and(|rank| rank == 4)
            && (&condition["status"], &condition["reason"]) != (&later["status"], &later["reason"])
        {
            wrong.push(format!("condition {kind} of an ended object changed: {condition} became {later}"));
        }
    }
    wrong
}

#[test]
fn a_step_back_is_seen() {
    use serde_json::json;
    let version = |kind: &str, status: Value| json!({"kind": kind, "status": status});
    let turned = |status: &str, time: &str| json!([{"type": "HostClean", "status": status, "lastTransitionTime": time, "reason": "Cleaned"}]);
    let (early, late) = ("2026-11-25T01:00:00Z", "2026-11-25T02:00:00Z");
    let cases = [
        ("forward", "VmBackup", json!({}), json!({"phase": "Ready", "readyTime": early}), 0),
        ("two steps at once", "VmBackup", json!({"phase": "Ready"}), json!({"phase": "Failed"}), 0),
        ("back", "VmBackup", json!({"phase": "Ready"}), json!({"phase": "Initializing"}), 1),
        ("status gone", "VmBackup", json!({"phase": "Ready"}), Value::Null, 1),
        ("another end", "VmBackup", json!({"phase": "Failed"}), json!({"phase": "Succeeded"}), 1),
        ("another end", "ImageTransfer", json!({"phase": "Cancelled"}), json!({"phase": "Failed"}), 1),
        ("after its end", "VmCheckpoint", json!({"phase": "Failed"}), json!({"phase": "Finalizing"}), 0),
        ("usable again", "VmCheckpoint", json!({"phase": "Finalizing"}), json!({"phase": "Ready"}), 1),
        ("a time", "VmBackup", json!({"readyTime": early}), json!({"readyTime": late}), 1),
        ("a time that went", "VmBackup", json!({"completionTime": early}), json!({}), 1),
        ("a node", "VmBackup", json!({"nodeName": "node-a"}), json!({"nodeName": "node-b"}), 1),
        ("a generation", "VmBackup", json!({"observedGeneration": 2}), json!({"observedGeneration": 1}), 1),
        ("a condition that went", "VmBackup", json!({"conditions": turned("True", early)}), json!({}), 1),
        (
            "a condition's time",
            "VmBackup",
            json!({"conditions": turned("False", late)}),
            json!({"conditions": turned("True", early)}),
            1,
        ),
        (
            "a clean host",
            "VmBackup",
            json!({"conditions": turned("True", early)}),
            json!({"conditions": turned("False", late)}),
            1,
        ),
        (
            "an ended one's condition",
            "VmBackup",
            json!({"phase": "Failed", "conditions": [{"type": "Ready", "status": "False", "reason": "VmStopped"}]}),
            json!({"phase": "Failed", "conditions": [{"type": "Ready", "status": "False", "reason": "Deleted"}]}),
            1,
        ),
        (
            "its host is clean now",
            "VmBackup",
            json!({"phase": "Failed"}),
            json!({"phase": "Failed", "conditions": turned("True", early)}),
            0,
        ),
    ];
    for (what, kind, before, after, expected) in cases {
        let found = steps_back(&version(kind, before), &version(kind, after));
        assert_eq!(found.len(), expected, "{what}: {found:?}");
    }
}
