//! What a node's daemons are told: their configuration files, in the node's folder. Starts nothing.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::network::{CONTROL_PLANE, PODS, node_address, pod_range};
use crate::controlplane::{ControlPlane, write_kubeconfig};
use crate::hypervisor::{Hypervisor, random_uuid};
use crate::pki::Pki;

/// The image whose container holds a pod's namespaces.
pub const PAUSE: &str = "virtmark.dev/bed/pause:1";

/// What a node's PID 1 sets up, stored in the node's folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Its address.
    pub address: String,
    /// Ranges of other nodes' pods, and those nodes' addresses.
    pub routes: Vec<(String, String)>,
    /// The folder with kubelet and kube-proxy.
    pub binaries: PathBuf,
}

impl Setup {
    /// The one in `dir`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        Ok(serde_json::from_slice(&fs::read(dir.join("node.json"))?)?)
    }
}

/// Writes everything for the Nth of `nodes` nodes, from 1.
///
/// # Errors
/// When files cannot be written.
pub fn write(
    hypervisor: &Hypervisor,
    index: usize,
    nodes: usize,
    plane: &ControlPlane,
    pki: &Pki,
    binaries: &Path,
) -> Result<()> {
    let (dir, name) = (hypervisor.dir.as_path(), hypervisor.name.as_str());
    let address = node_address(index);
    let others = (1..=nodes).filter(|&other| other != index);
    let setup = Setup {
        address: address.clone(),
        routes: others.map(|other| (pod_range(other), node_address(other))).collect(),
        binaries: binaries.to_owned(),
    };
    fs::create_dir_all(logs(dir))?;
    let folders =
        ["cni", "sysctl", "var/tmp", "var/lib/kubelet", "var/lib/containerd", "var/lib/cni", "var/log"];
    for folder in folders.iter().chain(&["var/lib/libvirt", "var/log/libvirt", "var/cache/libvirt"]) {
        fs::create_dir_all(dir.join(folder))?;
    }
    for (link, to) in [("run", "/run"), ("lock", "/run/lock")] {
        symlink(to, dir.join("var").join(link))?;
    }
    pki.client(&format!("{name}-client"), &format!("system:node:{name}"), Some("system:nodes"))?;
    pki.server(name, &format!("system:node:{name}"), &[name, &address])?;
    pki.client(&format!("{name}-proxy"), "system:kube-proxy", None)?;
    write_kubeconfig(&dir.join("kubelet.kubeconfig"), plane, &pki.user(&format!("{name}-client")))?;
    write_kubeconfig(&dir.join("proxy.kubeconfig"), plane, &pki.user(&format!("{name}-proxy")))?;
    let yaml = |file: &str, value: &Value| fs::write(dir.join(file), format!("{value:#}"));
    yaml("node.json", &serde_json::to_value(setup)?)?;
    yaml("kubelet.yaml", &kubelet(hypervisor, pki))?;
    yaml("proxy.yaml", &proxy(hypervisor))?;
    yaml("cni/10-pods.conflist", &pods(index))?;
    fs::write(dir.join("containerd.toml"), containerd(dir))?;
    fs::write(dir.join("machine-id"), random_uuid().replace('-', ""))?;
    fs::write(dir.join("hostname"), name)?;
    fs::write(
        dir.join("hosts"),
        format!("127.0.0.1 localhost\n{CONTROL_PLANE} control-plane\n{address} {name}\n"),
    )?;
    Ok(())
}

/// Where the logs of a node's daemons are: with the bed's, which are kept if it does not come up.
pub fn logs(dir: &Path) -> PathBuf {
    let bed = dir.parent().unwrap_or(dir);
    bed.join("log").join(dir.file_name().unwrap_or_default())
}

/// Its cgroups, below each hierarchy's root: the bed's folder's name, so that they are found again.
pub fn cgroup(dir: &Path) -> PathBuf {
    let tail: PathBuf = dir.iter().skip(dir.iter().count().saturating_sub(2)).collect();
    Path::new("/").join(tail)
}

fn kubelet(hypervisor: &Hypervisor, pki: &Pki) -> Value {
    let name = &hypervisor.name;
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki.path("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "tlsCertFile": pki.path(&format!("{name}.crt")),
        "tlsPrivateKeyFile": pki.path(&format!("{name}.key")),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup(&hypervisor.dir),
        "cgroupsPerQOS": true,
        "enforceNodeAllocatable": [],
        "failCgroupV1": false,
        "failSwapOn": false,
        // a full disk of the machine must not have pods evicted here
        "evictionHard": {"memory.available": "100Mi"},
        "imageGCHighThresholdPercent": 100,
        "makeIPTablesUtilChains": false,
        "volumePluginDir": "/var/lib/kubelet/volumeplugins",
        "clusterDNS": [],
        "resolvConf": "",
    })
}

fn proxy(hypervisor: &Hypervisor) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": hypervisor.dir.join("proxy.kubeconfig")},
        "mode": "iptables",
        "clusterCIDR": PODS,
        "hostnameOverride": hypervisor.name,
        "healthzBindAddress": "127.0.0.1:10256",
        // the machine's own limits are left alone
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}

fn pods(index: usize) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": false,
                "mtu": 1500,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": pod_range(index)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                    "dataDir": "/var/lib/cni/networks",
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

fn containerd(dir: &Path) -> String {
    format!(
        "version = 2
root = '/var/lib/containerd'
state = '/run/containerd'
[grpc]
address = '/run/containerd/containerd.sock'
[plugins.'io.containerd.grpc.v1.cri']
sandbox_image = '{PAUSE}'
# without CAP_SYS_RESOURCE nothing may be made less likely to be killed
restrict_oom_score_adj = true
[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.grpc.v1.cri'.cni]
bin_dir = '/usr/lib/cni'
conf_dir = '{}'
",
        dir.join("cni").display()
    )
}
