//! Reads one disk into its file: extents to work, work to workers, each with a connection of its own to the image server
//! and one to the image. What is done is stored now and then, so that a successor goes on from there.
//!
//! ```text
//! extents --plan--> DISK.work (file) --one piece at a time--> workers --> image
//!                                                      done <---/   flush, then stored
//! ```
//!
//! It holds a piece a worker, whatever the disk's size. It neither begins nor ends a backup.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::exit::Failure;
use super::extents::Parser;
use super::folder::{self, Partial};
use super::images::{Connection, ImagesError, Ticket, Way};
use super::names;
use super::plan::{self, Action, Piece, Planner};
use super::progress::{Done, Work};
use super::screen::Screen;
use super::spool;
use super::state::DiskState;
use super::target::{self, Sink, Target};
use super::words::Far;

/// Between two times that what is done is stored.
const STORE: Duration = Duration::from_secs(2);
/// How long a server that is away is asked again: an agent that is started anew takes some seconds.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two times that it is asked, at most.
const PAUSE: Duration = Duration::from_secs(5);

/// What `qemu-img check` ends with when an image is corrupt.
const CORRUPT: i32 = 2;

/// How a disk is read.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Workers at most; the server says how many it takes.
    pub workers: usize,
    /// How the server is reached.
    pub way: Way,
}

/// Reads a disk of a restore point that is being written.
///
/// # Errors
/// Those of the server, of the image and of the kernel.
pub async fn disk(
    partial: &mut Partial,
    name: &str,
    ticket: &Ticket,
    how: How,
    screen: &Screen,
    stop: &CancellationToken,
) -> Result<(), Failure> {
    let mut pause = Pause::default();
    let (connection, workers) = loop {
        match begin(partial, name, ticket, how).await {
            Ok(begun) => break begun,
            Err(Failure::Images(error)) => pause.after(error, stop).await?,
            Err(failure) => return Err(failure),
        }
    };
    let way = if connection.is_local { "its unix socket" } else { "HTTPS" };
    let state = state(partial, name)?;
    let (size, total) = state.work.unwrap_or_default();
    let (read, all) = (super::words::bytes(total.read), super::words::bytes(size));
    screen.say(format!("Reading {read} of {name} ({all}, {:?}) over {way}, {workers} at a time", state.mode));
    let path = partial.file(&state.file);
    let mut target = Target::open(&path, partial.state.format, workers + 1).await?;
    let mut keeper = target.sink().await?;
    let feeder = Arc::new(Feeder::open(&partial.file(&folder::work(name)), state.done.clone())?);
    let mut set = JoinSet::new();
    let mut connection = Some(connection);
    for _ in 0..workers {
        let worker = Worker {
            ticket: ticket.clone(),
            way: how.way,
            connection: connection.take(),
            sink: target.sink().await?,
            feeder: Arc::clone(&feeder),
            stop: stop.clone(),
        };
        set.spawn(worker.run());
    }
    let began = Instant::now();
    let before = feeder.total();
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stored = Instant::now();
    let failed = loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break Some(Failure::Interrupted),
            ended = set.join_next() => match ended {
                None => break None,
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(failure))) => break Some(failure),
                Some(Err(error)) => break Some(Failure::Program(format!("a worker died: {error}"))),
            },
            _ = tick.tick() => {
                let done = feeder.total();
                let far = Far { done, all: total.read + total.zeroed, moved: done - before, time: began.elapsed() };
                screen.progress(name, far);
                if stored.elapsed() >= STORE {
                    keep(partial, name, &feeder, &mut keeper).await?;
                    stored = Instant::now();
                }
            }
        }
    };
    set.shutdown().await;
    let kept = keep(partial, name, &feeder, &mut keeper).await;
    if let Some(failure) = failed {
        return Err(failure);
    }
    kept?;
    keeper.finish().await?;
    target.close().await?;
    if feeder.total() != total.read + total.zeroed {
        return Err(Failure::Damaged(format!("{name}: not all of its work was done; report it")));
    }
    partial.state.disks.entry(name.to_owned()).and_modify(|state| state.complete = true);
    partial.store()
}

/// Connects, and has the disk's work and image made; answers how many workers the server takes.
async fn begin(
    partial: &mut Partial,
    name: &str,
    ticket: &Ticket,
    how: How,
) -> Result<(Connection, usize), Failure> {
    let mut connection = ticket.connect(how.way).await?;
    let options = connection.options().await?;
    prepare(partial, name, &mut connection).await?;
    Ok((connection, how.workers.clamp(1, options.max_readers.max(1))))
}

fn state<'a>(partial: &'a Partial, name: &str) -> Result<&'a DiskState, Failure> {
    partial.state.disks.get(name).ok_or_else(|| Failure::Damaged(format!("nothing is known of disk {name}")))
}

/// The disk's work and its image are there.
async fn prepare(partial: &mut Partial, name: &str, connection: &mut Connection) -> Result<(), Failure> {
    let disk = state(partial, name)?.clone();
    let mut next = disk.clone();
    if disk.work.is_none() {
        let mut body = connection.extents(plan::context(disk.mode)).await?;
        let mut writer = spool::Writer::create(&partial.file(&folder::work(name)))?;
        let (mut parser, mut planner) = (Parser::new(disk.mode), Planner::new(disk.mode));
        let mut failed = Ok(());
        while let Some(bytes) = body.next().await? {
            parser.push(&bytes, |extent| {
                if let Some(piece) = planner.push(&extent)
                    && failed.is_ok()
                {
                    failed = writer.push(&piece);
                }
            })?;
            std::mem::replace(&mut failed, Ok(()))?;
        }
        let size = parser.finish(partial.state.size(name))?;
        let (last, total) = planner.finish();
        last.map_or(Ok(()), |piece| writer.push(&piece))?;
        writer.finish()?;
        next.work = Some((size, total));
    }
    let path = partial.file(&disk.file);
    if disk.made && partial.state.format == super::manifest::DiskFormat::Qcow2 {
        // what qemu-nbd had not noted when it was killed is lost room, and no more
        let check = ["check", "-q", "-f", "qcow2", "-r", "leaks"].map(AsRef::as_ref);
        let checked = target::qemu_img(check.into_iter().chain([path.as_os_str()])).await?;
        if checked.status.code() == Some(CORRUPT) {
            // what was written to it cannot be told from what was not
            (next.made, next.done) = (false, Done::default());
        }
    }
    if !next.made {
        let parent = partial.state.parent.as_ref().map(|(parent, _)| parent.name.clone()).unwrap_or_default();
        let backing = disk.base.as_ref().map(|base| (names::backing(&parent, &base.file), base.format));
        let backing = backing.as_ref().map(|(path, format)| (path.as_str(), *format));
        let size = next.work.unwrap_or_default().0;
        target::create(&path, partial.state.format, size, backing).await?;
        next.made = true;
    }
    partial.state.disks.insert(name.to_owned(), next);
    partial.store()
}

/// What is done now is on stable storage, and noted.
async fn keep(partial: &mut Partial, name: &str, feeder: &Feeder, keeper: &mut Sink) -> Result<(), Failure> {
    let done = feeder.done();
    keeper.flush().await?;
    partial.state.disks.entry(name.to_owned()).and_modify(|state| state.done = done);
    partial.store()
}

/// Gives out a disk's work.
struct Feeder {
    state: Mutex<Feed>,
    /// Told when something was done: there may be room.
    more: Notify,
}

struct Feed {
    reader: spool::Reader,
    /// Of an earlier process.
    before: Done,
    /// What is left of the run of bytes that was read last.
    left: Option<Piece>,
    work: Work,
    ended: bool,
}

impl Feeder {
    fn open(path: &std::path::Path, before: Done) -> Result<Self, Failure> {
        let reader = spool::Reader::open(path)?;
        let feed = Feed { reader, before, left: None, work: Work::default(), ended: false };
        let feeder = Self { state: Mutex::new(feed), more: Notify::new() };
        Ok(feeder)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Feed> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece; `None` when there is none left.
    async fn next(&self) -> Result<Option<Piece>, Failure> {
        loop {
            let more = self.more.notified();
            tokio::pin!(more);
            more.as_mut().enable();
            {
                let mut feed = self.lock();
                if feed.ended {
                    return Ok(None);
                }
                if feed.work.has_room() {
                    return feed.next();
                }
            }
            more.await;
        }
    }

    fn end(&self, piece: &Piece) {
        self.lock().work.end(piece);
        self.more.notify_waiters();
    }

    fn total(&self) -> u64 {
        let total = self.lock().work.total;
        total.read + total.zeroed
    }

    fn done(&self) -> Done {
        self.lock().work.done()
    }
}

impl Feed {
    fn next(&mut self) -> Result<Option<Piece>, Failure> {
        loop {
            let run = match self.left.take() {
                Some(left) => left,
                None => match self.reader.piece()? {
                    Some(run) => run,
                    None => {
                        self.ended = true;
                        return Ok(None);
                    }
                },
            };
            let Some(piece) = plan::cut(run).next() else { continue };
            if piece.end < run.end {
                self.left = Some(Piece { start: piece.end, ..run });
            }
            if self.before.has(&piece) {
                self.work.skip(piece);
                continue;
            }
            self.work.begin(piece);
            return Ok(Some(piece));
        }
    }
}

/// Reads pieces one after the other.
struct Worker {
    ticket: Ticket,
    way: Way,
    connection: Option<Connection>,
    sink: Sink,
    feeder: Arc<Feeder>,
    stop: CancellationToken,
}

impl Worker {
    async fn run(mut self) -> Result<(), Failure> {
        while let Some(piece) = self.feeder.next().await? {
            match piece.action {
                Action::Zero => self.sink.zero(piece.start, piece.length()).await?,
                Action::Read => self.read(piece).await?,
            }
            self.sink.settle().await?;
            self.feeder.end(&piece);
        }
        self.sink.finish().await
    }

    /// Reads a piece. Where a connection breaks it goes on with another one: what was read is not read again.
    async fn read(&mut self, piece: Piece) -> Result<(), Failure> {
        let mut at = piece.start;
        let mut pause = Pause::default();
        while at < piece.end {
            let before = at;
            match self.part(&mut at, piece.end).await? {
                Ok(()) => {}
                Err(error) => {
                    self.connection = None;
                    if at > before {
                        pause = Pause::default();
                    }
                    pause.after(error, &self.stop).await?;
                }
            }
        }
        Ok(())
    }

    /// Reads on from `at`. The inner error is the server's.
    async fn part(&mut self, at: &mut u64, end: u64) -> Result<Result<(), ImagesError>, Failure> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => match self.ticket.connect(self.way).await {
                Ok(connection) => none.insert(connection),
                Err(error) => return Ok(Err(error)),
            },
        };
        let mut body = match connection.read(*at, end).await {
            Ok(body) => body,
            Err(error) => return Ok(Err(error)),
        };
        loop {
            match body.next().await {
                Ok(Some(bytes)) => {
                    let length = bytes.len() as u64;
                    if length > end - *at {
                        return Ok(Err(ImagesError::Answer("it is longer than what was asked for")));
                    }
                    self.sink.write(*at, bytes).await?;
                    *at += length;
                }
                Ok(None) if *at == end => return Ok(Ok(())),
                Ok(None) => return Ok(Err(ImagesError::Broken("it ended early".to_owned()))),
                Err(error) => return Ok(Err(error)),
            }
        }
    }
}

/// Between two times that a server is asked which is away.
#[derive(Default)]
struct Pause {
    began: Option<Instant>,
    asked: u32,
}

impl Pause {
    async fn after(&mut self, error: ImagesError, stop: &CancellationToken) -> Result<(), Failure> {
        let began = *self.began.get_or_insert_with(Instant::now);
        if !error.may_pass() || began.elapsed() > PATIENCE {
            return Err(error.into());
        }
        tracing::debug!(%error, "asking the image server again");
        let pause = (Duration::from_millis(100) * 2_u32.pow(self.asked.min(6))).min(PAUSE);
        self.asked += 1;
        tokio::select! {
            () = stop.cancelled() => Err(Failure::Interrupted),
            () = tokio::time::sleep(pause) => Ok(()),
        }
    }
}
