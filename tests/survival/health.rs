//! What is outside goes away: `/readyz` says what, `/healthz` has no part in it, and both are ready again when it is back.

use anyhow::{Result, ensure};
use virtmark_bed::daemon::Daemon;
use virtmark_bed::{Bed, wait_until};

use super::prometheus::{get, health_of};
use super::rig::BOUND;

#[test]
fn readiness_says_what_is_away_and_no_restart_is_asked_for() -> Result<()> {
    let _alone = super::alone();
    let bed = Bed::from_env()?;
    let agent = &bed.agents[1];
    for daemon in [&bed.operator, agent] {
        until_ready(daemon)?;
    }

    let libvirtd = bed.hypervisors[1].libvirtd()?;
    libvirtd.pause();
    let missed = until_misses(agent, "libvirt");
    let told = get(health_of(agent)?, "/metrics");
    libvirtd.resume();
    missed?;
    ensure!(told?.1.contains("\nvirtmark_agent_libvirt_up 0.0\n"), "metrics are told all the same");
    until_ready(agent)?;

    bed.plane.apiserver.pause();
    let missed =
        until_misses(agent, "kubernetes-api").and_then(|()| until_misses(&bed.operator, "kubernetes-api"));
    bed.plane.apiserver.resume();
    missed?;
    until_ready(agent)?;
    until_ready(&bed.operator)
}

/// Waits until a process says that it lacks something; it is alive all the while.
fn until_misses(daemon: &Daemon, what: &str) -> Result<()> {
    let address = health_of(daemon)?;
    wait_until(BOUND, &format!("{} to miss {what}", daemon.name), || {
        ensure!(get(address, "/healthz")?.0 == 200, "{} asks for a restart", daemon.name);
        let (status, text) = get(address, "/readyz")?;
        Ok((status == 503 && text.contains(&format!("[-]{what}: "))).then_some(()))
    })
}

fn until_ready(daemon: &Daemon) -> Result<()> {
    let address = health_of(daemon)?;
    wait_until(BOUND, &format!("{} to be ready", daemon.name), || {
        Ok(get(address, "/readyz").is_ok_and(|(status, _)| status == 200).then_some(()))
    })
}
