//! Watches the room that scratch images have, while backups run, and names the one that must end.
//!
//! It measures the file system and the images; what that means is decided in `backup::scratch`.

use std::time::Duration;

use super::{AgentError, Context};
use crate::agent::backup::act::HostError;

/// How often the room is measured while a backup runs: a guest that writes 1 GiB a second uses up a quarter of a large file
/// system's reserve between two looks.
const PACE: Duration = Duration::from_millis(250);

/// Watches, for ever.
pub async fn watch(context: &Context) {
    loop {
        tokio::time::sleep(PACE).await;
        if context.registry.all().is_empty() {
            continue;
        }
        if let Err(error) = look(context).await {
            tracing::warn!(%error, "the room for scratch images is not known");
        }
    }
}

async fn look(context: &Context) -> Result<(), AgentError> {
    let host = context.host.clone();
    let usage = context.blocking(move || Ok::<_, HostError>(host.state.scratch_usage()?)).await?;
    if let Some((uid, because)) = usage.exhausted(context.host.scratch_limit)
        && let Some(live) = context.registry.find(uid)
    {
        live.exhaust(because);
        context.registry.wake(uid);
    }
    Ok(())
}
