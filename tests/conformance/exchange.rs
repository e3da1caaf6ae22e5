//! A client of raw bytes: sends what it is told to, reads what HTTP/1 says is the answer, and sees what
//! becomes of the connection.
//!
//! It waits for nothing but the server. Whether a connection was kept is asked with one more request, the probe.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde::Deserialize;

/// Longest wait for a byte.
const PATIENCE: Duration = Duration::from_secs(20);
const PROBE: &[u8] = b"OPTIONS /images/* HTTP/1.1\r\nhost: probe\r\n\r\n";

/// How a server is reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Transport {
    Tls,
    Unix,
}

/// Where a server is.
#[derive(Clone)]
pub(crate) struct Endpoint {
    /// `host:port`, and whom to trust there.
    pub(crate) tls: Option<(String, Arc<ClientConfig>)>,
    /// Path of its unix socket.
    pub(crate) unix: Option<PathBuf>,
}

/// What is sent on one connection.
pub(crate) struct Script {
    pub(crate) requests: Vec<Vec<u8>>,
    /// All before the first answer is read.
    pub(crate) pipelined: bool,
    /// Then the client's half is closed.
    pub(crate) end: bool,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) version: String,
    pub(crate) status: u16,
    /// Statuses of the interim answers before it.
    pub(crate) interim: Vec<u16>,
    /// Names in lower case, in the order they came.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The body came as whole as its head said.
    pub(crate) whole: bool,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// What is after the last answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum After {
    /// The next request is answered.
    Kept,
    /// The connection is closed.
    Closed,
    /// What comes is no answer to the next request: a body was taken for a request, or for an answer.
    OutOfStep,
    /// Nothing comes.
    Silent,
}

/// What became of a script.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) answers: Vec<Answer>,
    pub(crate) after: After,
}

/// Plays a script on a connection of its own.
pub(crate) fn play(endpoint: &Endpoint, transport: Transport, script: &Script) -> Exchange {
    let mut wire = Wire { stream: connect(endpoint, transport), input: Vec::new() };
    let mut answers = Vec::new();
    if script.pipelined {
        wire.send(&script.requests.concat());
    }
    for (at, request) in script.requests.iter().enumerate() {
        if !script.pipelined {
            wire.send(request);
        }
        if script.end && at + 1 == script.requests.len() {
            wire.stream.end();
        }
        match wire.answer(request.starts_with(b"HEAD ")) {
            Ok(answer) => answers.push(answer),
            Err(after) => return Exchange { answers, after },
        }
    }
    if !script.end {
        wire.send(PROBE);
    }
    let after = match wire.answer(false) {
        Ok(probed) if probed.status == 200 && probed.header("allow").is_some() => After::Kept,
        Ok(_) => After::OutOfStep,
        Err(after) => after,
    };
    Exchange { answers, after }
}

trait Stream: Read + Write {
    /// Closes the client's half.
    fn end(&mut self);
}

impl Stream for UnixStream {
    fn end(&mut self) {
        self.shutdown(Shutdown::Write).unwrap();
    }
}

impl Stream for StreamOwned<ClientConnection, TcpStream> {
    fn end(&mut self) {
        self.conn.send_close_notify();
        let _ = self.flush();
        let _ = self.sock.shutdown(Shutdown::Write);
    }
}

fn connect(endpoint: &Endpoint, transport: Transport) -> Box<dyn Stream> {
    match transport {
        Transport::Unix => {
            let stream =
                UnixStream::connect(endpoint.unix.as_ref().unwrap()).expect("the unix socket answers");
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            Box::new(stream)
        }
        Transport::Tls => {
            let (address, config) = endpoint.tls.as_ref().unwrap();
            let stream = TcpStream::connect(address).expect("the TLS port answers");
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            stream.set_nodelay(true).unwrap();
            let host = address.rsplit_once(':').unwrap().0.to_owned();
            let session = ClientConnection::new(Arc::clone(config), host.try_into().unwrap()).unwrap();
            Box::new(StreamOwned::new(session, stream))
        }
    }
}

/// Version, status and headers.
type Head = (String, u16, Vec<(String, String)>);

struct Wire {
    stream: Box<dyn Stream>,
    input: Vec<u8>,
}

impl Wire {
    /// A server may refuse before it has read all: what it says is read next.
    fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).and_then(|()| self.stream.flush());
    }

    /// Receives more; an error is what became of the connection.
    fn more(&mut self) -> Result<(), After> {
        let mut bytes = [0; 64 << 10];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(After::Closed),
            Ok(count) => {
                self.input.extend_from_slice(&bytes[..count]);
                Ok(())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Err(After::Silent)
            }
            // Closed without ceremony.
            Err(_) => Err(After::Closed),
        }
    }

    fn answer(&mut self, to_head: bool) -> Result<Answer, After> {
        let mut interim = Vec::new();
        let (version, status, headers) = loop {
            let (version, status, headers) = self.head()?;
            if !(100..200).contains(&status) {
                break (version, status, headers);
            }
            interim.push(status);
        };
        let mut answer = Answer { version, status, interim, headers, body: Vec::new(), whole: true };
        if to_head {
            return Ok(answer);
        }
        let received = if answer.header("transfer-encoding").is_some_and(|coding| coding == "chunked") {
            self.chunks(&mut answer.body)
        } else if let Some(length) = answer.header("content-length") {
            let Ok(length) = length.parse() else { return Err(After::OutOfStep) };
            self.take(length, &mut answer.body)
        } else {
            while self.more().is_ok() {}
            answer.body = std::mem::take(&mut self.input);
            Ok(())
        };
        answer.whole = received.is_ok();
        Ok(answer)
    }

    /// Version, status and headers of the next head.
    fn head(&mut self) -> Result<Head, After> {
        let end = loop {
            if let Some(end) = find(&self.input, b"\r\n\r\n") {
                break end;
            }
            let started = !self.input.is_empty();
            // Bytes without the end of a head are no answer.
            self.more()
                .map_err(|after| if started && after == After::Closed { After::OutOfStep } else { after })?;
        };
        let head: Vec<u8> = self.input.drain(..end + 4).collect();
        let head = String::from_utf8_lossy(&head[..end]).into_owned();
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap_or_default().splitn(3, ' ');
        let version =
            first.next().filter(|version| version.starts_with("HTTP/1.")).ok_or(After::OutOfStep)?;
        let status = first.next().and_then(|status| status.parse().ok()).ok_or(After::OutOfStep)?;
        let headers = lines.map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        });
        let headers = headers.collect::<Option<Vec<_>>>().ok_or(After::OutOfStep)?;
        Ok((version.to_owned(), status, headers))
    }

    fn take(&mut self, length: usize, into: &mut Vec<u8>) -> Result<(), After> {
        let mut received = Ok(());
        while self.input.len() < length && received.is_ok() {
            received = self.more();
        }
        into.extend(self.input.drain(..length.min(self.input.len())));
        received
    }

    fn chunks(&mut self, body: &mut Vec<u8>) -> Result<(), After> {
        loop {
            while find(&self.input, b"\r\n").is_none() {
                self.more()?;
            }
            let end = find(&self.input, b"\r\n").unwrap_or_default();
            let line: Vec<u8> = self.input.drain(..end + 2).collect();
            let length = std::str::from_utf8(&line[..end]).ok();
            let length =
                length.and_then(|text| usize::from_str_radix(text, 16).ok()).ok_or(After::OutOfStep)?;
            self.take(length, body)?;
            self.take(2, &mut Vec::new())?;
            if length == 0 {
                return Ok(());
            }
        }
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}
