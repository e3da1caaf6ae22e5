//! The data path against its peers, side by side: `make bench`. What each row means: docs/benchmarks.md.
//!
//! ```text
//!                        +-- our image server ------+
//! image -- qemu-nbd -----+                          +-- driver (this process), stock client
//!  tmpfs    unix socket  +-- the stock ovirt-imageio+
//! ```
//!
//! Both sides do the same work for the same driver, in turn, in each round. It runs in namespaces of its own:
//! however it ends, the kernel ends all its processes and frees the tmpfs. Without `--bench`, so under `cargo
//! test`, it measures next to nothing and shows that every row comes out.

mod cases;
mod client;
#[path = "../cpu.rs"]
mod cpu;
mod image;
#[path = "../machine.rs"]
mod machine;
mod measure;
#[path = "../report.rs"]
mod report;
mod stage;
mod tls;

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use serde_json::json;

use cases::{CASES, CPU, CPU_UNIT, Case, Side};
use machine::{first_line, machine_with};
use measure::{Patience, Sample};
use report::{Row, Runs};
use stage::{Size, Stage};

/// Where the images are: nothing that anyone needs is hidden by mounting over it.
const TMPFS: &str = "/dev/shm";
/// Memory that must be left beside the images.
const SPARE: u64 = 1 << 30;

#[derive(Parser)]
#[command(about = "Measures the data path against its peers")]
struct Arguments {
    /// Also write the rows to this file, as JSON.
    #[arg(long, overrides_with = "json")]
    json: Option<PathBuf>,
    /// Rounds of each case; the rows show the medians.
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds that may be spent, in all, on waiting for a quiet machine and on repeated runs.
    #[arg(long)]
    patience: Option<u64>,
    /// Only the cases whose names begin so.
    #[arg(long)]
    only: Vec<String>,
    /// Our image server: the example `image_server` of the same build.
    #[arg(long)]
    server: Option<PathBuf>,
    /// A python with ovirt-imageio.
    #[arg(long, env = "VIRTMARK_PYTHON")]
    python: Option<PathBuf>,
    /// Measure, rather than show that it works.
    #[arg(long)]
    bench: bool,
    #[arg(long, hide = true)]
    inside: bool,
    #[arg(long, hide = true)]
    nbd_null: Option<PathBuf>,
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let ours = ["--bench", "--inside", "--nbd-null", "--help"];
    let arguments = if words.iter().any(|word| ours.contains(&word.as_str())) {
        Arguments::parse()
    } else {
        // `cargo test` gives the names of tests, and flags for its own harness.
        let names: Vec<_> = words.iter().filter(|word| !word.starts_with('-')).collect();
        if !names.is_empty() && !names.iter().any(|name| "data_path".contains(name.as_str())) {
            return Ok(());
        }
        Arguments::parse_from(["data_path"])
    };
    if let Some(socket) = &arguments.nbd_null {
        return cases::read_to_nowhere(socket);
    }
    if !arguments.inside {
        // Comes back only when it fails.
        let error = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .arg(std::env::current_exe()?)
            .args(if arguments.bench { words } else { Vec::new() })
            .arg("--inside")
            .exec();
        return Err(error).context("unshare");
    }
    end_on_signal()?;
    measure_all(&arguments)
}

/// The first process of a PID namespace has no default action on signals.
fn end_on_signal() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        runtime.block_on(async {
            let stop = virtmark::telemetry::stop_on_signal();
            let listens = stop.as_ref().map(|_| ()).map_err(std::io::Error::to_string);
            let _ = sender.send(listens);
            if let Ok(stop) = stop {
                stop.cancelled().await;
                std::process::exit(130);
            }
        });
    });
    receiver.recv()?.map_err(anyhow::Error::msg)
}

fn measure_all(arguments: &Arguments) -> Result<()> {
    let (size, rounds, patience) = if arguments.bench { (cases::FULL, 5, 300) } else { (cases::SMOKE, 1, 0) };
    let rounds = arguments.rounds.unwrap_or(rounds).max(1);
    let mut patience = Patience(Duration::from_secs(arguments.patience.unwrap_or(patience)));
    let chosen = |case: &&Case| {
        arguments.only.is_empty() || arguments.only.iter().any(|name| case.name.starts_with(name.as_str()))
    };
    let chosen: Vec<&Case> = CASES.iter().filter(chosen).collect();
    ensure!(!chosen.is_empty(), "no case has such a name");
    mount(size)?;
    let python = arguments.python.clone().context("no python with ovirt-imageio: set VIRTMARK_PYTHON")?;
    let stage = Stage::set(Path::new(TMPFS), size, &our_server(arguments)?, python)?;
    println!("# {}", machine()?);
    let mut rows = Vec::new();
    for case in chosen {
        for row in measure(case, &stage, rounds, &mut patience).context(case.name)? {
            println!("{row}");
            rows.push(row);
        }
    }
    let peak = peak_memory(stage.raw.ours.process.id())?;
    println!("# our server's most resident memory: {peak} KiB");
    if let Some(path) = &arguments.json {
        let document = json!({
            "machine": machine()?,
            "rounds": rounds,
            "dataBytes": size.data(),
            "ourPeakRssKib": peak,
            "rows": rows,
        });
        fs::write(path, format!("{document:#}\n")).with_context(|| path.display().to_string())?;
    }
    ensure!(rows.iter().all(|row| row.unit == CPU_UNIT || row.ratio > Some(0.0)), "a row without a ratio");
    Ok(())
}

/// The rows of a case: its own, and the server's CPU when that is told.
fn measure(case: &Case, stage: &Stage, rounds: usize, patience: &mut Patience) -> Result<Vec<Row>> {
    let (mut ours, mut peer): (Vec<Sample>, Vec<Sample>) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // Who comes first changes, so that neither always finds what the other left behind.
        let order = if round % 2 == 0 { [Side::Ours, Side::Peer] } else { [Side::Peer, Side::Ours] };
        for side in order {
            let sample = patience.run(|| case.work.run(stage, side))?;
            if side == Side::Ours { ours.push(sample) } else { peer.push(sample) }
        }
    }
    let foreign = ours.iter().chain(&peer).map(|sample| sample.foreign).fold(0.0, f64::max);
    let both = |value: fn(&Sample) -> Option<f64>| -> Option<[Vec<f64>; 2]> {
        Some([ours.iter().map(value).collect::<Option<_>>()?, peer.iter().map(value).collect::<Option<_>>()?])
    };
    let storage = both(|sample| sample.storage_per_gib);
    let mut rows = Vec::new();
    if let Some(rates) = both(|sample| Some(sample.rate)) {
        let mut row = Row::new(case.name, case.unit, case.goal, rates, foreign);
        row.storage_cpu = storage.map(|sides| sides.map(|runs| Runs::new(runs).median));
        rows.push(row);
    }
    if let Some(cpu) = both(|sample| sample.server_per_gib) {
        rows.push(Row::new(&format!("{}-cpu", case.name), CPU_UNIT, CPU, cpu, foreign));
    }
    Ok(rows)
}

/// A tmpfs for the image, and for what the stock client makes of it.
fn mount(size: Size) -> Result<()> {
    let bytes = 2 * size.data() + (64 << 20);
    let information = fs::read_to_string("/proc/meminfo")?;
    let available = information.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available: u64 = available.context("no MemAvailable")?.trim().trim_end_matches(" kB").parse()?;
    ensure!(
        available * 1024 >= bytes + SPARE,
        "{} MiB of memory are needed and {} MiB are available; end other programs",
        (bytes + SPARE) >> 20,
        available >> 10
    );
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", &format!("size={bytes},mode=700"), "virtmark-bench", TMPFS])
        .stdin(Stdio::null())
        .status()?;
    ensure!(status.success(), "cannot mount a tmpfs: {status}");
    Ok(())
}

fn our_server(arguments: &Arguments) -> Result<PathBuf> {
    if let Some(server) = &arguments.server {
        return Ok(server.clone());
    }
    // Under `cargo test` it has the same folder.
    let server = std::env::current_exe()?.with_file_name("image_server");
    if !server.exists() {
        bail!("{} is not built: cargo build --example image_server", server.display());
    }
    Ok(server)
}

/// When, on what, and against which versions.
fn machine() -> Result<String> {
    machine_with([first_line("qemu-nbd", &["--version"])?, first_line("nbdcopy", &["--version"])?])
}

/// In KiB.
fn peak_memory(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
