//! Disks that are changed between two backups: cut and grown back, exchanged, replaced by copies, unplugged, snapshotted.
//! Each row is a disk of one VM, and every restore point is what the guest has.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use virtmark_bed::{Disk, wait_until};

use super::chain::{Chain, Point};
use super::rig::{BOUND, MIB, Rig};

const SIZE: u64 = 4 * MIB;

/// What the next incremental makes of a disk.
type Rows<'a> = &'a [(&'a str, &'a str)];

fn qemu_img(arguments: &[&str]) -> Result<()> {
    let output = Command::new("qemu-img").args(arguments).output()?;
    ensure!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Every disk gets bytes of its own, from its beginning to its end.
fn fill(rig: &Rig, rows: Rows<'_>) -> Result<()> {
    for (number, (disk, _)) in (1..).zip(rows) {
        rig.vm.write(disk, 0, SIZE - MIB / 2, number)?;
        rig.vm.write(disk, SIZE - 65536, 65536, number)?;
    }
    Ok(())
}

/// Every disk is changed in a place of its own.
fn change(rig: &Rig, rows: Rows<'_>, round: u64) -> Result<()> {
    for (number, (disk, _)) in (0..).zip(rows) {
        rig.vm.write(disk, round * MIB + number * 4096, 4096, 0x80)?;
    }
    Ok(())
}

/// Waits until the inventory shows what the VM has: these disks, and formats.
fn shown(rig: &Rig) -> Result<()> {
    let xml = rig.vm.hypervisor().virsh(&["domblklist", &rig.vm.name])?;
    let count = xml.lines().filter(|line| line.trim_start().starts_with("vd")).count();
    wait_until(BOUND, "the inventory to show the disks", || {
        let status = rig.get("lvd", &rig.vm.name)?["status"].clone();
        let disks = status["disks"].as_array().cloned().unwrap_or_default();
        let known = disks.iter().filter(|disk| disk["size"].is_u64()).count();
        Ok((status["state"] == "Running" && known == count).then_some(()))
    })
}

/// Takes an incremental, which is compared byte by byte, and says how each disk was read.
fn expect(chain: &Chain<'_>, backup: &str, rows: Rows<'_>) -> Result<Point> {
    let point = chain.take(backup, json!({"type": "Incremental"}), || Ok(()))?;
    let found: Vec<_> = rows.iter().map(|(disk, _)| (*disk, point.mode(disk))).collect();
    let expected: Vec<_> = rows.iter().map(|(disk, mode)| (*disk, (*mode).to_owned())).collect();
    assert_eq!(found, expected);
    Ok(point)
}

/// Puts a file in another's place, as `mv` does, or over its bytes, as `cp` does.
fn put(from: &Path, to: &Path, in_place: bool) -> Result<()> {
    if !in_place && to.exists() {
        fs::remove_file(to)?;
    }
    fs::copy(from, to).with_context(|| format!("{} to {}", from.display(), to.display()))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(0o666))?)
}

/// Files take each other's names.
fn exchange(one: &[PathBuf], other: &[PathBuf]) -> Result<()> {
    for (one, other) in one.iter().zip(other) {
        let aside = one.with_extension("aside");
        fs::rename(one, &aside)?;
        fs::rename(other, one)?;
        fs::rename(&aside, other)?;
    }
    Ok(())
}

const OFF: Rows<'static> = &[
    ("vda", "Incremental"),
    // their places in the definition are exchanged
    ("vdd", "Full DiskReplaced"),
    ("vde", "Full DiskReplaced"),
    // overwritten by a copy of vdg, vdh replaced by one
    ("vdf", "Full DiskReplaced"),
    ("vdg", "Incremental"),
    ("vdh", "Full DiskReplaced"),
    // overwritten by a copy of itself that was made while the VM was off: it has the bitmap of that time
    ("vdi", "Incremental"),
    // converted with its bitmaps, and without
    ("vdk", "Incremental"),
    ("vdl", "Full BitmapInvalid"),
    // a new and empty one
    ("vdm", "Full BitmapInvalid"),
    // qcow2 to raw, raw to qcow2
    ("vdn", "Full CannotKeepBitmap"),
    ("vdo", "Full NotInCheckpoint"),
    // cut, and grown back
    ("vdp", "Incremental"),
    // committed by hand from an overlay
    ("vdq", "Incremental"),
];

#[test]
fn images_that_are_changed_while_the_vm_is_off() -> Result<()> {
    let disk =
        |target: &str| if target == "vdo" { Disk::raw(target, SIZE) } else { Disk::qcow2(target, SIZE) };
    let rig = Rig::running("reshaped", OFF.iter().map(|(target, _)| disk(target)))?;
    let (vm, node) = (&rig.vm, rig.vm.hypervisor());
    let both = |disk: &str| [vm.image(disk), vm.mirror(disk)];
    let copy_of = |disk: &str| both(disk).map(|path| path.with_added_extension("copy"));
    let chain = Chain::of(&rig, "reshaped");
    fill(&rig, OFF)?;
    chain.take("reshaped-1", json!({}), || Ok(()))?;
    change(&rig, OFF, 1)?;
    vm.destroy()?;
    for (from, to) in both("vdi").iter().zip(copy_of("vdi")) {
        put(from, &to, true)?;
    }
    vm.start()?;
    change(&rig, OFF, 2)?;
    vm.destroy()?;

    let mut xml = node.virsh(&["dumpxml", "--inactive", &vm.name])?;
    let [d, e] = [vm.image("vdd"), vm.image("vde")].map(|path| text(&path));
    xml = xml.replace(&d, "ASIDE").replace(&e, &d).replace("ASIDE", &e);
    exchange(&[vm.mirror("vdd")], &[vm.mirror("vde")])?;
    for (from, to, in_place) in [("vdg", "vdf", true), ("vdg", "vdh", false)] {
        for (from, to) in both(from).iter().zip(both(to)) {
            put(from, &to, in_place)?;
        }
    }
    for (from, to) in copy_of("vdi").iter().zip(both("vdi")) {
        put(from, &to, true)?;
    }
    for (disk, more) in [("vdk", &["--bitmaps"][..]), ("vdl", &[])] {
        let (image, aside) = (vm.image(disk), text(&vm.image("aside")));
        qemu_img(&[&["convert", "-f", "qcow2", "-O", "qcow2"], more, &[&text(&image), &aside]].concat())?;
        put(Path::new(&aside), &image, false)?;
    }
    fs::remove_file(vm.image("vdm"))?;
    qemu_img(&["create", "-q", "-f", "qcow2", &text(&vm.image("vdm")), &SIZE.to_string()])?;
    fs::set_permissions(vm.image("vdm"), fs::Permissions::from_mode(0o666))?;
    File::create(vm.mirror("vdm"))?.set_len(SIZE)?;
    for (disk, from, to) in [("vdn", "qcow2", "raw"), ("vdo", "raw", "qcow2")] {
        let (image, aside) = (vm.image(disk), text(&vm.image("aside")));
        qemu_img(&["convert", "-f", from, "-O", to, &text(&image), &aside])?;
        put(Path::new(&aside), &image, false)?;
        let file = xml.find(&*text(&image)).context("the image is not in the definition")?;
        let driver = xml[..file].rfind(&format!("type='{from}'")).context("no driver")?;
        xml.replace_range(driver..driver + format!("type='{from}'").len(), &format!("type='{to}'"));
    }
    vm.resize("vdp", SIZE / 2)?;
    vm.resize("vdp", SIZE)?;
    let overlay = text(&vm.image("overlay"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &text(&vm.image("vdq")), &overlay])?;
    let written = ["-f", "qcow2", "-c", "write -P 0x77 3M 64k", &overlay];
    ensure!(Command::new("qemu-io").args(written).output()?.status.success(), "qemu-io");
    qemu_img(&["commit", "-q", "-f", "qcow2", &overlay])?;
    std::os::unix::fs::FileExt::write_all_at(
        &File::options().write(true).open(vm.mirror("vdq"))?,
        &[0x77; 65536],
        3 * MIB,
    )?;

    let file = rig.files.path().join("domain.xml");
    fs::write(&file, xml)?;
    node.virsh(&["define", &text(&file)])?;
    vm.start()?;
    shown(&rig)?;
    change(&rig, OFF, 3)?;
    let strict = json!({"type": "Incremental", "onInvalidCheckpoint": "Fail", "disks": ["vdf"]});
    rig.backup("reshaped-strict", strict)?;
    rig.phase("vmbackup", "reshaped-strict", "Failed")?;
    let message = rig.reason("vmbackup", "reshaped-strict", "DiskNotInCheckpoint")?;
    ensure!(message.contains("vdf") && message.contains("has not the mark"), "{message}");
    let point = expect(&chain, "reshaped-2", OFF)?;
    for disk in ["vdd", "vdf"] {
        let words = point.disk(disk)["modeMessage"].as_str().unwrap_or_default().to_owned();
        ensure!(words.contains("has not the mark"), "{disk}: {words}");
    }
    // whatever was in them from elsewhere goes with its checkpoint
    rig.delete_made()?;
    vm.destroy()?;
    for (disk, _) in OFF {
        assert!(rig.bitmaps(disk)?.is_empty(), "{disk}: {:?}", rig.bitmaps(disk)?);
    }
    Ok(())
}

const LIVE: Rows<'static> = &[
    // cut and grown back; its end written again, as who mends a partition table does
    ("vda", "Incremental"),
    ("vdb", "Incremental"),
    // cut within a large cluster: what was there shows again
    ("vdc", "Incremental"),
    // cut and grown back over an image that is not written
    ("vdd", "Incremental"),
    // a snapshot, and its commit; a snapshot that is pulled
    ("vde", "Incremental"),
    ("vdf", "Incremental"),
    // a snapshot that is cut and grown back; the same, committed
    ("vdg", "Incremental"),
    ("vdh", "Incremental"),
    // unplugged and plugged again
    ("vdi", "Incremental"),
    // unplugged, and plugged in each other's place
    ("vdj", "Full DiskReplaced"),
    ("vdk", "Full DiskReplaced"),
    // unplugged, and a new one plugged in
    ("vdl", "Full BitmapInvalid"),
];

#[test]
fn disks_that_are_changed_while_the_vm_runs() -> Result<()> {
    let files = tempfile::tempdir_in(virtmark_bed::Bed::from_env()?.dir)?;
    let below = files.path().join("below.raw");
    fs::write(&below, vec![0xbb; usize::try_from(SIZE)?])?;
    fs::set_permissions(files.path(), fs::Permissions::from_mode(0o755))?;
    let disk = |target: &str| match target {
        "vdc" => Disk::qcow2(target, SIZE).clusters(2 * MIB),
        "vdd" => Disk::qcow2(target, SIZE).over(&below),
        _ => Disk::qcow2(target, SIZE),
    };
    let rig = Rig::running("shaken", LIVE.iter().map(|(target, _)| disk(target)))?;
    let (vm, node, name) = (&rig.vm, rig.vm.hypervisor(), rig.vm.name.as_str());
    fs::copy(&below, vm.mirror("vdd"))?;
    let chain = Chain::of(&rig, "shaken");
    fill(&rig, LIVE)?;
    chain.take("shaken-1", json!({}), || Ok(()))?;
    change(&rig, LIVE, 1)?;
    // lost with what is cut
    for (disk, _) in LIVE {
        vm.write(disk, 3 * MIB, 65536, 0x99)?;
    }

    vm.snapshot(&["vde", "vdf", "vdg", "vdh"])?;
    change(&rig, LIVE, 2)?;
    for disk in ["vda", "vdb", "vdd", "vdg", "vdh"] {
        vm.resize(disk, 2 * MIB)?;
        vm.resize(disk, SIZE)?;
    }
    vm.write("vdb", SIZE - 512, 512, 0x55)?;
    // 2.5 MiB lies in the second cluster, which stays
    let within = 2 * MIB + MIB / 2;
    node.virsh(&["blockresize", name, "vdc", &format!("{within}b")])?;
    node.virsh(&["blockresize", name, "vdc", &format!("{SIZE}b")])?;
    vm.commit("vde")?;
    vm.commit("vdh")?;
    node.virsh(&["blockpull", name, "vdf", "--wait"])?;

    for disk in ["vdi", "vdj", "vdk"] {
        node.virsh(&["detach-disk", name, disk, "--config"])?;
        node.virsh(&["detach-device-alias", name, &format!("ua-{disk}"), "--live"])?;
    }
    vm.unplug("vdl")?;
    for disk in ["vdi", "vdj", "vdk"] {
        wait_until(Duration::from_secs(20), "the disk to be unplugged", || {
            Ok(vm.active(disk).is_err().then_some(()))
        })?;
    }
    // else what it showed before is taken for what it shows when they are back
    shown(&rig)?;
    exchange(&[vm.image("vdj"), vm.mirror("vdj")], &[vm.image("vdk"), vm.mirror("vdk")])?;
    for disk in ["vdi", "vdj", "vdk"] {
        vm.plug_again(&Disk::qcow2(disk, SIZE))?;
    }
    vm.plug(&Disk::qcow2("vdl", SIZE))?;
    shown(&rig)?;
    change(&rig, LIVE, 3)?;
    expect(&chain, "shaken-2", LIVE)?;

    // all of them go on from here
    change(&rig, LIVE, 0)?;
    let point = chain.take("shaken-3", json!({"type": "Incremental"}), || Ok(()))?;
    for (disk, _) in LIVE {
        assert_eq!(point.mode(disk), "Incremental", "{disk}");
    }
    rig.delete_made()?;
    assert!(rig.bitmaps("vda")?.is_empty(), "{:?}", rig.bitmaps("vda")?);
    Ok(())
}

#[test]
fn a_disk_that_is_set_back_to_a_snapshot() -> Result<()> {
    let rig = Rig::running("rewound", [Disk::qcow2("vda", SIZE)])?;
    let (vm, node, name) = (&rig.vm, rig.vm.hypervisor(), rig.vm.name.as_str());
    let chain = Chain::of(&rig, "rewound");
    vm.write("vda", 0, SIZE, 0x11)?;
    chain.take("rewound-1", json!({}), || Ok(()))?;
    // an internal one: QEMU does not set back what has a bitmap, and libvirt stops the VM for the attempt
    node.virsh(&["snapshot-create-as", name, "inside"])?;
    vm.write("vda", MIB, MIB, 0x22)?;
    let refused = node.virsh(&["snapshot-revert", name, "inside"]).err().context("it was set back")?;
    ensure!(format!("{refused:#}").contains("has active dirty bitmaps"), "{refused:#}");
    let refused =
        qemu_img(&["snapshot", "-a", "inside", &text(&vm.image("vda"))]).err().context("by hand")?;
    ensure!(format!("{refused:#}").contains("has active dirty bitmaps"), "{refused:#}");
    node.virsh(&["snapshot-delete", name, "inside"])?;
    vm.start()?;
    shown(&rig)?;
    expect(&chain, "rewound-2", &[("vda", "Incremental")])?;

    // an external one: libvirt sets it back to a new overlay, which has no bitmap
    let overlay = format!("vda,snapshot=external,file={}", text(&vm.image("overlay")));
    node.virsh(&["snapshot-create-as", name, "outside", "--disk-only", "--diskspec", &overlay])?;
    let then = vm.remember("vda")?.with_extension("then");
    fs::copy(vm.mirror("vda"), &then)?;
    vm.write("vda", 2 * MIB, MIB, 0x33)?;
    node.virsh(&["snapshot-revert", name, "outside"])?;
    fs::copy(&then, vm.mirror("vda"))?;
    if !vm.runs()? {
        vm.start()?;
    }
    shown(&rig)?;
    expect(&chain, "rewound-3", &[("vda", "Full BitmapInvalid")])?;
    node.virsh(&["snapshot-delete", name, "outside", "--metadata"])?;
    Ok(())
}
