//! Waiting for a condition, never for a time.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Asks until there is an answer.
///
/// # Errors
/// The first error of `ask`, or that `what` did not come within `bound`.
pub fn wait_until<T>(bound: Duration, what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let until = Instant::now() + bound;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() > until {
            bail!("waited {} s in vain for {what}", bound.as_secs());
        }
        sleep(Duration::from_millis(25));
    }
}
