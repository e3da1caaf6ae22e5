//! The main job, through pods alone: a chain over a live migration, a cancel, an uninstall, and on it goes.

use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::json;
use virtmark_bed::{Disk, wait_until};

use crate::release::{BOUND, FULL, INCREMENTAL, MIB, Release};

#[test]
fn a_chain_goes_on_over_a_live_migration_and_a_new_install() -> Result<()> {
    let release = Release::install(&[])?;
    release.print_images();
    let away = release.cluster.node(1)?.clone();
    let mut vm = release.vm("db01", 0, [Disk::qcow2("vda", 1 << 30)])?;
    release.say("db01 runs on node-a");
    vm.write("vda", 0, 4 * MIB, 0x11)?;
    vm.write("vda", 512 * MIB, 64 * MIB, 0x22)?;
    let monday = release.whole_backup("monday", &vm, FULL, None)?;

    vm.write("vda", 2 * MIB, MIB, 0x33)?;
    vm.zero("vda", 520 * MIB, 8 * MIB)?;
    let tuesday = release.whole_backup("tuesday", &vm, INCREMENTAL, Some(&monday))?;

    vm.write("vda", 100 * MIB, MIB, 0x44)?;
    let began = Instant::now();
    vm.migrate(&away, &[])?;
    release.say(&format!("live migration to node-b over TCP: {:.2} s", began.elapsed().as_secs_f64()));
    release.published("db01", "node-b", "Running")?;
    vm.write("vda", 101 * MIB, MIB, 0x55)?;
    let wednesday = release.whole_backup("wednesday", &vm, INCREMENTAL, Some(&tuesday))?;

    release.backup("cancelled", "db01", json!({}))?;
    release.phase("vmbackup", "cancelled", "Ready")?;
    release.wish("vmbackup", "cancelled", "Cancelled")?;
    release.phase("vmbackup", "cancelled", "Failed")?;
    ensure!(vm.live_bitmaps()?.len() == 3, "the cancelled backup's bitmap is left: {:?}", vm.live_bitmaps()?);
    release.say("a fourth one is cancelled, and leaves nothing");
    release.print_memory()?;

    release.uninstall()?;
    for node in &release.cluster.nodes {
        release.node_is_clean(node)?;
    }
    ensure!(vm.live_bitmaps()?.len() == 3, "three backups have three bitmaps: {:?}", vm.live_bitmaps()?);
    let kept = release.kubectl(&["get", "vmcheckpoints", "-o", "name"])?;
    ensure!(kept.lines().count() == 3, "the checkpoints stay: {kept}");
    release.say("helm uninstall: nothing is left on the nodes but three bitmaps");

    vm.write("vda", 200 * MIB, MIB, 0x66)?;
    release.upgrade(&[])?;
    release.published("db01", "node-b", "Running")?;
    wait_until(BOUND, "the last checkpoint to be a base again", || {
        let bases = release.kubectl(&["get", "vmcheckpoints", "-o", "jsonpath={.items[*].status.base}"])?;
        Ok(bases.contains("Next").then_some(()))
    })?;
    release.whole_backup("thursday", &vm, INCREMENTAL, Some(&wednesday))?;
    release.say("installed again: the chain went on");
    release.succeeded();
    Ok(())
}
