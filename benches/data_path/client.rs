//! The driver: a blocking HTTP/1.1 client that asks for ranges and drops what comes, the same for both
//! servers. One thread a connection; what it costs is in `tls` and in the kernel.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use rustls::ClientConfig;

use super::tls::Tls;

/// Bytes received at once over a unix socket.
const RECEIVE: usize = 256 << 10;

/// Where a server is.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    /// Over TLS.
    Https(SocketAddr, Arc<ClientConfig>),
    /// In clear, over a unix socket.
    Unix(PathBuf),
}

enum Wire {
    Tls(Box<Tls>),
    Unix(UnixStream, Vec<u8>),
}

/// A keep-alive connection.
pub(crate) struct Client {
    wire: Wire,
    path: String,
}

impl Client {
    /// Connects, for requests under `path`.
    pub(crate) fn connect(way: &Way, path: &str) -> Result<Client> {
        let wire = match way {
            Way::Https(address, config) => Wire::Tls(Box::new(Tls::connect(*address, config)?)),
            Way::Unix(socket) => {
                let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
                Wire::Unix(stream, vec![0; RECEIVE])
            }
        };
        Ok(Client { wire, path: path.to_owned() })
    }

    /// Reads a range and drops it.
    pub(crate) fn get(&mut self, range: &Range<u64>) -> Result<()> {
        let (path, first, last) = (&self.path, range.start, range.end - 1);
        let request = format!("GET {path} HTTP/1.1\r\nHost: h\r\nRange: bytes={first}-{last}\r\n\r\n");
        let mut answer = Answer::default();
        self.ask(&request, &mut answer)?;
        let length = range.end - range.start;
        ensure!(answer.status == 206, "HTTP status {} for a range", answer.status);
        ensure!(answer.bytes == length, "{} bytes for a range of {length}", answer.bytes);
        Ok(())
    }

    /// Reads the list of extents.
    pub(crate) fn extents(&mut self) -> Result<Vec<u8>> {
        let request = format!("GET {}/extents HTTP/1.1\r\nHost: h\r\n\r\n", self.path);
        let mut answer = Answer { kept: Some(Vec::new()), ..Answer::default() };
        self.ask(&request, &mut answer)?;
        ensure!(answer.status == 200, "HTTP status {} for the extents", answer.status);
        Ok(answer.kept.unwrap_or_default())
    }

    fn ask(&mut self, request: &str, answer: &mut Answer) -> Result<()> {
        match &mut self.wire {
            Wire::Tls(tls) => {
                ensure!(tls.send(request.as_bytes())?, "the handshake is not over");
                while answer.part != Part::End {
                    tls.receive(&mut |bytes| answer.take(bytes))?;
                }
            }
            Wire::Unix(stream, buffer) => {
                stream.write_all(request.as_bytes())?;
                while answer.part != Part::End {
                    let received = stream.read(buffer)?;
                    ensure!(received > 0, "the server closed the connection");
                    answer.take(&buffer[..received])?;
                }
            }
        }
        Ok(())
    }
}

/// Reads all ranges over so many connections, each taking the next range when it is free.
pub(crate) fn get_all(way: &Way, path: &str, ranges: &[Range<u64>], connections: usize) -> Result<()> {
    let left = Mutex::new(ranges.iter());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    in_threads(connections, |_| {
        let mut client = Client::connect(way, path)?;
        while let Some(range) = next() {
            client.get(range)?;
        }
        Ok(())
    })
    .map(|_| ())
}

/// Runs `work` in so many threads; what each gave.
pub(crate) fn in_threads<T: Send>(
    threads: usize,
    work: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|number| {
                let work = &work;
                scope.spawn(move || work(number))
            })
            .collect();
        let ended = running.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(_) => bail!("a thread of the driver panicked"),
        });
        ended.collect()
    })
}

/// What comes next of an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Head,
    /// So many bytes of the body, or of a chunk of it.
    Body(u64),
    /// The line end behind a chunk.
    ChunkEnd,
    /// The line that says how long a chunk is.
    ChunkHead,
    /// The line end behind the last one.
    LastLine,
    End,
}

/// An answer as far as it came.
struct Answer {
    part: Part,
    /// Of the part that is a head or a line, as far as it came.
    line: Vec<u8>,
    chunked: bool,
    status: u16,
    bytes: u64,
    kept: Option<Vec<u8>>,
}

impl Default for Answer {
    fn default() -> Answer {
        Answer { part: Part::Head, line: Vec::new(), chunked: false, status: 0, bytes: 0, kept: None }
    }
}

impl Answer {
    fn take(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let end: &[u8] = match self.part {
                Part::Body(left) => {
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    let (body, rest) = bytes.split_at(taken);
                    self.body(body, left - taken as u64);
                    bytes = rest;
                    continue;
                }
                Part::Head => b"\r\n\r\n",
                Part::ChunkHead | Part::ChunkEnd | Part::LastLine => b"\r\n",
                Part::End => bail!("bytes behind the end of the answer"),
            };
            while let Some((first, rest)) = bytes.split_first()
                && !self.line.ends_with(end)
            {
                self.line.push(*first);
                bytes = rest;
            }
            if self.line.ends_with(end) {
                let line = std::mem::take(&mut self.line);
                self.part = self.behind(std::str::from_utf8(&line)?.trim_end())?;
            }
        }
        Ok(())
    }

    fn body(&mut self, body: &[u8], left: u64) {
        self.bytes += body.len() as u64;
        if let Some(kept) = &mut self.kept {
            kept.extend_from_slice(body);
        }
        self.part = match left {
            0 if self.chunked => Part::ChunkEnd,
            0 => Part::End,
            left => Part::Body(left),
        };
    }

    /// What comes behind a head or a line.
    fn behind(&mut self, text: &str) -> Result<Part> {
        Ok(match self.part {
            Part::Head => {
                let (line, headers) = text.split_once("\r\n").unwrap_or((text, ""));
                self.status = line.split(' ').nth(1).context("no status")?.parse()?;
                let headers = headers.to_ascii_lowercase();
                let header =
                    |name| headers.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
                self.chunked = header("transfer-encoding") == Some("chunked");
                match header("content-length") {
                    Some(length) => match length.trim().parse()? {
                        0 => Part::End,
                        length => Part::Body(length),
                    },
                    None if self.chunked => Part::ChunkHead,
                    None => bail!("an answer without a length"),
                }
            }
            Part::ChunkHead => match u64::from_str_radix(text, 16)? {
                0 => Part::LastLine,
                length => Part::Body(length),
            },
            Part::ChunkEnd => Part::ChunkHead,
            part => {
                ensure!(part == Part::LastLine && text.is_empty(), "trailers");
                Part::End
            }
        })
    }
}
