//! Folders of restore points made by a seed, and what a guest would read of each.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use virtmark::client::exit::Failure;
use virtmark::client::folder::digest;
use virtmark::client::rewrite::{self, Wanted};
use virtmark::client::screen::Screen;
use virtmark::client::store::Store;
use virtmark::client::verify::{Found, verify};

const CLUSTER: u64 = 64 << 10;
/// No whole number of clusters.
pub const SIZE: u64 = 40 * CLUSTER + 1536;

/// A folder of restore points.
pub struct Folder {
    pub root: tempfile::TempDir,
    /// By restore point and disk.
    pub bytes: BTreeMap<(String, String), Vec<u8>>,
}

/// What a disk of a restore point is.
struct Layer<'a> {
    point: &'a str,
    disk: &'a str,
    /// What it lies over: a restore point and a file.
    over: Option<(&'a str, &'a str)>,
    format: &'a str,
}

pub fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    output
}

impl Folder {
    /// `points` of them, p0 to the newest, each over the one before. vda is a chain from the first; vdb is full again in the
    /// middle. The first is raw or qcow2.
    pub fn make(seed: u64, points: usize, format: &str) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut folder = Self { root: tempfile::tempdir().unwrap(), bytes: BTreeMap::new() };
        let mut state = BTreeMap::from([("vda", vec![0; to_usize(SIZE)]), ("vdb", vec![0; to_usize(SIZE)])]);
        let mut last: Option<Value> = None;
        for at in 0..points {
            let point = format!("p{at}");
            fs::create_dir(folder.path(&point)).unwrap();
            let mut disks = Vec::new();
            for disk in ["vda", "vdb"] {
                let is_full = at == 0 || disk == "vdb" && at == points / 2;
                let below = last.as_ref().filter(|_| !is_full).map(|last| {
                    let disks = last["disks"].as_array().unwrap();
                    let below = disks.iter().find(|below| below["target"] == disk).unwrap();
                    (last["name"].as_str().unwrap(), below["file"].as_str().unwrap(), below["format"].clone())
                });
                let over = below.as_ref().map(|(point, file, _)| (*point, *file));
                let format = if is_full && at == 0 { format } else { "qcow2" };
                let layer = Layer { point: &point, disk, over, format };
                let bytes = state.get_mut(disk).unwrap();
                if is_full {
                    bytes.fill(0);
                }
                let file = folder.write(&layer, bytes, &mut random);
                folder.bytes.insert((point.clone(), disk.to_owned()), bytes.clone());
                let (length, blake3) =
                    digest(&folder.path(&format!("{point}/{file}")), &CancellationToken::new()).unwrap();
                disks.push(json!({"target": disk, "serial": null, "size": SIZE,
                    "mode": if is_full { "Full" } else { "Incremental" }, "modeReason": null, "inCheckpoint": true,
                    "file": file, "format": format, "bytes": length, "blake3": blake3,
                    "base": below.map(|(_, file, format)| json!({"file": file, "format": format})),
                    "covered": {"read": 1, "zeroed": 2}}));
            }
            let parent =
                last.as_ref().map(|last| json!({"name": last["name"], "uid": last["backup"]["uid"]}));
            let manifest = json!({"version": 1, "name": point, "client": "virtmark 0.0.1",
                "vm": {"name": "db01", "namespace": "vms", "uuid": "u", "status": {}},
                "backup": {"name": point, "uid": format!("uid-{point}"), "node": "n", "outcome": "Succeeded"},
                "takenAt": format!("2026-11-30T00:00:{at:02}Z"), "quiesced": true,
                "checkpoint": {"name": format!("cp-{point}"), "bitmap": format!("b-{point}")},
                "parent": parent, "disks": disks});
            fs::write(folder.path(&format!("{point}/manifest.json")), manifest.to_string()).unwrap();
            last = Some(manifest);
        }
        folder
    }

    /// Writes a disk's file as a backup of what the guest did would.
    fn write(&self, layer: &Layer, bytes: &mut [u8], random: &mut StdRng) -> String {
        let kind = if layer.over.is_some() { "incr" } else { "full" };
        let file = format!("{}.{kind}.{}", layer.disk, layer.format);
        let path = self.path(&format!("{}/{file}", layer.point)).display().to_string();
        let size = SIZE.to_string();
        match layer.over {
            None => run("qemu-img", &["create", "-q", "-f", layer.format, &path, &size]),
            Some((point, below)) => {
                let format = if below.ends_with(".raw") { "raw" } else { "qcow2" };
                let below = format!("../{point}/{below}");
                run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &below, "-F", format, &path, &size])
            }
        };
        let mut arguments = vec!["-f".to_owned(), layer.format.to_owned()];
        for _ in 0..random.random_range(3..14) {
            let (what, start, length) = match random.random_range(0..5) {
                // a guest writes by the sector
                0 | 1 => {
                    let start = random.random_range(0..SIZE / 512) * 512;
                    let length = random.random_range(1..=(SIZE - start) / 512).min(300) * 512;
                    let byte = random.random_range(0..=2);
                    bytes[to_usize(start)..to_usize(start + length)].fill(byte);
                    (format!("write -P {byte}"), start, length)
                }
                2 | 3 => {
                    let start = random.random_range(0..SIZE / 512) * 512;
                    let length = random.random_range(1..=(SIZE - start) / 512).min(600) * 512;
                    bytes[to_usize(start)..to_usize(start + length)].fill(0);
                    let unmap = if random.random() { " -u" } else { "" };
                    (format!("write -z{unmap}"), start, length)
                }
                _ => {
                    let start = random.random_range(0..SIZE / CLUSTER) * CLUSTER;
                    let length = (random.random_range(1..6) * CLUSTER).min(SIZE / CLUSTER * CLUSTER - start);
                    bytes[to_usize(start)..to_usize(start + length)].fill(0);
                    ("discard".to_owned(), start, length)
                }
            };
            arguments.extend(["-c".to_owned(), format!("{what} {start} {length}")]);
        }
        arguments.push(path);
        let arguments: Vec<_> = [&["-d", "unmap"].map(str::to_owned), &arguments[..]].concat();
        run("qemu-io", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        file
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn store(&self) -> Store {
        Store::read(self.root.path()).unwrap()
    }

    /// Another folder with the same in it.
    pub fn copy(&self) -> Self {
        let root = tempfile::tempdir().unwrap();
        let from = format!("{}/.", self.root.path().display());
        run("cp", &["-a", &from, &root.path().display().to_string()]);
        Self { root, bytes: self.bytes.clone() }
    }

    pub fn wanted(&self, point: &str) -> Wanted {
        let dir = self.root.path().to_owned();
        Wanted { dir, point: Some(point.to_owned()), verify: true, dry_run: false }
    }

    pub async fn merge(&self, point: &str) -> Result<String, Failure> {
        rewrite::merge(&self.wanted(point), &Screen::new(true), &CancellationToken::new()).await
    }

    pub async fn rebase(&self, point: &str) -> Result<String, Failure> {
        rewrite::rebase(&self.wanted(point), &Screen::new(true), &CancellationToken::new()).await
    }

    pub async fn verify(&self) -> Found {
        verify(&self.store(), None, &Screen::new(true), &CancellationToken::new()).await.unwrap()
    }

    /// Every restore point that is there has what the guest had, and nothing is damaged.
    pub async fn is_as_it_was(&self, points: &[&str]) {
        let store = self.store();
        let names: Vec<_> = store.points.iter().map(|point| point.name.as_str()).collect();
        assert_eq!(names, points);
        let found = self.verify().await;
        assert_eq!(found.damaged(), 0, "{found:?}");
        for point in &store.points {
            for disk in &point.disks {
                let file = store.file(&point.name, &disk.file);
                let is = read(&file, disk.format.as_str());
                let was = &self.bytes[&(point.name.clone(), disk.target.clone())];
                let differs = is.iter().zip(was).position(|(is, was)| is != was);
                assert!(is.len() == was.len() && differs.is_none(), "{}: {differs:?}", file.display());
            }
        }
    }

    /// All that is in the folder.
    pub fn listing(&self) -> Vec<String> {
        let output = run("find", &[&self.root.path().display().to_string(), "-printf", "%P\n"]);
        let mut lines: Vec<_> =
            String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
        lines.sort();
        lines
    }
}

/// What a guest reads.
fn read(image: &Path, format: &str) -> Vec<u8> {
    let to = tempfile::NamedTempFile::new().unwrap();
    let to_path = to.path().display().to_string();
    run("qemu-img", &["convert", "-f", format, "-O", "raw", &image.display().to_string(), &to_path]);
    fs::read(to.path()).unwrap()
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).unwrap()
}
