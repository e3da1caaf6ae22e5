//! What `chain merge` and `chain rebase` make of restore points: functions of their manifests. It never looks at a file, and
//! changes no name: what lies over a restore point finds the same file there, with the same bytes of the disk.

use super::chain::{self, Gap};
use super::manifest::{Base, Covered, Disk, DiskFormat, Manifest, ReadMode};

/// What the manifest says of a disk that is full since its chain was merged.
pub const MERGED: &str = "Merged";

/// Why nothing can be made of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReshapeError {
    /// The chain is broken.
    #[error("{point}: {disk}: {gap}")]
    Broken {
        /// The restore point.
        point: String,
        /// Its disk.
        disk: String,
        /// Where.
        gap: Gap,
    },
    /// Only qcow2 lies over something.
    #[error(
        "{point}: {disk}: its manifest says that a raw file lies over another, which none can: it is damaged"
    )]
    Raw {
        /// The restore point.
        point: String,
        /// Its disk.
        disk: String,
    },
}

/// A restore point as it is to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Reshaped {
    /// Its manifest, in which the lengths and digests of the files that are written anew are those of the old ones still.
    pub manifest: Manifest,
    /// The files that are written anew; all others stay.
    pub rewrites: Vec<Rewrite>,
}

/// A file that is written anew: the same disk, over something else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// The disk.
    pub target: String,
    /// What the new file lies over: a restore point, and its file; nothing when it is full.
    pub over: Option<(String, Base)>,
    /// What is read for it, the old file first: restore points, and their files.
    pub reads: Vec<(String, String)>,
}

/// The restore points that lie over one.
#[must_use]
pub fn children<'a>(points: &'a [Manifest], below: &Manifest) -> Vec<&'a Manifest> {
    let over = |point: &&Manifest| lies_over(point, &below.name, Some(&below.backup.uid));
    points.iter().filter(over).collect()
}

/// Whether a restore point lies over the one of this name, and of this uid where that is known.
#[must_use]
pub fn lies_over(point: &Manifest, name: &str, uid: Option<&str>) -> bool {
    let parent = point.parent.as_ref().filter(|_| point.disks.iter().any(|disk| disk.base.is_some()));
    parent.is_some_and(|parent| parent.name == name && uid.is_none_or(|uid| parent.uid == uid))
}

/// A restore point that is whole by itself; nothing when it is already.
///
/// # Errors
/// When its chain is broken.
pub fn merge(points: &[Manifest], point: &Manifest) -> Result<Option<Reshaped>, ReshapeError> {
    let reshaped = reshape(points, point, |_| None)?;
    Ok(Some(reshaped).filter(|reshaped| !reshaped.rewrites.is_empty()))
}

/// What lies over a restore point that is to be removed: each lies over what that one lies over, or over nothing.
///
/// # Errors
/// When a chain is broken.
pub fn rebase(points: &[Manifest], removed: &Manifest) -> Result<Vec<Reshaped>, ReshapeError> {
    let below = |disk: &Disk| Some((removed.parent.as_ref()?.name.clone(), disk.base.clone()?));
    children(points, removed).into_iter().map(|child| reshape(points, child, below)).collect()
}

/// `over`: what a disk's file is to lie over, by the disk that it lies over now.
fn reshape(
    points: &[Manifest],
    point: &Manifest,
    over: impl Fn(&Disk) -> Option<(String, Base)>,
) -> Result<Reshaped, ReshapeError> {
    let mut manifest = point.clone();
    let (mut rewrites, mut parent) = (Vec::new(), None);
    for (disk, anew) in point.disks.iter().zip(&mut manifest.disks) {
        if disk.base.is_none() {
            continue;
        }
        let (name, target) = (&point.name, &disk.target);
        if disk.format == DiskFormat::Raw {
            return Err(ReshapeError::Raw { point: name.clone(), disk: target.clone() });
        }
        let layers = chain::layers(points, point, disk);
        let layers =
            layers.map_err(|gap| ReshapeError::Broken { point: name.clone(), disk: target.clone(), gap })?;
        // an image with a base has a layer below
        let Some((below, below_disk)) = layers.get(1) else { continue };
        let over = over(below_disk);
        // what is in the new file: all layers' that it does not lie over
        let held = if over.is_some() { 2 } else { layers.len() };
        let sum = |of: fn(&Covered) -> u64| {
            layers[..held].iter().fold(0, |sum: u64, (_, disk)| sum.saturating_add(of(&disk.covered)))
        };
        anew.covered = Covered { read: sum(|covered| covered.read), zeroed: sum(|covered| covered.zeroed) };
        anew.base = over.as_ref().map(|(_, base)| base.clone());
        if over.is_some() {
            parent.clone_from(&below.parent);
        } else {
            anew.mode = ReadMode::Full;
            anew.mode_reason = Some(MERGED.to_owned());
        }
        let reads = layers.iter().map(|(point, disk)| (point.name.clone(), disk.file.clone())).collect();
        rewrites.push(Rewrite { target: target.clone(), over, reads });
    }
    manifest.parent = parent;
    manifest.client = format!("virtmark {}", env!("CARGO_PKG_VERSION"));
    Ok(Reshaped { manifest, rewrites })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::manifest::Parent;
    use super::super::manifest::tests::example;
    use super::*;

    /// A full one, and incrementals, each over the one before.
    fn chained(names: &[&str]) -> Vec<Manifest> {
        let point = |at: usize| {
            let mut point = example(names[at], at.checked_sub(1).map(|below| names[below]));
            if let Some(base) = &mut point.disks[0].base {
                base.file = if at == 1 { "vda.full.qcow2" } else { "vda.incr.qcow2" }.to_owned();
            }
            point.disks[0].covered = Covered { read: 1 << at, zeroed: 100 << at };
            point
        };
        (0..names.len()).map(point).collect()
    }

    #[test]
    fn a_merged_one_is_full_and_what_lies_over_it_finds_it() {
        let points = chained(&["a", "b", "c", "d"]);
        assert_eq!(merge(&points, &points[0]), Ok(None), "it is full already");
        let merged = merge(&points, &points[2]).unwrap().unwrap();
        let [Rewrite { over: None, reads, .. }] = &merged.rewrites[..] else { panic!("{merged:?}") };
        let reads: Vec<_> = reads.iter().map(|(point, file)| format!("{point}/{file}")).collect();
        assert_eq!(reads, ["c/vda.incr.qcow2", "b/vda.incr.qcow2", "a/vda.full.qcow2"]);
        let disk = &merged.manifest.disks[0];
        assert_eq!(
            (disk.mode, &disk.base, disk.mode_reason.as_deref()),
            (ReadMode::Full, &None, Some(MERGED))
        );
        assert_eq!(disk.covered, Covered { read: 7, zeroed: 700 });
        assert_eq!((&merged.manifest.parent, disk.file.as_str()), (&None, "vda.incr.qcow2"));
        assert_eq!(merged.manifest.checkpoint, points[2].checkpoint, "the next backup may lie over it still");
        let mut after = points;
        after[2] = merged.manifest;
        let layers = chain::layers(&after, &after[3], &after[3].disks[0]).unwrap();
        assert_eq!(layers.len(), 2);
        assert!(children(&after, &after[1]).is_empty() && children(&after, &after[0]).len() == 1);
    }

    #[test]
    fn what_lay_over_the_removed_lies_over_what_is_below() {
        let points = chained(&["a", "b", "c", "d"]);
        let reshaped = rebase(&points, &points[1]).unwrap();
        assert_eq!(reshaped.len(), 1);
        let (c, rewrite) = (&reshaped[0].manifest, &reshaped[0].rewrites[0]);
        assert_eq!((c.name.as_str(), c.parent.as_ref().unwrap().name.as_str()), ("c", "a"));
        let base = Base { file: "vda.full.qcow2".to_owned(), format: DiskFormat::Qcow2 };
        assert_eq!(rewrite.over, Some(("a".to_owned(), base.clone())));
        assert_eq!((&c.disks[0].base, c.disks[0].mode), (&Some(base), ReadMode::Incremental));
        assert_eq!(c.disks[0].covered, Covered { read: 6, zeroed: 600 });
        // of a full one: what lies over it is full
        let reshaped = rebase(&points, &points[0]).unwrap();
        assert!(!reshaped[0].manifest.is_incremental() && reshaped[0].manifest.parent.is_none());
        assert!(rebase(&points, &points[3]).unwrap().is_empty(), "nothing lies over the newest");
    }

    #[test]
    fn disks_of_one_point_go_each_its_way() {
        let mut points = chained(&["a", "b", "c"]);
        for point in &mut points {
            let mut other = point.disks[0].clone();
            other.target = "vdb".to_owned();
            other.file = other.file.replace("vda", "vdb");
            if let Some(base) = &mut other.base {
                base.file = base.file.replace("vda", "vdb");
            }
            point.disks.push(other);
        }
        // vdb was read in full in the middle
        points[1].disks[1].base = None;
        points[1].disks[1].mode = ReadMode::Full;
        let c = rebase(&points, &points[1]).unwrap().remove(0);
        let modes: Vec<_> = c.manifest.disks.iter().map(|disk| disk.mode).collect();
        assert_eq!(modes, [ReadMode::Incremental, ReadMode::Full]);
        assert_eq!(c.manifest.parent, points[1].parent);
        let b = merge(&points, &points[1]).unwrap().unwrap();
        assert_eq!(b.rewrites.len(), 1, "vdb stays as it is");
    }

    #[test]
    fn broken_chains_are_told_and_others_names_are_not_believed() {
        let mut points = chained(&["a", "b", "c"]);
        points.remove(0);
        let error = merge(&points, &points[1]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "c: vda: it lies over a, which is not here: bring it back, or make a full backup"
        );
        assert!(rebase(&points, &points[0]).is_err());
        let mut points = chained(&["a", "b"]);
        points[1].parent = Some(Parent { name: "a".to_owned(), uid: "another".to_owned() });
        assert!(children(&points, &points[0]).is_empty(), "it lies over another backup of that name");
        let mut points = chained(&["a", "b"]);
        points[1].disks[0].format = DiskFormat::Raw;
        assert!(matches!(merge(&points, &points[1]), Err(ReshapeError::Raw { .. })));
    }

    proptest! {
        /// Trees of restore points: whatever is merged or removed, every other has a whole chain, which ends the same way.
        #[test]
        fn what_stays_is_whole(parents in prop::collection::vec(any::<prop::sample::Index>(), 1..8),
                which in any::<prop::sample::Index>(), merged in any::<bool>()) {
            let names: Vec<String> = (0..=parents.len()).map(|at| format!("p{at}")).collect();
            let mut points = vec![example(&names[0], None)];
            for (at, parent) in parents.iter().enumerate() {
                let below = parent.index(at + 1);
                let mut point = example(&names[at + 1], Some(&names[below]));
                point.disks[0].base.as_mut().unwrap().file.clone_from(&points[below].disks[0].file);
                points.push(point);
            }
            let chosen = points[which.index(points.len())].clone();
            let reshaped: Vec<_> = match merged {
                true => merge(&points, &chosen).unwrap().into_iter().collect(),
                false => rebase(&points, &chosen).unwrap(),
            };
            let mut after = points.clone();
            for Reshaped { manifest, rewrites } in reshaped {
                prop_assert_eq!(rewrites.len(), 1);
                // each single exchange leaves all whole
                let at = after.iter().position(|point| point.name == manifest.name).unwrap();
                after[at] = manifest;
                for point in &after {
                    prop_assert!(chain::gaps(&after, point).is_empty());
                }
            }
            if !merged {
                prop_assert!(children(&after, &chosen).is_empty());
                after.retain(|point| point.name != chosen.name);
            }
            for point in &after {
                prop_assert!(chain::gaps(&after, point).is_empty());
                let before = points.iter().find(|before| before.name == point.name).unwrap();
                prop_assert_eq!(&before.disks[0].file, &point.disks[0].file);
                prop_assert!(chain::depth(&after, point) <= chain::depth(&points, before));
            }
        }
    }
}
