//! What must hold of every input, hostile or not: one file a target. `fuzz/src/main.rs` looks for inputs that
//! break it, `tests/corpora.rs` tries the kept ones again. Nothing here knows libFuzzer.

mod certificate_request;
mod coverage_codec;
mod http;
mod http_parsers;
mod libvirt_xml;
mod names;
mod nbd_block_status;
mod nbd_handshake;
mod nbd_transmission;
mod state_dir;
mod state_record;

use arbitrary::{Arbitrary, Unstructured};

/// What is fed.
pub struct Target {
    /// Its name, and that of its folder in `fuzz/corpus`.
    pub name: &'static str,
    /// Panics when something does not hold.
    pub check: fn(&[u8]),
    /// Longest input, in bytes; what is behind it is not used.
    pub longest: usize,
    /// Most memory that one input may make the code use at a time, in MiB.
    pub memory: usize,
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target { name: "nbd_handshake", check: nbd_handshake::check, longest: 2048, memory: 1 },
    Target { name: "nbd_transmission", check: nbd_transmission::check, longest: 512, memory: 24 },
    Target { name: "nbd_block_status", check: nbd_block_status::check, longest: 256, memory: 1 },
    Target { name: "http_parsers", check: http_parsers::check, longest: 512, memory: 1 },
    Target { name: "http", check: http::check, longest: 1024, memory: 8 },
    Target { name: "libvirt_xml", check: libvirt_xml::check, longest: 1024, memory: 4 },
    Target { name: "names", check: names::check, longest: 512, memory: 4 },
    Target { name: "coverage_codec", check: coverage_codec::check, longest: 512, memory: 3 },
    Target { name: "state_record", check: state_record::check, longest: 1024, memory: 1 },
    Target { name: "certificate_request", check: certificate_request::check, longest: 2048, memory: 1 },
    Target { name: "state_dir", check: state_dir::check, longest: 64, memory: 4 },
];

/// The next number of a script; zero behind its end.
fn number<T: for<'a> Arbitrary<'a> + Default>(script: &mut Unstructured<'_>) -> T {
    script.arbitrary().unwrap_or_default()
}

/// A directory of its own in memory, or where temporary files are; removed when dropped.
fn scratch() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a temporary directory")
}
