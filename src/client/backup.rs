//! A backup from its object to a restore point: make, wait, read, finalize, publish. Whatever happens in between, the VmBackup
//! is finalized or cancelled; only a process that is killed leaves one, and its successor goes on with it.
//!
//! ```text
//! base -> partial folder -> VmBackup -> Ready -> each disk -> Finalized -> Succeeded -> digests -> restore point
//!            \------------ a successor begins here, with what is there --------------/
//! ```
//!
//! It never decides what is read of a disk: the VmBackup's status and [`super::plan`] do.

use std::path::PathBuf;
use std::time::Duration;

use kube::ResourceExt as _;
use tokio_util::sync::CancellationToken;

use super::chain;
use super::download::{self, How};
use super::exit::Failure;
use super::folder::{self, Kind, Partial, State};
use super::kubernetes::{Cluster, RUN, refused, unless};
use super::manifest::{self, DiskFormat, Outcome, Parent, ReadMode};
use super::names;
use super::record;
use super::screen::Screen;
use super::store::Store;
use super::words;
use crate::api::{
    BackupDisk, DesiredState, DiskMode, LABEL_OWNER, LibvirtDomain, Phase, QuiesceMode, VmBackup,
    VmBackupStatus, VmCheckpoint,
};

/// Time for a backup to end, from when it is asked to.
pub const END: Duration = Duration::from_secs(300);
/// Time for a transfer of a Ready backup.
const TICKET: Duration = Duration::from_secs(120);
/// What is wanted of a backup.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The LibvirtDomain.
    pub vm: String,
    /// Where restore points are.
    pub to: PathBuf,
    /// How much is read.
    pub kind: Kind,
    /// The format of the files.
    pub format: DiskFormat,
    /// The disks; all when empty.
    pub disks: Vec<String>,
    /// Whose chain it is.
    pub owner: Option<String>,
    /// How many checkpoints are kept.
    pub max_checkpoints: Option<i32>,
    /// Whether the guest is frozen.
    pub quiesce: Option<QuiesceMode>,
    /// Seconds to wait for it to begin.
    pub start_seconds: i32,
    /// How disks are read.
    pub how: How,
}

/// What every command has.
pub struct Session {
    /// The API server.
    pub cluster: Cluster,
    /// What the user sees.
    pub screen: Screen,
    /// Ctrl-C.
    pub stop: CancellationToken,
}

/// Where an incremental backup begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// The restore point that it lies over.
    pub parent: Parent,
    /// That one's checkpoint.
    pub checkpoint: String,
    /// Bytes that changed since, by disk, as last counted.
    pub dirty: Vec<(String, i64)>,
}

impl Session {
    /// Makes a restore point of a VM; answers where it is.
    ///
    /// # Errors
    /// Why there is none. Then the VmBackup was cancelled.
    pub async fn backup(&self, wanted: &Wanted) -> Result<PathBuf, Failure> {
        if wanted.kind == Kind::Incremental && wanted.format == DiskFormat::Raw {
            let words =
                "an incremental backup lies over another: it is qcow2, and --format raw is for full ones";
            return Err(Failure::Usage(words.to_owned()));
        }
        std::fs::create_dir_all(&wanted.to).map_err(Failure::file(&wanted.to))?;
        let root = wanted.to.canonicalize().map_err(Failure::file(&wanted.to))?;
        let store = Store::read(&root)?;
        for point in &store.unfinished {
            if let Some(partial) = self.left(&store, point, wanted).await? {
                return self.finish(partial, wanted).await;
            }
        }
        let domain = self.cluster.domain(&wanted.vm).await?;
        let start = self.start(&store, wanted, &domain).await?;
        let name = names::point(&wanted.vm, crate::clock::now(), |name| store.has(name));
        let mut state = State::new(&name, &wanted.vm, &self.cluster.namespace, wanted.kind, wanted.format);
        state.run = Some(format!("{:016x}", rand::random::<u64>()));
        state.domain = serde_json::to_value(&domain.status).unwrap_or_default();
        state.parent = start.as_ref().map(|start| (start.parent.clone(), start.checkpoint.clone()));
        let partial = Partial::create(&root, state)?;
        match &start {
            Some(start) => self.screen.say(format!(
                "Starting incremental backup {name} of {}, over {}",
                wanted.vm, start.parent.name
            )),
            None => self.screen.say(format!("Starting full backup {name} of {}", wanted.vm)),
        }
        let spec = record::spec(wanted, start.as_ref().map(|start| start.checkpoint.as_str()));
        let object = record::object(&name, spec, wanted.owner.as_deref(), partial.state.run.as_deref());
        if let Err(failure) = unless(&self.stop, self.cluster.make(&object)).await {
            // whether it was made is not known when the answer is lost
            return self.cancel(partial, failure).await;
        }
        self.finish(partial, wanted).await
    }

    /// Where an incremental backup can begin: the newest restore point here whose checkpoint can still be used.
    ///
    /// # Errors
    /// The API server's, and when an incremental one was asked for and there is none.
    pub async fn start(
        &self,
        store: &Store,
        wanted: &Wanted,
        domain: &LibvirtDomain,
    ) -> Result<Option<Start>, Failure> {
        if wanted.kind == Kind::Full || wanted.format == DiskFormat::Raw {
            return Ok(None);
        }
        for (point, checkpoint) in chain::bases(&store.points, &domain.spec.uuid) {
            let Some(found) = self.cluster.usable(&checkpoint.name).await? else { continue };
            // one of the same name that was made anew is another one
            if found.spec.bitmap != checkpoint.bitmap || found.spec.vm_uuid != domain.spec.uuid {
                continue;
            }
            if found.labels().get(LABEL_OWNER) != wanted.owner.as_ref() {
                continue;
            }
            let parent = Parent { name: point.name.clone(), uid: point.backup.uid.clone() };
            let dirty = found.status.map(|status| status.disks).unwrap_or_default();
            let dirty = dirty.into_iter().filter_map(|disk| Some((disk.target, disk.dirty_bytes?))).collect();
            return Ok(Some(Start { parent, checkpoint: checkpoint.name.clone(), dirty }));
        }
        if wanted.kind == Kind::Incremental {
            let words = format!(
                "no restore point of {} in {} has a checkpoint that can still be used: make a full one with \
                 virtmark backup full {0} --to {1}",
                wanted.vm,
                store.root.display()
            );
            return Err(Failure::NotFound(words));
        }
        Ok(None)
    }

    /// What a process that was killed left of a backup like the one that is wanted. What cannot be gone on with is removed.
    async fn left(&self, store: &Store, point: &str, wanted: &Wanted) -> Result<Option<Partial>, Failure> {
        let Some(partial) = Partial::open(&store.root, point)? else { return Ok(None) };
        let state = &partial.state;
        let is_ours =
            state.vm == wanted.vm && state.namespace == self.cluster.namespace && state.run.is_some();
        if !is_ours {
            return Ok(None);
        }
        let found = crate::cluster::find(&self.cluster.of::<VmBackup>(), &state.backup).await?;
        let found = found.filter(|found| found.annotations().get(RUN) == state.run.as_ref());
        let Some(found) = found else {
            self.screen.say(format!("Removing what is left of {point}: its VmBackup is gone"));
            partial.remove()?;
            return Ok(None);
        };
        let is_whole = !state.disks.is_empty() && state.disks.values().all(|disk| disk.complete);
        let phase = found.phase();
        let like_it = state.kind == wanted.kind && state.format == wanted.format;
        match phase {
            // one that somebody else finalized is not whole here, whatever it is there
            Phase::Finalizing | Phase::Succeeded if is_whole => {
                self.screen.say(format!("Going on with {point}, which was read"));
                Ok(Some(partial))
            }
            Phase::Initializing | Phase::Ready if like_it => {
                self.screen.say(format!("Going on with {point}, which was not finished"));
                Ok(Some(partial))
            }
            _ => {
                self.screen.say(format!("Removing what is left of {point}: VmBackup is {}", phase.as_str()));
                if !phase.is_terminal() {
                    self.cluster.want(&state.backup, DesiredState::Cancelled).await?;
                    self.cluster.ended(&state.backup, END).await?;
                }
                partial.remove()?;
                Ok(None)
            }
        }
    }

    /// From a VmBackup that was made to a restore point; or the VmBackup is cancelled.
    async fn finish(&self, mut partial: Partial, wanted: &Wanted) -> Result<PathBuf, Failure> {
        let backup = partial.state.backup.clone();
        let bound = Duration::from_secs(u64::try_from(wanted.start_seconds).unwrap_or(600)) + END;
        let read = async {
            // a predecessor may have come as far
            let found = crate::cluster::find(&self.cluster.of::<VmBackup>(), &backup).await?;
            let phase = found.as_ref().map(VmBackup::phase).unwrap_or_default();
            if matches!(phase, Phase::Finalizing | Phase::Succeeded) {
                return unless(&self.stop, self.cluster.succeeded(&backup, END)).await;
            }
            let ready = unless(&self.stop, self.cluster.ready(&backup, bound, &self.screen)).await?;
            self.read(&mut partial, &ready, wanted.how).await?;
            self.screen.say("Finalizing the backup");
            unless(&self.stop, self.cluster.want(&backup, DesiredState::Finalized)).await?;
            unless(&self.stop, self.cluster.succeeded(&backup, END)).await
        };
        let done = match read.await {
            Ok(done) => done,
            Err(failure) => return self.cancel(partial, failure).await,
        };
        self.screen.say(format!("{backup} Succeeded"));
        // from here on there is nothing to cancel: a successor publishes what is read
        self.publish(partial, &done, Outcome::Succeeded).await
    }

    /// Reads each disk of a Ready backup.
    ///
    /// # Errors
    /// Why one could not be read, or why the backup ended meanwhile.
    pub async fn read(&self, partial: &mut Partial, ready: &VmBackup, how: How) -> Result<(), Failure> {
        let backup = ready.name_any();
        let status = ready.status.clone().unwrap_or_default();
        let node = status.node_name.as_deref().unwrap_or("its node");
        self.screen.say(format!("{backup} is Ready on {node}: its point in time is taken"));
        let lost = self.cluster.lost(&backup);
        let disks = async {
            for disk in &status.disks {
                self.disk(partial, &backup, &status, disk, how).await?;
            }
            Ok(())
        };
        tokio::select! {
            biased;
            failure = lost => Err(failure),
            done = disks => done,
        }
    }

    async fn disk(
        &self,
        partial: &mut Partial,
        backup: &str,
        status: &VmBackupStatus,
        disk: &BackupDisk,
        how: How,
    ) -> Result<(), Failure> {
        if !partial.state.disks.contains_key(&disk.name) {
            let parent = partial.state.parent.as_ref().map(|(parent, _)| parent.name.clone());
            let below = match parent {
                Some(parent) => Store::read(partial.root())?.point(&parent).cloned(),
                None => None,
            };
            let state = record::mode(disk, status, &partial.state, below.as_ref());
            if let (Some(reason), DiskMode::Incremental) = (&state.reason, disk.mode) {
                self.screen.warn(format!("{} is read in full: {reason}", disk.name));
            }
            partial.state.disks.insert(disk.name.clone(), state);
            partial.store()?;
        }
        let state = &partial.state.disks[&disk.name];
        if state.complete {
            return Ok(());
        }
        if let (ReadMode::Full, Some(reason)) = (state.mode, &disk.mode_reason) {
            let more = disk.mode_message.as_deref().map(|more| format!(" ({more})")).unwrap_or_default();
            self.screen.warn(format!("{} is read in full: {reason}{more}", disk.name));
        }
        let ticket =
            unless(&self.stop, self.cluster.ticket(&format!("{backup}-{}", disk.name), TICKET)).await?;
        download::disk(partial, &disk.name, &ticket, how, &self.screen, &self.stop).await?;
        self.screen.say(format!("{} is read", disk.name));
        Ok(())
    }

    /// Makes a restore point of what was read.
    ///
    /// # Errors
    /// The kernel's. What was read stays, for a successor.
    pub async fn publish(
        &self,
        partial: Partial,
        backup: &VmBackup,
        outcome: Outcome,
    ) -> Result<PathBuf, Failure> {
        let status = backup.status.clone().unwrap_or_default();
        let checkpoint = match &status.to_checkpoint {
            Some(name) => crate::cluster::find(&self.cluster.of::<VmCheckpoint>(), name)
                .await?
                .map(|found| manifest::Checkpoint { name: name.clone(), bitmap: found.spec.bitmap }),
            None => None,
        };
        let mut disks = Vec::new();
        for (name, state) in &partial.state.disks {
            let (path, stop) = (partial.file(&state.file), self.stop.clone());
            self.screen.say(format!("Computing the digest of {}", state.file));
            let digest = tokio::task::spawn_blocking(move || folder::digest(&path, &stop)).await;
            let (bytes, blake3) = digest.map_err(|error| Failure::Program(error.to_string()))??;
            let told = status.disks.iter().find(|disk| disk.name == *name);
            disks.push(record::described(name, state, told, &partial.state.domain, bytes, blake3));
        }
        let manifest = record::manifest(&partial.state, backup, &status, outcome, checkpoint, disks);
        let name = manifest.name.clone();
        let bytes = manifest.disks.iter().map(|disk| disk.bytes).sum();
        let whole = partial.publish(&manifest)?;
        self.screen.say(format!("{name} is whole: {} in {}", words::bytes(bytes), whole.display()));
        Ok(whole)
    }

    /// Cancels the VmBackup of what is being written, removes that, and answers why.
    async fn cancel(&self, partial: Partial, failure: Failure) -> Result<PathBuf, Failure> {
        let backup = partial.state.backup.clone();
        let cancelled = async {
            let found = crate::cluster::find(&self.cluster.of::<VmBackup>(), &backup).await?;
            let ours = found.filter(|found| found.annotations().get(RUN) == partial.state.run.as_ref());
            let Some(found) = ours else { return Ok(()) };
            if !found.phase().is_terminal() {
                self.screen.say(format!("Cancelling {backup}"));
                self.cluster.want(&backup, DesiredState::Cancelled).await?;
                self.cluster.ended(&backup, END).await?;
            }
            Ok::<_, Failure>(())
        };
        if let Err(error) = cancelled.await {
            self.screen.warn(format!(
                "{backup} was not cancelled: {error}; run virtmark backup stop --cancel {} {backup}",
                partial.state.vm
            ));
            return Err(failure);
        }
        partial.remove()?;
        Err(failure)
    }

    /// Waits for the end of a backup that is wanted to end.
    ///
    /// # Errors
    /// When it ends otherwise.
    pub async fn stop(&self, backup: &str, state: DesiredState) -> Result<(), Failure> {
        let hint = "list the backups with kubectl get vmbk, or give -n NAMESPACE";
        let found: VmBackup = self.cluster.get(backup, hint).await?;
        let phase = found.phase();
        match (phase, state) {
            (Phase::Succeeded, DesiredState::Finalized) => return Ok(()),
            (phase, DesiredState::Cancelled) if phase.is_terminal() => return Ok(()),
            (phase, _) if phase.is_terminal() => return Err(refused(&found)),
            _ => {}
        }
        self.cluster.want(backup, state).await?;
        if state == DesiredState::Cancelled {
            return unless(&self.stop, self.cluster.ended(backup, END)).await;
        }
        unless(&self.stop, self.cluster.succeeded(backup, END)).await.map(drop)
    }
}
