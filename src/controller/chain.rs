//! The checkpoints of a VM and an owner, in the order in which they were made: which comes before which, where the next
//! incremental starts, which are too many. Pure.
//!
//! Every checkpoint's bitmap records on its own: the order is what people and restores see, and no bitmap needs it.
//! Chains of several owners (label `virtmark.dev/owner`) on one VM do not see each other.

use std::collections::BTreeMap;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;

use crate::api::{self, BaseRank, Phase, VmCheckpoint, conditions};

/// Whether its backup ended well, or it was imported, whatever became of its bitmaps since.
pub fn is_accepted(checkpoint: &VmCheckpoint) -> bool {
    // what waits to be imported says that it is not usable, and why
    checkpoint.status.as_ref().is_some_and(|status| {
        status.phase != Phase::Initializing
            && conditions::get(&status.conditions, conditions::USABLE).is_some()
    })
}

/// Whether it was accepted, and is not about to go.
fn is_point(checkpoint: &VmCheckpoint) -> bool {
    is_accepted(checkpoint) && checkpoint.metadata.deletion_timestamp.is_none()
}

/// Whose an object is.
pub fn owner(labels: &BTreeMap<String, String>) -> Option<&str> {
    labels.get(api::LABEL_OWNER).map(String::as_str)
}

/// Where a checkpoint stands among the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The one before it.
    pub parent: Option<String>,
    /// Whether the next incremental starts from it.
    pub base: Option<BaseRank>,
}

/// The checkpoints of one VM and owner, oldest first, without those that are about to go.
#[derive(Debug)]
pub struct Chain<'a>(Vec<&'a VmCheckpoint>);

impl<'a> Chain<'a> {
    /// Of those that are given.
    pub fn of(
        vm_uuid: &str,
        owned_by: Option<&str>,
        all: impl IntoIterator<Item = &'a VmCheckpoint>,
    ) -> Self {
        let is_in = |checkpoint: &&VmCheckpoint| {
            checkpoint.spec.vm_uuid == vm_uuid
                && owner(checkpoint.labels()) == owned_by
                && is_point(checkpoint)
        };
        let mut points: Vec<_> = all.into_iter().filter(is_in).collect();
        points.sort_by_key(|point| (point.spec.creation_time.0, point.name_any()));
        Self(points)
    }

    /// The newest one.
    pub fn newest(&self) -> Option<&'a VmCheckpoint> {
        self.0.last().copied()
    }

    /// Where an incremental starts that names no checkpoint.
    pub fn next_base(&self) -> Option<&'a VmCheckpoint> {
        self.0.iter().rev().copied().find(|point| point.is_base())
    }

    /// When a checkpoint that is made `now` was made: never at or before the one that it follows, whatever the clocks of two
    /// operators say.
    pub fn next_time(&self, now: Timestamp) -> Timestamp {
        let now = conditions::whole_seconds(now);
        let after = self
            .newest()
            .and_then(|point| point.spec.creation_time.0.checked_add(SignedDuration::from_secs(1)).ok());
        after.map_or(now, |after| now.max(after))
    }

    /// Where `checkpoint` stands. Its parent is the one it was made after, or, when that is gone, the nearest older one.
    pub fn place(&self, checkpoint: &VmCheckpoint) -> Place {
        let name = checkpoint.name_any();
        let Some(at) = self.0.iter().position(|point| point.name_any() == name) else {
            return Place::default();
        };
        let older = &self.0[..at];
        let was = older.iter().find(|point| Some(point.name_any()) == checkpoint.spec.parent);
        let parent = was.or(older.last()).map(|point| point.name_any());
        let base = checkpoint.is_base().then(|| {
            let is_next = self.next_base().is_some_and(|next| next.name_any() == name);
            if is_next { BaseRank::Next } else { BaseRank::Older }
        });
        Place { parent, base }
    }

    /// Those whose status does not say where they stand.
    pub fn displaced(&self) -> impl Iterator<Item = &'a VmCheckpoint> {
        self.0.iter().copied().filter(|point| {
            let status = point.status.as_ref();
            let said = status.map(|status| Place { parent: status.parent.clone(), base: status.base });
            said != Some(self.place(point))
        })
    }

    /// What is too many, once the backup that made `last` succeeded and wants `most` of them: such as cannot be used, then
    /// the oldest. One `in_use` stays until the next backup asks. Nothing, when a later backup has had its say.
    pub fn excess(&self, last: &str, most: usize, in_use: impl Fn(&str) -> bool) -> Vec<&'a VmCheckpoint> {
        if self.newest().is_none_or(|newest| newest.name_any() != last) {
            return Vec::new();
        }
        let mut others = self.0[..self.0.len() - 1].to_vec();
        // stable: the oldest of each kind first
        others.sort_by_key(|point| point.is_usable());
        let over = self.0.len().saturating_sub(most);
        others.into_iter().take(over).filter(|point| !in_use(&point.name_any())).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const UUID: &str = "00000000-0000-4000-8000-000000000001";

    fn point(name: &str, second: i64, parent: Option<&str>, usable: Option<&str>) -> VmCheckpoint {
        let phase = match usable {
            Some("True") => "Ready",
            Some(_) => "Failed",
            None => "Initializing",
        };
        let usable = usable.map(|usable| {
            json!({"type": "Usable", "status": usable, "reason": "Test", "message": "",
                "lastTransitionTime": "2026-11-25T00:00:00Z"})
        });
        let taken = Timestamp::from_second(second).unwrap().to_string();
        serde_json::from_value(json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmCheckpoint",
            "metadata": {"name": name},
            "spec": {"vm": "db01", "vmUuid": UUID, "bitmap": name, "creationTime": taken, "parent": parent,
                "disks": [{"target": "vda", "format": "qcow2"}]},
            "status": {"phase": phase, "conditions": usable.into_iter().collect::<Vec<_>>()}}))
        .unwrap()
    }

    fn going(mut point: VmCheckpoint) -> VmCheckpoint {
        point.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::UNIX_EPOCH));
        point
    }

    fn places(all: &[VmCheckpoint]) -> Vec<(String, Option<BaseRank>)> {
        let chain = Chain::of(UUID, None, all);
        let place = |point| {
            let Place { parent, base } = chain.place(point);
            (parent.unwrap_or_default(), base)
        };
        all.iter().map(place).collect()
    }

    #[test]
    fn what_waits_to_be_imported_is_no_link() {
        let mut waits = point("waits", 1, None, Some("False"));
        waits.status.as_mut().unwrap().phase = Phase::Initializing;
        let all = [waits, point("a", 2, Some("waits"), Some("True"))];
        assert_eq!(places(&all), [(String::new(), None), (String::new(), Some(BaseRank::Next))]);
    }

    #[test]
    fn the_chain_closes_over_what_goes() {
        let (next, older) = (Some(BaseRank::Next), Some(BaseRank::Older));
        let mut all = vec![
            point("a", 1, None, Some("True")),
            point("b", 2, Some("a"), Some("True")),
            point("c", 3, Some("b"), Some("True")),
            point("d", 4, Some("c"), None),
        ];
        let of =
            |list: [(&str, Option<BaseRank>); 4]| list.map(|(name, base)| (name.to_owned(), base)).to_vec();
        assert_eq!(places(&all), of([("", older), ("a", older), ("b", next), ("", None)]), "d's backup runs");
        all[3] = point("d", 4, Some("c"), Some("False"));
        assert_eq!(places(&all), of([("", older), ("a", older), ("b", next), ("c", None)]), "d is broken");
        all[1] = going(all[1].clone());
        assert_eq!(places(&all), of([("", older), ("", None), ("a", next), ("c", None)]), "b goes");
        all[2] = going(all[2].clone());
        assert_eq!(places(&all), of([("", next), ("", None), ("", None), ("a", None)]), "and c");
        let other = Chain::of("00000000-0000-4000-8000-000000000002", None, &all);
        assert!(other.newest().is_none() && Chain::of(UUID, Some("veeam"), &all).newest().is_none());
    }

    #[test]
    fn a_clock_that_goes_back_does_not_turn_the_chain_round() {
        let all = [point("b", 100, None, Some("True"))];
        let at = |second| Timestamp::from_second(second).unwrap();
        let chain = Chain::of(UUID, None, &all);
        assert_eq!(
            [50, 100, 101, 200].map(|now| chain.next_time(at(now))),
            [at(101), at(101), at(101), at(200)]
        );
        assert_eq!(Chain::of(UUID, None, []).next_time(at(7)), at(7));
    }

    #[test]
    fn the_oldest_are_too_many_and_none_in_use() {
        let all = [
            point("a", 1, None, Some("True")),
            point("b", 2, None, Some("False")),
            point("c", 3, None, Some("True")),
            going(point("x", 4, None, Some("True"))),
            point("d", 5, None, Some("True")),
        ];
        let excess = |last: &str, most, used: &str| -> Vec<String> {
            let chain = Chain::of(UUID, None, &all);
            chain.excess(last, most, |name| name == used).iter().map(|point| point.name_any()).collect()
        };
        assert!(excess("d", 4, "").is_empty());
        assert_eq!(excess("d", 3, ""), ["b"], "what cannot be used first");
        assert_eq!(excess("d", 2, ""), ["b", "a"]);
        assert_eq!(excess("d", 1, ""), ["b", "a", "c"], "never its own");
        assert_eq!(excess("d", 2, "a"), ["b"], "one in use stays, and no younger one goes for it");
        assert!(excess("c", 1, "").is_empty(), "a later backup has its own wish");
    }
}
