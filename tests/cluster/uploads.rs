//! Uploads: an ImageTransfer that makes a libvirt volume. What Succeeded is whole and has its name; of all else nothing is left.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use virtmark_bed::{compare, wait_until};

use super::pool::{left, pool, upload};
use super::rig::{BOUND, MIB, Rig, small};

const CLIENT: &str = "import sys\nfrom ovirt_imageio import client\n\
    client.upload(sys.argv[1], sys.argv[2], sys.argv[3], max_workers=4)";

fn raw(path: &Path, size: u64, parts: &[(u64, u64, u8)]) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(size)?;
    for (offset, length, byte) in parts {
        file.write_all_at(&vec![*byte; usize::try_from(*length)?], *offset)?;
    }
    Ok(())
}

#[test]
fn what_is_uploaded_becomes_a_volume() -> Result<()> {
    let rig = Rig::running("uploads", small())?;
    let node = rig.vm.hypervisor();
    let folder = pool(node, "uploads")?;
    let source = rig.files.path().join("source.raw");
    raw(&source, 32 * MIB, &[(0, 3 * MIB, 0x11), (9 * MIB + 512, 4096, 0x22), (31 * MIB, MIB, 0x33)])?;
    let python =
        std::env::var_os("VIRTMARK_PYTHON").context("VIRTMARK_PYTHON is not set: run `make test`")?;
    for format in ["qcow2", "raw"] {
        let (transfer, volume) = (format!("uploads-{format}"), format!("db02-vda.{format}"));
        rig.transfer(&transfer, &upload(&node.name, "uploads", &volume, json!({"format": format})))?;
        let ticket = rig.ticket(&transfer)?;
        ensure!(!folder.join(&volume).exists(), "it has its name before it is whole");
        let client = Command::new(&python)
            .args(["-c", CLIENT])
            .arg(&source)
            .args([&ticket.url, &ticket.ca.to_string_lossy().into_owned()])
            .output()?;
        ensure!(client.status.success(), "{}", String::from_utf8_lossy(&client.stderr));
        ensure!(!folder.join(&volume).exists(), "it has its name before it is finalized");
        rig.state("imagetransfer", &transfer, "Finalized")?;
        let status = rig.phase("imagetransfer", &transfer, "Succeeded")?;
        assert_eq!(status["progress"], "100%");
        compare(&source, &folder.join(&volume), format)?;
        let mode = fs::metadata(folder.join(&volume))?.permissions().mode();
        assert_eq!(mode & 0o077, 0, "{mode:o}");
        let listed = node.virsh(&["vol-list", "uploads"])?;
        ensure!(listed.contains(&volume), "libvirt does not see it: {listed}");
        ensure!(!listed.contains("partial"), "{listed}");
        assert_eq!(ticket.curl(&[])?, "403");
        rig.gone("secret", &ticket.secret)?;
        rig.told(&transfer, "Finalized")?;
    }
    left(&folder, &["db02-vda.qcow2", "db02-vda.raw"])?;

    // what is there is nobody's to write
    rig.transfer("uploads-again", &upload(&node.name, "uploads", "db02-vda.raw", json!({})))?;
    rig.phase("imagetransfer", "uploads-again", "Failed")?;
    rig.reason("imagetransfer", "uploads-again", "VolumeExists")?;
    compare(&source, &folder.join("db02-vda.raw"), "raw")
}

#[test]
fn what_may_not_be_is_refused_and_nothing_is_made() -> Result<()> {
    let rig = Rig::running("refused-up", small())?;
    pool(rig.vm.hypervisor(), "uploads-small")?;
    let node = rig.vm.hypervisor().name.as_str();
    for (number, (spec, reason, words)) in [
        (upload(node, "not-ours", "v", json!({})), "PoolNotAllowed", "tenancy"),
        (upload("node-z", "uploads-none", "v", json!({})), "NodeLost", "no node node-z"),
        (upload(node, "uploads-none", "v", json!({})), "PoolNotUsable", "no pool uploads-none"),
        (upload(node, "uploads-small", "v", json!({"size": 1_u64 << 50})), "PoolSpaceLow", "has room for"),
    ]
    .into_iter()
    .enumerate()
    {
        let transfer = format!("refused-up-{number}");
        rig.transfer(&transfer, &spec)?;
        rig.phase("imagetransfer", &transfer, "Failed")?;
        let message = rig.reason("imagetransfer", &transfer, reason)?;
        ensure!(message.contains(words), "{message}");
        rig.told(&transfer, reason)?;
    }
    Ok(())
}

#[test]
fn of_what_does_not_succeed_nothing_is_left() -> Result<()> {
    let rig = Rig::running("undone", small())?;
    let node = rig.vm.hypervisor();
    let folder = pool(node, "uploads-undone")?;
    let of = |volume: &str| upload(&node.name, "uploads-undone", volume, json!({}));
    let source = rig.files.path().join("source.raw");
    raw(&source, 32 * MIB, &[(0, 32 * MIB, 0x44)])?;
    let sent = source.to_string_lossy().into_owned();
    let put = ["-T", &sent];

    rig.transfer("undone-cancelled", &of("a"))?;
    let ticket = rig.ticket("undone-cancelled")?;
    assert_eq!(ticket.curl(&put)?, "200");
    rig.transfer("undone-second", &of("a"))?;
    rig.phase("imagetransfer", "undone-second", "Failed")?;
    let message = rig.reason("imagetransfer", "undone-second", "VolumeExists")?;
    ensure!(message.contains("another upload"), "{message}");
    rig.state("imagetransfer", "undone-cancelled", "Cancelled")?;
    rig.phase("imagetransfer", "undone-cancelled", "Cancelled")?;
    assert_eq!(ticket.curl(&put)?, "403");
    rig.gone("secret", &ticket.secret)?;
    left(&folder, &[])?;

    // paused, it keeps what it has
    rig.transfer("undone-deleted", &of("b"))?;
    let ticket = rig.ticket("undone-deleted")?;
    rig.state("imagetransfer", "undone-deleted", "Paused")?;
    rig.phase("imagetransfer", "undone-deleted", "Paused")?;
    assert_eq!(ticket.curl(&put)?, "403");
    rig.state("imagetransfer", "undone-deleted", "Running")?;
    rig.phase("imagetransfer", "undone-deleted", "Ready")?;
    assert_eq!(ticket.curl(&put)?, "200");
    rig.delete("imagetransfer", "undone-deleted")?;
    rig.gone("secret", &ticket.secret)?;
    left(&folder, &[])?;

    // somebody else makes a volume of that name meanwhile
    rig.transfer("undone-late", &of("c"))?;
    assert_eq!(rig.ticket("undone-late")?.curl(&put)?, "200");
    fs::write(folder.join("c"), "another's")?;
    rig.state("imagetransfer", "undone-late", "Finalized")?;
    rig.phase("imagetransfer", "undone-late", "Failed")?;
    rig.reason("imagetransfer", "undone-late", "VolumeExists")?;
    assert_eq!(fs::read_to_string(folder.join("c"))?, "another's");
    left(&folder, &["c"])?;

    // and somebody writes into the image
    rig.transfer("undone-corrupt", &of("d"))?;
    assert_eq!(rig.ticket("undone-corrupt")?.curl(&put)?, "200");
    let uid = rig.get("imagetransfer", "undone-corrupt")?["metadata"]["uid"].clone();
    let partial = folder.join(format!(".virtmark-{}.partial", uid.as_str().context("no uid")?));
    let mut image = File::options().write(true).open(&partial)?;
    // the size in the header, which a QEMU that has it does not read again
    image.write_all_at(&(64 * MIB).to_be_bytes(), 24)?;
    image.flush()?;
    rig.state("imagetransfer", "undone-corrupt", "Finalized")?;
    rig.phase("imagetransfer", "undone-corrupt", "Failed")?;
    rig.reason("imagetransfer", "undone-corrupt", "ImageCorrupt")?;
    left(&folder, &["c"])?;

    // a raw disk that libvirt would take for an overlay of any file of the host
    let header = rig.files.path().join("header.raw");
    let create = ["create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw"];
    ensure!(Command::new("qemu-img").args(create).arg(&header).arg("32M").status()?.success());
    File::options().write(true).open(&header)?.set_len(32 * MIB)?;
    rig.transfer("undone-raw", &upload(&node.name, "uploads-undone", "f", json!({"format": "raw"})))?;
    let posed = header.to_string_lossy().into_owned();
    assert_eq!(rig.ticket("undone-raw")?.curl(&["-T", &posed])?, "200");
    rig.state("imagetransfer", "undone-raw", "Finalized")?;
    rig.phase("imagetransfer", "undone-raw", "Failed")?;
    let message = rig.reason("imagetransfer", "undone-raw", "ImageCorrupt")?;
    ensure!(message.contains("looks like qcow2"), "{message}");
    left(&folder, &["c"])?;

    // the storage ends in the middle
    rig.transfer("undone-killed", &of("e"))?;
    let ticket = rig.ticket("undone-killed")?;
    assert_eq!(ticket.curl(&put)?, "200");
    let uid = rig.get("imagetransfer", "undone-killed")?["metadata"]["uid"].clone();
    let run = node.dir.join("agent/run").join(uid.as_str().context("no uid")?);
    let pid = fs::read_to_string(run.join("qemu-nbd.pid"))?;
    ensure!(Command::new("kill").args(["-KILL", pid.trim()]).status()?.success());
    wait_until(BOUND, "the server to be gone", || {
        Ok((!Path::new("/proc").join(pid.trim()).join("exe").exists()).then_some(()))
    })?;
    rig.state("imagetransfer", "undone-killed", "Finalized")?;
    rig.phase("imagetransfer", "undone-killed", "Failed")?;
    rig.reason("imagetransfer", "undone-killed", "UploadInterrupted")?;
    left(&folder, &["c"])
}
