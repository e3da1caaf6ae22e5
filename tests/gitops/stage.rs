//! The bed, for this test alone: processes that stand still, objects that are recorded, and all of it put right at the
//! end, also of a test that failed.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark_bed::component::SYSTEM_NAMESPACE;
use virtmark_bed::daemon::Daemon;
use virtmark_bed::wait_until;

use super::expected::row;
use super::golden::Objects;
use super::reapply;
use super::rig::{BOUND, Rig};

/// The hypervisor whose agent is stopped.
pub const NODE: usize = 1;

pub struct Stage {
    pub rig: Rig,
    pub recorded: Objects,
    manifests: BTreeMap<String, Value>,
    sightings: Vec<(String, String)>,
}

impl Stage {
    pub fn new(rig: Rig) -> Self {
        Self { rig, recorded: Objects::new(), manifests: BTreeMap::new(), sightings: Vec::new() }
    }

    /// Stops a process where it stands.
    pub fn stop(daemon: &Daemon) -> Result<()> {
        daemon.pause();
        wait_until(BOUND, "a process to stop", || Ok(daemon.process.is_paused().then_some(())))
    }

    pub fn agent(&mut self) -> &mut Daemon {
        &mut self.rig.bed.agents[NODE]
    }

    /// Applies a new object; answers its manifest.
    pub fn apply(&mut self, resource: &'static str, kind: &str, name: &str, spec: &Value) -> Result<Value> {
        let manifest = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": kind,
            "metadata": {"name": name, "namespace": "vms"}, "spec": spec});
        self.rig.made(resource, name);
        reapply::apply(&self.rig, &manifest)?;
        self.manifests.insert(reapply::reference(&manifest), manifest.clone());
        Ok(manifest)
    }

    /// Records objects that stand still in these phases, and applies them again: `(kind, phase, name)`.
    pub fn record(&mut self, standing: &[(&str, &str, &str)]) -> Result<()> {
        let phases: Vec<&str> = standing.iter().map(|(_, phase, _)| *phase).collect();
        self.try_record(standing).with_context(|| format!("in the phases {}", phases.join(", ")))
    }

    fn try_record(&mut self, standing: &[(&str, &str, &str)]) -> Result<()> {
        let references: Vec<String> = standing
            .iter()
            .map(|(kind, _, name)| format!("{}.virtmark.dev/{name}", kind.to_lowercase()))
            .collect();
        // what Virtmark made itself is applied as it is, without the state that people set
        let unknown: Vec<String> =
            references.iter().filter(|reference| !self.manifests.contains_key(*reference)).cloned().collect();
        if !unknown.is_empty() {
            let found: Vec<Value> = reapply::served(&self.rig, &unknown)?
                .into_iter()
                .map(|object| manifest_of(&object))
                .collect();
            self.manifests.extend(unknown.into_iter().zip(found));
        }
        let manifests: Vec<Value> =
            references.iter().map(|reference| self.manifests[reference].clone()).collect();
        let objects = reapply::changes_nothing(&self.rig, &manifests)?;
        let waited = reapply::waited_for(&self.rig, &references)?;
        for (((kind, phase, _), reference), mut object) in standing.iter().zip(&references).zip(objects) {
            let expected = row(kind, phase).conditions;
            for (condition, met) in &waited {
                ensure!(
                    met.contains(reference) == expected.contains(condition),
                    "kubectl wait --for=condition={condition} {reference}, {phase}: {object}"
                );
            }
            if let Some(metadata) = object["metadata"].as_object_mut() {
                metadata.remove("managedFields");
            }
            self.recorded.entry((*kind).to_owned()).or_default().insert((*phase).to_owned(), object);
        }
        Ok(())
    }

    /// Tells of a domain as the agent of a node would, by a sighting.
    pub fn sight(&mut self, node: &str, name: &str, uuid: &str, state: &str, disks: &Value) -> Result<()> {
        let sighting = format!("{node}.{uuid}");
        let object = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "DomainSighting",
            "metadata": {"name": sighting, "namespace": SYSTEM_NAMESPACE},
            "spec": {"nodeName": node, "uuid": uuid, "name": name, "state": state, "disks": disks}});
        self.sightings.push((sighting, name.to_owned()));
        self.rig.bed.kubectl().apply(&object.to_string())?;
        self.published(name, state)
    }

    pub fn published(&self, name: &str, state: &str) -> Result<()> {
        wait_until(BOUND, &format!("{name} to be published as {state}"), || {
            Ok((self.rig.get("lvd", name)?["status"]["state"] == state).then_some(()))
        })
    }

    /// Removes the sighting of a domain.
    pub fn unsight(&self, name: &str) -> Result<()> {
        for (sighting, _) in self.sightings.iter().filter(|(_, of)| of == name) {
            let delete = ["delete", "domainsighting", sighting, "-n", SYSTEM_NAMESPACE, "--ignore-not-found"];
            self.rig.bed.kubectl().run(&delete)?;
        }
        Ok(())
    }

    /// Waits until what the object says answers its newest spec.
    pub fn answered(&self, kind: &str, name: &str) -> Result<()> {
        wait_until(BOUND, &format!("{kind} {name} to be answered"), || {
            let object = self.rig.get(kind, name)?;
            let answered = object["status"]["observedGeneration"] == object["metadata"]["generation"];
            Ok(answered.then_some(()))
        })
    }

    fn put_right(&mut self) -> Result<()> {
        self.rig.bed.operator.restart(&[])?;
        self.rig.bed.agents[NODE].restart(&[])?;
        self.rig.bed.store()?;
        for (_, name) in &self.sightings {
            self.unsight(name)?;
            self.rig.kubectl(&["delete", "lvd", name, "--ignore-not-found", "--timeout=30s"])?;
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // a test that failed says why already
        let _ = self.put_right();
    }
}

fn manifest_of(object: &Value) -> Value {
    let mut spec = object["spec"].clone();
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("state");
    }
    let metadata = &object["metadata"];
    let mut manifest = json!({"apiVersion": object["apiVersion"], "kind": object["kind"], "spec": spec,
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]}});
    if !metadata["labels"].is_null() {
        manifest["metadata"]["labels"] = metadata["labels"].clone();
    }
    manifest
}
