//! What a kill leaves: after each single move, and at random times of the whole command.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use virtmark::client::moves::{self, Move};
use virtmark::client::staging;

use crate::rig::{Folder, run};

/// The folder after so many moves, the last a removal that is cut when `half`.
fn killed(folder: &Folder, moves: &[Move], half: bool) {
    for one in moves {
        staging::make(folder.root.path(), one).unwrap();
    }
    let removed = moves.last().filter(|_| half);
    if let Some(Move::Forget(gone)) = removed {
        std::fs::remove_file(folder.path(gone).join("vda.incr.qcow2")).unwrap();
    }
}

/// A successor that is whole stands beside the restore point.
fn begun(before: &Folder, after: &Folder, point: &str) -> Folder {
    let folder = before.copy();
    let (from, to) = (after.path(point), folder.path(&format!(".{point}.chain-new")));
    run("cp", &["-a", &from.display().to_string(), &to.display().to_string()]);
    folder
}

#[tokio::test]
async fn a_merge_killed_after_each_move() {
    let before = Folder::make(50, 4, "qcow2");
    let after = before.copy();
    after.merge("p2").await.unwrap();
    let all = ["p0", "p1", "p2", "p3"];
    for moves in [moves::exchange("p2"), moves::replace("p2")] {
        for count in 0..=moves.len() {
            let folder = begun(&before, &after, "p2");
            killed(&folder, &moves[..count], false);
            let found = folder.verify().await;
            match folder.path("p2").exists() {
                true => {
                    folder.is_as_it_was(&all).await;
                    assert_eq!(found.left.len(), usize::from(count < moves.len()) + extra(&folder));
                }
                // between two renames: it is told, with what to do
                false => {
                    let told = found.points.iter().find(|point| point.name == "p2").unwrap();
                    assert!(
                        told.problems[0].contains("run virtmark chain merge or rebase again"),
                        "{found:?}"
                    );
                }
            }
            // again, by the folder's own name, which may not be there
            let mut again = folder.wanted("p2");
            (again.dir, again.point) = (folder.path("p2"), None);
            let (screen, stop) = (virtmark::client::screen::Screen::new(true), Default::default());
            virtmark::client::rewrite::merge(&again, &screen, &stop).await.unwrap();
            folder.is_as_it_was(&all).await;
            assert!(!folder.store().point("p2").unwrap().is_incremental());
            assert_eq!(folder.listing(), after.listing(), "after {count} moves");
        }
    }
}

/// In two renames there may be two folders beside.
fn extra(folder: &Folder) -> usize {
    folder.store().asides.len().saturating_sub(1)
}

#[tokio::test]
async fn a_rebase_killed_after_each_move() {
    let before = Folder::make(51, 4, "raw");
    let after = before.copy();
    after.rebase("p1").await.unwrap();
    for swap in [moves::exchange("p2"), moves::replace("p2")] {
        let moves = [swap, moves::leave("p1"), moves::remove("p1")].concat();
        for count in 0..=moves.len() {
            for half in [false, true] {
                let folder = begun(&before, &after, "p2");
                killed(&folder, &moves[..count], half);
                let found = folder.verify().await;
                if folder.path("p2").exists() {
                    assert_eq!(found.damaged(), 0, "after {count} moves: {found:?}");
                }
                let done = folder.rebase("p1").await;
                // when all was done there is nothing to remove
                assert_eq!(done.is_err(), count == moves.len(), "after {count} moves: {done:?}");
                folder.is_as_it_was(&["p0", "p2", "p3"]).await;
                assert_eq!(folder.listing(), after.listing());
            }
        }
    }
}

/// One that was set aside comes back when a backup lies over it.
#[tokio::test]
async fn what_is_needed_again_comes_back() {
    let folder = Folder::make(52, 3, "qcow2");
    for one in moves::leave("p1") {
        staging::make(folder.root.path(), &one).unwrap();
    }
    assert!(folder.verify().await.damaged() > 0, "p2 lies over it");
    folder.merge("p0").await.unwrap();
    folder.is_as_it_was(&["p0", "p1", "p2"]).await;
}

#[tokio::test]
async fn the_command_killed_at_any_time() {
    let before = Folder::make(53, 4, "qcow2");
    for (verb, point, stay) in
        [("merge", "p2", &["p0", "p1", "p2", "p3"][..]), ("rebase", "p1", &["p0", "p2", "p3"])]
    {
        let command = |folder: &Folder| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_virtmark"));
            command.args(["-q", "chain", verb, "--point", point]).arg(folder.root.path());
            command.stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let whole = before.copy();
        let began = Instant::now();
        assert!(command(&whole).status().unwrap().success());
        let time = began.elapsed();
        whole.is_as_it_was(stay).await;
        for step in 0..20_u32 {
            let folder = before.copy();
            let mut process = command(&folder).spawn().unwrap();
            tokio::time::sleep(time * step / 20).await;
            let _ = process.kill();
            process.wait().unwrap();
            // a qemu-img that it left writes to nobody's file, and ends
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert_eq!(folder.verify().await.damaged(), 0, "{verb}, step {step}");
            let is_done = !folder.path(point).exists();
            let again = command(&folder).status().unwrap();
            assert!(again.success() || is_done && folder.store().asides.is_empty(), "{verb}, step {step}");
            folder.is_as_it_was(stay).await;
            assert_eq!(folder.listing(), whole.listing(), "{verb}, step {step}");
        }
    }
}
