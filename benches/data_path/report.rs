//! Rows: one line for people and scripts, and the same as JSON.

use std::fmt;

use serde::Serialize;

use super::measure::FOREIGN;

/// What a ratio should be.
#[derive(Clone, Copy, Debug)]
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
    pub(crate) peer: Runs,
    /// Ours of the peer's.
    pub(crate) ratio: f64,
    pub(crate) goal: f64,
    pub(crate) better: &'static str,
    pub(crate) met: bool,
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
        name: String,
        unit: &'static str,
        goal: Goal,
        [ours, peer]: [Vec<f64>; 2],
        foreign_cpu: f64,
    ) -> Row {
        let (ours, peer) = (Runs::new(ours), Runs::new(peer));
        let ratio = ours.median / peer.median;
        let (goal, better, met) = match goal {
            Goal::AtLeast(goal) => (goal, "more", ratio >= goal),
            Goal::AtMost(goal) => (goal, "less", ratio <= goal),
        };
        Row { name, unit, ours, peer, ratio, goal, better, met, foreign_cpu, storage_cpu: None }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Row { name, unit, ours, peer, ratio, goal, better, foreign_cpu, .. } = self;
        let digits = if ours.median.max(peer.median) < 10.0 { 3 } else { 0 };
        let met = if self.met { "yes" } else { "no" };
        write!(
            f,
            "{name} ours={:.digits$} peer={:.digits$} ratio={ratio:.2} goal={goal} met={met} better={better} \
             unit={unit} ours_range={:.digits$}..{:.digits$} peer_range={:.digits$}..{:.digits$}",
            ours.median, peer.median, ours.min, ours.max, peer.min, peer.max,
        )?;
        if let Some([ours, peer]) = self.storage_cpu {
            write!(f, " nbd_cpu={ours:.2}/{peer:.2}")?;
        }
        if *foreign_cpu > FOREIGN {
            write!(f, " busy={:.0}%", foreign_cpu * 100.0)?;
        }
        Ok(())
    }
}
