//! An agent that dies in the middle of an upload: it fails, says why, and nothing of it is left. And an operator that cannot read
//! what tenants may.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use serde_json::json;
use virtmark_bed::component::TENANCY;
use virtmark_bed::wait_until;

use super::pool::{left, pool, upload};
use super::rig::{BOUND, MIB, Rig, small};

#[test]
fn an_upload_whose_agent_died_fails_and_leaves_nothing() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, "cut-up", small())?;
    let folder = pool(rig.vm.hypervisor(), "uploads-cut")?;
    let source = rig.files.path().join("source.raw");
    fs::write(&source, vec![0x55; usize::try_from(32 * MIB)?])?;
    for (number, polite) in [(1, false), (2, true)] {
        let transfer = format!("cut-up-{number}");
        rig.transfer(&transfer, &upload("node-b", "uploads-cut", "v", json!({})))?;
        let ticket = rig.ticket(&transfer)?;
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--limit-rate", "8M", "--max-time", "60", "--cacert"]).arg(&ticket.ca);
        let mut curl = curl.arg("-T").arg(&source).arg(&ticket.url).stderr(Stdio::null()).spawn()?;
        rig.until("imagetransfer", &transfer, "have bytes", |status| {
            Ok(status["transferredBytes"].as_u64().is_some_and(|bytes| bytes > 0))
        })?;
        if polite {
            rig.bed.agents[1].process.end();
        } else {
            rig.bed.agents[1].kill();
        }
        let _ = curl.wait()?;
        rig.bed.agents[1].restart(&[])?;
        rig.bed.store()?;
        rig.phase("imagetransfer", &transfer, "Failed")?;
        rig.reason("imagetransfer", &transfer, "UploadInterrupted")?;
        rig.gone("secret", &ticket.secret)?;
        left(&folder, &[])?;
    }
    // deleted by force while the agent was away
    rig.transfer("cut-up-3", &upload("node-b", "uploads-cut", "v", json!({})))?;
    rig.phase("imagetransfer", "cut-up-3", "Ready")?;
    ensure!(fs::read_dir(&folder)?.count() == 1);
    rig.bed.agents[1].kill();
    rig.kubectl(&["delete", "imgt", "cut-up-3", "--wait=false"])?;
    rig.kubectl(&["patch", "imgt", "cut-up-3", "--type=merge", "-p", r#"{"metadata":{"finalizers":null}}"#])?;
    rig.gone("imagetransfer", "cut-up-3")?;
    rig.bed.agents[1].restart(&[])?;
    rig.bed.store()?;
    wait_until(BOUND, "the agent to clean", || Ok(left(&folder, &[]).ok()))
}

#[test]
fn an_operator_that_cannot_read_what_tenants_may_allows_nothing() -> Result<()> {
    let _alone = super::alone();
    let rig = Rig::running_on(1, "unread", small())?;
    let folder = pool(rig.vm.hypervisor(), "uploads-unread")?;
    let tenancy = rig.bed.dir.join(TENANCY);
    let said = fs::read_to_string(&tenancy)?;
    // whole, as a mounted ConfigMap changes
    let write = |text: &str| -> Result<()> {
        let new = tenancy.with_extension("new");
        fs::write(&new, text)?;
        Ok(fs::rename(&new, &tenancy)?)
    };
    write("namespaces: [")?;
    let transfer = rig.transfer("unread-1", &upload("node-b", "uploads-unread", "v", json!({})));
    let waits = transfer.and_then(|()| rig.reason("imagetransfer", "unread-1", "TenancyUnreadable"));
    // whatever came of it, for those who come next
    write(&said)?;
    ensure!(waits?.contains("tenancy.yaml"));
    rig.phase("imagetransfer", "unread-1", "Ready")?;
    rig.state("imagetransfer", "unread-1", "Cancelled")?;
    rig.phase("imagetransfer", "unread-1", "Cancelled")?;
    left(&folder, &[])
}
