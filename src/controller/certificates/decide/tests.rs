//! Tables and properties of the decision.

use k8s_openapi::ByteString;
use proptest::prelude::*;
use rcgen::KeyPair;
use serde_json::{Value, json};

use super::*;

const AGENT: &str = "system:serviceaccount:virtmark-system:virtmark-agent";

fn now() -> Timestamp {
    "2026-11-30T12:00:00Z".parse().unwrap()
}

fn node() -> Node {
    serde_json::from_value(json!({"metadata": {"name": "node-a", "uid": "u-a"}, "status": {"addresses": [
        {"type": "InternalIP", "address": "192.0.2.7"}, {"type": "InternalIP", "address": "2001:db8::7"},
        {"type": "Hostname", "address": "node-a"}]}}))
    .unwrap()
}

fn pem(subject: &str, names: &[&str], addresses: &[&str]) -> String {
    let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
    let addresses: Vec<_> = addresses.iter().map(|address| address.parse().unwrap()).collect();
    Request::make(&KeyPair::generate().unwrap(), subject, &names, &addresses).unwrap()
}

/// A request that fits, with the object changed at a pointer.
fn changed(pointer: &str, value: Value) -> CertificateSigningRequest {
    let mut object = json!({"metadata": {"name": "r", "creationTimestamp": "2026-11-30T11:58:00Z"}, "spec": {
        "signerName": SIGNER, "request": "", "username": AGENT, "usages": ["digital signature", "server auth"],
        "extra": {NODE_NAME: ["node-a"], NODE_UID: ["u-a"]}}});
    if let Some(target) = object.pointer_mut(pointer) {
        *target = value;
    } else {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        object.pointer_mut(parent).unwrap()[key] = value;
    }
    let mut request: CertificateSigningRequest = serde_json::from_value(object).unwrap();
    request.spec.request = ByteString(
        pem("virtmark-agent:node-a", &["node-a", "localhost"], &["127.0.0.1", "192.0.2.7"]).into_bytes(),
    );
    request
}

fn fitting() -> CertificateSigningRequest {
    changed("/metadata/name", json!("fits"))
}

fn asking(subject: &str, names: &[&str], addresses: &[&str]) -> CertificateSigningRequest {
    let mut request = fitting();
    request.spec.request = ByteString(pem(subject, names, addresses).into_bytes());
    request
}

fn of(request: &CertificateSigningRequest) -> Decision {
    decide(request, AGENT, Some(&node()), now())
}

#[test]
fn what_fits_is_approved() {
    let subject = "virtmark-agent:node-a";
    let mut with_encipherment = fitting();
    with_encipherment.spec.usages.as_mut().unwrap().push("key encipherment".to_owned());
    for request in [
        fitting(),
        with_encipherment,
        asking(subject, &["node-a"], &[]),
        asking(subject, &[], &["2001:db8::7", "::1"]),
    ] {
        let Decision::Approve(what) = of(&request) else { panic!("{:?}", of(&request)) };
        assert_eq!(what, Request::parse(&request.spec.request.0).unwrap());
    }
}

#[test]
fn each_single_deviation_is_denied() {
    use Refusal::*;
    let subject = "virtmark-agent:node-a";
    let mut cases: Vec<(String, CertificateSigningRequest, Refusal)> = Vec::new();
    for (pointer, value, refusal) in [
        ("/spec/username", json!("system:serviceaccount:virtmark-system:virtmark-operator"), NotAnAgent),
        ("/spec/username", json!("system:serviceaccount:other:virtmark-agent"), NotAnAgent),
        ("/spec/username", json!("system:admin"), NotAnAgent),
        ("/spec/username", Value::Null, NotAnAgent),
        ("/spec/extra", Value::Null, NotBoundToNode),
        ("/spec/extra", json!({}), NotBoundToNode),
        ("/spec/extra", json!({NODE_NAME: []}), NotBoundToNode),
        ("/spec/extra", json!({NODE_NAME: [""]}), NotBoundToNode),
        ("/spec/extra", json!({NODE_NAME: ["node-a", "node-b"]}), NotBoundToNode),
        ("/spec/extra", json!({NODE_NAME: ["node-b"], NODE_UID: ["u-b"]}), SubjectNotAllowed),
        ("/spec/extra", json!({NODE_NAME: ["node-a"], NODE_UID: ["u-b"]}), NodeNotFound),
        ("/spec/extra", json!({NODE_NAME: ["node-a"], NODE_UID: []}), NodeNotFound),
        ("/spec/usages", Value::Null, UsagesNotAllowed),
        ("/spec/usages", json!([]), UsagesNotAllowed),
        ("/spec/usages", json!(["server auth"]), UsagesNotAllowed),
        ("/spec/usages", json!(["digital signature"]), UsagesNotAllowed),
        ("/spec/usages", json!(["digital signature", "client auth"]), UsagesNotAllowed),
        ("/spec/usages", json!(["digital signature", "server auth", "client auth"]), UsagesNotAllowed),
        ("/spec/usages", json!(["digital signature", "server auth", "cert sign"]), UsagesNotAllowed),
        ("/spec/usages", json!(["digital signature", "server auth", "any"]), UsagesNotAllowed),
    ] {
        cases.push((format!("{pointer} {value}"), changed(pointer, value), refusal));
    }
    for (asked, names, addresses, refusal) in [
        ("virtmark-agent:node-b", &["node-a"][..], &[][..], SubjectNotAllowed),
        ("node-a", &["node-a"], &[], SubjectNotAllowed),
        ("", &["node-a"], &[], SubjectNotAllowed),
        (subject, &["node-b"], &[], NameNotAllowed),
        (subject, &["node-a", "node-b"], &[], NameNotAllowed),
        (subject, &["node-a.example.com"], &[], NameNotAllowed),
        (subject, &["*"], &[], NameNotAllowed),
        (subject, &["NODE-A"], &[], NameNotAllowed),
        (subject, &[], &[], NameNotAllowed),
        (subject, &["node-a"], &["192.0.2.8"], AddressNotAllowed),
        (subject, &["node-a"], &["192.0.2.7", "127.0.0.2"], AddressNotAllowed),
        (subject, &["node-a"], &["0.0.0.0"], AddressNotAllowed),
        (subject, &["node-a"], &["::ffff:192.0.2.7"], AddressNotAllowed),
    ] {
        cases.push((format!("{asked} {names:?} {addresses:?}"), asking(asked, names, addresses), refusal));
    }
    for (what, text) in [("empty", &b""[..]), ("junk", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n")] {
        let mut request = fitting();
        request.spec.request = ByteString(text.to_vec());
        cases.push((what.to_owned(), request, Malformed));
    }
    for (what, request, refusal) in cases {
        match of(&request) {
            Decision::Deny(found, words) => {
                assert!(found == refusal && !words.is_empty(), "{what}: {found}");
            }
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[test]
fn other_signers_requests_are_nothing_of_ours() {
    for signer in ["kubernetes.io/kubelet-serving", "virtmark.dev/agents", "", "virtmark.dev/Agent"] {
        assert_eq!(of(&changed("/spec/signerName", json!(signer))), Decision::Ignore, "{signer}");
    }
}

#[test]
fn a_node_that_is_not_there_yet_is_waited_for_and_not_for_ever() {
    let new = changed("/metadata/creationTimestamp", json!("2026-11-30T11:59:30Z"));
    let mut bare = node();
    bare.status = None;
    assert_eq!(decide(&new, AGENT, None, now()), Decision::Wait);
    assert_eq!(decide(&new, AGENT, Some(&bare), now()), Decision::Wait);
    let denied = |node| matches!(decide(&fitting(), AGENT, node, now()), Decision::Deny(..));
    assert!(denied(None) && denied(Some(&bare)));
    // what never fits is not waited with
    let other = changed("/spec/username", json!("me"));
    assert!(matches!(decide(&other, AGENT, None, now()), Decision::Deny(Refusal::NotAnAgent, _)));
}

proptest! {
    /// Whatever is asked for: what is approved is the node's own.
    #[test]
    fn nothing_but_the_nodes_own_is_approved(
        names in prop::collection::vec(prop::sample::select(vec!["node-a", "node-b", "localhost", "evil.example"]), 0..4),
        addresses in prop::collection::vec(prop::sample::select(
            vec!["127.0.0.1", "::1", "192.0.2.7", "2001:db8::7", "192.0.2.8", "10.0.0.1"]), 0..4),
        bound in prop::sample::select(vec!["node-a", "node-b"]),
        named in prop::sample::select(vec!["node-a", "node-b"]),
    ) {
        let mut request = asking(&certificate_subject(named), &names, &addresses);
        let extra = request.spec.extra.as_mut().unwrap();
        extra.insert(NODE_NAME.to_owned(), vec![bound.to_owned()]);
        let own = bound == "node-a"
            && named == bound
            && names.iter().all(|name| ["node-a", "localhost"].contains(name))
            && addresses.iter().all(|address| ["127.0.0.1", "::1", "192.0.2.7", "2001:db8::7"].contains(address))
            && !(names.is_empty() && addresses.is_empty());
        prop_assert_eq!(matches!(of(&request), Decision::Approve(_)), own);
    }
}
