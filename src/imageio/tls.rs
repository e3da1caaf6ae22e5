//! TLS of the image server: its configuration, and certificates for where nobody makes any.
//!
//! TLS 1.2 and 1.3, HTTP/1.1 only, no client certificates: the ticket is the permission. The crypto
//! provider is named here, so that nothing depends on which one a process installed.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No certificate or key in the text.
    #[error("no usable {0} in PEM form: give the certificate chain and its PKCS#8 key")]
    Pem(&'static str),
    /// Key and certificate do not fit.
    #[error("certificate and key cannot be used")]
    Unusable(#[from] rustls::Error),
    /// No certificate could be made.
    #[error("cannot make a certificate; check the names")]
    Make(#[from] rcgen::Error),
}

/// The TLS that new connections of a server take. It can be exchanged while the server runs: connections that are open go on
/// as they began.
#[derive(Clone, Debug)]
pub struct Tls(Arc<RwLock<Arc<ServerConfig>>>);

impl From<Arc<ServerConfig>> for Tls {
    fn from(config: Arc<ServerConfig>) -> Tls {
        Tls(Arc::new(RwLock::new(config)))
    }
}

impl Tls {
    /// What a new connection takes now.
    #[must_use]
    pub fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives new connections another certificate.
    pub fn replace(&self, config: Arc<ServerConfig>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = config;
    }
}

/// A certificate and the CA that signed it, made on the spot; all in PEM.
#[derive(Clone)]
pub struct SelfSigned {
    /// What clients must trust.
    pub ca_pem: String,
    /// What the server shows.
    pub cert_pem: String,
    /// The server's private key.
    pub key_pem: String,
}

impl fmt::Debug for SelfSigned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SelfSigned").field("ca_pem", &self.ca_pem).finish_non_exhaustive()
    }
}

/// Makes a CA, and a certificate for these names and addresses. The CA's key is thrown away, so that it never
/// signs another one. The certificate does not expire within a node's life.
pub fn self_signed(names: &[String], addresses: &[IpAddr]) -> Result<SelfSigned, TlsError> {
    let named = |name: &str| {
        let mut distinguished = DistinguishedName::new();
        distinguished.push(DnType::CommonName, name);
        distinguished
    };
    let mut ca = CertificateParams::default();
    ca.distinguished_name = named("virtmark image server CA");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;

    let subjects: Vec<String> =
        names.iter().cloned().chain(addresses.iter().map(ToString::to_string)).collect();
    let mut leaf = CertificateParams::new(subjects)?;
    leaf.distinguished_name = named("virtmark image server");
    leaf.use_authority_key_identifier_extension = true;
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate()?;
    let cert = leaf.signed_by(&key, &ca)?;
    Ok(SelfSigned { ca_pem: ca.pem(), cert_pem: cert.pem(), key_pem: key.serialize_pem() })
}

/// The configuration for a certificate chain and its key, both PEM.
pub fn server_config(cert_pem: &[u8], key_pem: &[u8]) -> Result<Arc<ServerConfig>, TlsError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(cert_pem).collect();
    let chain = chain.map_err(|_| TlsError::Pem("certificate"))?;
    if chain.is_empty() {
        return Err(TlsError::Pem("certificate"));
    }
    let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|_| TlsError::Pem("private key"))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_can_be_used() {
        let made = self_signed(&["node1".to_owned()], &["127.0.0.2".parse().unwrap()]).unwrap();
        server_config(made.cert_pem.as_bytes(), made.key_pem.as_bytes()).unwrap();
        let other = self_signed(&[], &[]).unwrap();
        assert!(matches!(
            server_config(made.cert_pem.as_bytes(), other.key_pem.as_bytes()),
            Err(TlsError::Unusable(_))
        ));
        assert!(matches!(server_config(b"", made.key_pem.as_bytes()), Err(TlsError::Pem("certificate"))));
        assert!(matches!(server_config(made.cert_pem.as_bytes(), b""), Err(TlsError::Pem("private key"))));
        assert!(!format!("{made:?}").contains("PRIVATE"));
    }
}
