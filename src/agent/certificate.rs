//! The image server's certificate: from files that the admin gives, or self-signed by this agent.
//!
//! A self-signed one is kept in the state directory, so that a restart keeps the CA that clients were told. Files are read again
//! when they change, as they do when cert-manager, say, renews what is in a mounted Secret: new connections get the new
//! certificate, open ones go on, and new tickets name the new CA.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::fs::Mode;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::config::Config;
use super::folder::Folder;
use crate::imageio::tls::{self, Tls};

/// Longest of its files that is read, in bytes.
const MAX_PEM: usize = 64 << 10;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(5);

/// What the server proves itself with, and the CA that clients are told.
pub(super) struct Certificate {
    /// For the server.
    pub(super) server: Tls,
    ca: RwLock<String>,
    files: Option<Files>,
}

/// The admin's files.
#[derive(Clone)]
struct Files {
    cert: PathBuf,
    key: PathBuf,
    ca: Option<PathBuf>,
}

/// What was in them. It is never printed: a key is in it.
#[derive(PartialEq, Eq)]
struct Texts {
    cert: String,
    key: String,
    ca: String,
}

impl Files {
    fn read(&self) -> Result<Texts> {
        let read = |path: &Path| fs::read_to_string(path).with_context(|| path.display().to_string());
        Ok(Texts {
            cert: read(&self.cert)?,
            key: read(&self.key)?,
            ca: self.ca.as_deref().map(read).transpose()?.unwrap_or_default(),
        })
    }
}

impl Certificate {
    /// As the admin configured it.
    pub(super) fn load_or_make(config: &Config) -> Result<Self> {
        if let (Some(cert), Some(key)) = (&config.tls_cert, &config.tls_key) {
            return Self::of(Files { cert: cert.clone(), key: key.clone(), ca: config.tls_ca.clone() });
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

    fn of(files: Files) -> Result<Self> {
        let texts = files.read()?;
        let server = tls::server_config(texts.cert.as_bytes(), texts.key.as_bytes())
            .with_context(|| files.cert.display().to_string())?;
        Ok(Self { server: server.into(), ca: RwLock::new(texts.ca), files: Some(files) })
    }

    /// The CA that clients are told, in PEM; empty when they are to use their own trust store.
    pub(super) fn ca(&self) -> String {
        self.ca.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes what the files have become, for ever. What cannot be used is not taken: a certificate whose key is not there yet.
    pub(super) async fn follow(&self) {
        let Some(files) = &self.files else { return std::future::pending().await };
        let mut taken = files.read().ok();
        let mut told = String::new();
        loop {
            tokio::time::sleep(LOOK).await;
            let read = files.clone();
            let Ok(texts) = tokio::task::spawn_blocking(move || read.read()).await else { continue };
            match texts.and_then(|texts| self.take(texts, &mut taken)) {
                Ok(()) => told.clear(),
                Err(error) => {
                    let words = format!("{error:#}");
                    if words != told {
                        tracing::warn!(
                            error = words,
                            "the new certificate is not taken: the old one is shown still"
                        );
                        told = words;
                    }
                }
            }
        }
    }

    /// Takes what was read, if it is not what was `taken` before.
    fn take(&self, texts: Texts, taken: &mut Option<Texts>) -> Result<()> {
        if taken.as_ref() == Some(&texts) {
            return Ok(());
        }
        let server = tls::server_config(texts.cert.as_bytes(), texts.key.as_bytes())?;
        // first whom to trust, then what is to be trusted
        self.ca.write().unwrap_or_else(PoisonError::into_inner).clone_from(&texts.ca);
        self.server.replace(server);
        tracing::info!("the image server shows a new certificate");
        *taken = Some(texts);
        Ok(())
    }

    /// The one that was made earlier for this host; another address, or files that were damaged, need another.
    fn kept(folder: &Folder, host: &str) -> Option<Self> {
        let read = |name: &str| String::from_utf8(folder.read(name, MAX_PEM).ok()??).ok();
        let (made_for, ca) = (read("host")?, read("ca.crt")?);
        let server = tls::server_config(read("tls.crt")?.as_bytes(), read("tls.key")?.as_bytes()).ok()?;
        (made_for == host && CertificateDer::from_pem_slice(ca.as_bytes()).is_ok()).then(|| Self {
            server: server.into(),
            ca: RwLock::new(ca),
            files: None,
        })
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
    fn files_that_change_are_taken_once_they_fit() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        let write = |name: &str, text: &str| fs::write(file(name), text).unwrap();
        let (old, new) = (tls::self_signed(&[], &[]).unwrap(), tls::self_signed(&[], &[]).unwrap());
        write("tls.crt", &old.cert_pem);
        write("tls.key", &old.key_pem);
        write("ca.crt", &old.ca_pem);
        let files = Files { cert: file("tls.crt"), key: file("tls.key"), ca: Some(file("ca.crt")) };
        let certificate = Certificate::of(files.clone()).unwrap();
        let mut taken = Some(files.read().unwrap());
        let shown = certificate.server.current();
        certificate.take(files.read().unwrap(), &mut taken).unwrap();
        assert!(std::sync::Arc::ptr_eq(&shown, &certificate.server.current()), "nothing changed");

        write("tls.crt", &new.cert_pem);
        write("ca.crt", &new.ca_pem);
        assert!(certificate.take(files.read().unwrap(), &mut taken).is_err(), "its key is not there yet");
        assert_eq!(certificate.ca(), old.ca_pem, "nothing of it is taken");
        assert!(std::sync::Arc::ptr_eq(&shown, &certificate.server.current()));

        write("tls.key", &new.key_pem);
        certificate.take(files.read().unwrap(), &mut taken).unwrap();
        assert_eq!(certificate.ca(), new.ca_pem);
        assert!(!std::sync::Arc::ptr_eq(&shown, &certificate.server.current()));
    }

    #[test]
    fn it_is_kept_and_made_anew_when_it_is_damaged() {
        crate::telemetry::install_crypto();
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::make(&dir.path().join("tls"), Mode::RWXU).unwrap();
        assert!(Certificate::kept(&folder, "node-a").is_none());
        make(&folder, "node-a", "node-a").unwrap();
        let ca = Certificate::kept(&folder, "node-a").unwrap().ca();
        assert_eq!(Certificate::kept(&folder, "node-a").unwrap().ca(), ca);
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
