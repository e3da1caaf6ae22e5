//! What is told of a domain's bitmaps: two looks made one, numbers that hold still, and bounds. Pure.

use std::collections::BTreeMap;

use crate::api::{BitmapHealth, SightedBitmap, SightedCheckpoint};

/// A VmCheckpoint to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The VmCheckpoint's uid.
    pub uid: String,
    /// The name of its bitmaps.
    pub name: String,
    /// The disks whose bitmap is not known to be broken.
    pub targets: Vec<String>,
}

/// What was found: by the name of the bitmaps, and by disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found(BTreeMap<String, BTreeMap<String, SightedBitmap>>);

/// The longest name that is told.
const NAME: usize = 255;
/// How many names are told of one domain.
const NAMES: usize = 128;
/// How many bitmaps are told of one domain, so that its sighting stays small.
const BITMAPS: usize = 1024;

impl Found {
    /// Adds one, in place of what was found of it before. A granularity that was known stays known.
    pub fn put(&mut self, name: &str, bitmap: SightedBitmap) {
        let disks = self.0.entry(name.to_owned()).or_default();
        let known = disks.get(&bitmap.target).and_then(|before| before.granularity);
        let granularity = bitmap.granularity.or(known);
        disks.insert(bitmap.target.clone(), SightedBitmap { granularity, ..bitmap });
    }

    /// What was found of one.
    pub fn get(&self, name: &str, target: &str) -> Option<&SightedBitmap> {
        self.0.get(name)?.get(target)
    }

    /// Forgets everything of one name.
    pub fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Whether one that is wanted was seen not to be whole: that is worth a second look.
    pub fn is_doubtful(&self, wanted: &[Wanted]) -> bool {
        let all = wanted.iter().flat_map(|one| one.targets.iter().map(|target| (&one.name, target)));
        all.filter_map(|(name, target)| self.get(name, target)).any(|bitmap| is_bad(bitmap.health))
    }

    /// Both looks say that a bitmap is not whole, or nothing is said: once it is, the bitmap is never used again.
    #[must_use]
    pub fn confirmed_by(self, mut second: Self) -> Self {
        for (name, disks) in &mut second.0 {
            for (target, bitmap) in disks.iter_mut().filter(|(_, bitmap)| is_bad(bitmap.health)) {
                if !self.get(name, target).is_some_and(|first| is_bad(first.health)) {
                    bitmap.health = BitmapHealth::Unknown;
                    bitmap.message = None;
                }
            }
        }
        second
    }

    /// Nothing is said of what is not whole: a QEMU elsewhere may have it.
    #[must_use]
    pub fn unconfirmed(mut self) -> Self {
        for bitmap in
            self.0.values_mut().flat_map(BTreeMap::values_mut).filter(|bitmap| is_bad(bitmap.health))
        {
            bitmap.health = BitmapHealth::Unknown;
            bitmap.message = None;
        }
        self
    }

    /// As it is told: those that are wanted first, as far as there is room.
    pub fn report(self, wanted: &[Wanted], before: Option<&[SightedCheckpoint]>) -> Vec<SightedCheckpoint> {
        let uid = |name: &str| wanted.iter().find(|one| one.name == name).map(|one| one.uid.clone());
        let mut all: Vec<_> = self
            .0
            .into_iter()
            .filter(|(name, _)| (1..=NAME).contains(&name.chars().count()))
            .map(|(name, disks)| SightedCheckpoint {
                checkpoint_uid: uid(&name),
                disks: disks.into_values().take(64).collect(),
                name,
            })
            .collect();
        all.sort_by_key(|one| one.checkpoint_uid.is_none());
        all.truncate(NAMES);
        let mut room = BITMAPS;
        all.retain(|one| {
            let fits = one.disks.len() <= room;
            room -= if fits { one.disks.len() } else { 0 };
            fits
        });
        all.sort_by(|a, b| a.name.cmp(&b.name));
        for one in &mut all {
            let before = before.into_iter().flatten().find(|before| before.name == one.name);
            for bitmap in &mut one.disks {
                let before =
                    before.and_then(|before| before.disks.iter().find(|b| b.target == bitmap.target));
                settle(bitmap, before);
            }
        }
        all
    }
}

fn is_bad(health: BitmapHealth) -> bool {
    matches!(health, BitmapHealth::Broken | BitmapHealth::Missing)
}

/// Leaves the number of dirty bytes as it was told before, unless it moved by a tenth. Of one that cannot be counted, for the
/// VM is off, say, it stays what it was.
fn settle(bitmap: &mut SightedBitmap, before: Option<&SightedBitmap>) {
    let told =
        before.filter(|before| before.health == BitmapHealth::Whole && bitmap.health == BitmapHealth::Whole);
    let Some(told) = told else { return };
    bitmap.granularity = bitmap.granularity.or(told.granularity);
    let has_moved = match (told.dirty_bytes, bitmap.dirty_bytes) {
        (Some(told), Some(now)) => told != now && now.abs_diff(told) >= told.unsigned_abs() / 10,
        (None, _) => true,
        (Some(_), None) => false,
    };
    if !has_moved {
        bitmap.dirty_bytes = told.dirty_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(target: &str, health: BitmapHealth, dirty: Option<i64>) -> SightedBitmap {
        let message = is_bad(health).then(|| "words".to_owned());
        SightedBitmap { target: target.to_owned(), health, granularity: None, dirty_bytes: dirty, message }
    }

    fn found(all: &[(&str, SightedBitmap)]) -> Found {
        let mut found = Found::default();
        all.iter().for_each(|(name, bitmap)| found.put(name, bitmap.clone()));
        found
    }

    fn wanted(name: &str, targets: &[&str]) -> Wanted {
        let targets = targets.iter().map(|target| (*target).to_owned()).collect();
        Wanted { uid: format!("uid-{name}"), name: name.to_owned(), targets }
    }

    #[test]
    fn dirty_bytes_are_told_when_they_moved_by_a_tenth() {
        let cases = [
            ("the first", None, Some(0), Some(0)),
            ("of an idle guest", Some(1000), Some(1000), Some(1000)),
            ("a little more", Some(1000), Some(1099), Some(1000)),
            ("a tenth more", Some(1000), Some(1100), Some(1100)),
            ("a tenth less", Some(1000), Some(900), Some(900)),
            ("from nothing", Some(0), Some(65536), Some(65536)),
            ("to nothing", Some(65536), Some(0), Some(0)),
            ("nothing still", Some(0), Some(0), Some(0)),
            ("not counted: it is off", Some(1000), None, Some(1000)),
            ("never counted", None, None, None),
        ];
        for (what, before, now, expected) in cases {
            let before = bitmap("vda", BitmapHealth::Whole, before);
            let mut told = bitmap("vda", BitmapHealth::Whole, now);
            settle(&mut told, Some(&before));
            assert_eq!(told.dirty_bytes, expected, "{what}");
        }
        let before = bitmap("vda", BitmapHealth::Whole, Some(1000));
        let mut broken = bitmap("vda", BitmapHealth::Broken, None);
        settle(&mut broken, Some(&before));
        assert_eq!(broken.dirty_bytes, None, "one that is broken counts nothing");
    }

    #[test]
    fn only_what_two_looks_say_is_bad_is_bad() {
        use BitmapHealth::{Broken, Missing, Unknown, Whole};
        for (first, second, expected) in [
            (Whole, Whole, Whole),
            (Missing, Whole, Whole),
            (Whole, Missing, Unknown),
            (Unknown, Broken, Unknown),
            (Missing, Missing, Missing),
            (Missing, Broken, Broken),
        ] {
            let one = |health| found(&[("a", bitmap("vda", health, None))]);
            let both = one(first).confirmed_by(one(second));
            assert_eq!(both.get("a", "vda").unwrap().health, expected, "{first:?}, {second:?}");
        }
        let bad = found(&[("a", bitmap("vda", Broken, None))]);
        assert!(bad.is_doubtful(&[wanted("a", &["vda"])]));
        assert!(!bad.is_doubtful(&[wanted("a", &["vdb"]), wanted("b", &["vda"])]), "nobody asks about it");
        assert_eq!(bad.unconfirmed().get("a", "vda").unwrap().health, Unknown);
    }

    #[test]
    fn what_is_wanted_is_told_however_many_others_there_are() {
        let mut all: Vec<_> = (0..500)
            .map(|number| (format!("a{number:03}"), bitmap("vda", BitmapHealth::Unknown, None)))
            .collect();
        all.push(("z".to_owned(), bitmap("vda", BitmapHealth::Whole, Some(1))));
        all.push(("x".repeat(256), bitmap("vda", BitmapHealth::Whole, None)));
        let mut many = Found::default();
        all.iter().for_each(|(name, bitmap)| many.put(name, bitmap.clone()));
        let report = many.report(&[wanted("z", &["vda"])], None);
        assert_eq!(report.len(), NAMES);
        let last = report.last().unwrap();
        assert_eq!((last.name.as_str(), last.checkpoint_uid.as_deref()), ("z", Some("uid-z")));
        assert!(report.is_sorted_by(|a, b| a.name < b.name));
    }

    #[test]
    fn a_granularity_that_the_header_told_is_kept() {
        let mut both = Found::default();
        both.put(
            "a",
            SightedBitmap { granularity: Some(65536), ..bitmap("vda", BitmapHealth::Unknown, None) },
        );
        both.put("a", bitmap("vda", BitmapHealth::Whole, Some(0)));
        let report = both.report(&[], None);
        assert_eq!((report[0].disks[0].granularity, report[0].disks[0].dirty_bytes), (Some(65536), Some(0)));
    }
}
