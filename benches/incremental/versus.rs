//! The same incremental backup by Virtmark and by Debian's virtnbdbackup, of one VM in turn; and by Virtmark alone of a
//! VM with many checkpoints and of one with few.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use virtmark::api::BackupType;
use virtmark_bed::{Disk, Plan, Vm};

use super::Bench;
use super::backup::Steps;
use super::report::Goal::{self, AtMost};
use super::report::Row;

const KIB: u64 = 1 << 10;
const GIB: u64 = 1 << 30;
/// Of the disk.
const SIZE: u64 = 6 * GIB;
/// What changes between two backups: so many pieces of so many bytes, all over the disk; 2 MiB.
const PIECES: u64 = 32;
const PIECE: u64 = 64 * KIB;
/// Checkpoints of the VM that has many.
const DEEP: usize = 20;
/// Seconds that oVirt published for such a backup. A constant, measured on other hardware.
const PUBLISHED_OVIRT: f64 = 3.9;

/// Of the peers' time.
const THIRD: Goal = AtMost(0.333);

/// Beside virtnbdbackup.
pub(crate) fn peer(bench: &Bench) -> Result<Vec<Row>> {
    let vm = vm(bench, "speed")?;
    let peer = Peer::new(bench, &vm)?;
    bench.full(&vm.name, 1)?;
    peer.run("full", 0)?;
    let (mut ours, mut theirs, mut busiest) = (Vec::new(), Vec::new(), 0.0);
    for round in 0..bench.rounds {
        change(&vm, round)?;
        // each has a chain of its own, and finds the same 2 MiB in it; who is first changes
        for is_ours in [round % 2 == 0, round % 2 != 0] {
            let (seconds, foreign) = bench.share(|| {
                if is_ours {
                    ours.push(bench.incremental(&vm.name, 1)?);
                    Ok(None)
                } else {
                    peer.run("inc", round + 1).map(Some)
                }
            })?;
            theirs.extend(seconds);
            busiest = foreign.max(busiest);
            if is_ours {
                bench.settle(&vm.name, 1)?;
            }
        }
    }
    let all = |step: fn(&Steps) -> f64| ours.iter().map(step).collect::<Vec<_>>();
    let total = all(Steps::total);
    let alone = |name, goal, runs| Row::alone(name, "s", goal, runs, busiest);
    Ok(vec![
        Row::new("incremental", "s", THIRD, [total.clone(), theirs], busiest),
        Row::new("incremental-ovirt-published", "s", THIRD, [total.clone(), vec![PUBLISHED_OVIRT]], busiest),
        alone("incremental-all", Some(AtMost(0.4)), total),
        alone("incremental-ready", None, all(|steps| steps.ready)),
        alone("incremental-ticket", None, all(|steps| steps.ticket)),
        alone("incremental-read", Some(AtMost(0.05)), all(|steps| steps.read)),
        alone("incremental-finalize", None, all(|steps| steps.finalize)),
    ])
}

/// From the newest of many checkpoints, beside from the only one.
pub(crate) fn depth(bench: &Bench) -> Result<Vec<Row>> {
    let (deep, shallow) = (vm(bench, "deep")?, vm(bench, "shallow")?);
    bench.full(&shallow.name, 1)?;
    bench.full(&deep.name, DEEP)?;
    for round in 1..DEEP {
        change(&deep, round)?;
        bench.incremental(&deep.name, DEEP)?;
        bench.settle(&deep.name, DEEP)?;
    }
    let (mut many, mut one, mut busiest) = (Vec::new(), Vec::new(), 0.0);
    for round in 0..bench.rounds {
        for vm in [&deep, &shallow] {
            change(vm, round)?;
        }
        for is_deep in [round % 2 == 0, round % 2 != 0] {
            let (vm, most) = if is_deep { (&deep, DEEP) } else { (&shallow, 1) };
            let (steps, foreign) = bench.share(|| bench.incremental(&vm.name, most))?;
            busiest = foreign.max(busiest);
            let runs = if is_deep { &mut many } else { &mut one };
            runs.push(steps.total());
            bench.settle(&vm.name, most)?;
        }
    }
    Ok(vec![Row::new("incremental-20-deep", "s", AtMost(1.2), [many, one], busiest)])
}

/// A VM that runs, with a disk that has some data.
fn vm(bench: &Bench, name: &str) -> Result<Vm> {
    let vm = Plan::new(name).disk(Disk::qcow2("vda", SIZE)).start(bench.hypervisor()?)?;
    vm.write("vda", GIB, 64 * KIB * KIB, 0x11)?;
    bench.published(&vm.name)?;
    Ok(vm)
}

/// Changes the same 2 MiB again.
fn change(vm: &Vm, round: usize) -> Result<()> {
    let pattern = u8::try_from(round % 200)? + 0x20;
    (0..PIECES).try_for_each(|piece| vm.write("vda", piece * (SIZE / PIECES), PIECE, pattern))
}

impl Bench {
    fn full(&self, vm: &str, most: usize) -> Result<()> {
        self.run(vm, BackupType::Full, most)?;
        self.settle(vm, most)
    }

    fn incremental(&self, vm: &str, most: usize) -> Result<Steps> {
        let steps = self.run(vm, BackupType::Incremental, most)?;
        // the last cluster that did not change is read with what did (`imageio/tail.rs`)
        let expected = PIECES * PIECE..=PIECES * PIECE + PIECE;
        ensure!(expected.contains(&steps.bytes), "{} bytes were read", steps.bytes);
        Ok(steps)
    }

    fn run(&self, vm: &str, kind: BackupType, most: usize) -> Result<Steps> {
        let number = self.backups.get() + 1;
        self.backups.set(number);
        self.runtime.block_on(self.product.backup(vm, &format!("{vm}-{number}"), kind, most))
    }

    fn settle(&self, vm: &str, most: usize) -> Result<()> {
        self.runtime.block_on(self.product.settle(vm, &format!("{vm}-{}", self.backups.get()), most))
    }
}

/// Debian's virtnbdbackup.
struct Peer {
    vm: String,
    uri: String,
    /// Where its backups go, and its scratch images and sockets: QEMU makes these.
    folder: PathBuf,
}

impl Peer {
    fn new(bench: &Bench, vm: &Vm) -> Result<Peer> {
        let hypervisor = bench.hypervisor()?;
        let folder = hypervisor.dir.join("peer");
        fs::create_dir_all(&folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o1777))?;
        // it takes a URI with a transport for a remote one, and asks for a password
        let uri = hypervisor.uri().replacen("qemu+unix:", "qemu:", 1);
        Ok(Peer { vm: vm.name.clone(), uri, folder })
    }

    /// Runs it, from process start to its end.
    fn run(&self, level: &str, round: usize) -> Result<f64> {
        let path = |name: &str| self.folder.join(name);
        let mut command = Command::new("virtnbdbackup");
        command.args(["--noprogress", "--domain", &self.vm, "--level", level, "--uri", &self.uri]);
        let paths: [(&str, &Path); 3] = [
            ("--output", &path("backup")),
            ("--scratchdir", &self.folder),
            ("--socketfile", &path(&format!("nbd-{round}.sock"))),
        ];
        for (flag, path) in paths {
            command.arg(flag).arg(path);
        }
        let begun = Instant::now();
        let output = command.stdin(Stdio::null()).output().context("virtnbdbackup")?;
        let seconds = begun.elapsed().as_secs_f64();
        ensure!(output.status.success(), "virtnbdbackup: {}", String::from_utf8_lossy(&output.stderr));
        let mut increments = Vec::new();
        for entry in fs::read_dir(path("backup"))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("vda.inc.") && name.ends_with(".data") {
                increments.push(entry.metadata()?.len());
            }
        }
        // it may go over to a full one by itself
        let whole = PIECES * PIECE..PIECES * PIECE * 3 / 2;
        ensure!(
            increments.len() == round && increments.iter().all(|bytes| whole.contains(bytes)),
            "virtnbdbackup made increments of {increments:?} bytes"
        );
        Ok(seconds)
    }
}
