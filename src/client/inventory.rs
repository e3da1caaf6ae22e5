//! VMs, their disks and their checkpoints as lists, and which checkpoints a purge takes. Pure: objects in, lists out.

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

use super::output::{List, value};
use super::words;
use crate::api::{LABEL_OWNER, LibvirtDomain, VmCheckpoint, conditions};

/// The VMs.
#[must_use]
pub fn vms(domains: &[LibvirtDomain]) -> List<'static> {
    let row = |domain: &LibvirtDomain| {
        let status = domain.status.clone().unwrap_or_default();
        vec![
            domain.name_any(),
            status.state.map(|state| state.as_str().to_owned()).unwrap_or_default(),
            status.node_name.unwrap_or_default(),
            status.incremental.unwrap_or_default(),
            status.last_backup_time.map(|time| time.0.to_string()).unwrap_or_default(),
            status.disks.iter().map(|disk| disk.target.as_str()).collect::<Vec<_>>().join(","),
            status.last_backup.unwrap_or_default(),
            domain.spec.uuid.clone(),
        ]
    };
    let columns = &["NAME", "STATE", "NODE", "INCREMENTAL", "LAST-BACKUP", "DISKS", "BACKUP", "UUID"];
    List { columns, narrow: 5, rows: domains.iter().map(row).collect(), value: value(&domains) }
}

/// The disks of a VM.
#[must_use]
pub fn disks(domain: &LibvirtDomain) -> List<'static> {
    let status = domain.status.clone().unwrap_or_default();
    let rows = status.disks.iter().map(|disk| {
        let size = disk.size.and_then(|size| u64::try_from(size).ok()).map(words::bytes);
        vec![
            disk.target.clone(),
            size.unwrap_or_default(),
            disk.format.clone(),
            format!("{:?}", disk.backup),
            disk.reason.clone().unwrap_or_default(),
            disk.serial.clone().unwrap_or_default(),
            disk.backing_chain.first().map(|layer| layer.file.clone()).unwrap_or_default(),
        ]
    });
    let columns = &["DISK", "SIZE", "FORMAT", "BACKUP", "REASON", "SERIAL", "FILE"];
    List { columns, narrow: 5, rows: rows.collect(), value: value(&status.disks) }
}

/// The checkpoints, oldest first.
#[must_use]
pub fn checkpoints(found: &[VmCheckpoint]) -> List<'static> {
    let mut found = found.to_vec();
    found.sort_by_key(|checkpoint| (checkpoint.spec.vm.clone(), checkpoint.spec.creation_time.0));
    let row = |checkpoint: &VmCheckpoint| {
        let status = checkpoint.status.clone().unwrap_or_default();
        let usable = conditions::get(&status.conditions, conditions::USABLE);
        vec![
            checkpoint.name_any(),
            checkpoint.spec.vm.clone(),
            status.parent.unwrap_or_default(),
            status.base.map(|base| format!("{base:?}")).unwrap_or_default(),
            usable.map(|usable| usable.status.clone()).unwrap_or_default(),
            status.dirty.unwrap_or_default(),
            checkpoint.spec.creation_time.0.to_string(),
            usable.map(|usable| usable.reason.clone()).unwrap_or_default(),
            checkpoint.labels().get(LABEL_OWNER).cloned().unwrap_or_default(),
            checkpoint.spec.bitmap.clone(),
        ]
    };
    let columns = &["NAME", "VM", "PARENT", "BASE", "USABLE", "DIRTY", "TAKEN", "REASON", "OWNER", "BITMAP"];
    List { columns, narrow: 7, rows: found.iter().map(row).collect(), value: value(&found) }
}

/// Which checkpoints a purge takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Those that are older than so many days.
    Days(u32),
    /// All but the newest so many.
    Keep(usize),
}

/// The names of the checkpoints that a purge of one VM and owner takes, oldest first.
#[must_use]
pub fn purged(
    found: &[VmCheckpoint],
    vm: &str,
    owner: Option<&str>,
    rule: Rule,
    now: Timestamp,
) -> Vec<String> {
    let is_meant = |checkpoint: &&VmCheckpoint| {
        checkpoint.spec.vm == vm && checkpoint.labels().get(LABEL_OWNER).map(String::as_str) == owner
    };
    let mut meant: Vec<_> = found.iter().filter(is_meant).collect();
    meant.sort_by_key(|checkpoint| checkpoint.spec.creation_time.0);
    let taken = match rule {
        Rule::Keep(count) => meant.len().saturating_sub(count),
        Rule::Days(days) => {
            let oldest = now.as_second() - i64::from(days) * 86_400;
            meant.iter().take_while(|checkpoint| checkpoint.spec.creation_time.0.as_second() < oldest).count()
        }
    };
    meant.iter().take(taken).map(|checkpoint| checkpoint.name_any()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(name: &str, vm: &str, day: u32, owner: Option<&str>) -> VmCheckpoint {
        let mut found: VmCheckpoint = serde_json::from_value(serde_json::json!({
            "metadata": {"name": name},
            "spec": {"vm": vm, "vmUuid": "u", "bitmap": "b", "disks": [],
                "creationTime": format!("2026-11-{day:02}T00:00:00Z")}
        }))
        .unwrap();
        if let Some(owner) = owner {
            found.labels_mut().insert(LABEL_OWNER.to_owned(), owner.to_owned());
        }
        found
    }

    #[test]
    fn a_purge_takes_the_oldest_of_one_vm_and_owner() {
        let found = [
            checkpoint("c", "db01", 20, None),
            checkpoint("a", "db01", 1, None),
            checkpoint("b", "db01", 10, None),
            checkpoint("x", "web", 1, None),
            checkpoint("y", "db01", 1, Some("other")),
        ];
        let now = "2026-11-21T00:00:00Z".parse().unwrap();
        for (rule, owner, names) in [
            (Rule::Keep(1), None, vec!["a", "b"]),
            (Rule::Keep(3), None, vec![]),
            (Rule::Keep(0), None, vec!["a", "b", "c"]),
            (Rule::Days(7), None, vec!["a", "b"]),
            (Rule::Days(11), None, vec!["a"]),
            (Rule::Days(40), None, vec![]),
            (Rule::Keep(0), Some("other"), vec!["y"]),
        ] {
            assert_eq!(purged(&found, "db01", owner, rule, now), names, "{rule:?} {owner:?}");
        }
        let list = checkpoints(&found);
        assert_eq!(
            list.rows.iter().map(|row| row[0].as_str()).collect::<Vec<_>>(),
            ["a", "y", "b", "c", "x"]
        );
    }

    #[test]
    fn lists_of_what_says_nothing_yet() {
        let domain =
            LibvirtDomain::new("db01", serde_json::from_value(serde_json::json!({"uuid": "u"})).unwrap());
        assert_eq!(vms(std::slice::from_ref(&domain)).rows[0][0], "db01");
        assert!(disks(&domain).rows.is_empty());
    }
}
