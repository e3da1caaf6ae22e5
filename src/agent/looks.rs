//! When libvirt is looked at, and at which of its domains. Pure: it never asks libvirt.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

/// How soon a domain is looked at once more after libvirt said that it changed. It may say so first and do it then: a VM that
/// migrated away is listed as off when its last event comes, and is gone from the list without a further one.
const SETTLES: Duration = Duration::from_secs(1);

/// Which domains to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// These, by uuid: libvirt said that they changed.
    These(BTreeSet<String>),
    /// All that libvirt has.
    All,
}

impl Which {
    /// None.
    pub fn none() -> Self {
        Self::These(BTreeSet::new())
    }

    /// Those of the other too.
    pub fn join(&mut self, other: Self) {
        match (&mut *self, other) {
            (Self::These(mine), Self::These(more)) => mine.extend(more),
            _ => *self = Self::All,
        }
    }
}

/// When libvirt is looked at again although it says nothing.
#[derive(Debug)]
pub struct Looks {
    /// All of it, by then in any case.
    pub due: Instant,
    /// When what was heard last of a domain has settled.
    settling: BTreeMap<String, Instant>,
    /// When what was heard last of all has.
    all_settles: Option<Instant>,
}

impl Looks {
    /// Nothing was heard yet.
    pub fn from(due: Instant) -> Self {
        Self { due, settling: BTreeMap::new(), all_settles: None }
    }

    /// The next look.
    pub fn next(&self) -> Instant {
        self.settling.values().copied().chain(self.all_settles).fold(self.due, Instant::min)
    }

    /// libvirt spoke of these: they are looked at now, and once more when that has settled. Others do not put it off.
    pub fn heard(&mut self, which: &Which, now: Instant) {
        let settles = now + SETTLES;
        match which {
            Which::These(these) => self.settling.extend(these.iter().map(|uuid| (uuid.clone(), settles))),
            Which::All => self.all_settles = Some(settles),
        }
    }

    /// A look has come: the domains of which libvirt spoke when it is one that follows, and `None` when it is the one of all.
    pub fn settled(&mut self, now: Instant) -> Option<Which> {
        let is_due = |settles: &mut Instant| *settles <= now;
        let these: BTreeSet<_> =
            self.settling.extract_if(.., |_, settles| is_due(settles)).map(|(uuid, _)| uuid).collect();
        match self.all_settles.take_if(is_due) {
            Some(_) => Some(Which::All),
            None => (!these.is_empty()).then_some(Which::These(these)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn these(uuids: &[&str]) -> Which {
        Which::These(uuids.iter().map(|uuid| (*uuid).to_owned()).collect())
    }

    #[test]
    fn what_libvirt_said_last_of_a_domain_is_looked_at_twice() {
        let (start, long, soon) = (Instant::now(), Duration::from_secs(60), Duration::from_secs(1));
        let mut looks = Looks::from(start + long);
        assert_eq!(looks.next(), start + long);
        looks.heard(&these(&["a", "b"]), start);
        assert_eq!(looks.next(), start + SETTLES);
        // each word is looked at as it comes; of another domain it puts off nothing
        looks.heard(&these(&["b"]), start + SETTLES / 2);
        assert_eq!(looks.settled(start + SETTLES), Some(these(&["a"])));
        assert_eq!(looks.next(), start + SETTLES + SETTLES / 2);
        assert_eq!(looks.settled(looks.next()), Some(these(&["b"])));
        assert_eq!(looks.next(), start + long);
        assert_eq!(looks.settled(start + long), None);
        looks.heard(&these(&["a"]), start);
        looks.heard(&Which::All, start);
        assert_eq!(looks.settled(start + SETTLES), Some(Which::All));
        assert_eq!(looks.next(), start + long);
        // what could not be published is not put off by it, and is not the second look
        looks.due = start + soon;
        looks.heard(&these(&["a"]), start + soon / 2);
        assert_eq!(looks.next(), start + soon);
        assert_eq!(looks.settled(looks.next()), None);
    }

    #[test]
    fn all_is_more_than_any() {
        let mut which = Which::none();
        which.join(these(&["a"]));
        which.join(these(&["b"]));
        assert_eq!(which, these(&["a", "b"]));
        which.join(Which::All);
        which.join(these(&["c"]));
        assert_eq!(which, Which::All);
    }
}
