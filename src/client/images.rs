//! The images API of an image server, as its client: what a ticket permits, extents, bytes. It never writes, and never shows
//! a ticket: its addresses print without their path.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HOST, RANGE};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

/// Time to connect, and for the TLS handshake.
const CONNECT: Duration = Duration::from_secs(10);
/// Time without a byte of an answer.
const SILENCE: Duration = Duration::from_secs(60);
/// Most of an answer's body that hyper holds, in bytes.
const BUFFER: usize = 256 << 10;
/// Most that is shown of a refusal's text, in bytes.
const WORDS: usize = 512;

/// Why the image server's bytes are not here. None of them shows a ticket.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// The Secret has something else in it.
    #[error("the ticket's Secret has no usable {0}; is its type virtmark.dev/ticket?")]
    Ticket(&'static str),
    /// No connection.
    #[error("cannot connect to the image server at {address}: {why}; is its port open from here?")]
    Connect {
        /// Host and port, or the socket.
        address: String,
        /// What happened.
        why: String,
    },
    /// The connection broke, or stood still.
    #[error("the image server's connection broke: {0}")]
    Broken(String),
    /// It answered otherwise.
    #[error("the image server answered {status}: {words}")]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// Its words.
        words: String,
    },
    /// It answered something else than was asked for.
    #[error("the image server's answer is not what was asked for: {0}; report it")]
    Answer(&'static str),
}

impl ImagesError {
    /// Whether it is worth to ask again: the agent may be starting anew, the transfer may be paused.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Broken(_) => true,
            // a transfer that is paused says that its ticket expired, and goes on with the same one
            Self::Refused { status, words } => {
                status.is_server_error() || *status == StatusCode::FORBIDDEN && words.contains("expired")
            }
            Self::Ticket(_) | Self::Answer(_) => false,
        }
    }
}

/// How the server is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// Its unix socket when this is its node, HTTPS else.
    #[default]
    Auto,
    /// Its unix socket.
    Unix,
    /// HTTPS.
    Https,
}

/// A ticket: where the bytes of a disk are, and the permission to read them.
#[derive(Clone)]
pub struct Ticket {
    host: String,
    port: u16,
    path: String,
    socket: Option<PathBuf>,
    tls: TlsConnector,
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("host", &self.host).field("port", &self.port).finish_non_exhaustive()
    }
}

impl Ticket {
    /// Of what its Secret holds. Without a CA the system's are trusted.
    ///
    /// # Errors
    /// When something in it cannot be used.
    pub fn new(url: &str, ca: &[u8], socket: Option<PathBuf>) -> Result<Self, ImagesError> {
        let uri: Uri = url.parse().map_err(|_| ImagesError::Ticket("url"))?;
        let host =
            uri.host().filter(|_| uri.scheme_str() == Some("https")).ok_or(ImagesError::Ticket("url"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let mut roots = RootCertStore::empty();
        let certificates: Vec<_> = if ca.trim_ascii().is_empty() {
            rustls_native_certs::load_native_certs().certs
        } else {
            let read: Result<_, _> = CertificateDer::pem_slice_iter(ca).collect();
            read.map_err(|_| ImagesError::Ticket("ca.crt"))?
        };
        if roots.add_parsable_certificates(certificates).0 == 0 {
            return Err(ImagesError::Ticket("ca.crt"));
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let tls = tls.map_err(|_| ImagesError::Ticket("ca.crt"))?;
        let tls = tls.with_root_certificates(roots).with_no_client_auth();
        let (port, path) = (uri.port_u16().unwrap_or(443), uri.path().trim_end_matches('/').to_owned());
        Ok(Self { host, port, path, socket, tls: TlsConnector::from(Arc::new(tls)) })
    }

    /// Connects. On the server's own node through its unix socket: it is that when the two ends of a connection to its port
    /// have one address, as the stock client finds out. Another node may have a socket at the same path.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub async fn connect(&self, way: Way) -> Result<Connection, ImagesError> {
        if way == Way::Unix {
            let socket = self.socket.as_deref().ok_or(ImagesError::Ticket("unixSocket"))?;
            return self.unix(socket).await;
        }
        let address = format!("{}:{}", self.host, self.port);
        let broken = |why: String| ImagesError::Connect { address: address.clone(), why };
        let connect = tokio::time::timeout(CONNECT, TcpStream::connect((self.host.as_str(), self.port)));
        let stream =
            connect.await.map_err(|_| broken(format!("no answer within {} s", CONNECT.as_secs())))?;
        let stream = stream.map_err(|error| broken(error.to_string()))?;
        let is_here = || Some(stream.local_addr().ok()?.ip() == stream.peer_addr().ok()?.ip());
        if way == Way::Auto
            && let Some(socket) = &self.socket
            && is_here() == Some(true)
            && socket.exists()
            && let Ok(connection) = self.unix(socket).await
        {
            return Ok(connection);
        }
        // one small request at a time: nothing is gained by waiting for more of it
        let _ = stream.set_nodelay(true);
        let name = ServerName::try_from(self.host.clone()).map_err(|_| ImagesError::Ticket("url"))?;
        let shake = tokio::time::timeout(CONNECT, self.tls.connect(name, stream));
        let stream = shake.await.map_err(|_| broken("no TLS handshake".to_owned()))?;
        let stream = stream.map_err(|error| broken(error.to_string()))?;
        self.speak(stream, false).await
    }

    async fn unix(&self, socket: &Path) -> Result<Connection, ImagesError> {
        let failed = |error: std::io::Error| ImagesError::Connect {
            address: socket.display().to_string(),
            why: error.to_string(),
        };
        self.speak(UnixStream::connect(socket).await.map_err(failed)?, true).await
    }

    async fn speak<S>(&self, stream: S, is_local: bool) -> Result<Connection, ImagesError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut http = http1::Builder::new();
        let shake = http.max_buf_size(BUFFER).handshake(TokioIo::new(stream));
        let (sender, driver) = shake.await.map_err(broken)?;
        let driver = tokio::spawn(async move {
            // whoever waits for an answer is told
            let _ = driver.await;
        });
        let host = format!("{}:{}", self.host, self.port);
        Ok(Connection { sender, driver, host, path: self.path.clone(), is_local })
    }
}

/// A connection to the server, for one ticket.
pub struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    driver: JoinHandle<()>,
    host: String,
    path: String,
    /// Whether it is the unix socket.
    pub is_local: bool,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// What the server can do.
#[derive(Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Connections that may read at once.
    #[serde(default = "one")]
    pub max_readers: usize,
    /// `extents` must be among them.
    #[serde(default)]
    pub features: Vec<String>,
}

fn one() -> usize {
    1
}

impl Connection {
    async fn ask(
        &mut self,
        method: Method,
        below: &str,
        range: Option<(u64, u64)>,
        expected: StatusCode,
    ) -> Result<Body, ImagesError> {
        let mut request = Request::builder().method(method).uri(format!("{}{below}", self.path));
        request = request.header(HOST, &self.host);
        if let Some((start, end)) = range {
            request = request.header(RANGE, format!("bytes={start}-{}", end - 1));
        }
        let request = request.body(Empty::new()).map_err(|_| ImagesError::Ticket("url"))?;
        let answer = async {
            self.sender.ready().await?;
            self.sender.send_request(request).await
        };
        let answer = timely(answer).await?.map_err(broken)?;
        if answer.status() != expected {
            let mut refusal = refusal(answer).await;
            if let (ImagesError::Refused { words, .. }, Some(id)) =
                (&mut refusal, self.path.rsplit('/').next().filter(|id| !id.is_empty()))
            {
                // a server may repeat it
                *words = words.replace(id, "TICKET");
            }
            return Err(refusal);
        }
        Ok(Body(answer.into_body()))
    }

    /// What the ticket permits. It also counts as a sign of the client.
    ///
    /// # Errors
    /// When the server refuses, or the connection breaks.
    pub async fn options(&mut self) -> Result<Options, ImagesError> {
        let text = self.ask(Method::OPTIONS, "", None, StatusCode::OK).await?.all(1 << 16).await?;
        let options: Options = serde_json::from_slice(&text).map_err(|_| ImagesError::Answer("OPTIONS"))?;
        let has_extents = options.features.iter().any(|feature| feature == "extents");
        if has_extents { Ok(options) } else { Err(ImagesError::Answer("it knows no extents")) }
    }

    /// The list of extents of a context, as it comes.
    ///
    /// # Errors
    /// When the server refuses, or the connection breaks.
    pub async fn extents(&mut self, context: &str) -> Result<Body, ImagesError> {
        self.ask(Method::GET, &format!("/extents?context={context}"), None, StatusCode::OK).await
    }

    /// The bytes from `start` to the one before `end`, as they come.
    ///
    /// # Errors
    /// When the server refuses, or the connection breaks.
    pub async fn read(&mut self, start: u64, end: u64) -> Result<Body, ImagesError> {
        let body = self.ask(Method::GET, "", Some((start, end)), StatusCode::PARTIAL_CONTENT).await?;
        match hyper::body::Body::size_hint(&body.0).exact() {
            Some(length) if length == end - start => Ok(body),
            _ => Err(ImagesError::Answer("its length")),
        }
    }
}

/// An answer's body, as it comes.
pub struct Body(Incoming);

impl Body {
    /// The next bytes; `None` at its end.
    ///
    /// # Errors
    /// When the connection breaks, or stands still.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ImagesError> {
        loop {
            match timely(self.0.frame()).await? {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(bytes) = frame.map_err(broken)?.into_data() {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }

    async fn all(mut self, most: usize) -> Result<Vec<u8>, ImagesError> {
        let mut all = Vec::new();
        while let Some(bytes) = self.next().await? {
            all.extend_from_slice(&bytes);
            if all.len() > most {
                return Err(ImagesError::Answer("it is too long"));
            }
        }
        Ok(all)
    }
}

async fn timely<T>(answer: impl Future<Output = T>) -> Result<T, ImagesError> {
    let silent = |_| ImagesError::Broken(format!("it was silent for {} s", SILENCE.as_secs()));
    tokio::time::timeout(SILENCE, answer).await.map_err(silent)
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn broken(error: hyper::Error) -> ImagesError {
    ImagesError::Broken(super::exit::Chain(&error).to_string())
}

async fn refusal(answer: Response<Incoming>) -> ImagesError {
    let status = answer.status();
    let text = Body(answer.into_body()).all(1 << 16).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text[..text.len().min(WORDS)]).trim().to_owned();
    ImagesError::Refused { status, words: text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_never_shown() {
        let made = crate::imageio::tls::self_signed(&["node".to_owned()], &[]).unwrap();
        let ticket =
            Ticket::new("https://node:54322/images/secret-id", made.ca_pem.as_bytes(), None).unwrap();
        assert!(!format!("{ticket:?}").contains("secret-id"), "{ticket:?}");
        let bad = [
            Ticket::new("http://node/images/secret-id", made.ca_pem.as_bytes(), None),
            Ticket::new("https://node/images/secret-id", b"no certificate", None),
        ];
        for result in bad {
            let error = result.unwrap_err();
            assert!(!format!("{error} {error:?}").contains("secret-id"), "{error:?}");
        }
    }

    #[test]
    fn what_may_pass_is_asked_again() {
        let said = |code: u16, words: &str| ImagesError::Refused {
            status: StatusCode::from_u16(code).unwrap(),
            words: words.to_owned(),
        };
        let refused = |code: u16| said(code, "");
        for (error, passes) in [
            (ImagesError::Broken(String::new()), true),
            (refused(500), true),
            (refused(403), false),
            (said(403, "not allowed: Transfer=x expired"), true),
            (said(403, "not allowed: Transfer=x was canceled"), false),
            (refused(416), false),
            (ImagesError::Answer(""), false),
        ] {
            assert_eq!(error.may_pass(), passes, "{error}");
        }
    }
}
