//! A real API server takes what the chart renders, and Pod Security admission says of the pods what docs/security.md
//! does. Nothing is stored but a namespace of this test's own.

use anyhow::{Result, ensure};
use rand::Rng as _;
use serde_json::{Value, json};
use virtmark_bed::Bed;
use virtmark_bed::component::VM_NAMESPACE;
use virtmark_bed::kubectl::Kubectl;

use super::chart::{object, objects, render};
use super::values::all_changed;

fn dry_run(kubectl: &Kubectl, objects: &[Value]) -> Result<String> {
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    // Helm 4 applies on the server's side
    let arguments =
        ["apply", "--dry-run=server", "--server-side", "--force-conflicts", "--validate=strict", "-f", "-"];
    kubectl.run_with(&arguments, &list.to_string())
}

#[test]
fn it_is_taken_with_the_default_values_and_with_all_others() -> Result<()> {
    let kubectl = Bed::from_env()?.kubectl();
    let mut changed = all_changed()?;
    changed["domainsNamespace"]["name"] = json!(VM_NAMESPACE);
    // left out: kinds and namespaces are objects too
    changed["crds"]["enabled"] = json!(true);
    changed["domainsNamespace"]["create"] = json!(true);
    changed["networkPolicy"]["enabled"] = json!(true);
    changed["operator"]["podDisruptionBudget"]["enabled"] = json!(true);
    // only with a rolling update
    for component in ["operator", "agent"] {
        changed[component]["updateStrategy"]["rollingUpdate"] = Value::Null;
        // the default one is the system's own, and there is no other
        changed[component]["priorityClassName"] = json!("system-node-critical");
    }
    // the bed has no Prometheus Operator
    for kind in ["podMonitor", "serviceMonitor", "prometheusRule"] {
        changed["monitoring"][kind]["enabled"] = json!(false);
    }
    for values in [json!({}), json!({"namespace": {"create": true}, "agent": {"hostNetwork": true}}), changed]
    {
        let rendered = objects(&render(&values)?)?;
        let taken = dry_run(&kubectl, &rendered)?;
        assert_eq!(taken.lines().count(), rendered.len(), "{values}: {taken}");
    }
    Ok(())
}

/// A namespace of this level of Pod Security, with the accounts of our pods; it goes at the end.
struct Guarded {
    kubectl: Kubectl,
    name: String,
}

impl Guarded {
    fn new(kubectl: Kubectl, level: &str) -> Result<Self> {
        let name = format!("chart-{:08x}", rand::rng().random::<u32>());
        let label = json!({"pod-security.kubernetes.io/enforce": level});
        let metadata = json!({"name": name, "labels": label});
        kubectl.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}).to_string())?;
        let guarded = Self { kubectl, name };
        for account in ["virtmark-operator", "virtmark-agent"] {
            guarded.kubectl.run(&["-n", &guarded.name, "create", "serviceaccount", account])?;
        }
        Ok(guarded)
    }

    /// Whether a pod like this is let in.
    fn lets_in(&self, spec: &Value) -> Result<String> {
        let metadata = json!({"name": "pod", "namespace": self.name});
        dry_run(
            &self.kubectl,
            &[json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})],
        )
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // the bed has no controller that lets a namespace go
        let _ = self.kubectl.run(&["-n", &self.name, "delete", "serviceaccounts", "--all"]);
        let _ = self.kubectl.run(&["delete", "namespace", &self.name, "--wait=false"]);
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.name}, "spec": {}});
        let path = format!("/api/v1/namespaces/{}/finalize", self.name);
        let _ = self.kubectl.run_with(&["replace", "--raw", &path, "-f", "-"], &namespace.to_string());
    }
}

#[test]
fn the_operator_is_restricted_and_the_agent_needs_host_paths_and_a_host_port() -> Result<()> {
    let kubectl = Bed::from_env()?.kubectl();
    let rendered = objects(&render(&json!({}))?)?;
    let operator = &object(&rendered, "Deployment", "virtmark-operator")?["spec"]["template"]["spec"];
    let agent = &object(&rendered, "DaemonSet", "virtmark-agent")?["spec"]["template"]["spec"];
    let check = &object(&rendered, "Pod", "virtmark-check")?["spec"];
    let uninstall = &object(&rendered, "Job", "virtmark-uninstall")?["spec"]["template"]["spec"];
    let restricted = Guarded::new(kubectl.clone(), "restricted")?;
    restricted.lets_in(operator)?;
    restricted.lets_in(check)?;
    restricted.lets_in(uninstall)?;
    let baseline = Guarded::new(kubectl.clone(), "baseline")?;
    let refusal = format!("{:#}", baseline.lets_in(agent).expect_err("it has host paths"));
    let (_, why) = refusal.split_once("violates PodSecurity \"baseline:latest\": ").unwrap_or_default();
    let why: Vec<_> = why.split("), ").filter_map(|reason| reason.split(" (").next()).collect();
    ensure!(why == ["hostPath volumes", "hostPort"], "{refusal}");
    Guarded::new(kubectl, "privileged")?.lets_in(agent)?;
    Ok(())
}
