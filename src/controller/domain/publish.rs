//! From what the nodes' libvirts say to what users see: a pure function of all sightings to all changes.

use std::collections::{BTreeMap, HashMap, HashSet};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;

use crate::api::conditions::{self, Observation, Standing, Truth};
use crate::api::{
    BackupSupport, BitmapHealth, BitmapOwner, DomainCheckpoint, DomainSightingSpec, DomainState,
    LibvirtDomain, LibvirtDomainStatus, bitmap_prefix,
};
use crate::reason::Reason;

/// One write to the API.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A new domain, under this name. `taken`: the name that it would have had.
    Create {
        /// Its object's name.
        name: String,
        /// Its uuid.
        uuid: String,
        /// Its status.
        status: Box<LibvirtDomainStatus>,
        /// The name that another domain has.
        taken: Option<String>,
    },
    /// Another status.
    Update {
        /// The object's name.
        name: String,
        /// Its status.
        status: Box<LibvirtDomainStatus>,
    },
    /// The domain is gone for good.
    Delete {
        /// The object's name.
        name: String,
    },
}

/// Whose bitmaps are whose.
#[derive(Clone, Debug, Default)]
pub struct Owners {
    /// The cluster's id, by which bitmaps are told that are ours.
    pub cluster: String,
    /// By the uuid of a VM and the name of a bitmap, the VmCheckpoint that names it.
    pub named: HashMap<(String, String), String>,
}

impl Owners {
    /// The checkpoints that a sighting tells of, as users see them; those of `old` until its domain was looked at.
    fn list(&self, sighting: &DomainSightingSpec, old: &[DomainCheckpoint]) -> Vec<DomainCheckpoint> {
        let Some(seen) = &sighting.checkpoints else { return old.to_vec() };
        let prefix = bitmap_prefix(&self.cluster);
        let is_mark = |name: &str| {
            let of = name.rsplit_once('.').map(|(bitmap, _)| bitmap);
            of.is_some_and(|of| of.starts_with(&prefix) && seen.iter().any(|other| other.name == of))
        };
        // what a checkpoint of several disks has beside its bitmaps goes with them
        let all = seen.iter().filter(|one| !is_mark(&one.name)).filter_map(|one| {
            let there = one.disks.iter().filter(|disk| disk.health != BitmapHealth::Missing);
            let disks: Vec<_> = there.map(|disk| disk.target.clone()).collect();
            let is_ours = one.name.starts_with(&prefix);
            let key = (sighting.uuid.clone(), one.name.clone());
            (!disks.is_empty()).then(|| DomainCheckpoint {
                name: one.name.clone(),
                disks,
                owner: if is_ours { BitmapOwner::Virtmark } else { BitmapOwner::Foreign },
                vm_checkpoint: self.named.get(&key).cloned(),
            })
        });
        all.collect()
    }
}

/// A sighting without what no LibvirtDomain shows.
pub fn shown(sighting: &DomainSightingSpec) -> DomainSightingSpec {
    let mut shown = sighting.clone();
    for bitmap in shown.checkpoints.iter_mut().flatten().flat_map(|one| &mut one.disks) {
        (bitmap.dirty_bytes, bitmap.granularity, bitmap.message) = (None, None, None);
    }
    shown
}

/// What must change, deletions first.
pub fn publish(
    sightings: &[DomainSightingSpec],
    published: &[LibvirtDomain],
    owners: &Owners,
    lost_nodes: &HashSet<String>,
    grace: SignedDuration,
    now: Timestamp,
) -> Vec<Change> {
    let mut by_uuid: BTreeMap<&str, Vec<&DomainSightingSpec>> = BTreeMap::new();
    for sighting in sightings.iter().filter(|sighting| !lost_nodes.contains(&sighting.node_name)) {
        by_uuid.entry(&sighting.uuid).or_default().push(sighting);
    }
    let (mut deletions, mut changes) = (Vec::new(), Vec::new());
    let mut names: BTreeMap<String, &str> = BTreeMap::new();
    for domain in published {
        let old = domain.status.clone().unwrap_or_default();
        let seen = by_uuid.get(domain.spec.uuid.as_str());
        let new = match seen.and_then(|seen| winner(seen, old.node_name.as_deref())) {
            Some(sighting) => seen_status(&old, sighting, owners, domain.metadata.generation, now),
            None => unseen_status(&old, lost_nodes, domain.metadata.generation, now),
        };
        let replaced = new.state == Some(DomainState::Missing)
            && by_uuid.iter().any(|(uuid, seen)| {
                *uuid != domain.spec.uuid
                    && seen.iter().any(|sighting| dns_safe(&sighting.name) == domain.name_any())
            });
        if replaced || is_overdue(&new, grace, now) {
            deletions.push(Change::Delete { name: domain.name_any() });
            continue;
        }
        names.insert(domain.name_any(), &domain.spec.uuid);
        if new != old {
            changes.push(Change::Update { name: domain.name_any(), status: Box::new(new) });
        }
    }
    for (uuid, seen) in &by_uuid {
        if published.iter().any(|domain| domain.spec.uuid == *uuid) {
            continue;
        }
        let Some(sighting) = winner(seen, None) else { continue };
        let wanted = dns_safe(&sighting.name);
        let name = free_name(&wanted, uuid, |name| names.contains_key(name));
        let is_taken = name != wanted;
        names.insert(name.clone(), uuid);
        changes.push(Change::Create {
            name,
            uuid: (*uuid).to_owned(),
            status: Box::new(seen_status(&LibvirtDomainStatus::default(), sighting, owners, Some(1), now)),
            taken: is_taken.then_some(wanted),
        });
    }
    deletions.extend(changes);
    deletions
}

/// The node that has the domain `uuid`, whatever it is published as, if one has.
pub fn node_of(sightings: &[DomainSightingSpec], uuid: &str) -> Option<String> {
    let seen: Vec<_> = sightings.iter().filter(|sighting| sighting.uuid == uuid).collect();
    winner(&seen, None).map(|sighting| sighting.node_name.clone())
}

/// Which of several sightings holds: an active one before one that is off; of two active ones, in the middle
/// of a migration, the one that holds already.
fn winner<'a>(seen: &[&'a DomainSightingSpec], holder: Option<&str>) -> Option<&'a DomainSightingSpec> {
    let rank = |sighting: &DomainSightingSpec| {
        (
            sighting.state.is_active(),
            holder == Some(sighting.node_name.as_str()),
            sighting.state == DomainState::Running,
        )
    };
    seen.iter().copied().max_by(|a, b| rank(a).cmp(&rank(b)).then_with(|| b.node_name.cmp(&a.node_name)))
}

fn seen_status(
    old: &LibvirtDomainStatus,
    sighting: &DomainSightingSpec,
    owners: &Owners,
    generation: Option<i64>,
    now: Timestamp,
) -> LibvirtDomainStatus {
    let incremental = sighting.disks.iter().filter(|disk| disk.backup == BackupSupport::Incremental).count();
    let supported = sighting.disks.iter().filter(|disk| disk.backup != BackupSupport::Unsupported).count();
    let mut new = LibvirtDomainStatus {
        observed_generation: generation,
        state: Some(sighting.state),
        node_name: Some(sighting.node_name.clone()),
        domain_name: Some(sighting.name.clone()),
        incremental: Some(format!("{incremental}/{supported}")),
        disks: sighting.disks.clone(),
        checkpoints: owners.list(sighting, &old.checkpoints),
        ..old.clone()
    };
    let (standing, reason, message) = match (sighting.state, supported) {
        (_, 0) => {
            (Standing::Stuck, Reason::DiskNotSupported.as_str(), "it has no disk that can be backed up")
        }
        (DomainState::Running | DomainState::Paused, _) => {
            (Standing::Good, "Running", "a backup of it can start")
        }
        (DomainState::Off, _) => (Standing::Idle, Reason::VmNotRunning.as_str(), "it is off"),
        _ => (
            Standing::OnItsWay,
            Reason::VmBusy.as_str(),
            "it is starting, stopping, migrating or paused by an error",
        ),
    };
    conditions::stand(&mut new.conditions, standing, reason, message, Observation { generation, now });
    new.conditions.retain(|condition| condition.type_ != MISSING);
    new
}

fn unseen_status(
    old: &LibvirtDomainStatus,
    lost_nodes: &HashSet<String>,
    generation: Option<i64>,
    now: Timestamp,
) -> LibvirtDomainStatus {
    let lost = old.node_name.as_ref().is_some_and(|node| lost_nodes.contains(node));
    let (state, reason, message) = if lost {
        (DomainState::NodeLost, Reason::NodeLost, "its node is gone")
    } else {
        (DomainState::Missing, Reason::VmNotFound, "no node's libvirt knows it any more")
    };
    let mut new = LibvirtDomainStatus { state: Some(state), observed_generation: generation, ..old.clone() };
    let seen = Observation { generation, now };
    conditions::stand(&mut new.conditions, Standing::Stuck, reason.as_str(), message, seen);
    if state == DomainState::NodeLost {
        new.conditions.retain(|condition| condition.type_ != MISSING);
    } else {
        // a time of its own, so that the grace counts from here although Ready was False before
        let why = reason.as_str();
        conditions::set(&mut new.conditions, MISSING, Truth::True, why, message, generation, now);
    }
    new
}

/// The condition that tells since when a domain is seen nowhere.
const MISSING: &str = "Missing";

fn is_overdue(status: &LibvirtDomainStatus, grace: SignedDuration, now: Timestamp) -> bool {
    if status.state != Some(DomainState::Missing) {
        return false;
    }
    let since = conditions::get(&status.conditions, MISSING).map(|missing| missing.last_transition_time.0);
    since.is_some_and(|since| now.duration_since(since) >= grace)
}

/// The first that nobody has of: the name, with the start of the uuid, with all of it, with a number. A VM's name
/// may be chosen so that it takes the longer ones, too.
fn free_name(wanted: &str, uuid: &str, taken: impl Fn(&str) -> bool) -> String {
    let short = uuid.get(..8).unwrap_or(uuid);
    let first = [wanted.to_owned(), format!("{wanted}-{short}"), format!("{wanted}-{uuid}")];
    let more = (2_u32..).map(|number| format!("{wanted}-{uuid}-{number}"));
    first.into_iter().chain(more).find(|name| !taken(name)).unwrap_or_default()
}

/// A libvirt name as an object's name: lower case, everything else a dash, at most 200 characters.
pub fn dns_safe(name: &str) -> String {
    let safe: String = name
        .chars()
        .map(|c| c.to_ascii_lowercase())
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let safe: String = safe.trim_matches('-').chars().take(200).collect();
    let safe = safe.trim_end_matches('-');
    if safe.is_empty() { "vm".to_owned() } else { safe.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "aaaaaaaa-0000-4000-8000-000000000001";
    const B: &str = "bbbbbbbb-0000-4000-8000-000000000002";

    fn sighting(node: &str, uuid: &str, name: &str, state: DomainState) -> DomainSightingSpec {
        DomainSightingSpec {
            node_name: node.into(),
            uuid: uuid.into(),
            name: name.into(),
            state,
            disks: vec![],
            checkpoints: None,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// Applies what is published, as the API would.
    fn apply(world: &mut Vec<LibvirtDomain>, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Delete { name } => world.retain(|domain| domain.name_any() != name),
                Change::Update { name, status } => {
                    let domain = world.iter_mut().find(|domain| domain.name_any() == name).unwrap();
                    domain.status = Some(*status);
                }
                Change::Create { name, uuid, status, .. } => {
                    let mut domain = LibvirtDomain::new(&name, crate::api::LibvirtDomainSpec { uuid });
                    domain.metadata.generation = Some(1);
                    domain.status = Some(*status);
                    world.push(domain);
                }
            }
        }
    }

    fn round(world: &mut Vec<LibvirtDomain>, sightings: &[DomainSightingSpec], lost: &[&str], now: i64) {
        let lost = lost.iter().map(|node| (*node).to_owned()).collect();
        let owners = Owners {
            cluster: "0a1b2c3d".to_owned(),
            named: HashMap::from([((A.to_owned(), "virtmark-0a1b2c3d-x".to_owned()), "x".to_owned())]),
        };
        let changes = publish(sightings, world, &owners, &lost, SignedDuration::from_secs(60), at(now));
        apply(world, changes);
        let again = publish(sightings, world, &owners, &lost, SignedDuration::from_secs(60), at(now));
        assert_eq!(again, [], "once said, nothing is said again");
    }

    fn holder<'a>(world: &'a [LibvirtDomain], name: &str) -> Option<(&'a str, DomainState)> {
        let status = world.iter().find(|domain| domain.name_any() == name)?.status.as_ref()?;
        Some((status.node_name.as_deref()?, status.state?))
    }

    #[test]
    fn active_beats_off_and_a_migration_moves_it_when_the_source_leaves() {
        let mut world = vec![];
        let off = sighting("node-a", A, "db01", DomainState::Off);
        let on_a = sighting("node-a", A, "db01", DomainState::Running);
        let on_b = sighting("node-b", A, "db01", DomainState::Running);
        round(&mut world, &[off.clone(), on_b.clone()], &[], 1);
        assert_eq!(holder(&world, "db01"), Some(("node-b", DomainState::Running)));
        assert_eq!(node_of(&[off, on_b.clone()], A).as_deref(), Some("node-b"));
        assert_eq!(node_of(std::slice::from_ref(&on_b), B), None);
        round(&mut world, &[on_a.clone(), on_b], &[], 2);
        assert_eq!(holder(&world, "db01"), Some(("node-b", DomainState::Running)), "the holder stays");
        round(&mut world, &[on_a], &[], 3);
        assert_eq!(holder(&world, "db01"), Some(("node-a", DomainState::Running)), "until it leaves");
    }

    #[test]
    fn a_name_that_is_taken_gets_the_uuids_start() {
        let mut world = vec![];
        let both = [
            sighting("node-a", A, "DB_01", DomainState::Running),
            sighting("node-b", B, "db.01", DomainState::Running),
        ];
        round(&mut world, &both, &[], 1);
        let mut names: Vec<_> = world.iter().map(kube::ResourceExt::name_any).collect();
        names.sort();
        assert_eq!(names, ["db-01", "db-01-bbbbbbbb"]);
    }

    #[test]
    fn a_name_that_another_took_on_purpose_does_not_keep_a_vm_out() {
        let mut world = vec![];
        let running = |uuid, name: &str| sighting("node-a", uuid, name, DomainState::Running);
        let c = "cccccccc-0000-4000-8000-000000000003";
        let squatters = [running(A, "db01"), running(c, "db01-bbbbbbbb")];
        round(&mut world, &squatters, &[], 1);
        round(&mut world, &[&squatters[..], &[running(B, "db01")]].concat(), &[], 2);
        let name = format!("db01-{B}");
        assert_eq!(holder(&world, &name), Some(("node-a", DomainState::Running)));
    }

    #[test]
    fn a_vm_that_is_gone_is_missing_and_then_deleted() {
        let mut world = vec![];
        round(&mut world, &[sighting("node-a", A, "db01", DomainState::Off)], &[], 1);
        round(&mut world, &[], &[], 10);
        assert_eq!(holder(&world, "db01"), Some(("node-a", DomainState::Missing)));
        round(&mut world, &[], &[], 69);
        assert_eq!(world.len(), 1);
        round(&mut world, &[], &[], 70);
        assert!(world.is_empty());
    }

    #[test]
    fn a_vm_that_comes_back_has_the_whole_grace_when_it_goes_again() {
        let mut world = vec![];
        let seen = [sighting("node-a", A, "db01", DomainState::Off)];
        round(&mut world, &seen, &[], 1);
        round(&mut world, &[], &[], 10);
        round(&mut world, &seen, &[], 11);
        let status = world[0].status.as_ref().unwrap();
        assert!(conditions::get(&status.conditions, MISSING).is_none(), "it is there");
        round(&mut world, &[], &[], 100);
        assert_eq!(holder(&world, "db01"), Some(("node-a", DomainState::Missing)));
    }

    #[test]
    fn what_waiting_cannot_mend_is_stalled_and_a_vm_that_is_off_is_neither() {
        let disk = serde_json::json!({"target": "vda", "format": "qcow2", "backup": "Incremental"});
        let disk: crate::api::DomainDisk = serde_json::from_value(disk).unwrap();
        let said = |state, disks: &[crate::api::DomainDisk]| {
            let sighting = DomainSightingSpec { disks: disks.to_vec(), ..sighting("n", A, "db01", state) };
            let status =
                seen_status(&LibvirtDomainStatus::default(), &sighting, &Owners::default(), Some(1), at(1));
            [conditions::READY, conditions::RECONCILING, conditions::STALLED]
                .map(|kind| conditions::is_true(&status.conditions, kind))
        };
        let disks = [disk];
        assert_eq!(said(DomainState::Running, &disks), [true, false, false]);
        assert_eq!(said(DomainState::Paused, &disks), [true, false, false]);
        assert_eq!(said(DomainState::Busy, &disks), [false, true, false]);
        assert_eq!(said(DomainState::Off, &disks), [false, false, false]);
        assert_eq!(said(DomainState::Running, &[]), [false, false, true]);
    }

    #[test]
    fn every_checkpoint_is_listed_ours_orphans_and_those_of_others() {
        let mut world = vec![];
        let plain = sighting("node-a", A, "db01", DomainState::Running);
        let bitmap = |target: &str, health: &str| {
            serde_json::json!({"target": target, "health": health,
            "dirtyBytes": 65536, "granularity": 65536})
        };
        let checkpoints = serde_json::json!([
            {"name": "virtmark-0a1b2c3d-gone", "disks": [bitmap("vda", "Missing")]},
            {"name": "virtmark-0a1b2c3d-orphan", "disks": [bitmap("vda", "Broken"), bitmap("vdb", "Unknown")]},
            {"name": "virtmark-0a1b2c3d-x", "disks": [bitmap("vda", "Whole"), bitmap("vdb", "Missing")]},
            {"name": "virtmark-ffffffff-y", "disks": [bitmap("vda", "Unknown")]},
            {"name": "virtnbdbackup.0", "disks": [bitmap("vda", "Unknown")]}]);
        let checkpoints = Some(serde_json::from_value(checkpoints).unwrap());
        let looked = DomainSightingSpec { checkpoints, ..plain.clone() };
        round(&mut world, std::slice::from_ref(&looked), &[], 1);
        let listed = |world: &[LibvirtDomain]| -> Vec<(String, String, BitmapOwner, Option<String>)> {
            let all = world[0].status.clone().unwrap().checkpoints.into_iter();
            all.map(|one| (one.name, one.disks.join(","), one.owner, one.vm_checkpoint)).collect()
        };
        let row = |name: &str, disks: &str, owner, vmcp: Option<&str>| {
            (name.to_owned(), disks.to_owned(), owner, vmcp.map(str::to_owned))
        };
        let expected = [
            row("virtmark-0a1b2c3d-orphan", "vda,vdb", BitmapOwner::Virtmark, None),
            row("virtmark-0a1b2c3d-x", "vda", BitmapOwner::Virtmark, Some("x")),
            row("virtmark-ffffffff-y", "vda", BitmapOwner::Foreign, None),
            row("virtnbdbackup.0", "vda", BitmapOwner::Foreign, None),
        ];
        assert_eq!(listed(&world), expected);
        assert_eq!(shown(&looked), shown(&shown(&looked)));
        assert!(shown(&looked).checkpoints.unwrap()[2].disks[0].dirty_bytes.is_none());

        // on another node it was not looked at yet
        round(&mut world, &[DomainSightingSpec { node_name: "node-b".to_owned(), ..plain }], &[], 2);
        assert_eq!(listed(&world), expected);
    }

    #[test]
    fn a_lost_node_does_not_make_its_vms_missing() {
        let mut world = vec![];
        let on_a = [sighting("node-a", A, "db01", DomainState::Running)];
        round(&mut world, &on_a, &[], 1);
        round(&mut world, &on_a, &["node-a"], 2);
        assert_eq!(holder(&world, "db01"), Some(("node-a", DomainState::NodeLost)));
        round(&mut world, &on_a, &["node-a"], 9999);
        assert_eq!(world.len(), 1, "for as long as it takes");
    }

    #[test]
    fn a_new_vm_of_the_same_name_takes_it_over() {
        let mut world = vec![];
        round(&mut world, &[sighting("node-a", A, "db01", DomainState::Off)], &[], 1);
        round(&mut world, &[sighting("node-a", B, "db01", DomainState::Running)], &[], 2);
        assert_eq!(world.len(), 1);
        assert_eq!(world[0].spec.uuid, B);
        assert_eq!(world[0].name_any(), "db01");
    }

    #[test]
    fn any_libvirt_name_becomes_an_object_name() {
        let long = "x".repeat(500);
        for (name, expected) in [
            ("db01", "db01"),
            ("../etc", "etc"),
            ("Ü ß", "vm"),
            ("a_b.C", "a-b-c"),
            ("-", "vm"),
            (&long, &long[..200]),
        ] {
            assert_eq!(dns_safe(name), expected, "{name}");
        }
    }
}
