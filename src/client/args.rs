//! The command line, as the user types it. It decides nothing: `command` gives it its meaning.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::chain_line::Chain;
use super::exit;
use super::images::Way;
use super::manifest::DiskFormat;
use super::output::Output;
use super::transfer_line::Transfer;
use crate::api::QuiesceMode;

const EXAMPLES: &str = "Examples:
  virtmark backup db01 --to /backups -n vms         incremental where it can, full where not
  virtmark backup full db01 --to /backups -n vms    all of every disk
  virtmark verify /backups                          digests, chains, qemu-img check
  virtmark chain list /backups                      which restore points there are
  virtmark restore /backups --to /restored          the newest one as plain files";

/// Backs up virtual machines with Virtmark, and looks after what was read.
#[derive(Parser, Debug)]
#[command(name = "virtmark", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{}", exit::table()))]
pub struct Cli {
    /// What every command has.
    #[command(flatten)]
    pub common: Common,
    /// What is to be done.
    #[command(subcommand)]
    pub command: Command,
}

/// What every command has; the first three are kubectl's own.
#[derive(Args, Debug)]
pub struct Common {
    /// The kubeconfig file. Default: $KUBECONFIG, then ~/.kube/config, then the pod that this runs in
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context
    #[arg(long, global = true)]
    pub context: Option<String>,
    /// The namespace of the VM. Default: the context's
    #[arg(long, short = 'n', global = true)]
    pub namespace: Option<String>,
    /// Say nothing but results, warnings and errors
    #[arg(long, short = 'q', global = true)]
    pub quiet: bool,
    /// Say also what is tried again
    #[arg(long, short = 'v', global = true)]
    pub verbose: bool,
}

/// What is to be done.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Back up a VM into a folder: incrementally where it can, in full where not
    #[command(
        args_conflicts_with_subcommands = true,
        subcommand_negates_reqs = true,
        after_help = "Examples:
  virtmark backup db01 --to /backups -n vms
  virtmark backup incremental db01 --to /backups -n vms
  virtmark backup db01 --to /backups -n vms --dry-run

Standard output has the path of the new restore point, and nothing else."
    )]
    Backup(Backup),
    /// Check restore points: digests, what they lie over, qemu-img check
    #[command(after_help = "Examples:
  virtmark verify /backups
  virtmark verify /backups/db01-20261130-221509    this one, and those that it lies over")]
    Verify {
        /// A folder of restore points, or one of them
        dir: PathBuf,
        /// How the result is printed
        #[arg(long, short = 'o', value_enum, default_value_t)]
        output: Output,
    },
    /// Look at the chains of restore points, shorten them, remove what is old
    #[command(subcommand)]
    Chain(Chain),
    /// Write the disks of a restore point as plain files
    #[command(after_help = "Examples:
  virtmark restore /backups --to /restored                       the newest restore point
  virtmark restore /backups/db01-20261130-221509 --to /restored --format qcow2 --disk vda")]
    Restore(Restore),
    /// List the VMs
    Vms {
        /// How they are printed
        #[arg(long, short = 'o', value_enum, default_value_t)]
        output: Output,
    },
    /// List the disks of a VM, and whether each can be backed up
    Disks {
        /// The VM
        vm: String,
        /// How they are printed
        #[arg(long, short = 'o', value_enum, default_value_t)]
        output: Output,
    },
    /// List and delete checkpoints
    #[command(subcommand)]
    Checkpoint(Checkpoint),
    /// Look at the permissions to read disks; pause, resume, cancel, extend them
    #[command(subcommand)]
    Transfer(Transfer),
    /// Say in sentences why a backup is full, slow, or failed
    Explain {
        /// The VmBackup (kubectl get vmbk)
        backup: String,
    },
    /// Print the completion of a shell
    #[command(after_help = "Example:
  source <(virtmark completion bash)")]
    Completion {
        /// Which
        shell: clap_complete::Shell,
    },
}

/// `backup`.
#[derive(Args, Debug)]
pub struct Backup {
    /// The steps of it, each by itself, and what is read.
    #[command(subcommand)]
    pub command: Option<BackupCommand>,
    /// Without one: incremental where it can, full where not.
    #[command(flatten)]
    pub auto: Take,
}

/// `backup full` and so on.
#[derive(Subcommand, Debug)]
pub enum BackupCommand {
    /// Read all data of every disk
    Full(Take),
    /// Read what changed since the newest restore point here; fail where there is none
    Incremental(Take),
    /// Begin a backup, and leave it Ready for `backup download` or any other client
    Start(Start),
    /// Read a backup that is Ready, and leave it Ready: `backup stop` ends it
    Download(Download),
    /// Finalize a backup, and wait until it Succeeded; safe to repeat
    Stop {
        /// The VM (kubectl get lvd)
        vm: String,
        /// The VmBackup
        backup: String,
        /// Cancel it instead
        #[arg(long)]
        cancel: bool,
    },
}

/// A backup into a folder.
#[derive(Args, Debug)]
pub struct Take {
    /// The VM (kubectl get lvd)
    // clap has it required; it is absent where another subcommand of `backup` is named
    #[arg(required = true)]
    pub vm: Option<String>,
    /// The folder of restore points; it is made when it is not there
    #[arg(long, value_name = "DIR", required = true)]
    pub to: Option<PathBuf>,
    /// The format of the files; raw is for full backups
    #[arg(long, value_enum, default_value_t)]
    pub format: DiskFormat,
    /// What the backup is.
    #[command(flatten)]
    pub what: What,
    /// How it is read.
    #[command(flatten)]
    pub reading: Reading,
    /// Only say what would be read
    #[arg(long)]
    pub dry_run: bool,
}

/// What a VmBackup is.
#[derive(Args, Debug)]
pub struct What {
    /// A disk, by its target; may be repeated. Default: every disk that can be backed up
    #[arg(long = "disk", value_name = "TARGET")]
    pub disks: Vec<String>,
    /// Whose chain it is, where several products back up one VM (label virtmark.dev/owner)
    #[arg(long)]
    pub owner: Option<String>,
    /// Keep only so many checkpoints of the VM once it succeeded
    #[arg(long, value_name = "N")]
    pub max_checkpoints: Option<i32>,
    /// Whether the guest's file systems are frozen at the point in time
    #[arg(long, value_enum)]
    pub quiesce: Option<Freeze>,
    /// Seconds to wait until it begins: the VM may be off, or another backup may run
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(i32).range(1..=604_800))]
    pub start_seconds: i32,
}

/// How disks are read.
#[derive(Args, Debug)]
pub struct Reading {
    /// Connections a disk, at most; the server says how many it takes
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub max_workers: u8,
    /// How the image server is reached
    #[arg(long, value_enum, default_value_t)]
    pub transport: Way,
}

/// `quiesce.mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Freeze {
    /// Fail without
    Required,
    /// Try, and go on without
    BestEffort,
    /// Do not try
    None,
}

impl From<Freeze> for QuiesceMode {
    fn from(freeze: Freeze) -> Self {
        match freeze {
            Freeze::Required => Self::Required,
            Freeze::BestEffort => Self::BestEffort,
            Freeze::None => Self::None,
        }
    }
}

/// `backup start`.
#[derive(Args, Debug)]
pub struct Start {
    /// The VM (kubectl get lvd)
    pub vm: String,
    /// Begin where this VmCheckpoint was taken. Default: a full backup
    #[arg(long, value_name = "CHECKPOINT")]
    pub from_checkpoint: Option<String>,
    /// What the backup is.
    #[command(flatten)]
    pub what: What,
}

/// `backup download`.
#[derive(Args, Debug)]
pub struct Download {
    /// The VM (kubectl get lvd)
    pub vm: String,
    /// The VmBackup
    #[arg(long)]
    pub backup: String,
    /// The folder of restore points
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// The format of the files; raw reads all of every disk
    #[arg(long, value_enum, default_value_t)]
    pub format: DiskFormat,
    /// How it is read.
    #[command(flatten)]
    pub reading: Reading,
}

/// `checkpoint`.
#[derive(Subcommand, Debug)]
pub enum Checkpoint {
    /// List the checkpoints, oldest first
    List {
        /// Of this VM only
        vm: Option<String>,
        /// How they are printed
        #[arg(long, short = 'o', value_enum, default_value_t)]
        output: Output,
    },
    /// Delete checkpoints with their bitmaps, and wait until they are gone
    Delete {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Delete the old checkpoints of a VM
    #[command(after_help = "Examples:
  virtmark checkpoint purge db01 --keep 2
  virtmark checkpoint purge db01 --days 7 --dry-run

What was backed up stays. The next incremental backup needs the checkpoint of the restore point that it is to lie over.")]
    Purge(Purge),
}

/// `checkpoint purge`.
#[derive(Args, Debug)]
pub struct Purge {
    /// The VM
    pub vm: String,
    /// Which.
    #[command(flatten)]
    pub rule: Rule,
    /// Those of this owner (label virtmark.dev/owner). Default: those without one
    #[arg(long)]
    pub owner: Option<String>,
    /// Only say which
    #[arg(long)]
    pub dry_run: bool,
}

/// Which checkpoints are deleted.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct Rule {
    /// Those that are older than so many days
    #[arg(long, value_name = "N")]
    pub days: Option<u32>,
    /// All but the newest so many
    #[arg(long, value_name = "N")]
    pub keep: Option<usize>,
}

/// `restore`.
#[derive(Args, Debug)]
pub struct Restore {
    /// A folder of restore points, or one of them
    pub dir: PathBuf,
    /// The restore point. Default: the newest, or the one that was given as DIR
    #[arg(long)]
    pub point: Option<String>,
    /// Where the files go, DISK.raw or DISK.qcow2
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// Their format
    #[arg(long, value_enum, default_value_t = DiskFormat::Raw)]
    pub format: DiskFormat,
    /// A disk, by its target; may be repeated. Default: all
    #[arg(long = "disk", value_name = "TARGET")]
    pub disks: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        let help = Cli::command().render_long_help().to_string();
        assert!(help.contains("Exit codes:") && help.contains("virtmark verify /backups"), "{help}");
    }

    #[test]
    fn backup_alone_and_with_its_steps() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(|cli| cli.command);
        let Ok(Command::Backup(backup)) = parse("virtmark backup db01 --to /b -n vms") else { panic!() };
        assert!(backup.command.is_none() && backup.auto.vm.as_deref() == Some("db01"));
        let Ok(Command::Backup(backup)) = parse("virtmark backup full db01 --to /b --disk vda --disk vdb")
        else {
            panic!()
        };
        let Some(BackupCommand::Full(take)) = backup.command else { panic!() };
        assert_eq!(take.what.disks, ["vda", "vdb"]);
        assert_eq!((take.vm.as_deref(), backup.auto.vm), (Some("db01"), None));
        for bad in [
            "virtmark backup",
            "virtmark backup db01",
            "virtmark backup full --to /b",
            "virtmark backup db01 --to /b --max-workers 0",
            "virtmark nothing",
            "virtmark checkpoint purge db01",
            "virtmark checkpoint purge db01 --days 1 --keep 1",
            "virtmark checkpoint delete",
            "virtmark transfer show --ticket",
            "virtmark transfer extend t",
            "virtmark transfer pause",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse("virtmark backup stop db01 db01-1 --cancel").is_ok());
        for good in [
            "virtmark chain merge /b/db01-1 --dry-run",
            "virtmark chain rebase /b --point db01-1 --no-verify",
            "virtmark transfer show -o json",
            "virtmark transfer show t --ticket",
            "virtmark transfer extend t --seconds 60",
        ] {
            assert!(parse(good).is_ok(), "{good}");
        }
        assert!(parse("virtmark backup download db01 --backup db01-1 --to /b").is_ok());
    }
}
