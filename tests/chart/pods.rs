//! The pods of the default values, as they are kept in `pods.yaml`: what they may do is not changed by accident.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use serde_saphyr::SerializerOptions;
use virtmark_bed::component::AGENT_CAPABILITIES;

use super::chart::{object, objects, render};

const GOLDEN: &str = "tests/chart/pods.yaml";

/// Each pod, by the name of what makes it.
fn pods() -> Result<Value> {
    let rendered = objects(&render(&json!({}))?)?;
    Ok(json!({
        "operator": object(&rendered, "Deployment", "virtmark-operator")?["spec"]["template"],
        "agent": object(&rendered, "DaemonSet", "virtmark-agent")?["spec"]["template"],
        "check": object(&rendered, "Pod", "virtmark-check")?["spec"],
        "uninstall": object(&rendered, "Job", "virtmark-uninstall")?["spec"]["template"],
    }))
}

#[test]
fn they_are_as_recorded() -> Result<()> {
    let pods = pods()?;
    if std::env::var_os("VIRTMARK_GOLDEN").is_some_and(|wish| wish == "write") {
        let mut plain = SerializerOptions::default();
        plain.prefer_block_scalars = false;
        let mut text = String::new();
        serde_saphyr::to_fmt_writer_with_options(&mut text, &pods, plain)?;
        fs::write(GOLDEN, text)?;
    }
    let kept: Value = serde_saphyr::from_str(&fs::read_to_string(GOLDEN).context(GOLDEN)?)?;
    for name in ["operator", "agent", "check", "uninstall"] {
        assert_eq!(
            pods[name], kept[name],
            "the pod of {name}. If that is right: VIRTMARK_GOLDEN=write cargo test --test chart"
        );
    }
    Ok(())
}

/// So all tests on a bed are tests of what the chart gives.
#[test]
fn agents_of_a_bed_have_the_capabilities_that_the_chart_gives() -> Result<()> {
    let pods = pods()?;
    let capabilities = &pods["agent"]["spec"]["containers"][0]["securityContext"]["capabilities"];
    assert_eq!(*capabilities, json!({"drop": ["ALL"], "add": AGENT_CAPABILITIES}));
    Ok(())
}

#[test]
fn no_pod_has_more_of_the_host_than_it_says() -> Result<()> {
    for (name, pod) in pods()?.as_object().context("pods")? {
        let spec = if pod["spec"].is_object() { &pod["spec"] } else { pod };
        for namespace in ["hostNetwork", "hostPID", "hostIPC"] {
            ensure!(spec[namespace].is_null(), "{name} has {namespace}");
        }
        let context = &spec["containers"][0]["securityContext"];
        ensure!(context["privileged"].is_null() && context["allowPrivilegeEscalation"] == false, "{name}");
        ensure!(context["readOnlyRootFilesystem"] == true, "{name}");
        ensure!(spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", "{name}");
        ensure!(spec["containers"].as_array().is_some_and(|all| all.len() == 1), "{name}");
    }
    Ok(())
}
