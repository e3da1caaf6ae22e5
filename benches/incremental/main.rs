//! An incremental backup from the apply to Succeeded, beside its peer, and what many VMs cost: `make bench-incremental`.
//! What each row means: docs/benchmarks.md.
//!
//! It runs in a bed of its own (`bed run --`), whose processes count as ours where it says how busy the machine was.

mod backup;
#[path = "../cpu.rs"]
mod cpu;
mod crowd;
#[path = "../machine.rs"]
mod machine;
#[path = "../report.rs"]
mod report;
mod versus;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use kube::{Api, Client};
use serde_json::json;
use tokio::runtime::Runtime;
use virtmark::api::LibvirtDomain;
use virtmark_bed::component::VM_NAMESPACE;
use virtmark_bed::hypervisor::Hypervisor;
use virtmark_bed::{Bed, wait_until};

use backup::Product;
use machine::{first_line, machine_with};
use report::Row;

/// Measures some rows.
type Case = fn(&Bench) -> Result<Vec<Row>>;

/// What can be measured.
const CASES: [(&str, Case); 4] = [
    ("incremental", versus::peer),
    ("incremental-20-deep", versus::depth),
    ("agent-100-vms", crowd::agent),
    ("operator-1000-vms", crowd::operator),
];

#[derive(Parser)]
#[command(about = "Measures an incremental backup, and what many VMs cost")]
struct Arguments {
    /// Also write the rows to this file, as JSON.
    #[arg(long, overrides_with = "json")]
    json: Option<PathBuf>,
    /// Rounds; the rows show the medians.
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    /// Only the cases of these names.
    #[arg(long)]
    only: Vec<String>,
}

/// Everything that is measured on.
struct Bench {
    bed: Bed,
    runtime: Runtime,
    client: Client,
    product: Product,
    rounds: usize,
    /// Made so far.
    backups: std::cell::Cell<usize>,
}

impl Bench {
    fn hypervisor(&self) -> Result<&Hypervisor> {
        self.bed.hypervisors.first().context("no hypervisor")
    }

    /// Runs, and says how much of all CPU there is was used outside the bed meanwhile.
    fn share<T>(&self, run: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
        // `bed run` is the parent of all that is in it, and of us
        let top = cpu::parent(u32::try_from(self.bed.operator.process.pid)?)?;
        cpu::share(top, run)
    }

    /// Waits until a VM that runs is published.
    fn published(&self, vm: &str) -> Result<()> {
        let domains = Api::<LibvirtDomain>::namespaced(self.client.clone(), VM_NAMESPACE);
        wait_until(Duration::from_secs(120), &format!("{vm} to be published"), || {
            let found = self.runtime.block_on(domains.get_opt(vm))?;
            let state = found.and_then(|domain| domain.status?.state);
            Ok(state.filter(|state| state.is_active()).map(drop))
        })
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let chosen = |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|only| only == name);
    let chosen: Vec<_> = CASES.iter().filter(|(name, _)| chosen(name)).collect();
    ensure!(!chosen.is_empty(), "no case has such a name");
    virtmark::telemetry::install_crypto();
    let bed = Bed::from_env()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let client = runtime.block_on(virtmark::cluster::connect(Some(&bed.plane.kubeconfig)))?;
    let product = runtime.block_on(async { Product::new(client.clone()) });
    let rounds = arguments.rounds.max(1);
    let bench = Bench { bed, runtime, client, product, rounds, backups: std::cell::Cell::default() };
    println!("# {}", machine()?);
    let mut rows = Vec::new();
    for (name, measure) in chosen {
        for row in measure(&bench).context(*name)? {
            println!("{row}");
            rows.push(row);
        }
    }
    if let Some(path) = &arguments.json {
        let document = json!({"machine": machine()?, "rounds": bench.rounds, "rows": rows});
        fs::write(path, format!("{document:#}\n")).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// When, on what, and against which versions.
fn machine() -> Result<String> {
    machine_with([
        first_line("qemu-system-x86_64", &["--version"])?,
        first_line("virsh", &["--version"]).map(|version| format!("libvirt {version}"))?,
        first_line("virtnbdbackup", &["--version"]).map(|version| format!("virtnbdbackup {version}"))?,
    ])
}
