//! A certificate request (PKCS #10) of a server: how an agent makes it, and all that the operator reads of one.
//!
//! What is parsed was signed by the key that it is for, and asks for no more than names, addresses and a server's usages: all
//! else is an error. Whether it may have them is decided elsewhere.

use std::net::IpAddr;

use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_X509_COMMON_NAME,
};
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::X509Error;

/// Why a text is no request that could be signed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It cannot be read.
    #[error("it is not one certificate request in PEM form")]
    Malformed,
    /// Whoever made it does not have its key.
    #[error("it is not signed by the key that it is for")]
    Signature,
    /// Its key is of another kind than agents make.
    #[error("its key is not an elliptic curve's, P-256 or P-384")]
    Key,
    /// It asks for something that no server of ours needs.
    #[error("it asks for {0}")]
    Extension(String),
}

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The common name, if the subject is that and nothing else.
    pub subject: Option<String>,
    /// Names that a client may call the server by.
    pub names: Vec<String>,
    /// Addresses that a client may call it by.
    pub addresses: Vec<IpAddr>,
    /// The public key: a SubjectPublicKeyInfo in DER.
    pub key: Vec<u8>,
}

impl Request {
    /// Makes one, in PEM.
    ///
    /// # Errors
    /// A name that is none.
    pub fn make(
        key: &KeyPair,
        subject: &str,
        names: &[String],
        addresses: &[IpAddr],
    ) -> Result<String, X509Error> {
        let hosts = names.iter().cloned().chain(addresses.iter().map(ToString::to_string));
        let mut params = CertificateParams::new(hosts.collect::<Vec<_>>())?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, subject);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        Ok(params.serialize_request(key)?.pem()?)
    }

    /// Reads one, in PEM.
    ///
    /// # Errors
    /// Why it is none that could be signed.
    pub fn parse(pem: &[u8]) -> Result<Self, RequestError> {
        let mut all = CertificateSigningRequestDer::pem_slice_iter(pem);
        let (Some(Ok(der)), None) = (all.next(), all.next()) else { return Err(RequestError::Malformed) };
        let (rest, parsed) = X509CertificationRequest::from_der(&der).map_err(|_| RequestError::Malformed)?;
        if !rest.is_empty() {
            return Err(RequestError::Malformed);
        }
        let info = &parsed.certification_request_info;
        if !is_strong(&info.subject_pki) {
            return Err(RequestError::Key);
        }
        parsed.verify_signature().map_err(|_| RequestError::Signature)?;
        let mut subject = info.subject.iter_attributes();
        let subject = match (subject.next(), subject.next()) {
            (Some(name), None) if *name.attr_type() == OID_X509_COMMON_NAME => name.as_str().ok(),
            _ => None,
        };
        let mut request = Self {
            subject: subject.map(str::to_owned),
            names: Vec::new(),
            addresses: Vec::new(),
            key: info.subject_pki.raw.to_vec(),
        };
        for attribute in info.attributes() {
            let ParsedCriAttribute::ExtensionRequest(asked) = attribute.parsed_attribute() else {
                return Err(RequestError::Extension(format!("the attribute {}", attribute.oid)));
            };
            for extension in &asked.extensions {
                request.take(extension.parsed_extension(), &extension.oid.to_id_string())?;
            }
        }
        Ok(request)
    }

    fn take(&mut self, extension: &ParsedExtension<'_>, oid: &str) -> Result<(), RequestError> {
        let refused = |what: &str| Err(RequestError::Extension(what.to_owned()));
        match extension {
            ParsedExtension::SubjectAlternativeName(asked) => {
                for name in &asked.general_names {
                    match name {
                        GeneralName::DNSName(name) => self.names.push((*name).to_owned()),
                        GeneralName::IPAddress(bytes) => match address(bytes) {
                            Some(address) => self.addresses.push(address),
                            None => return refused("an address that is none"),
                        },
                        _ => return refused("a name that is neither a DNS name nor an address"),
                    }
                }
                Ok(())
            }
            ParsedExtension::KeyUsage(usage) => {
                // bits 0 and 2: digital signature and key encipherment
                if usage.flags & !0b101 == 0 { Ok(()) } else { refused("another key usage") }
            }
            ParsedExtension::ExtendedKeyUsage(usage) => {
                let others = usage.any
                    || usage.client_auth
                    || usage.code_signing
                    || usage.email_protection
                    || usage.time_stamping
                    || usage.ocsp_signing
                    || !usage.other.is_empty();
                if others { refused("another extended key usage") } else { Ok(()) }
            }
            ParsedExtension::BasicConstraints(constraints) if !constraints.ca => Ok(()),
            ParsedExtension::BasicConstraints(_) => refused("a CA"),
            _ => refused(&format!("the extension {oid}")),
        }
    }
}

fn is_strong(key: &SubjectPublicKeyInfo<'_>) -> bool {
    let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    key.algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY
        && curve.is_some_and(|curve| curve == OID_EC_P256 || curve == OID_NIST_EC_P384)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{BasicConstraints, CustomExtension, IsCa, SanType};

    use super::*;

    /// A request that fits, after `edit`.
    fn edited(key: &KeyPair, edit: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["node-a".to_owned(), "192.0.2.7".to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "it");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        edit(&mut params);
        params.serialize_request(key).unwrap().pem().unwrap().into_bytes()
    }

    #[test]
    fn what_was_made_is_read() {
        let key = KeyPair::generate().unwrap();
        let addresses: Vec<IpAddr> = vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
        let names = vec!["node-a".to_owned(), "localhost".to_owned()];
        let pem = Request::make(&key, "it", &names, &addresses).unwrap();
        let read = Request::parse(pem.as_bytes()).unwrap();
        assert_eq!(read.subject.as_deref(), Some("it"));
        assert_eq!((read.names, read.addresses), (names, addresses));
        assert_eq!(read.key, rcgen::PublicKeyData::subject_public_key_info(&key));
    }

    #[test]
    fn what_asks_for_more_is_none() {
        let key = KeyPair::generate().unwrap();
        let parse = |edit: fn(&mut CertificateParams)| Request::parse(&edited(&key, edit));
        assert!(parse(|_| {}).is_ok());
        assert!(parse(|params| params.is_ca = IsCa::ExplicitNoCa).is_ok());
        assert!(parse(|params| params.key_usages.push(KeyUsagePurpose::KeyEncipherment)).is_ok());
        let cases: [(_, fn(&mut CertificateParams)); 7] = [
            ("a CA", |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            ("signing", |params| params.key_usages.push(KeyUsagePurpose::KeyCertSign)),
            ("CRLs", |params| params.key_usages.push(KeyUsagePurpose::CrlSign)),
            ("clients", |params| params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth)),
            ("a URI", |params| {
                params.subject_alt_names.push(SanType::URI("spiffe://x/y".try_into().unwrap()));
            }),
            ("mail", |params| params.subject_alt_names.push(SanType::Rfc822Name("a@b".try_into().unwrap()))),
            ("anything", |params| {
                let more = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
                params.custom_extensions.push(more);
            }),
        ];
        for (what, edit) in cases {
            assert!(matches!(parse(edit), Err(RequestError::Extension(_))), "{what}: {:?}", parse(edit));
        }
    }

    #[test]
    fn only_keys_of_the_two_curves_are_strong() {
        let made = |alg| edited(&KeyPair::generate_for(alg).unwrap(), |_| {});
        assert!(Request::parse(&made(&rcgen::PKCS_ECDSA_P256_SHA256)).is_ok());
        assert!(Request::parse(&made(&rcgen::PKCS_ECDSA_P384_SHA384)).is_ok());
        assert_eq!(Request::parse(&made(&rcgen::PKCS_ED25519)), Err(RequestError::Key));
    }

    #[test]
    fn a_subject_of_several_parts_is_none_that_we_know() {
        let key = KeyPair::generate().unwrap();
        let pem = edited(&key, |params| {
            params.distinguished_name.push(DnType::OrganizationName, "system:masters");
        });
        assert_eq!(Request::parse(&pem).unwrap().subject, None);
        let pem = edited(&key, |params| params.distinguished_name = DistinguishedName::new());
        assert_eq!(Request::parse(&pem).unwrap().subject, None);
    }

    #[test]
    fn two_requests_in_one_text_are_none() {
        let key = KeyPair::generate().unwrap();
        let one = edited(&key, |_| {});
        assert_eq!(Request::parse(&[one.clone(), one].concat()), Err(RequestError::Malformed));
        assert_eq!(Request::parse(b""), Err(RequestError::Malformed));
    }

    proptest! {
        /// Whatever byte of a signed request is another one: it asks for nothing else than what was signed, or is none.
        #[test]
        fn what_was_not_signed_is_not_read(at in any::<prop::sample::Index>(), flip in 1_u8..) {
            let key = KeyPair::generate().unwrap();
            let pem = edited(&key, |_| {});
            let original = Request::parse(&pem);
            let der = CertificateSigningRequestDer::from_pem_slice(&pem).unwrap();
            let mut bytes = der.to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            let text = <base64ct::Base64 as base64ct::Encoding>::encode_string(&bytes);
            let pem = format!("-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n");
            let changed = Request::parse(pem.as_bytes());
            prop_assert!(changed.is_err() || changed == original, "byte {at}: {changed:?}");
        }
    }
}
