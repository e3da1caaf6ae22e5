//! What a certificate says, and whether a client that trusts a bundle would take it. It makes none.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};

use super::X509Error;

/// From when to when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its first second.
    pub from: Timestamp,
    /// Its last one.
    pub to: Timestamp,
}

impl Span {
    /// That of the first certificate in a PEM text.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pem: &str) -> Result<Self, X509Error> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| X509Error::NoCertificate)?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(|_| X509Error::NoCertificate)?;
        let at = |seconds| Timestamp::from_second(seconds).map_err(|_| X509Error::Time);
        let validity = parsed.validity();
        Ok(Self { from: at(validity.not_before.timestamp())?, to: at(validity.not_after.timestamp())? })
    }

    /// How long it is.
    pub fn length(self) -> SignedDuration {
        self.to.duration_since(self.from)
    }

    /// What is left of it.
    pub fn left(self, now: Timestamp) -> SignedDuration {
        self.to.duration_since(now)
    }

    /// Whether `now` is in it.
    pub fn holds(self, now: Timestamp) -> bool {
        self.from <= now && now <= self.to
    }
}

/// The certificates of a PEM text, each as a text of its own.
pub fn each(pem: &str) -> Vec<String> {
    const END: &str = "-----END CERTIFICATE-----";
    let parts = pem.split_inclusive(END).filter(|part| part.contains(END));
    parts.map(|part| format!("{}\n", part.trim())).collect()
}

/// Whether a TLS client that trusts `bundle` and nothing else takes `certificate` (both PEM) at `now` for `host`, a name or an
/// address.
///
/// # Errors
/// Why it does not.
pub fn check(bundle: &str, certificate: &str, host: &str, now: Timestamp) -> Result<(), X509Error> {
    let refused = |error: &dyn std::fmt::Display| X509Error::NotTrusted(error.to_string());
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        let root = root.map_err(|_| X509Error::NoCertificate)?;
        roots.add(root).map_err(|error| refused(&error))?;
    }
    let mut chain = CertificateDer::pem_slice_iter(certificate.as_bytes()).filter_map(Result::ok);
    let leaf = chain.next().ok_or(X509Error::NoCertificate)?;
    let between: Vec<_> = chain.collect();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| refused(&error))?;
    let host = ServerName::try_from(host.to_owned()).map_err(|error| refused(&error))?;
    let seconds = u64::try_from(now.as_second()).map_err(|_| X509Error::Time)?;
    let now = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    verifier.verify_server_cert(&leaf, &between, &host, &[], now).map(drop).map_err(|error| refused(&error))
}
