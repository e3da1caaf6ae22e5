//! The backups that live on this node, in memory: who waits for whom, and what is served.
//!
//! It is rebuilt from the state directory at start. Nothing here talks to Kubernetes or libvirt.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::channel::mpsc::UnboundedSender;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::reflector::ObjectRef;

use super::state::Record;
use crate::api::{ImageTransfer, VmBackup, VmCheckpoint};
use crate::imageio::{Coverage, SharedCoverage};
use crate::reason::Because;

/// One backup of this node.
pub struct Live {
    /// The domain's uuid, to find the backup by when libvirt says that the domain changed.
    pub vm_uuid: String,
    /// The object.
    pub object: ObjectRef<VmBackup>,
    /// The record; held while an action runs.
    pub record: tokio::sync::Mutex<Record>,
    /// Whether this process has seen the object, so that it is known not to be an orphan.
    pub confirmed: AtomicBool,
    /// Whether its end stands in the object, or there is none any more: nothing of it is kept but this.
    pub released: AtomicBool,
    served: Mutex<Served>,
}

/// What is known of the clients of one backup.
#[derive(Default)]
struct Served {
    /// Per disk, which bytes were served.
    coverage: BTreeMap<String, Kept>,
    /// Per disk, bytes that must be read, served or not.
    required: BTreeMap<String, u64>,
    /// Per disk, bytes that must be read and were not, as last counted.
    missing: BTreeMap<String, u64>,
    /// When a client last asked for something, as far as tickets tell.
    last_request: Option<Timestamp>,
    /// Transfers with a ticket.
    tickets: HashSet<String>,
    /// Transfers whose Secret is made, as far as this process knows.
    announced: HashSet<String>,
    /// Transfers whose reading this agent cannot see.
    unseen: HashSet<String>,
    /// When its end was seen first.
    ended_at: Option<Timestamp>,
    /// Why it must end for want of scratch space.
    exhausted: Option<Because>,
    /// Since when libvirt does not know its domain.
    absent_since: Option<Timestamp>,
}

/// A disk's coverage, and how much of it is stored.
struct Kept {
    coverage: Arc<SharedCoverage>,
    stored: u64,
}

impl Live {
    /// A backup with nothing served yet.
    pub fn new(record: Record) -> Self {
        Self {
            vm_uuid: record.vm_uuid.clone(),
            object: ObjectRef::new(&record.name).within(&record.namespace),
            record: tokio::sync::Mutex::new(record),
            confirmed: AtomicBool::new(false),
            released: AtomicBool::new(false),
            served: Mutex::default(),
        }
    }

    /// The coverage of a disk; made by `make` when it is asked for first.
    pub fn coverage(&self, disk: &str, make: impl FnOnce() -> Coverage) -> Arc<SharedCoverage> {
        let mut served = self.served();
        let kept = served.coverage.entry(disk.to_owned()).or_insert_with(|| {
            let coverage = SharedCoverage::new(make());
            Kept { stored: coverage.settled(), coverage }
        });
        Arc::clone(&kept.coverage)
    }

    /// The coverage, encoded, of each disk of which more was served or excused since the last call.
    pub fn to_store(&self) -> Vec<(String, Vec<u8>)> {
        let mut served = self.served();
        let moved = served.coverage.iter_mut().filter_map(|(disk, kept)| {
            let settled = kept.coverage.settled();
            let moved = settled != kept.stored;
            kept.stored = settled;
            moved.then(|| (disk.clone(), kept.coverage.encode()))
        });
        moved.collect()
    }

    /// Notes that the coverage of a disk was not stored after all.
    pub fn not_stored(&self, disk: &str) {
        if let Some(kept) = self.served().coverage.get_mut(disk) {
            kept.stored = u64::MAX;
        }
    }

    fn served(&self) -> MutexGuard<'_, Served> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how much of a disk must be read, in bytes, served or not.
    pub fn require(&self, disk: &str, bytes: u64) {
        self.served().required.insert(disk.to_owned(), bytes);
    }

    /// How much of a disk must be read, in bytes, once a ticket was made for it.
    pub fn required(&self, disk: &str) -> Option<u64> {
        self.served().required.get(disk).copied()
    }

    /// Notes how much of a disk must still be read, in bytes.
    pub fn count_missing(&self, disk: &str, bytes: u64) {
        self.served().missing.insert(disk.to_owned(), bytes);
    }

    /// Per disk, bytes that must be read and were not, as last counted.
    pub fn missing(&self) -> Vec<(String, u64)> {
        self.served().missing.iter().map(|(disk, bytes)| (disk.clone(), *bytes)).collect()
    }

    /// Notes that a transfer has a ticket.
    pub fn ticketed(&self, transfer: &str) {
        self.served().tickets.insert(transfer.to_owned());
    }

    /// The transfers that have, or had, a ticket.
    pub fn tickets(&self) -> Vec<String> {
        self.served().tickets.iter().cloned().collect()
    }

    /// Notes that a transfer's Secret is made.
    pub fn announce(&self, transfer: &str) {
        self.served().announced.insert(transfer.to_owned());
    }

    /// Whether this process knows that a transfer's Secret is made.
    pub fn is_announced(&self, transfer: &str) -> bool {
        self.served().announced.contains(transfer)
    }

    /// Notes that a client asked for something at `when`.
    pub fn requested(&self, when: Timestamp) {
        let mut served = self.served();
        served.last_request = served.last_request.max(Some(when));
    }

    /// When a client last asked for something.
    pub fn last_request(&self) -> Option<Timestamp> {
        self.served().last_request
    }

    /// Notes whether a transfer is open whose reading cannot be seen (NBD).
    pub fn unseen(&self, transfer: &str, open: bool) {
        let mut served = self.served();
        if open {
            served.unseen.insert(transfer.to_owned());
        } else {
            served.unseen.remove(transfer);
        }
    }

    /// Notes that it ended, if that is news, and tells when it did.
    pub fn ended(&self, now: Timestamp) -> Timestamp {
        *self.served().ended_at.get_or_insert(now)
    }

    /// Notes that it must end for want of scratch space.
    pub fn exhaust(&self, because: Because) {
        self.served().exhausted.get_or_insert(because);
    }

    /// Why it must end for want of scratch space.
    pub fn exhausted(&self) -> Option<Because> {
        self.served().exhausted.clone()
    }

    /// Notes whether libvirt knows its domain at `now`, and tells since when it does not.
    pub fn absent(&self, absent: bool, now: Timestamp) -> Option<Timestamp> {
        let mut served = self.served();
        served.absent_since = absent.then(|| served.absent_since.unwrap_or(now));
        served.absent_since
    }

    /// The transfers that are open and whose reading cannot be seen.
    pub fn unseen_transfers(&self) -> Vec<String> {
        self.served().unseen.iter().cloned().collect()
    }

    /// Whether a transfer is open whose reading cannot be seen.
    pub fn has_unseen(&self) -> bool {
        !self.served().unseen.is_empty()
    }
}

/// Every backup of this node, and what is to be looked at again when one changes.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Mutex<Inner>>,
    wake_backup: UnboundedSender<ObjectRef<VmBackup>>,
    wake_transfer: UnboundedSender<ObjectRef<ImageTransfer>>,
    wake_checkpoint: UnboundedSender<ObjectRef<VmCheckpoint>>,
}

#[derive(Default)]
struct Inner {
    live: HashMap<String, Arc<Live>>,
    transfers: HashMap<String, HashSet<ObjectRef<ImageTransfer>>>,
    /// By the domain's uuid, the uid of the one backup that may work on it.
    claims: HashMap<String, String>,
    checkpoints: HashSet<ObjectRef<VmCheckpoint>>,
}

impl Registry {
    /// An empty one that wakes reconcilers through these channels.
    pub fn new(
        wake_backup: UnboundedSender<ObjectRef<VmBackup>>,
        wake_transfer: UnboundedSender<ObjectRef<ImageTransfer>>,
        wake_checkpoint: UnboundedSender<ObjectRef<VmCheckpoint>>,
    ) -> Self {
        Self { inner: Arc::default(), wake_backup, wake_transfer, wake_checkpoint }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The backup with this uid.
    pub fn find(&self, uid: &str) -> Option<Arc<Live>> {
        self.inner().live.get(uid).cloned()
    }

    /// Adds a backup; the one that is there already wins.
    pub fn insert(&self, uid: &str, live: Live) -> Arc<Live> {
        Arc::clone(self.inner().live.entry(uid.to_owned()).or_insert_with(|| Arc::new(live)))
    }

    /// Claims the domain of `live`, the backup `uid`: only one backup works on a domain at a time. Answers the
    /// one that does, if it is another.
    pub fn claim(&self, uid: &str, live: &Live) -> Option<Arc<Live>> {
        let mut inner = self.inner();
        let holder = inner.claims.entry(live.vm_uuid.clone()).or_insert_with(|| uid.to_owned()).clone();
        if holder == uid { None } else { inner.live.get(&holder).cloned() }
    }

    /// Whether a backup works on a domain.
    pub fn is_claimed(&self, vm_uuid: &str) -> bool {
        self.inner().claims.contains_key(vm_uuid)
    }

    /// Gives up the claim of the backup `uid`, and looks at those that wait for it.
    pub fn unclaim(&self, uid: &str) {
        let mut inner = self.inner();
        let claimed = inner.claims.iter().find(|(_, holder)| *holder == uid).map(|(vm, _)| vm.clone());
        let Some(vm_uuid) = claimed else { return };
        inner.claims.remove(&vm_uuid);
        for (_, live) in inner.live.iter().filter(|(other, live)| *other != uid && live.vm_uuid == vm_uuid) {
            let _ = self.wake_backup.unbounded_send(live.object.clone());
        }
    }

    /// Forgets a backup.
    pub fn remove(&self, uid: &str) {
        self.unclaim(uid);
        let mut inner = self.inner();
        inner.live.remove(uid);
        inner.transfers.remove(uid);
    }

    /// Every backup, with its uid.
    pub fn all(&self) -> Vec<(String, Arc<Live>)> {
        self.inner().live.iter().map(|(uid, live)| (uid.clone(), Arc::clone(live))).collect()
    }

    /// Notes that a transfer belongs to the backup `uid`, so that it is woken with it.
    pub fn follow(&self, uid: &str, transfer: ObjectRef<ImageTransfer>) {
        self.inner().transfers.entry(uid.to_owned()).or_default().insert(transfer);
    }

    /// Notes that a checkpoint waits for this node.
    pub fn await_removal(&self, checkpoint: ObjectRef<VmCheckpoint>) {
        self.inner().checkpoints.insert(checkpoint);
    }

    /// Notes that a checkpoint waits no more.
    pub fn removed(&self, checkpoint: &ObjectRef<VmCheckpoint>) {
        self.inner().checkpoints.remove(checkpoint);
    }

    /// Looks at the backup `uid` again.
    pub fn wake(&self, uid: &str) {
        if let Some(live) = self.find(uid) {
            // a closed channel means that the agent is shutting down, here and below
            let _ = self.wake_backup.unbounded_send(live.object.clone());
        }
    }

    /// Looks at the transfers of the backup `uid` again.
    pub fn wake_transfers(&self, uid: &str) {
        for transfer in self.inner().transfers.get(uid).into_iter().flatten() {
            let _ = self.wake_transfer.unbounded_send(transfer.clone());
        }
    }

    /// Looks at everything again that has to do with a domain; with `None`, at everything.
    pub fn wake_domain(&self, vm_uuid: Option<&str>) {
        let inner = self.inner();
        for live in inner.live.values().filter(|live| vm_uuid.is_none_or(|uuid| live.vm_uuid == uuid)) {
            let _ = self.wake_backup.unbounded_send(live.object.clone());
        }
        for checkpoint in &inner.checkpoints {
            let _ = self.wake_checkpoint.unbounded_send(checkpoint.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::backup::life::Life;
    use crate::api::QuiesceMode;

    fn live(vm_uuid: &str, name: &str) -> Live {
        Live::new(Record {
            uid: name.to_owned(),
            namespace: "vms".to_owned(),
            name: name.to_owned(),
            vm: "db01".to_owned(),
            vm_uuid: vm_uuid.to_owned(),
            bitmap: None,
            base: None,
            disks: Vec::new(),
            all_disks: false,
            marked: false,
            qemu: None,
            quiesce: QuiesceMode::None,
            quiesce_seconds: 10,
            life: Life::default(),
        })
    }

    #[test]
    fn one_backup_of_a_vm_works_and_the_next_is_woken() {
        let (wake, mut woken) = futures::channel::mpsc::unbounded();
        let registry =
            Registry::new(wake, futures::channel::mpsc::unbounded().0, futures::channel::mpsc::unbounded().0);
        let [a, b, other] =
            [("v", "a"), ("v", "b"), ("w", "other")].map(|(vm, name)| registry.insert(name, live(vm, name)));
        let holder = |uid: &str, live: &Live| registry.claim(uid, live).map(|live| live.object.name.clone());
        assert_eq!(holder("a", &a), None);
        assert_eq!(holder("a", &a), None, "it may ask again");
        assert_eq!(holder("b", &b).as_deref(), Some("a"));
        assert_eq!(holder("other", &other), None, "another VM is another matter");
        registry.unclaim("b");
        assert_eq!(holder("b", &b).as_deref(), Some("a"), "who has no claim gives none up");
        registry.remove("a");
        assert_eq!(woken.try_recv().map(|object| object.name).ok().as_deref(), Some("b"));
        assert!(woken.try_recv().is_err(), "nobody else waits");
        assert_eq!(holder("b", &b), None);
    }
}
