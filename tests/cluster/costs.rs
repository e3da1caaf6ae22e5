//! What a backup costs the API server: every write that operator and agent make, Events too.

use std::time::Instant;

use anyhow::Result;
use serde_json::json;

use super::rig::{MIB, Rig, small};

/// Each write is one that somebody reads; a new one needs a reason as good as these.
const BUDGET: usize = 16;

/// Every how many seconds progress is told, once of the backup and once of its transfer.
const PROGRESS: u64 = 5;

#[test]
fn a_backup_of_one_disk_stays_within_its_writes() -> Result<()> {
    let rig = Rig::running("costs", small())?;
    rig.vm.write("vda", 0, MIB, 0x11)?;
    let begun = Instant::now();
    rig.backup("costs-1", json!({}))?;
    rig.read("costs-1-vda", &rig.vm.remember("vda")?)?;
    let transfer =
        rig.get("imagetransfer", "costs-1-vda")?["metadata"]["uid"].as_str().unwrap_or("-").to_owned();
    rig.state("vmbackup", "costs-1", "Finalized")?;
    rig.phase("vmbackup", "costs-1", "Succeeded")?;
    rig.phase("imagetransfer", "costs-1-vda", "Succeeded")?;
    rig.gone("secret", &format!("ticket-{transfer}-1"))?;
    let about = |name: &str| name.contains("costs-1") || name.contains(&transfer);
    let mut writes = Vec::new();
    for account in ["virtmark-operator", "virtmark-agent"] {
        let all = rig.bed.writes_by(account)?.into_iter().filter(|(_, _, name)| about(name));
        writes.extend(all.map(|(verb, resource, name)| format!("{account} {verb} {resource} {name}")));
    }
    // a round of it may come at once
    let progress = 2 * usize::try_from(begun.elapsed().as_secs() / PROGRESS + 1)?;
    // and one for the LibvirtDomain's last backup, which has the VM's name
    assert!(writes.len() < BUDGET + progress, "{} writes:\n{}", writes.len() + 1, writes.join("\n"));
    Ok(())
}
