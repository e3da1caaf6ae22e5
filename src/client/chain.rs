//! What restore points lie over, and which one the next backup can lie over: functions of their manifests. It never looks at
//! a file; `verify` does.

use super::manifest::{Base, Checkpoint, Disk, Manifest, Parent};
use super::state::State;

/// Why a disk of a restore point cannot be restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Gap {
    /// The restore point below is gone, or is unreadable.
    #[error("it lies over {parent}, which is not here: bring it back, or make a full backup")]
    NoParent {
        /// The name of the one that is missing.
        parent: String,
    },
    /// There is one of that name, of another backup.
    #[error("it lies over {parent}, and the one here is another backup: bring the right one back")]
    OtherParent {
        /// The name.
        parent: String,
    },
    /// The one below lacks the disk's file.
    #[error("it lies over {file} of {parent}, which has no such file")]
    NoFile {
        /// The name of the one below.
        parent: String,
        /// The file.
        file: String,
    },
    /// A chain that leads to itself.
    #[error("its chain leads to itself at {point}")]
    Circle {
        /// Where.
        point: String,
    },
}

/// Sorts restore points from the oldest to the newest.
pub fn sort(points: &mut [Manifest]) {
    points.sort_by(|a, b| (&a.taken_at, &a.name).cmp(&(&b.taken_at, &b.name)));
}

/// The files of a disk at a restore point, from its own down to a full one.
///
/// # Errors
/// Where the chain is broken.
pub fn layers<'a>(
    points: &'a [Manifest],
    point: &'a Manifest,
    disk: &'a Disk,
) -> Result<Vec<(&'a Manifest, &'a Disk)>, Gap> {
    let mut layers = vec![(point, disk)];
    let (mut at, mut held) = (point, disk);
    while let Some(base) = &held.base {
        let parent = at.parent.as_ref().ok_or_else(|| Gap::NoParent { parent: "nothing".to_owned() })?;
        let below;
        (below, held) = self::below(points, parent, base)?;
        if layers.iter().any(|(seen, _)| seen.name == below.name) {
            return Err(Gap::Circle { point: below.name.clone() });
        }
        layers.push((below, held));
        at = below;
    }
    Ok(layers)
}

/// The file that one lies over, in the restore point below.
fn below<'a>(points: &'a [Manifest], parent: &Parent, base: &Base) -> Result<(&'a Manifest, &'a Disk), Gap> {
    let named = points.iter().find(|other| other.name == parent.name);
    let below = named.ok_or_else(|| Gap::NoParent { parent: parent.name.clone() })?;
    if below.backup.uid != parent.uid {
        return Err(Gap::OtherParent { parent: parent.name.clone() });
    }
    let held = below.disks.iter().find(|disk| disk.file == base.file);
    let missing = || Gap::NoFile { parent: below.name.clone(), file: base.file.clone() };
    Ok((below, held.ok_or_else(missing)?))
}

/// What is broken in a restore point, by disk.
#[must_use]
pub fn gaps(points: &[Manifest], point: &Manifest) -> Vec<(String, Gap)> {
    let gap = |disk: &Disk| layers(points, point, disk).err().map(|gap| (disk.target.clone(), gap));
    point.disks.iter().filter_map(gap).collect()
}

/// Whether what is being written has all that it lies over.
///
/// # Errors
/// Where its chain is broken.
pub fn over(points: &[Manifest], state: &State) -> Result<(), Gap> {
    for base in state.disks.values().filter_map(|disk| disk.base.as_ref()) {
        let parent = state.parent.as_ref().map(|(parent, _)| parent);
        let parent = parent.ok_or_else(|| Gap::NoParent { parent: "nothing".to_owned() })?;
        let (below, held) = below(points, parent, base)?;
        layers(points, below, held)?;
    }
    Ok(())
}

/// The restore points that a backup of a VM can lie over, newest first: those that made a checkpoint and are whole.
#[must_use]
pub fn bases<'a>(points: &'a [Manifest], vm_uuid: &str) -> Vec<(&'a Manifest, &'a Checkpoint)> {
    let mut found: Vec<_> = points
        .iter()
        .filter(|point| point.vm.uuid == vm_uuid && gaps(points, point).is_empty())
        .filter_map(|point| Some((point, point.checkpoint.as_ref()?)))
        .collect();
    found.sort_by(|(a, _), (b, _)| (&b.taken_at, &b.name).cmp(&(&a.taken_at, &a.name)));
    found
}

/// How many restore points must be kept for this one, itself with them.
#[must_use]
pub fn depth(points: &[Manifest], point: &Manifest) -> usize {
    let depths = point.disks.iter().map(|disk| layers(points, point, disk).map_or(1, |layers| layers.len()));
    depths.max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::example;
    use super::*;

    /// A full one and two incrementals over it.
    fn three() -> Vec<Manifest> {
        let mut points = vec![example("a", None), example("b", Some("a")), example("c", Some("b"))];
        points[2].disks[0].base.as_mut().unwrap().file = "vda.incr.qcow2".to_owned();
        for (count, point) in points.iter_mut().enumerate() {
            point.taken_at = format!("2026-11-30T00:00:0{count}Z");
        }
        points
    }

    fn names(layers: &[(&Manifest, &Disk)]) -> Vec<String> {
        layers.iter().map(|(point, disk)| format!("{}/{}", point.name, disk.file)).collect()
    }

    #[test]
    fn a_whole_chain() {
        let points = three();
        let layers = layers(&points, &points[2], &points[2].disks[0]).unwrap();
        assert_eq!(names(&layers), ["c/vda.incr.qcow2", "b/vda.incr.qcow2", "a/vda.full.qcow2"]);
        assert_eq!([0, 1, 2].map(|at| depth(&points, &points[at])), [1, 2, 3]);
        let bases: Vec<_> = bases(&points, "u-1").iter().map(|(point, _)| point.name.as_str()).collect();
        assert_eq!(bases, ["c", "b", "a"]);
        assert!(super::bases(&points, "u-2").is_empty(), "another VM's");
    }

    #[test]
    fn a_missing_middle_breaks_what_lies_over_it_and_no_more() {
        let mut points = three();
        points.remove(1);
        assert!(gaps(&points, &points[0]).is_empty());
        let parent = "b".to_owned();
        assert_eq!(gaps(&points, &points[1]), [("vda".to_owned(), Gap::NoParent { parent })]);
        let bases: Vec<_> = bases(&points, "u-1").iter().map(|(point, _)| point.name.as_str()).collect();
        assert_eq!(bases, ["a"]);
    }

    #[test]
    fn another_backup_of_the_same_name_a_file_that_is_not_there_a_circle() {
        let mut points = three();
        points[1].backup.uid = "another".to_owned();
        assert!(matches!(gaps(&points, &points[2])[0].1, Gap::OtherParent { .. }));
        let mut points = three();
        points[1].disks[0].file = "vdb.incr.qcow2".to_owned();
        assert!(matches!(gaps(&points, &points[2])[0].1, Gap::NoFile { .. }));
        let mut points = three();
        points[1].parent.as_mut().unwrap().name = "c".to_owned();
        points[1].parent.as_mut().unwrap().uid = "uid-c".to_owned();
        points[1].disks[0].base.as_mut().unwrap().file = "vda.incr.qcow2".to_owned();
        assert!(matches!(gaps(&points, &points[2])[0].1, Gap::Circle { .. }));
    }

    #[test]
    fn points_without_a_checkpoint_are_no_base() {
        let mut points = three();
        points[2].checkpoint = None;
        assert_eq!(bases(&points, "u-1")[0].0.name, "b");
        points.reverse();
        sort(&mut points);
        assert_eq!(points[0].name, "a");
    }
}
