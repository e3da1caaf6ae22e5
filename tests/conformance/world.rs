//! What both servers have before them: disks behind real qemu-nbds, and the tickets for them.

use std::path::{Path, PathBuf};

use serde::Serialize;
use tempfile::TempDir;
use virtmark::imageio::TicketId;
use virtmark::nbd::Export;

use crate::case::Names;
use crate::nbd_qemu_rig::{QemuNbd, path, run, write};
use crate::twins::{self, Twins};

/// Bytes of the disk: no whole number of clusters.
pub(crate) const SIZE: u64 = (6 << 20) + 512;
/// Bytes that the small ticket permits.
pub(crate) const SMALL: u64 = (1 << 20) + 3;
/// Bytes that the large ticket permits, of the same disk.
pub(crate) const LARGE: u64 = SIZE + 4096;

/// What became of a ticket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Valid,
    /// Its transfer was canceled while it ran.
    Canceled,
    /// It was taken away.
    Removed,
    /// Its time ran out.
    Expired,
}

/// A ticket, in the form that imageio's control API takes, with its state.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Permit {
    pub(crate) uuid: String,
    pub(crate) transfer_id: String,
    pub(crate) size: u64,
    pub(crate) url: String,
    pub(crate) ops: &'static [&'static str],
    /// What is made zero may become a hole.
    pub(crate) sparse: bool,
    pub(crate) dirty: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) filename: Option<&'static str>,
    pub(crate) timeout: u32,
    pub(crate) inactivity_timeout: u32,
    pub(crate) state: State,
    /// The same as `url` says.
    #[serde(skip)]
    pub(crate) export: Export,
}

/// Disks, their NBD servers and the tickets; all gone with it.
pub(crate) struct World {
    /// The stock daemon's.
    pub(crate) permits: Vec<Permit>,
    /// The other server's: those that write do so to a disk of its own.
    pub(crate) others: Vec<Permit>,
    pub(crate) twins: Twins,
    pub(crate) names: Names,
    _servers: [QemuNbd; 2],
    pub(crate) directory: TempDir,
}

impl World {
    pub(crate) fn make() -> World {
        let directory = tempfile::tempdir().unwrap();
        let (chain, raw) = (serve_chain(directory.path()), serve_raw(directory.path()));
        let disk = |bitmap: Option<&str>| Export {
            socket: chain.socket.clone(),
            name: "vda".to_owned(),
            bitmap: bitmap.map(str::to_owned),
            changed_from: None,
        };
        let other = |socket: &PathBuf| Export {
            socket: socket.clone(),
            name: String::new(),
            bitmap: None,
            changed_from: None,
        };
        let dead = directory.path().join("nobody.sock");
        let mut permits = vec![
            Permit::new("disk", SIZE, disk(Some("b0"))),
            Permit { dirty: false, ..Permit::new("full", SIZE, disk(None)) },
            Permit { filename: Some("db 01 größe.raw"), ..Permit::new("named", SIZE, disk(None)) },
            Permit::new("small", SMALL, disk(None)),
            Permit::new("large", LARGE, disk(None)),
            Permit::new("empty", 0, disk(None)),
            Permit::new("raw", 1 << 20, other(&raw.socket)),
            Permit { dirty: true, ..Permit::new("nobitmap", 1 << 20, other(&raw.socket)) },
            Permit::new("dead", SIZE, other(&dead)),
            Permit { state: State::Canceled, ..Permit::new("canceled", SIZE, disk(None)) },
            Permit { state: State::Removed, ..Permit::new("removed", SIZE, disk(None)) },
            Permit { state: State::Expired, ..Permit::new("expired", SIZE, disk(None)) },
        ];
        let twins = Twins::make(directory.path());
        let (mine, theirs) = (permits.len(), twins.exports());
        let written = |name, size| Permit { ops: &["write"], ..Permit::new(name, size, theirs[0].clone()) };
        permits.extend([
            written("writable", twins::SIZE),
            Permit { sparse: true, ..written("sparse", twins::SIZE) },
            Permit { ops: &["read", "write"], ..written("both", twins::SIZE) },
            written("part", 4096),
            written("more", twins::SIZE + 4096),
            written("locked", 1 << 20).at(other(&raw.socket)),
            written("lost", SIZE).at(other(&dead)),
        ]);
        let mut others = permits.clone();
        for permit in others[mine..].iter_mut().filter(|permit| permit.export == theirs[0]) {
            *permit = permit.clone().at(theirs[1].clone());
        }
        let mut names: std::collections::BTreeMap<String, String> =
            permits.iter().map(|permit| (permit.transfer_id.clone(), permit.uuid.clone())).collect();
        names.insert("unknown".to_owned(), TicketId::random().unwrap().expose());
        names.insert("DISK".to_owned(), names["disk"].to_uppercase());
        let numbers = [("", SIZE), ("small.", SMALL), ("large.", LARGE), ("writable.", twins::SIZE)];
        for (of, size) in numbers {
            names.insert(format!("{of}size"), size.to_string());
            names.insert(format!("{of}last"), (size - 1).to_string());
            names.insert(format!("{of}past"), (size + 1).to_string());
        }
        World { permits, others, twins, names: Names(names), _servers: [chain, raw], directory }
    }

    /// Whether a request with this text may write to a disk.
    pub(crate) fn writes(&self, request: &[u8]) -> bool {
        let text = String::from_utf8_lossy(request);
        self.permits.iter().any(|permit| permit.ops.contains(&"write") && text.contains(&permit.uuid))
    }
}

impl Permit {
    fn new(transfer: &str, size: u64, export: Export) -> Permit {
        Permit {
            uuid: TicketId::random().unwrap().expose(),
            transfer_id: transfer.to_owned(),
            size,
            url: String::new(),
            ops: &["read"],
            sparse: false,
            dirty: export.bitmap.is_some(),
            filename: None,
            timeout: 3600,
            inactivity_timeout: 3600,
            state: State::Valid,
            export: export.clone(),
        }
        .at(export)
    }

    /// The same for another export.
    fn at(self, export: Export) -> Permit {
        let name =
            if export.name.is_empty() { String::new() } else { format!(":exportname={}", export.name) };
        let url = format!("nbd:unix:{}{name}", path(&export.socket));
        Permit { url, export, ..self }
    }
}

/// A chain of two qcow2: data, zeroes and holes in the lower layer, the upper one changes all of them, before and
/// after it has its bitmap; one stretch alternates with each cluster.
fn serve_chain(directory: &Path) -> QemuNbd {
    let size = SIZE.to_string();
    let (base, image) = (directory.join("base.qcow2"), directory.join("disk.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", path(&base), &size]);
    write(&base, &["write -P 1 0 512k", "write -z 512k 128k", "write -P 2 1M 256k"]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", path(&base), "-F", "qcow2", path(&image), &size]);
    write(&image, &["write -P 3 128k 64k", "write -z 1M 64k", "write -P 0 2M 64k", "write -P 4 3000k 100"]);
    run("qemu-img", &["bitmap", "--add", path(&image), "b0"]);
    let mut changes = vec![
        "write -P 5 0 64k".to_owned(),
        "write -z 64k 64k".to_owned(),
        "discard 2M 64k".to_owned(),
        "write -z 1600k 64k".to_owned(),
        "write -P 6 2500001 1000".to_owned(),
        format!("write -P 7 {} 512", SIZE - 512),
    ];
    for cluster in (64..80).step_by(2) {
        changes.push(format!("write -P {cluster} {}k 64k", cluster * 64));
        changes.push(format!("write -z {}k 32k", cluster * 64 + 64));
    }
    write(&image, &changes.iter().map(String::as_str).collect::<Vec<_>>());
    settle(&base);
    settle(&image);
    QemuNbd::start(directory, &["--format=qcow2", "-A", "-x", "vda", "--bitmap=b0", path(&image)])
}

/// Writes a file's every byte anew. What QEMU zeroed is allocated and not written; a file system calls that a hole until
/// somebody has read it, and data as long as the page cache then has it (Linux, `mapping_seek_hole_data`).
fn settle(image: &Path) {
    let bytes = std::fs::read(image).unwrap();
    std::fs::remove_file(image).unwrap();
    std::fs::write(image, bytes).unwrap();
}

/// A raw image: no bitmap, no allocation depth.
fn serve_raw(directory: &Path) -> QemuNbd {
    let image = directory.join("disk.raw");
    run("qemu-img", &["create", "-q", "-f", "raw", path(&image), "1M"]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 9 64k 4k", path(&image)]);
    QemuNbd::start(directory, &["--format=raw", path(&image)])
}
