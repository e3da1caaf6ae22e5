//! Names of restore points, backups and files. It never looks whether one is there.

use k8s_openapi::jiff::Timestamp;

use super::manifest::{DiskFormat, ReadMode};

/// The manifest in each restore point.
pub const MANIFEST: &str = "manifest.json";

/// What a restore point that is being written keeps of itself.
pub const STATE: &str = "state.json";

/// What the folder of a restore point that is being written begins and ends with. It is hidden: a crash leaves nothing that
/// looks complete.
const PARTIAL: (&str, &str) = (".", ".partial");

/// What the folder beside a restore point begins with, in which `chain` changes it.
const HIDDEN: &str = ".";

/// Longest name of a VmBackup (its transfers are named after it).
const LONGEST: usize = 180;

/// The name of a restore point, and of its VmBackup, that begins `now`. `taken` tells whether there is one of that name.
#[must_use]
pub fn point(vm: &str, now: Timestamp, taken: impl Fn(&str) -> bool) -> String {
    let time = now.strftime("%Y%m%d-%H%M%S").to_string();
    let vm = vm.get(..LONGEST - time.len() - 8).unwrap_or(vm).trim_end_matches(['-', '.']);
    let first = format!("{vm}-{time}");
    let others = (2..).map(|count: u32| format!("{first}-{count}"));
    std::iter::once(first.clone()).chain(others).find(|name| !taken(name)).unwrap_or(first)
}

/// The folder of a restore point while it is being written.
#[must_use]
pub fn partial(point: &str) -> String {
    format!("{}{point}{}", PARTIAL.0, PARTIAL.1)
}

/// The restore point that a folder of this name is to become.
#[must_use]
pub fn of_partial(folder: &str) -> Option<&str> {
    folder.strip_prefix(PARTIAL.0)?.strip_suffix(PARTIAL.1).filter(|point| !point.is_empty())
}

/// A folder beside a restore point while `chain` changes or removes it. Hidden too; what is left of one is no restore point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Aside {
    /// The restore point as it is to be; once they changed places, as it was.
    New,
    /// As it was, where two folders cannot change places in one step.
    Old,
    /// The restore point that is being removed.
    Gone,
}

impl Aside {
    const ALL: [Self; 3] = [Self::New, Self::Old, Self::Gone];

    const fn ending(self) -> &'static str {
        match self {
            Self::New => ".chain-new",
            Self::Old => ".chain-old",
            Self::Gone => ".chain-gone",
        }
    }
}

/// The folder beside a restore point.
#[must_use]
pub fn aside(point: &str, aside: Aside) -> String {
    format!("{HIDDEN}{point}{}", aside.ending())
}

/// The restore point that a folder of this name is beside of.
#[must_use]
pub fn of_aside(folder: &str) -> Option<(&str, Aside)> {
    let hidden = folder.strip_prefix(HIDDEN)?;
    let found = Aside::ALL.into_iter().find_map(|aside| Some((hidden.strip_suffix(aside.ending())?, aside)));
    found.filter(|(point, _)| is_plain(point))
}

/// The file of a disk in its restore point.
#[must_use]
pub fn file(disk: &str, mode: ReadMode, format: DiskFormat) -> String {
    format!("{disk}.{}.{}", mode.short(), format.as_str())
}

/// The file of a disk as the file that lies over it names it: relative, so that the whole tree can be moved.
#[must_use]
pub fn backing(point: &str, file: &str) -> String {
    format!("../{point}/{file}")
}

/// Whether a name from a manifest is one folder or file and leads nowhere else.
#[must_use]
pub fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0', ':'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        "2026-11-30T22:15:09.5Z".parse().unwrap()
    }

    #[test]
    fn points_are_named_by_vm_and_time_and_never_twice() {
        assert_eq!(point("db01", now(), |_| false), "db01-20261130-221509");
        assert_eq!(point("db01", now(), |name| name.ends_with("09")), "db01-20261130-221509-2");
        let taken = ["db01-20261130-221509", "db01-20261130-221509-2"];
        assert_eq!(point("db01", now(), |name| taken.contains(&name)), "db01-20261130-221509-3");
        let long = point(&"x".repeat(253), now(), |_| false);
        assert!(long.len() <= LONGEST && long.ends_with("x-20261130-221509"), "{long}");
    }

    #[test]
    fn a_partial_folder_is_hidden_and_found_again() {
        assert_eq!(partial("db01-1"), ".db01-1.partial");
        for (folder, point) in [(".db01-1.partial", Some("db01-1")), ("db01-1", None), (".partial", None)] {
            assert_eq!(of_partial(folder), point, "{folder}");
        }
    }

    #[test]
    fn a_folder_beside_is_hidden_and_found_again() {
        for kind in Aside::ALL {
            let folder = aside("db01-1", kind);
            assert_eq!(of_aside(&folder), Some(("db01-1", kind)));
            assert!(!is_plain(&folder) && of_partial(&folder).is_none());
        }
        for other in ["db01-1", ".db01-1.partial", ".chain-new", "...chain-new", "x.chain-old"] {
            assert_eq!(of_aside(other), None, "{other}");
        }
    }

    #[test]
    fn names_out_of_manifests_lead_nowhere_else() {
        for bad in ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "nbd:x", "a\0"] {
            assert!(!is_plain(bad), "{bad:?}");
        }
        assert!(is_plain("vda.full.qcow2"));
    }
}
