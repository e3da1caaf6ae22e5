//! The network of a cluster with nodes: a network namespace with a bridge, where the control plane is, and a wire from it
//! to each node. Nothing of it is in the machine's own network namespace.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::ledger::{Ledger, Process};
use crate::namespaces;
use crate::vm::run;
use crate::wait::wait_until;

/// The control plane's address.
pub const CONTROL_PLANE: &str = "10.10.0.1";
/// Pods are in 10.20.N.0/24 on the Nth node.
pub const PODS: &str = "10.20.0.0/16";

/// The address of the Nth node, from 1.
pub fn node_address(index: usize) -> String {
    format!("10.10.0.{}", 10 + index)
}

/// The range of the pods of the Nth node, from 1.
pub fn pod_range(index: usize) -> String {
    format!("10.20.{index}.0/24")
}

/// A network, which lives as long as its PID 1.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Network {
    init: Process,
}

impl Network {
    /// Makes it, with routes to the pods of `nodes` nodes.
    ///
    /// # Errors
    /// When the kernel has no bridges, or says no.
    pub fn start(dir: &Path, nodes: usize, ledger: &Ledger) -> Result<Self> {
        let kinds = ["--mount", "--net"];
        let log = dir.join("log/network.log");
        let init = namespaces::start("network", &kinds, &[Path::new("network-init")], &log, ledger)?;
        let network = Self { init };
        let ip = |words: &str| network.ip(words);
        ip("link set lo up")?;
        ip("link add bridge type bridge")?;
        ip(&format!("address add {CONTROL_PLANE}/24 dev bridge"))?;
        ip("link set bridge up")?;
        // kubelets and API servers look for a default route; this one leads nowhere
        ip("route add default via 10.10.0.254 dev bridge")?;
        for index in 1..=nodes {
            ip(&format!("route add {} via {}", pod_range(index), node_address(index)))?;
        }
        Ok(network)
    }

    /// A command that runs in it, on the machine's file system.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(self.words()).arg(program);
        command
    }

    /// What `nsenter` is to be told.
    pub fn words(&self) -> [String; 2] {
        [format!("--net=/proc/{}/ns/net", self.init.pid), "--".to_owned()]
    }

    fn ip(&self, words: &str) -> Result<()> {
        run(self.command("ip").args(words.split(' '))).with_context(|| format!("ip {words}"))
    }

    /// Lays a wire from the bridge to `eth0` of the node `name`, whose PID 1 this is.
    ///
    /// # Errors
    /// When there is one already.
    pub fn plug(&self, name: &str, node: &Process) -> Result<()> {
        // the wire of a node that was powered off goes when the kernel gets round to it
        wait_until(Duration::from_secs(10), &format!("the old wire of {name} to go"), || {
            Ok(self.ip(&format!("link show {name}")).is_err().then_some(()))
        })?;
        self.ip(&format!("link add {name} type veth peer name eth0 netns {}", node.pid))?;
        self.ip(&format!("link set {name} master bridge"))?;
        self.heal(name)
    }

    /// Cuts a node off.
    ///
    /// # Errors
    /// When it has no wire.
    pub fn cut(&self, name: &str) -> Result<()> {
        self.ip(&format!("link set {name} down"))
    }

    /// Mends its wire.
    ///
    /// # Errors
    /// When it has none.
    pub fn heal(&self, name: &str) -> Result<()> {
        self.ip(&format!("link set {name} up"))
    }
}

/// PID 1 of the network's namespaces: it only has to be there.
pub fn init() -> ! {
    loop {
        std::thread::park();
    }
}
