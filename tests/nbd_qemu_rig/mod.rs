//! A real `qemu-nbd` on a temporary image, for the tests of the data path. Everything it starts is killed
//! and removed with it.
#![allow(dead_code, clippy::unwrap_used, reason = "a test rig, of which each test binary uses a part")]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use virtmark::nbd::Export;

/// Runs a command to its end; its standard output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Writes to an image through qemu-io, each command as its monitor takes it.
pub(crate) fn write(image: &Path, commands: &[&str]) {
    let mut arguments = vec!["-d", "unmap", path(image)];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    run("qemu-io", &arguments);
}

/// The path as a string.
pub(crate) fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Waits until `ready`, at most 20 s.
pub(crate) fn wait(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !ready() {
        assert!(Instant::now() < deadline, "waited 20 s for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process that dies with its handle.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A `qemu-nbd` that serves one image.
pub(crate) struct QemuNbd {
    /// Its process.
    pub(crate) process: Process,
    /// Its socket.
    pub(crate) socket: PathBuf,
}

impl QemuNbd {
    /// Starts one on `socket` in `directory`, read-only, with these arguments (the image among them), and waits
    /// until it answers.
    pub(crate) fn start(directory: &Path, arguments: &[&str]) -> QemuNbd {
        QemuNbd::started(directory, &[&["--read-only"], arguments].concat())
    }

    /// The same for an image that can be written, where what is discarded becomes a hole.
    pub(crate) fn writable(directory: &Path, arguments: &[&str]) -> QemuNbd {
        QemuNbd::started(directory, &[&["--discard=unmap"], arguments].concat())
    }

    fn started(directory: &Path, arguments: &[&str]) -> QemuNbd {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let socket = directory.join(format!("nbd{count}.sock"));
        let child = Command::new("qemu-nbd")
            .args(["--persistent", "--shared=16", "--socket", path(&socket)])
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd starts");
        let process = Process(child);
        wait("qemu-nbd to listen", || UnixStream::connect(&socket).is_ok());
        QemuNbd { process, socket }
    }

    /// Its export.
    pub(crate) fn export(&self, bitmap: Option<&str>) -> Export {
        Export {
            socket: self.socket.clone(),
            name: String::new(),
            bitmap: bitmap.map(str::to_owned),
            changed_from: None,
        }
    }

    /// Its address for libnbd's tools.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", path(&self.socket))
    }
}

/// A qcow2 image of 64 MiB and 512 bytes with the bitmap `b0`: data, zeroes and holes from before it, and
/// all three changed since. A qemu-nbd exports it with the bitmap and the allocation depth.
pub(crate) fn qcow2_with_bitmap(directory: &Path) -> (PathBuf, QemuNbd) {
    let image = directory.join("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", path(&image), "67109376"]);
    write(&image, &["write -P 1 0 3M", "write -P 2 10M 1M", "write -z 20M 1M", "write -P 3 40M 200k"]);
    run("qemu-img", &["bitmap", "--add", path(&image), "b0"]);
    write(
        &image,
        &[
            "write -P 4 1M 64k",
            "write -z 2M 128k",
            "discard 10M 512k",
            "write -P 5 30M 1000",
            "write -P 6 67108864 512",
            "write -z 50M 1M",
        ],
    );
    let server = QemuNbd::start(directory, &["--format=qcow2", "-A", "--bitmap=b0", path(&image)]);
    (image, server)
}

/// The image as raw bytes.
pub(crate) fn raw(image: &Path) -> Vec<u8> {
    let copy = image.with_extension("raw");
    run("qemu-img", &["convert", "-U", "-O", "raw", path(image), path(&copy)]);
    let bytes = std::fs::read(&copy).unwrap();
    std::fs::remove_file(copy).unwrap();
    bytes
}
