//! What is measured, each once with ours and once with the peer: the same work by the same driver.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rand::{Rng as _, SeedableRng as _};
use virtmark::nbd::{Client as NbdClient, Export};

use super::client::{Client, Way, get_all, in_threads};
use super::cpu::of_process;
use super::measure::Sample;
use super::report::Goal::{self, AtLeast};
use super::stage::{Disk, Server, Stage, text};

/// Longest range that the stock client asks for, and so do we.
const LONGEST: u64 = 128 << 20;
/// Bytes of a small request.
const SMALL: u64 = 4096;
/// What the server's CPU for a GiB may be, of the peer's.
pub(crate) const CPU: Goal = Goal::AtMost(0.55);
/// Its unit.
pub(crate) const CPU_UNIT: &str = "s/GiB";

const MIB: &str = "MiB/s";
const REQUESTS: &str = "requests/s";

/// Whose run it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Side {
    Ours,
    Peer,
}

/// One thing to measure.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) goal: Goal,
    pub(crate) work: Work,
}

/// What is done.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// All data over one NBD connection to nowhere: our client, nbdcopy.
    Nbd,
    /// All data in ranges, dropped, over so many connections.
    Ranges(Over, usize),
    /// The stock client to a raw file, with four workers.
    Download,
    /// The list of extents.
    Extents,
    /// Small ranges anywhere in the data, over so many connections.
    Small(Over, usize),
}

/// The kind of connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Over {
    Https,
    Unix,
}

const fn case(name: &'static str, unit: &'static str, goal: f64, work: Work) -> Case {
    Case { name, unit, goal: AtLeast(goal), work }
}

/// In the order of the rows.
pub(crate) const CASES: &[Case] = &[
    case("nbd-null", MIB, 1.2, Work::Nbd),
    case("https-1", MIB, 1.8, Work::Ranges(Over::Https, 1)),
    case("https-4", MIB, 1.8, Work::Ranges(Over::Https, 4)),
    case("unix-1", MIB, 1.5, Work::Ranges(Over::Unix, 1)),
    case("unix-4", MIB, 1.5, Work::Ranges(Over::Unix, 4)),
    case("client-https-raw-4", MIB, 1.3, Work::Download),
    case("extents", "extents/s", 5.0, Work::Extents),
    case("small-https-1", REQUESTS, 4.0, Work::Small(Over::Https, 1)),
    case("small-https-4", REQUESTS, 4.0, Work::Small(Over::Https, 4)),
    case("small-unix-1", REQUESTS, 4.0, Work::Small(Over::Unix, 1)),
    case("small-unix-4", REQUESTS, 4.0, Work::Small(Over::Unix, 4)),
];

impl Work {
    fn disk(self, stage: &Stage) -> &Disk {
        if matches!(self, Work::Extents) { &stage.alternating } else { &stage.raw }
    }

    /// Does it once. What others used of the machine is not known here.
    pub(crate) fn run(self, stage: &Stage, side: Side) -> Result<Sample> {
        let disk = self.disk(stage);
        let server = if side == Side::Ours { &disk.ours } else { &disk.peer };
        let (process, nbd) = (server.process.id(), disk.nbd.id());
        let before = (of_process(process)?, of_process(nbd)?);
        let begun = Instant::now();
        let (amount, took) = match self {
            Work::Nbd => (mib(stage.size.data()), nbd_null(disk, side)?),
            Work::Ranges(over, connections) => {
                get_all(server.way(over), &server.path, &ranges(&stage.data), connections)?;
                (mib(stage.size.data()), begun.elapsed().as_secs_f64())
            }
            Work::Download => (mib(stage.size.data()), download(stage, server)?),
            Work::Extents => {
                let count = count_extents(server, stage.size.extents)?;
                (count, begun.elapsed().as_secs_f64())
            }
            Work::Small(over, connections) => {
                let requests = small(server.way(over), &server.path, stage, connections)?;
                (requests, begun.elapsed().as_secs_f64())
            }
        };
        let (server, nbd) = (of_process(process)? - before.0, of_process(nbd)? - before.1);
        let gib = mib(stage.size.data()) / 1024.0;
        Ok(Sample {
            rate: amount / took,
            server_per_gib: matches!(self, Work::Ranges(..) | Work::Download).then_some(server / gib),
            storage_per_gib: matches!(self, Work::Nbd | Work::Ranges(..)).then_some(nbd / gib),
            foreign: 0.0,
        })
    }
}

impl Server {
    fn way(&self, over: Over) -> &Way {
        match over {
            Over::Https => &self.https,
            Over::Unix => &self.unix,
        }
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// The data, in the requests that the stock client makes.
fn ranges(data: &[Range<u64>]) -> Vec<Range<u64>> {
    let cut = |range: &Range<u64>| {
        let end = range.end;
        (range.start..end).step_by(1 << 27).map(move |start| start..end.min(start + LONGEST))
    };
    data.iter().flat_map(cut).collect()
}

/// Both as processes of their own, from their start to their end; seconds.
fn nbd_null(disk: &Disk, side: Side) -> Result<f64> {
    let socket = text(&disk.socket)?;
    let mut command = match side {
        Side::Ours => {
            let mut ours = Command::new(std::env::current_exe()?);
            ours.args(["--nbd-null", socket]);
            ours
        }
        Side::Peer => {
            let mut nbdcopy = Command::new("nbdcopy");
            nbdcopy.args(["-C1", &format!("nbd+unix:///?socket={socket}"), "null:"]);
            nbdcopy
        }
    };
    let begun = Instant::now();
    let status = command.stdin(Stdio::null()).status().context("the NBD client")?;
    ensure!(status.success(), "the NBD client of {side:?} failed: {status}");
    Ok(begun.elapsed().as_secs_f64())
}

/// Our side of [`nbd_null`]: what is not zero is read and dropped.
pub(crate) fn read_to_nowhere(socket: &Path) -> Result<()> {
    let export = Export { socket: socket.to_owned(), name: String::new(), bitmap: None, changed_from: None };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut stream = NbdClient::connect(&export).await?.block_status(0)?;
        let mut extents = Vec::new();
        while let Some(extent) = stream.next().await {
            extents.push(extent?);
        }
        let mut client = stream.into_client().context("unread replies")?;
        for extent in extents.iter().filter(|extent| !extent.zero()) {
            let mut stream = client.read_stream(extent.start, extent.length)?;
            while let Some(bytes) = stream.next().await {
                bytes?;
            }
            client = stream.into_client().context("unread replies")?;
        }
        Ok(client.disconnect().await?)
    })
}

/// Without the start of python.
const DOWNLOAD: &str = "
import sys, time
from ovirt_imageio import client
url, target, ca = sys.argv[1:]
begun = time.monotonic()
client.download(url, target, ca, fmt='raw', max_workers=4)
print(time.monotonic() - begun)
";

/// Seconds of the stock client's download.
fn download(stage: &Stage, server: &Server) -> Result<f64> {
    let (target, ca) = (text(&stage.target)?, text(&server.ca)?);
    let output = Command::new(&stage.python)
        .args(["-c", DOWNLOAD, &server.url, target, ca])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| stage.python.display().to_string())?;
    ensure!(output.status.success(), "the stock client failed: {}", output.status);
    fs::remove_file(&stage.target)?;
    Ok(std::str::from_utf8(&output.stdout)?.trim().parse()?)
}

/// How many extents the server told, which must be as many as there are.
fn count_extents(server: &Server, expected: u64) -> Result<f64> {
    let json = Client::connect(&server.https, &server.path)?.extents()?;
    let count = json.iter().filter(|byte| **byte == b'{').count();
    ensure!(count as u64 == expected, "{count} extents where there are {expected}");
    Ok(expected as f64)
}

/// How many small ranges were read.
fn small(way: &Way, path: &str, stage: &Stage, connections: usize) -> Result<f64> {
    let deadline = Instant::now() + stage.size.small;
    let counts = in_threads(connections, |number| {
        let mut client = Client::connect(way, path)?;
        let mut random = rand::rngs::StdRng::seed_from_u64(number as u64);
        let mut requests = 0_u32;
        while Instant::now() < deadline {
            let range = &stage.data[random.random_range(0..stage.data.len())];
            let blocks = (range.end - range.start) / SMALL;
            let start = range.start + SMALL * random.random_range(0..blocks);
            client.get(&(start..start + SMALL))?;
            requests += 1;
        }
        Ok(requests)
    })?;
    Ok(counts.into_iter().map(f64::from).sum())
}

/// The whole sizes and the small ones of a smoke run.
pub(crate) const FULL: super::stage::Size =
    super::stage::Size { pieces: 16, piece: 128 << 20, extents: 131_072, small: Duration::from_millis(1500) };
/// Enough that every row comes out.
pub(crate) const SMOKE: super::stage::Size =
    super::stage::Size { pieces: 2, piece: 1 << 20, extents: 256, small: Duration::from_millis(50) };
