//! The agents' CA is exchanged while a disk is being read, and an agent starts before anybody signs.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::SignedDuration;
use serde_json::json;
use virtmark::clock;
use virtmark::controller::certificates::authorities::Authorities;
use virtmark::x509::Authority;
use virtmark::x509::certificate::{check, each};
use virtmark_bed::component::{ADVERTISED, SIGNED_NODE, SYSTEM_NAMESPACE};
use virtmark_bed::{Bed, wait_until};

use super::prometheus::{get, health_of};
use super::rig::{BOUND, MIB, Rig, Ticket, small};

/// The operator looks each half minute, and agents take up to another one.
const EXCHANGED: Duration = Duration::from_secs(150);

fn published(bed: &Bed) -> Result<String> {
    let map = bed.kubectl().json(&["-n", SYSTEM_NAMESPACE, "get", "configmap", "virtmark-ca"])?;
    Ok(map["data"]["ca.crt"].as_str().context("no ca.crt")?.to_owned())
}

/// The certificate that a new connection is shown.
fn shown(ticket: &Ticket) -> Result<String> {
    let output = Command::new("curl")
        .args(["-sS", "-o", "/dev/null", "-H", "Range: bytes=0-0", "-w", "%{certs}", "--cacert"])
        .arg(&ticket.ca)
        .arg(&ticket.url)
        .output()?;
    ensure!(output.status.success(), "curl: {}", String::from_utf8_lossy(&output.stderr));
    each(&String::from_utf8(output.stdout)?).into_iter().next().context("curl tells of no certificate")
}

/// Has another CA sign, as a week after the operator made it.
fn exchange(bed: &Bed) -> Result<Authority> {
    let old = bed.kubectl().json(&["-n", SYSTEM_NAMESPACE, "get", "secret", "virtmark-ca"])?;
    let secret: Secret = serde_json::from_value(old.clone())?;
    let now = clock::now();
    let other = Authority::make(now - SignedDuration::from_hours(8 * 24))?;
    let mut new = serde_json::to_value(Authorities::read(&secret)?.followed_by(other.clone(), now).secret())?;
    new["metadata"] = old["metadata"].clone();
    bed.kubectl().run_with(&["replace", "-f", "-"], &new.to_string())?;
    Ok(other)
}

#[test]
fn another_ca_cuts_no_read_and_is_trusted_beside_the_old_one() -> Result<()> {
    let _alone = super::alone();
    let rig = Rig::running_on(1, "exchanged", small())?;
    ensure!(rig.vm.hypervisor().name == SIGNED_NODE);
    rig.vm.write("vda", 0, 48 * MIB, 0x11)?;
    rig.backup("exchanged-1", json!({}))?;
    let mut ticket = rig.ticket("exchanged-1-vda")?;
    let then = rig.vm.remember("vda")?;
    let before = shown(&ticket)?;

    // a client that stops in the middle: more is to come than the kernel holds for it
    let mut curl = Command::new("curl")
        .args(["-sS", "--fail", "--cacert"])
        .arg(&ticket.ca)
        .arg(&ticket.url)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut bytes = curl.stdout.take().context("no output")?;
    let path = rig.files.path().join("read.raw");
    let mut image = File::create(&path)?;
    let mut first = vec![0; 1 << 20];
    bytes.read_exact(&mut first)?;
    image.write_all(&first)?;

    let other = exchange(&rig.bed)?;
    let bundle = wait_until(EXCHANGED, "the other CA to be published", || {
        let bundle = published(&rig.bed)?;
        Ok(bundle.contains(other.certificate()).then_some(bundle))
    })?;
    ticket.ca = rig.files.path().join("bundle.pem");
    fs::write(&ticket.ca, &bundle)?;
    let after = wait_until(EXCHANGED, "a new connection to be shown another certificate", || {
        Ok(Some(shown(&ticket)?).filter(|now| *now != before))
    })?;
    for certificate in [&before, &after] {
        check(&bundle, certificate, ADVERTISED, clock::now())?;
    }
    check(other.certificate(), &after, ADVERTISED, clock::now()).context("the other CA did not sign it")?;
    ensure!(check(other.certificate(), &before, ADVERTISED, clock::now()).is_err());

    io::copy(&mut bytes, &mut image)?;
    ensure!(curl.wait()?.success(), "the read was cut");
    drop(image);
    virtmark_bed::compare(&then, &path, "raw")?;
    ensure!(ticket.curl(&["-H", "Range: bytes=0-0"])? == "206", "the ticket goes on");
    rig.state("vmbackup", "exchanged-1", "Finalized")?;
    rig.phase("vmbackup", "exchanged-1", "Succeeded")?;
    rig.host_is_clean()
}

#[test]
fn without_a_certificate_only_images_wait() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, "uncertified", small())?;
    rig.backup("uncertified-1", json!({"transfers": "Manual"}))?;
    rig.phase("vmbackup", "uncertified-1", "Ready")?;
    rig.transfer("uncertified-1", &json!({"backup": "uncertified-1", "disk": "vda"}))?;
    let before = rig.ticket("uncertified-1")?;
    rig.bed.operator.kill();
    rig.bed.agents[1].kill();
    let folder = rig.vm.hypervisor().dir.join("agent/state/tls/signed");
    fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    rig.bed.agents[1].restart(&[])?;
    rig.bed.store()?;
    let address = health_of(&rig.bed.agents[1])?.to_owned();
    let waits = wait_until(BOUND, "the agent to say that it waits for its certificate", || {
        let Ok((status, text)) = get(&address, "/readyz") else { return Ok(None) };
        let says =
            text.contains("[-]certificate: there is none yet; CertificateSigningRequest virtmark-agent-");
        Ok((status == 503 && says && text.contains("[+]libvirt ok")).then_some(text))
    });
    // the backup is this agent's again, and ends as it is told to
    let ended = waits.and_then(|_| {
        ensure!(before.curl(&["-H", "Range: bytes=0-0"]).is_err(), "something serves images");
        rig.state("vmbackup", "uncertified-1", "Cancelled")?;
        rig.phase("vmbackup", "uncertified-1", "Failed")
    });
    rig.bed.operator.restart(&[])?;
    rig.bed.store()?;
    ended?;
    wait_until(EXCHANGED, "the agent to have a certificate", || {
        Ok(get(&address, "/readyz").is_ok_and(|(status, _)| status == 200).then_some(()))
    })?;
    rig.backup("uncertified-2", json!({}))?;
    rig.read("uncertified-2-vda", &rig.vm.remember("vda")?)?;
    rig.state("vmbackup", "uncertified-2", "Finalized")?;
    rig.phase("vmbackup", "uncertified-2", "Succeeded")?;
    rig.host_is_clean()
}
