//! What an agent tells Prometheus at a scrape, from what was read of its host. Pure: what it counted over time is in
//! `crate::metrics`.

use crate::agent::backup::scratch::Usage;
use crate::imageio::{Encryption, Meter};
use crate::metrics::{Metric, Sample};

/// What was read.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    /// Backups that the agent has in hand.
    pub(super) on_host: usize,
    /// For how many seconds the guest that is frozen longest is.
    pub(super) longest_frozen: f64,
    /// Whether libvirt answers.
    pub(super) libvirt_up: bool,
    /// The room that scratch images have, when it could be measured.
    pub(super) scratch: Option<Usage>,
    /// Bytes that they may take where the admin says.
    pub(super) scratch_limit: Option<u64>,
    /// Valid tickets.
    pub(super) tickets: usize,
    /// What the image server did.
    pub(super) meter: &'a Meter,
}

/// One sample a series.
pub(super) fn samples(facts: &Facts<'_>) -> Vec<Sample> {
    let meter = facts.meter;
    let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
    let mut samples = vec![
        Sample::count(Metric::OnHost, [], count(facts.on_host)),
        Sample::new(Metric::Frozen, [], facts.longest_frozen),
        Sample::count(Metric::LibvirtUp, [], u64::from(facts.libvirt_up)),
        Sample::count(Metric::Tickets, [], count(facts.tickets)),
        Sample::new(Metric::StorageWait, [], meter.storage().as_secs_f64()),
        Sample::new(Metric::SocketWait, [], meter.socket().as_secs_f64()),
    ];
    for encryption in Encryption::ALL {
        let name = encryption.as_str();
        samples.push(Sample::count(Metric::Served, ["download", name], meter.bytes(encryption)));
        samples.push(Sample::count(Metric::Connections, [name], meter.connections(encryption)));
    }
    samples.extend(meter.answers().map(|(class, answers)| Sample::count(Metric::Requests, [class], answers)));
    if let Some(usage) = &facts.scratch {
        let used: u64 = usage.used.iter().map(|(_, bytes)| bytes).sum();
        let limit = used.saturating_add(usage.room(facts.scratch_limit));
        samples.push(Sample::count(Metric::ScratchUsed, [], used));
        samples.push(Sample::count(Metric::ScratchLimit, [], limit));
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_what_scratch_images_can_take_and_what_is_not_known_is_not_told() {
        let meter = Meter::default();
        let usage = Usage { total: 1000 << 30, free: 500 << 30, used: vec![("a".to_owned(), 3 << 20)] };
        let mut facts = Facts {
            on_host: 1,
            longest_frozen: 0.0,
            libvirt_up: true,
            scratch: Some(usage),
            scratch_limit: Some(64 << 20),
            tickets: 2,
            meter: &meter,
        };
        let value = |facts: &Facts<'_>, metric: Metric| {
            samples(facts).iter().find(|sample| sample.metric == metric).map(|sample| sample.value)
        };
        assert_eq!(value(&facts, Metric::ScratchUsed), Some(f64::from(3 << 20)));
        assert_eq!(value(&facts, Metric::ScratchLimit), Some(f64::from(64 << 20)));
        facts.scratch_limit = Some(1 << 20);
        assert_eq!(value(&facts, Metric::ScratchLimit), Some(f64::from(3 << 20)), "it is full");
        facts.scratch = None;
        assert_eq!(value(&facts, Metric::ScratchUsed), None);
        assert_eq!(value(&facts, Metric::Tickets), Some(2.0));
    }
}
