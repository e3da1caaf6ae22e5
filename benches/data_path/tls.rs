//! TLS for the driver: rustls' unbuffered client over a blocking socket.
//!
//! The driver must cost little, or it hides what is measured: with rustls' buffered stream each record is
//! read with a system call of its own and copied twice. Here many are received at once and dropped as they
//! are decrypted.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use anyhow::{Result, bail};
use rustls::ClientConfig;
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError};

/// Bytes received at once.
const RECEIVE: usize = 256 << 10;
/// Room for what is sent at once: parts of a handshake, or a request.
const SEND: usize = 32 << 10;

/// A TLS connection.
pub(crate) struct Tls {
    stream: TcpStream,
    session: UnbufferedClientConnection,
    input: Vec<u8>,
    /// The part of `input` that is not yet decrypted.
    start: usize,
    end: usize,
}

/// What to do when the session can go no further.
enum Stop {
    /// Application data came.
    Data,
    /// It wants bytes of the server.
    Receive,
}

/// Trusts one CA.
pub(crate) fn trust(ca_pem: &[u8]) -> Result<Arc<ClientConfig>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca_pem)?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

impl Tls {
    /// Connects and shakes hands.
    pub(crate) fn connect(to: SocketAddr, config: &Arc<ClientConfig>) -> Result<Tls> {
        let stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        let name = ServerName::IpAddress(to.ip().into());
        let session = UnbufferedClientConnection::new(Arc::clone(config), name)?;
        let mut tls = Tls { stream, session, input: vec![0; RECEIVE], start: 0, end: 0 };
        while !tls.send(&[])? {
            tls.fill()?;
        }
        Ok(tls)
    }

    /// Sends `bytes` when the session is that far; whether it was.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<bool> {
        let mut output = vec![0; SEND];
        let mut filled = 0;
        loop {
            let status = self.session.process_tls_records(&mut self.input[self.start..self.end]);
            let discard = status.discard;
            match status.state? {
                ConnectionState::EncodeTlsData(mut data) => match data.encode(&mut output[filled..]) {
                    Ok(written) => filled += written,
                    Err(EncodeError::InsufficientSize(_)) => bail!("a handshake larger than {SEND} bytes"),
                    Err(error) => return Err(error.into()),
                },
                ConnectionState::TransmitTlsData(data) => {
                    self.stream.write_all(&output[..filled])?;
                    filled = 0;
                    data.done();
                }
                ConnectionState::WriteTraffic(mut traffic) => {
                    match traffic.encrypt(bytes, &mut output[filled..]) {
                        Ok(written) if !bytes.is_empty() => filled += written,
                        Ok(_) => {}
                        Err(EncryptError::InsufficientSize(_)) => bail!("a request larger than {SEND} bytes"),
                        Err(error) => return Err(error.into()),
                    }
                    self.stream.write_all(&output[..filled])?;
                    self.start += discard;
                    return Ok(true);
                }
                ConnectionState::BlockedHandshake => {
                    self.start += discard;
                    return Ok(false);
                }
                state => bail!("the server said {state:?} in the handshake"),
            }
            self.start += discard;
        }
    }

    /// Gives what came to `sink`; waits until something came.
    pub(crate) fn receive(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        loop {
            match self.decrypt(sink)? {
                Stop::Data => return Ok(()),
                Stop::Receive => self.fill()?,
            }
        }
    }

    /// Decrypts all whole records that were received.
    fn decrypt(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<Stop> {
        let mut stop = Stop::Receive;
        loop {
            let status = self.session.process_tls_records(&mut self.input[self.start..self.end]);
            let mut discard = status.discard;
            match status.state? {
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        sink(record.payload)?;
                        stop = Stop::Data;
                    }
                }
                ConnectionState::WriteTraffic(_) => {
                    self.start += discard;
                    return Ok(stop);
                }
                state => bail!("the server said {state:?} in the middle"),
            }
            self.start += discard;
        }
    }

    fn fill(&mut self) -> Result<()> {
        self.input.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let received = self.stream.read(&mut self.input[self.end..])?;
        if received == 0 {
            bail!("the server closed the connection");
        }
        self.end += received;
        Ok(())
    }
}
