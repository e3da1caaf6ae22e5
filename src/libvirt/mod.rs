//! The node's libvirt, as the few blocking verbs that a backup needs.
//!
//! Each verb can be repeated: what is already so counts as done. Nothing here knows Kubernetes, NBD or
//! HTTP, and nothing here decides. Calls block: run them on a blocking thread, with a bound of your own.

mod events;
mod ffi;
mod pool;
pub mod xml;

use std::sync::{Arc, Mutex, PoisonError};

use virt::connect::Connect;
use virt::domain::{
    Domain, DomainPausedReason, DomainState as VirtState, DomainStateReason, DomainStateReasonEnum,
};
use virt::enumutil::Enum;

pub use events::{Notice, watch};
pub use pool::Pool;

use crate::api::DomainState;

/// What libvirt answered instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("libvirt says: {message} (domain {domain}, code {code})")]
pub struct LibvirtError {
    /// libvirt's `virErrorNumber`.
    pub code: u32,
    /// libvirt's `virErrorDomain`.
    pub domain: u32,
    /// libvirt's words.
    pub message: String,
}

impl LibvirtError {
    fn invalid(message: &str) -> Self {
        Self { code: 0, domain: 0, message: message.to_owned() }
    }

    /// libvirtd did not answer (`VIR_FROM_RPC`): it is gone, or the connection broke in the middle of the call. What
    /// the call did is not known.
    pub fn is_unreachable(&self) -> bool {
        self.domain == virt::sys::VIR_FROM_RPC
    }

    /// QEMU went away in the middle of the call. libvirt may take a moment to say so of the domain.
    pub fn is_monitor_lost(&self) -> bool {
        let lost_monitor = self.domain == virt::sys::VIR_FROM_QEMU && self.message.contains("monitor");
        // it looks at QEMU's mounts for each file of a backup: `Failed to read /proc/1928/mounts`
        let lost_process = self.code == virt::sys::VIR_ERR_SYSTEM_ERROR && self.message.contains("/proc/");
        lost_monitor || lost_process
    }

    /// Another job holds the domain (`VIR_ERR_OPERATION_TIMEOUT`): libvirt waited 30 s for it, and did nothing.
    pub fn is_busy(&self) -> bool {
        self.code == virt::sys::VIR_ERR_OPERATION_TIMEOUT
    }

    /// The domain does not exist (`VIR_ERR_NO_DOMAIN`).
    pub fn is_no_domain(&self) -> bool {
        self.code == virt::sys::VIR_ERR_NO_DOMAIN
    }

    /// No backup job runs (`VIR_ERR_NO_DOMAIN_BACKUP`), or no QEMU (`VIR_ERR_OPERATION_INVALID`).
    pub fn is_no_backup(&self) -> bool {
        self.code == virt::sys::VIR_ERR_NO_DOMAIN_BACKUP || self.code == virt::sys::VIR_ERR_OPERATION_INVALID
    }

    /// This libvirt, or the domain's QEMU, cannot do it (`VIR_ERR_OPERATION_UNSUPPORTED`, `VIR_ERR_NO_SUPPORT`).
    pub fn is_unsupported(&self) -> bool {
        matches!(self.code, virt::sys::VIR_ERR_OPERATION_UNSUPPORTED | virt::sys::VIR_ERR_NO_SUPPORT)
    }

    /// The domain has no channel for a guest agent (`VIR_ERR_ARGUMENT_UNSUPPORTED`); one that has it, and nobody who
    /// answers, is another error (`VIR_ERR_AGENT_UNRESPONSIVE`).
    pub fn is_no_guest_agent(&self) -> bool {
        self.code == virt::sys::VIR_ERR_ARGUMENT_UNSUPPORTED
    }

    /// A checkpoint cannot be redefined, for a bitmap is missing or broken, or its disk is not there
    /// (`VIR_ERR_CHECKPOINT_INCONSISTENT`).
    pub fn is_inconsistent(&self) -> bool {
        self.code == virt::sys::VIR_ERR_CHECKPOINT_INCONSISTENT || self.is_no_disk()
    }

    /// A disk that was named is not there.
    pub fn is_no_disk(&self) -> bool {
        self.message.contains("no disk named")
    }

    /// The checkpoint does not exist (`VIR_ERR_NO_DOMAIN_CHECKPOINT`).
    pub fn is_no_checkpoint(&self) -> bool {
        self.code == virt::sys::VIR_ERR_NO_DOMAIN_CHECKPOINT
    }
}

impl From<virt::error::Error> for LibvirtError {
    fn from(error: virt::error::Error) -> Self {
        Self {
            code: error.code().to_raw(),
            domain: error.domain().to_raw(),
            message: one_line(error.message(), 1024),
        }
    }
}

/// The first `longest` characters of what libvirt or qemu-img says, made fit for a log and a condition: it may quote a
/// guest, a name or QEMU's last lines.
pub fn one_line(text: &str, longest: usize) -> String {
    text.trim().chars().take(longest).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// `VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK`: what a domain has when nobody set a bound.
const AGENT_BLOCKS: i32 = -2;

/// The long job that holds a domain: a backup, a migration, a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainJob {
    /// None.
    None,
    /// One runs.
    Runs,
    /// libvirt says that one runs and knows nothing of it. Seen on 11.3, after libvirtd was killed while it began a
    /// backup: nothing ends that job but another libvirtd that starts while the domain is off.
    Lost,
}

/// A domain, as libvirt lists it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Whether it runs.
    pub state: DomainState,
    /// libvirt's number of its QEMU: another one each time that it starts. None while it is off.
    pub qemu: Option<u32>,
    /// Its live XML, or the persistent one when it is off.
    pub xml: String,
    /// Virtual sizes by disk target, in bytes, where libvirt can tell.
    pub sizes: Vec<(String, u64)>,
}

/// One libvirt daemon, by its URI. Cheap to clone; reconnects by itself.
#[derive(Clone)]
pub struct Libvirt {
    uri: Arc<str>,
    connection: Arc<Mutex<Option<Connect>>>,
}

impl Libvirt {
    /// The libvirt at `uri`, `qemu:///system` say. Connects at the first call.
    pub fn new(uri: &str) -> Self {
        virt::error::clear_error_callback();
        Self { uri: uri.into(), connection: Arc::default() }
    }

    /// The URI.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    fn connect(&self) -> Result<Connect, LibvirtError> {
        let mut held = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = held.as_ref()
            && connection.is_alive().unwrap_or(false)
        {
            return Ok(connection.clone());
        }
        let connection = Connect::open(Some(&self.uri))?;
        // a peer that does not answer for 15 s is gone; libvirt's event loop must run (`events`)
        connection.set_keep_alive(5, 3)?;
        *held = Some(connection.clone());
        Ok(connection)
    }

    fn domain(&self, uuid: &str) -> Result<Domain, LibvirtError> {
        Ok(self.connect()?.lookup_domain_by_uuid_string(uuid)?)
    }

    /// Whether it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn ping(&self) -> Result<(), LibvirtError> {
        Ok(self.connect()?.lib_version().map(drop)?)
    }

    /// Every domain.
    ///
    /// # Errors
    /// When libvirt cannot be reached. A domain that vanishes meanwhile is left out.
    pub fn domains(&self) -> Result<Vec<Listed>, LibvirtError> {
        let domains = self.connect()?.list_all_domains(0)?;
        let found = domains.iter().map(listed).filter(|found| match found {
            // any other error is no word about the domain: it must not pass for one that is gone
            Err(error) => !error.is_no_domain(),
            Ok(_) => true,
        });
        found.collect()
    }

    /// One domain; `None` when libvirt does not know it.
    ///
    /// # Errors
    /// When libvirt cannot be reached.
    pub fn lookup(&self, uuid: &str) -> Result<Option<Listed>, LibvirtError> {
        match self.domain(uuid).and_then(|domain| listed(&domain)) {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.is_no_domain() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// libvirt's number of a domain's QEMU; `None` when there is none here.
    ///
    /// # Errors
    /// When libvirt cannot be reached.
    pub fn qemu(&self, uuid: &str) -> Result<Option<u32>, LibvirtError> {
        match self.domain(uuid) {
            Ok(domain) => Ok(domain.id()),
            Err(error) if error.is_no_domain() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The job that holds a domain.
    ///
    /// # Errors
    /// When libvirt cannot be reached.
    pub fn job(&self, uuid: &str) -> Result<DomainJob, LibvirtError> {
        match self.domain(uuid).and_then(|domain| Ok(domain.job_info()?)) {
            Ok(job) if u32::try_from(job.r#type) == Ok(virt::sys::VIR_DOMAIN_JOB_NONE) => Ok(DomainJob::None),
            Ok(_) => Ok(DomainJob::Runs),
            Err(error) if error.is_unreachable() => Err(error),
            Err(error) if error.is_busy() => Ok(DomainJob::Runs),
            Err(error) if error.code == virt::sys::VIR_ERR_INTERNAL_ERROR => Ok(DomainJob::Lost),
            Err(error) if error.is_no_domain() || error.is_no_backup() => Ok(DomainJob::None),
            Err(error) => Err(error),
        }
    }

    /// Freezes the guest's file systems; the guest agent has `seconds` to answer.
    ///
    /// # Errors
    /// libvirt's. The guest may be frozen all the same: thaw in every path.
    pub fn freeze(&self, uuid: &str, seconds: i32) -> Result<(), LibvirtError> {
        let domain = self.domain(uuid)?;
        ffi::agent_timeout(&domain, seconds)?;
        ffi::freeze(&domain)
    }

    /// Thaws the guest's file systems; the guest agent has `seconds` to answer.
    ///
    /// # Errors
    /// libvirt's.
    pub fn thaw(&self, uuid: &str, seconds: i32) -> Result<(), LibvirtError> {
        let domain = self.domain(uuid)?;
        ffi::agent_timeout(&domain, seconds)?;
        ffi::thaw(&domain)?;
        // the bound was ours; other users of the guest agent get libvirt's own again
        ffi::agent_timeout(&domain, AGENT_BLOCKS)
    }

    /// Begins a backup, with a checkpoint of the same moment when `checkpoint` is given.
    ///
    /// # Errors
    /// libvirt's: another job runs, a disk is not known, the scratch cannot be opened.
    pub fn backup_begin(
        &self,
        uuid: &str,
        backup: &str,
        checkpoint: Option<&str>,
    ) -> Result<(), LibvirtError> {
        ffi::backup_begin(&self.domain(uuid)?, backup, checkpoint)
    }

    /// The XML of the running backup; `None` when none runs or the domain is off or gone.
    ///
    /// # Errors
    /// When libvirt cannot be reached.
    pub fn backup_xml(&self, uuid: &str) -> Result<Option<String>, LibvirtError> {
        match self.domain(uuid).and_then(|domain| ffi::backup_xml(&domain)) {
            Ok(xml) => Ok(Some(xml)),
            Err(error) if error.is_no_backup() || error.is_no_domain() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Aborts the domain's job. Ask `backup_xml` first whose it is.
    ///
    /// # Errors
    /// libvirt's; no job, or no domain, is no error.
    pub fn abort_job(&self, uuid: &str) -> Result<(), LibvirtError> {
        match self.domain(uuid).and_then(|domain| ffi::abort_job(&domain)) {
            Err(error) if error.is_no_backup() || error.is_no_domain() => Ok(()),
            other => other,
        }
    }

    /// Makes libvirt know a checkpoint whose bitmaps are in the images; with `validate` it looks at them first.
    ///
    /// # Errors
    /// libvirt's: a bitmap is missing or inconsistent.
    pub fn checkpoint_redefine(&self, uuid: &str, xml: &str, validate: bool) -> Result<(), LibvirtError> {
        let validate = if validate { virt::sys::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE } else { 0 };
        let flags = virt::sys::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE | validate;
        ffi::checkpoint_create(&self.domain(uuid)?, xml, flags)
    }

    /// Makes a checkpoint without a backup: a bitmap in each of its disks.
    ///
    /// # Errors
    /// libvirt's: a bitmap of that name is there already, a disk cannot keep one.
    pub fn checkpoint_create(&self, uuid: &str, xml: &str) -> Result<(), LibvirtError> {
        ffi::checkpoint_create(&self.domain(uuid)?, xml, 0)
    }

    /// The names of the checkpoints that libvirt knows of a domain, in the order of their names.
    ///
    /// # Errors
    /// libvirt's.
    pub fn checkpoint_names(&self, uuid: &str) -> Result<Vec<String>, LibvirtError> {
        let mut names = ffi::checkpoint_names(&self.domain(uuid)?)?;
        names.sort();
        Ok(names)
    }

    /// The disks of a checkpoint that libvirt knows; `None` when it does not know it. With `count` QEMU counts the dirty
    /// bytes of each, and one that cannot be counted has none.
    ///
    /// # Errors
    /// libvirt's.
    pub fn checkpoint_disks(
        &self,
        uuid: &str,
        name: &str,
        count: bool,
    ) -> Result<Option<Vec<xml::NotedDisk>>, LibvirtError> {
        match ffi::checkpoint_xml(&self.domain(uuid)?, name, count) {
            Ok(xml) => Ok(Some(xml::noted_disks(&xml))),
            Err(error) if error.is_no_checkpoint() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether a checkpoint that libvirt knows is one that it was to know [for a moment](xml::PROBE) only.
    ///
    /// # Errors
    /// libvirt's.
    pub fn checkpoint_is_probe(&self, uuid: &str, name: &str) -> Result<bool, LibvirtError> {
        match ffi::checkpoint_xml(&self.domain(uuid)?, name, false) {
            Ok(xml) => Ok(xml::is_probe(&xml)),
            Err(error) if error.is_no_checkpoint() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes a checkpoint that libvirt knows, with its bitmaps, those that a killed QEMU left inconsistent too. Bitmaps
    /// that are not there need no deletion; whether they were.
    ///
    /// # Errors
    /// libvirt's.
    pub fn checkpoint_delete(&self, uuid: &str, name: &str) -> Result<bool, LibvirtError> {
        match ffi::checkpoint_delete(&self.domain(uuid)?, name, false) {
            Err(error) if error.message.contains("not found in backing chain") => {
                self.checkpoint_forget(uuid, name).map(|()| false)
            }
            other => other.map(|()| true),
        }
    }

    /// Drops libvirt's note of a checkpoint, if it has one. The bitmaps stay.
    ///
    /// # Errors
    /// libvirt's.
    pub fn checkpoint_forget(&self, uuid: &str, name: &str) -> Result<(), LibvirtError> {
        match ffi::checkpoint_delete(&self.domain(uuid)?, name, true) {
            Err(error) if error.is_no_checkpoint() => Ok(()),
            other => other,
        }
    }
}

fn listed(domain: &Domain) -> Result<Listed, LibvirtError> {
    let (state, why) = domain.state()?;
    let xml = domain.xml_desc(0)?;
    let targets = xml::Domain::parse(&xml).map(|parsed| parsed.devices.disks).unwrap_or_default();
    let mut sizes = Vec::with_capacity(targets.len());
    for disk in targets.into_iter().filter(xml::Disk::has_source) {
        match domain.block_info(&disk.target.dev, 0).map_err(LibvirtError::from) {
            // nought stands for a disk of which libvirt does not know yet
            Ok(info) if info.capacity > 0 => sizes.push((disk.target.dev, info.capacity)),
            Err(error) if error.is_unreachable() => return Err(error),
            _ => {}
        }
    }
    Ok(Listed { state: domain_state(state.known(), why), qemu: domain.id(), xml, sizes })
}

/// What a backup may make of libvirt's state: only a guest that runs, or that its user paused, is quiet
/// enough to begin.
fn domain_state(state: Option<VirtState>, why: DomainStateReasonEnum) -> DomainState {
    match state {
        Some(VirtState::Running | VirtState::Blocked) => DomainState::Running,
        Some(VirtState::Paused) => match why {
            Enum::Known(DomainStateReason::Paused(why)) if why.is(DomainPausedReason::User) => {
                DomainState::Paused
            }
            _ => DomainState::Busy,
        },
        Some(VirtState::Shutdown | VirtState::PMSuspended) => DomainState::Busy,
        _ => DomainState::Off,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_says_nothing_about_the_backup_is_told_from_one_that_does() {
        use virt::sys::{
            VIR_ERR_INTERNAL_ERROR, VIR_ERR_OPERATION_FAILED, VIR_ERR_OPERATION_TIMEOUT,
            VIR_ERR_SYSTEM_ERROR, VIR_FROM_NONE, VIR_FROM_QEMU, VIR_FROM_RPC,
        };
        // as libvirt 11.3 says them
        let table = [
            (
                VIR_FROM_RPC,
                VIR_ERR_SYSTEM_ERROR,
                "Failed to connect socket to '/run/libvirt/libvirt-sock'",
                true,
            ),
            (VIR_FROM_RPC, VIR_ERR_INTERNAL_ERROR, "client socket is closed", true),
            (
                VIR_FROM_QEMU,
                VIR_ERR_SYSTEM_ERROR,
                "Unable to read from monitor: Connection reset by peer",
                true,
            ),
            (
                VIR_FROM_NONE,
                VIR_ERR_SYSTEM_ERROR,
                "Failed to read /proc/1928/mounts: No such file or directory",
                true,
            ),
            (VIR_FROM_NONE, VIR_ERR_SYSTEM_ERROR, "Unable to open file: No space left on device", false),
            (VIR_FROM_QEMU, VIR_ERR_OPERATION_TIMEOUT, "cannot acquire state change lock", true),
            (VIR_FROM_QEMU, VIR_ERR_INTERNAL_ERROR, "unable to execute QEMU command 'transaction'", false),
            (VIR_FROM_QEMU, VIR_ERR_OPERATION_FAILED, "Bitmap 'x' is inconsistent", false),
        ];
        for (domain, code, message, expected) in table {
            let error = LibvirtError { domain, code, message: message.to_owned() };
            let cut_off = error.is_unreachable() || error.is_busy() || error.is_monitor_lost();
            assert_eq!(cut_off, expected, "{error}");
        }
    }

    #[test]
    fn words_from_libvirt_cannot_make_a_log_line_of_their_own() {
        assert_eq!(one_line("failed:\nWARN \u{1b}[31mx\u{9b}\n", 1024), "failed: WARN  [31mx ");
        assert_eq!(one_line(&"x".repeat(5000), 1024).len(), 1024);
    }
}
