//! The chart is upgraded while a client reads: its kinds get a field, operator and agents are replaced.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::json;
use virtmark_bed::Disk;

use crate::reader::Reader;
use crate::release::{CHART, FULL, INCREMENTAL, MIB, Release};

/// The field of VmBackups that the older chart does not have, and the one that follows it there.
const FIELD: [&str; 2] = ["clientIdleSeconds:", "disks:"];

/// A copy of the chart whose VmBackups do not have the field yet.
fn older(folder: &Path) -> Result<()> {
    let copied = Command::new("cp").arg("-r").arg(CHART).arg(folder).status()?;
    ensure!(copied.success(), "the chart cannot be copied");
    let file = folder.join("templates/crds/vmbackups.yaml");
    let text = fs::read_to_string(&file)?;
    let is = |line: &str, name: &str| line.trim_start() == name;
    let first = text.lines().position(|line| is(line, FIELD[0]));
    let (Some(from), lines) = (first, text.lines()) else { anyhow::bail!("VmBackups have no {}", FIELD[0]) };
    let size = lines.clone().skip(from).position(|line| is(line, FIELD[1])).unwrap_or_default();
    ensure!(size > 1, "{} does not follow {}", FIELD[1], FIELD[0]);
    let kept: Vec<_> = lines.clone().take(from).chain(lines.skip(from + size)).collect();
    Ok(fs::write(file, kept.join("\n") + "\n")?)
}

#[test]
fn an_upgrade_with_a_new_field_in_the_middle_of_a_read_does_nothing_twice() -> Result<()> {
    let charts = tempfile::tempdir()?;
    let chart = charts.path().join("virtmark");
    older(&chart)?;
    let release = Release::install_of(&chart, &[])?;
    let vm = release.vm("upgraded", 0, [Disk::qcow2("vda", 64 * MIB)])?;
    vm.write("vda", 0, 64 * MIB, 0x5a)?;
    release.whole_backup("upgraded-1", &vm, FULL, None)?;
    vm.write("vda", 0, 48 * MIB, 0x5b)?;
    let idle = json!({"type": "Incremental", "clientIdleSeconds": 600});
    let refused = release.backup("upgraded-2", "upgraded", idle.clone());
    ensure!(
        refused.is_err_and(|error| error.to_string().contains("clientIdleSeconds")),
        "the field is there"
    );

    release.backup("upgraded-2", "upgraded", json!({"type": "Full"}))?;
    release.phase("vmbackup", "upgraded-2", "Ready")?;
    let then = vm.remember("vda")?;
    let reader = Reader::of(&release, "upgraded-2-vda")?;
    let mut curl = reader.go_on("2M")?;
    reader.reached(2 * MIB)?;
    let before = release.system(&["get", "pods", "--field-selector=status.phase=Running", "-o", "name"])?;
    ensure!(before.lines().count() >= 4, "operators and agents: {before}");
    let began = Instant::now();
    release.upgrade(&["log.format=text"])?;
    let there = began.elapsed();
    let deleted = "jsonpath={.metadata.name} {.metadata.deletionTimestamp}";
    for pod in before.lines() {
        // gone, or going
        let said = release.system(&["get", pod, "--ignore-not-found", "-o", deleted])?;
        ensure!(said.split_whitespace().count() != 1, "{pod} was not replaced");
    }
    let ended = curl.wait()?;
    let has = reader.has();
    ensure!(has < 64 * MIB, "the reader was done before");
    reader.finish(&then)?;
    release.succeed("upgraded-2")?;
    release.say(&format!(
        "helm upgrade in the middle of a read: {:.2} s, the reader ({ended}) had {} MiB and went on",
        there.as_secs_f64(),
        has / MIB
    ));
    ensure!(vm.live_bitmaps()?.len() == 2, "two backups, two bitmaps: {:?}", vm.live_bitmaps()?);

    vm.write("vda", MIB, MIB, 0x5c)?;
    release.backup("upgraded-3", "upgraded", idle)?;
    release.phase("vmbackup", "upgraded-3", "Ready")?;
    ensure!(release.get("vmbackup", "upgraded-3")?["spec"]["clientIdleSeconds"] == 600, "the field is kept");
    release.wish("vmbackup", "upgraded-3", "Cancelled")?;
    release.phase("vmbackup", "upgraded-3", "Failed")?;
    let base = release.files.path().join("upgraded-2.qcow2");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&reader.image).arg(&base);
    ensure!(convert.status()?.success(), "what was read cannot be converted");
    release.whole_backup("upgraded-4", &vm, INCREMENTAL, Some(&base))?;
    release.succeeded();
    Ok(())
}
