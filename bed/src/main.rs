//! `bed`: brings a bed up and takes it down. See the library.

mod demo;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use rustix::process::{Pid, Signal, kill_process};
use virtmark_bed::nodes::{self, Cluster, images};
use virtmark_bed::{
    Bed, Disk, Options, Plan, controlplane, down, guest, helm, hypervisor, kubectl, registry,
};

/// A private control plane and private hypervisors for Virtmark's demo and tests.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
    /// The repository, with crds/ and deploy/.
    #[arg(long, global = true, default_value = ".")]
    repository: PathBuf,
    /// How many hypervisors.
    #[arg(long, global = true, default_value_t = 1)]
    hypervisors: usize,
}

#[derive(Subcommand)]
enum Verb {
    /// Bring a bed up and leave it running.
    Up,
    /// Take down the beds that were left running.
    Down,
    /// Bring a bed up, run a command in it, take it down.
    Run {
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Back up a running VM, and show it.
    Demo,
    /// Build what is kept in the cache.
    Build {
        /// The Debian guest too.
        #[arg(long)]
        guest: bool,
        /// What a cluster with nodes needs, too.
        #[arg(long)]
        nodes: bool,
    },
    /// Bring a cluster with two real nodes up, with the images of operator and agent on them, run a command, take it
    /// down.
    Nodes {
        /// The folder with the binaries for the images: operator and agent.
        #[arg(long)]
        binaries: PathBuf,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// PID 1 of a network's namespaces; the bed calls it.
    #[command(hide = true)]
    NetworkInit,
    /// PID 1 of a node's namespaces; the bed calls it.
    #[command(hide = true)]
    NodeInit {
        /// The node's folder.
        dir: PathBuf,
        /// Its name.
        name: String,
    },
    /// PID 1 of a hypervisor's namespaces; the bed calls it.
    #[command(hide = true)]
    HypervisorInit {
        /// The hypervisor's folder.
        dir: PathBuf,
        /// Its name.
        name: String,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    let options =
        |keep| Options { hypervisors: arguments.hypervisors, repository: arguments.repository.clone(), keep };
    match arguments.verb {
        Verb::HypervisorInit { dir, name } => hypervisor::init(&dir, &name)?,
        Verb::NetworkInit => nodes::network::init(),
        Verb::NodeInit { dir, name } => nodes::init::init(&dir, &name)?,
        Verb::Nodes { binaries, command } => {
            take_down_on_signal()?;
            let binaries = ["operator", "agent"].map(|name| (name, binaries.join(name)));
            let cluster = Cluster::up(arguments.hypervisors, |dir| {
                let version = env!("CARGO_PKG_VERSION");
                images::build(&arguments.repository, &binaries, images::REGISTRY, version, dir)
            })?;
            return within(&cluster.dir, &cluster.plane.kubeconfig, &command);
        }
        Verb::Build { guest: with_guest, nodes: with_nodes } => {
            controlplane::binaries()?;
            kubectl::search_path()?;
            helm::binary()?;
            if with_guest {
                guest::Image::get()?;
            }
            if with_nodes {
                controlplane::node_binaries()?;
                images::bases()?;
            }
        }
        Verb::Up => {
            let bed = Bed::up(&options(true))?;
            let node = bed.hypervisors.first().context("no hypervisor")?;
            // a VM to back up, which outlives this process: the bed's end is its end
            let disks = [Disk::qcow2("vda", 1 << 30), Disk::raw("vdb", 64 << 20)];
            let vm = disks.into_iter().fold(Plan::new("db01"), Plan::disk).start(node)?;
            vm.write("vda", 1 << 20, 1 << 20, 0x5a)?;
            std::mem::forget(vm);
            println!("export KUBECONFIG={}", bed.plane.kubeconfig.display());
            println!("export VIRTMARK_BED={}", bed.dir.display());
            println!("# next:  kubectl config set-context --current --namespace=vms");
            println!("#        kubectl get lvd; kubectl explain vmbackup.spec");
            println!("#        kubectl apply -f examples/vmbackup.yaml; kubectl get vmbk,imgt");
            println!("# virsh: virsh -c '{}' list --all", node.uri());
            println!("# logs:  {}/log", bed.dir.display());
            println!("# end:   make down");
        }
        Verb::Down => registry::kept()?.iter().for_each(|dir| down(dir)),
        Verb::Run { command } => {
            take_down_on_signal()?;
            let bed = Bed::up(&options(false))?;
            return within(&bed.dir, &bed.plane.kubeconfig, &command);
        }
        Verb::Demo => {
            take_down_on_signal()?;
            let bed = Bed::up(&options(false))?;
            let shown = demo::run(&bed, &arguments.repository);
            if shown.is_err() {
                eprintln!("--- the last lines of operator and agent ---");
                let logs = bed.logs();
                let tail: Vec<_> = logs.lines().rev().take(40).collect();
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
            bed.down();
            shown?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a command on the bed in `dir`, then takes it down; answers how the command ended.
fn within(dir: &Path, kubeconfig: &Path, command: &[String]) -> Result<ExitCode> {
    let (program, rest) = command.split_first().context("no command")?;
    let child = Command::new(program)
        .args(rest)
        .env("VIRTMARK_BED", dir)
        .env("KUBECONFIG", kubeconfig)
        .env("PATH", kubectl::search_path()?)
        .spawn();
    let status = child.and_then(|mut child| {
        COMMAND.store(child.id(), Ordering::Relaxed);
        let status = child.wait();
        COMMAND.store(0, Ordering::Relaxed);
        status
    });
    down(dir);
    let code = status.with_context(|| format!("{program} cannot be run"))?.code();
    Ok(code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The process of the command that runs on the bed; 0 when there is none.
static COMMAND: AtomicU32 = AtomicU32::new(0);

/// Kills a process and all that come from it.
fn end_tree(pid: u32) {
    let Some(process) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    // it makes no more of them while they are looked for; what it made is ended before it is forgotten whose they were
    let _ = kill_process(process, Signal::STOP);
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    children.for_each(|line| line.split_whitespace().filter_map(|pid| pid.parse().ok()).for_each(end_tree));
    let _ = kill_process(process, Signal::KILL);
}

/// Ctrl-C and SIGTERM take this process's beds down.
fn take_down_on_signal() -> Result<()> {
    ctrlc::set_handler(|| {
        eprintln!("taking the bed down");
        // a test that goes on would start again what is taken down
        end_tree(COMMAND.load(Ordering::Relaxed));
        let own = registry::mine().unwrap_or_default();
        own.iter().for_each(|dir| down(dir));
        std::process::exit(130);
    })?;
    Ok(())
}
