//! Beds of their own: up, down, killed, and never in anybody's way.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use virtmark_bed::hypervisor::Hypervisor;
use virtmark_bed::ledger::Ledger;
use virtmark_bed::{Disk, Plan, down, wait_until};

/// The `bed` executable, beside which operator and agent are.
fn bed() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bed"));
    command.args(["--repository", ".."]);
    command
}

/// Pids of processes with `text` in their command line.
fn processes_about(text: &str) -> Vec<String> {
    let all = std::fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    all.filter(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    })
    .map(|entry| entry.file_name().to_string_lossy().into_owned())
    .collect()
}

fn nothing_is_left(dir: &Path) {
    let name = dir.to_string_lossy();
    assert!(!dir.exists(), "{name} is left");
    assert_eq!(processes_about(&name), Vec::<String>::new(), "processes of {name} are left");
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    assert!(!mounts.contains(&*name), "a mount of {name} is left");
}

/// Pids of processes that run on the bed in `dir`.
fn processes_on(dir: &Path) -> Vec<u32> {
    let on = format!("VIRTMARK_BED={}\0", dir.display());
    let all = std::fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    all.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .filter(|pid: &u32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            String::from_utf8_lossy(&environment).contains(&on)
        })
        .collect()
}

/// A run of a bed, in a cache of its own, so that no other run's sweep meets it.
struct Run {
    cache: tempfile::TempDir,
    process: Child,
    dir: PathBuf,
}

impl Run {
    /// Runs `script` on a bed.
    fn of(script: &str) -> Result<Self> {
        let cache = tempfile::tempdir()?;
        let built = virtmark_bed::cache::root()?;
        std::fs::create_dir(cache.path().join("virtmark"))?;
        for entry in std::fs::read_dir(&built)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("controlplane-") {
                let link = cache.path().join("virtmark").join(entry.file_name());
                std::os::unix::fs::symlink(entry.path(), link)?;
            }
        }
        let told = cache.path().join("told");
        let script = format!("echo $VIRTMARK_BED > {0}.new && mv {0}.new {0} && {script}", told.display());
        let process = bed()
            .args(["run", "--", "sh", "-c", &script])
            .env("XDG_CACHE_HOME", cache.path())
            .stdout(Stdio::null())
            .spawn()?;
        let dir = wait_until(Duration::from_secs(60), "the bed", || {
            Ok(std::fs::read_to_string(&told).ok().map(|dir| PathBuf::from(dir.trim())))
        })?;
        Ok(Self { cache, process, dir })
    }
}

#[test]
fn a_killed_run_is_taken_down_by_the_next() -> Result<()> {
    let Run { cache, mut process, dir } = Run::of("sleep 600")?;
    process.kill()?;
    process.wait()?;
    assert!(
        dir.exists() && !processes_about(&dir.to_string_lossy()).is_empty(),
        "killed, it left all behind"
    );
    // the next one sweeps before it does anything else
    let next = bed().args(["run", "--", "true"]).env("XDG_CACHE_HOME", cache.path()).output()?;
    assert!(next.status.success(), "{}", String::from_utf8_lossy(&next.stderr));
    assert!(String::from_utf8_lossy(&next.stderr).contains("which a run that was killed left"));
    nothing_is_left(&dir);
    for orphan in processes_on(&dir) {
        Command::new("kill").arg(orphan.to_string()).status()?;
    }
    Ok(())
}

#[test]
fn a_run_that_is_told_to_stop_ends_its_command_first() -> Result<()> {
    // what goes on by itself, as a test does that starts daemons again
    let Run { mut process, dir, cache: _cache } = Run::of("(while :; do sleep 1; done) & wait")?;
    assert!(processes_on(&dir).len() >= 2, "the command and its child");
    Command::new("kill").args(["-TERM", &process.id().to_string()]).status()?;
    assert!(!process.wait()?.success());
    nothing_is_left(&dir);
    let left = processes_on(&dir);
    for orphan in &left {
        Command::new("kill").args(["-KILL", &orphan.to_string()]).status()?;
    }
    assert_eq!(left, Vec::<u32>::new(), "it went on without its bed");
    Ok(())
}

#[test]
fn hypervisors_do_not_see_each_other_nor_the_machines() -> Result<()> {
    let dir = PathBuf::from(format!("/tmp/vmbed-t{:05}", std::process::id() % 100_000));
    std::fs::create_dir_all(&dir)?;
    let ledger = Ledger::of(&dir);
    let run = || -> Result<()> {
        let before = std::fs::read_to_string("/proc/mounts")?;
        let mut one = Hypervisor::start_new(&dir, "one", &ledger)?;
        let two = Hypervisor::start_new(&dir, "two", &ledger)?;
        let vm = Plan::new("alone").disk(Disk::qcow2("vda", 8 << 20)).start(&one)?;
        assert!(two.virsh(&["list", "--all", "--name"])?.trim().is_empty());
        assert!(!Path::new("/run/libvirt/libvirt-sock").exists(), "the machine's own libvirt was touched");
        assert_eq!(before, std::fs::read_to_string("/proc/mounts")?, "a mount came out of its namespace");
        vm.write("vda", 1 << 20, 1 << 20, 0x5a)?;
        let beyond = vm.write("vda", 8 << 20, 4096, 0x5a);
        assert!(beyond.is_err(), "a write past the end of the disk was believed");
        virtmark_bed::compare(&vm.mirror("vda"), &vm.image("vda"), "qcow2").context("before the flush").ok();
        vm.destroy()?;
        virtmark_bed::compare(&vm.mirror("vda"), &vm.image("vda"), "qcow2")?;
        drop(vm);
        one.power_off();
        assert!(one.virsh(&["list"]).is_err());
        one.start(&ledger)?;
        one.virsh(&["list"]).map(drop)
    };
    let ran = run();
    down(&dir);
    ran?;
    nothing_is_left(&dir);
    Ok(())
}

#[test]
fn ten_vms_at_once_do_not_meet() -> Result<()> {
    let bed = virtmark_bed::Bed::from_env()?;
    let node = bed.hypervisors.first().context("no hypervisor")?;
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..10_u8)
            .map(|n| {
                scope.spawn(move || -> Result<()> {
                    let vm = Plan::new(&format!("ten-{n}")).disk(Disk::qcow2("vda", 4 << 20)).start(node)?;
                    vm.write("vda", 0, 1 << 20, n)?;
                    vm.destroy()?;
                    virtmark_bed::compare(&vm.mirror("vda"), &vm.image("vda"), "qcow2")
                })
            })
            .collect();
        all.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow::anyhow!("a thread died"))?)
    })
}
