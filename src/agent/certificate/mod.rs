//! The image server's certificate: from files that the admin gives, self-signed by this agent, or signed by the operator.
//!
//! However it comes, it is exchanged while the server runs: new connections get the new certificate, open ones go on, and new
//! tickets name the new CA. Where there is none yet the image server waits for it, and nothing else does.

mod asker;
mod files;
mod own;
mod renewal;
mod signed;

use std::sync::{PoisonError, RwLock};

use anyhow::{Context as _, Result};
use kube::Client;
use rustix::fs::Mode;
use tokio::sync::SetOnce;

use self::files::Files;
use self::signed::Signed;
use super::config::{CertificateFrom, Config};
use super::folder::Folder;
use crate::imageio::tls::{self, Tls};
use crate::probe::Sign;

/// Longest of its files that is read, in bytes.
const MAX_PEM: usize = 64 << 10;

/// What the server proves itself with, and the CA that clients are told.
pub(super) struct Certificate {
    shown: Shown,
    source: Source,
}

/// Where it comes from.
enum Source {
    /// This agent made it, and it stays as it is.
    Own,
    Files(Files),
    Signed(Box<Signed>),
}

/// What is shown now.
#[derive(Default)]
struct Shown {
    server: SetOnce<Tls>,
    ca: RwLock<Option<String>>,
}

impl Shown {
    /// Shows another one: certificate chain and key, and whom to trust; all PEM.
    fn show(&self, certificate: &str, key: &str, ca: &str) -> Result<()> {
        let config = tls::server_config(certificate.as_bytes(), key.as_bytes())?;
        // first whom to trust, then what is to be trusted
        self.tell(ca);
        match self.server.get() {
            Some(server) => server.replace(config),
            // nobody else sets it
            None => drop(self.server.set(config.into())),
        }
        Ok(())
    }

    /// Tells clients of another CA.
    fn tell(&self, ca: &str) {
        *self.ca.write().unwrap_or_else(PoisonError::into_inner) = Some(ca.to_owned());
    }
}

impl Certificate {
    /// As the admin configured it; one that is to be signed, as it was kept, if it was.
    pub(super) fn load(config: &Config, client: &Client) -> Result<Self> {
        let shown = Shown::default();
        if let (Some(cert), Some(key)) = (&config.tls_cert, &config.tls_key) {
            let files = Files { cert: cert.clone(), key: key.clone(), ca: config.tls_ca.clone() };
            let texts = files.read()?;
            shown
                .show(&texts.cert, &texts.key, &texts.ca)
                .with_context(|| files.cert.display().to_string())?;
            return Ok(Self { shown, source: Source::Files(files) });
        }
        let advertised = config.advertised();
        let host = advertised.rsplit_once(':').map_or(advertised.as_str(), |(host, _)| host);
        let path = config.state_dir.join("tls");
        let folder = Folder::make(&path, Mode::RWXU).with_context(|| path.display().to_string())?;
        let source = match config.certificate_from {
            CertificateFrom::Own => {
                own::load_or_make(&folder, host, &config.node_name, &shown)?;
                Source::Own
            }
            CertificateFrom::Signer => {
                let folder = folder.make_folder("signed").with_context(|| path.display().to_string())?;
                let host = host.trim_matches(['[', ']']);
                let signed = Signed::new(client, &config.system_namespace, &config.node_name, host, folder);
                signed.load(&shown);
                Source::Signed(Box::new(signed))
            }
        };
        Ok(Self { shown, source })
    }

    /// The CA that clients are told, in PEM; empty when they are to use their own trust store, `None` while there is no
    /// certificate.
    pub(super) fn ca(&self) -> Option<String> {
        self.shown.ca.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the server shows, once there is something.
    pub(super) async fn server(&self) -> Tls {
        self.shown.server.wait().await.clone()
    }

    /// Takes what it becomes, for ever. What is wrong with it is told by `sign`.
    pub(super) async fn follow(&self, sign: &Sign) {
        match &self.source {
            Source::Own => {
                sign.good();
                std::future::pending::<()>().await;
            }
            Source::Files(files) => {
                sign.good();
                files.follow(&self.shown).await;
            }
            Source::Signed(signed) => signed.follow(&self.shown, sign).await,
        }
    }
}
