//! The server: listens, accepts, and drives one HTTP/1.1 connection a task.
//!
//! ```text
//! bind -> ImageServer (addresses known) -> serve(shutdown)
//!           TCP+TLS, TCP+TLS, ..., unix socket
//!             \-- accept, under one limit of connections --> TLS --> hyper --> service
//! ```
//!
//! A connection ends by its client, when it stood still for too long, when a ticket it works on ends, or a
//! few seconds after `shutdown`. The unix socket is made with its mode before it can be connected to.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixSocket, UnixStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::connection::{Connection, Socket};
use super::journal::Journal;
use super::meter::{Encryption, Meter};
use super::service::Service;
use super::tickets::Tickets;
use super::tls::Tls;

/// Time for a TLS handshake.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);
/// Time that operations have to end after the shutdown.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
/// Time that clients have after that to take what was given out to them, and storages to answer for what they were given.
const SETTLE: Duration = Duration::from_secs(10);
/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 32 << 10;
/// Most headers of a request, as in imageio.
const MAX_HEADERS: usize = 99;
/// hyper's buffers; bodies are held back by [`super::connection`] before they are full.
const MAX_BUFFER: usize = 1 << 20;
/// Connections waiting to be accepted.
const BACKLOG: u32 = 128;

/// What the server listens on, and its limits.
#[derive(Clone, Debug)]
pub struct Config {
    /// TCP addresses, all with TLS; port 0 for any.
    pub addresses: Vec<SocketAddr>,
    /// TLS of the TCP addresses, see [`super::tls`].
    pub tls: Option<Tls>,
    /// Path of a unix socket, without TLS.
    pub unix_socket: Option<PathBuf>,
    /// Its mode.
    pub unix_mode: u32,
    /// Time a connection has until a ticket permits it something.
    pub idle_before_ticket: Duration,
    /// Time a connection may stand still after that.
    pub idle: Duration,
    /// Connections at a time; more wait to be accepted.
    pub max_connections: usize,
    /// Bodies that are being written to storages at a time; more wait, and hold what came of them.
    pub max_writing: usize,
    /// Counts what is done.
    pub meter: Arc<Meter>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            addresses: Vec::new(),
            tls: None,
            unix_socket: None,
            unix_mode: 0o660,
            idle_before_ticket: Duration::from_secs(60),
            idle: Duration::from_secs(1800),
            max_connections: 512,
            max_writing: 64,
            meter: Arc::default(),
        }
    }
}

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A TCP address without TLS.
    #[error("TCP addresses need TLS: give a certificate and its key")]
    NoTls,
    /// A TCP address cannot be used.
    #[error("cannot listen on {address}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The unix socket cannot be made.
    #[error("cannot listen on {}", path.display())]
    Unix {
        /// Its path.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Something else is at the unix socket's path.
    #[error("{} is not a socket; it is left alone: choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Another server answers at the unix socket's path.
    #[error("another server answers on {}; stop it first", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
}

impl BindError {
    /// Whether the address is another process's for now: a predecessor's that is on its way out, say.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        match self {
            BindError::Tcp { source, .. } => source.kind() == io::ErrorKind::AddrInUse,
            BindError::InUse { .. } => true,
            _ => false,
        }
    }
}

/// A server that listens.
#[derive(Debug)]
pub struct ImageServer {
    tickets: Tickets,
    config: Config,
    addresses: Vec<SocketAddr>,
    tcp: Vec<TcpListener>,
    unix: Option<UnixListener>,
}

impl ImageServer {
    /// Listens. A socket file that nobody answers on is replaced.
    pub async fn bind(config: Config, tickets: Tickets) -> Result<ImageServer, BindError> {
        if config.tls.is_none() && !config.addresses.is_empty() {
            return Err(BindError::NoTls);
        }
        let (mut tcp, mut addresses) = (Vec::new(), Vec::new());
        for address in &config.addresses {
            let failed = |source| BindError::Tcp { address: *address, source };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            addresses.push(listener.local_addr().map_err(failed)?);
            tcp.push(listener);
        }
        let unix = match &config.unix_socket {
            Some(path) => Some(bind_unix(path, config.unix_mode).await?),
            None => None,
        };
        Ok(ImageServer { tickets, config, addresses, tcp, unix })
    }

    /// The TCP addresses, with the ports that the kernel chose.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Serves until `shutdown`, then at most a few seconds more for the operations that run.
    pub async fn serve(self, shutdown: CancellationToken) {
        let ImageServer { tickets, config, tcp, unix, .. } = self;
        let shared = Arc::new(Shared::new(config, tickets, shutdown));
        let listeners = TaskTracker::new();
        for listener in tcp {
            if let Some(tls) = shared.config.tls.clone() {
                listeners.spawn(Arc::clone(&shared).accept_tcp(listener, tls));
            }
        }
        if let Some(listener) = unix {
            listeners.spawn(Arc::clone(&shared).accept_unix(listener));
        }
        listeners.close();
        listeners.wait().await;
        shared.shutdown.cancelled().await;
        if let Some(path) = &shared.config.unix_socket {
            // Whoever starts next replaces it anyway.
            let _ = std::fs::remove_file(path);
        }
        shared.tracker.close();
        shared.tracker.wait().await;
        // who comes next may be asked for what is in flight here once more
        shared.tickets.settled(SETTLE).await;
    }

    /// Serves one connection that somebody else accepted, to its end.
    pub async fn converse<T>(config: Config, tickets: Tickets, stream: T)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let shared = Shared::new(config, tickets, CancellationToken::new());
        shared.drive(stream, "peer".to_owned(), Encryption::None).await;
    }
}

async fn bind_unix(path: &Path, mode: u32) -> Result<UnixListener, BindError> {
    let failed = |source| BindError::Unix { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket { path: path.to_owned() });
        }
        Ok(_) if UnixStream::connect(path).await.is_ok() => {
            return Err(BindError::InUse { path: path.to_owned() });
        }
        Ok(_) => std::fs::remove_file(path).map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let socket = UnixSocket::new_stream().map_err(failed)?;
    socket.bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    socket.listen(BACKLOG).map_err(failed)
}

/// What all connections share.
struct Shared {
    tickets: Tickets,
    unix_socket: Option<Arc<str>>,
    config: Config,
    limit: Arc<Semaphore>,
    places: Arc<Semaphore>,
    connections: AtomicU64,
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

impl Shared {
    fn new(config: Config, tickets: Tickets, shutdown: CancellationToken) -> Shared {
        Shared {
            tickets,
            unix_socket: config.unix_socket.as_deref().and_then(Path::to_str).map(Arc::from),
            limit: Arc::new(Semaphore::new(config.max_connections)),
            places: Arc::new(Semaphore::new(config.max_writing)),
            config,
            connections: AtomicU64::new(0),
            tracker: TaskTracker::new(),
            shutdown,
        }
    }

    async fn accept_tcp(self: Arc<Self>, listener: TcpListener, tls: Tls) {
        while let Some((stream, client, permit)) = self.next(|| listener.accept()).await {
            let (shared, tls) = (Arc::clone(&self), TlsAcceptor::from(tls.current()));
            self.tracker.spawn(async move {
                if let Err(error) = stream.set_nodelay(true) {
                    debug!(%client, %error, "cannot set TCP_NODELAY");
                }
                match tokio::time::timeout(TLS_TIMEOUT, tls.accept(stream)).await {
                    Ok(Ok(stream)) => shared.drive(stream, client.to_string(), Encryption::Tls).await,
                    Ok(Err(error)) => debug!(%client, %error, "TLS handshake failed"),
                    Err(_) => debug!(%client, "TLS handshake took too long"),
                }
                drop(permit);
            });
        }
    }

    async fn accept_unix(self: Arc<Self>, listener: UnixListener) {
        while let Some((stream, _, permit)) = self.next(|| listener.accept()).await {
            let shared = Arc::clone(&self);
            self.tracker.spawn(async move {
                shared.drive(stream, "unix".to_owned(), Encryption::None).await;
                drop(permit);
            });
        }
    }

    /// The next connection, when the limit permits one; `None` at shutdown.
    async fn next<S, A, F>(&self, accept: impl Fn() -> F) -> Option<(S, A, tokio::sync::OwnedSemaphorePermit)>
    where
        F: Future<Output = io::Result<(S, A)>>,
    {
        let accepted = async {
            let permit = Arc::clone(&self.limit).acquire_owned().await.ok()?;
            loop {
                match accept().await {
                    Ok((stream, client)) => return Some((stream, client, permit)),
                    Err(error) => {
                        // Out of file descriptors, mostly: others will be closed.
                        warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        };
        self.shutdown.run_until_cancelled(accepted).await.flatten()
    }

    /// Serves one connection to its end.
    async fn drive<T>(&self, stream: T, client: String, encryption: Encryption)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let connection = Connection::new(Journal::new(number, client), self.config.meter.opened(encryption));
        let service = Arc::new(Service {
            tickets: self.tickets.clone(),
            unix_socket: self.unix_socket.clone(),
            places: Arc::clone(&self.places),
            connection: Arc::clone(&connection),
        });
        let socket = TokioIo::new(Socket::new(stream, Arc::clone(&connection)));
        let served = http1::Builder::new()
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEAD)
            .max_buf_size(MAX_BUFFER)
            // A client that has said all it wants to say is answered still.
            .half_close(true)
            .serve_connection(socket, service_fn(move |request| Arc::clone(&service).answer(request)));
        let mut served = std::pin::pin!(served);
        let cut = tokio::select! {
            ended = served.as_mut() => return ended.unwrap_or_else(|error| debug!(connection = number, %error, "connection failed")),
            () = connection.cut.cancelled() => "a ticket ended",
            () = connection.expired(self.config.idle_before_ticket, self.config.idle) => "idle",
            () = self.shutdown.cancelled() => "shutdown",
        };
        debug!(connection = number, reason = cut, "connection is closed by the server");
        if cut == "shutdown" {
            served.as_mut().graceful_shutdown();
            if tokio::time::timeout(SHUTDOWN_GRACE, served.as_mut()).await.is_err() {
                // the client goes on from what it has: that is to be what counts as served
                connection.give_no_more();
                let settled = async {
                    tokio::select! {
                        _ = served => {}
                        () = connection.settled() => {}
                    }
                };
                // In time or not: either way it is over.
                let _ = tokio::time::timeout(SETTLE, settled).await;
            }
        }
    }
}
