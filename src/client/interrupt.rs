//! Ctrl-C and SIGTERM: the first asks for a clean end, the second is one. It cancels nothing itself.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::exit::{Code, Failure};

/// A token that the first signal cancels. The second ends the process at once, with nothing cleaned.
///
/// # Errors
/// When signals cannot be listened for.
pub fn listen() -> Result<CancellationToken, Failure> {
    let failed = |error: std::io::Error| Failure::Program(format!("cannot listen for signals: {error}"));
    let stop = CancellationToken::new();
    let told = stop.clone();
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    tokio::spawn(async move {
        for count in 0.. {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            if count > 0 {
                std::process::exit(i32::from(Code::Interrupted.number()));
            }
            told.cancel();
        }
    });
    Ok(stop)
}
