//! A backup from its object to a restore point: make, wait, read, finalize, publish. Whatever happens in between, the VmBackup
//! is finalized or cancelled; only a process that is killed leaves one, and its successor goes on with it.
//!
//! ```text
//! base -> partial folder -> VmBackup -> Ready -> each disk -> Finalized -> Succeeded -> digests -> restore point
//!            \------------ a successor begins here, with what is there --------------/
//! ```
//!
//! It never decides what is read of a disk: the VmBackup's status and [`super::plan`] do.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::ResourceExt as _;
use tokio_util::sync::CancellationToken;

use super::chain;
use super::download::{self, How};
use super::exit::Failure;
use super::folder::Partial;
use super::kubernetes::{Cluster, run, unless};
use super::manifest::{Checkpoint, DiskFormat, Parent, ReadMode};
use super::names;
use super::publish::whole;
use super::record;
use super::resume::{self, Next};
use super::screen::Screen;
use super::state::{Kind, State};
use super::store::Store;
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
    pub checkpoint: Checkpoint,
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
        for point in Store::read(&root)?.unfinished {
            if let Some(whole) = self.left(&root, &point, wanted).await? {
                return Ok(whole);
            }
        }
        let store = Store::read(&root)?;
        let domain = self.cluster.domain(&wanted.vm).await?;
        let start = self.start(&store, wanted, &domain).await?;
        let name = names::point(&wanted.vm, crate::clock::now(), |name| store.has(name));
        let mut state = State::new(&name, &wanted.vm, &self.cluster.namespace, wanted.kind, wanted.format);
        state.run = Some(run());
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
        let spec = record::spec(wanted, start.as_ref().map(|start| start.checkpoint.name.as_str()));
        let object = record::object(&name, spec, wanted.owner.as_deref(), partial.state.run.as_deref());
        match self.cluster.make(&object).await {
            Ok(made) => self.finish(partial, &made, wanted).await,
            Err(failure @ Failure::Unanswered { .. }) => {
                self.screen.warn("the same command goes on with it, if it was made");
                Err(failure)
            }
            Err(failure) => self.remove(partial, failure),
        }
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
            return Ok(Some(Start { parent, checkpoint: checkpoint.clone(), dirty }));
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

    /// Goes on with what a process that was killed left of a backup like the one that is wanted; answers the restore point that it
    /// becomes. What cannot be gone on with is removed; what was asked for otherwise, and is whole, becomes a restore point too.
    async fn left(&self, root: &Path, point: &str, wanted: &Wanted) -> Result<Option<PathBuf>, Failure> {
        // whose it is, before it is locked: others are written here too
        let is_ours = |state: &State| {
            state.vm == wanted.vm && state.namespace == self.cluster.namespace && state.run.is_some()
        };
        match Partial::look(root, point) {
            Ok(state) if state.as_ref().is_some_and(is_ours) => {}
            Ok(_) => return Ok(None),
            Err(failure) => {
                self.screen.warn(failure.to_string());
                return Ok(None);
            }
        }
        let Some(mut partial) = Partial::open(root, point)? else { return Ok(None) };
        let found = crate::cluster::find(&self.cluster.of::<VmBackup>(), point).await?;
        let found = found.filter(|found| partial.state.is_of(found));
        let next = resume::next(&partial.state, found.as_ref());
        let begun = found.as_ref().or(partial.state.backup.as_ref());
        let unlike = begun.and_then(|begun| resume::unlike(&partial.state, begun, wanted));
        let is_past = matches!(found.as_ref().map(VmBackup::phase), Some(Phase::Finalizing));
        let whole = match (next, found) {
            (Next::Publish, found) => {
                self.screen.say(format!("Going on with {point}, which was read"));
                partial.saw(found.as_ref())?;
                self.publish(partial, &self.stop).await?
            }
            (Next::GoOn, Some(found)) => {
                if let Some(option) = unlike.filter(|_| !is_past) {
                    let (backup, vm) = (point.to_owned(), wanted.vm.clone());
                    return Err(Failure::Unlike { backup, vm, option });
                }
                self.screen.say(format!("Going on with {point}, which was not finished"));
                self.finish(partial, &found, wanted).await?
            }
            (Next::Remove | Next::GoOn, found) => {
                let why = found.map_or("gone", |found| found.phase().as_str());
                self.screen.say(format!("Removing what is left of {point}: its VmBackup is {why}"));
                partial.remove()?;
                return Ok(None);
            }
        };
        match unlike {
            None => Ok(Some(whole)),
            Some(option) => {
                self.screen.say(format!("{point} was begun with another {option}: another one is made"));
                Ok(None)
            }
        }
    }

    /// From a VmBackup that was made to a restore point; or the VmBackup is cancelled.
    async fn finish(
        &self,
        mut partial: Partial,
        backup: &VmBackup,
        wanted: &Wanted,
    ) -> Result<PathBuf, Failure> {
        match self.succeed(&mut partial, backup, wanted).await {
            // from here on there is nothing to cancel: a successor publishes what is read
            Ok(()) => self.publish(partial, &self.stop).await,
            Err(failure) => self.give_up(partial, backup, failure).await,
        }
    }

    async fn succeed(
        &self,
        partial: &mut Partial,
        backup: &VmBackup,
        wanted: &Wanted,
    ) -> Result<(), Failure> {
        let bound = Duration::from_secs(u64::try_from(wanted.start_seconds).unwrap_or(600)) + END;
        let ready = unless(&self.stop, self.cluster.ready(backup, bound, &self.screen)).await?;
        // a predecessor may have come farther
        if ready.phase() == Phase::Ready {
            self.read(partial, &ready, wanted.how).await?;
            self.screen.say("Finalizing the backup");
            unless(&self.stop, self.cluster.want(backup, DesiredState::Finalized)).await?;
        }
        let done = unless(&self.stop, self.cluster.succeeded(backup, END)).await?;
        self.screen.say(format!("{} Succeeded", backup.name_any()));
        whole(&partial.state)?;
        partial.saw(Some(&done))
    }

    /// Reads each disk of a Ready backup. All of it is on stable storage afterwards, and has what it lies over.
    ///
    /// # Errors
    /// Why one could not be read, or why the backup ended meanwhile.
    pub async fn read(&self, partial: &mut Partial, ready: &VmBackup, how: How) -> Result<(), Failure> {
        let status = ready.status.clone().unwrap_or_default();
        let node = status.node_name.as_deref().unwrap_or("its node");
        self.screen.say(format!("{} is Ready on {node}: its point in time is taken", ready.name_any()));
        if partial.state.backup.is_none() {
            partial.state.checkpoint = self.noted(status.to_checkpoint.as_deref()).await?;
            let from = self.noted(status.from_checkpoint.as_deref()).await?;
            partial.state.parent =
                partial.state.parent.take().filter(|(_, base)| Some(base) == from.as_ref());
        }
        partial.saw(Some(ready))?;
        let lost = self.cluster.lost(ready);
        let disks = async {
            for disk in &status.disks {
                self.disk(partial, ready, &status, disk, how).await?;
            }
            Ok::<_, Failure>(())
        };
        tokio::select! {
            biased;
            failure = lost => return Err(failure),
            done = disks => done?,
        }
        whole(&partial.state)?;
        chain::over(&Store::read(partial.root())?.points, &partial.state)
            .map_err(|gap| Failure::Damaged(format!("{}: {gap}", ready.name_any())))?;
        partial.sync()
    }

    /// The checkpoint of this name, as restore points note it.
    async fn noted(&self, name: Option<&str>) -> Result<Option<Checkpoint>, Failure> {
        let Some(name) = name else { return Ok(None) };
        let found = crate::cluster::find(&self.cluster.of::<VmCheckpoint>(), name).await?;
        Ok(found.map(|found| Checkpoint { name: name.to_owned(), bitmap: found.spec.bitmap }))
    }

    async fn disk(
        &self,
        partial: &mut Partial,
        backup: &VmBackup,
        status: &VmBackupStatus,
        disk: &BackupDisk,
        how: How,
    ) -> Result<(), Failure> {
        if !names::is_plain(&disk.name) {
            let words = format!(
                "VmBackup {} names a disk {:?}: no file can have that name",
                backup.name_any(),
                disk.name
            );
            return Err(Failure::Damaged(words));
        }
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
        let ticket = unless(&self.stop, self.cluster.ticket(backup, &disk.name, TICKET)).await?;
        download::disk(partial, &disk.name, &ticket, how, &self.screen, &self.stop).await?;
        self.screen.say(format!("{} is read", disk.name));
        Ok(())
    }
}
