//! What a bench ran on, in a line: when, which machine, which versions.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

/// The first line that a program prints.
pub(crate) fn first_line(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.with_context(|| program.to_owned())?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

/// The time, the processor and the kernel, and these versions.
pub(crate) fn machine_with(versions: impl IntoIterator<Item = String>) -> Result<String> {
    let processor = fs::read_to_string("/proc/cpuinfo")?;
    let processor = processor.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    let cores = std::thread::available_parallelism()?;
    let here = [
        first_line("date", &["-u", "+%FT%RZ"])?,
        format!("{cores} x {}", processor.unwrap_or("unknown processor")),
        format!("Linux {}", fs::read_to_string("/proc/sys/kernel/osrelease")?.trim()),
    ];
    Ok(here.into_iter().chain(versions).collect::<Vec<_>>().join(", "))
}
