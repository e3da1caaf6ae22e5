//! The image server's certificate: from files that the admin gives, or self-signed by this agent.
//!
//! A self-signed one is kept in the state directory, so that a restart keeps the CA that clients were told.

use std::fs;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use rustix::fs::Mode;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::config::Config;
use super::folder::Folder;
use crate::imageio::tls;

/// Longest of its files that is read, in bytes.
const MAX_PEM: usize = 64 << 10;

/// What the server proves itself with, and the CA that clients are told.
pub(super) struct Certificate {
    /// For the server.
    pub(super) server: Arc<ServerConfig>,
    /// The CA, in PEM; empty when clients are to use their own trust store.
    pub(super) ca: String,
}

impl Certificate {
    /// As the admin configured it.
    pub(super) fn load_or_make(config: &Config) -> Result<Self> {
        if let (Some(cert), Some(key)) = (&config.tls_cert, &config.tls_key) {
            let ca = match &config.tls_ca {
                Some(path) => fs::read_to_string(path).with_context(|| path.display().to_string())?,
                None => String::new(),
            };
            return Ok(Self { server: tls::from_files(cert, key)?, ca });
        }
        let advertised = config.advertised();
        let host = advertised.rsplit_once(':').map_or(advertised.as_str(), |(host, _)| host);
        let path = config.state_dir.join("tls");
        let folder = Folder::make(&path, Mode::RWXU).with_context(|| path.display().to_string())?;
        match Self::kept(&folder, host) {
            Some(kept) => Ok(kept),
            None => {
                tracing::info!(host, "a certificate of this agent's own is made");
                make(&folder, host, &config.node_name)?;
                Self::kept(&folder, host).context("the certificate that was just made cannot be used")
            }
        }
    }

    /// The one that was made earlier for this host; another address, or files that were damaged, need another.
    fn kept(folder: &Folder, host: &str) -> Option<Self> {
        let read = |name: &str| String::from_utf8(folder.read(name, MAX_PEM).ok()??).ok();
        let (made_for, ca) = (read("host")?, read("ca.crt")?);
        let server = tls::server_config(read("tls.crt")?.as_bytes(), read("tls.key")?.as_bytes()).ok()?;
        (made_for == host && CertificateDer::from_pem_slice(ca.as_bytes()).is_ok())
            .then_some(Self { server, ca })
    }
}

fn make(folder: &Folder, host: &str, node: &str) -> Result<()> {
    let mut names = vec![node.to_owned(), "localhost".to_owned()];
    let mut addresses = vec![IpAddr::from([127, 0, 0, 1])];
    match host.trim_matches(['[', ']']).parse() {
        Ok(address) => addresses.push(address),
        Err(_) => names.push(host.to_owned()),
    }
    let made = tls::self_signed(&names, &addresses)?;
    // the host comes last: what is there before it is not used
    folder.remove("host")?;
    let files = [("ca.crt", &made.ca_pem), ("tls.crt", &made.cert_pem), ("tls.key", &made.key_pem)];
    for (name, text) in files.into_iter().map(|(name, text)| (name, text.as_str())).chain([("host", host)]) {
        folder
            .write(name, text.as_bytes())
            .with_context(|| folder.path().join(name).display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_kept_and_made_anew_when_it_is_damaged() {
        crate::telemetry::install_crypto();
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::make(&dir.path().join("tls"), Mode::RWXU).unwrap();
        assert!(Certificate::kept(&folder, "node-a").is_none());
        make(&folder, "node-a", "node-a").unwrap();
        let ca = Certificate::kept(&folder, "node-a").unwrap().ca;
        assert_eq!(Certificate::kept(&folder, "node-a").unwrap().ca, ca);
        assert!(Certificate::kept(&folder, "node-b").is_none(), "another address");
        for name in ["ca.crt", "tls.crt", "tls.key", "host"] {
            let whole = folder.read(name, MAX_PEM).unwrap().unwrap();
            folder.write(name, &whole[..3]).unwrap();
            assert!(Certificate::kept(&folder, "node-a").is_none(), "{name} is cut");
            folder.write(name, &whole).unwrap();
        }
        assert!(Certificate::kept(&folder, "node-a").is_some());
    }
}
