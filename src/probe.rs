//! The port for probes and Prometheus, over plain HTTP: `/healthz`, `/readyz`, `/metrics`.
//!
//! `/healthz` says that the process makes progress: its tasks run, and its blocking calls get a thread. It says nothing of the
//! world: what is outside does not come back by a restart. `/readyz` says, line by line, whether the process can do its work.
//!
//! It answers GET and HEAD, one request a connection, and never reads a body. Nothing secret is in what it tells.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::metrics::{self, Metrics, Sample};

/// How often the process is seen to make progress.
const BEAT: Duration = Duration::from_secs(1);
/// Without progress for so long it is to be restarted.
const STALLED: Duration = Duration::from_secs(30);
/// How often an address is tried that is in use.
const AGAIN: Duration = Duration::from_millis(500);
/// Connections at a time.
const CONNECTIONS: usize = 64;
/// Time that a connection has for its one request.
const WITHIN: Duration = Duration::from_secs(10);

/// Where to listen for probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Here.
    At(SocketAddr),
    /// Nowhere.
    Nowhere,
}

impl FromStr for Listen {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" { Ok(Self::Nowhere) } else { text.parse().map(Self::At) }
    }
}

/// One thing that a process needs to be ready, and whether it has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What, in a word.
    pub name: &'static str,
    /// What is wrong with it, for people.
    pub wrong: Option<String>,
}

/// What is asked.
pub trait Subject: Send + Sync + 'static {
    /// What the process needs to do its work. It is ready when nothing of it is wrong.
    fn checks(&self) -> Vec<Check>;

    /// What it counted.
    fn metrics(&self) -> &Metrics;

    /// What it can tell of now.
    fn samples(&self) -> impl Future<Output = Vec<Sample>> + Send;
}

/// A sign of something outside that has to be there: when it was last seen, or what is wrong. A sign that is too old is none.
#[derive(Debug)]
pub struct Sign {
    name: &'static str,
    holds: Duration,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    at: Option<Instant>,
    wrong: Option<String>,
}

impl Sign {
    /// Not seen yet. Seen once it holds for so long.
    pub fn new(name: &'static str, holds: Duration) -> Self {
        Self { name, holds, seen: Mutex::new(Seen { at: None, wrong: None }) }
    }

    /// It is there.
    pub fn good(&self) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) =
            Seen { at: Some(Instant::now()), wrong: None };
    }

    /// It is not, and why.
    pub fn bad(&self, why: impl ToString) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).wrong = Some(why.to_string());
    }

    /// Notes what became of asking for it.
    pub fn note<T, E: ToString>(&self, asked: &Result<T, E>) {
        match asked {
            Ok(_) => self.good(),
            Err(error) => self.bad(error.to_string()),
        }
    }

    /// Whether it is there.
    pub fn check(&self) -> Check {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let wrong = match (&seen.wrong, seen.at.map(|at| at.elapsed())) {
            (Some(wrong), _) => Some(wrong.clone()),
            (None, None) => Some("not seen yet".to_owned()),
            (None, Some(age)) if age > self.holds => Some(format!("not seen for {} s", age.as_secs())),
            (None, Some(_)) => None,
        };
        Check { name: self.name, wrong }
    }
}

/// Answers, for ever. An address that another process still has is waited for: a predecessor may be on its way out.
///
/// # Errors
/// When the address cannot be used at all.
pub async fn serve(listen: Listen, subject: Arc<impl Subject>) -> io::Result<Infallible> {
    let Listen::At(address) = listen else { return Ok(std::future::pending().await) };
    let listener = bind(address).await?;
    tracing::info!(address = %listener.local_addr()?, "health and metrics are served");
    let pulse = Arc::new(Mutex::new(Instant::now()));
    tokio::select! {
        never = beat(&pulse) => Ok(never),
        never = accept(listener, subject, &pulse) => Ok(never),
    }
}

async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%address, "the address of --health-listen is in use: health and metrics wait for it");
                }
                tokio::time::sleep(AGAIN).await;
            }
            other => return other,
        }
    }
}

/// Notes that the process makes progress, as long as it does.
async fn beat(pulse: &Mutex<Instant>) -> Infallible {
    loop {
        // one of the threads that blocking calls need, too
        if tokio::task::spawn_blocking(|| {}).await.is_ok() {
            *pulse.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
        tokio::time::sleep(BEAT).await;
    }
}

async fn accept(
    listener: TcpListener,
    subject: Arc<impl Subject>,
    pulse: &Arc<Mutex<Instant>>,
) -> Infallible {
    let limit = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let permit = Arc::clone(&limit).acquire_owned().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                let (subject, pulse) = (Arc::clone(&subject), Arc::clone(pulse));
                tokio::spawn(async move {
                    let _permit = permit;
                    // a client that is late, or went away, is nobody's problem
                    let _ = tokio::time::timeout(WITHIN, converse(stream, subject, pulse)).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for health and metrics");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, subject: Arc<impl Subject>, pulse: Arc<Mutex<Instant>>) {
    let answer = service_fn(move |request: Request<_>| {
        let (subject, pulse) = (Arc::clone(&subject), Arc::clone(&pulse));
        async move {
            let pulse = pulse.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
            Ok::<_, Infallible>(answer(request.method(), request.uri().path(), &*subject, pulse).await)
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(WITHIN)
        .max_buf_size(16 << 10)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    if let Err(error) = served.await {
        tracing::debug!(%error, "a connection for health and metrics failed");
    }
}

async fn answer(
    method: &Method,
    path: &str,
    subject: &impl Subject,
    pulse: Duration,
) -> Response<Full<Bytes>> {
    if method != Method::GET && method != Method::HEAD {
        let mut response = said(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".to_owned());
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/healthz" if pulse < STALLED => said(StatusCode::OK, "ok\n".to_owned()),
        "/healthz" => {
            let words = format!("no progress for {} s\n", pulse.as_secs());
            said(StatusCode::INTERNAL_SERVER_ERROR, words)
        }
        "/readyz" => {
            let (status, words) = readiness(&subject.checks());
            said(status, words)
        }
        "/metrics" => match subject.metrics().text(&subject.samples().await) {
            Ok(text) => {
                let mut response = said(StatusCode::OK, text);
                let kind = HeaderValue::from_static(metrics::CONTENT_TYPE);
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                response
            }
            Err(_) => said(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written\n".to_owned()),
        },
        _ => said(StatusCode::NOT_FOUND, "try /healthz, /readyz or /metrics\n".to_owned()),
    }
}

/// One line a check, as the API server's own `/readyz?verbose` has them. Pure.
fn readiness(checks: &[Check]) -> (StatusCode, String) {
    let lines = checks.iter().map(|check| match &check.wrong {
        None => format!("[+]{} ok\n", check.name),
        Some(wrong) => format!("[-]{}: {wrong}\n", check.name),
    });
    let ready = checks.iter().all(|check| check.wrong.is_none());
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, lines.collect())
}

fn said(status: StatusCode, words: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(words.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::metrics::{By, Metric};

    struct Fake {
        metrics: Metrics,
        sign: Sign,
    }

    impl Subject for Fake {
        fn checks(&self) -> Vec<Check> {
            vec![self.sign.check(), Check { name: "always", wrong: None }]
        }

        fn metrics(&self) -> &Metrics {
            &self.metrics
        }

        async fn samples(&self) -> Vec<Sample> {
            vec![Sample::count(Metric::Tickets, [], 3)]
        }
    }

    async fn ask(fake: &Fake, method: Method, path: &str, pulse: u64) -> (u16, String) {
        let response = answer(&method, path, fake, Duration::from_secs(pulse)).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn each_path_says_what_it_is_for() {
        let sign = Sign::new("libvirt", Duration::from_secs(20));
        let fake = Fake { metrics: Metrics::new(By::Agent), sign };
        assert_eq!(ask(&fake, Method::GET, "/healthz", 29).await, (200, "ok\n".to_owned()));
        assert_eq!(ask(&fake, Method::GET, "/healthz", 30).await.0, 500);
        let not_yet = "[-]libvirt: not seen yet\n[+]always ok\n".to_owned();
        assert_eq!(ask(&fake, Method::GET, "/readyz", 0).await, (503, not_yet));
        fake.sign.good();
        assert_eq!(ask(&fake, Method::GET, "/readyz", 0).await.0, 200);
        tokio::time::advance(Duration::from_secs(21)).await;
        assert!(ask(&fake, Method::GET, "/readyz", 0).await.1.contains("not seen for 21 s"));
        fake.sign.good();
        fake.sign.bad("connection refused");
        assert!(ask(&fake, Method::GET, "/readyz", 0).await.1.contains("[-]libvirt: connection refused"));
        let (status, text) = ask(&fake, Method::GET, "/metrics", 0).await;
        assert!(status == 200 && text.contains("\nvirtmark_imageio_tickets 3.0\n"), "{text}");
        assert_eq!(ask(&fake, Method::POST, "/metrics", 0).await.0, 405);
        assert_eq!(ask(&fake, Method::GET, "/", 0).await.0, 404);
    }

    #[test]
    fn none_is_an_address() {
        assert_eq!("none".parse(), Ok(Listen::Nowhere));
        assert_eq!("[::]:8080".parse(), Ok(Listen::At("[::]:8080".parse().unwrap())));
        assert!("8080".parse::<Listen>().is_err());
    }
}
