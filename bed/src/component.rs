//! The operator and the agents as ordinary processes, each with a service account's token of its own.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use crate::controlplane::{ControlPlane, free_ports, write_kubeconfig};
use crate::daemon::Daemon;
use crate::hypervisor::Hypervisor;

/// The namespace of operator and agents.
pub const SYSTEM_NAMESPACE: &str = "virtmark-system";
/// The namespace where LibvirtDomains are published.
pub const VM_NAMESPACE: &str = "vms";

/// The capabilities that an agent has, as the chart gives them to its pod: it gives files away, and reaches QEMU's.
pub const AGENT_CAPABILITIES: [&str; 2] = ["CHOWN", "DAC_OVERRIDE"];

/// The address that all agents of a bed tell clients: the stock client then takes HTTPS and not the unix socket. It is in their
/// Nodes, too.
pub const ADVERTISED: &str = "127.0.0.2";

/// The node whose agent has its certificate signed by the operator; the others make their own.
pub const SIGNED_NODE: &str = "node-b";

/// The libvirt pools into which the namespace of the VMs may upload. Tests make them, each its own; the last one nobody.
pub const TENANT_POOLS: [&str; 6] =
    ["uploads", "uploads-undone", "uploads-small", "uploads-cut", "uploads-unread", "uploads-none"];

/// The file, in the bed's folder, that says what namespaces may do.
pub const TENANCY: &str = "tenancy.yaml";

/// The folder with the built binaries: `VIRTMARK_BIN_DIR`, or where this executable is.
///
/// # Errors
/// When this executable cannot be found.
pub fn binary_dir() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("VIRTMARK_BIN_DIR") {
        return Ok(dir.into());
    }
    let here = env::current_exe()?;
    let dir = here.parent().context("this executable has no folder")?;
    // tests are in a folder of their own, below
    Ok(if dir.ends_with("deps") { dir.parent().unwrap_or(dir).to_owned() } else { dir.to_owned() })
}

/// Starts an operator. Those beside the first have names of their own.
///
/// # Errors
/// When its token cannot be made, or it does not start.
pub fn operator(dir: &Path, plane: &ControlPlane, name: &str) -> Result<Daemon> {
    let kubeconfig = account(dir, plane, "virtmark-operator", name, None)?;
    let [health] = free_ports()?;
    let health = format!("127.0.0.1:{health}");
    let tenancy = dir.join(TENANCY);
    let pools = json!({"namespaces": {VM_NAMESPACE: {"pools": TENANT_POOLS}}});
    // YAML, too
    fs::write(&tenancy, pools.to_string())?;
    let arguments = [
        "--health-listen",
        &health,
        "--kubeconfig",
        &kubeconfig.to_string_lossy(),
        "--system-namespace",
        SYSTEM_NAMESPACE,
        "--domains-namespace",
        VM_NAMESPACE,
        "--identity",
        name,
        "--lease-seconds",
        "5",
        "--sign-certificates",
        "--tenancy",
        &tenancy.to_string_lossy(),
    ];
    Daemon::start(name, &binary_dir()?.join("operator"), arguments.map(str::to_owned).to_vec(), dir)
}

/// Starts the agent of a hypervisor, with no more privilege than its pod has. Its token is bound to the Node object. It listens on 127.0.0.1 and
/// on [`ADVERTISED`], and tells clients the latter.
///
/// # Errors
/// When its token cannot be made, or it does not start.
pub fn agent(dir: &Path, plane: &ControlPlane, hypervisor: &Hypervisor) -> Result<Daemon> {
    let node = hypervisor.name.as_str();
    let name = format!("agent-{node}");
    let kubeconfig = account(dir, plane, "virtmark-agent", &name, Some(node))?;
    let [port, health] = free_ports()?;
    let path = |sub: &str| hypervisor.dir.join("agent").join(sub).to_string_lossy().into_owned();
    let arguments = [
        ("--kubeconfig", kubeconfig.to_string_lossy().into_owned()),
        ("--node-name", node.to_owned()),
        ("--libvirt-uri", hypervisor.uri()),
        ("--state-dir", path("state")),
        ("--run-dir", path("run")),
        ("--system-namespace", SYSTEM_NAMESPACE.to_owned()),
        ("--listen", format!("127.0.0.1:{port}")),
        ("--listen", format!("{ADVERTISED}:{port}")),
        ("--advertise", format!("{ADVERTISED}:{port}")),
        ("--certificate-from", if node == SIGNED_NODE { "signer" } else { "self" }.to_owned()),
        ("--health-listen", format!("127.0.0.1:{health}")),
        ("--heartbeat-seconds", "2".to_owned()),
        ("--look-seconds", "10".to_owned()),
    ];
    let capabilities = AGENT_CAPABILITIES.map(|name| format!(",+{}", name.to_lowercase())).concat();
    let binary = binary_dir()?.join("agent").to_string_lossy().into_owned();
    // it becomes the agent: the process is the same
    let privileges = [format!("--bounding-set=-all{capabilities}"), "--no-new-privs".to_owned(), binary];
    let arguments = arguments.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
    Daemon::start(&name, Path::new("setpriv"), privileges.into_iter().chain(arguments).collect(), dir)
}

/// A kubeconfig with a token of `account`; bound to the Node `node` if one is given.
///
/// # Errors
/// When the API server does not give one.
pub fn account(
    dir: &Path,
    plane: &ControlPlane,
    account: &str,
    file: &str,
    node: Option<&str>,
) -> Result<PathBuf> {
    let mut arguments = vec!["create", "token", account, "-n", SYSTEM_NAMESPACE, "--duration=24h"];
    if let Some(node) = node {
        arguments.extend(["--bound-object-kind=Node", "--bound-object-name", node]);
    }
    let token = plane.kubectl().run(&arguments)?;
    let path = dir.join(format!("{file}.kubeconfig"));
    write_kubeconfig(&path, plane, &json!({"token": token.trim()}))?;
    Ok(path)
}
