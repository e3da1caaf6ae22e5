//! The client before an API server that answers late, wrongly, or not at all: what was read to its end is never lost, and what
//! was not is never published. With a real one it is in `tests/client`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::args;
use super::backup::{Session, Wanted};
use super::exit::Failure;
use super::fake::{Answer, Fake};
use super::folder::Partial;
use super::images::Way;
use super::manifest::tests::example;
use super::manifest::{Base, Checkpoint, DiskFormat, Manifest, Outcome, Parent};
use super::record;
use super::resume::tests::wanted;
use super::screen::Screen;
use super::state::State;
use super::state::tests::{backup, state};
use super::store::Store;
use crate::api::{DesiredState, VmBackup};

const NAME: &str = "db01-1";

/// A folder with what a process left of a backup of `db01`, and an API server.
struct Left {
    root: tempfile::TempDir,
    session: Session,
}

impl Left {
    fn new(fake: &Fake, state: State) -> Self {
        let root = tempfile::tempdir().unwrap();
        let partial = Partial::create(root.path(), state).unwrap();
        std::fs::write(partial.file("vda.full.qcow2"), "x").unwrap();
        let session =
            Session { cluster: fake.cluster(), screen: Screen::new(true), stop: CancellationToken::new() };
        Self { root, session }
    }

    fn wanted(&self) -> Wanted {
        Wanted { to: self.root.path().to_owned(), ..wanted() }
    }

    async fn backup(&self) -> Result<PathBuf, Failure> {
        self.session.backup(&self.wanted()).await
    }

    fn args(&self) -> args::Download {
        let reading = args::Reading { max_workers: 1, transport: Way::Auto };
        args::Download {
            vm: "db01".to_owned(),
            backup: NAME.to_owned(),
            to: self.root.path().to_owned(),
            format: DiskFormat::Qcow2,
            reading,
        }
    }

    fn partial(&self) -> bool {
        self.root.path().join(format!(".{NAME}.partial")).exists()
    }

    fn point(&self) -> Option<Manifest> {
        Store::read(self.root.path()).unwrap().point(NAME).cloned()
    }
}

/// The same without the command's mark: `backup download` left it.
fn downloaded(backup: &VmBackup) -> State {
    let mut state = state(Some(backup));
    state.run = None;
    state
}

fn ready() -> VmBackup {
    backup(NAME, "u", "Ready", &["vda"])
}

fn phase(object: &mut Option<Value>, phase: &str) {
    object.as_mut().unwrap()["status"]["phase"] = json!(phase);
}

/// Obeys a finalize, and a cancel.
fn obeys(wish: &str, object: &mut Option<Value>) -> Answer {
    match wish {
        "Finalized" => phase(object, "Succeeded"),
        "Cancelled" => phase(object, "Failed"),
        _ => {}
    }
    Answer::Comes
}

fn read(whole: &Path) -> Manifest {
    Manifest::parse(&std::fs::read_to_string(whole.join("manifest.json")).unwrap()).unwrap()
}

#[tokio::test]
async fn a_successor_finalizes_what_was_read() {
    let fake = Fake::new(obeys);
    fake.put("vmbackups", ready());
    let left = Left::new(&fake, state(Some(&ready())));
    let whole = left.backup().await.unwrap();
    assert_eq!(read(&whole).backup.outcome, Outcome::Succeeded);
    assert!(!left.partial() && !whole.join("state.json").exists());
    assert_eq!(fake.asked(), ["Finalized"]);
}

#[tokio::test]
async fn a_cancel_that_comes_too_late_keeps_what_was_read() {
    let stop = CancellationToken::new();
    let ctrl_c = stop.clone();
    let fake = Fake::new(move |wish, object| {
        match wish {
            "Finalized" => {
                phase(object, "Finalizing");
                ctrl_c.cancel();
            }
            // it was sealed before
            _ => phase(object, "Succeeded"),
        }
        Answer::Comes
    });
    fake.put("vmbackups", ready());
    let mut left = Left::new(&fake, state(Some(&ready())));
    left.session.stop = stop;
    let whole = left.backup().await.unwrap();
    assert_eq!(read(&whole).backup.outcome, Outcome::Succeeded);
    assert_eq!(fake.asked(), ["Finalized", "Cancelled"]);
}

#[tokio::test]
async fn a_finalize_whose_answer_is_lost_keeps_what_was_read() {
    let fake = Fake::new(|wish, object| {
        obeys(wish, object);
        Answer::IsLost
    });
    fake.put("vmbackups", ready());
    let left = Left::new(&fake, state(Some(&ready())));
    assert_eq!(read(&left.backup().await.unwrap()).backup.outcome, Outcome::Succeeded);
}

#[tokio::test]
async fn a_backup_that_is_deleted_while_it_is_finalized_keeps_what_was_read() {
    let fake = Fake::new(|_, object| {
        *object = None;
        Answer::Comes
    });
    fake.put("vmbackups", ready());
    let left = Left::new(&fake, state(Some(&ready())));
    assert_eq!(read(&left.backup().await.unwrap()).backup.outcome, Outcome::Read);
}

#[tokio::test]
async fn a_backup_that_is_gone_keeps_what_was_read() {
    for (seen, outcome) in [("Ready", Outcome::Read), ("Succeeded", Outcome::Succeeded)] {
        // another one has its name
        for other in [false, true] {
            let fake = Fake::new(obeys);
            if other {
                fake.put("vmbackups", backup(NAME, "another", "Ready", &["vda"]));
            }
            let left = Left::new(&fake, state(Some(&backup(NAME, "u", seen, &["vda"]))));
            let whole = read(&left.backup().await.unwrap());
            assert_eq!((whole.backup.outcome, whole.backup.uid.as_str()), (outcome, "u"));
            assert!(fake.asked().is_empty());
        }
    }
}

#[tokio::test]
async fn a_cancel_that_is_obeyed_leaves_nothing() {
    let fake = Fake::new(obeys);
    fake.put("vmbackups", ready());
    let left = Left::new(&fake, state(Some(&ready())));
    left.session.stop.cancel();
    assert!(matches!(left.backup().await, Err(Failure::Interrupted)));
    assert!(!left.partial() && left.point().is_none());
    assert_eq!(fake.asked(), ["Cancelled"]);
}

#[tokio::test]
async fn a_cancel_that_is_not_answered_keeps_what_was_read() {
    let fake = Fake::new(|_, _| Answer::Refused(500));
    fake.put("vmbackups", ready());
    let left = Left::new(&fake, state(Some(&ready())));
    assert!(matches!(left.backup().await, Err(Failure::Api(_))));
    assert!(left.partial() && left.point().is_none());
}

#[tokio::test]
async fn a_part_of_what_succeeded_is_no_restore_point() {
    for whose in ["Succeeded", "Finalizing"] {
        let fake = Fake::new(obeys);
        // somebody finalized it, and has vdb
        let both = backup(NAME, "u", whose, &["vda", "vdb"]);
        fake.put("vmbackups", &both);
        let left = Left::new(&fake, state(Some(&both)));
        // and then there is no VM to make another one of
        assert!(matches!(left.backup().await, Err(Failure::NotFound(_))));
        assert!(left.point().is_none() && !left.partial() && fake.asked().is_empty());
    }
    let fake = Fake::new(obeys);
    let left = Left::new(&fake, downloaded(&backup(NAME, "u", "Ready", &["vda", "vdb"])));
    let partial = Partial::open(left.root.path(), NAME).unwrap().unwrap();
    let published = left.session.publish(partial, &CancellationToken::new()).await;
    assert!(matches!(published, Err(Failure::Incomplete { .. })), "{published:?}");
    assert!(left.point().is_none() && left.partial());
}

#[tokio::test]
async fn what_was_begun_otherwise_is_not_taken_and_not_touched() {
    let fake = Fake::new(obeys);
    let mut object = ready();
    object.spec.disks = Some(vec!["vda".to_owned()]);
    fake.put("vmbackups", &object);
    let left = Left::new(&fake, state(Some(&object)));
    let before = std::fs::read(left.root.path().join(format!(".{NAME}.partial/state.json"))).unwrap();
    let failure = left.backup().await.unwrap_err();
    assert!(matches!(failure, Failure::Unlike { option: "--disk", .. }), "{failure}");
    assert!(failure.to_string().contains("virtmark backup stop --cancel db01 db01-1"), "{failure}");
    let after = std::fs::read(left.root.path().join(format!(".{NAME}.partial/state.json"))).unwrap();
    assert!(before == after && fake.asked().is_empty());
    // what Succeeded is kept, and is not what was asked for
    object.status.as_mut().unwrap().phase = crate::api::Phase::Succeeded;
    fake.put("vmbackups", &object);
    assert!(
        matches!(left.backup().await, Err(Failure::NotFound(_))),
        "it goes on to the VM, which is not there"
    );
    assert!(left.point().is_some());
}

#[tokio::test]
async fn nothing_is_finalized_that_is_not_on_stable_storage_with_all_that_it_lies_over() {
    // the file is not there
    let fake = Fake::new(obeys);
    fake.put("vmbackups", ready());
    let left = Left::new(&fake, state(Some(&ready())));
    std::fs::remove_file(left.root.path().join(format!(".{NAME}.partial/vda.full.qcow2"))).unwrap();
    assert!(matches!(left.backup().await, Err(Failure::File { .. })));
    assert_eq!(fake.asked(), ["Cancelled"]);
    // the restore point below is not there
    let fake = Fake::new(obeys);
    fake.put("vmbackups", ready());
    let mut over = state(Some(&ready()));
    let (parent, checkpoint) =
        (example("a", None), Checkpoint { name: "cp".to_owned(), bitmap: "bm".to_owned() });
    over.parent = Some((Parent { name: parent.name, uid: parent.backup.uid }, checkpoint));
    let base = Base { file: "vda.full.qcow2".to_owned(), format: DiskFormat::Qcow2 };
    over.disks.entry("vda".to_owned()).and_modify(|disk| disk.base = Some(base));
    let left = Left::new(&fake, over);
    assert!(matches!(left.backup().await, Err(Failure::Damaged(_))));
    assert_eq!(fake.asked(), ["Cancelled"]);
}

#[tokio::test]
async fn a_disk_is_written_nowhere_else() {
    let fake = Fake::new(obeys);
    let bad = backup(NAME, "u", "Ready", &["../vda"]);
    fake.put("vmbackups", &bad);
    let mut empty = state(Some(&bad));
    empty.disks.clear();
    let left = Left::new(&fake, empty);
    assert!(matches!(left.backup().await, Err(Failure::Damaged(_))));
}

#[tokio::test]
async fn a_download_goes_on_only_with_the_very_backup() {
    // of the same one
    let fake = Fake::new(obeys);
    fake.put("vmbackups", ready());
    let left = Left::new(&fake, downloaded(&ready()));
    let whole = left.session.download(left.args()).await.unwrap();
    assert_eq!((read(&whole).backup.outcome, fake.asked().len()), (Outcome::Read, 0));

    // of an earlier one of its name, of which not all was read; this one has ended, so that nothing is read of it
    let fake = Fake::new(obeys);
    fake.put("vmbackups", backup(NAME, "another", "Failed", &["vda"]));
    let left = Left::new(&fake, downloaded(&backup(NAME, "u", "Ready", &["vda", "vdb"])));
    assert!(matches!(left.session.download(left.args()).await, Err(Failure::Refused { .. })));
    assert!(!left.partial() && left.point().is_none());

    // of which all was read: it has the name
    let fake = Fake::new(obeys);
    fake.put("vmbackups", backup(NAME, "another", "Ready", &["vda"]));
    let left = Left::new(&fake, downloaded(&ready()));
    assert!(matches!(left.session.download(left.args()).await, Err(Failure::Usage(_))));
    assert_eq!(left.point().unwrap().backup.uid, "u");

    // another command's
    let left = Left::new(&fake, state(Some(&ready())));
    assert!(matches!(left.session.download(left.args()).await, Err(Failure::Usage(_))));
    assert!(left.partial());
}

#[tokio::test]
async fn another_backup_of_the_same_name_is_neither_waited_for_nor_ended() {
    let fake = Fake::new(obeys);
    fake.put("vmbackups", backup(NAME, "another", "Ready", &["vda"]));
    fake.put(
        "imagetransfers",
        json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "ImageTransfer",
        "metadata": {"name": format!("{NAME}-vda")}, "spec": {"backup": NAME, "disk": "vda"},
        "status": {"phase": "Ready", "backupUid": "another", "ticketSecret": "ticket-another"}}),
    );
    let (cluster, ours) = (fake.cluster(), ready());
    let soon = Duration::from_millis(100);
    let screen = Screen::new(true);
    assert!(matches!(cluster.ready(&ours, soon, &screen).await, Err(Failure::NotFound(_))));
    assert!(matches!(cluster.succeeded(&ours, soon).await, Err(Failure::NotFound(_))));
    assert!(matches!(cluster.lost(&ours).await, Failure::NotFound(_)));
    assert_eq!(cluster.ended(&ours, soon).await.unwrap(), None);
    assert_eq!(cluster.now(&ours).await.unwrap(), None);
    assert!(cluster.want(&ours, DesiredState::Finalized).await.is_err());
    // its bytes are of another point in time
    let ticket = cluster.ticket(&ours, "vda", soon).await.unwrap_err();
    assert!(matches!(ticket, Failure::Late(_)), "{ticket}");
}

#[tokio::test(start_paused = true)]
async fn a_backup_is_made_once_whatever_becomes_of_the_answers() {
    let object = |run: &str| record::object(NAME, record::spec(&wanted(), None), None, Some(run));
    let mut answers = [Answer::Refused(503), Answer::IsLost].into_iter();
    let fake = Fake::new(move |_, _| answers.next().unwrap_or(Answer::Comes));
    let made = fake.cluster().make(&object("r")).await.unwrap();
    assert_eq!((made.metadata.uid.as_deref(), fake.asked().len()), (Some("made"), 3));
    // somebody else's
    assert!(matches!(fake.cluster().make(&object("s")).await, Err(Failure::Api(_))));
    // a refusal is one
    let fake = Fake::new(|_, _| Answer::Refused(403));
    assert!(matches!(fake.cluster().make(&object("r")).await, Err(Failure::Api(_))));
    assert_eq!(fake.asked().len(), 1);
    let fake = Fake::new(|_, _| Answer::Refused(503));
    assert!(matches!(fake.cluster().make(&object("r")).await, Err(Failure::Unanswered { .. })));
}

#[tokio::test]
async fn another_vm_may_be_backed_up_into_the_same_folder_meanwhile() {
    let fake = Fake::new(obeys);
    let root = tempfile::tempdir().unwrap();
    let mut other = state(None);
    (other.point, other.vm) = ("db02-1".to_owned(), "db02".to_owned());
    let held = Partial::create(root.path(), other).unwrap();
    std::fs::create_dir(root.path().join(".db03-1.partial")).unwrap();
    std::fs::create_dir(root.path().join(".db04-1.partial")).unwrap();
    std::fs::write(root.path().join(".db04-1.partial/state.json"), "{\"version\": 1}").unwrap();
    let session =
        Session { cluster: fake.cluster(), screen: Screen::new(true), stop: CancellationToken::new() };
    let wanted = Wanted { to: root.path().to_owned(), ..wanted() };
    // it comes as far as to look for its VM
    let failure = session.backup(&wanted).await.unwrap_err();
    assert!(matches!(failure, Failure::NotFound(_)), "{failure}");
    drop(held);
    assert_eq!(Store::read(root.path()).unwrap().unfinished.len(), 3, "what is not its own it leaves alone");
}
