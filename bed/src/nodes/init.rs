//! PID 1 of a node: a hypervisor that also has a network, containerd, kubelet and kube-proxy. All that it lays over the
//! machine's file system is in its own mount namespace, and ends with it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change, unmount,
};

use super::config::{self, Setup};
use super::network::CONTROL_PLANE;
use crate::hypervisor::{self, random_uuid};
use crate::namespaces::{self, Service};
use crate::vm::run;
use crate::wait::wait_until;

/// What a kubelet would set for the whole machine. It finds these already as it wants them.
const SYSCTLS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Sets the node in `dir` up and keeps its daemons running. Returns only when something fails.
///
/// # Errors
/// What failed.
pub fn init(dir: &Path, name: &str) -> Result<()> {
    let setup = Setup::read(dir)?;
    let logs = config::logs(dir);
    namespaces::enter(name)?;
    mounts(dir)?;
    network(&setup)?;

    let word = str::to_owned;
    let path = |file: &str| dir.join(file).to_string_lossy().into_owned();
    let binary = |name: &str| setup.binaries.join(name).to_string_lossy().into_owned();
    let service = |name: &'static str, words: Vec<String>| -> Result<_> {
        let service = Service::new(name, words);
        let pid = service.start(&logs)?;
        Ok((service, pid))
    };
    let mut running = vec![
        service("virtlogd", vec![word("virtlogd")])?,
        service("libvirtd", vec![word("libvirtd"), word("--listen")])?,
        service("containerd", vec![word("containerd"), word("--config"), path("containerd.toml")])?,
    ];
    wait_until(Duration::from_secs(30), "containerd", || {
        Ok(Command::new("ctr").arg("version").output()?.status.success().then_some(()))
    })?;
    running.push(service(
        "kubelet",
        vec![
            binary("kubelet"),
            format!("--config={}", path("kubelet.yaml")),
            format!("--kubeconfig={}", path("kubelet.kubeconfig")),
            format!("--hostname-override={name}"),
            format!("--node-ip={}", setup.address),
            word("--root-dir=/var/lib/kubelet"),
        ],
    )?);
    running
        .push(service("kube-proxy", vec![binary("kube-proxy"), format!("--config={}", path("proxy.yaml"))])?);
    namespaces::keep(running, &logs)
}

fn mounts(dir: &Path) -> Result<()> {
    let over = |ours: &str, machines: &str| namespaces::lay_over(&dir.join(ours), Path::new(machines));
    over("var", "/var")?;
    hypervisor::lay_over(dir)?;
    // where pods look for libvirt, and where clients outside do, is one folder
    for folder in ["/run/libvirt", "/run/lock"] {
        fs::create_dir_all(folder)?;
    }
    over("sock", "/run/libvirt")?;
    for file in ["hostname", "hosts", "machine-id"] {
        over(file, &format!("/etc/{file}"))?;
    }
    for (name, value) in SYSCTLS {
        let file = dir.join("sysctl").join(name.replace('/', "."));
        fs::write(&file, value)?;
        namespaces::lay_over(&file, &Path::new("/proc/sys").join(name))?;
    }
    // a start looks like a boot
    fs::write(dir.join("boot_id"), random_uuid())?;
    over("boot_id", "/proc/sys/kernel/random/boot_id")?;
    // /sys shows the devices of this network; the control groups are the machine's, and the node has its own below
    let kept = dir.join("cgroups");
    fs::create_dir_all(&kept)?;
    mount_bind_recursive("/sys/fs/cgroup", &kept)?;
    mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None)?;
    mount_bind_recursive(&kept, "/sys/fs/cgroup")?;
    unmount(&kept, UnmountFlags::DETACH)?;
    // what pods mount may be seen by the node, and by nobody else
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::SHARED)?;
    Ok(())
}

fn network(setup: &Setup) -> Result<()> {
    wait_until(Duration::from_secs(10), "the node's wire", || {
        Ok(Path::new("/sys/class/net/eth0").exists().then_some(()))
    })?;
    let ip =
        |words: &str| run(Command::new("ip").args(words.split(' '))).with_context(|| format!("ip {words}"));
    ip("link set lo up")?;
    ip(&format!("address add {}/24 dev eth0", setup.address))?;
    ip("link set eth0 up")?;
    ip(&format!("route add default via {CONTROL_PLANE}"))?;
    for (range, via) in &setup.routes {
        ip(&format!("route add {range} via {via}"))?;
    }
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("packets of pods cannot be forwarded")
}
