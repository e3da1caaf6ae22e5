//! Numbers and progress in words: pure. It never writes to a terminal.

use std::time::Duration;

/// Bytes for people: `2.5 MiB`.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    // tenths, so that no float is needed
    let mut tenths = u128::from(count) * 10 / 1024;
    let mut unit = 0;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// Bytes of all in per cent, never 100 before all is done.
#[must_use]
pub fn percent(done: u64, all: u64) -> u64 {
    if done >= all {
        return 100;
    }
    u64::try_from(u128::from(done) * 100 / u128::from(all)).unwrap_or(99)
}

/// Bytes a second; nothing before some time has passed.
#[must_use]
pub fn rate(done: u64, time: Duration) -> Option<u64> {
    let milliseconds = time.as_millis();
    (milliseconds >= 200).then(|| u64::try_from(u128::from(done) * 1000 / milliseconds).unwrap_or(u64::MAX))
}

/// A line with the seconds since the command began, as oVirt's examples write them.
#[must_use]
pub fn line(since: Duration, words: &str) -> String {
    format!("[ {:>7.1} ] {words}", since.as_secs_f64())
}

/// How far a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Far {
    /// Bytes that are done.
    pub done: u64,
    /// Bytes in all.
    pub all: u64,
    /// Of those that are done, what this process did.
    pub moved: u64,
    /// In this time.
    pub time: Duration,
}

impl Far {
    /// For a log: `vda: 40%, 1.2 GiB of 3.0 GiB, 310.0 MiB/s`.
    #[must_use]
    pub fn told(&self, disk: &str) -> String {
        let rate = rate(self.moved, self.time).map(|rate| format!(", {}/s", bytes(rate))).unwrap_or_default();
        format!(
            "{disk}: {}%, {} of {}{rate}",
            percent(self.done, self.all),
            bytes(self.done),
            bytes(self.all)
        )
    }

    /// For a terminal of so many columns.
    #[must_use]
    pub fn bar(&self, disk: &str, columns: usize) -> String {
        const MARKS: usize = 24;
        let left = rate(self.moved, self.time).filter(|rate| *rate > 0).map(|rate| {
            let seconds = self.all.saturating_sub(self.done) / rate;
            format!(", {}:{:02} left", seconds / 60, seconds % 60)
        });
        let full = usize::try_from(percent(self.done, self.all)).unwrap_or(0) * MARKS / 100;
        let bar = format!("{}{}", "=".repeat(full), " ".repeat(MARKS - full));
        let text =
            format!("{disk} [{bar}] {}{}", self.told("").trim_start_matches(": "), left.unwrap_or_default());
        text.chars().take(columns.max(20)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_for_people() {
        for (count, words) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1023.9 KiB"),
            (5 << 29, "2.5 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(bytes(count), words);
        }
    }

    #[test]
    fn per_cent_ends_with_the_work() {
        for (done, all, is) in
            [(0, 0, 100), (0, 10, 0), (999, 1000, 99), (10, 10, 100), (u64::MAX - 1, u64::MAX, 99)]
        {
            assert_eq!(percent(done, all), is, "{done} of {all}");
        }
    }

    #[test]
    fn lines_and_bars() {
        assert_eq!(line(Duration::from_millis(1250), "done"), "[     1.2 ] done");
        let far = Far { done: 3 << 20, all: 6 << 20, moved: 2 << 20, time: Duration::from_secs(1) };
        assert_eq!(far.told("vda"), "vda: 50%, 3.0 MiB of 6.0 MiB, 2.0 MiB/s");
        assert_eq!(
            far.bar("vda", 200),
            "vda [============            ] 50%, 3.0 MiB of 6.0 MiB, 2.0 MiB/s, 0:01 left"
        );
        assert_eq!(far.bar("vda", 30).chars().count(), 30);
        let soon = Far { time: Duration::ZERO, ..far };
        assert_eq!(soon.told("vda"), "vda: 50%, 3.0 MiB of 6.0 MiB");
    }
}
