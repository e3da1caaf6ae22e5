//! The steps of a backup one by one, for whoever does something in between: begin it, read it, end it. They leave the VmBackup
//! Ready in between, also when they fail.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::ResourceExt as _;

use super::args;
use super::backup::{END, Session, Wanted};
use super::chain;
use super::download::How;
use super::exit::Failure;
use super::folder::{Partial, taken};
use super::kubernetes::{refused, run, unless};
use super::manifest::{Checkpoint, DiskFormat, Parent};
use super::names;
use super::output::value;
use super::record;
use super::resume::{self, Next};
use super::state::{Kind, State};
use super::store::Store;
use crate::api::{DesiredState, Phase, VmBackup, VmCheckpoint};

const HINT: &str = "list the backups with kubectl get vmbk, or give -n NAMESPACE";

impl Session {
    /// Begins a backup, and waits until it is Ready; answers its name.
    ///
    /// # Errors
    /// Why it is not. Then it was cancelled.
    pub async fn begin(&self, wanted: &Wanted, from: Option<&str>) -> Result<String, Failure> {
        let bound = Duration::from_secs(u64::try_from(wanted.start_seconds).unwrap_or(600)) + END;
        self.cluster.domain(&wanted.vm).await?;
        let name = names::point(&wanted.vm, crate::clock::now(), |_| false);
        self.screen.say(format!("Starting backup {name} of {}", wanted.vm));
        let spec = record::spec(wanted, from);
        let made =
            self.cluster.make(&record::object(&name, spec, wanted.owner.as_deref(), Some(&run()))).await?;
        let ready = unless(&self.stop, self.cluster.ready(&made, bound, &self.screen)).await;
        if let Err(failure) = ready {
            if let Err(error) = self.cancel(&made).await {
                self.screen.warn(format!(
                    "{name} was not cancelled: {error}; run virtmark backup stop --cancel {} {name}",
                    wanted.vm
                ));
            }
            return Err(failure);
        }
        self.screen.say(format!(
            "{name} is Ready: read it with virtmark backup download, end it with virtmark backup stop"
        ));
        Ok(name)
    }

    /// Ends a backup as it is wanted to.
    ///
    /// # Errors
    /// When there is none, or it ends otherwise.
    pub async fn end(&self, vm: &str, backup: &str, state: DesiredState) -> Result<(), Failure> {
        let found: VmBackup = self.cluster.get(backup, HINT).await?;
        is_of(&found, vm)?;
        match (found.phase(), state) {
            (Phase::Succeeded, DesiredState::Finalized) => return Ok(()),
            (phase, DesiredState::Cancelled) if phase.is_terminal() => return Ok(()),
            (phase, _) if phase.is_terminal() => return Err(refused(&found)),
            _ => {}
        }
        self.cluster.want(&found, state).await?;
        if state == DesiredState::Cancelled {
            return unless(&self.stop, self.cluster.ended(&found, END)).await.map(drop);
        }
        unless(&self.stop, self.cluster.succeeded(&found, END)).await.map(drop)
    }

    /// Reads a backup that is Ready into a restore point, and leaves it Ready; answers where it is. What an earlier call left of
    /// this very VmBackup is gone on with.
    ///
    /// # Errors
    /// Why it is not read.
    pub async fn download(&self, wanted: args::Download) -> Result<PathBuf, Failure> {
        let args::Download { vm, backup, to, format, reading } = wanted;
        std::fs::create_dir_all(&to).map_err(Failure::file(&to))?;
        let root = to.canonicalize().map_err(Failure::file(&to))?;
        let found = crate::cluster::find(&self.cluster.of::<VmBackup>(), &backup).await?;
        let left = match Partial::open(&root, &backup)? {
            Some(partial) => self.went_on(partial, found.as_ref(), format).await?,
            None => Left::Nothing,
        };
        if let Left::Whole(whole) = left {
            return Ok(whole);
        }
        // as others do, with what to do about it
        let found: VmBackup = match found {
            Some(found) => found,
            None => self.cluster.get(&backup, HINT).await?,
        };
        is_of(&found, &vm)?;
        match found.phase() {
            Phase::Ready => {}
            phase if phase.is_terminal() => return Err(refused(&found)),
            phase => {
                let words = format!("VmBackup {backup} is {}, and must be Ready", phase.as_str());
                return Err(Failure::Usage(words));
            }
        }
        let whole = root.join(&backup);
        if whole.exists() {
            return Err(taken(&whole));
        }
        let mut partial = match left {
            Left::Part(partial) => *partial,
            _ => {
                let domain = self.cluster.domain(&vm).await?;
                let mut state = State::new(&backup, &vm, &self.cluster.namespace, Kind::Auto, format);
                state.domain = value(&domain.status);
                let from = found.status.as_ref().and_then(|status| status.from_checkpoint.as_deref());
                state.parent = match from {
                    Some(name) if format == DiskFormat::Qcow2 => self.base(&root, name).await?,
                    _ => None,
                };
                Partial::create(&root, state)?
            }
        };
        let how = How { workers: usize::from(reading.max_workers), way: reading.transport };
        self.read(&mut partial, &found, how).await?;
        self.publish(partial, &self.stop).await
    }

    /// What becomes of what an earlier call left: it is of this VmBackup, and not of an earlier one of its name, or it goes.
    async fn went_on(
        &self,
        mut partial: Partial,
        found: Option<&VmBackup>,
        format: DiskFormat,
    ) -> Result<Left, Failure> {
        let (state, namespace) = (&partial.state, &self.cluster.namespace);
        let others = |words: &str| Failure::Usage(format!("{}: {words}", partial.file("").display()));
        if state.run.is_some() || state.namespace != *namespace {
            return Err(others("what is left there is of another command: give another folder"));
        }
        let of_it = found.filter(|found| state.is_of(found));
        match resume::next(state, of_it) {
            Next::GoOn if state.format != format => {
                Err(others("what is left there is of another --format: give that one, or another folder"))
            }
            Next::GoOn => Ok(Left::Part(Box::new(partial))),
            Next::Remove => {
                self.screen.say(format!(
                    "Removing what is left of {}: it is not of the VmBackup that is Ready now",
                    state.point
                ));
                partial.remove()?;
                Ok(Left::Nothing)
            }
            Next::Publish => {
                partial.saw(of_it)?;
                let whole = self.publish(partial, &self.stop).await?;
                match (found, of_it) {
                    (Some(_), None) => Err(taken(&whole)),
                    _ => Ok(Left::Whole(whole)),
                }
            }
        }
    }

    /// The restore point here that made the checkpoint which a backup starts from.
    async fn base(&self, root: &Path, name: &str) -> Result<Option<(Parent, Checkpoint)>, Failure> {
        let found: VmCheckpoint = self.cluster.get(name, "it is gone").await?;
        let store = Store::read(root)?;
        let bases = chain::bases(&store.points, &found.spec.vm_uuid);
        let fits = bases
            .into_iter()
            .find(|(_, made)| made.name == found.name_any() && made.bitmap == found.spec.bitmap);
        Ok(fits.map(|(point, made)| {
            let parent = Parent { name: point.name.clone(), uid: point.backup.uid.clone() };
            (parent, made.clone())
        }))
    }
}

/// What an earlier call left.
enum Left {
    Nothing,
    /// What this one goes on with.
    Part(Box<Partial>),
    /// All of it, which is a restore point now.
    Whole(PathBuf),
}

fn is_of(backup: &VmBackup, vm: &str) -> Result<(), Failure> {
    if backup.spec.vm == vm {
        return Ok(());
    }
    let name = backup.name_any();
    Err(Failure::NotFound(format!("VmBackup {name} is of VM {}, not of {vm}", backup.spec.vm)))
}
