//! A real cluster on one machine: a control plane with controllers and scheduler, and nodes with kubelet, kube-proxy,
//! containerd and a libvirtd of their own.
//!
//! ```text
//!   network      a bridge; etcd, kube-apiserver, kube-controller-manager, kube-scheduler are in it
//!   node-a       mount, UTS, IPC, network and PID namespaces: libvirtd, QEMUs, containerd, kubelet, pods
//!   node-b       ...
//! ```
//!
//! Each line is the namespaces of one PID 1, which one SIGKILL takes down. Nothing appears in the machine's own network.
//! Outside its folder a cluster has control groups, named after that folder. It knows nothing of Virtmark.

pub mod config;
pub mod images;
pub mod init;
pub mod network;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::controlplane::{self, ControlPlane};
use crate::daemon::Daemon;
use crate::hypervisor::Hypervisor;
use crate::kubectl::{self, Kubectl};
use crate::ledger::{Ledger, Process};
use crate::pki::Pki;
use crate::vm::run;
use crate::wait::wait_until;
use images::Image;
use network::{CONTROL_PLANE, Network};

/// A cluster that is up. It is stored in its folder, for other processes to use.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cluster {
    /// Its folder.
    pub dir: PathBuf,
    /// Its network.
    pub network: Network,
    /// Its API server.
    pub plane: ControlPlane,
    /// kube-controller-manager and kube-scheduler.
    pub controllers: Vec<Daemon>,
    /// Its nodes.
    pub nodes: Vec<Hypervisor>,
    /// The images that were built for it, which are on its nodes.
    pub images: Vec<Image>,
}

impl Cluster {
    /// Brings one up with `nodes` nodes, on which are the images that `build` builds in the cluster's folder. On failure,
    /// what was made is taken down again.
    ///
    /// # Errors
    /// What did not come up, and where its log is.
    pub fn up(nodes: usize, build: impl FnOnce(&Path) -> Result<Vec<Image>>) -> Result<Self> {
        check_machine()?;
        controlplane::binaries()?;
        controlplane::node_binaries()?;
        kubectl::search_path()?;
        crate::make(false, |dir| {
            let began = Instant::now();
            let images = build(dir)?;
            eprintln!("{} images built in {:.1} s", images.len(), began.elapsed().as_secs_f64());
            let began = Instant::now();
            let cluster = Self::raise(dir, nodes, images)?;
            eprintln!("{nodes} nodes with all images are Ready after {:.1} s", began.elapsed().as_secs_f64());
            Ok(cluster)
        })
    }

    fn raise(dir: &Path, count: usize, images: Vec<Image>) -> Result<Self> {
        let ledger = Ledger::of(dir);
        let pki = Pki::make(&dir.join("pki"), CONTROL_PLANE)?;
        let network = Network::start(dir, count, &ledger)?;
        let (plane, controllers) = ControlPlane::start_in(dir, &pki, &network)?;
        let binaries = controlplane::node_binaries()?;
        let mut nodes = Vec::new();
        for (index, letter) in (1..=count).zip('a'..='z') {
            let address = network::node_address(index);
            let node = Hypervisor::make(dir, &format!("node-{letter}"), Some(&address))?;
            config::write(&node, index, count, &plane, &pki, &binaries)?;
            nodes.push(node);
        }
        let mut cluster = Self { dir: dir.to_owned(), network, plane, controllers, nodes, images };
        for index in 0..count {
            cluster.begin(index)?;
        }
        let pause = images::bases()?.join("pause.tar");
        let archives: Vec<_> = cluster.images.iter().map(|image| &image.archive).chain([&pause]).collect();
        std::thread::scope(|scope| {
            let archives = &archives;
            let ready = |node| {
                move || -> Result<()> {
                    let node: &Hypervisor = node;
                    node.ready()?;
                    archives.iter().try_for_each(|archive| import(node, archive))
                }
            };
            let waiting: Vec<_> = cluster.nodes.iter().map(|node| scope.spawn(ready(node))).collect();
            let mut ends = waiting.into_iter().map(|thread| thread.join().ok().context("a thread died")?);
            ends.try_for_each(|end| end)
        })?;
        for node in &cluster.nodes {
            cluster.ready(&node.name)?;
        }
        cluster.store()?;
        Ok(cluster)
    }

    /// Starts a node, and lays its wire.
    fn begin(&mut self, index: usize) -> Result<()> {
        let node = self.nodes.get_mut(index).with_context(|| format!("there is no node {index}"))?;
        make_cgroups(&node.dir)?;
        let init = node.begin("node-init", &["--net"], &Ledger::of(&self.dir))?;
        self.network.plug(&node.name, &init)
    }

    /// Stores it in its folder; to be called after a node was started again.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store(&self) -> Result<()> {
        Ok(fs::write(self.dir.join("cluster.json"), serde_json::to_string_pretty(self)?)?)
    }

    /// The cluster that `VIRTMARK_BED` names.
    ///
    /// # Errors
    /// When it names none.
    pub fn from_env() -> Result<Self> {
        let dir =
            std::env::var_os("VIRTMARK_BED").context("VIRTMARK_BED names no cluster: run `make e2e`")?;
        let stored =
            fs::read(Path::new(&dir).join("cluster.json")).context("it is no cluster: run `make e2e`")?;
        Ok(serde_json::from_slice(&stored)?)
    }

    /// kubectl as the administrator.
    pub fn kubectl(&self) -> Kubectl {
        self.plane.kubectl()
    }

    /// A node's name by its place.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn node(&self, index: usize) -> Result<&Hypervisor> {
        self.nodes.get(index).with_context(|| format!("the cluster has no node {index}"))
    }

    /// Waits until the API server says that a node is ready.
    ///
    /// # Errors
    /// When it is not within two minutes.
    pub fn ready(&self, node: &str) -> Result<()> {
        let ready = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
        wait_until(Duration::from_secs(120), &format!("{node} to be Ready"), || {
            let said = self.kubectl().run(&["get", "node", node, "--ignore-not-found", "-o", ready]);
            Ok((said? == "True").then_some(()))
        })
    }

    /// Cuts a node's power: every process in it is gone at once.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn power_off(&mut self, index: usize) -> Result<()> {
        self.nodes.get_mut(index).context("there is no such node")?.power_off();
        self.store()
    }

    /// Powers it on again, and waits until its libvirtd answers.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn power_on(&mut self, index: usize) -> Result<()> {
        // what a boot would have cleared: kubelets take long over what is left
        remove_cgroups(&config::cgroup(&self.node(index)?.dir));
        self.begin(index)?;
        self.store()?;
        self.node(index)?.ready()
    }
}

/// A command that runs in a node.
///
/// # Errors
/// When the node is off.
pub fn within(node: &Hypervisor, program: &str) -> Result<Command> {
    let mut command = Command::new("nsenter");
    let pid = node.init()?.pid.to_string();
    command.args(["--target", &pid, "--mount", "--uts", "--ipc", "--net", "--pid", "--", program]);
    Ok(command)
}

/// Gives a node the images of an archive.
fn import(node: &Hypervisor, archive: &Path) -> Result<()> {
    wait_until(Duration::from_secs(30), "containerd", || {
        if !node.init().is_ok_and(Process::is_alive) {
            bail!(
                "{} ended: {}",
                node.name,
                fs::read_to_string(node.dir.join("init.log")).unwrap_or_default()
            );
        }
        Ok(within(node, "ctr")?.arg("version").output()?.status.success().then_some(()))
    })?;
    run(within(node, "ctr")?.args(["--namespace", "k8s.io", "images", "import"]).arg(archive))
        .with_context(|| format!("{} on {}", archive.display(), node.name))
}

const CGROUPS: &str = "/sys/fs/cgroup";

/// The roots of the control group hierarchies: one (version 2), or one for each controller.
fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new(CGROUPS);
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    let all = fs::read_dir(root).into_iter().flatten().filter_map(Result::ok);
    all.map(|entry| entry.path()).filter(|path| path.join("cgroup.procs").exists()).collect()
}

fn make_cgroups(node: &Path) -> Result<()> {
    let ours = config::cgroup(node);
    for root in hierarchies() {
        let mut at = root.clone();
        for part in ours.iter().skip(1) {
            at.push(part);
            if at.exists() {
                continue;
            }
            fs::create_dir(&at).with_context(|| format!("cannot make {}", at.display()))?;
            // version 1 gives a new one no processors and no memory
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if root.join(file).exists() {
                    fs::write(at.join(file), fs::read(root.join(file))?)?;
                }
            }
        }
    }
    Ok(())
}

/// Removes the control groups below each hierarchy's root; their processes are gone, or just going.
pub(crate) fn remove_cgroups(ours: &Path) {
    for root in hierarchies() {
        let top = root.join(ours.strip_prefix("/").unwrap_or(ours));
        let gone = wait_until(Duration::from_secs(5), &format!("{} to go", top.display()), || {
            remove_folders(&top);
            Ok((!top.exists()).then_some(()))
        });
        if let Err(error) = gone {
            eprintln!("{error}");
        }
    }
}

/// Removes a folder of control groups from its leaves up; their files cannot be removed, and need not be.
fn remove_folders(top: &Path) {
    let entries = fs::read_dir(top).into_iter().flatten().filter_map(Result::ok);
    for folder in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_folders(&folder.path());
    }
    // one that still has a process is tried again
    let _ = fs::remove_dir(top);
}

/// What this machine lacks, before anything is changed.
fn check_machine() -> Result<()> {
    crate::check_machine()?;
    let programs =
        ["containerd", "ctr", "runc", "buildah", "debootstrap", "iptables", "conntrack", "ip", "nsenter"];
    for program in programs {
        if !crate::is_installed(program) {
            bail!("{program} is missing: `make e2e` installs what a cluster needs");
        }
    }
    if !Path::new("/usr/lib/cni/ptp").exists() {
        bail!("/usr/lib/cni/ptp is missing: install containernetworking-plugins");
    }
    Ok(())
}
