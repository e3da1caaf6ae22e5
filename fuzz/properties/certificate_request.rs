//! Certificate requests of an agent that may have been taken over, as the operator reads them: text in PEM.

use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use virtmark::api::SIGNER;
use virtmark::controller::certificates::decide::{Decision, decide};
use virtmark::x509::Request;

const AGENT: &str = "system:serviceaccount:virtmark-system:virtmark-agent";

/// Whatever the text is: it is refused in one line, or asks for nothing but what is the node's own.
pub fn check(input: &[u8]) {
    let object = json!({"metadata": {"name": "r", "creationTimestamp": "2026-11-30T00:00:00Z"}, "spec": {
        "signerName": SIGNER, "request": "", "username": AGENT, "usages": ["digital signature", "server auth"],
        "extra": {"authentication.kubernetes.io/node-name": ["node-a"]}}});
    let mut request: k8s_openapi::api::certificates::v1::CertificateSigningRequest =
        serde_json::from_value(object).expect("an object");
    request.spec.request.0 = input.to_vec();
    let node = serde_json::from_value(json!({"metadata": {"name": "node-a"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.7"}]}}))
    .expect("a Node");
    let now: Timestamp = "2026-11-30T01:00:00Z".parse().expect("a time");
    match decide(&request, AGENT, Some(&node), now) {
        Decision::Approve(fits) => {
            assert!(fits.names.iter().all(|name| name == "node-a" || name == "localhost"), "{fits:?}");
            let own =
                |address: &std::net::IpAddr| address.is_loopback() || address.to_string() == "192.0.2.7";
            assert!(fits.addresses.iter().all(own), "{fits:?}");
            assert_eq!(Request::parse(input), Ok(fits));
        }
        Decision::Deny(_, words) => assert!(!words.is_empty() && !words.contains(['\n', '\r']), "{words:?}"),
        other => panic!("{other:?}"),
    }
}
