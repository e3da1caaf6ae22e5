//! The host actions of a backup, each one blocking call that can be repeated. It decides nothing.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::life::{Action, Freeze, Report};
use super::mark::BitmapDisk;
use crate::agent::image::{is_there, qemu_img, read_locked};
use crate::agent::state::{Base, Record, StateDir, StateError};
use crate::api::{FullReason, QuiesceMode};
use crate::killpoint;
use crate::libvirt::xml::{self, Domain};
use crate::libvirt::{DomainJob, Libvirt, LibvirtError, Listed};
use crate::reason::{Because, Reason};
use crate::step::Step;

/// How long libvirt may take between ending the job of a domain that stops, and calling it off.
const STOP_BOUND: Duration = Duration::from_secs(2);

/// How long a begin may take whose caller died: libvirt's own bound for a domain that is held.
const BEGIN_BOUND: Duration = Duration::from_secs(30);

/// How long libvirt is given to let go of an aborted job.
const ABORT_BOUND: Duration = Duration::from_secs(20);

/// Why an action was not done.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// libvirt said no.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// `qemu-img` said no.
    #[error("qemu-img {verb} failed: {message}")]
    QemuImg {
        /// What it was to do.
        verb: &'static str,
        /// Its words.
        message: String,
    },
    /// The operating system said no.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An image that the agent's pod has no folder for.
    #[error("the agent does not see the folder of image {}: is it in the chart's agent.imageDirs?", .0.display())]
    NotSeen(PathBuf),
    /// The domain is not on this host.
    #[error("the VM is not on this node")]
    NoDomain,
    /// A disk of the backup is no more.
    #[error("the VM has no disk {0} any more")]
    NoDisk(String),
    /// A backup of all disks was bound before the VM had this one.
    #[error("the VM has a disk {0} since the backup was bound, which would not be in it")]
    NewDisk(String),
    /// libvirt does not tell a disk's size while the domain is starting, say.
    #[error("libvirt does not tell the size of disk {0} at the moment")]
    NoSize(String),
    /// libvirt does not take the base for a disk.
    #[error("disk {disk}: {message}")]
    Redefine {
        /// Which disk.
        disk: String,
        /// libvirt's words.
        message: String,
    },
    /// The base was made of another image.
    #[error("disk {disk}: {message}")]
    Replaced {
        /// Which disk.
        disk: String,
        /// How it is known.
        message: String,
    },
    /// The job did not end in time.
    #[error("libvirt's backup job did not end within {} s", ABORT_BOUND.as_secs())]
    JobLingers,
}

impl HostError {
    pub(super) fn because(&self, action: Action) -> Because {
        let reason = match self {
            // it is on its way to another node, or back
            Self::NoDomain | Self::NoSize(_) => Reason::VmBusy,
            Self::Libvirt(error) if error.is_no_domain() => Reason::VmBusy,
            Self::Libvirt(error)
                if error.is_unsupported() && matches!(action, Action::Redefine | Action::Begin) =>
            {
                Reason::IncrementalNotSupported
            }
            Self::NoDisk(_) | Self::NewDisk(_) => Reason::DisksChanged,
            Self::Redefine { .. } => Reason::RedefineFailed,
            Self::Replaced { .. } => Reason::DiskNotInCheckpoint,
            _ => Reason::HypervisorError,
        };
        Because::new(reason, self.to_string())
    }
}

/// The host that a backup runs on.
#[derive(Clone)]
pub struct Host {
    /// Its libvirt.
    pub libvirt: Libvirt,
    /// The agent's directories.
    pub state: StateDir,
    /// Bytes that all scratch images may take, where the admin says.
    pub scratch_limit: Option<u64>,
    /// Held by whoever writes images that no QEMU has.
    pub images: Arc<Mutex<()>>,
}

impl Host {
    /// Does `action` for `record`, and says what it came to. Sizes and image paths are learnt on the way.
    ///
    /// # Errors
    /// When a step of the way up was cut off, because libvirt is away or the VM stopped: that says nothing about the
    /// backup, which starts again when both are back.
    pub fn perform(&self, action: Action, record: &mut Record) -> Result<Report, HostError> {
        let done = match action {
            Action::Freeze => match self.freeze(record) {
                Ok(froze) => return Ok(Report::Froze(froze)),
                Err(error) => Err(error),
            },
            Action::MakeFiles => self.make_files(record),
            Action::Redefine => self.redefine(record).and_then(|()| self.know_again(record)),
            Action::Begin => self.begin(record),
            Action::Thaw => self.thaw(record),
            Action::AbortJob => self.abort_job(record),
            Action::DeleteCheckpoint => match &record.bitmap {
                Some(bitmap) => self.discard_checkpoint(record, bitmap),
                None => Ok(()),
            },
            Action::ForgetCheckpoint => {
                let marks = record.disks.iter().filter_map(|disk| disk.mark.as_ref());
                record.bitmap.iter().chain(marks).try_for_each(|name| self.forget(&record.vm_uuid, name))
            }
            Action::ForgetBase => {
                let bases = record.base.iter();
                let own = bases.clone().filter(|base| base.noted != Some(true)).map(|base| &base.bitmap);
                let mut names = bases.flat_map(|base| base.marks.values()).chain(own);
                names.try_for_each(|name| self.forget(&record.vm_uuid, name))
            }
            Action::RemoveFiles => self.state.remove_run(&record.uid).map_err(HostError::from),
        };
        match done {
            Ok(()) => Ok(Report::Done),
            Err(error) if action.is_upward() && self.is_cut_off(record, &error) => Err(error),
            Err(error) if action == Action::Freeze => Ok(Report::Froze(Freeze::Failed(error.to_string()))),
            Err(error) => Ok(Report::Failed(error.because(action))),
        }
    }

    /// Whether an action failed because libvirt is away or busy, or the QEMU is gone that the backup was prepared with.
    pub(super) fn is_cut_off(&self, record: &Record, error: &HostError) -> bool {
        matches!(error, HostError::Libvirt(error)
            if error.is_unreachable() || error.is_busy() || error.is_monitor_lost())
            || self.libvirt.qemu(&record.vm_uuid).ok().flatten() != record.qemu
    }

    fn make_files(&self, record: &mut Record) -> Result<(), HostError> {
        let listed = self.libvirt.lookup(&record.vm_uuid)?.ok_or(HostError::NoDomain)?;
        let domain = Domain::parse(&listed.xml).map_err(|_| HostError::NoDomain)?;
        let owner = domain.qemu_owner();
        record.qemu = listed.qemu;
        if let Some(base) = record.base.as_mut().filter(|base| base.noted.is_none()) {
            let known = self.libvirt.checkpoint_disks(&record.vm_uuid, &base.bitmap, false)?;
            base.noted = Some(known.is_some());
        }
        let planned = |target: &str| record.disks.iter().any(|disk| disk.target == target);
        let missed = domain.inventoried().find(|disk| disk.can_be_backed_up() && !planned(&disk.target.dev));
        if let Some(missed) = missed.filter(|_| record.all_disks) {
            return Err(HostError::NewDisk(missed.target.dev.clone()));
        }
        let run = self.state.make_run(&record.uid)?;
        for planned in &mut record.disks {
            let missing = || HostError::NoDisk(planned.target.clone());
            let unknown = || HostError::NoSize(planned.target.clone());
            let disk =
                domain.devices.disks.iter().find(|d| d.target.dev == planned.target).ok_or_else(missing)?;
            let (_, size) =
                listed.sizes.iter().find(|(target, _)| *target == planned.target).ok_or_else(unknown)?;
            planned.size = *size;
            planned.image = disk.path().map(PathBuf::from);
            let scratch = self.state.scratch_of(&record.uid, &planned.target)?;
            let size = size.to_string();
            qemu_img(
                "create",
                &["-q".as_ref(), "-f".as_ref(), "qcow2".as_ref(), scratch.as_ref(), size.as_ref()],
            )?;
            give(&scratch, 0o600, owner)?;
        }
        // last: what is in QEMU's own folder may be a link to anywhere, and this process is root
        give(&run, 0o700, owner)
    }

    /// Makes libvirt know the base, after it saw that the bitmaps are whole. A disk whose bitmap is not is read in full,
    /// or fails the backup, and no other: each is asked for alone when all together are refused.
    fn redefine(&self, record: &mut Record) -> Result<(), HostError> {
        let Some(base) = record.base.clone() else { return Ok(()) };
        if base.noted == Some(true) {
            return self.rely_on_note(record, &base);
        }
        // an earlier try may have made it for other disks
        self.forget(&record.vm_uuid, &base.bitmap)?;
        let vm_uuid = record.vm_uuid.clone();
        let define = |targets: &[&str]| {
            let xml = xml::checkpoint_xml(&base.bitmap, targets, Some(base.created));
            self.libvirt.checkpoint_redefine(&vm_uuid, &xml, true)
        };
        let wanted: Vec<_> =
            record.disks.iter().filter(|disk| disk.incremental).map(|disk| disk.target.clone()).collect();
        match define(&wanted.iter().map(String::as_str).collect::<Vec<_>>()) {
            Err(error) if error.is_inconsistent() => {}
            other => return Ok(other?),
        }
        let (mut whole, mut refused) = (Vec::new(), Vec::new());
        for target in &wanted {
            match define(&[target]) {
                Ok(()) => {
                    self.forget(&record.vm_uuid, &base.bitmap)?;
                    whole.push(target.as_str());
                }
                Err(error) if error.is_inconsistent() => refused.push((target.clone(), error.message)),
                Err(error) => return Err(error.into()),
            }
        }
        read_in_full(record, refused, base.strict)?;
        if whole.is_empty() { Ok(()) } else { Ok(define(&whole)?) }
    }

    /// libvirt knows the base, from another product, and goes on knowing it. A disk of it that QEMU cannot count is not whole.
    fn rely_on_note(&self, record: &mut Record, base: &Base) -> Result<(), HostError> {
        let counted = self.libvirt.checkpoint_disks(&record.vm_uuid, &base.bitmap, true)?.unwrap_or_default();
        let is_whole =
            |target: &str| counted.iter().any(|disk| disk.target == target && disk.dirty.is_some());
        let broken = record.disks.iter().filter(|disk| disk.incremental && !is_whole(&disk.target));
        let refused =
            broken.map(|disk| (disk.target.clone(), uncounted(&base.bitmap, &disk.target))).collect();
        read_in_full(record, refused, base.strict)
    }

    fn freeze(&self, record: &Record) -> Result<Freeze, HostError> {
        if record.quiesce == QuiesceMode::None {
            return Ok(Freeze::NotAsked("quiesce.mode is None".to_owned()));
        }
        let listed = self.libvirt.lookup(&record.vm_uuid)?.ok_or(HostError::NoDomain)?;
        if !Domain::parse(&listed.xml).is_ok_and(|domain| domain.guest_agent_connected()) {
            return Ok(Freeze::NotAsked("no guest agent is connected to the VM".to_owned()));
        }
        self.libvirt.freeze(&record.vm_uuid, record.quiesce_seconds)?;
        Ok(Freeze::Frozen)
    }

    /// Thaws the guest. A guest that nobody can have asked to freeze needs no thaw, although a record of the intent says
    /// that it may be frozen.
    fn thaw(&self, record: &Record) -> Result<(), HostError> {
        if record.quiesce == QuiesceMode::None {
            return Ok(());
        }
        match self.libvirt.thaw(&record.vm_uuid, record.quiesce_seconds) {
            Err(error) if error.is_no_domain() || error.is_no_guest_agent() => Ok(()),
            other => Ok(other?),
        }
    }

    fn begin(&self, record: &Record) -> Result<(), HostError> {
        let socket = self.state.socket_of(&record.uid)?;
        let mut scratches = Vec::with_capacity(record.disks.len());
        for disk in &record.disks {
            scratches.push(self.state.scratch_of(&record.uid, &disk.target)?.to_string_lossy().into_owned());
        }
        let disks: Vec<_> = record
            .disks
            .iter()
            .zip(&scratches)
            .map(|(disk, scratch)| {
                let base = record.base.as_ref().filter(|_| disk.incremental);
                xml::BackupDisk { target: &disk.target, scratch, base: base.map(|base| base.bitmap.as_str()) }
            })
            .collect();
        let backup = xml::backup_xml(&socket.to_string_lossy(), &disks);
        let targets: Vec<_> =
            record.disks.iter().filter(|disk| disk.in_checkpoint).map(|disk| disk.target.as_str()).collect();
        let checkpoint = record.bitmap.as_ref().map(|bitmap| xml::checkpoint_xml(bitmap, &targets, None));
        Ok(killpoint::during(Step::BeginCalled, || {
            self.libvirt.backup_begin(&record.vm_uuid, &backup, checkpoint.as_deref())
        })?)
    }

    /// The record's domain, and whose job runs on it. A domain that loses its job because it is being stopped is
    /// given a moment to be seen off, a begin that nobody heard the answer of the time to come to its end.
    ///
    /// # Errors
    /// When libvirt cannot be reached.
    pub fn look(&self, record: &Record) -> Result<(Option<Listed>, Job), HostError> {
        let since = Instant::now();
        loop {
            // the job first: a job that is seen was there while the domain ran
            let job = self.our_job(record)?;
            let listed = self.libvirt.lookup(&record.vm_uuid)?;
            let active = listed.as_ref().is_some_and(|listed| listed.state.is_active());
            let bound = match job {
                Job::None | Job::Other if record.life.is_serving() && active => STOP_BOUND,
                Job::Other if record.life.has_lost_begin() => BEGIN_BOUND,
                _ => return Ok((listed, job)),
            };
            if since.elapsed() > bound {
                return Ok((listed, job));
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Whether the job that runs on the record's domain is the record's.
    ///
    /// # Errors
    /// When libvirt cannot be reached.
    pub fn our_job(&self, record: &Record) -> Result<Job, HostError> {
        let Some(running) = self.libvirt.backup_xml(&record.vm_uuid)? else {
            return Ok(match self.libvirt.job(&record.vm_uuid)? {
                DomainJob::None => Job::None,
                DomainJob::Runs => Job::Other,
                DomainJob::Lost => Job::Lost,
            });
        };
        let ours = self.state.socket_of(&record.uid)?;
        let is_ours = xml::backup_socket(&running).is_some_and(|socket| Path::new(&socket) == ours);
        Ok(if is_ours { Job::Ours } else { Job::Foreign })
    }

    fn abort_job(&self, record: &Record) -> Result<(), HostError> {
        let bound = Instant::now() + ABORT_BOUND;
        if self.our_job(record)? != Job::Ours {
            return Ok(());
        }
        self.libvirt.abort_job(&record.vm_uuid)?;
        while self.our_job(record)? == Job::Ours {
            if Instant::now() > bound {
                return Err(HostError::JobLingers);
            }
            sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Drops libvirt's note of a checkpoint; its bitmaps stay.
    fn forget(&self, vm_uuid: &str, bitmap: &str) -> Result<(), HostError> {
        match self.libvirt.checkpoint_forget(vm_uuid, bitmap) {
            Err(error) if error.is_no_domain() => Ok(()),
            other => Ok(other?),
        }
    }

    /// Removes the checkpoint of a backup that failed, or notes that it is to be removed when the VM is back.
    fn discard_checkpoint(&self, record: &Record, bitmap: &str) -> Result<(), HostError> {
        let disks = BitmapDisk::of(record);
        if !self.delete_checkpoint(&record.vm_uuid, bitmap, &disks)? {
            self.state.store_orphan(record)?;
        }
        Ok(())
    }

    /// Removes what failed backups had to leave, of VMs that are back.
    ///
    /// # Errors
    /// When one could not be removed, which keeps nobody from removing the others.
    pub fn remove_orphans(&self) -> Result<(), HostError> {
        let removed: Vec<_> = self.state.orphans()?.iter().map(|record| self.remove_orphan(record)).collect();
        removed.into_iter().collect()
    }

    fn remove_orphan(&self, record: &Record) -> Result<(), HostError> {
        let Some(bitmap) = &record.bitmap else { return Ok(()) };
        if self.delete_checkpoint(&record.vm_uuid, bitmap, &BitmapDisk::of(record))? {
            self.state.forget_orphan(&record.uid)?;
        }
        Ok(())
    }

    /// Removes a checkpoint: libvirt's note of it, and the bitmap `bitmap` and the marks in each of `disks`, also where an
    /// external snapshot left them in a layer below. With a QEMU through
    /// libvirt; without one by `qemu-img`, which takes the image's lock, so that a QEMU that starts meanwhile cannot have
    /// it too. Answers false when the domain is not here: then its images are left alone, for they may be in use
    /// elsewhere.
    ///
    /// # Errors
    /// When the bitmaps may still be there.
    pub fn delete_checkpoint(
        &self,
        vm_uuid: &str,
        bitmap: &str,
        disks: &[BitmapDisk],
    ) -> Result<bool, HostError> {
        let Some(listed) = self.libvirt.lookup(vm_uuid)? else { return Ok(false) };
        if listed.state.is_active() {
            return self.delete_live(vm_uuid, bitmap, disks).map(|()| true);
        }
        let names: Vec<_> = disks.iter().filter_map(|disk| disk.mark.as_deref()).chain([bitmap]).collect();
        names.iter().try_for_each(|name| self.libvirt.checkpoint_forget(vm_uuid, name))?;
        // one qemu-img at a time: it takes the image's lock, and several checkpoints may go at once
        let _alone = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        for disk in disks {
            let mut layer = match &disk.image {
                Some(image) if is_there(image)? => Some(image.clone()),
                _ => None,
            };
            while let Some(image) = layer {
                let info = read_locked(&image)?;
                // of all disks: an image may be another's by now
                for bitmap in names.iter().filter(|name| info.bitmap(name).is_some()) {
                    // a VM that was started meanwhile must find its images unlocked: ask as late as can be
                    if self.libvirt.qemu(vm_uuid)?.is_some() {
                        return self.delete_live(vm_uuid, bitmap, disks).map(|()| true);
                    }
                    let qcow2 = ["-f".as_ref(), "qcow2".as_ref(), image.as_ref(), OsStr::new(bitmap)];
                    qemu_img("bitmap", &[&["--remove".as_ref()], qcow2.as_slice()].concat())?;
                    killpoint::reached(Step::BitmapRemoved);
                }
                layer = info.below();
            }
        }
        Ok(true)
    }
}

/// What is said of a bitmap that libvirt has a note of, and QEMU does not count.
pub(in crate::agent) fn uncounted(bitmap: &str, target: &str) -> String {
    format!("libvirt cannot count bitmap {bitmap} of disk {target}: it is missing or broken")
}

/// Notes which disks are read in full because their bitmap, with libvirt's words, is not whole; `strict`: that fails the
/// backup.
fn read_in_full(record: &mut Record, refused: Vec<(String, String)>, strict: bool) -> Result<(), HostError> {
    for (target, message) in &refused {
        for disk in record.disks.iter_mut().filter(|disk| disk.target == *target) {
            disk.incremental = false;
            disk.full_because = Some((FullReason::BitmapInvalid, Some(message.clone())));
        }
    }
    match refused.into_iter().next().filter(|_| strict) {
        Some((disk, message)) => Err(HostError::Redefine { disk, message }),
        None => Ok(()),
    }
}

/// Whose job runs on a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// None does.
    None,
    /// The one asked about.
    Ours,
    /// Another backup's.
    Foreign,
    /// Not a backup's, or that of one that is just beginning.
    Other,
    /// That of a backup that libvirt lost track of.
    Lost,
}

/// What the operating system says of a file.
pub fn io_error(path: &Path) -> impl Fn(io::Error) -> HostError {
    let path = path.to_owned();
    move |source| HostError::Io { path: path.clone(), source }
}

/// Sets mode and owner: what QEMU must open belongs to the user that it runs as.
fn give(path: &Path, mode: u32, owner: Option<(u32, u32)>) -> Result<(), HostError> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(io_error(path))?;
    match owner {
        Some((user, group)) => {
            std::os::unix::fs::chown(path, Some(user), Some(group)).map_err(io_error(path))
        }
        None => Ok(()),
    }
}
