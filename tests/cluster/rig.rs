//! What the tests share: a VM and its backups, by names of their own, removed when the test ends.

#[path = "objects.rs"]
#[allow(dead_code, reason = "tests of many VMs at once use the rest")]
pub mod objects;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use base64ct::{Base64, Encoding as _};
use serde_json::{Value, json};
use virtmark_bed::component::VM_NAMESPACE;
use virtmark_bed::{Bed, Disk, Plan, Vm, wait_until};

use objects::Objects;

pub const MIB: u64 = 1 << 20;

/// Long enough for a loaded machine, short enough to end.
pub const BOUND: Duration = Duration::from_secs(60);

/// A VM on the shared bed, published, and the objects that a test makes about it.
pub struct Rig {
    pub bed: Bed,
    pub vm: Vm,
    pub objects: Objects,
    made: std::cell::RefCell<Vec<(&'static str, String)>>,
    pub files: tempfile::TempDir,
}

impl Rig {
    /// A VM that runs, with these disks.
    pub fn running(name: &str, disks: impl IntoIterator<Item = Disk>) -> Result<Self> {
        Self::running_on(0, name, disks)
    }

    /// A VM that runs, on the hypervisor with this index.
    pub fn running_on(index: usize, name: &str, disks: impl IntoIterator<Item = Disk>) -> Result<Self> {
        let rig = Self::off_on(index, name, disks)?;
        rig.vm.start()?;
        rig.published("Running")?;
        Ok(rig)
    }

    /// A VM that is off.
    pub fn off(name: &str, disks: impl IntoIterator<Item = Disk>) -> Result<Self> {
        Self::off_on(0, name, disks)
    }

    /// A VM that is off, on the hypervisor with this index. The second one is for tests that restart things.
    pub fn off_on(index: usize, name: &str, disks: impl IntoIterator<Item = Disk>) -> Result<Self> {
        let bed = Bed::from_env()?;
        let plan = disks.into_iter().fold(Plan::new(name), Plan::disk);
        let hypervisor =
            bed.hypervisors.get(index).context("the bed has one hypervisor: bed --hypervisors 2")?;
        let vm = plan.define(hypervisor)?;
        Self::of(bed, vm)
    }

    /// A VM that was made already.
    pub fn of(bed: Bed, vm: Vm) -> Result<Self> {
        let objects = Objects::of(&bed)?.patient(Duration::from_secs(2));
        let rig = Self { bed, vm, objects, made: std::cell::RefCell::default(), files: tempfile::tempdir()? };
        rig.published(if rig.vm.state()? == "running" { "Running" } else { "Off" })?;
        Ok(rig)
    }

    /// Waits until the VM is published in a state.
    pub fn published(&self, state: &str) -> Result<()> {
        wait_until(BOUND, &format!("{} to be published as {state}", self.vm.name), || {
            let found = self.get("lvd", &self.vm.name)?;
            Ok((found["status"]["state"] == state && found["spec"]["uuid"] == self.vm.uuid).then_some(()))
        })
    }

    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.bed.kubectl().run(&[&["-n", VM_NAMESPACE], arguments].concat())
    }

    /// An object, or null. A test that waits asks forty times a second: a kubectl each time would be most of what it costs.
    pub fn get(&self, kind: &str, name: &str) -> Result<Value> {
        if let Ok(resource) = known(kind)
            && let Ok(found) = self.objects.find(&resource, name)
        {
            return Ok(found);
        }
        let text = self.kubectl(&["get", kind, name, "--ignore-not-found", "-o", "json"])?;
        if text.trim().is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&text)?) }
    }

    /// The objects of a kind, with these labels.
    pub fn list(&self, kind: &str, labels: &str) -> Result<Vec<Value>> {
        self.objects.select(&known(kind)?, labels)
    }

    /// Makes a VmBackup of the VM; `spec` adds to, or overrides, the name of the VM.
    pub fn backup(&self, name: &str, spec: Value) -> Result<()> {
        self.create("vmbackup", json!({"name": name}), &self.whole(spec))
    }

    /// The same with the label of an owner.
    pub fn backup_of(&self, name: &str, owner: &str, spec: Value) -> Result<()> {
        let metadata = json!({"name": name, "labels": {"virtmark.dev/owner": owner}});
        self.create("vmbackup", metadata, &self.whole(spec))
    }

    fn whole(&self, spec: Value) -> Value {
        let mut whole = json!({"vm": self.vm.name});
        merge(&mut whole, spec);
        whole
    }

    pub fn transfer(&self, name: &str, spec: &Value) -> Result<()> {
        self.create("imagetransfer", json!({"name": name}), spec)
    }

    fn create(&self, kind: &'static str, metadata: Value, spec: &Value) -> Result<()> {
        self.made(kind, metadata["name"].as_str().context("no name")?);
        self.objects.make(&known(kind)?, metadata, spec).map(drop)
    }

    /// Notes an object that is to be deleted when the test ends.
    pub fn made(&self, resource: &'static str, name: &str) {
        self.made.borrow_mut().push((resource, name.to_owned()));
    }

    /// Patches `spec.state`.
    pub fn state(&self, kind: &str, name: &str, state: &str) -> Result<()> {
        self.objects.patch(&known(kind)?, name, &json!({"spec": {"state": state}}))
    }

    /// Waits for a phase; answers the status. Another end than the one waited for is an error at once.
    pub fn phase(&self, kind: &str, name: &str, phase: &str) -> Result<Value> {
        self.until(kind, name, &format!("have phase {phase}"), |status| {
            let now = status["phase"].as_str().unwrap_or_default();
            if now != phase && ["Succeeded", "Failed", "Cancelled"].contains(&now) {
                bail!("{kind} {name} is {now}, not {phase}: {}", ready(status));
            }
            Ok(now == phase)
        })
    }

    /// Waits for a reason of the Ready condition; answers its message.
    pub fn reason(&self, kind: &str, name: &str, reason: &str) -> Result<String> {
        let status = self.until(kind, name, &format!("have reason {reason}"), |status| {
            Ok(ready(status)["reason"] == reason)
        })?;
        Ok(ready(&status)["message"].as_str().unwrap_or_default().to_owned())
    }

    pub fn until(
        &self,
        kind: &str,
        name: &str,
        what: &str,
        holds: impl Fn(&Value) -> Result<bool>,
    ) -> Result<Value> {
        let object =
            self.objects.wait(&known(kind)?, BOUND, name, what, |object| holds(&object["status"]))?;
        Ok(object["status"].clone())
    }

    /// The name of the VmCheckpoint that a backup makes.
    pub fn checkpoint_of(&self, backup: &str) -> Result<String> {
        let status = self.get("vmbackup", backup)?["status"].clone();
        Ok(status["toCheckpoint"].as_str().context("it makes no checkpoint")?.to_owned())
    }

    /// Waits until an object is gone.
    pub fn gone(&self, kind: &str, name: &str) -> Result<()> {
        self.objects.wait(&known(kind)?, BOUND, name, "go", |object| Ok(object.is_null())).map(drop)
    }

    /// What a client needs of a transfer: its URL, the CA's file, the unix socket.
    pub fn ticket(&self, transfer: &str) -> Result<Ticket> {
        let status = self.phase("imagetransfer", transfer, "Ready")?;
        let name = status["ticketSecret"].as_str().context("no ticketSecret")?.to_owned();
        let secret = self.get("secret", &name)?;
        ensure!(secret["type"] == "virtmark.dev/ticket", "Secret {name}: {secret}");
        let text = |key: &str| -> Result<String> {
            let encoded = secret["data"][key].as_str().with_context(|| format!("the Secret has no {key}"))?;
            let bytes = Base64::decode_vec(encoded).map_err(|error| anyhow::anyhow!("{key}: {error}"))?;
            Ok(String::from_utf8(bytes)?)
        };
        let ca = self.files.path().join(format!("{name}.pem"));
        std::fs::write(&ca, text("ca.crt")?)?;
        Ok(Ticket { url: text("url")?, unix_socket: text("unixSocket")?.into(), ca, secret: name })
    }

    /// Reads a transfer's whole disk over HTTPS, and compares it with a remembered mirror.
    pub fn read(&self, transfer: &str, remembered: &Path) -> Result<()> {
        let ticket = self.ticket(transfer)?;
        let image = self.files.path().join(format!("{transfer}.raw"));
        let status = ticket.curl(&["-o", &image.to_string_lossy()])?;
        if status != "200" {
            bail!("HTTP {status}");
        }
        virtmark_bed::compare(remembered, &image, "raw")
    }

    /// Nothing of any backup of this VM is on the host: no job, no checkpoint, no file.
    pub fn host_is_clean(&self) -> Result<()> {
        let made = self.made.borrow();
        let backups = made.iter().filter(|(kind, _)| *kind == "vmbackup");
        let uids = backups.map(|(kind, name)| {
            Ok(self.get(kind, name)?["metadata"]["uid"].as_str().unwrap_or("none").to_owned())
        });
        host_is_clean(&self.vm, &uids.collect::<Result<Vec<_>>>()?)
    }

    /// Names of our checkpoints' bitmaps in a disk of the VM, running or off. Their marks are there with them, or gone.
    pub fn bitmaps(&self, target: &str) -> Result<Vec<String>> {
        let mut found = self.all_bitmaps(target)?;
        found.retain(|name| name.starts_with("virtmark-"));
        let (marks, bitmaps): (Vec<_>, Vec<_>) = found.into_iter().partition(|name| name.contains('.'));
        let is_left = |mark: &&String| !bitmaps.iter().any(|bitmap| mark.starts_with(&format!("{bitmap}.")));
        if let Some(left) = marks.iter().find(is_left) {
            bail!("{left} is left of a checkpoint that is gone");
        }
        Ok(bitmaps)
    }

    /// Names of all bitmaps in a disk of the VM, running or off.
    pub fn all_bitmaps(&self, target: &str) -> Result<Vec<String>> {
        if self.vm.state()? != "shut off" {
            return self.vm.live_bitmaps();
        }
        let output =
            Command::new("qemu-img").args(["info", "--output=json"]).arg(self.vm.image(target)).output()?;
        let info: Value = serde_json::from_slice(&output.stdout)?;
        let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
        Ok(bitmaps.iter().filter_map(|bitmap| bitmap["name"].as_str().map(str::to_owned)).collect())
    }

    /// The reasons of the Events about an object.
    pub fn events(&self, name: &str) -> Result<Vec<String>> {
        let about =
            self.list("events", "")?.into_iter().filter(|event| event["involvedObject"]["name"] == name);
        Ok(about.filter_map(|event| event["reason"].as_str().map(str::to_owned)).collect())
    }

    /// Waits for an Event about an object: it comes after the status that it tells of.
    pub fn told(&self, name: &str, reason: &str) -> Result<()> {
        wait_until(BOUND, &format!("an Event {reason} about {name}"), || {
            Ok(self.events(name)?.iter().any(|told| told == reason).then_some(()))
        })
    }

    /// Deletes the objects that the test made so far; what it deleted itself is gone already.
    pub fn delete_made(&self) -> Result<()> {
        self.delete_made_after(0)
    }

    /// Deletes the objects that the test made after the first `kept`.
    pub fn delete_made_after(&self, kept: usize) -> Result<()> {
        let made = self.made.borrow_mut().split_off(kept);
        for (kind, name) in made.iter().rev() {
            match known(kind) {
                Ok(resource) => self.objects.remove(&resource, name).and_then(|_| self.gone(kind, name))?,
                Err(_) => self.kubectl(&["delete", kind, name, "--ignore-not-found"]).map(drop)?,
            }
        }
        Ok(())
    }

    /// Deletes an object that is there, and waits until it is gone.
    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        ensure!(self.objects.remove(&known(kind)?, name)?, "there is no {kind} {name}");
        self.gone(kind, name)
    }
}

fn known(kind: &str) -> Result<kube::api::ApiResource> {
    objects::resource(kind).with_context(|| format!("{kind} is not known here"))
}

/// Nothing of the backups with these uids is on the host of their VM: no job, no checkpoint, no file. What the agent noted of one
/// goes right after its end is told.
pub fn host_is_clean(vm: &Vm, uids: &[String]) -> Result<()> {
    let node = vm.hypervisor();
    if vm.state()? == "running" {
        let job = node.virsh(&["domjobinfo", &vm.name])?;
        ensure!(job.contains("None"), "{job}");
    }
    // the agent that counts its dirty bytes has libvirt know a checkpoint for a moment
    wait_until(BOUND, "libvirt to have no note of a checkpoint", || {
        let noted = node.virsh(&["checkpoint-list", "--name", &vm.name])?;
        Ok(noted.trim().is_empty().then_some(()))
    })?;
    let agent = node.dir.join("agent");
    for uid in uids {
        ensure!(!agent.join("run").join(uid).exists(), "files of backup {uid} are left");
        wait_until(BOUND, &format!("the note of backup {uid} to go"), || {
            Ok((!agent.join("state/backups").join(uid).exists()).then_some(()))
        })?;
    }
    Ok(())
}

impl Drop for Rig {
    fn drop(&mut self) {
        // a test that failed says why already
        let _ = self.delete_made();
    }
}

/// A transfer's ticket.
pub struct Ticket {
    pub url: String,
    pub unix_socket: PathBuf,
    pub ca: PathBuf,
    pub secret: String,
}

impl Ticket {
    /// curl of the URL; answers the HTTP status.
    pub fn curl(&self, arguments: &[&str]) -> Result<String> {
        self.curl_at(&self.url, arguments)
    }

    pub fn curl_at(&self, url: &str, arguments: &[&str]) -> Result<String> {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "60", "-w", "%{http_code}", "--cacert"]).arg(&self.ca);
        if !arguments.contains(&"-o") {
            curl.args(["-o", "/dev/null"]);
        }
        let output = curl.args(arguments).arg(url).output()?;
        if !output.status.success() {
            bail!("curl: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}

fn ready(status: &Value) -> Value {
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    conditions.into_iter().find(|condition| condition["type"] == "Ready").unwrap_or_default()
}

/// Puts the keys of one object into another.
pub fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

/// One qcow2 disk of 64 MiB, `vda`.
pub fn small() -> [Disk; 1] {
    [Disk::qcow2("vda", 64 * MIB)]
}
