//! The kept inputs of the fuzz targets still hold what they must: `fuzz/properties` has it, `make fuzz` looks for
//! inputs that break it.

#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, fail by panic")]

#[path = "../fuzz/properties/mod.rs"]
mod properties;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use properties::TARGETS;

fn corpus() -> PathBuf {
    Path::new("fuzz/corpus").to_owned()
}

fn inputs(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let files = fs::read_dir(corpus().join(target)).unwrap().map(|file| file.unwrap().path());
    files.map(|path| (path.clone(), fs::read(&path).unwrap())).collect()
}

fn replay(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    for (path, input) in inputs(name) {
        println!("{}", path.display());
        assert!(input.len() <= target.longest, "libFuzzer would not take it");
        (target.check)(&input);
    }
    for cut in
        inputs(name).iter().flat_map(|(_, input)| [&input[..input.len() / 2], &input[..input.len().min(1)]])
    {
        (target.check)(cut);
    }
}

macro_rules! replayed {
    ($($name:ident)*) => {
        const REPLAYED: &[&str] = &[$(stringify!($name)),*];
        $(#[test]
        fn $name() {
            replay(stringify!($name));
        })*
    };
}

replayed! {
    nbd_handshake nbd_transmission nbd_block_status http_parsers http libvirt_xml names coverage_codec
    state_record state_dir certificate_request
}

#[test]
fn every_target_is_replayed_and_has_a_small_corpus() {
    let targets: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(targets, REPLAYED.iter().map(|name| (*name).to_owned()).collect());
    let folders =
        fs::read_dir(corpus()).unwrap().map(|folder| folder.unwrap().file_name().into_string().unwrap());
    assert_eq!(targets, folders.collect());
    let mut bytes = 0;
    for target in TARGETS {
        let inputs = inputs(target.name);
        assert!((4..=64).contains(&inputs.len()), "{}: {} files", target.name, inputs.len());
        assert!(target.memory <= 64, "{}: an agent serves many at a time", target.name);
        bytes += inputs.iter().map(|(_, input)| input.len()).sum::<usize>();
    }
    assert!(bytes < 300 << 10, "{bytes} bytes");
}
