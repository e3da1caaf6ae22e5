//! A backup is made while Prometheus watches: no query of the dashboard is empty, and what is told is true.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use virtmark_bed::guest::Image;
use virtmark_bed::{Bed, wait_until};

use super::prometheus::{Prometheus, get, health_of};
use super::rig::{BOUND, MIB, Rig, small};
use super::{alerts, dashboard};

#[test]
fn no_query_of_the_dashboard_is_empty_during_backups_and_no_secret_is_told() -> Result<()> {
    let bed = Bed::from_env()?;
    let prometheus = Prometheus::of(&bed, Path::new(alerts::RULES))?;
    prometheus.scrapes_all()?;
    let untold = untold_writes(&bed)?;

    // one that ended, with a freeze, a refused finalize and an Event; and one that is being read
    let guest = Rig::of(Bed::from_env()?, Image::get()?.boot("metered", &bed.hypervisors[0], [])?)?;
    guest.backup("metered-1", json!({}))?;
    let ticket = guest.ticket("metered-1-vda")?;
    guest.state("vmbackup", "metered-1", "Finalized")?;
    guest.reason("vmbackup", "metered-1", "TransfersIncomplete")?;
    let of_guest =
        |reason: &str| format!("virtmark_vm_unfinished_backups{{vm=\"metered\",reason=\"{reason}\"}}");
    until(&prometheus, &of_guest("TransfersIncomplete"), |value| value == 1.0)?;
    // it ends with the last byte that must be read, in the middle of the zeroes behind
    let _cut = ticket.curl(&[]);
    guest.phase("vmbackup", "metered-1", "Succeeded")?;

    let rig = Rig::running("busy", small())?;
    rig.vm.write("vda", 0, 8 * MIB, 0x11)?;
    rig.backup("busy-1", json!({}))?;
    rig.phase("vmbackup", "busy-1", "Ready")?;
    rig.vm.write("vda", 0, 4 * MIB, 0xee)?;
    let open = rig.ticket("busy-1-vda")?;

    until(&prometheus, "virtmark_vm_usable_checkpoint_timestamp_seconds{vm=\"metered\"}", |value| {
        value > 1e9
    })?;
    until(&prometheus, "virtmark_vm_unfinished_backups{vm=\"busy\",phase=\"Ready\"}", |value| value == 1.0)?;
    until(&prometheus, "virtmark_agent_scratch_used_bytes", |value| value >= f64::from(4 << 20))?;
    until(&prometheus, "virtmark_agent_scratch_limit_bytes", |value| value > f64::from(4 << 20))?;
    until(&prometheus, "virtmark_imageio_tickets", |value| value >= 1.0)?;
    until(&prometheus, "virtmark_agent_freeze_seconds_count", |value| value >= 1.0)?;
    let served = "virtmark_imageio_bytes_total{encryption=\"tls\"}";
    let before = sum(&prometheus, served)?;
    ensure!(open.curl(&["-H", "Range: bytes=0-4194303"])? == "206");
    wait_until(BOUND, "the bytes to be counted", || {
        // others read beside this test
        Ok((sum(&prometheus, served)? >= before + f64::from(4 << 20)).then_some(()))
    })?;

    for (title, query) in dashboard::queries()? {
        let query = query.replace("$__rate_interval", "5m").replace("$namespace", ".*");
        wait_until(BOUND, &format!("{title} to show something: {query}"), || {
            Ok((!prometheus.values(&query)?.is_empty()).then_some(()))
        })?;
    }
    wait_until(BOUND, "every alert to be evaluated", || {
        let groups = prometheus.api("rules?type=alert")?;
        let groups = groups["groups"].as_array().context("no groups")?.clone();
        let rules: Vec<_> = groups.iter().filter_map(|group| group["rules"].as_array()).flatten().collect();
        ensure!(rules.len() == alerts::all()?.len(), "{rules:?}");
        if let Some(bad) = rules.iter().find(|rule| rule["health"] == "err") {
            anyhow::bail!("an alert cannot be evaluated: {bad}");
        }
        Ok(rules.iter().all(|rule| rule["health"] == "ok").then_some(()))
    })?;

    // where something is told of tickets and disks, nothing of their secrets and places
    let uid = rig.get("vmbackup", "busy-1")?["metadata"]["uid"].as_str().context("no uid")?.to_owned();
    let id = open.url.rsplit('/').next().context("no id")?.to_owned();
    for daemon in std::iter::once(&bed.operator).chain(&bed.agents) {
        let (status, text) = get(health_of(daemon)?, "/metrics")?;
        ensure!(status == 200, "{status}");
        for secret in [uid.as_str(), &id, &open.secret, "127.0.0.2", "/vda", &bed.dir.to_string_lossy()] {
            ensure!(!text.contains(secret), "{} tells {secret}: {text}", daemon.name);
        }
    }
    rig.state("vmbackup", "busy-1", "Cancelled")?;
    rig.phase("vmbackup", "busy-1", "Failed")?;
    let ended = "sum(virtmark_backups_ended_total{reason=\"Cancelled\",phase=\"Failed\",type=\"Full\"})";
    until(&prometheus, ended, |value| value >= 1.0)?;
    let open_now = "max(virtmark_vm_unfinished_backups{vm=\"busy\"} or vector(0))";
    until(&prometheus, open_now, |value| value == 0.0)?;
    ensure!(untold_writes(&bed)? == untold, "the API server counted other writes than the agents did");
    Ok(())
}

/// How many writes of a backup's status the API server took of agents, and they did not count: those of agents that were
/// restarted since. Looked at while none is on its way.
fn untold_writes(bed: &Bed) -> Result<u64> {
    let series = "virtmark_api_requests_total{verb=\"update\",resource=\"vmbackups/status\",code=\"200\"} ";
    let told = || {
        let mut sum = 0;
        for agent in &bed.agents {
            let (_, text) = get(health_of(agent)?, "/metrics")?;
            let count = text.lines().find_map(|line| line.strip_prefix(series)).unwrap_or("0");
            sum += count.parse::<u64>()?;
        }
        Ok::<_, anyhow::Error>(sum)
    };
    wait_until(BOUND, "no status to be on its way", || {
        let before = told()?;
        let writes = bed.writes_by("virtmark-agent")?;
        let taken =
            writes.iter().filter(|(verb, resource, _)| verb == "update" && resource == "vmbackups/status");
        let taken = u64::try_from(taken.count())?;
        Ok((told()? == before).then(|| taken.checked_sub(before)).flatten())
    })
}

/// Waits until a series of a query has such a value.
fn until(prometheus: &Prometheus, query: &str, holds: impl Fn(f64) -> bool) -> Result<()> {
    wait_until(BOUND, query, || Ok(prometheus.values(query)?.into_iter().any(&holds).then_some(())))
}

fn sum(prometheus: &Prometheus, query: &str) -> Result<f64> {
    Ok(prometheus.values(query)?.into_iter().sum())
}
