//! The one place that reads the time. Everything else takes `now` as an argument.

use k8s_openapi::jiff::Timestamp;

/// The time now.
pub fn now() -> Timestamp {
    Timestamp::now()
}
