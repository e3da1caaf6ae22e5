//! The bed: a private control plane and private hypervisors on one machine, for demo, tests and benches.
//!
//! ```text
//!   /tmp/vmbed-<id>/   etcd, kube-apiserver (loopback)    operator, agent-node-a, ...
//!      node-a/         namespaces: virtlogd, libvirtd, QEMUs      node-b/ ...
//!      log/  ledger  bed.json
//! ```
//!
//! It records every process it makes and ends those only. It knows nothing of Virtmark's code: it applies
//! `crds/` and `deploy/`, and runs the binaries. It never touches a user's own libvirt, cluster or network.

pub mod cache;
pub mod component;
pub mod controlplane;
pub mod daemon;
pub mod disks;
pub mod golang;
pub mod guest;
pub mod helm;
pub mod hypervisor;
pub mod kubectl;
pub mod ledger;
pub mod namespaces;
pub mod nodes;
pub mod pki;
pub mod registry;
pub mod stock;
pub mod vm;
pub mod wait;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rand::Rng as _;
use serde::{Deserialize, Serialize};

use component::{SYSTEM_NAMESPACE, VM_NAMESPACE};
use controlplane::ControlPlane;
use daemon::Daemon;
use hypervisor::Hypervisor;
use kubectl::Kubectl;
use ledger::Ledger;

pub use vm::{Disk, Plan, Vm, compare};
pub use wait::wait_until;

/// What is to be brought up.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many hypervisors, named node-a, node-b, ...
    pub hypervisors: usize,
    /// The repository, with `crds/` and `deploy/`.
    pub repository: PathBuf,
    /// Whether it outlives this process.
    pub keep: bool,
}

/// A bed that is up. It is stored in its folder, for other processes to use.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bed {
    /// Its folder.
    pub dir: PathBuf,
    /// Its control plane.
    pub plane: ControlPlane,
    /// Its hypervisors.
    pub hypervisors: Vec<Hypervisor>,
    /// The operator.
    pub operator: Daemon,
    /// The agents, in the hypervisors' order.
    pub agents: Vec<Daemon>,
}

impl Bed {
    /// Brings one up. On failure, what was made is taken down again.
    ///
    /// # Errors
    /// What did not come up, and where its log is.
    pub fn up(options: &Options) -> Result<Self> {
        check_machine()?;
        controlplane::binaries()?;
        kubectl::search_path()?;
        make(options.keep, |dir| Self::raise(dir, options))
    }

    fn raise(dir: &Path, options: &Options) -> Result<Self> {
        let ledger = Ledger::of(dir);
        let names: Vec<String> = ('a'..='z').take(options.hypervisors).map(|c| format!("node-{c}")).collect();
        // the control plane and the hypervisors come up side by side
        let (plane, hypervisors) = std::thread::scope(|scope| {
            let started: Vec<_> =
                names.iter().map(|name| scope.spawn(|| Hypervisor::start_new(dir, name, &ledger))).collect();
            let plane = ControlPlane::start(dir);
            let hypervisors = started.into_iter().map(|handle| match handle.join() {
                Ok(result) => result,
                Err(_) => bail!("a thread that starts a hypervisor died"),
            });
            (plane, hypervisors.collect::<Result<Vec<_>>>())
        });
        let (plane, hypervisors) = (plane?, hypervisors?);
        install(&plane, &hypervisors, &options.repository)?;
        let operator = component::operator(dir, &plane, "operator")?;
        let agents = hypervisors.iter().map(|hypervisor| component::agent(dir, &plane, hypervisor));
        let agents = agents.collect::<Result<_>>()?;
        let bed = Self { dir: dir.to_owned(), plane, hypervisors, operator, agents };
        bed.store()?;
        Ok(bed)
    }

    /// Stores it in its folder; to be called after a daemon was started again.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store(&self) -> Result<()> {
        Ok(fs::write(self.dir.join("bed.json"), serde_json::to_string_pretty(self)?)?)
    }

    /// The bed in `dir`, made by another process.
    ///
    /// # Errors
    /// When there is none.
    pub fn attach(dir: &Path) -> Result<Self> {
        let stored =
            fs::read(dir.join("bed.json")).with_context(|| format!("no bed in {}", dir.display()))?;
        Ok(serde_json::from_slice(&stored)?)
    }

    /// The bed that `VIRTMARK_BED` names.
    ///
    /// # Errors
    /// When it names none.
    pub fn from_env() -> Result<Self> {
        let dir = env::var_os("VIRTMARK_BED")
            .context("VIRTMARK_BED names no bed: run `make test`, or `make up` and set what it prints")?;
        Self::attach(Path::new(&dir))
    }

    /// kubectl as the administrator.
    pub fn kubectl(&self) -> Kubectl {
        self.plane.kubectl()
    }

    /// Everything that operator, agents and image servers logged so far.
    pub fn logs(&self) -> String {
        std::iter::once(&self.operator).chain(&self.agents).map(Daemon::log).collect()
    }

    /// Writes that the API took of one user, from the audit log: `(verb, resource/subresource, name)`.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn writes_by(&self, user_contains: &str) -> Result<Vec<(String, String, String)>> {
        let log = fs::read_to_string(&self.plane.audit_log)?;
        let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let taken = lines.filter(|line| {
            let user = line["user"]["username"].as_str().unwrap_or_default();
            user.contains(user_contains)
                && line["responseStatus"]["code"].as_u64().is_some_and(|code| code < 300)
        });
        Ok(taken
            .map(|line| {
                let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
                let object = &line["objectRef"];
                let sub = text(&object["subresource"]);
                let slash = if sub.is_empty() { "" } else { "/" };
                (
                    text(&line["verb"]),
                    format!("{}{slash}{sub}", text(&object["resource"])),
                    text(&object["name"]),
                )
            })
            .collect())
    }

    /// Takes it down.
    pub fn down(&self) {
        down(&self.dir);
    }
}

/// Has `raise` bring something up in a new folder, which is known to be a bed's. On failure it is taken down again.
fn make<T>(keep: bool, raise: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    registry::sweep()?;
    let id: u32 = rand::rng().random();
    let dir = PathBuf::from(format!("/tmp/vmbed-{:06x}", id & 0xff_ffff));
    registry::register(&dir, keep)?;
    fs::create_dir_all(dir.join("log"))?;
    raise(&dir).inspect_err(|_| {
        let logs = PathBuf::from(format!("{}.log", dir.display()));
        if fs::rename(dir.join("log"), &logs).is_ok() {
            eprintln!("the logs of the bed that did not come up are in {}", logs.display());
        }
        down(&dir);
    })
}

/// Takes the bed in `dir` down: its processes by its ledger, then its folder. Can be repeated.
pub fn down(dir: &Path) {
    Ledger::of(dir).end_all();
    if let Some(name) = dir.file_name() {
        nodes::remove_cgroups(Path::new(name));
    }
    // QEMU's sockets and files may go at the same time as we look: try again
    let gone = wait_until(Duration::from_secs(5), "the bed's folder to go", || {
        let _ = fs::remove_dir_all(dir);
        Ok((!dir.exists()).then_some(()))
    });
    if let Err(error) = gone {
        eprintln!("{error}");
    }
    if let Err(error) = registry::unregister(dir) {
        eprintln!("the bed is down, and still registered: {error}");
    }
}

/// Nodes, namespaces, CRDs and RBAC.
fn install(plane: &ControlPlane, hypervisors: &[Hypervisor], repository: &Path) -> Result<()> {
    let kubectl = plane.kubectl();
    let mut objects = String::new();
    for namespace in [SYSTEM_NAMESPACE, VM_NAMESPACE] {
        objects += &format!("---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: {namespace}}}}}\n");
    }
    for hypervisor in hypervisors {
        let address = format!("{{type: InternalIP, address: {}}}", component::ADVERTISED);
        objects += &format!(
            "---\n{{apiVersion: v1, kind: Node, metadata: {{name: {}}}, status: {{addresses: [{address}]}}}}\n",
            hypervisor.name
        );
    }
    kubectl.apply(&objects)?;
    let folder = |name: &str| repository.join(name).to_string_lossy().into_owned();
    kubectl.run(&["apply", "--server-side", "-f", &folder("crds")])?;
    let established = ["wait", "--for=condition=Established", "--timeout=30s", "-f", &folder("crds")];
    kubectl.run(&established)?;
    kubectl.run(&["apply", "-f", &folder("deploy")])?;
    Ok(())
}

/// What this machine lacks, before anything is changed.
fn check_machine() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("a bed needs root: its hypervisors are namespaces of their own");
    }
    for (program, package) in [
        ("libvirtd", "libvirt-daemon-system"),
        ("virtlogd", "libvirt-daemon"),
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("qemu-img", "qemu-utils"),
        ("virsh", "libvirt-clients"),
        ("unshare", "util-linux"),
    ] {
        if !is_installed(program) {
            bail!("{program} is missing: `make up` installs package {package}");
        }
    }
    Ok(())
}

fn is_installed(program: &str) -> bool {
    let found = ["/usr/sbin", "/usr/bin", "/usr/local/bin", "/sbin", "/bin"];
    let on_path =
        env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default();
    let mut folders = found.iter().map(PathBuf::from).chain(on_path);
    folders.any(|folder| folder.join(program).exists())
}
