//! What many VMs cost while nothing happens: the agent of a hypervisor with 100, the operator of a cluster with 1,000.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, ListParams, ObjectMeta, PostParams};
use kube::core::PartialObjectMeta;
use kube::{Api, ResourceExt as _};
use serde_json::json;
use virtmark::api::{DomainSighting, DomainSightingSpec, LibvirtDomain};
use virtmark_bed::component::{SYSTEM_NAMESPACE, VM_NAMESPACE};
use virtmark_bed::daemon::Daemon;
use virtmark_bed::{Disk, Plan, Vm};

use super::Bench;
use super::backup::until;
use super::cpu::of_process;
use super::report::Goal::AtMost;
use super::report::Row;

/// VMs on one hypervisor.
const ON_A_NODE: usize = 100;
/// VMs in the API, and the nodes that say so.
const IN_ALL: usize = 1000;
const NODES: usize = 10;
/// Sightings that are written at once.
const AT_ONCE: usize = 16;
/// How long idleness is looked at: the safety nets of agent and operator, every minute, are in it.
const IDLE: Duration = Duration::from_secs(65);
/// How often an agent looks at the bitmaps of a VM, unless told otherwise, and so how long an idle one is watched.
const LOOK: Duration = Duration::from_secs(300);

/// An agent with 100 VMs, each a QEMU without an operating system, 16 MiB of memory and a qcow2 disk.
pub(crate) fn agent(bench: &Bench) -> Result<Vec<Row>> {
    let hypervisor = bench.hypervisor()?;
    let plan = |number| Plan::new(&format!("crowd-{number}")).booting("", "", 16);
    let vms: Vec<Vm> = (0..ON_A_NODE)
        .map(|number| plan(number).disk(Disk::qcow2("vda", 1 << 30)).start(hypervisor))
        .collect::<Result<_>>()?;
    for vm in &vms {
        bench.published(&vm.name)?;
    }
    let mut agent = bench.bed.agents.first().context("no agent")?.clone();
    // the bed's look often, for its tests
    agent.set_argument("--look-seconds", &LOOK.as_secs().to_string());
    agent.restart(&[])?;
    // its first looks are over
    sleep(IDLE);
    let ((cpu, rss), busy) = bench.share(|| Ok((idle_cpu(&agent, LOOK)?, mib(agent.rss_kib()?))))?;
    drop(vms);
    Ok(vec![
        Row::alone("agent-100-vms-rss", "MiB", Some(AtMost(60.0)), vec![rss], busy),
        Row::alone("agent-100-vms-idle-cpu", "%core", Some(AtMost(0.5)), vec![cpu], busy),
    ])
}

/// An operator with 1,000 VMs: how soon all are published, and what it is like afterwards.
pub(crate) fn operator(bench: &Bench) -> Result<Vec<Row>> {
    let operator = &bench.bed.operator;
    let written = bench.bed.writes_by("virtmark-operator")?.len();
    let (seconds, busy) = bench.share(|| bench.runtime.block_on(publish(bench)))?;
    let written = bench.bed.writes_by("virtmark-operator")?.len() - written;
    let (cpu, idle_busy) = bench.share(|| idle_cpu(operator, IDLE))?;
    let (rss, peak) = (mib(operator.rss_kib()?), mib(operator.peak_rss_kib()?));
    bench.runtime.block_on(remove(bench))?;
    let writes = f64::from(u32::try_from(written)?);
    Ok(vec![
        Row::alone("operator-1000-vms-publish", "s", None, vec![seconds], busy),
        Row::alone("operator-1000-vms-writes", "writes/s", None, vec![writes / seconds], busy),
        Row::alone("operator-1000-vms-peak-rss", "MiB", Some(AtMost(100.0)), vec![peak], busy),
        Row::alone("operator-1000-vms-rss", "MiB", Some(AtMost(100.0)), vec![rss], idle_busy),
        Row::alone("operator-1000-vms-idle-cpu", "%core", None, vec![cpu], idle_busy),
    ])
}

/// Percent of a core that a daemon takes in `time` in which nothing happens.
fn idle_cpu(daemon: &Daemon, time: Duration) -> Result<f64> {
    // what was published last is over
    sleep(Duration::from_secs(5));
    let pid = u32::try_from(daemon.process.pid)?;
    let (before, begun) = (of_process(pid)?, Instant::now());
    sleep(time);
    Ok((of_process(pid)? - before) / begun.elapsed().as_secs_f64() * 100.0)
}

fn mib(kib: u64) -> f64 {
    Duration::from_secs(kib).as_secs_f64() / 1024.0
}

fn uuid(number: usize) -> String {
    format!("5eed0000-0000-4000-8000-{number:012x}")
}

fn node(number: usize) -> String {
    format!("crowd-{}", number % NODES)
}

/// Writes the sightings, as agents do; answers after how many seconds all are published.
async fn publish(bench: &Bench) -> Result<f64> {
    let nodes = Api::<Node>::all(bench.client.clone());
    for number in 0..NODES {
        let metadata = ObjectMeta { name: Some(node(number)), ..ObjectMeta::default() };
        nodes.create(&PostParams::default(), &Node { metadata, ..Node::default() }).await?;
    }
    let sightings = Api::<DomainSighting>::namespaced(bench.client.clone(), SYSTEM_NAMESPACE);
    let begun = Instant::now();
    let created = stream::iter(0..IN_ALL).map(Ok::<_, anyhow::Error>);
    created
        .try_for_each_concurrent(AT_ONCE, async |number| {
            let spec: DomainSightingSpec = serde_json::from_value(json!({"nodeName": node(number),
                "uuid": uuid(number), "name": format!("many-{number}"), "state": "Running", "disks": [
                    {"target": "vda", "format": "qcow2", "size": 64_u64 << 30, "backup": "Incremental"},
                    {"target": "vdb", "format": "qcow2", "size": 512_u64 << 30, "backup": "Incremental"}]}))?;
            let name = format!("{}.{}", spec.node_name, spec.uuid);
            sightings.create(&PostParams::default(), &DomainSighting::new(&name, spec)).await?;
            Ok(())
        })
        .await?;
    until("all VMs to be published", async || Ok((published(bench).await? == IN_ALL).then_some(()))).await?;
    Ok(begun.elapsed().as_secs_f64())
}

/// How many have a status.
async fn published(bench: &Bench) -> Result<usize> {
    let domains = Api::<LibvirtDomain>::namespaced(bench.client.clone(), VM_NAMESPACE);
    // few bytes first: the API server is what is waited for
    let many = domains.list_metadata(&ListParams::default()).await?;
    let is_ours = |domain: &PartialObjectMeta<LibvirtDomain>| domain.name_any().starts_with("many-");
    if many.iter().filter(|domain| is_ours(domain)).count() < IN_ALL {
        return Ok(0);
    }
    let domains = domains.list(&ListParams::default()).await?;
    let ours = domains.iter().filter(|domain| domain.name_any().starts_with("many-"));
    Ok(ours.filter(|domain| domain.status.as_ref().is_some_and(|status| status.state.is_some())).count())
}

async fn remove(bench: &Bench) -> Result<()> {
    let sightings = Api::<DomainSighting>::namespaced(bench.client.clone(), SYSTEM_NAMESPACE);
    let nodes = Api::<Node>::all(bench.client.clone());
    for number in 0..NODES {
        let of_node = ListParams::default().fields(&format!("spec.nodeName={}", node(number)));
        sightings.delete_collection(&DeleteParams::default(), &of_node).await?;
        nodes.delete(&node(number), &DeleteParams::default()).await?;
    }
    let left = sightings.list_metadata(&ListParams::default()).await?;
    ensure!(!left.iter().any(|sighting| sighting.name_any().starts_with("crowd-")), "sightings are left");
    Ok(())
}
