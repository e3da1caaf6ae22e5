//! Looks for inputs that break a property, with libFuzzer: `make fuzz`. `VIRTMARK_FUZZ` names the target.
//!
//! Counts memory too: an input that makes the code hold more than its target permits is a finding.

#![no_main]

#[path = "../properties/mod.rs"]
mod properties;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use peak_alloc::PeakAlloc;
use properties::{TARGETS, Target};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("VIRTMARK_FUZZ").unwrap_or_default();
    let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    let found = TARGETS.iter().find(|target| target.name == name);
    found.unwrap_or_else(|| panic!("VIRTMARK_FUZZ must be one of {}", names.join(", ")))
});

fuzz_target!(|input: &[u8]| {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    (TARGET.check)(&input[..input.len().min(TARGET.longest)]);
    let used = MEMORY.peak_usage().saturating_sub(before);
    assert!(used <= TARGET.memory << 20, "{used} bytes were held at once");
});
