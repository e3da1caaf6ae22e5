//! What is to become of an agent's certificate request. Pure.
//!
//! Who asks is what the API server wrote into the object: the user, and the node that the user's token is bound to. What the
//! request says of itself must agree with that, and is never believed alone.

#[cfg(test)]
mod tests;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::api::{SIGNER, certificate_subject};
use crate::x509::Request;
use crate::x509::request::RequestError;

/// For how long a Node, or its addresses, may be missing: it has just registered.
const PATIENCE: SignedDuration = SignedDuration::from_secs(60);

const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const NODE_UID: &str = "authentication.kubernetes.io/node-uid";

/// Why a request is refused: the reason of its condition Denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Whoever asks is no agent.
    NotAnAgent,
    /// Its token is bound to no node.
    NotBoundToNode,
    /// Its node does not exist, or is another one of that name.
    NodeNotFound,
    /// It asks for other usages than a server's.
    UsagesNotAllowed,
    /// The request cannot be read, or is not signed by its own key.
    Malformed,
    /// Its key is too weak, or of a kind that agents do not make.
    KeyNotAllowed,
    /// It asks for more than names, addresses and a server's usages.
    ExtensionNotAllowed,
    /// Its subject is not the node's agent.
    SubjectNotAllowed,
    /// It asks for a name that is not its node's.
    NameNotAllowed,
    /// It asks for an address that is not its node's.
    AddressNotAllowed,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What is to become of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is for another signer: nothing of ours.
    Ignore,
    /// Something is not known yet; it is looked at again.
    Wait,
    /// It does not fit: why, and in words.
    Deny(Refusal, String),
    /// It fits: this is what may be signed.
    Approve(Request),
}

/// The name of the node that the token of who asks is bound to.
pub fn node_of(request: &CertificateSigningRequest) -> Option<&str> {
    extra(request, NODE_NAME)
}

/// The only value of an extra of the user, which the API server wrote.
fn extra<'a>(request: &'a CertificateSigningRequest, key: &str) -> Option<&'a str> {
    match request.spec.extra.as_ref()?.get(key)?.as_slice() {
        [one] if !one.is_empty() => Some(one),
        _ => None,
    }
}

/// Decides it. `agent` is the user that all agents are, `node` the Node that [`node_of`] names, if it exists.
pub fn decide(
    request: &CertificateSigningRequest,
    agent: &str,
    node: Option<&Node>,
    now: Timestamp,
) -> Decision {
    if request.spec.signer_name != SIGNER {
        return Decision::Ignore;
    }
    match examine(request, agent, node) {
        Ok(fits) => Decision::Approve(fits),
        Err(Misfit::Not(refusal, words)) => Decision::Deny(refusal, words),
        Err(Misfit::NotYet(refusal, words)) => {
            let made = request.metadata.creation_timestamp.as_ref();
            let is_new = made.is_some_and(|made| now.duration_since(made.0) < PATIENCE);
            if is_new { Decision::Wait } else { Decision::Deny(refusal, words) }
        }
    }
}

enum Misfit {
    Not(Refusal, String),
    /// It may fit in a while.
    NotYet(Refusal, String),
}

fn not<T>(refusal: Refusal, words: impl Into<String>) -> Result<T, Misfit> {
    Err(Misfit::Not(refusal, words.into()))
}

fn examine(request: &CertificateSigningRequest, agent: &str, node: Option<&Node>) -> Result<Request, Misfit> {
    let user = request.spec.username.as_deref().unwrap_or_default();
    if user != agent {
        return not(Refusal::NotAnAgent, format!("this signer signs for {agent} only, not for {user:?}"));
    }
    let Some(name) = node_of(request) else {
        return not(Refusal::NotBoundToNode, "the token is not bound to a node: run the agent as a pod");
    };
    usages(request.spec.usages.as_deref().unwrap_or_default())?;
    let asked = Request::parse(&request.spec.request.0).or_else(|error| {
        let refusal = match error {
            RequestError::Malformed | RequestError::Signature => Refusal::Malformed,
            RequestError::Key => Refusal::KeyNotAllowed,
            RequestError::Extension(_) => Refusal::ExtensionNotAllowed,
        };
        not(refusal, error.to_string())
    })?;
    let subject = certificate_subject(name);
    if asked.subject.as_deref() != Some(&subject) {
        return not(Refusal::SubjectNotAllowed, format!("the subject is to be CN={subject}, and no more"));
    }
    if let Some(other) = asked.names.iter().find(|other| *other != name && *other != "localhost") {
        return not(Refusal::NameNotAllowed, format!("{other:?} is neither {name} nor localhost"));
    }
    if asked.names.is_empty() && asked.addresses.is_empty() {
        return not(Refusal::NameNotAllowed, "it names nothing that a client could call");
    }
    let Some(node) = node.filter(|node| is_bound_to(request, node)) else {
        let words =
            format!("there is no Node {name}, or another one of that name than the token is bound to");
        return Err(Misfit::NotYet(Refusal::NodeNotFound, words));
    };
    let of_node = addresses(node);
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let may_have = |address: &IpAddr| loopback.contains(address) || of_node.contains(address);
    match asked.addresses.iter().find(|address| !may_have(address)) {
        None => Ok(asked),
        Some(other) => {
            let words = format!("{other} is not an address of Node {name}, by its status");
            Err(if of_node.is_empty() {
                Misfit::NotYet(Refusal::AddressNotAllowed, words)
            } else {
                Misfit::Not(Refusal::AddressNotAllowed, words)
            })
        }
    }
}

/// Digital signature and server auth; key encipherment besides, for whoever is used to it.
fn usages(asked: &[String]) -> Result<(), Misfit> {
    let needed = ["digital signature", "server auth"];
    let has = |usage: &&str| asked.iter().any(|asked| asked == usage);
    let is_allowed = |usage: &&String| needed.contains(&usage.as_str()) || *usage == "key encipherment";
    match asked.iter().find(|usage| !is_allowed(usage)) {
        Some(other) => not(Refusal::UsagesNotAllowed, format!("the usage {other:?} is not a server's")),
        None if !needed.iter().all(has) => {
            not(Refusal::UsagesNotAllowed, "the usages are to be digital signature and server auth")
        }
        None => Ok(()),
    }
}

/// Whether the token is bound to this very Node. A token that does not say of its uid is bound by name.
fn is_bound_to(request: &CertificateSigningRequest, node: &Node) -> bool {
    let same_name = node.metadata.name.as_deref() == node_of(request);
    let says_uid = request.spec.extra.as_ref().is_some_and(|extra| extra.contains_key(NODE_UID));
    same_name && (!says_uid || extra(request, NODE_UID) == node.metadata.uid.as_deref())
}

fn addresses(node: &Node) -> Vec<IpAddr> {
    let all = node.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    all.iter().filter_map(|address| address.address.parse().ok()).collect()
}
