//! From the command line to what is done, and to an exit code. The only part that prints results.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};

use super::args::{Backup, BackupCommand, Cli, Command, Start, Take, What};
use super::backup::{Session, Wanted};
use super::chain;
use super::chain_line::{Chain, Reshape};
use super::download::How;
use super::exit::{Chain as Sources, Code, Failure};
use super::images::Way;
use super::interrupt;
use super::kubernetes::Cluster;
use super::manifest::{DiskFormat, Manifest};
use super::output::{List, value};
use super::restore;
use super::rewrite;
use super::screen::Screen;
use super::state::Kind;
use super::store::Store;
use super::verify;
use super::words;
use crate::api::{BackupSupport, DesiredState};

/// Runs the process.
#[must_use]
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os().peekable();
    let called = arguments.peek().map(|name| Path::new(name).file_stem().unwrap_or_default().to_owned());
    let mut command = Cli::command();
    if called.is_some_and(|name| name == "kubectl-virtmark") {
        command = command.bin_name("kubectl virtmark");
    }
    let cli = command.try_get_matches_from(arguments).and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match cli {
        Ok(cli) => cli,
        Err(error) => {
            // help is no error
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Code::Usage.number()));
        }
    };
    crate::telemetry::install_crypto();
    if cli.common.verbose {
        // other crates' words may hold a URL
        let only = tracing_subscriber::filter::EnvFilter::new("virtmark=debug");
        tracing_subscriber::fmt()
            .with_env_filter(only)
            .with_writer(std::io::stderr)
            .with_target(false)
            .init();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let done = match runtime {
        Ok(runtime) => runtime.block_on(run(cli)),
        Err(error) => Err(Failure::Program(error.to_string())),
    };
    match done {
        Ok(code) => ExitCode::from(code.number()),
        Err(failure) => {
            let _ = writeln!(std::io::stderr(), "virtmark: {}", Sources(&failure));
            ExitCode::from(failure.code().number())
        }
    }
}

async fn run(cli: Cli) -> Result<Code, Failure> {
    let common = cli.common;
    let screen = Screen::new(common.quiet);
    let stop = interrupt::listen()?;
    let session = |screen, stop| async {
        let (kubeconfig, context) = (common.kubeconfig.as_deref(), common.context.as_deref());
        let cluster = Cluster::connect(kubeconfig, context, common.namespace.as_deref()).await?;
        Ok::<_, Failure>(Session { cluster, screen, stop })
    };
    let told = match cli.command {
        Command::Backup(backup) => return back_up(backup, &session(screen, stop).await?).await,
        Command::Vms { output } => session(screen, stop).await?.vms(output).await?,
        Command::Disks { vm, output } => session(screen, stop).await?.disks(&vm, output).await?,
        Command::Checkpoint(wanted) => session(screen, stop).await?.checkpoint(wanted).await?,
        Command::Explain { backup } => session(screen, stop).await?.explain(&backup).await?,
        Command::Verify { dir, output } => {
            let (store, only) = Store::find(&dir)?;
            let found = verify::verify(&store, only.as_deref(), &screen, &stop).await?;
            let text = verdicts(&found).text(output);
            match found.damaged() {
                0 => text,
                count => {
                    print(&text)?;
                    let all = found.points.len();
                    let words = format!("{count} of {all} restore points cannot be restored");
                    return Err(Failure::Damaged(words));
                }
            }
        }
        Command::Chain(Chain::List { dir, output }) => points(&Store::find(&dir)?.0).text(output),
        Command::Chain(Chain::Merge(wanted)) => rewrite::merge(&reshape(wanted), &screen, &stop).await?,
        Command::Chain(Chain::Rebase(wanted)) => rewrite::rebase(&reshape(wanted), &screen, &stop).await?,
        Command::Transfer(wanted) => session(screen, stop).await?.transfer(wanted).await?,
        Command::Restore(wanted) => {
            let (store, only) = Store::find(&wanted.dir)?;
            let wanted = restore::Wanted {
                point: wanted.point.or(only),
                disks: wanted.disks,
                to: wanted.to,
                format: wanted.format,
            };
            let made = restore::restore(&store, &wanted, &screen, &stop).await?;
            made.iter().map(|path| format!("{}\n", path.display())).collect()
        }
        Command::Completion { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "virtmark", &mut text);
            String::from_utf8_lossy(&text).into_owned()
        }
    };
    print(&told)?;
    Ok(Code::Done)
}

fn reshape(wanted: Reshape) -> rewrite::Wanted {
    let Reshape { dir, point, no_verify, dry_run } = wanted;
    rewrite::Wanted { dir, point, verify: !no_verify, dry_run }
}

async fn back_up(backup: Backup, session: &Session) -> Result<Code, Failure> {
    let (take, kind) = match (backup.command, backup.auto) {
        (Some(BackupCommand::Full(take)), _) => (take, Kind::Full),
        (Some(BackupCommand::Incremental(take)), _) => (take, Kind::Incremental),
        (Some(BackupCommand::Start(Start { vm, from_checkpoint, what })), _) => {
            let how = How { workers: 1, way: Way::Auto };
            let wanted = of(what, vm, ".".into(), Kind::Auto, DiskFormat::Qcow2, how);
            print(&format!("{}\n", session.begin(&wanted, from_checkpoint.as_deref()).await?))?;
            return Ok(Code::Done);
        }
        (Some(BackupCommand::Download(wanted)), _) => {
            print(&format!("{}\n", session.download(wanted).await?.display()))?;
            return Ok(Code::Done);
        }
        (Some(BackupCommand::Stop { vm, backup, cancel }), _) => {
            let state = if cancel { DesiredState::Cancelled } else { DesiredState::Finalized };
            session.end(&vm, &backup, state).await?;
            print(&format!("{backup}\n"))?;
            return Ok(Code::Done);
        }
        (None, take) => (take, Kind::Auto),
    };
    let wanted = wanted(take, kind)?;
    if wanted.1 {
        return would(session, &wanted.0).await;
    }
    let whole = session.backup(&wanted.0).await?;
    print(&format!("{}\n", whole.display()))?;
    Ok(Code::Done)
}

fn wanted(take: Take, kind: Kind) -> Result<(Wanted, bool), Failure> {
    let missing = || Failure::Usage("name the VM and the folder: virtmark backup VM --to DIR".to_owned());
    let (vm, to) = (take.vm.ok_or_else(missing)?, take.to.ok_or_else(missing)?);
    let how = How { workers: usize::from(take.reading.max_workers), way: take.reading.transport };
    Ok((of(take.what, vm, to, kind, take.format, how), take.dry_run))
}

fn of(what: What, vm: String, to: std::path::PathBuf, kind: Kind, format: DiskFormat, how: How) -> Wanted {
    Wanted {
        vm,
        to,
        kind,
        format,
        disks: what.disks,
        owner: what.owner,
        max_checkpoints: what.max_checkpoints,
        quiesce: what.quiesce.map(Into::into),
        start_seconds: what.start_seconds,
        how,
    }
}

/// What would be read: nothing is made.
async fn would(session: &Session, wanted: &Wanted) -> Result<Code, Failure> {
    let store = Store::read(&wanted.to)?;
    let domain = session.cluster.domain(&wanted.vm).await?;
    let start = session.start(&store, wanted, &domain).await?;
    let status = domain.status.unwrap_or_default();
    let below = start.as_ref().and_then(|start| store.point(&start.parent.name));
    let mut lines = match &start {
        Some(start) => format!("incremental, over {} from {}\n", start.parent.name, start.checkpoint.name),
        None => "full\n".to_owned(),
    };
    if let Some(missing) =
        wanted.disks.iter().find(|name| status.disks.iter().all(|disk| disk.target != **name))
    {
        return Err(Failure::NotFound(format!("{} has no disk {missing}", wanted.vm)));
    }
    for disk in status.disks {
        if !wanted.disks.is_empty() && !wanted.disks.contains(&disk.target) {
            continue;
        }
        let size = disk.size.and_then(|size| u64::try_from(size).ok());
        let of = size.map_or_else(|| "an unknown size".to_owned(), words::bytes);
        let can = below.and_then(|below| below.disk(&disk.target)).is_some_and(|disk| disk.in_checkpoint);
        let dirty = start.iter().flat_map(|start| &start.dirty).find(|(name, _)| *name == disk.target);
        let dirty = dirty.and_then(|(_, bytes)| u64::try_from(*bytes).ok()).map(words::bytes);
        let words = match (disk.backup, can) {
            (BackupSupport::Unsupported, _) => {
                format!("not: {}", disk.reason.as_deref().unwrap_or("it cannot be backed up"))
            }
            (BackupSupport::Incremental, true) => match dirty {
                Some(dirty) => format!("about {dirty} of {of}, as last counted"),
                None => format!("what changed of {of}"),
            },
            _ => format!("all data of {of}"),
        };
        lines.push_str(&format!("{}: {words}\n", disk.target));
    }
    print(&lines)?;
    Ok(Code::Done)
}

fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // whoever reads had enough
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done.map_err(Failure::file("standard output")),
    }
}

fn verdicts(found: &verify::Found) -> List<'static> {
    let row = |point: &verify::Verdict| match point.problems.first() {
        None => vec![point.name.clone(), "Good".to_owned(), String::new()],
        Some(_) => vec![point.name.clone(), "Damaged".to_owned(), point.problems.join("; ")],
    };
    let unfinished = |name: &String| {
        vec![
            name.clone(),
            "Unfinished".to_owned(),
            "it is no restore point; virtmark backup goes on with it".to_owned(),
        ]
    };
    let left = |(folder, words): &(String, String)| vec![folder.clone(), "Left".to_owned(), words.clone()];
    let rows = found.points.iter().map(row).chain(found.unfinished.iter().map(unfinished));
    let rows = rows.chain(found.left.iter().map(left)).collect();
    List { columns: &["POINT", "STATE", "PROBLEMS"], narrow: 3, rows, value: value(found) }
}

fn points(store: &Store) -> List<'static> {
    let row = |point: &Manifest| {
        let bytes: u64 = point.disks.iter().map(|disk| disk.bytes).sum();
        let gaps = chain::gaps(&store.points, point);
        let state = match gaps.first() {
            None => "Whole".to_owned(),
            Some((disk, gap)) => format!("Broken: {disk}: {gap}"),
        };
        let kind = if point.is_incremental() { "Incremental" } else { "Full" };
        let text = |of: Option<&String>| of.cloned().unwrap_or_default();
        vec![
            point.name.clone(),
            point.vm.name.clone(),
            kind.to_owned(),
            text(point.parent.as_ref().map(|parent| &parent.name)),
            words::bytes(bytes),
            point.taken_at.clone(),
            state,
            chain::depth(&store.points, point).to_string(),
            text(point.checkpoint.as_ref().map(|checkpoint| &checkpoint.name)),
            point.disks.iter().map(|disk| disk.target.as_str()).collect::<Vec<_>>().join(","),
        ]
    };
    let mut rows: Vec<_> = store.points.iter().map(row).collect();
    let bad = |name: &str, state: String| {
        let mut row = vec![String::new(); 10];
        name.clone_into(&mut row[0]);
        row[6] = state;
        row
    };
    rows.extend(store.unreadable.iter().map(|(name, words)| bad(name, format!("Unreadable: {words}"))));
    rows.extend(store.unfinished.iter().map(|name| bad(name, "Unfinished".to_owned())));
    rows.extend(
        verify::left(store).into_iter().map(|(folder, words)| bad(&folder, format!("Left: {words}"))),
    );
    let columns =
        &["POINT", "VM", "TYPE", "PARENT", "SIZE", "TAKEN", "STATE", "DEPTH", "CHECKPOINT", "DISKS"];
    List { columns, narrow: 7, rows, value: value(&store.points) }
}
