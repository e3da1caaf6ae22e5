//! Asks the operator for a certificate by a CertificateSigningRequest, and waits for its answer. It keeps nothing.

use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::api::ObjectMeta;
use kube::{Api, Client};
use rcgen::{CertificateParams, KeyPair, PublicKeyData as _};

use super::renewal::{self, Answer, Hosts};
use crate::api::{self, SIGNER, certificate_subject};
use crate::cluster;
use crate::x509::{Request, X509Error};

/// How soon the answer is looked for, at first and in the end.
const POLL: Duration = Duration::from_millis(500);
const AT_MOST: Duration = Duration::from_secs(30);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    /// The API server said no, or nothing.
    #[error("the Kubernetes API: {0}")]
    Api(#[from] kube::Error),
    /// No request can be made.
    #[error(transparent)]
    Unmade(#[from] X509Error),
    /// The operator said no.
    #[error("CertificateSigningRequest {0} was refused: {1}")]
    Refused(String, String),
    /// An object of that name is for another key.
    #[error("CertificateSigningRequest {0} is somebody else's")]
    Taken(String),
}

impl AskError {
    /// Whether this key gets no certificate any more.
    pub(super) fn is_final(&self) -> bool {
        matches!(self, Self::Refused(..) | Self::Taken(_))
    }
}

/// Who asks, and for what.
pub(super) struct Asker {
    requests: Api<CertificateSigningRequest>,
    node: String,
    hosts: Hosts,
}

impl Asker {
    pub(super) fn new(client: &Client, node: &str, hosts: &Hosts) -> Self {
        Self { requests: Api::all(client.clone()), node: node.to_owned(), hosts: hosts.clone() }
    }

    /// Makes the request of this key, if it is not there, and waits for its answer: a certificate in PEM. `waits` hears for what
    /// it waits, again and again.
    pub(super) async fn ask(&self, key: &KeyPair, waits: impl Fn(&str)) -> Result<String, AskError> {
        let name = name(&self.node, key);
        let mut pause = POLL;
        loop {
            match self.requests.get_opt(&name).await? {
                None => {
                    tracing::info!(request = name, "a certificate is asked for");
                    cluster::create(&self.requests, &self.request(&name, key)?, api::AGENT).await?;
                }
                Some(found) if !is_of(&found, key) => return Err(AskError::Taken(name)),
                Some(found) => match renewal::answer(&found) {
                    Answer::Signed(certificate) => return Ok(certificate),
                    Answer::Refused(words) => return Err(AskError::Refused(name, words)),
                    Answer::Open => {}
                },
            }
            waits(&format!(
                "CertificateSigningRequest {name} waits for an operator with --sign-certificates"
            ));
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AT_MOST);
        }
    }

    fn request(&self, name: &str, key: &KeyPair) -> Result<CertificateSigningRequest, X509Error> {
        let subject = certificate_subject(&self.node);
        let pem = Request::make(key, &subject, &self.hosts.names, &self.hosts.addresses)?;
        Ok(CertificateSigningRequest {
            metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
            spec: CertificateSigningRequestSpec {
                request: ByteString(pem.into_bytes()),
                signer_name: SIGNER.to_owned(),
                usages: Some(vec!["digital signature".to_owned(), "server auth".to_owned()]),
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        })
    }
}

/// The name of the request of this key: one that is made twice is the same.
fn name(node: &str, key: &KeyPair) -> String {
    let digest = CertificateParams::default().key_identifier(key);
    let hex: String = digest.iter().take(5).map(|byte| format!("{byte:02x}")).collect();
    let node: String = node.chars().take(200).collect();
    format!("virtmark-agent-{}-{hex}", node.trim_end_matches(['.', '-']))
}

/// Whether a request is for this key.
fn is_of(request: &CertificateSigningRequest, key: &KeyPair) -> bool {
    Request::parse(&request.spec.request.0).is_ok_and(|asked| asked.key == key.subject_public_key_info())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_named_after_its_key() {
        let (one, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        assert_eq!(name("node-a", &one), name("node-a", &one));
        assert_ne!(name("node-a", &one), name("node-a", &other));
        let long = name(&"n.".repeat(120), &one);
        assert!(long.len() <= 253 && !long.contains(".-"), "{long}");
    }
}
