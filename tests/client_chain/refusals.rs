//! What is refused, and what is as it was then.

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};

use tokio_util::sync::CancellationToken;
use virtmark::client::exit::{Code, Failure};
use virtmark::client::manifest::{Checkpoint, DiskFormat, Parent};
use virtmark::client::rewrite;
use virtmark::client::screen::Screen;
use virtmark::client::state::{Kind, State};

use crate::rig::Folder;

async fn refused(folder: &Folder, point: &str, code: Code, words: &str) {
    let listing = folder.listing();
    let failure = folder.rebase(point).await.unwrap_err();
    assert!(failure.code() == code && failure.to_string().contains(words), "{failure}");
    assert_eq!(folder.listing(), listing);
}

/// Damage that were merged would have a digest of its own.
#[tokio::test]
async fn damage_is_not_merged() {
    let folder = Folder::make(40, 3, "qcow2");
    let listing = folder.listing();
    let mut file = fs::File::options().write(true).open(folder.path("p0/vda.full.qcow2")).unwrap();
    file.seek(SeekFrom::End(-700)).unwrap();
    file.write_all(b"x").unwrap();
    for done in [folder.merge("p2").await, folder.rebase("p1").await] {
        let failure = done.unwrap_err();
        assert!(failure.code() == Code::Damaged && failure.to_string().starts_with("p0: "), "{failure}");
    }
    assert_eq!(folder.listing(), listing);
    // unless told to
    let unverified = rewrite::Wanted { verify: false, ..folder.wanted("p2") };
    rewrite::merge(&unverified, &Screen::new(true), &CancellationToken::new()).await.unwrap();
}

#[tokio::test]
async fn what_is_needed_or_unknown_is_not_removed() {
    let folder = Folder::make(41, 3, "qcow2");
    refused(&folder, "p9", Code::NotFound, "there is no restore point p9").await;
    // one that is being written over it
    let partial = folder.path(".p3.partial");
    fs::create_dir(&partial).unwrap();
    let state = |parent: &str| {
        let mut state = State::new("p3", "db01", "vms", Kind::Auto, DiskFormat::Qcow2);
        let parent = Parent { name: parent.to_owned(), uid: format!("uid-{parent}") };
        let checkpoint = Checkpoint { name: "cp".to_owned(), bitmap: "b".to_owned() };
        state.parent = Some((parent, checkpoint));
        let state = serde_json::to_string(&state).unwrap();
        fs::write(partial.join("state.json"), state).unwrap();
    };
    state("p1");
    refused(&folder, "p1", Code::Usage, ".p3.partial is being written over it").await;
    fs::write(partial.join("state.json"), "{").unwrap();
    refused(&folder, "p1", Code::Usage, "being written over it").await;
    // a merge removes nothing that it needs
    folder.merge("p1").await.unwrap();
    state("p2");
    // a manifest that says nothing
    fs::create_dir(folder.path("q")).unwrap();
    fs::write(folder.path("q/manifest.json"), "{").unwrap();
    refused(&folder, "p1", Code::Usage, "q may lie over it").await;
    fs::remove_dir_all(folder.path("q")).unwrap();
    // somebody's own file
    fs::write(folder.path("p1/notes.txt"), "mine").unwrap();
    refused(&folder, "p1", Code::Usage, "no manifest names it").await;
    fs::remove_file(folder.path("p1/notes.txt")).unwrap();
    folder.rebase("p1").await.unwrap();
    folder.is_as_it_was(&["p0", "p2"]).await;
}

#[tokio::test]
async fn a_file_of_somebodys_is_taken_along() {
    let folder = Folder::make(42, 3, "raw");
    fs::write(folder.path("p2/notes.txt"), "mine").unwrap();
    folder.merge("p2").await.unwrap();
    assert_eq!(fs::read_to_string(folder.path("p2/notes.txt")).unwrap(), "mine");
    fs::create_dir(folder.path("p1/more")).unwrap();
    let failure = folder.merge("p1").await.unwrap_err();
    assert_eq!(failure.code(), Code::Usage);
    assert!(!folder.path(".p1.chain-new").exists());
    fs::remove_dir(folder.path("p1/more")).unwrap();
    folder.is_as_it_was(&["p0", "p1", "p2"]).await;
}

#[tokio::test]
async fn only_said_and_interrupted() {
    let folder = Folder::make(43, 3, "qcow2");
    let listing = folder.listing();
    let (screen, stop) = (Screen::new(true), CancellationToken::new());
    let dry = |point: &str| rewrite::Wanted { dry_run: true, ..folder.wanted(point) };
    let told = rewrite::rebase(&dry("p1"), &screen, &stop).await.unwrap();
    assert!(told.contains("p2: vda lies over p0/vda.full.qcow2, from p2, p1, p0 ("), "{told}");
    assert!(told.contains("\np1 is removed: "), "{told}");
    let told = rewrite::merge(&dry("p2"), &screen, &stop).await.unwrap();
    assert!(told.contains("p2: vda is full, from p2, p1, p0 ("), "{told}");
    stop.cancel();
    let done = rewrite::merge(&folder.wanted("p2"), &screen, &stop).await;
    assert!(matches!(done, Err(Failure::Interrupted)));
    assert_eq!(folder.listing(), listing);
    // one process at a time
    let held = virtmark::client::staging::Staging::open(folder.root.path()).unwrap();
    assert_eq!(folder.merge("p2").await.unwrap_err().code(), Code::Usage);
    drop(held);
    folder.merge("p2").await.unwrap();
}
