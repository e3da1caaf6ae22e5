//! The client's process, as a user runs it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use virtmark_bed::component::VM_NAMESPACE;
use virtmark_bed::wait_until;

use super::rig::{BOUND, Rig};

/// The client, and the restore points that it makes for a test.
pub struct Client<'a> {
    rig: &'a Rig,
    pub to: PathBuf,
}

/// What a command said.
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// A command that runs.
pub struct Running {
    child: Child,
    /// Where its words go: a pipe that nobody reads would stop it.
    err: PathBuf,
    out: PathBuf,
}

impl<'a> Client<'a> {
    pub fn of(rig: &'a Rig) -> Self {
        Self { rig, to: rig.files.path().join("points") }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtmark"));
        command.args(arguments).stdin(Stdio::null());
        command.args(["-n", VM_NAMESPACE]).arg("--kubeconfig").arg(&self.rig.bed.plane.kubeconfig);
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, arguments: &[&str]) -> Result<Said> {
        let said = said(&self.command(arguments).output()?);
        if said.code != 0 {
            eprintln!("virtmark {arguments:?} ended with {}:\n{}", said.code, said.err);
        }
        Ok(said)
    }

    /// The same; it must end well.
    pub fn done(&self, arguments: &[&str]) -> Result<Said> {
        let said = self.run(arguments)?;
        ensure!(said.code == 0, "virtmark {arguments:?} ended with {}:\n{}", said.code, said.err);
        Ok(said)
    }

    /// A command with the folder of restore points behind `--to`.
    pub fn take(&self, arguments: &[&str]) -> Result<Point> {
        let said = self.done(&[&["backup"], arguments, &["--to", self.path()]].concat())?;
        self.point(said.out.trim())
    }

    /// The restore point in a folder. What it has in the cluster is deleted when the test ends.
    pub fn point(&self, folder: &str) -> Result<Point> {
        let folder = PathBuf::from(folder);
        let text = fs::read_to_string(folder.join("manifest.json")).with_context(|| format!("{folder:?}"))?;
        let manifest: Value = serde_json::from_str(&text)?;
        let point = Point { folder, manifest };
        self.note(&point.name());
        Ok(point)
    }

    /// What a backup of this name has in the cluster is deleted when the test ends.
    pub fn note(&self, backup: &str) {
        self.rig.made("vmbackup", backup);
        if let Ok(checkpoint) = self.rig.checkpoint_of(backup) {
            self.rig.made("vmcheckpoint", &checkpoint);
        }
    }

    pub fn path(&self) -> &str {
        self.to.to_str().unwrap_or_default()
    }

    /// Starts a command.
    pub fn start(&self, arguments: &[&str]) -> Result<Running> {
        let (out, err) = (self.rig.files.path().join("out"), self.rig.files.path().join("err"));
        let mut command = self.command(arguments);
        let child = command.stdout(fs::File::create(&out)?).stderr(fs::File::create(&err)?).spawn()?;
        Ok(Running { child, err, out })
    }

    /// Names of what is in the folder of restore points.
    pub fn names(&self) -> Result<Vec<String>> {
        let Ok(entries) = fs::read_dir(&self.to) else { return Ok(Vec::new()) };
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let mut names = names.collect::<Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    /// Waits until so many bytes of a disk's file are there of a backup that is being read; its name.
    pub fn reads(&self, running: &mut Running, file: &str, bytes: u64) -> Result<String> {
        wait_until(BOUND, "the client to read", || {
            if let Some(code) = running.ended()? {
                bail!("it ended with {code} before: {}", running.words());
            }
            let found = self.names()?.into_iter().find_map(|name| {
                let length = fs::metadata(self.to.join(&name).join(file)).ok()?.len();
                (length >= bytes).then(|| name.trim_matches('.').trim_end_matches(".partial").to_owned())
            });
            Ok(found)
        })
    }
}

impl Running {
    pub fn ended(&mut self) -> Result<Option<i32>> {
        Ok(self.child.try_wait()?.map(|status| status.code().unwrap_or(-1)))
    }

    pub fn words(&self) -> String {
        fs::read_to_string(&self.err).unwrap_or_default()
    }

    pub fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// Waits for its end.
    pub fn end(mut self) -> Result<Said> {
        let began = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(began.elapsed() < 3 * BOUND, "it does not end: {}", self.words());
            std::thread::park_timeout(std::time::Duration::from_millis(10));
        }
        let code = self.child.wait()?.code().unwrap_or(-1);
        Ok(Said { code, out: fs::read_to_string(&self.out)?, err: self.words() })
    }

    /// The most memory that it had while it ran, in bytes.
    pub fn end_with_memory(mut self) -> Result<(Said, u64)> {
        let path = format!("/proc/{}/status", self.child.id());
        let mut most = 0;
        while self.ended()?.is_none() {
            let status = fs::read_to_string(&path).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            most = most.max(kib.unwrap_or(0) * 1024);
            std::thread::park_timeout(std::time::Duration::from_millis(2));
        }
        Ok((self.end()?, most))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn said(output: &Output) -> Said {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said { code: output.status.code().unwrap_or(-1), out: text(&output.stdout), err: text(&output.stderr) }
}

/// A restore point.
pub struct Point {
    pub folder: PathBuf,
    pub manifest: Value,
}

impl Point {
    pub fn name(&self) -> String {
        self.manifest["name"].as_str().unwrap_or_default().to_owned()
    }

    pub fn disk(&self, target: &str) -> &Value {
        let disks = self.manifest["disks"].as_array().into_iter().flatten();
        disks.into_iter().find(|disk| disk["target"] == target).unwrap_or(&Value::Null)
    }

    /// How a disk was read, with the reason.
    pub fn mode(&self, target: &str) -> String {
        let disk = self.disk(target);
        let text = |key: &str| disk[key].as_str().unwrap_or_default();
        format!("{} {}", text("mode"), text("modeReason")).trim().to_owned()
    }

    pub fn file(&self, target: &str) -> PathBuf {
        self.folder.join(self.disk(target)["file"].as_str().unwrap_or_default())
    }
}

/// A copy of what the guest has now.
pub fn remember(rig: &Rig, target: &str, name: &str) -> Result<PathBuf> {
    let copy = rig.files.path().join(format!("{name}-{target}.then"));
    fs::rename(rig.vm.remember(target)?, &copy).or_else(|_| {
        let from = rig.vm.remember(target).map_err(std::io::Error::other)?;
        fs::copy(from, &copy).map(drop)
    })?;
    Ok(copy)
}

/// Turns one bit of the byte in the middle of a file.
pub fn damage(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::options().read(true).write(true).open(path)?;
    let at = file.metadata()?.len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 1], at)?;
    Ok(())
}
