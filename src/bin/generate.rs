//! Writes `crds/` from the Rust types; with `--check` only says what differs.

use std::process::ExitCode;
use std::{env, fs};

use serde_saphyr::SerializerOptions;

fn main() -> anyhow::Result<ExitCode> {
    let check = env::args().any(|argument| argument == "--check");
    let mut plain = SerializerOptions::default();
    plain.prefer_block_scalars = false;
    let mut differ = false;
    for crd in virtmark::api::crds() {
        let path = format!("crds/{}.yaml", crd.spec.names.plural);
        let mut yaml = String::from("# made by `cargo run --bin crdgen` from src/api\n");
        serde_saphyr::to_fmt_writer_with_options(&mut yaml, &crd, plain.clone())?;
        if fs::read_to_string(&path).is_ok_and(|old| old == yaml) {
            continue;
        }
        if check {
            eprintln!("{path} is not what src/api says: run `cargo run --bin crdgen`");
            differ = true;
        } else {
            fs::create_dir_all("crds")?;
            fs::write(&path, yaml)?;
        }
    }
    Ok(if differ { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
