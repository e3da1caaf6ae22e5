//! A CA of our own: its certificate and key, and what it signs. It does not decide what it is to sign.

use std::fmt;
use std::net::IpAddr;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData as _, SubjectPublicKeyInfo,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use time::OffsetDateTime;

use super::succession::{BACKDATED, CA_LIFE};
use super::{Span, X509Error};

/// A CA. Its key is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Authority {
    certificate: String,
    key: String,
    span: Span,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("span", &self.span).finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes one with a key of its own, at `now`. It signs servers, and no other CA.
    ///
    /// # Errors
    /// When the machine has no randomness for a key.
    pub fn make(now: Timestamp) -> Result<Self, X509Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        // two in one bundle have two names: not every client tells them apart by their keys
        let made = now.strftime("%Y-%m-%dT%H:%M:%SZ");
        params.distinguished_name.push(DnType::CommonName, format!("virtmark agents CA {made}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (date(now - BACKDATED)?, date(now + CA_LIFE)?);
        let certificate = params.self_signed(&key)?.pem();
        Self::read(&certificate, &key.serialize_pem())
    }

    /// One that was made earlier: certificate and key, both PEM.
    ///
    /// # Errors
    /// When one of them cannot be read, or they are not each other's.
    pub fn read(certificate: &str, key: &str) -> Result<Self, X509Error> {
        let der =
            CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(|_| X509Error::NoCertificate)?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(|_| X509Error::NoCertificate)?;
        if KeyPair::from_pem(key)?.subject_public_key_info() != parsed.public_key().raw {
            return Err(X509Error::OtherKey);
        }
        let span = Span::of(certificate)?;
        Ok(Self { certificate: certificate.to_owned(), key: key.to_owned(), span })
    }

    /// Its certificate, in PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Its key, in PEM.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// From when to when it is valid.
    pub fn span(&self) -> Span {
        self.span
    }

    /// A server's certificate, in PEM, for `life` from `now` on, or for as long as this CA lasts. `key` is its
    /// SubjectPublicKeyInfo in DER.
    ///
    /// # Errors
    /// A name or a key that is none.
    pub fn sign(
        &self,
        key: &[u8],
        names: &[String],
        addresses: &[IpAddr],
        now: Timestamp,
        life: SignedDuration,
    ) -> Result<String, X509Error> {
        let hosts = names.iter().cloned().chain(addresses.iter().map(ToString::to_string));
        let mut params = CertificateParams::new(hosts.collect::<Vec<_>>())?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "virtmark image server");
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let to = self.span.to.min(now + life);
        (params.not_before, params.not_after) = (date(now - BACKDATED)?, date(to)?);
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, KeyPair::from_pem(&self.key)?)?;
        let key = SubjectPublicKeyInfo::from_der(key)?;
        Ok(params.signed_by(&key, &issuer)?.pem())
    }
}

fn date(at: Timestamp) -> Result<OffsetDateTime, X509Error> {
    OffsetDateTime::from_unix_timestamp(at.as_second()).map_err(|_| X509Error::Time)
}

#[cfg(test)]
mod tests {
    use super::super::certificate::check;
    use super::super::succession::LEAF_LIFE;
    use super::*;

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    #[test]
    fn a_client_takes_what_it_signed_for_those_names_and_that_time() {
        let (ca, other) = (Authority::make(now()).unwrap(), Authority::make(now()).unwrap());
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let (names, addresses) = (["node-a".to_owned()], ["192.0.2.7".parse().unwrap()]);
        let signed = ca.sign(&key.subject_public_key_info(), &names, &addresses, now(), LEAF_LIFE).unwrap();
        let both = format!("{}{}", other.certificate(), ca.certificate());
        for (bundle, host, at, taken) in [
            (ca.certificate(), "node-a", now(), true),
            (&both, "192.0.2.7", now(), true),
            (&both, "node-a", now() + LEAF_LIFE, true),
            (&both, "node-a", now() + LEAF_LIFE + SignedDuration::from_secs(1), false),
            (&both, "node-b", now(), false),
            (&both, "192.0.2.8", now(), false),
            (other.certificate(), "node-a", now(), false),
        ] {
            assert_eq!(check(bundle, &signed, host, at).is_ok(), taken, "{host} at {at}");
        }
    }

    #[test]
    fn nothing_that_it_signed_outlives_it() {
        let ca = Authority::make(now()).unwrap();
        let key = KeyPair::generate().unwrap().subject_public_key_info();
        let late = ca.span().to - SignedDuration::from_hours(48);
        let signed = ca.sign(&key, &["node-a".to_owned()], &[], late, LEAF_LIFE).unwrap();
        assert_eq!(Span::of(&signed).unwrap().to, ca.span().to);
    }

    #[test]
    fn it_is_read_again_with_its_own_key_only_and_never_printed() {
        let (ca, other) = (Authority::make(now()).unwrap(), Authority::make(now()).unwrap());
        assert_eq!(Authority::read(ca.certificate(), ca.key()).unwrap(), ca);
        assert!(matches!(Authority::read(ca.certificate(), other.key()), Err(X509Error::OtherKey)));
        assert!(Authority::read("", ca.key()).is_err() && Authority::read(ca.certificate(), "").is_err());
        assert!(!format!("{ca:?}").contains("PRIVATE"));
    }
}
