//! The file that a disk is written to: qcow2 through qemu-nbd, raw as a sparse file. It never opens an image that it did
//! not make, and knows nothing of where the bytes come from.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::exit::Failure;
use super::manifest::DiskFormat;
use crate::nbd::{Client, Export, NbdError, Writer, ZeroMode};

/// Time for qemu-nbd to begin, and to end. A predecessor's may still hold the image.
const START: Duration = Duration::from_secs(20);
const END: Duration = Duration::from_secs(600);
/// Longest path of a unix socket, in bytes.
const SOCKET: usize = 100;

/// Runs qemu-img.
///
/// # Errors
/// When it is not there, or says why it would not.
pub async fn qemu_img<I, S>(arguments: I) -> Result<Output, Failure>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new("qemu-img");
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true).process_group(0);
    command.output().await.map_err(|error| missing("qemu-img", &error))
}

/// The same; another end than a good one is an error.
///
/// # Errors
/// When it is not there, or says why it would not.
pub async fn qemu_img_done<I, S>(arguments: I) -> Result<Output, Failure>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let output = qemu_img(arguments).await?;
    if output.status.success() {
        return Ok(output);
    }
    Err(Failure::Program(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

fn missing(program: &str, error: &std::io::Error) -> Failure {
    Failure::Program(format!("cannot run {program}: {error}; install QEMU's tools (Debian: qemu-utils)"))
}

/// Makes a new image of `size` bytes, over `backing` when that is given: a path as the image is to name it, and a format.
///
/// # Errors
/// The kernel's, and qemu-img's.
pub async fn create(
    path: &Path,
    format: DiskFormat,
    size: u64,
    backing: Option<(&str, DiskFormat)>,
) -> Result<(), Failure> {
    if format == DiskFormat::Raw {
        let file = File::create(path).map_err(Failure::file(path))?;
        return file.set_len(size).map_err(Failure::file(path));
    }
    let mut arguments: Vec<&OsStr> = ["create", "-q", "-f", "qcow2"].map(OsStr::new).to_vec();
    if let Some((backing, format)) = &backing {
        arguments.extend(["-b", backing, "-F", format.as_str()].map(OsStr::new));
    }
    let size = size.to_string();
    arguments.extend([path.as_os_str(), OsStr::new(&size)]);
    qemu_img_done(arguments).await.map(drop)
}

/// An image that is open for several writers.
#[derive(Debug)]
pub enum Target {
    /// Behind a qemu-nbd.
    Qcow2(Box<Served>),
    /// A file.
    Raw(Arc<File>, PathBuf),
}

/// A qemu-nbd and its socket.
#[derive(Debug)]
pub struct Served {
    process: Child,
    socket: PathBuf,
    /// A folder made for the socket alone.
    folder: Option<PathBuf>,
    /// The connection that found it listening.
    first: Option<Client>,
}

/// One writer of an image.
#[derive(Debug)]
pub enum Sink {
    /// Through qemu-nbd.
    Nbd(Box<Writer>),
    /// To a file.
    File(Arc<File>, PathBuf),
}

impl Target {
    /// Opens an image for up to `writers` writers at a time. It ends with the last of them: the first is to be kept.
    ///
    /// # Errors
    /// The kernel's, and qemu-nbd's.
    pub async fn open(path: &Path, format: DiskFormat, writers: usize) -> Result<Self, Failure> {
        if format == DiskFormat::Raw {
            let file = File::options().write(true).open(path).map_err(Failure::file(path))?;
            return Ok(Self::Raw(Arc::new(file), path.to_owned()));
        }
        let (socket, folder) = socket(path)?;
        let deadline = Instant::now() + START;
        loop {
            // one that a predecessor left
            let _ = std::fs::remove_file(&socket);
            let mut command = Command::new("qemu-nbd");
            // it ends with its last client, hence with this process, however that ends
            command.args(["--format=qcow2", "--cache=writeback", "--discard=unmap"]);
            command.arg(format!("--shared={writers}")).arg("--socket").arg(&socket).arg(path);
            // it is not Ctrl-C's to end
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            command.kill_on_drop(true).process_group(0);
            let process = command.spawn().map_err(|error| missing("qemu-nbd", &error))?;
            let mut served = Served { process, socket: socket.clone(), folder: folder.clone(), first: None };
            match served.listens(deadline).await {
                Ok(()) => return Ok(Self::Qcow2(Box::new(served))),
                // a predecessor that was killed has a qemu-nbd that is about to end
                Err(words) if words.contains("lock") && Instant::now() < deadline => {
                    served.folder = None;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(words) => return Err(Failure::Program(format!("qemu-nbd: {words}"))),
            }
        }
    }

    /// One more writer.
    ///
    /// # Errors
    /// When qemu-nbd does not answer.
    pub async fn sink(&mut self) -> Result<Sink, Failure> {
        match self {
            Self::Raw(file, path) => Ok(Sink::File(Arc::clone(file), path.clone())),
            Self::Qcow2(served) => {
                let client = match served.first.take() {
                    Some(client) => client,
                    None => Client::connect_to_write(&served.export()).await?,
                };
                Ok(Sink::Nbd(Box::new(client.writer()?)))
            }
        }
    }

    /// The image is whole, and its writers are gone, with which qemu-nbd ends: it is on stable storage.
    ///
    /// # Errors
    /// The kernel's, and qemu-nbd's.
    pub async fn close(self) -> Result<(), Failure> {
        match self {
            Self::Raw(file, path) => sync(file, path).await,
            Self::Qcow2(mut served) => {
                drop(served.first.take());
                match tokio::time::timeout(END, served.process.wait()).await {
                    Ok(Ok(status)) if status.success() => Ok(()),
                    _ => Err(Failure::Program("qemu-nbd did not close the image as it should".to_owned())),
                }
            }
        }
    }
}

fn socket(image: &Path) -> Result<(PathBuf, Option<PathBuf>), Failure> {
    let beside = std::path::absolute(image.with_extension("sock")).map_err(Failure::file(image))?;
    if beside.as_os_str().len() < SOCKET {
        return Ok((beside, None));
    }
    let folder = std::env::temp_dir().join(format!("virtmark-{:016x}", rand::random::<u64>()));
    std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
        .create(&folder)
        .map_err(Failure::file(&folder))?;
    Ok((folder.join("nbd.sock"), Some(folder)))
}

impl Served {
    fn export(&self) -> Export {
        Export { socket: self.socket.clone(), name: String::new(), bitmap: None, changed_from: None }
    }

    /// Waits until it listens; what it says when it ends instead.
    async fn listens(&mut self, deadline: Instant) -> Result<(), String> {
        loop {
            if let Ok(client) = Client::connect_to_write(&self.export()).await {
                self.first = Some(client);
                return Ok(());
            }
            match self.process.try_wait() {
                Ok(Some(_)) => {
                    let mut words = String::new();
                    if let Some(mut pipe) = self.process.stderr.take() {
                        let _ = tokio::io::AsyncReadExt::read_to_string(&mut pipe, &mut words).await;
                    }
                    return Err(words.trim().trim_start_matches("qemu-nbd: ").to_owned());
                }
                Ok(None) if Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(5)).await,
                Ok(None) => return Err("it does not listen".to_owned()),
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        if let Some(folder) = &self.folder {
            let _ = std::fs::remove_dir(folder);
        }
    }
}

impl Sink {
    /// Writes bytes; errors may come with a later call.
    ///
    /// # Errors
    /// The kernel's, and qemu-nbd's.
    pub async fn write(&mut self, offset: u64, data: Bytes) -> Result<(), Failure> {
        match self {
            Self::Nbd(writer) => Ok(writer.write(offset, &data).await?),
            Self::File(file, path) => {
                let (file, path) = (Arc::clone(file), path.clone());
                blocking(path, move || file.write_all_at(&data, offset)).await
            }
        }
    }

    /// Makes bytes zero.
    ///
    /// # Errors
    /// The kernel's, and qemu-nbd's.
    pub async fn zero(&mut self, offset: u64, length: u64) -> Result<(), Failure> {
        match self {
            Self::Nbd(writer) => Ok(writer.zero(offset, length, ZeroMode::Punch).await?),
            Self::File(file, path) => {
                let (file, path) = (Arc::clone(file), path.clone());
                let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                blocking(path, move || Ok(rustix::fs::fallocate(&*file, flags, offset, length)?)).await
            }
        }
    }

    /// Waits until all that was written is in the image, though maybe not on stable storage.
    ///
    /// # Errors
    /// The kernel's, and qemu-nbd's.
    pub async fn settle(&mut self) -> Result<(), Failure> {
        match self {
            Self::Nbd(writer) => Ok(writer.drain().await?),
            Self::File(..) => Ok(()),
        }
    }

    /// What is in the image, by whatever writer, is on stable storage.
    ///
    /// # Errors
    /// The kernel's, and qemu-nbd's.
    pub async fn flush(&mut self) -> Result<(), Failure> {
        match self {
            Self::Nbd(writer) => Ok(writer.flush().await?),
            Self::File(file, path) => sync(Arc::clone(file), path.clone()).await,
        }
    }

    /// Ends the writer.
    ///
    /// # Errors
    /// The kernel's, and qemu-nbd's.
    pub async fn finish(self) -> Result<(), Failure> {
        match self {
            Self::Nbd(writer) => {
                // all was answered: how the connection ends is of no account
                let _: Result<(), NbdError> = writer.finish().await?.disconnect().await;
                Ok(())
            }
            Self::File(..) => Ok(()),
        }
    }
}

async fn sync(file: Arc<File>, path: PathBuf) -> Result<(), Failure> {
    blocking(path, move || file.sync_all()).await
}

async fn blocking(
    path: PathBuf,
    work: impl FnOnce() -> std::io::Result<()> + Send + 'static,
) -> Result<(), Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(Failure::file(path))
}
