//! Names that libvirt's users choose, on their way to object names, log fields, Events and the inventory.
//!
//! The input is split at line ends: each line is the name of a domain.

use std::collections::HashSet;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;
use virtmark::api::{DomainSightingSpec, DomainState, LibvirtDomain, LibvirtDomainSpec};
use virtmark::controller::domain::publish::{Change, Owners, dns_safe, publish};

/// Any name becomes a valid object name; any set of names becomes as many objects, each with a name of its own,
/// and once they are published nothing more is said.
pub fn check(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let names: Vec<&str> = text.split('\n').take(6).collect();
    for name in &names {
        let safe = dns_safe(name);
        assert!(is_object_name(&safe) && safe.len() <= 200, "{name:?} became {safe:?}");
        assert_eq!(dns_safe(&safe), safe, "a safe name stays as it is");
    }
    let sightings: Vec<DomainSightingSpec> =
        names.iter().enumerate().map(|(at, name)| sighting(at, name)).collect();
    let mut world = Vec::new();
    // as they come, one more each time: the names that are taken are taken first
    for seen in [&sightings[..sightings.len() / 2], &sightings[..]] {
        let changes = round(&mut world, seen);
        assert!(changes <= 2 * sightings.len());
        assert_eq!(round(&mut world, seen), 0, "once said, nothing is said again");
        let mut taken = HashSet::new();
        for domain in &world {
            assert!(is_object_name(&domain.name_any()), "{:?}", domain.name_any());
            assert!(taken.insert(domain.name_any()), "two VMs are {:?}", domain.name_any());
        }
        assert!(seen.iter().all(|sighting| world.iter().any(|domain| domain.spec.uuid == sighting.uuid)));
    }
}

/// Uuids whose beginnings are few, so that the longer names are taken too.
fn sighting(at: usize, name: &str) -> DomainSightingSpec {
    let start = ["aaaaaaaa", "bbbbbbbb"][at % 2];
    DomainSightingSpec {
        node_name: format!("node-{}", at % 3),
        uuid: format!("{start}-0000-4000-8000-{at:012x}"),
        name: name.to_owned(),
        state: [DomainState::Running, DomainState::Off, DomainState::Busy][at % 3],
        disks: Vec::new(),
        checkpoints: None,
    }
}

/// Publishes, and applies it as the API server would; how much there was to do.
fn round(world: &mut Vec<LibvirtDomain>, seen: &[DomainSightingSpec]) -> usize {
    let (grace, now) = (SignedDuration::from_secs(60), Timestamp::UNIX_EPOCH);
    let changes = publish(seen, world, &Owners::default(), &HashSet::new(), grace, now);
    let count = changes.len();
    for change in changes {
        match change {
            Change::Delete { name } => world.retain(|domain| domain.name_any() != name),
            Change::Update { name, status } => {
                let known = world.iter_mut().find(|domain| domain.name_any() == name);
                known.expect("only what is published is updated").status = Some(*status);
            }
            Change::Create { name, uuid, status, taken } => {
                assert!(world.iter().all(|domain| domain.name_any() != name), "{name:?} is there already");
                assert!(taken.is_none_or(|taken| is_object_name(&taken) && taken != name));
                let mut domain = LibvirtDomain::new(&name, LibvirtDomainSpec { uuid });
                domain.metadata.generation = Some(1);
                domain.status = Some(*status);
                world.push(domain);
            }
        }
    }
    count
}

/// RFC 1123, as the API server checks it.
fn is_object_name(name: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = name.as_bytes();
    name.len() <= 253
        && bytes.first().copied().is_some_and(letter)
        && bytes.last().copied().is_some_and(letter)
        && bytes.iter().all(|byte| letter(*byte) || *byte == b'-')
}
