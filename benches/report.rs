//! Rows: one line for people and scripts, and the same as JSON.

use std::fmt;

use serde::Serialize;

use super::cpu::FOREIGN;

/// What a ratio should be, or, without a peer, the value.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "each bench uses what it needs")]
pub(crate) enum Goal {
    /// At least.
    AtLeast(f64),
    /// At most.
    AtMost(f64),
}

/// The values of one side in all rounds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Runs {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) all: Vec<f64>,
}

/// Ours against the peer's in one case.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) ours: Runs,
    pub(crate) peer: Option<Runs>,
    /// Ours of the peer's.
    pub(crate) ratio: Option<f64>,
    pub(crate) goal: Option<f64>,
    pub(crate) better: &'static str,
    pub(crate) met: Option<bool>,
    /// Most CPU that others had in a run, of all there is.
    pub(crate) foreign_cpu: f64,
    /// CPU seconds of `qemu-nbd` for a GiB, as medians: ours, the peer's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) storage_cpu: Option<[f64; 2]>,
}

impl Runs {
    pub(crate) fn new(all: Vec<f64>) -> Runs {
        let mut sorted = all.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match sorted.len() {
            0 => f64::NAN,
            length if length % 2 == 0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => sorted[middle],
        };
        let (min, max) = (sorted.first().copied(), sorted.last().copied());
        Runs { median, min: min.unwrap_or(f64::NAN), max: max.unwrap_or(f64::NAN), all }
    }
}

impl Row {
    pub(crate) fn new(
        name: &str,
        unit: &'static str,
        goal: Goal,
        [ours, peer]: [Vec<f64>; 2],
        foreign_cpu: f64,
    ) -> Row {
        let (ours, peer) = (Runs::new(ours), Runs::new(peer));
        let ratio = ours.median / peer.median;
        Row {
            ratio: Some(ratio),
            peer: Some(peer),
            ..Row::judged(name, unit, Some(goal), ours, ratio, foreign_cpu)
        }
    }

    /// A row without a peer: what the goal says is the value itself.
    #[allow(dead_code, reason = "each bench uses what it needs")]
    pub(crate) fn alone(
        name: &str,
        unit: &'static str,
        goal: Option<Goal>,
        ours: Vec<f64>,
        foreign_cpu: f64,
    ) -> Row {
        let ours = Runs::new(ours);
        let median = ours.median;
        Row::judged(name, unit, goal, ours, median, foreign_cpu)
    }

    fn judged(
        name: &str,
        unit: &'static str,
        goal: Option<Goal>,
        ours: Runs,
        value: f64,
        foreign_cpu: f64,
    ) -> Row {
        let (goal, better, met) = match goal {
            Some(Goal::AtLeast(goal)) => (Some(goal), "more", Some(value >= goal)),
            Some(Goal::AtMost(goal)) => (Some(goal), "less", Some(value <= goal)),
            None => (None, "less", None),
        };
        let name = name.to_owned();
        Row { name, unit, ours, peer: None, ratio: None, goal, better, met, foreign_cpu, storage_cpu: None }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Row { name, unit, ours, peer, better, foreign_cpu, .. } = self;
        let most = peer.iter().map(|peer| peer.median).fold(ours.median, f64::max);
        let digits = if most < 10.0 { 3 } else { 0 };
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        write!(
            f,
            "{name} ours={:.digits$} peer={} ratio={} goal={} met={} better={better} unit={unit} \
             ours_range={:.digits$}..{:.digits$}",
            ours.median,
            or_none(peer.as_ref().map(|peer| format!("{:.digits$}", peer.median))),
            or_none(self.ratio.map(|ratio| format!("{ratio:.2}"))),
            or_none(self.goal.map(|goal| goal.to_string())),
            or_none(self.met.map(|met| if met { "yes" } else { "no" }.to_owned())),
            ours.min,
            ours.max,
        )?;
        if let Some(peer) = peer {
            write!(f, " peer_range={:.digits$}..{:.digits$}", peer.min, peer.max)?;
        }
        if let Some([ours, peer]) = self.storage_cpu {
            write!(f, " nbd_cpu={ours:.2}/{peer:.2}")?;
        }
        if *foreign_cpu > FOREIGN {
            write!(f, " busy={:.0}%", foreign_cpu * 100.0)?;
        }
        Ok(())
    }
}
