//! The server of a volume that is uploaded: a qemu-nbd, for as long as this agent keeps a connection to it.
//!
//! It ends by itself with its last connection, and flushes then: so one whose agent was killed does not stay. An agent that
//! goes without having closed it cannot know that all was flushed. It decides nothing, and never serves an image twice.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use crate::api::VolumeFormat;
use crate::libvirt::one_line;
use crate::nbd::{Client, Export, NbdError};

/// How long it may take to open the image.
const START: Duration = Duration::from_secs(30);
/// How long it may take to close the image, once all is flushed.
const END: Duration = Duration::from_secs(60);
/// How soon to try again.
const AGAIN: Duration = Duration::from_millis(20);
/// What it says that is kept.
const WORDS: usize = 512;

const SOCKET: &str = "nbd.sock";
const PID: &str = "qemu-nbd.pid";

/// Why a volume is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// It cannot be run.
    #[error("qemu-nbd cannot be run: {0}")]
    Run(#[source] io::Error),
    /// It ended.
    #[error("qemu-nbd ended ({status}): {words}")]
    Ended {
        /// How.
        status: String,
        /// Its words.
        words: String,
    },
    /// It does not do what it should.
    #[error("qemu-nbd: {0}")]
    Nbd(#[from] NbdError),
    /// It does not end.
    #[error("qemu-nbd did not close the volume within {} s", END.as_secs())]
    Lingers,
}

/// A qemu-nbd that serves one volume.
#[derive(Debug)]
pub struct Server {
    process: Child,
    keeper: Client,
}

/// Where the server in this folder answers.
pub fn export(run: &Path) -> Export {
    Export { socket: run.join(SOCKET), name: String::new(), bitmap: None, changed_from: None }
}

impl Server {
    /// Serves `image` in the folder `run`.
    ///
    /// # Errors
    /// When qemu-nbd cannot open the image, say.
    pub async fn start(image: &Path, format: VolumeFormat, run: &Path) -> Result<Self, ServerError> {
        let export = export(run);
        let mut command = Command::new("qemu-nbd");
        command.args(["--shared=0", "--discard=unmap", "--cache=writeback", "--format", format.as_str()]);
        command.arg("--socket").arg(&export.socket).arg("--pid-file").arg(run.join(PID)).arg(image);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().map_err(ServerError::Run)?;
        let begun = Instant::now();
        loop {
            if let Some(ended) = ended(&mut process).await? {
                return Err(ended);
            }
            match Client::connect_to_write(&export).await {
                Ok(keeper) => return Ok(Self { process, keeper }),
                Err(NbdError::Connect { .. }) if begun.elapsed() < START => sleep(AGAIN).await,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Why it does not serve any more, when it does not.
    pub async fn interrupted(&mut self) -> Option<ServerError> {
        ended(&mut self.process).await.unwrap_or_else(Some)
    }

    /// Puts all that was written on stable storage, and closes the image. From here on nothing can reach it.
    ///
    /// # Errors
    /// When not all that was written may be in the image.
    pub async fn close(mut self) -> Result<(), ServerError> {
        let mut writer = self.keeper.writer()?;
        writer.flush().await?;
        writer.finish().await?.disconnect().await?;
        if let Some(pid) = self.process.id() {
            terminate(pid);
        }
        let status = timeout(END, self.process.wait()).await.map_err(|_| ServerError::Lingers)?;
        let status = status.map_err(ServerError::Run)?;
        if status.success() { Ok(()) } else { Err(said(&mut self.process, status.to_string()).await) }
    }

    /// Ends it, whatever is in the image then.
    pub async fn kill(mut self) {
        drop(self.keeper);
        let _ = self.process.kill().await;
    }
}

async fn ended(process: &mut Child) -> Result<Option<ServerError>, ServerError> {
    match process.try_wait().map_err(ServerError::Run)? {
        Some(status) => Ok(Some(said(process, status.to_string()).await)),
        None => Ok(None),
    }
}

async fn said(process: &mut Child, status: String) -> ServerError {
    let mut words = Vec::new();
    if let Some(errors) = process.stderr.take() {
        // whoever inherited the pipe may keep it open
        let _ = timeout(Duration::from_secs(1), errors.take(4096).read_to_end(&mut words)).await;
    }
    ServerError::Ended { status, words: one_line(&String::from_utf8_lossy(&words), WORDS) }
}

fn terminate(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // one that is gone needs no signal
        let _ = kill_process(pid, Signal::TERM);
    }
}

/// Ends what an earlier agent left in the folder `run`: one that was killed before it connected to its server. Blocks.
pub fn end_leftover(run: &Path) {
    let Some(pid) = leftover(run) else { return };
    let Some(process) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    let begun = Instant::now();
    while leftover(run) == Some(pid) && begun.elapsed() < END {
        let _ = kill_process(process, Signal::KILL);
        std::thread::sleep(AGAIN);
    }
}

/// The process that serves this folder's socket, as far as it says.
fn leftover(run: &Path) -> Option<u32> {
    let pid = fs::read_to_string(run.join(PID)).ok()?.trim().parse::<u32>().ok()?;
    let line = fs::read(PathBuf::from(format!("/proc/{pid}/cmdline"))).ok()?;
    let socket = run.join(SOCKET);
    let serves = line.split(|byte| *byte == 0).any(|word| word == socket.as_os_str().as_encoded_bytes());
    serves.then_some(pid)
}
