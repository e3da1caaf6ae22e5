//! How much room scratch images have, how much a backup is expected to need, and whose backup ends when there is none
//! left. Pure: figures in, decisions out; `agent::scratch` measures and acts.
//!
//! QEMU copies what the guest overwrites into the scratch image first. When that copy fails the guest's own write
//! fails: so a backup ends while there is still room (law 3).

use crate::reason::{Because, Reason};

/// Of a small file system this much is kept free, and never more than half.
const KEPT_LEAST: u64 = 64 << 20;
/// Of a large file system this much is kept free.
const KEPT_MOST: u64 = 1 << 30;
/// A backup is expected to need one part in so many of its disks.
const NEED_DIVISOR: u64 = 20;

/// What was measured of the directory of scratch images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that its file system has.
    pub total: u64,
    /// Bytes that its file system has free.
    pub free: u64,
    /// Bytes that the scratch images of each backup take, by its uid.
    pub used: Vec<(String, u64)>,
}

impl Usage {
    /// Bytes that scratch images may take yet: what the file system has free but for a reserve, and what the admin's
    /// `limit` leaves.
    pub fn room(&self, limit: Option<u64>) -> u64 {
        let kept = (self.total / 20).clamp(KEPT_LEAST, KEPT_MOST).min(self.total / 2);
        let used: u64 = self.used.iter().map(|(_, bytes)| bytes).sum();
        let limited = limit.map_or(u64::MAX, |limit| limit.saturating_sub(used));
        self.free.saturating_sub(kept).min(limited)
    }

    /// The backup that must end now: the one with the largest scratch images, when there is no room left.
    pub fn exhausted(&self, limit: Option<u64>) -> Option<(&str, Because)> {
        if self.room(limit) > 0 {
            return None;
        }
        let (uid, bytes) = self.used.iter().filter(|(_, bytes)| *bytes > 0).max_by_key(|(_, bytes)| bytes)?;
        let message = format!(
            "its scratch images take {bytes} bytes, and no more room is left: it was ended before the guest noticed"
        );
        Some((uid, Because::new(Reason::ScratchExhausted, message)))
    }
}

/// Bytes of scratch space that a backup of disks of these sizes is expected to need, at least.
pub fn need(sizes: impl IntoIterator<Item = u64>) -> u64 {
    sizes.into_iter().fold(0_u64, |sum, size| sum.saturating_add(size / NEED_DIVISOR))
}

/// Why a backup that needs `need` bytes cannot start with `room`.
pub fn too_low(need: u64, room: u64) -> Option<Because> {
    (room == 0 || need > room).then(|| {
        let message =
            format!("scratch images have room for {room} bytes, and {need} are expected to be needed");
        Because::new(Reason::ScratchSpaceLow, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn usage(total: u64, free: u64, used: &[(&str, u64)]) -> Usage {
        let used = used.iter().map(|(uid, bytes)| ((*uid).to_owned(), bytes * MIB)).collect();
        Usage { total: total * MIB, free: free * MIB, used }
    }

    #[test]
    fn room_is_what_both_the_file_system_and_the_admin_leave() {
        let gib = 1024;
        let cases = [
            ("a large disk keeps a GiB", usage(1000 * gib, 10 * gib, &[]), None, 9 * gib),
            ("one of 10 GiB keeps a twentieth", usage(10 * gib, 10 * gib, &[]), None, 10 * gib - 512),
            ("a small one 64 MiB", usage(256, 100, &[]), None, 36),
            ("a tiny one half", usage(64, 40, &[]), None, 8),
            ("a limit", usage(1000 * gib, 500 * gib, &[("a", 10), ("b", 20)]), Some(64), 34),
            ("a limit that is passed", usage(1000 * gib, 500 * gib, &[("a", 70)]), Some(64), 0),
            ("a limit beyond the disk", usage(256, 100, &[]), Some(1000), 36),
        ];
        for (what, usage, limit, expected) in cases {
            assert_eq!(usage.room(limit.map(|limit: u64| limit * MIB)), expected * MIB, "{what}");
        }
    }

    #[test]
    fn the_largest_ends_and_only_when_there_is_no_room() {
        let full = usage(256, 64, &[("a", 10), ("b", 90), ("c", 0)]);
        assert_eq!(
            full.exhausted(None).map(|(uid, why)| (uid, why.reason)),
            Some(("b", Reason::ScratchExhausted))
        );
        assert_eq!(usage(256, 65, &[("a", 10)]).exhausted(None), None);
        assert_eq!(usage(256, 0, &[("a", 0)]).exhausted(None), None, "ending it would free nothing");
    }

    #[test]
    fn starts_only_with_a_twentieth_of_the_disks() {
        assert_eq!(need([20 * MIB, 40 * MIB]), 3 * MIB);
        assert_eq!(need([u64::MAX; 30]), u64::MAX);
        assert_eq!(too_low(3 * MIB, 3 * MIB), None);
        assert!(too_low(3 * MIB, 3 * MIB - 1).is_some());
        assert!(too_low(0, 0).is_some(), "the smallest disk needs some");
    }
}
