//! The client's download before a real image server and a real qemu-nbd: connections that are cut, a successor that goes on,
//! and that neither reads again what is there. On a whole cluster it is in `tests/client`.

#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, fail by panic")]

mod image_server_rig;
mod nbd_qemu_rig;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use image_server_rig::Server;
use nbd_qemu_rig::{QemuNbd, path, run, write};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use virtmark::client::download::{How, disk};
use virtmark::client::exit::Failure;
use virtmark::client::folder::Partial;
use virtmark::client::images::{Ticket, Way};
use virtmark::client::manifest::{DiskFormat, ReadMode};
use virtmark::client::progress::Done;
use virtmark::client::screen::Screen;
use virtmark::client::state::{DiskState, Kind, State};

const MIB: u64 = 1 << 20;
/// Of the disk's 128 MiB.
const DATA: u64 = 96 * MIB;

/// Stands before a server's socket: closes each connection after so many bytes of answers, and counts them all.
struct Cutter {
    socket: PathBuf,
    passed: Arc<AtomicU64>,
}

impl Cutter {
    fn start(directory: &Path, server: &Path, most: u64) -> Cutter {
        let socket = directory.join(format!("cut-{most}.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        let (passed, server) = (Arc::new(AtomicU64::new(0)), server.to_owned());
        let count = Arc::clone(&passed);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = UnixStream::connect(&server).await.unwrap();
                tokio::spawn(relay(client, server, most, Arc::clone(&count)));
            }
        });
        Cutter { socket, passed }
    }

    fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }
}

async fn relay(client: UnixStream, server: UnixStream, most: u64, count: Arc<AtomicU64>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let asks = tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
    let mut left = most;
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        match from_server.read(&mut buffer[..room]).await {
            Ok(read) if read > 0 && to_client.write_all(&buffer[..read]).await.is_ok() => {
                count.fetch_add(read as u64, Ordering::Relaxed);
                left -= read as u64;
            }
            _ => break,
        }
    }
    asks.abort();
}

/// A disk with data and holes, its server, and an empty restore point.
struct Bench {
    directory: tempfile::TempDir,
    image: PathBuf,
    nbd: QemuNbd,
    server: Server,
}

impl Bench {
    async fn new() -> Bench {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.raw");
        run("qemu-img", &["create", "-q", "-f", "raw", path(&image), "128M"]);
        write(&image, &["write -P 1 0 40M", "write -P 2 50M 10M", "write -P 3 70M 46M"]);
        let nbd = QemuNbd::start(directory.path(), &["--format=raw", path(&image)]);
        let server = Server::start(directory.path()).await;
        Bench { directory, image, nbd, server }
    }

    fn ticket(&self, cutter: &Cutter) -> Ticket {
        let (id, _) = self.server.ticket("t1", &self.nbd.export(None), 128 * MIB);
        let ca = std::fs::read(&self.server.ca).unwrap();
        let url = format!("https://127.0.0.1:{}/images/{id}", self.server.port);
        Ticket::new(&url, &ca, Some(cutter.socket.clone())).unwrap()
    }

    fn partial(&self) -> Partial {
        let mut state = State::new("point", "db01", "vms", Kind::Full, DiskFormat::Qcow2);
        let disk = DiskState {
            mode: ReadMode::Full,
            reason: None,
            file: "vda.full.qcow2".to_owned(),
            base: None,
            work: None,
            made: false,
            done: Done::default(),
            complete: false,
        };
        state.disks.insert("vda".to_owned(), disk);
        Partial::create(self.directory.path(), state).unwrap()
    }

    fn compare(&self, partial: &Partial) {
        let copy = partial.file("vda.full.qcow2");
        run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", path(&self.image), path(&copy)]);
        run("qemu-img", &["check", "-q", path(&copy)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_cut_costs_nothing_that_was_read() {
    let bench = Bench::new().await;
    let cutter = Cutter::start(bench.directory.path(), &bench.server.socket, 5 * MIB);
    let ticket = bench.ticket(&cutter);
    let mut partial = bench.partial();
    let (screen, stop) = (Screen::new(true), CancellationToken::new());
    let how = How { workers: 3, way: Way::Unix };
    disk(&mut partial, "vda", &ticket, how, &screen, &stop).await.unwrap();
    assert!(partial.state.disks["vda"].complete);
    bench.compare(&partial);
    let passed = cutter.passed();
    assert!((DATA..DATA + MIB).contains(&passed), "{passed} bytes for {DATA}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_goes_on_with_what_is_there() {
    let bench = Bench::new().await;
    let cutter = Cutter::start(bench.directory.path(), &bench.server.socket, u64::MAX);
    let ticket = bench.ticket(&cutter);
    let mut partial = bench.partial();
    let screen = Screen::new(true);
    let how = How { workers: 1, way: Way::Unix };
    let stop = CancellationToken::new();
    let watch = async {
        while cutter.passed() < 40 * MIB {
            tokio::task::yield_now().await;
        }
        stop.cancel();
    };
    let (done, ()) = tokio::join!(disk(&mut partial, "vda", &ticket, how, &screen, &stop), watch);
    assert!(matches!(done, Err(Failure::Interrupted)), "{done:?}");
    drop(partial);

    let mut partial = Partial::open(bench.directory.path(), "point").unwrap().unwrap();
    let state = &partial.state.disks["vda"];
    let kept = state.done.below;
    assert!(!state.complete && kept >= 16 * MIB, "{state:?}");
    let before = cutter.passed();
    disk(&mut partial, "vda", &ticket, how, &screen, &CancellationToken::new()).await.unwrap();
    bench.compare(&partial);
    // all of the first 40 MiB is data
    let again = cutter.passed() - before;
    assert!(again < DATA - kept.min(40 * MIB) + MIB, "{again} bytes, {kept} were there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_begins_anew_with_an_image_that_is_damaged() {
    let bench = Bench::new().await;
    let cutter = Cutter::start(bench.directory.path(), &bench.server.socket, u64::MAX);
    let ticket = bench.ticket(&cutter);
    let mut partial = bench.partial();
    let (screen, stop) = (Screen::new(true), CancellationToken::new());
    let how = How { workers: 1, way: Way::Unix };
    disk(&mut partial, "vda", &ticket, how, &screen, &stop).await.unwrap();
    partial.state.disks.entry("vda".to_owned()).and_modify(|disk| disk.complete = false);
    // two clusters of the guest in one of the file: it reads, and reads wrongly
    let file = File::options().read(true).write(true).open(partial.file("vda.full.qcow2")).unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let first = number(number(40)) & 0x00ff_ffff_ffff_fe00;
    file.write_all_at(&number(first).to_be_bytes(), first + 8).unwrap();
    disk(&mut partial, "vda", &ticket, how, &screen, &stop).await.unwrap();
    bench.compare(&partial);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_that_is_no_more_is_told_without_its_id() {
    let bench = Bench::new().await;
    let cutter = Cutter::start(bench.directory.path(), &bench.server.socket, u64::MAX);
    let ca = std::fs::read(&bench.server.ca).unwrap();
    let url = format!("https://127.0.0.1:{}/images/0f0f0f0f-dead-beef", bench.server.port);
    for way in [Way::Unix, Way::Https, Way::Auto] {
        let ticket = Ticket::new(&url, &ca, Some(cutter.socket.clone())).unwrap();
        let mut partial = bench.partial();
        let stop = CancellationToken::new();
        let how = How { workers: 1, way };
        let failure = disk(&mut partial, "vda", &ticket, how, &Screen::new(true), &stop).await.unwrap_err();
        let words = format!("{failure} {failure:?}");
        assert!(words.contains("403") && !words.contains("dead-beef"), "{words}");
        partial.remove().unwrap();
    }
}
