//! The demo: the main job, narrated, with the real output of real commands.

mod chain;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use virtmark_bed::component::VM_NAMESPACE;
use virtmark_bed::{Bed, Disk, Plan, compare, stock, wait_until};

const MIB: u64 = 1 << 20;

/// The VM's disks: a qcow2 and a raw one.
const DISKS: [&str; 2] = ["vda", "vdb"];

/// A terminal on which commands are typed.
struct Stage<'a> {
    bed: &'a Bed,
    repository: &'a Path,
    started: Instant,
}

/// Backs a running VM up, and compares every byte.
///
/// # Errors
/// The first thing that is not as it should be.
pub fn run(bed: &Bed, repository: &Path) -> Result<()> {
    let stage = Stage { bed, repository, started: Instant::now() };
    let kubectl = bed.kubectl();
    let node = bed.hypervisors.first().context("no hypervisor")?;

    stage.title("a VM runs, with a qcow2 and a raw disk");
    let mut vm =
        Plan::new("db01").disk(Disk::qcow2("vda", 6 << 30)).disk(Disk::raw("vdb", 512 * MIB)).start(node)?;
    for (offset, length, pattern) in
        [(0, 4 * MIB, 0x11), (1 << 30, 64 * MIB, 0x22), (6 * (1 << 30) - MIB, MIB, 0x33)]
    {
        vm.write("vda", offset, length, pattern)?;
    }
    vm.write("vdb", 100 * MIB, 10 * MIB, 0x44)?;
    stage.published("{.status.state}", "Running")?;
    stage.show(&["get", "lvd"])?;

    stage.title("kubectl apply of a VmBackup opens a point in time of its disks");
    let applied = Instant::now();
    stage.show(&["apply", "-f", &stage.example("vmbackup.yaml")])?;
    stage.show(&["wait", "--for=condition=Ready", "--timeout=30s", "vmbackup/db01-monday"])?;
    println!("(apply to Ready, as kubectl sees it: {} ms)", applied.elapsed().as_millis());
    let follower = stage.follow("db01-monday")?;
    stage.show(&["get", "vmbackups,imagetransfers,vmcheckpoints"])?;
    let then: Vec<(&str, PathBuf)> =
        DISKS.iter().map(|disk| Ok((*disk, vm.remember(disk)?))).collect::<Result<_>>()?;

    stage.title("the guest goes on writing; the point in time does not see it");
    vm.write("vda", 2 * MIB, MIB, 0xee)?;
    vm.write("vdb", 105 * MIB, MIB, 0xee)?;

    stage.title("finalizing before all was read is not obeyed: that would be a gap");
    stage.patch("db01-monday", "Finalized")?;
    let reason = ["get", "vmbackup", "db01-monday", "-n", VM_NAMESPACE, "-o"];
    let reason =
        [reason.as_slice(), &["jsonpath={.status.conditions[?(@.type==\"Ready\")].reason}"]].concat();
    wait_until(Duration::from_secs(10), "TransfersIncomplete", || {
        Ok((kubectl.run(&reason)? == "TransfersIncomplete").then_some(()))
    })?;
    stage.show(&["get", "vmbackup", "db01-monday"])?;

    stage.title("the stock ovirt-imageio client reads the disks, over HTTPS and over the unix socket");
    let directory = bed.dir.join("backup");
    std::fs::create_dir_all(&directory)?;
    for ((disk, remembered), over) in then.iter().zip(["https", "unix"]) {
        let image = directory.join(format!("{disk}.qcow2"));
        stage.download(&format!("db01-monday-{disk}"), &image, over, None)?;
        compare(remembered, &image, "qcow2")?;
        println!("{disk}: every byte is what the guest's disk held at the point in time");
    }

    stage.title("now it is finalized, and its checkpoint is where the next incremental starts");
    stage.show(&["wait", "--for=condition=Succeeded", "--timeout=30s", "vmbackup/db01-monday"])?;
    wait_until(Duration::from_secs(10), "the checkpoint to be usable", || {
        let usable = "jsonpath={.items[0].status.conditions[?(@.type==\"Usable\")].status}";
        Ok((kubectl.run(&["get", "vmcp", "-n", VM_NAMESPACE, "-o", usable])? == "True").then_some(()))
    })?;
    stage.show(&["get", "vmbackups,imagetransfers,vmcheckpoints,libvirtdomains"])?;
    stage.show(&["describe", "vmbackup", "db01-monday"])?;
    println!("$ python examples/follow.py --namespace {VM_NAMESPACE} db01-monday   # ran since it was Ready");
    let followed = follower.wait_with_output()?;
    print!("{}", String::from_utf8_lossy(&followed.stdout));
    if !followed.status.success() {
        bail!("examples/follow.py did not see it succeed");
    }

    stage.chain(&mut vm, &directory)?;

    stage.title("the whole round as an integrator writes it: examples/backup.py");
    stage.example_backup(&directory.join("py"))?;
    for disk in DISKS {
        compare(&vm.mirror(disk), &directory.join("py").join(format!("{disk}.qcow2")), "qcow2")?;
    }
    println!("both images are what the guest's disks held");

    stage.title("nothing is left on the host but the checkpoints' bitmaps");
    stage.nothing_left(&vm)?;
    stage.costs()?;
    println!("\ndone in {:.1} s; taking everything down", stage.started.elapsed().as_secs_f64());
    Ok(())
}

impl Stage<'_> {
    fn title(&self, text: &str) {
        println!("\n=== {text}  [{:.1} s]", self.started.elapsed().as_secs_f64());
    }

    /// Types a kubectl command and shows what it prints.
    fn show(&self, arguments: &[&str]) -> Result<()> {
        println!("$ kubectl -n {VM_NAMESPACE} {}", arguments.join(" "));
        let within = [&["-n", VM_NAMESPACE], arguments].concat();
        print!("{}", self.bed.kubectl().run(&within)?);
        Ok(())
    }

    fn example(&self, name: &str) -> String {
        self.repository.join("examples").join(name).to_string_lossy().into_owned()
    }

    fn patch(&self, backup: &str, state: &str) -> Result<()> {
        let patch = format!("{{\"spec\":{{\"state\":\"{state}\"}}}}");
        self.show(&["patch", "vmbackup", backup, "--type=merge", "-p", &patch])
    }

    /// Waits until the inventory says of the VM what it should.
    fn published(&self, path: &str, expected: &str) -> Result<()> {
        let kubectl = self.bed.kubectl();
        wait_until(Duration::from_secs(20), &format!("the VM to be published with {expected}"), || {
            let get = ["get", "lvd", "db01", "-n", VM_NAMESPACE, "-o", &format!("jsonpath={path}")];
            Ok((kubectl.run(&get).is_ok_and(|found| found == expected)).then_some(()))
        })
    }

    fn python(&self) -> Result<Command> {
        let mut command = Command::new(stock::python()?);
        command.env("KUBECONFIG", &self.bed.plane.kubeconfig);
        command.env("PATH", virtmark_bed::kubectl::search_path()?);
        Ok(command)
    }

    /// Reads one transfer with the stock client. On 127.0.0.1 it finds the server to be local, and takes the
    /// unix socket; on 127.0.0.2 it stays with HTTPS.
    /// With `base`, an image beside it, what changed is put over that.
    fn download(&self, transfer: &str, image: &Path, over: &str, base: Option<&str>) -> Result<()> {
        let more = base.map(|base| format!(", incremental=True, backing_file={base:?}")).unwrap_or_default();
        println!(
            "$ python: ovirt_imageio.client.download(url, {:?}, ca, fmt=\"qcow2\"{more})   # {over}",
            image.display()
        );
        let python = Command::new(stock::python()?);
        stock::download(python, &self.bed.plane.kubeconfig, (VM_NAMESPACE, transfer), image, over, base)
    }

    /// Starts examples/follow.py in the background.
    fn follow(&self, backup: &str) -> Result<Child> {
        let mut command = self.python()?;
        command.arg(self.example("follow.py")).args(["--namespace", VM_NAMESPACE, backup]);
        command.stdout(Stdio::piped()).spawn().context("examples/follow.py cannot be run")
    }

    fn example_backup(&self, directory: &Path) -> Result<()> {
        println!("$ python examples/backup.py --namespace {VM_NAMESPACE} db01 {}", directory.display());
        let mut command = self.python()?;
        command.arg(self.example("backup.py")).args(["--namespace", VM_NAMESPACE, "db01"]).arg(directory);
        if !command.status()?.success() {
            bail!("examples/backup.py failed");
        }
        Ok(())
    }

    fn nothing_left(&self, vm: &virtmark_bed::Vm) -> Result<()> {
        let node = vm.hypervisor();
        let run = node.dir.join("agent/run");
        println!("$ ls {}", run.display());
        let mut left: Vec<String> = std::fs::read_dir(&run)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        left.sort();
        println!("{}", left.join("\n"));
        if left != ["imageio.sock"] {
            bail!("scratch images or sockets are left");
        }
        println!("$ virsh checkpoint-list db01; virsh domjobinfo db01");
        // while the agent counts a checkpoint's dirty bytes, libvirt has a note of it for a moment
        let said = wait_until(Duration::from_secs(10), "libvirt to have neither checkpoint nor job", || {
            let checkpoints = node.virsh(&["checkpoint-list", "--name", "db01"])?;
            let job = node.virsh(&["domjobinfo", "db01"])?;
            let is_clean = checkpoints.trim().is_empty() && job.contains("None");
            Ok(is_clean.then_some(job))
        })?;
        println!("{}", said.trim());
        println!("# bitmaps in vda: {}", vm.live_bitmaps()?.join(", "));
        let secrets = self.bed.kubectl().run(&["get", "secrets", "-n", VM_NAMESPACE, "-o", "name"])?;
        if !secrets.trim().is_empty() {
            bail!("a ticket's Secret is left: {secrets}");
        }
        Ok(())
    }

    /// What it cost.
    fn costs(&self) -> Result<()> {
        let writes = [("operator", "virtmark-operator"), ("agent", "virtmark-agent")];
        for (name, account) in writes {
            let all = self.bed.writes_by(account)?;
            println!("# API writes by the {name}, five backups and the inventory: {}", all.len());
        }
        for component in std::iter::once(&self.bed.operator).chain(&self.bed.agents) {
            println!("# {} is resident with {} MiB", component.name, component.rss_kib()? >> 10);
        }
        Ok(())
    }
}
