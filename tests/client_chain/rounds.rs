//! Random histories, merged and rebased at every point.

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::rig::{Folder, run};

const FORMATS: [&str; 2] = ["qcow2", "raw"];

fn all_but(removed: &str) -> Vec<&'static str> {
    ["p0", "p1", "p2", "p3"].into_iter().filter(|point| *point != removed).collect()
}

#[tokio::test]
async fn merged_at_every_point() {
    for seed in 0..4 {
        let made = Folder::make(seed, 4, FORMATS[usize::try_from(seed).unwrap() % 2]);
        made.is_as_it_was(&all_but("")).await;
        for point in ["p1", "p2", "p3"] {
            let folder = made.copy();
            let listing = folder.listing();
            let told = folder.merge(point).await.unwrap();
            assert_eq!(told.trim(), folder.path(point).canonicalize().unwrap().display().to_string());
            assert_eq!(folder.listing(), listing, "seed {seed}: names stay, and nothing is left");
            folder.is_as_it_was(&all_but("")).await;
            let store = folder.store();
            let merged = store.point(point).unwrap();
            assert!(!merged.is_incremental() && merged.parent.is_none());
            assert_eq!(merged.checkpoint, made.store().point(point).unwrap().checkpoint);
            // those before are not needed
            for older in (0..4).map(|at| format!("p{at}")).take_while(|older| older != point) {
                std::fs::remove_dir_all(folder.path(&older)).unwrap();
            }
            let left: Vec<_> = all_but("").into_iter().filter(|left| *left >= point).collect();
            folder.is_as_it_was(&left).await;
            // again: nothing is to be done
            folder.merge(point).await.unwrap();
            folder.is_as_it_was(&left).await;
        }
    }
}

#[tokio::test]
async fn any_one_is_removed() {
    for seed in 10..14 {
        let made = Folder::make(seed, 4, FORMATS[usize::try_from(seed).unwrap() % 2]);
        for point in ["p0", "p1", "p2", "p3"] {
            let folder = made.copy();
            folder.rebase(point).await.unwrap();
            assert!(folder.listing().iter().all(|path| !path.contains("chain-")), "seed {seed}");
            folder.is_as_it_was(&all_but(point)).await;
        }
    }
}

/// One after the other until one is left, in any order, with merges in between.
#[tokio::test]
async fn a_whole_life() {
    for seed in 20..24 {
        let folder = Folder::make(seed, 5, FORMATS[usize::try_from(seed).unwrap() % 2]);
        let mut random = StdRng::seed_from_u64(seed);
        let mut left = vec!["p0", "p1", "p2", "p3", "p4"];
        while left.len() > 1 {
            if random.random() {
                let point = left[random.random_range(0..left.len())];
                folder.merge(point).await.unwrap();
            } else {
                let point = left.remove(random.random_range(0..left.len()));
                folder.rebase(point).await.unwrap();
            }
            folder.is_as_it_was(&left).await;
        }
    }
}

/// Two restore points over one.
#[tokio::test]
async fn all_that_lie_over_the_removed_are_moved() {
    let folder = Folder::make(30, 3, "qcow2");
    // p3 is p2 once more, under another name
    run("cp", &["-a", &folder.path("p2").display().to_string(), &folder.path("p3").display().to_string()]);
    let manifest = folder.path("p3/manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap().replace("\"name\":\"p2\"", "\"name\":\"p3\"");
    std::fs::write(&manifest, text.replace("uid-p2", "uid-p3")).unwrap();
    let mut folder = folder;
    for disk in ["vda", "vdb"] {
        let bytes = folder.bytes[&("p2".to_owned(), disk.to_owned())].clone();
        folder.bytes.insert(("p3".to_owned(), disk.to_owned()), bytes);
    }
    let told = folder.rebase("p1").await.unwrap();
    assert_eq!(told.lines().count(), 2);
    folder.is_as_it_was(&["p0", "p2", "p3"]).await;
}

/// What hides the data below takes no room.
#[tokio::test]
async fn zeroes_that_hide_data_stay_zeroes() {
    let folder = Folder::make(31, 3, "qcow2");
    folder.rebase("p1").await.unwrap();
    let image = folder.path("p2/vda.incr.qcow2").display().to_string();
    let map = run("qemu-img", &["map", "--output=json", "-f", "qcow2", &image]);
    let map: serde_json::Value = serde_json::from_slice(&map.stdout).unwrap();
    let own = map.as_array().unwrap().iter().filter(|run| run["depth"] == 0 && run["zero"] == true);
    assert!(own.count() > 0, "{map}");
}
