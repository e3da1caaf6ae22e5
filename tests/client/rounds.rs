//! Full and incremental backups: each restore point is what the guest had, and what is damaged is found.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::Value;
use virtmark_bed::{Disk, compare};

use super::process::{Client, damage, remember};
use super::rig::{MIB, Rig};

#[test]
fn each_point_of_a_chain_is_what_the_guest_had_and_damage_is_found() -> Result<()> {
    let rig = Rig::running("cliround", [Disk::qcow2("vda", 64 * MIB), Disk::raw("vdb", 16 * MIB)])?;
    let client = Client::of(&rig);
    rig.vm.write("vda", 0, 20 * MIB, 0x11)?;
    rig.vm.write("vdb", MIB, MIB, 0x12)?;
    let mut points = Vec::new();
    let mut then = Vec::new();
    for count in 0..3_u64 {
        if count > 0 {
            // written, zeroed and discarded, across the ends of clusters
            rig.vm.write("vda", (30 + count) * MIB - 512, MIB, 0x21)?;
            rig.vm.zero("vda", 4 * count * MIB, 2 * MIB)?;
            rig.vm.zero("vda", 17 * MIB - 512, 4096)?;
            rig.vm.write("vdb", count * 4096, 512, 0x34)?;
        }
        let name = format!("round-{count}");
        then.push((remember(&rig, "vda", &name)?, remember(&rig, "vdb", &name)?));
        // the first is full although nobody said so: there is nothing to lie over
        let over = if count == 1 { "unix" } else { "https" };
        points.push(client.take(&["cliround", "--transport", over])?);
        rig.host_is_clean()?;
    }
    let modes: Vec<_> = points.iter().map(|point| (point.mode("vda"), point.mode("vdb"))).collect();
    let words = |vda: &str, vdb: &str| (vda.to_owned(), vdb.to_owned());
    assert_eq!(modes[0], words("Full", "Full"));
    assert_eq!(modes[1], words("Incremental", "Full CannotKeepBitmap"));
    assert_eq!(modes[2], modes[1]);
    let covered = &points[1].disk("vda")["covered"];
    let (read, zeroed) = (covered["read"].as_u64().unwrap_or(0), covered["zeroed"].as_u64().unwrap_or(0));
    ensure!((MIB..4 * MIB).contains(&read) && zeroed >= 2 * MIB, "{covered}");
    for (point, (vda, vdb)) in points.iter().zip(&then) {
        compare(vda, &point.file("vda"), "qcow2")?;
        compare(vdb, &point.file("vdb"), "qcow2")?;
        assert_eq!(point.manifest["backup"]["outcome"], "Succeeded");
        let restored = rig.files.path().join(format!("restored-{}", point.name()));
        let (from, to) = (point.folder.to_string_lossy(), restored.to_string_lossy());
        client.done(&["restore", &from, "--to", &to])?;
        compare(vda, &restored.join("vda.raw"), "raw")?;
        compare(vdb, &restored.join("vdb.raw"), "raw")?;
    }
    let moved = rig.files.path().join("moved");
    fs::rename(&client.to, &moved)?;
    compare(&then[2].0, &moved.join(points[2].name()).join("vda.incr.qcow2"), "qcow2")?;
    fs::rename(&moved, &client.to)?;

    let listed: Value =
        serde_json::from_str(&client.done(&["chain", "list", client.path(), "-o", "json"])?.out)?;
    assert_eq!(listed.as_array().map(Vec::len), Some(3));
    let names = client.done(&["chain", "list", client.path(), "-o", "name"])?.out;
    assert_eq!(
        names.lines().collect::<Vec<_>>(),
        points.iter().map(|point| point.name()).collect::<Vec<_>>()
    );
    client.done(&["verify", client.path()])?;

    // a byte of the one in the middle: what lies over it is damaged, what it lies over is not
    let finds = |bad: &[bool], words: &str| -> Result<()> {
        let said = client.run(&["verify", client.path(), "-o", "json"])?;
        assert_eq!(said.code, 5, "{}", said.err);
        let found: Value = serde_json::from_str(&said.out)?;
        let told = found["points"].as_array().into_iter().flatten();
        let told: Vec<bool> =
            told.map(|point| point["problems"].as_array().is_some_and(|list| !list.is_empty())).collect();
        assert_eq!(told, bad, "{found}");
        ensure!(found.to_string().contains(words), "{found} has no {words}");
        Ok(())
    };
    let middle = points[1].file("vda");
    damage(&middle)?;
    finds(&[false, true, true], "digest")?;
    damage(&middle)?;
    client.done(&["verify", client.path()])?;
    // a manifest that is cut off
    let manifest = points[1].folder.join("manifest.json");
    let text = fs::read_to_string(&manifest)?;
    fs::write(&manifest, &text[..text.len() / 2])?;
    finds(&[false, true, true], "manifest cannot be read")?;
    fs::write(&manifest, text)?;
    // the middle is gone
    fs::rename(&points[1].folder, rig.files.path().join("away"))?;
    finds(&[false, true], "which is not here")?;
    let last = points[2].folder.to_string_lossy();
    let said = client.run(&["restore", &last, "--to", &rig.files.path().join("no").to_string_lossy()])?;
    assert_eq!(said.code, 5, "{}", said.err);
    // and a backup now begins where what is here ends
    let next = client.take(&["incremental", "cliround"])?;
    assert_eq!(next.manifest["parent"]["name"].as_str(), Some(points[0].name().as_str()));
    compare(&then[2].0, &next.file("vda"), "qcow2")?;
    Ok(())
}

#[test]
fn memory_does_not_grow_with_the_disk() -> Result<()> {
    let rig = Rig::running("climemory", [Disk::qcow2("vda", 600 * MIB)])?;
    let client = Client::of(&rig);
    for part in 0..5 {
        rig.vm.write("vda", part * 110 * MIB, 100 * MIB, 0x51)?;
    }
    let then = remember(&rig, "vda", "memory")?;
    for over in ["https", "unix"] {
        let arguments = ["backup", "full", "climemory", "--transport", over, "--to", client.path()];
        let (said, most) = client.start(&arguments)?.end_with_memory()?;
        assert_eq!(said.code, 0, "{}", said.err);
        eprintln!("{over}: {most} bytes\n{}", said.err);
        compare(&then, &client.point(said.out.trim())?.file("vda"), "qcow2")?;
        ensure!(most > MIB && most < 64 * MIB, "{over}: it had {most} bytes");
    }
    Ok(())
}
