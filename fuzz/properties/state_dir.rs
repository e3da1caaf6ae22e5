//! A state directory and a run directory with anything in them: foreign files, links to elsewhere, FIFOs, folders where
//! files should be. The input is a script of what to put where.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use arbitrary::Unstructured;
use rustix::fs::{CWD, FileType, Mode};
use virtmark::agent::backup::life::Life;
use virtmark::agent::state::{Base, PlannedDisk, Record, StateDir};
use virtmark::agent::transfer::StoredTicket;
use virtmark::api::QuiesceMode;
use virtmark::imageio::Access;

use super::number;

const ONE: &str = "00000000-0000-4000-8000-000000000001";
const TWO: &str = "00000000-0000-4000-8000-000000000002";

/// Places, from the directory that holds both.
const PLACES: &[&str] = &[
    "state",
    "state/backups",
    "state/backups/00000000-0000-4000-8000-000000000001",
    "state/backups/00000000-0000-4000-8000-000000000001/record.json",
    "state/backups/00000000-0000-4000-8000-000000000001/record.json.partial",
    "state/backups/00000000-0000-4000-8000-000000000001/coverage-vda",
    "state/backups/00000000-0000-4000-8000-000000000001/coverage-vda.partial",
    "state/backups/00000000-0000-4000-8000-000000000001/ticket-00000000-0000-4000-8000-000000000002.json",
    "state/backups/00000000-0000-4000-8000-000000000001/ticket-..json",
    "state/backups/00000000-0000-4000-8000-000000000001/ticket-00000000-0000-4000-8000-000000000002.json.partial",
    "state/backups/00000000-0000-4000-8000-000000000002",
    "state/backups/00000000-0000-4000-8000-000000000002/record.json",
    "state/backups/00000000-0000-4000-8000-000000000003",
    "state/backups/lost+found",
    "state/backups/\u{1F4BE}\n",
    "run",
    "run/00000000-0000-4000-8000-000000000001",
    "run/00000000-0000-4000-8000-000000000001/vda.scratch",
    "run/00000000-0000-4000-8000-000000000002",
    "run/00000000-0000-4000-8000-000000000002/nbd.sock",
    "run/00000000-0000-4000-8000-000000000002/deeper/still",
    "run/00000000-0000-4000-8000-000000000003",
    "run/imageio.sock",
];

/// Opening it, taking up what is there, working with it and sweeping it neither panics nor waits, and what is outside
/// stays as it was. What was stored is read again, whatever was in its place.
pub fn check(input: &[u8]) {
    let holder = super::scratch();
    let (dir, outside) = (holder.path().join("in"), holder.path().join("out"));
    fs::create_dir(&dir).and_then(|()| fs::create_dir(&outside)).expect("an empty directory");
    for name in ["record.json", "vda.scratch", "coverage-vda"] {
        fs::write(outside.join(name), serde_json::to_vec(&record(TWO, "vda")).expect("JSON"))
            .expect("a file");
    }
    fs::create_dir(outside.join(ONE)).expect("a folder");
    let mut script = Unstructured::new(input);
    while !script.is_empty() {
        let (place, kind): (u8, u8) = (number(&mut script), number(&mut script));
        let place = dir.join(PLACES[usize::from(place) % PLACES.len()]);
        put(&place, kind, &outside, &mut script);
    }
    let before = seen(&outside);
    work(&dir);
    assert!(seen(&outside) == before, "what is outside was touched: {:?}", names(&outside));
}

/// Puts something there, if nothing is in the way.
fn put(place: &Path, kind: u8, outside: &Path, script: &mut Unstructured<'_>) {
    let Some(parent) = place.parent() else { return };
    // never outside: an earlier link is not followed by the test either
    let made =
        fs::create_dir_all(parent).and_then(|()| Ok((parent.canonicalize()?, outside.canonicalize()?)));
    if made.is_err() || made.is_ok_and(|(parent, outside)| parent.starts_with(outside)) {
        return;
    }
    let special = |kind| rustix::fs::mknodat(CWD, place, kind, Mode::RUSR | Mode::WUSR, 0);
    // whatever is there already stays
    match kind % 16 {
        8 => drop(symlink(outside, place)),
        9 => drop(symlink(outside.join("record.json"), place)),
        10 => drop(symlink(outside.join(ONE), place)),
        11 => drop(symlink(place.file_name().unwrap_or_default(), place)),
        12 => drop(fs::create_dir(place)),
        13 => assert!(special(FileType::Fifo).is_ok() || place.symlink_metadata().is_ok()),
        14 => assert!(special(FileType::Socket).is_ok() || place.symlink_metadata().is_ok()),
        15 if place.symlink_metadata().is_ok_and(|found| !found.is_symlink()) => {
            fs::set_permissions(place, fs::Permissions::from_mode(0o777)).expect("a mode");
        }
        file => drop(
            fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(place)
                .and_then(|mut open| open.write_all(&content(file, script))),
        ),
    }
}

fn content(kind: u8, script: &mut Unstructured<'_>) -> Vec<u8> {
    let text = |uid, target| serde_json::to_vec(&record(uid, target)).expect("JSON");
    match kind {
        0 => text(ONE, "vda"),
        1 => text(TWO, "vda"),
        2 => text(ONE, "../../../../out/vda"),
        3 => text("../../../out", "vda"),
        4 => vec![b'['; 4096],
        5 => vec![b'['; (1 << 20) + 1],
        6 => {
            let (whole, at) = (text(ONE, "vda"), usize::from(number::<u8>(script)));
            whole[..at.min(whole.len())].to_vec()
        }
        _ => {
            let most = usize::from(number::<u8>(script));
            script.bytes(most.min(script.len())).unwrap_or_default().to_vec()
        }
    }
}

/// What an agent does with its directories, from its start to the end of a backup.
fn work(dir: &Path) {
    let Ok(state) = StateDir::open(&dir.join("state"), &dir.join("run")) else { return };
    let (records, _) = state.records().expect("a directory that was just opened");
    for record in &records {
        assert!(record.unsound().is_none() && (record.uid == ONE || record.uid == TWO));
        assert!(
            fs::symlink_metadata(dir.join("state/backups").join(&record.uid))
                .is_ok_and(|found| found.is_dir())
        );
        let socket = state.socket_of(&record.uid).expect("a uid");
        assert!(socket.starts_with(dir.join("run")));
        for (transfer, stored) in state.tickets::<StoredTicket>(&record.uid).unwrap_or_default() {
            let ticket = &stored.ticket;
            let reads = ticket.access == Access::Read && ticket.size == record.disks[0].size;
            assert!(!stored.is_of(&transfer, record, &socket) || reads);
        }
        for disk in &record.disks {
            assert_eq!(state.scratch_of(&record.uid, &disk.target).expect("a uid").parent(), socket.parent());
            let _ = state.coverage(&record.uid, &disk.target);
        }
    }
    for uid in state.stray_runs().expect("a directory that was just opened") {
        assert!(records.iter().all(|record| record.uid != uid));
        state.remove_run(&uid).expect("removed");
        assert!(fs::symlink_metadata(dir.join("run").join(uid)).is_err());
    }
    let one = record(ONE, "vda");
    if state.store(&one).is_ok() {
        assert!(state.records().expect("the directory").0.contains(&one));
        if state.store_coverage(ONE, "vda", b"covered").is_ok() {
            assert_eq!(state.coverage(ONE, "vda").as_deref(), Some(&b"covered"[..]));
        }
        if state.store_ticket(ONE, TWO, &"ticket").is_ok() {
            let tickets = state.tickets::<String>(ONE).expect("the folder");
            assert!(tickets.contains(&(TWO.to_owned(), "ticket".to_owned())));
        }
        state.remove_ticket(ONE, TWO).expect("removed");
        assert!(
            state.tickets::<String>(ONE).expect("the folder").iter().all(|(transfer, _)| transfer != TWO)
        );
    }
    let run = state.make_run(ONE).expect("a new folder");
    assert!(fs::read_dir(&run).expect("it").next().is_none(), "it is empty");
    for uid in [ONE, TWO] {
        state.remove_run(uid).expect("removed");
        state.forget(uid).expect("forgotten");
        for path in [dir.join("run").join(uid), dir.join("state/backups").join(uid)] {
            assert!(fs::symlink_metadata(&path).is_err(), "{}", path.display());
        }
    }
}

fn record(uid: &str, target: &str) -> Record {
    let disk = PlannedDisk {
        target: target.into(),
        size: 4096,
        image: Some("/image".into()),
        in_checkpoint: true,
        incremental: true,
        full_because: None,
        changed_from: None,
        mark: None,
    };
    Record {
        uid: uid.into(),
        namespace: "n".into(),
        name: "b".into(),
        vm: "v".into(),
        vm_uuid: TWO.into(),
        bitmap: Some("virtmark-1".into()),
        base: Some(Base {
            bitmap: "virtmark-0".into(),
            created: 1,
            strict: false,
            noted: None,
            marks: Default::default(),
            sizes: Default::default(),
        }),
        disks: vec![disk],
        all_disks: false,
        marked: false,
        qemu: None,
        quiesce: QuiesceMode::None,
        quiesce_seconds: 1,
        life: Life::default(),
    }
}

fn names(outside: &Path) -> Vec<(PathBuf, u32)> {
    seen(outside).into_iter().map(|(path, mode, _)| (path, mode)).collect()
}

/// Everything in a folder: path, mode, content.
fn seen(dir: &Path) -> Vec<(PathBuf, u32, Vec<u8>)> {
    let mode = |path: &Path| fs::symlink_metadata(path).expect("an entry").permissions().mode();
    let mut all = vec![(dir.to_owned(), mode(dir), Vec::new())];
    for entry in fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            all.extend(seen(&path));
        } else {
            all.push((path.clone(), mode(&path), fs::read(&path).expect("a file")));
        }
    }
    all.sort();
    all
}
