//! The demo: the main job, narrated, with the real output of real commands.
use std::path::Path;
use virtmark_bed::Bed;
pub fn run(_bed: &Bed, _repository: &Path) -> anyhow::Result<()> {
    Ok(())
}
