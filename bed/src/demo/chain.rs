//! The demo's second chapter: a chain of incrementals over a live migration and a deleted checkpoint, and every point of
//! it compared at the end. It never looks into what it compares with before that.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use virtmark_bed::component::VM_NAMESPACE;
use virtmark_bed::{Vm, compare, wait_until};

use super::{DISKS, MIB, Stage};

/// A restore point: its name, and per disk what was downloaded and what the guest had.
struct Point {
    day: &'static str,
    disks: Vec<(PathBuf, PathBuf)>,
}

impl Stage<'_> {
    /// Goes on from a full backup db01-monday whose images are in `directory`.
    pub(super) fn chain(&self, vm: &mut Vm, directory: &Path) -> Result<()> {
        let kept = directory.join("then");
        std::fs::create_dir_all(&kept)?;

        self.title("something changes, and an incremental backup reads just that");
        vm.write("vda", 3 * MIB, MIB, 0x55)?;
        vm.zero("vda", 1 << 30, 16 * MIB)?;
        let mut points = vec![self.incremental(vm, "tuesday", "monday", directory)?];

        self.title("the VM migrates, live, and its chain goes along");
        vm.write("vda", 2 << 30, MIB, 0x66)?;
        let to = self.bed.hypervisors.get(1).context("the demo wants two hypervisors")?.clone();
        println!("$ virsh migrate --live --p2p ... db01   # from {} to {}", vm.hypervisor().name, to.name);
        vm.migrate(&to, &[])?;
        self.published("{.status.nodeName}", &to.name)?;
        self.show(&["get", "lvd"])?;
        vm.write("vda", (2 << 30) + MIB, MIB, 0x67)?;
        points.push(self.incremental(vm, "wednesday", "tuesday", directory)?);

        self.title("the checkpoint in the middle is deleted, its bitmaps with it; the chain closes over it");
        self.show(&["get", "vmcp"])?;
        let middle = self.checkpoint_of("tuesday")?;
        self.show(&["delete", "vmcp", &middle])?;
        vm.write("vda", 4 << 30, MIB, 0x77)?;
        points.push(self.incremental(vm, "thursday", "wednesday", directory)?);
        self.show(&["get", "vmcp"])?;

        self.title("every restore point is, byte for byte, what the guest had");
        for point in &points {
            for (image, then) in &point.disks {
                compare(then, image, "qcow2").with_context(|| point.day)?;
                println!("{}: as the guest had it; {} of its own", image.display(), megabytes(image)?);
            }
        }
        Ok(())
    }

    /// One more incremental, from its YAML to Succeeded.
    fn incremental(&self, vm: &Vm, day: &'static str, before: &str, directory: &Path) -> Result<Point> {
        let backup = format!("db01-{day}");
        let manifest = std::fs::read_to_string(self.example("vmbackup-incremental.yaml"))?;
        let file = directory.join(format!("{day}.yaml"));
        std::fs::write(&file, manifest.replace("db01-tuesday", &backup))?;
        self.show(&["apply", "-f", &file.to_string_lossy()])?;
        self.show(&["wait", "--for=condition=Ready", "--timeout=30s", &format!("vmbackup/{backup}")])?;
        let modes = "custom-columns=NAME:.metadata.name,FROM:.status.fromCheckpoint,DISK:.status.disks[*].name,\
            MODE:.status.disks[*].mode,WHY:.status.disks[*].modeReason";
        self.show(&["get", "vmbackup", &backup, "-o", modes])?;
        let mut disks = Vec::new();
        for disk in DISKS {
            let then = directory.join("then").join(format!("{disk}.{day}"));
            std::fs::rename(vm.remember(disk)?, &then)?;
            let image = directory.join(format!("{disk}-{day}.qcow2"));
            // a raw disk is read in full
            let base = (disk == "vda").then(|| match before {
                "monday" => format!("{disk}.qcow2"),
                before => format!("{disk}-{before}.qcow2"),
            });
            self.download(&format!("{backup}-{disk}"), &image, "unix", base.as_deref())?;
            disks.push((image, then));
        }
        self.patch(&backup, "Finalized")?;
        self.show(&["wait", "--for=condition=Succeeded", "--timeout=30s", &format!("vmbackup/{backup}")])?;
        let usable = ["get", "vmcp", &self.checkpoint_of(day)?, "-n", VM_NAMESPACE, "-o"].map(str::to_owned);
        let usable = [&usable[..], &["jsonpath={.status.base}".to_owned()]].concat();
        wait_until(Duration::from_secs(10), "the next base", || {
            let usable: Vec<_> = usable.iter().map(String::as_str).collect();
            Ok((self.bed.kubectl().run(&usable)? == "Next").then_some(()))
        })?;
        Ok(Point { day, disks })
    }

    fn checkpoint_of(&self, day: &str) -> Result<String> {
        let backup = format!("db01-{day}");
        let path = "jsonpath={.status.toCheckpoint}";
        let name = self.bed.kubectl().run(&["get", "vmbackup", &backup, "-n", VM_NAMESPACE, "-o", path])?;
        ensure!(!name.is_empty(), "{backup} has no checkpoint");
        Ok(name)
    }
}

/// What a file takes, for people.
fn megabytes(file: &Path) -> Result<String> {
    use std::os::unix::fs::MetadataExt as _;
    let bytes = std::fs::metadata(file)?.blocks() * 512;
    Ok(format!("{:.1} MiB", f64::from(u32::try_from(bytes >> 10)?) / 1024.0))
}
