//! A real etcd and kube-apiserver on free loopback ports. Nodes are objects only, until kubelets are added.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::cache;
use crate::kubectl::Kubectl;
use crate::ledger::{Ledger, Process};
use crate::pki::Pki;
use crate::wait::wait_until;

const GO_MOD: &str = include_str!("../controlplane/go.mod");
const GO_SUM: &str = include_str!("../controlplane/go.sum");
const VERSION: &str = "v1.37.2";
const TOOLS: [(&str, &str); 2] =
    [("etcd", "go.etcd.io/etcd/server/v3"), ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver")];
const KUBECTL: (&str, &str) = ("kubectl", "k8s.io/kubernetes/cmd/kubectl");

/// Writes by every user are logged, so that tests can count them.
const AUDIT_POLICY: &str = "apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: Metadata, verbs: [create, update, patch, delete, deletecollection]}
- {level: None}
";

/// The folder with `etcd` and `kube-apiserver`; built with Go the first time (about five minutes on 2 cores).
///
/// # Errors
/// When Go is missing, or a build fails.
pub fn binaries() -> Result<PathBuf> {
    build("controlplane", &TOOLS, "about five minutes")
}

/// The folder with a `kubectl` of the control plane's version, for a machine that has none.
///
/// # Errors
/// When Go is missing, or the build fails.
pub fn kubectl_binary() -> Result<PathBuf> {
    build("kubectl", &[KUBECTL], "about a minute")
}

/// Builds tools of `controlplane/go.mod`, once a machine.
fn build(name: &str, tools: &[(&str, &str)], time: &str) -> Result<PathBuf> {
    cache::keyed(name, &[GO_MOD, GO_SUM, VERSION], |dir| {
        eprintln!("building {name} {VERSION}, once on this machine: {time}");
        fs::write(dir.join("go.mod"), GO_MOD)?;
        fs::write(dir.join("go.sum"), GO_SUM)?;
        let base = "k8s.io/component-base/version";
        let flags =
            format!("-s -w -X {base}.gitVersion={VERSION} -X {base}.gitMajor=1 -X {base}.gitMinor=37");
        for (name, package) in tools {
            let built = Command::new("go")
                .args(["build", "-trimpath", "-ldflags", &flags, "-o", name, package])
                .env("CGO_ENABLED", "0")
                .current_dir(dir)
                .status()
                .context("go cannot be run: install Go 1.26 from https://go.dev/dl")?;
            if !built.success() {
                bail!("go build of {name} failed");
            }
        }
        Ok(())
    })
}

/// A control plane that runs.
#[derive(Clone, Debug)]
pub struct ControlPlane {
    /// The administrator's kubeconfig.
    pub kubeconfig: PathBuf,
    /// The API server's URL.
    pub url: String,
    /// One JSON object a line for each write to the API.
    pub audit_log: PathBuf,
    /// The CA's certificate.
    pub ca: PathBuf,
}

impl ControlPlane {
    /// Starts both in `dir`, and waits until the API server is ready.
    ///
    /// # Errors
    /// When one of them does not come up; their logs are in `dir`/log.
    pub fn start(dir: &Path, ledger: &Ledger) -> Result<Self> {
        let binaries = binaries()?;
        let pki = Pki::make(&dir.join("pki"))?;
        let [etcd_port, peer_port, api_port] = free_ports()?;
        let etcd = format!("http://127.0.0.1:{etcd_port}");
        let peer = format!("http://127.0.0.1:{peer_port}");
        let data = dir.join("etcd");
        let mut command = Command::new(binaries.join("etcd"));
        command
            .arg("--data-dir")
            .arg(&data)
            .args(["--listen-client-urls", &etcd, "--advertise-client-urls", &etcd])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--unsafe-no-fsync", "--log-level=warn"]);
        spawn(&mut command, "etcd", dir, ledger)?;

        let policy = dir.join("audit-policy.yaml");
        fs::write(&policy, AUDIT_POLICY)?;
        let plane = Self {
            kubeconfig: dir.join("admin.kubeconfig"),
            url: format!("https://127.0.0.1:{api_port}"),
            audit_log: dir.join("log/audit.log"),
            ca: pki.path("ca.crt"),
        };
        let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let mut command = Command::new(binaries.join("kube-apiserver"));
        command
            .args([format!("--etcd-servers={etcd}"), format!("--secure-port={api_port}")])
            .args([
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                "--endpoint-reconciler-type=none",
            ])
            .arg(flag("cert-dir", &dir.join("pki")))
            .arg(flag("tls-cert-file", &pki.path("apiserver.crt")))
            .arg(flag("tls-private-key-file", &pki.path("apiserver.key")))
            .arg(flag("client-ca-file", &plane.ca))
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg(flag("service-account-key-file", &pki.path("accounts.pub")))
            .arg(flag("service-account-signing-key-file", &pki.path("accounts.key")))
            .args(["--service-cluster-ip-range=10.96.0.0/16", "--authorization-mode=Node,RBAC"])
            .args(["--enable-admission-plugins=NodeRestriction", "--allow-privileged=true"])
            .arg(flag("audit-policy-file", &policy))
            .arg(flag("audit-log-path", &plane.audit_log));
        let apiserver = spawn(&mut command, "kube-apiserver", dir, ledger)?;

        let file = |name: &str| pki.path(name).to_string_lossy().into_owned();
        let user = json!({"client-certificate": file("admin.crt"), "client-key": file("admin.key")});
        write_kubeconfig(&plane.kubeconfig, &plane, &user)?;
        let kubectl = plane.kubectl();
        wait_until(Duration::from_secs(60), "kube-apiserver to be ready", || {
            if !apiserver.is_alive() {
                bail!("kube-apiserver ended; see {}", dir.join("log/kube-apiserver.log").display());
            }
            Ok(kubectl.run(&["get", "--raw", "/readyz"]).ok().filter(|answer| answer == "ok"))
        })?;
        Ok(plane)
    }

    /// kubectl as the administrator.
    pub fn kubectl(&self) -> Kubectl {
        Kubectl::new(&self.kubeconfig)
    }
}

/// Writes a kubeconfig for `user` (a kubeconfig user object), readable by its owner alone.
///
/// # Errors
/// When it cannot be written.
pub fn write_kubeconfig(path: &Path, plane: &ControlPlane, user: &serde_json::Value) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    // JSON is YAML
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "bed", "cluster": {"server": plane.url, "certificate-authority": plane.ca}}],
        "users": [{"name": "user", "user": user}],
        "contexts": [{"name": "bed", "context": {"cluster": "bed", "user": "user"}}],
        "current-context": "bed",
    });
    fs::write(path, serde_json::to_string_pretty(&config)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}

/// Starts a daemon in a process group of its own, with its log in `dir`/log, and records it.
///
/// # Errors
/// When it cannot be started.
pub fn spawn(command: &mut Command, what: &str, dir: &Path, ledger: &Ledger) -> Result<Process> {
    let log = File::options().create(true).append(true).open(dir.join("log").join(format!("{what}.log")))?;
    let child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C in the terminal is for the bed, which takes its daemons down in order
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {what}"))?;
    let process = Process::find(child.id(), what, false).with_context(|| format!("{what} ended at once"))?;
    ledger.add(&process)?;
    // its parent may be gone before it is: zombies are reaped here as long as this process lives
    std::thread::spawn(move || {
        let mut child = child;
        child.wait()
    });
    Ok(process)
}

/// Three loopback ports that nobody used a moment ago.
///
/// # Errors
/// When the machine has none.
pub fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut ports = [0; N];
    let mut held = Vec::with_capacity(N);
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}
