//! The image server's certificate: from files that the admin gives, or self-signed by this agent.
//!
//! A self-signed one is kept in the state directory, so that a restart keeps the CA that clients were told.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use rustls::ServerConfig;

use super::config::Config;
use crate::imageio::tls;

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
        let folder = config.state_dir.join("tls");
        // another address needs another certificate
        let current = fs::read_to_string(folder.join("host")).is_ok_and(|made_for| made_for == host);
        if !current {
            make(&folder, host, &config.node_name)?;
        }
        let read = |name: &str| fs::read_to_string(folder.join(name));
        let server = tls::server_config(read("tls.crt")?.as_bytes(), read("tls.key")?.as_bytes())?;
        Ok(Self { server, ca: read("ca.crt")? })
    }
}

fn make(folder: &Path, host: &str, node: &str) -> Result<()> {
    let mut names = vec![node.to_owned(), "localhost".to_owned()];
    let mut addresses = vec![IpAddr::from([127, 0, 0, 1])];
    match host.trim_matches(['[', ']']).parse() {
        Ok(address) => addresses.push(address),
        Err(_) => names.push(host.to_owned()),
    }
    let made = tls::self_signed(&names, &addresses)?;
    fs::create_dir_all(folder)?;
    // the host comes last: what is there before it is not used
    let files = [("ca.crt", &made.ca_pem), ("tls.crt", &made.cert_pem), ("tls.key", &made.key_pem)];
    for (name, text) in files.into_iter().map(|(name, text)| (name, text.as_str())).chain([("host", host)]) {
        let path = folder.join(name);
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
    }
    Ok(())
}
