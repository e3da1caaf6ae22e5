//! The command line of `chain`, as the user types it. It decides nothing: `command` gives it its meaning.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::output::Output;

/// `chain`.
#[derive(Subcommand, Debug)]
pub enum Chain {
    /// List the restore points of a folder, oldest first
    List {
        /// A folder of restore points
        dir: PathBuf,
        /// How they are printed
        #[arg(long, short = 'o', value_enum, default_value_t)]
        output: Output,
    },
    /// Make a restore point whole by itself (synthetic full): it needs none of those before any more
    #[command(after_help = "Examples:
  virtmark chain merge /backups/db01-20261201-221502
  virtmark chain merge /backups --point db01-20261201-221502 --dry-run

It keeps its name, its checkpoint and its files' names; what lies over it stays as it is. Those before it stay too: remove
them with virtmark chain rebase, the newest first.

Standard output has the path of the restore point.")]
    Merge(Reshape),
    /// Remove a restore point; what lies over it then lies over the one below, or is full
    #[command(after_help = "Examples:
  virtmark chain rebase /backups/db01-20261201-221502
  virtmark chain rebase /backups --point db01-20261201-221502 --dry-run

Every other restore point has the bytes that it had. The point in time that is removed cannot be restored any more.

Standard output has the paths of the restore points that were written anew.")]
    Rebase(Reshape),
}

/// `chain merge` and `chain rebase`.
#[derive(Args, Debug)]
pub struct Reshape {
    /// A folder of restore points, or one of them
    pub dir: PathBuf,
    /// The restore point, where DIR is not one
    #[arg(long)]
    pub point: Option<String>,
    /// Neither read the digests of what is merged before, nor compare the disk's bytes after
    #[arg(long)]
    pub no_verify: bool,
    /// Only say what would be done
    #[arg(long)]
    pub dry_run: bool,
}
