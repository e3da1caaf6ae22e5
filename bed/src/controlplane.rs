//! A real etcd and kube-apiserver: on free loopback ports, where nodes are objects only, or in a network of their own, with
//! controllers and scheduler, for real nodes (`nodes`).

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rand::Rng as _;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cache;
use crate::daemon::Daemon;
use crate::golang;
use crate::kubectl::Kubectl;
use crate::nodes::network::{self, Network};
use crate::pki::Pki;
use crate::vm::run;
use crate::wait::wait_until;

const GO_MOD: &str = include_str!("../controlplane/go.mod");
const GO_SUM: &str = include_str!("../controlplane/go.sum");
const VERSION: &str = "v1.37.2";
const TOOLS: [(&str, &str); 2] =
    [("etcd", "go.etcd.io/etcd/server/v3"), ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver")];
const NODES: [(&str, &str); 4] = [
    ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
    ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
];
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

/// The folder with what real nodes need besides: controllers, scheduler, kubelet, kube-proxy.
///
/// # Errors
/// When Go is missing, or a build fails.
pub fn node_binaries() -> Result<PathBuf> {
    build("nodes", &NODES, "about eight minutes")
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
            golang::build(dir, name, package, &flags)?;
        }
        Ok(())
    })
}

/// A control plane that runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ControlPlane {
    /// The administrator's kubeconfig.
    pub kubeconfig: PathBuf,
    /// The API server's URL.
    pub url: String,
    /// One JSON object a line for each write to the API.
    pub audit_log: PathBuf,
    /// The CA's certificate.
    pub ca: PathBuf,
    /// etcd.
    pub etcd: Daemon,
    /// The API server.
    pub apiserver: Daemon,
    /// Where they are, if not on the machine's loopback.
    #[serde(default)]
    pub network: Option<Network>,
}

/// Where a control plane is.
struct Place<'a> {
    address: &'a str,
    /// Of etcd for clients and for peers, and of the API server.
    ports: [u16; 3],
    network: Option<&'a Network>,
}

impl Place<'_> {
    fn start(&self, name: &str, binary: &Path, arguments: Vec<String>, dir: &Path) -> Result<Daemon> {
        let Some(network) = self.network else {
            return Daemon::start(name, binary, arguments, dir);
        };
        // nsenter becomes what it is told to run: the process is the daemon's
        let words = network.words().into_iter().chain([binary.to_string_lossy().into_owned()]);
        Daemon::start(name, Path::new("nsenter"), words.chain(arguments).collect(), dir)
    }
}

impl ControlPlane {
    /// Starts both in `dir`, and waits until the API server is ready.
    ///
    /// # Errors
    /// When one of them does not come up; their logs are in `dir`/log.
    pub fn start(dir: &Path) -> Result<Self> {
        let address = "127.0.0.1";
        let pki = Pki::make(&dir.join("pki"), address)?;
        let more = vec![format!("--bind-address={address}"), "--endpoint-reconciler-type=none".to_owned()];
        Self::start_at(dir, &pki, &Place { address, ports: free_ports()?, network: None }, more)
    }

    /// Starts both in a network of their own, with controllers and scheduler; answers these.
    ///
    /// # Errors
    /// When one of them does not come up; their logs are in `dir`/log.
    pub fn start_in(dir: &Path, pki: &Pki, network: &Network) -> Result<(Self, Vec<Daemon>)> {
        let flag = |name: &str, file: &str| format!("--{name}={}", pki.path(file).display());
        pki.client("kubelets", "kube-apiserver", Some("system:masters"))?;
        let more = vec![
            flag("kubelet-client-certificate", "kubelets.crt"),
            flag("kubelet-client-key", "kubelets.key"),
            flag("kubelet-certificate-authority", "ca.crt"),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
        ];
        let place =
            Place { address: network::CONTROL_PLANE, ports: [2379, 2380, 6443], network: Some(network) };
        let plane = Self::start_at(dir, pki, &place, more)?;
        let binaries = node_binaries()?;
        let start = |name: &str, more: Vec<String>| {
            pki.client(name, &format!("system:{name}"), None)?;
            let kubeconfig = dir.join(format!("{name}.kubeconfig"));
            write_kubeconfig(&kubeconfig, &plane, &pki.user(name))?;
            let common =
                [format!("--kubeconfig={}", kubeconfig.display()), "--leader-elect=false".to_owned()];
            place.start(name, &binaries.join(name), common.into_iter().chain(more).collect(), dir)
        };
        let controllers = vec![
            "--use-service-account-credentials".to_owned(),
            flag("service-account-private-key-file", "accounts.key"),
            flag("root-ca-file", "ca.crt"),
            // pods come eight seconds later without
            "--kube-api-qps=300".to_owned(),
            "--kube-api-burst=600".to_owned(),
        ];
        let others =
            vec![start("kube-controller-manager", controllers)?, start("kube-scheduler", Vec::new())?];
        Ok((plane, others))
    }

    fn start_at(dir: &Path, pki: &Pki, place: &Place<'_>, more: Vec<String>) -> Result<Self> {
        let binaries = binaries()?;
        let (address, [etcd_port, peer_port, api_port]) = (place.address, place.ports);
        let etcd_url = format!("http://127.0.0.1:{etcd_port}");
        let peer = format!("http://127.0.0.1:{peer_port}");
        let policy = dir.join("audit-policy.yaml");
        fs::write(&policy, AUDIT_POLICY)?;
        let audit_log = dir.join("log/audit.log");
        let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let arguments = vec![
            flag("data-dir", &dir.join("etcd")),
            format!("--listen-client-urls={etcd_url}"),
            format!("--advertise-client-urls={etcd_url}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        let etcd = place.start("etcd", &binaries.join("etcd"), arguments, dir)?;
        let mut arguments = vec![
            format!("--etcd-servers={etcd_url}"),
            format!("--secure-port={api_port}"),
            format!("--advertise-address={address}"),
            flag("cert-dir", &dir.join("pki")),
            flag("tls-cert-file", &pki.path("apiserver.crt")),
            flag("tls-private-key-file", &pki.path("apiserver.key")),
            flag("client-ca-file", &pki.path("ca.crt")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            flag("service-account-key-file", &pki.path("accounts.pub")),
            flag("service-account-signing-key-file", &pki.path("accounts.key")),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement".to_owned(),
            "--allow-privileged=true".to_owned(),
            flag("audit-policy-file", &policy),
            flag("audit-log-path", &audit_log),
        ];
        arguments.extend(more);
        let apiserver = place.start("kube-apiserver", &binaries.join("kube-apiserver"), arguments, dir)?;
        let plane = Self {
            kubeconfig: dir.join("admin.kubeconfig"),
            url: format!("https://{address}:{api_port}"),
            audit_log,
            ca: pki.path("ca.crt"),
            etcd,
            apiserver,
            network: place.network.cloned(),
        };
        write_kubeconfig(&plane.kubeconfig, &plane, &pki.user("admin"))?;
        plane.ready()?;
        Ok(plane)
    }

    fn store(&self) -> PathBuf {
        self.kubeconfig.with_file_name("etcd")
    }

    /// Copies all that etcd has to `copy`, which must not be there. It is away meanwhile.
    ///
    /// # Errors
    /// When it cannot be copied, or etcd does not come back.
    pub fn save(&mut self, copy: &Path) -> Result<()> {
        self.etcd.kill();
        let copied = run(Command::new("cp").arg("-a").arg(self.store()).arg(copy));
        self.etcd.restart(&[])?;
        self.ready()?;
        copied
    }

    /// Puts etcd back to what was saved, as an administrator restores it.
    ///
    /// # Errors
    /// When it cannot be copied, or they do not come back.
    pub fn put_back(&mut self, copy: &Path) -> Result<()> {
        self.apiserver.kill();
        self.etcd.kill();
        fs::remove_dir_all(self.store())?;
        run(Command::new("cp").arg("-a").arg(copy).arg(self.store()))?;
        self.etcd.restart(&[])?;
        self.apiserver.restart(&[])?;
        self.ready()
    }

    /// Waits until the API server is ready.
    ///
    /// # Errors
    /// When it ends, or is not ready within a minute.
    pub fn ready(&self) -> Result<()> {
        let kubectl = self.kubectl();
        wait_until(Duration::from_secs(60), "kube-apiserver to be ready", || {
            if !self.apiserver.process.is_alive() {
                bail!("kube-apiserver ended: {}", self.apiserver.log().lines().last().unwrap_or_default());
            }
            Ok(kubectl.run(&["get", "--raw", "/readyz"]).ok().filter(|answer| answer == "ok").map(drop))
        })
    }

    /// kubectl as the administrator.
    pub fn kubectl(&self) -> Kubectl {
        Kubectl::new(&self.kubeconfig, self.network.as_ref())
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

/// Ports that the kernel gives to no client (its own start at 32768): a daemon that is started again finds its port free.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// Loopback ports that nobody used a moment ago.
///
/// # Errors
/// When the machine has none.
pub fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut ports = [0; N];
    let mut held = Vec::with_capacity(N);
    for port in &mut ports {
        let mut tries = (0..1000).map(|_| rand::rng().random_range(PORTS));
        let listener = tries.find_map(|port| TcpListener::bind(("127.0.0.1", port)).ok());
        let listener = listener.context("no loopback port is free")?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}
