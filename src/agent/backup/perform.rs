//! One action on the host between two notes in the state directory: what it may leave, and what it came to. It does not
//! decide which action.

use std::time::Duration;

use super::life::Action;
use crate::agent::state::Record;
use crate::agent::{AgentError, Context};
use crate::api;
use crate::clock;
use crate::killpoint;
use crate::step::Step;

/// How often one that is held asks whether it may go on.
const SOON: Duration = Duration::from_millis(20);

/// A step was taken: where a test may kill the process, or hold this one backup.
pub(super) async fn reached(step: Step, name: &str) {
    killpoint::reached(step);
    while killpoint::holds(step, name) {
        tokio::time::sleep(SOON).await;
    }
}

/// Notes the intent, acts, notes the outcome.
///
/// # Errors
/// When the record cannot be kept, or the call did not come to its end.
pub(super) async fn perform(
    action: Action,
    record: &mut Record,
    context: &Context,
) -> Result<(), AgentError> {
    let with_checkpoint = record.bitmap.is_some();
    record.life.starting(action, with_checkpoint, clock::now());
    context.health.note_freeze(record);
    match context.host.state.store(record) {
        // a thaw leaves nothing behind that a successor must know of
        Err(error) if action == Action::Thaw => {
            tracing::warn!(backup = %record.uid, %error, "thawing all the same");
        }
        other => other?,
    }
    if let Some(step) = before(action) {
        reached(step, &record.name).await;
    }
    if action == Action::AbortJob {
        context.end_tickets(&record.uid).await;
    }
    // who looks at the bitmaps finishes first; nobody begins to while this backup has its claim
    let turn = if action == Action::Redefine { context.survey.turn(&record.vm_uuid).await } else { None };
    let required = record.quiesce == api::QuiesceMode::Required;
    let (host, mut moved) = (context.host.clone(), record.clone());
    let work = context.blocking(move || {
        let _turn = turn;
        Ok((host.perform(action, &mut moved), moved))
    });
    tokio::pin!(work);
    let bound = Duration::from_secs(u64::try_from(record.quiesce_seconds).unwrap_or_default());
    let frozen = action == Action::Begin && record.life.held.frozen;
    let (early, (report, moved)) = tokio::select! {
        done = &mut work => (false, done?),
        () = tokio::time::sleep(bound), if frozen => {
            let (host, mut asked) = (context.host.clone(), record.clone());
            let thawed = context.blocking(move || Ok(host.perform(Action::Thaw, &mut asked))).await?;
            tracing::warn!(backup = %record.uid, vm = %record.vm, ?thawed, "libvirt takes long to begin");
            (true, work.await?)
        }
    };
    *record = moved;
    let report = report?;
    reached(after(action), &record.name).await;
    tracing::info!(backup = %record.uid, vm = %record.vm, ?action, ?report, "host action");
    if early {
        record.life.thawed_early(record.quiesce_seconds, required);
    }
    record.life.done(action, report, required, clock::now());
    context.health.note_freeze(record);
    context.host.state.store(record).map_err(AgentError::State)?;
    Ok(())
}

/// The step that noting the intent of `action` is.
fn before(action: Action) -> Option<Step> {
    match action {
        Action::MakeFiles => Some(Step::RecordStored),
        Action::Begin => Some(Step::BeginIntended),
        _ => None,
    }
}

/// The step that having done `action` is.
fn after(action: Action) -> Step {
    match action {
        Action::MakeFiles => Step::ScratchMade,
        Action::Redefine => Step::BaseRedefined,
        Action::Freeze => Step::Frozen,
        Action::Begin => Step::BeginAnswered,
        Action::Thaw => Step::Thawed,
        Action::AbortJob => Step::JobAborted,
        Action::DeleteCheckpoint => Step::CheckpointRemoved,
        Action::ForgetCheckpoint => Step::CheckpointForgotten,
        Action::ForgetBase => Step::BaseForgotten,
        Action::RemoveFiles => Step::FilesRemoved,
    }
}
