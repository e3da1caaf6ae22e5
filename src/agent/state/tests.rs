use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::agent::backup::life::Life;
use crate::api::QuiesceMode;

#[test]
fn only_uids_become_paths() {
    for bad in
        ["", "..", "a/b", "../../etc/passwd-aaaaaaaaaaaaaaaaaaaaaaa", "g0000000-0000-0000-0000-000000000000"]
    {
        assert!(checked(bad).is_err(), "{bad}");
    }
    assert!(checked("0f000000-0000-4000-8000-00000000000a").is_ok());
}

#[test]
fn a_broken_record_is_reported_and_hides_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s"), &dir.path().join("r")).unwrap();
    let uid = "00000000-0000-4000-8000-000000000001";
    let record = record(uid);
    state.store(&record).unwrap();
    let other = dir.path().join("s/backups/00000000-0000-4000-8000-000000000002");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("record.json"), b"{\"uid\":").unwrap();
    // begun, and no record stored yet: nothing was done for it
    fs::create_dir(dir.path().join("s/backups/00000000-0000-4000-8000-000000000003")).unwrap();
    let (records, broken) = state.records().unwrap();
    assert_eq!(records, vec![record]);
    assert_eq!(broken.len(), 1);
    assert_eq!(fs::read_dir(dir.path().join("s/backups")).unwrap().count(), 2);
    state.forget(uid).unwrap();
    state.forget(uid).unwrap();
    assert!(state.records().unwrap().0.is_empty());
}

const ONE: &str = "00000000-0000-4000-8000-000000000001";

fn record(uid: &str) -> Record {
    Record {
        uid: uid.into(),
        namespace: "n".into(),
        name: "b".into(),
        vm: "v".into(),
        vm_uuid: uid.into(),
        bitmap: None,
        base: None,
        disks: vec![],
        all_disks: false,
        marked: false,
        qemu: None,
        quiesce: QuiesceMode::None,
        quiesce_seconds: 1,
        life: Life::default(),
    }
}

#[test]
fn a_record_that_leads_elsewhere_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s"), &dir.path().join("r")).unwrap();
    let good = record(ONE);
    let disk = |target: &str, image: &str| PlannedDisk {
        target: target.into(),
        size: 1,
        image: Some(image.into()),
        in_checkpoint: true,
        incremental: false,
        full_because: None,
        changed_from: None,
        mark: None,
    };
    for bad in [
        Record { vm_uuid: "..".into(), ..good.clone() },
        Record { name: "../x".into(), ..good.clone() },
        Record { namespace: String::new(), ..good.clone() },
        Record { bitmap: Some("a b".into()), ..good.clone() },
        Record {
            base: Some(Base {
                bitmap: "<x>".into(),
                created: 1,
                strict: false,
                noted: None,
                marks: Default::default(),
                sizes: Default::default(),
            }),
            ..good.clone()
        },
        Record { disks: vec![disk("../vda", "/i")], ..good.clone() },
        Record { disks: vec![disk("vda", "json:{}")], ..good.clone() },
    ] {
        assert!(bad.unsound().is_some() && state.store(&bad).is_err(), "{bad:?}");
        state.store(&good).unwrap();
        let path = dir.path().join("s/backups").join(ONE).join(RECORD);
        fs::write(path, serde_json::to_vec(&bad).unwrap()).unwrap();
        let (records, broken) = state.records().unwrap();
        assert!(records.is_empty() && matches!(broken[..], [StateError::Foreign { .. }]), "{broken:?}");
    }
    state.store(&Record { disks: vec![disk("vda", "/i")], ..good }).unwrap();
    assert_eq!(state.records().unwrap().0.len(), 1);
}

#[test]
fn an_orphan_is_kept_until_it_is_forgotten_and_one_that_lies_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s"), &dir.path().join("r")).unwrap();
    let good = Record { bitmap: Some("virtmark-1".into()), ..record(ONE) };
    state.store_orphan(&good).unwrap();
    let orphans = dir.path().join("s/orphans");
    fs::write(orphans.join("00000000-0000-4000-8000-000000000002.json"), serde_json::to_vec(&good).unwrap())
        .unwrap();
    fs::write(orphans.join("00000000-0000-4000-8000-000000000003.json"), "{").unwrap();
    assert_eq!(state.orphans().unwrap(), [good]);
    assert!(state.records().unwrap().0.is_empty(), "it is no backup that lives");
    state.forget_orphan(ONE).unwrap();
    state.forget_orphan(ONE).unwrap();
    assert!(state.orphans().unwrap().is_empty());
}

#[test]
fn a_run_folder_is_new_and_what_was_there_is_gone_but_nothing_outside() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s"), &dir.path().join("r")).unwrap();
    let outside = dir.path().join("outside");
    fs::write(&outside, "as it was").unwrap();
    // what a QEMU may do in a folder that is its own
    let run = state.make_run(ONE).unwrap();
    symlink(&outside, run.join("vda.scratch")).unwrap();
    assert_eq!(fs::read_dir(state.make_run(ONE).unwrap()).unwrap().count(), 0);
    // and what somebody put in its place
    state.remove_run(ONE).unwrap();
    symlink(dir.path(), &run).unwrap();
    assert_eq!(state.make_run(ONE).unwrap(), run);
    assert!(fs::symlink_metadata(&run).unwrap().is_dir());
    state.remove_run(ONE).unwrap();
    fs::write(&run, "a file").unwrap();
    assert_eq!(state.stray_runs().unwrap(), [ONE]);
    state.remove_run(ONE).unwrap();
    assert!(state.stray_runs().unwrap().is_empty());
    assert_eq!(fs::read_to_string(&outside).unwrap(), "as it was");
}

#[test]
fn one_agent_at_a_time_works_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s"), &dir.path().join("r")).unwrap();
    let held = state.lock().unwrap();
    assert!(held.is_some());
    assert!(state.lock().unwrap().is_none(), "a second one got it too");
    drop(held);
    assert!(state.lock().unwrap().is_some(), "nobody has it any more");
}
