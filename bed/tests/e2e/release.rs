//! The chart, installed, and what a user does with it: `kubectl`, and a backup client on the nodes' network.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use virtmark_bed::component::{SYSTEM_NAMESPACE, VM_NAMESPACE};
use virtmark_bed::hypervisor::Hypervisor;
use virtmark_bed::nodes::{self, Cluster};
use virtmark_bed::{Disk, Plan, Vm, compare, helm, stock, wait_until};

pub const MIB: u64 = 1 << 20;
/// Long enough for a loaded machine, short enough to end.
pub const BOUND: Duration = Duration::from_secs(90);

/// What is asked for, and what each disk comes to.
pub const FULL: (&str, &str) = ("Full", "Full");
pub const INCREMENTAL: (&str, &str) = ("Incremental", "Incremental");

/// The chart as it is shipped.
pub const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/virtmark");

/// The agent's folder for scratch images on a node, as the chart has it.
const RUN: &str = "var/lib/virtmark-run";

/// The chart, on the cluster; uninstalled at the end.
pub struct Release {
    pub cluster: Cluster,
    pub files: tempfile::TempDir,
    started: Instant,
    succeeded: Cell<bool>,
    _alone: MutexGuard<'static, ()>,
}

impl Release {
    /// Installs it, and waits until operator and agents are there; `values` are `key=value`.
    pub fn install(values: &[&str]) -> Result<Self> {
        Self::install_of(Path::new(CHART), values)
    }

    /// The same of another chart.
    pub fn install_of(chart: &Path, values: &[&str]) -> Result<Self> {
        let release = Self {
            _alone: crate::alone(),
            cluster: Cluster::from_env()?,
            files: tempfile::tempdir()?,
            started: Instant::now(),
            succeeded: Cell::new(false),
        };
        release.upgrade_to(chart, values)?;
        release.say("helm install: operator and agents are there");
        Ok(release)
    }

    /// Installs it, or upgrades it to other values.
    pub fn upgrade(&self, values: &[&str]) -> Result<()> {
        self.upgrade_to(Path::new(CHART), values)
    }

    fn upgrade_to(&self, chart: &Path, values: &[&str]) -> Result<()> {
        let chart = chart.to_str().context("its path is no text")?;
        let images = format!("agent.imageDirs={{{}}}", self.cluster.dir.display());
        let mut arguments =
            vec!["upgrade", "--install", "virtmark", chart, "--create-namespace", "--take-ownership"];
        arguments.extend(["--wait", "--timeout", "3m"]);
        let fixed = ["namespace.create=true", &images, "agent.heartbeatSeconds=2", "operator.leaseSeconds=5"];
        for value in fixed.iter().chain(values) {
            arguments.extend(["--set", value]);
        }
        self.helm(&arguments).map(drop)
    }

    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        let mut helm = self.cluster.network.command(&helm::binary()?.to_string_lossy());
        helm.args(arguments).args(["--namespace", SYSTEM_NAMESPACE, "--kubeconfig"]);
        helm.arg(&self.cluster.plane.kubeconfig).env("HELM_CACHE_HOME", self.files.path());
        output(helm.env("HELM_CONFIG_HOME", self.files.path()).env("HELM_DATA_HOME", self.files.path()))
    }

    /// Prints how far the test is, with the time since it began.
    pub fn say(&self, what: &str) {
        println!("[{:6.1} s] {what}", self.started.elapsed().as_secs_f64());
    }

    /// The test's last word: without it, what there is to see is printed.
    pub fn succeeded(&self) {
        self.succeeded.set(true);
    }

    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.cluster.kubectl().run(&[&["-n", VM_NAMESPACE], arguments].concat())
    }

    /// kubectl in the namespace of operator and agents.
    pub fn system(&self, arguments: &[&str]) -> Result<String> {
        self.cluster.kubectl().run(&[&["-n", SYSTEM_NAMESPACE], arguments].concat())
    }

    /// An object, or null.
    pub fn get(&self, kind: &str, name: &str) -> Result<Value> {
        let text = self.kubectl(&["get", kind, name, "--ignore-not-found", "-o", "json"])?;
        if text.trim().is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&text)?) }
    }

    /// A VM that runs on a node, published.
    pub fn vm(&self, name: &str, node: usize, disks: impl IntoIterator<Item = Disk>) -> Result<Vm> {
        let vm = disks.into_iter().fold(Plan::new(name), Plan::disk).start(self.cluster.node(node)?)?;
        self.published(name, &vm.hypervisor().name, "Running")?;
        Ok(vm)
    }

    /// Waits until the inventory has a VM in a state on a node.
    pub fn published(&self, vm: &str, node: &str, state: &str) -> Result<()> {
        wait_until(BOUND, &format!("{vm} to be published as {state} on {node}"), || {
            let status = self.get("lvd", vm)?["status"].clone();
            Ok((status["state"] == state && status["nodeName"] == node).then_some(()))
        })
    }

    /// Makes a VmBackup.
    pub fn backup(&self, name: &str, vm: &str, more: Value) -> Result<()> {
        let mut spec = json!({"vm": vm});
        if let (Some(spec), Value::Object(more)) = (spec.as_object_mut(), more) {
            spec.extend(more);
        }
        let object = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmBackup",
            "metadata": {"name": name, "namespace": VM_NAMESPACE}, "spec": spec});
        self.cluster.kubectl().run_with(&["create", "-f", "-"], &object.to_string()).map(drop)
    }

    /// Waits for a phase; answers the status. Another end than the one waited for is an error at once.
    pub fn phase(&self, kind: &str, name: &str, phase: &str) -> Result<Value> {
        let mut last = Value::Null;
        wait_until(BOUND, &format!("{kind} {name} to be {phase}"), || {
            last = self.get(kind, name)?["status"].clone();
            let now = last["phase"].as_str().unwrap_or_default();
            if now != phase && ["Succeeded", "Failed", "Cancelled"].contains(&now) {
                bail!("{kind} {name} is {now}, not {phase}");
            }
            Ok((now == phase).then(|| last.clone()))
        })
        .with_context(|| format!("its status: {last}"))
    }

    pub fn wish(&self, kind: &str, name: &str, state: &str) -> Result<()> {
        let patch = json!({"spec": {"state": state}}).to_string();
        self.kubectl(&["patch", kind, name, "--type=merge", "-p", &patch]).map(drop)
    }

    /// Reads a disk of a backup over HTTPS with the stock client, from the nodes' network.
    pub fn download(&self, backup: &str, disk: &str, base: Option<&Path>) -> Result<PathBuf> {
        let transfer = format!("{backup}-{disk}");
        self.phase("imagetransfer", &transfer, "Ready")?;
        let image = self.files.path().join(format!("{transfer}.qcow2"));
        let base = base.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        let python = self.cluster.network.command(&stock::python()?);
        let what = (VM_NAMESPACE, transfer.as_str());
        stock::download(python, &self.cluster.plane.kubeconfig, what, &image, "https", base.as_deref())?;
        Ok(image)
    }

    /// One whole backup of vda of the type `asked`, which comes to `mode`, compared with what the guest had when it began;
    /// answers the image, over `base`.
    pub fn whole_backup(
        &self,
        name: &str,
        vm: &Vm,
        (asked, mode): (&str, &str),
        base: Option<&Path>,
    ) -> Result<PathBuf> {
        let began = Instant::now();
        self.backup(name, &vm.name, json!({"type": asked}))?;
        let status = self.phase("vmbackup", name, "Ready")?;
        ensure!(status["disks"][0]["mode"] == mode, "{name} is not {mode}: {status}");
        ensure!(status["nodeName"] == vm.hypervisor().name.as_str(), "on another node: {status}");
        let ready = began.elapsed();
        let then = vm.remember("vda")?;
        let image = self.download(name, "vda", base)?;
        let read = began.elapsed();
        self.succeed(name)?;
        compare(&then, &image, "qcow2").with_context(|| format!("{name} is not what the guest had"))?;
        self.say(&format!(
            "{name}: {mode} on {}, Ready after {:.2} s, read {:.2} s, succeeded {:.2} s, every byte as the guest had it",
            vm.hypervisor().name,
            ready.as_secs_f64(),
            (read - ready).as_secs_f64(),
            (began.elapsed() - read).as_secs_f64()
        ));
        Ok(image)
    }

    /// Finalizes a backup, and waits until its checkpoint is the next base.
    pub fn succeed(&self, name: &str) -> Result<()> {
        self.wish("vmbackup", name, "Finalized")?;
        let status = self.phase("vmbackup", name, "Succeeded")?;
        let checkpoint = status["toCheckpoint"].as_str().context("it made no checkpoint")?.to_owned();
        wait_until(BOUND, "the next base", || {
            Ok((self.get("vmcp", &checkpoint)?["status"]["base"] == "Next").then_some(()))
        })
    }

    /// Deletes a pod of a component (on a node), at once or within its grace period, and waits until another is ready.
    pub fn replace_pod(&self, component: &str, on: Option<&str>, arguments: &[&str]) -> Result<()> {
        let label = format!("app.kubernetes.io/component={component}");
        let field = on.map_or_else(String::new, |node| format!("spec.nodeName={node}"));
        let delete = ["delete", "pod", "-l", &label, "--field-selector", &field];
        self.system(&[&delete, arguments].concat())?;
        self.rolled_out()
    }

    /// Waits until operator and agents are all there and ready.
    pub fn rolled_out(&self) -> Result<()> {
        for what in ["deployment/virtmark-operator", "daemonset/virtmark-agent"] {
            self.system(&["rollout", "status", what, "--timeout=120s"])?;
        }
        Ok(())
    }

    /// Nothing of backups is on a node: no job, no checkpoint that libvirt knows, no scratch image, no qemu-nbd.
    pub fn node_is_clean(&self, node: &Hypervisor) -> Result<()> {
        for vm in node.virsh(&["list", "--name"])?.split_whitespace() {
            let job = node.virsh(&["domjobinfo", vm])?;
            ensure!(job.contains("None"), "{vm} is in a job: {job}");
            let noted = node.virsh(&["checkpoint-list", "--name", vm])?;
            ensure!(noted.trim().is_empty(), "libvirt has a checkpoint of {vm}: {noted}");
        }
        let run = std::fs::read_dir(node.dir.join(RUN))?;
        let left: Vec<_> = run.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        ensure!(left.iter().all(|name| name == "imageio.sock"), "left on {}: {left:?}", node.name);
        let servers = nodes::within(node, "pgrep")?.args(["-x", "qemu-nbd"]).output()?;
        ensure!(servers.stdout.is_empty(), "a qemu-nbd is left on {}", node.name);
        Ok(())
    }

    /// Uninstalls it, and waits until its pods are gone.
    pub fn uninstall(&self) -> Result<()> {
        self.helm(&["uninstall", "virtmark", "--ignore-not-found", "--wait", "--timeout", "2m"])?;
        wait_until(BOUND, "the pods to go", || {
            Ok(self.system(&["get", "pods", "-o", "name"])?.trim().is_empty().then_some(()))
        })
    }

    /// What the processes of each pod take.
    pub fn print_memory(&self) -> Result<()> {
        for node in &self.cluster.nodes {
            for program in ["operator", "agent"] {
                let output = nodes::within(node, "ps")?.args(["-C", program, "-o", "rss="]).output()?;
                for kib in String::from_utf8_lossy(&output.stdout).split_whitespace() {
                    println!("# {program} on {}: {} MiB resident", node.name, kib.parse::<u64>()? >> 10);
                }
            }
        }
        Ok(())
    }

    pub fn print_images(&self) {
        for image in &self.cluster.images {
            println!("# {}: {:.1} MB to pull", image.name, image.bytes as f64 / 1e6);
        }
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        if !self.succeeded.get() {
            self.print_state();
        }
        // what is left says so in the next test, which begins with an empty namespace
        let objects = ["vmbackups,imagetransfers", "vmcheckpoints"];
        for kinds in objects {
            let _ = self.kubectl(&["delete", kinds, "--all", "--timeout=60s"]);
        }
        let _ = self.uninstall();
    }
}

impl Release {
    /// What there is to see after a test failed.
    fn print_state(&self) {
        let events = ["get", "events", "--sort-by=.lastTimestamp"];
        for (title, said) in [
            ("pods", self.system(&["get", "pods", "-o", "wide"])),
            ("events", self.system(&events)),
            ("objects", self.kubectl(&["get", "virtmark"])),
            ("events", self.kubectl(&events)),
            (
                "operator",
                self.system(&["logs", "-l", "app.kubernetes.io/component=operator", "--tail=30", "--prefix"]),
            ),
            (
                "agents",
                self.system(&["logs", "-l", "app.kubernetes.io/component=agent", "--tail=40", "--prefix"]),
            ),
        ] {
            println!("--- {title}\n{}", said.unwrap_or_else(|error| format!("{error:#}")));
        }
    }
}

/// Runs a command, and answers what it printed.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    if !output.status.success() {
        bail!("{:?}: {}", command.get_args().nth(2), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
