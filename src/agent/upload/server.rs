//! The server of a volume that is uploaded: a qemu-nbd, for as long as this agent keeps a connection to it.
//!
//! It ends by itself with its last connection, and flushes then: so one whose agent was killed does not stay. An agent that
//! goes without having closed it cannot know that all was flushed. It decides nothing, and never serves an image twice.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
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
/// Bytes of its words that are read.
const LONGEST: u64 = 4096;

const SOCKET: &str = "nbd.sock";
const PID: &str = "qemu-nbd.pid";
const WORDS: &str = "qemu-nbd.log";

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
    /// The file with its words.
    said: PathBuf,
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
        let said = run.join(WORDS);
        let errors = fs::File::create(&said).map_err(ServerError::Run)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).kill_on_drop(true);
        let mut process = command.spawn().map_err(ServerError::Run)?;
        let begun = Instant::now();
        loop {
            if let Some(ended) = ended(&mut process, &said)? {
                return Err(ended);
            }
            match Client::connect_to_write(&export).await {
                Ok(keeper) => return Ok(Self { process, keeper, said }),
                Err(NbdError::Connect { .. } | NbdError::ConnectTimeout { .. })
                    if begun.elapsed() < START =>
                {
                    sleep(AGAIN).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Why it does not serve any more, when it does not.
    pub fn interrupted(&mut self) -> Option<ServerError> {
        ended(&mut self.process, &self.said).unwrap_or_else(Some)
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
            signal(pid, Signal::TERM);
        }
        let status = timeout(END, self.process.wait()).await.map_err(|_| ServerError::Lingers)?;
        let status = status.map_err(ServerError::Run)?;
        if status.success() { Ok(()) } else { Err(words(&self.said, status.to_string())) }
    }

    /// Ends it, whatever is in the image then.
    ///
    /// # Errors
    /// When its storage holds it: it ends when that answers.
    pub async fn kill(mut self) -> Result<(), ServerError> {
        drop(self.keeper);
        let killed = timeout(END, self.process.kill()).await;
        killed.map_err(|_| ServerError::Lingers)?.map_err(ServerError::Run)
    }
}

fn ended(process: &mut Child, said: &Path) -> Result<Option<ServerError>, ServerError> {
    let status = process.try_wait().map_err(ServerError::Run)?;
    Ok(status.map(|status| words(said, status.to_string())))
}

fn words(said: &Path, status: String) -> ServerError {
    let mut text = Vec::new();
    if let Ok(file) = fs::File::open(said) {
        // without them its end still says that it ended
        let _ = file.take(LONGEST).read_to_end(&mut text);
    }
    ServerError::Ended { status, words: one_line(&String::from_utf8_lossy(&text), 512) }
}

fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // one that is gone needs no signal
        let _ = kill_process(pid, signal);
    }
}

/// Ends what an earlier agent left in the folder `run`: one that was killed before it connected to its server. It does not wait;
/// whether one is left still.
pub fn end_leftover(run: &Path) -> bool {
    let Some(pid) = leftover(run) else { return false };
    signal(pid, Signal::KILL);
    true
}

/// The process that serves this folder's socket, as far as it says.
fn leftover(run: &Path) -> Option<u32> {
    let pid = fs::read_to_string(run.join(PID)).ok()?.trim().parse::<u32>().ok()?;
    let line = fs::read(PathBuf::from(format!("/proc/{pid}/cmdline"))).ok()?;
    let socket = run.join(SOCKET);
    let serves = line.split(|byte| *byte == 0).any(|word| word == socket.as_os_str().as_encoded_bytes());
    serves.then_some(pid)
}
