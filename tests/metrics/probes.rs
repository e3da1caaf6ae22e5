//! `/healthz` and `/readyz` of the processes as users run them.

use anyhow::{Result, ensure};
use virtmark_bed::{Bed, component, wait_until};

use super::prometheus::{get, health_of};
use super::rig::BOUND;

#[test]
fn who_works_is_alive_and_ready_and_says_of_what() -> Result<()> {
    let bed = Bed::from_env()?;
    let needs: [(_, &[&str]); 2] = [
        (&bed.operator, &["kubernetes-api", "lease", "caches"]),
        (
            &bed.agents[0],
            &[
                "state-directory-lock",
                "libvirt",
                "state-directory",
                "kubernetes-api",
                "image-server",
                "certificate",
            ],
        ),
    ];
    for (daemon, needs) in needs {
        let address = health_of(daemon)?;
        ensure!(get(address, "/healthz")? == (200, "ok\n".to_owned()));
        let ready: String = needs.iter().map(|need| format!("[+]{need} ok\n")).collect();
        wait_until(BOUND, &format!("{} to be ready", daemon.name), || {
            Ok((get(address, "/readyz")? == (200, ready.clone())).then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn one_that_waits_for_the_lease_is_ready_and_does_not_lead() -> Result<()> {
    let bed = Bed::from_env()?;
    let second = component::operator(&bed.dir, &bed.plane, "operator-standby")?;
    let waits = wait_until(BOUND, "the second operator to be ready", || {
        let ready = get(health_of(&second)?, "/readyz").is_ok_and(|(status, _)| status == 200);
        Ok(ready.then_some(()))
    });
    let told = health_of(&second).and_then(|address| get(address, "/metrics"));
    second.process.end();
    waits?;
    let (_, text) = told?;
    ensure!(text.contains("\nvirtmark_operator_leader 0.0\n"), "{text}");
    ensure!(!text.contains("virtmark_vms"), "what it does not know it does not tell: {text}");
    Ok(())
}
