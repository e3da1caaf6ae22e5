//! Waiting for a condition, never for a time.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const OFTEN: Duration = Duration::from_millis(25);
const SELDOM: Duration = Duration::from_millis(250);

/// Asks until there is an answer: often at first, then less the longer it takes, as most of what tests cost is what they ask
/// with. An answer is late by a sixteenth of what it took, or 25 ms.
///
/// # Errors
/// The first error of `ask`, or that `what` did not come within `bound`.
pub fn wait_until<T>(bound: Duration, what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        let waited = began.elapsed();
        if waited > bound {
            bail!("waited {} s in vain for {what}", bound.as_secs());
        }
        sleep((waited / 16).clamp(OFTEN, SELDOM));
    }
}
