//! What happens to a cluster while backups run: pods are replaced, a node is cordoned, loses its power, or its network.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use virtmark_bed::{Disk, compare, wait_until};

use crate::reader::Reader;
use crate::release::{FULL, INCREMENTAL, MIB, Release};

#[test]
fn an_agent_that_is_replaced_in_the_middle_of_a_read_goes_on_with_the_ticket() -> Result<()> {
    let release = Release::install(&[])?;
    let vm = release.vm("read", 0, [Disk::qcow2("vda", 64 * MIB)])?;
    vm.write("vda", 0, 64 * MIB, 0x5a)?;
    for (name, arguments) in [("killed", &["--grace-period=0", "--force"][..]), ("stopped", &[])] {
        release.backup(name, "read", json!({}))?;
        release.phase("vmbackup", name, "Ready")?;
        let then = vm.remember("vda")?;
        let reader = Reader::of(&release, &format!("{name}-vda"))?;
        let mut curl = reader.go_on("4M")?;
        reader.reached(2 * MIB)?;
        let began = Instant::now();
        release.replace_pod("agent", Some("node-a"), arguments)?;
        let there = began.elapsed();
        let ended = curl.wait()?;
        let has = reader.has();
        ensure!(has < 64 * MIB, "the reader was done before");
        if name == "killed" {
            // what an agent served in its last five seconds and did not store counts as unread
            reader.forget()?;
        }
        reader.finish(&then)?;
        release.succeed(name)?;
        release.say(&format!(
            "agent {name} in the middle of a read: {:.2} s to the next one, the reader ({ended}) had {} MiB and went on",
            there.as_secs_f64(),
            has / MIB
        ));
        vm.write("vda", 0, 64 * MIB, 0x5b)?;
    }
    release.succeeded();
    Ok(())
}

#[test]
fn operators_that_are_killed_do_nothing_twice() -> Result<()> {
    let release = Release::install(&[])?;
    let vm = release.vm("led", 0, [Disk::qcow2("vda", 64 * MIB)])?;
    vm.write("vda", 0, 8 * MIB, 0x5a)?;
    release.backup("led-1", "led", json!({}))?;
    release.phase("vmbackup", "led-1", "Ready")?;
    let then = vm.remember("vda")?;
    release.replace_pod("operator", None, &["--grace-period=0", "--force"])?;
    let image = release.download("led-1", "vda", None)?;
    compare(&then, &image, "qcow2")?;
    let began = Instant::now();
    release.wish("vmbackup", "led-1", "Finalized")?;
    release.system(&[
        "delete",
        "pod",
        "-l",
        "app.kubernetes.io/component=operator",
        "--grace-period=0",
        "--force",
    ])?;
    release.succeed("led-1")?;
    release.say(&format!(
        "operators killed: the checkpoint is a base after {:.2} s",
        began.elapsed().as_secs_f64()
    ));
    release.rolled_out()?;
    ensure!(vm.live_bitmaps()?.len() == 1, "one backup, one bitmap: {:?}", vm.live_bitmaps()?);
    let made = release.kubectl(&["get", "vmcheckpoints,imagetransfers", "-o", "name"])?;
    ensure!(made.lines().count() == 2, "one checkpoint and one transfer: {made}");
    release.succeeded();
    Ok(())
}

#[test]
fn a_drained_node_is_held_for_no_longer_than_its_grace() -> Result<()> {
    let release = Release::install(&["agent.drainGraceSeconds=5"])?;
    let away = release.cluster.node(1)?.clone();
    let mut vm = release.vm("held", 0, [Disk::qcow2("vda", 64 * MIB)])?;
    vm.write("vda", 0, 8 * MIB, 0x5a)?;
    release.backup("held-1", "held", json!({}))?;
    release.phase("vmbackup", "held-1", "Ready")?;
    let cordoned = Uncordon { release: &release, node: "node-a" };
    let began = Instant::now();
    release.system(&["drain", "node-a", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=60s"])?;
    let status = release.phase("vmbackup", "held-1", "Failed")?;
    ensure!(status.to_string().contains("NodeDraining"), "{status}");
    let ended = began.elapsed();
    vm.migrate(&away, &[])?;
    release.say(&format!(
        "node-a drained: the backup ended after {:.2} s, the VM was away after {:.2} s",
        ended.as_secs_f64(),
        began.elapsed().as_secs_f64()
    ));
    drop(cordoned);
    release.rolled_out()?;
    release.published("held", "node-b", "Running")?;
    release.whole_backup("held-2", &vm, FULL, None)?;
    release.succeeded();
    Ok(())
}

/// A node that may have pods again at the end.
struct Uncordon<'a> {
    release: &'a Release,
    node: &'a str,
}

impl Drop for Uncordon<'_> {
    fn drop(&mut self) {
        // a test that failed says why already
        let _ = self.release.system(&["uncordon", self.node]);
    }
}

#[test]
fn a_node_that_lost_its_network_goes_on_when_it_is_back() -> Result<()> {
    let release = Release::install(&[])?;
    let vm = release.vm("cut", 1, [Disk::qcow2("vda", 64 * MIB)])?;
    vm.write("vda", 0, 64 * MIB, 0x5a)?;
    release.backup("cut-1", "cut", json!({}))?;
    release.phase("vmbackup", "cut-1", "Ready")?;
    let then = vm.remember("vda")?;
    let reader = Reader::of(&release, "cut-1-vda")?;
    let mut curl = reader.go_on("4M")?;
    reader.reached(2 * MIB)?;
    let healed = Heal { release: &release, node: "node-b" };
    release.cluster.network.cut("node-b")?;
    curl.kill()?;
    curl.wait()?;
    let began = Instant::now();
    wait_until(Duration::from_secs(120), "node-b to be NotReady", || {
        let ready = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
        Ok((release.system(&["get", "node", "node-b", "-o", ready])? == "Unknown").then_some(()))
    })?;
    let missed = began.elapsed();
    release.wish("vmbackup", "cut-1", "Finalized")?;
    drop(healed);
    release.cluster.ready("node-b")?;
    reader.finish(&then)?;
    release.succeed("cut-1")?;
    release.say(&format!(
        "node-b cut off: NotReady after {:.0} s; healed, the reader went on, and the backup succeeded",
        missed.as_secs_f64()
    ));
    vm.write("vda", MIB, MIB, 0x5b)?;
    release.rolled_out()?;
    release.whole_backup("cut-2", &vm, INCREMENTAL, None)?;
    release.succeeded();
    Ok(())
}

/// A node that has its network again at the end.
struct Heal<'a> {
    release: &'a Release,
    node: &'a str,
}

impl Drop for Heal<'_> {
    fn drop(&mut self) {
        let _ = self.release.cluster.network.heal(self.node);
    }
}

#[test]
fn a_vm_of_a_node_that_lost_its_power_is_backed_up_where_it_is_started() -> Result<()> {
    let mut release = Release::install(&[])?;
    let here = release.cluster.node(0)?.clone();
    let mut vm = release.vm("lost", 1, [Disk::qcow2("vda", 64 * MIB)])?;
    vm.write("vda", 0, 8 * MIB, 0x5a)?;
    release.whole_backup("lost-1", &vm, FULL, None)?;
    release.backup("lost-2", "lost", json!({}))?;
    release.phase("vmbackup", "lost-2", "Ready")?;
    release.cluster.power_off(1)?;
    let began = Instant::now();
    // its administrator, or its cloud, says that it does not come back
    release.system(&["delete", "node", "node-b"])?;
    let status = release.phase("vmbackup", "lost-2", "Failed")?;
    ensure!(status.to_string().contains("NodeLost"), "{status}");
    release.say(&format!("node-b lost: its backup ended after {:.2} s", began.elapsed().as_secs_f64()));
    release.kubectl(&["delete", "vmbackup", "lost-2", "--timeout=60s"])?;

    vm.moved(&here);
    vm.redefine()?;
    vm.start()?;
    release.published("lost", "node-a", "Running")?;
    vm.write("vda", MIB, MIB, 0x5b)?;
    // QEMU was killed: its bitmaps cannot be believed, and are not
    release.whole_backup("lost-3", &vm, ("Incremental", "Full"), None)?;
    let began = Instant::now();
    release.cluster.power_on(1)?;
    release.cluster.ready("node-b")?;
    release.rolled_out()?;
    release.say(&format!("node-b is back, and its agent, after {:.2} s", began.elapsed().as_secs_f64()));
    release.cluster.node(1)?.virsh(&["undefine", "lost", "--checkpoints-metadata"])?;
    let status = release.get("lvd", "lost")?["status"].clone();
    ensure!(status["nodeName"] == "node-a" && status["state"] == "Running", "{status}");
    release.succeeded();
    Ok(())
}
