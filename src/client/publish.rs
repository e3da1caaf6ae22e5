//! The end of what is written: a restore point, when all of its VmBackup is there, or nothing. It never removes what the server may
//! count on, and publishes no part of a backup.

use std::path::PathBuf;

use kube::ResourceExt as _;
use tokio_util::sync::CancellationToken;

use super::backup::{END, Session};
use super::exit::Failure;
use super::folder::{self, Partial};
use super::record;
use super::resume::{self, Next};
use super::state::{Incomplete, State};
use super::words;
use crate::api::{DesiredState, VmBackup};

impl Session {
    /// Makes a restore point of what was read, when that is all of its VmBackup.
    ///
    /// # Errors
    /// What is not there, and the kernel's. What was read stays, for a successor.
    pub async fn publish(&self, partial: Partial, stop: &CancellationToken) -> Result<PathBuf, Failure> {
        whole(&partial.state)?;
        let name = partial.state.point.clone();
        self.seal(partial, stop).await.inspect_err(|_| {
            self.screen
                .warn(format!("all of {name} was read, and is kept: the same command goes on with it"));
        })
    }

    async fn seal(&self, partial: Partial, stop: &CancellationToken) -> Result<PathBuf, Failure> {
        let backup = whole(&partial.state)?;
        let mut disks = Vec::new();
        for (name, state) in &partial.state.disks {
            let (path, stop) = (partial.file(&state.file), stop.clone());
            self.screen.say(format!("Computing the digest of {}", state.file));
            let digest = tokio::task::spawn_blocking(move || folder::digest(&path, &stop)).await;
            let (bytes, blake3) = digest.map_err(|error| Failure::Program(error.to_string()))??;
            disks.push(record::described(name, state, &partial.state, bytes, blake3));
        }
        let manifest = record::manifest(&partial.state, backup, disks);
        let name = manifest.name.clone();
        let bytes = manifest.disks.iter().map(|disk| disk.bytes).sum();
        let whole = partial.publish(&manifest)?;
        self.screen.say(format!("{name} is whole: {} in {}", words::bytes(bytes), whole.display()));
        Ok(whole)
    }

    /// Cancels the VmBackup of what is being written, removes that, and answers why. Where it comes too late for that, and all was
    /// read, it becomes a restore point: the server counts on it.
    pub(super) async fn give_up(
        &self,
        mut partial: Partial,
        backup: &VmBackup,
        failure: Failure,
    ) -> Result<PathBuf, Failure> {
        let name = backup.name_any();
        let ended = match self.cancel(backup).await {
            Ok(ended) => ended,
            Err(error) => {
                self.screen.warn(format!(
                    "{name} was not cancelled: {error}; the same command goes on with it, and virtmark backup stop \
                     --cancel {} {name} gives it up",
                    partial.state.vm
                ));
                return Err(failure);
            }
        };
        if resume::next(&partial.state, ended.as_ref()) != Next::Publish {
            return self.remove(partial, failure);
        }
        let how = if ended.is_some() { "has Succeeded" } else { "is gone" };
        self.screen.warn(format!("{failure}; but {name} {how}, and all of it was read: it is kept"));
        partial.saw(ended.as_ref())?;
        // one that the user does not wait for is kept as it is, for a successor
        self.publish(partial, &CancellationToken::new()).await
    }

    /// Cancels a backup that has not ended; answers how it ended, `None` when it is gone.
    pub(super) async fn cancel(&self, backup: &VmBackup) -> Result<Option<VmBackup>, Failure> {
        let found = self.cluster.now(backup).await?;
        if found.as_ref().is_none_or(|found| found.phase().is_terminal()) {
            return Ok(found);
        }
        self.screen.say(format!("Cancelling {}", backup.name_any()));
        self.cluster.want(backup, DesiredState::Cancelled).await?;
        self.cluster.ended(backup, END).await
    }

    /// Removes what is no backup, and answers why.
    pub(super) fn remove(&self, partial: Partial, failure: Failure) -> Result<PathBuf, Failure> {
        if let Err(error) = partial.remove() {
            self.screen.warn(format!("what was read is not removed: {error}"));
        }
        Err(failure)
    }
}

/// The VmBackup, when all of it was read.
///
/// # Errors
/// What was not.
pub(super) fn whole(state: &State) -> Result<&VmBackup, Failure> {
    let incomplete = |why: Incomplete| Failure::Incomplete { backup: state.point.clone(), why };
    state.whole().map_err(incomplete)
}
