//! The one place that reads the time. Everything else takes `now` as an argument.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

/// The time now.
pub fn now() -> Timestamp {
    Timestamp::now()
}

/// How long it is from `now` to `due`: 10 ms when that is past, so that nobody spins.
pub fn until(due: Timestamp, now: Timestamp) -> Duration {
    let milliseconds = due.as_millisecond().saturating_sub(now.as_millisecond()).max(10);
    Duration::from_millis(u64::try_from(milliseconds).unwrap_or(10))
}
