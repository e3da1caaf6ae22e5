//! VMs that move from one hypervisor to another, before, between and during backups: their chains go on.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use virtmark_bed::hypervisor::Hypervisor;
use virtmark_bed::{Disk, wait_until};

use super::chain::Chain;
use super::rig::{BOUND, MIB, Rig};

/// The hypervisor with this index.
fn node(rig: &Rig, index: usize) -> Result<Hypervisor> {
    rig.bed.hypervisors.get(index).cloned().context("the bed has one hypervisor: bed --hypervisors 2")
}

/// Migrates, and waits until the inventory has it; answers how long that took after libvirt was done.
fn migrate(rig: &mut Rig, to: usize, flags: &[&str]) -> Result<Duration> {
    let to = node(rig, to)?;
    rig.vm.migrate(&to, flags)?;
    handed_over(rig, &to)
}

fn handed_over(rig: &Rig, to: &Hypervisor) -> Result<Duration> {
    let began = Instant::now();
    wait_until(BOUND, "the inventory to hand the VM over", || {
        let status = rig.get("lvd", &rig.vm.name)?["status"].clone();
        Ok((status["nodeName"] == to.name.as_str() && status["state"] == "Running").then_some(()))
    })?;
    Ok(began.elapsed())
}

#[test]
fn a_chain_goes_on_over_migrations_there_and_back() -> Result<()> {
    let mut rig = Rig::running("mover", [Disk::qcow2("vda", 32 * MIB), Disk::qcow2("vdb", 8 * MIB)])?;
    rig.vm.write("vda", 0, 8 * MIB, 0x11)?;
    let first = Chain::of(&rig, "mover").take("mover-1", json!({"type": "Incremental"}), || Ok(()))?;
    assert_eq!(first.mode("vda"), "Full NoBase");
    let mut base = first.checkpoint().to_owned();
    for (round, to) in [1, 0, 1].into_iter().enumerate() {
        let at = 10 * MIB + MIB * u64::try_from(round)?;
        rig.vm.write("vda", at, 65536, 0x21)?;
        let took = migrate(&mut rig, to, &[])?;
        println!("handed over {} ms after the migration", took.as_millis());
        rig.vm.write("vda", at + 65536, 65536, 0x22)?;
        rig.vm.write("vdb", 65536, 65536, 0x23)?;
        let backup = format!("mover-{}", round + 2);
        let strict = json!({"type": "Incremental", "onInvalidCheckpoint": "Fail"});
        let point = Chain::of(&rig, "mover").take(&backup, strict, || rig.vm.write("vda", 0, MIB, 0xee))?;
        assert_eq!((point.mode("vda").as_str(), point.base()), ("Incremental", base.as_str()));
        ensure!(point.restored["vda"].read <= 2 * MIB, "{:?} of 128 KiB and 1 MiB", point.restored["vda"]);
        assert_eq!(point.status["nodeName"], node(&rig, to)?.name);
        base = point.checkpoint().to_owned();
    }

    // off, and started on the other one from the same disks
    rig.vm.destroy()?;
    let home = node(&rig, 0)?;
    rig.vm.define_on(&home)?;
    rig.vm.start()?;
    handed_over(&rig, &home)?;
    rig.vm.write("vda", 20 * MIB, MIB, 0x33)?;
    let point = Chain::of(&rig, "mover").take("mover-5", json!({"type": "Incremental"}), || Ok(()))?;
    assert_eq!((point.mode("vda").as_str(), point.base()), ("Incremental", base.as_str()));
    Ok(())
}

#[test]
fn a_migration_asked_for_during_a_backup_waits_for_its_end_or_is_refused() -> Result<()> {
    let mut rig = Rig::running("drained", [Disk::qcow2("vda", 16 * MIB)])?;
    rig.vm.write("vda", 0, 4 * MIB, 0x11)?;
    let (home, away) = (node(&rig, 0)?, node(&rig, 1)?);
    rig.backup("drained-1", json!({}))?;
    rig.phase("vmbackup", "drained-1", "Ready")?;
    let socket = format!("unix://{}", away.migration_socket("drained")?.display());
    let asked = std::thread::spawn({
        let (home, away) = (home.clone(), away.uri());
        move || {
            let words =
                ["migrate", "--live", "--p2p", "--persistent", "--undefinesource", "--migrateuri", &socket];
            home.virsh(&[&words[..], &["--domain", "drained", "--desturi", &away]].concat())
        }
    });
    let first = Chain::of(&rig, "drained").go_on("drained-1", || rig.vm.write("vda", 0, MIB, 0xee))?;
    match asked.join().map_err(|_| anyhow::anyhow!("the thread panicked"))? {
        Ok(_) => {
            println!("the migration waited for the end of the backup");
            rig.vm.moved(&away);
            handed_over(&rig, &away)?;
        }
        Err(error) => {
            println!("the migration was refused: {error:#}");
            migrate(&mut rig, 1, &[])?;
        }
    }
    rig.host_is_clean()?;
    rig.vm.write("vda", 8 * MIB, MIB, 0x22)?;
    let point = Chain::of(&rig, "drained").take("drained-2", json!({"type": "Incremental"}), || Ok(()))?;
    assert_eq!((point.mode("vda").as_str(), point.base()), ("Incremental", first.checkpoint()));
    Ok(())
}

/// `virsh blockcopy` takes the bitmaps along (libvirt 11): the chain goes on in the new file.
#[test]
fn a_chain_goes_on_after_its_disk_was_copied_to_another_file() -> Result<()> {
    let rig = Rig::running("copied", [Disk::qcow2("vda", 16 * MIB)])?;
    rig.vm.write("vda", 0, 4 * MIB, 0x11)?;
    let mut base = String::new();
    for (round, expected) in ["Full NoBase", "Incremental", "Incremental"].into_iter().enumerate() {
        let backup = format!("copied-{}", round + 1);
        let point = Chain::of(&rig, "copied").take(&backup, json!({"type": "Incremental"}), || Ok(()))?;
        assert_eq!((point.mode("vda").as_str(), point.base()), (expected, base.as_str()));
        base = point.checkpoint().to_owned();
        let at = MIB * u64::try_from(4 + 2 * round)?;
        rig.vm.write("vda", at, MIB, 0x22)?;
        if round == 0 {
            let copy = rig.vm.image("copy");
            let to = copy.to_string_lossy();
            let words = ["blockcopy", "copied", "vda", &to, "--wait", "--pivot", "--transient-job"];
            rig.vm.hypervisor().virsh(&[&words[..], &["--format", "qcow2"]].concat())?;
        }
        rig.vm.write("vda", at + MIB, MIB, 0x33)?;
    }
    Ok(())
}

/// `--copy-storage-all` takes the bitmaps along as well, into an image that had none.
#[test]
fn a_chain_goes_on_where_a_vm_took_its_disks_along() -> Result<()> {
    let mut rig = Rig::running("carried", [Disk::qcow2("vda", 16 * MIB)])?;
    rig.vm.write("vda", 0, 4 * MIB, 0x11)?;
    let first = Chain::of(&rig, "carried").take("carried-1", json!({"type": "Incremental"}), || Ok(()))?;
    rig.vm.write("vda", 4 * MIB, MIB, 0x22)?;
    // another file of the same size, under a name of the other node
    let image = rig.vm.image("vda");
    let carried = rig.vm.image("carried");
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&carried)
        .arg((16 * MIB).to_string())
        .status()?;
    ensure!(made.success(), "qemu-img failed");
    std::fs::set_permissions(&carried, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let rename = |xml: String| xml.replace(&*image.to_string_lossy(), &carried.to_string_lossy());
    let file = |name: &str, xml: String| -> Result<String> {
        let path = rig.files.path().join(name);
        std::fs::write(&path, xml)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let home = node(&rig, 0)?;
    let live = file("live.xml", rename(home.virsh(&["dumpxml", "--migratable", "carried"])?))?;
    let kept = file("kept.xml", rename(home.virsh(&["dumpxml", "--inactive", "carried"])?))?;
    let disks = format!("unix://{}", node(&rig, 1)?.migration_socket("carried-disks")?.display());
    let flags = ["--copy-storage-all", "--disks-uri", &disks, "--xml", &live, "--persistent-xml", &kept];
    let took = migrate(&mut rig, 1, &flags)?;
    println!("handed over {} ms after the migration", took.as_millis());
    rig.vm.write("vda", 6 * MIB, MIB, 0x33)?;
    let second = Chain::of(&rig, "carried").take("carried-2", json!({"type": "Incremental"}), || Ok(()))?;
    assert_eq!((second.mode("vda").as_str(), second.base()), ("Incremental", first.checkpoint()));
    rig.vm.write("vda", 8 * MIB, MIB, 0x44)?;
    let third = Chain::of(&rig, "carried").take("carried-3", json!({"type": "Incremental"}), || Ok(()))?;
    assert_eq!((third.mode("vda").as_str(), third.base()), ("Incremental", second.checkpoint()));
    Ok(())
}
