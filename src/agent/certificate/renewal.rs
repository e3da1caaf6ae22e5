//! When the operator is asked for another certificate, and what its answer is. Pure.

use std::net::IpAddr;

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::x509::certificate::{check, each};
use crate::x509::{Span, succession};

/// Agents that hear of another CA ask for certificates of it within this time, not all at once.
const SPREAD: SignedDuration = SignedDuration::from_secs(30);

/// The names and addresses that a certificate is to have.
#[derive(Clone, Debug)]
pub(super) struct Hosts {
    pub(super) names: Vec<String>,
    pub(super) addresses: Vec<IpAddr>,
}

impl Hosts {
    /// Those of the agent of `node`, whose clients call `host`.
    pub(super) fn of(node: &str, host: &str) -> Self {
        let mut names = vec![node.to_owned(), "localhost".to_owned()];
        let mut addresses = vec![IpAddr::from([127, 0, 0, 1])];
        match host.parse() {
            Ok(address) if addresses.contains(&address) => {}
            Ok(address) => addresses.push(address),
            Err(_) if names.iter().any(|name| name == host) => {}
            Err(_) => names.push(host.to_owned()),
        }
        Self { names, addresses }
    }

    /// Why a client that trusts `bundle` would not take `certificate` for all of them; `None` when it would.
    pub(super) fn misfit(&self, bundle: &str, certificate: &str, now: Timestamp) -> Option<String> {
        let addresses = self.addresses.iter().map(ToString::to_string);
        let mut all = self.names.iter().cloned().chain(addresses);
        all.find_map(|host| Some(format!("{host}: {}", check(bundle, certificate, &host, now).err()?)))
    }
}

/// When to ask for another certificate than this one, or for one at all. `is_settled` says that it was signed for this very
/// bundle; `jitter` is between 0 and 1.
pub(super) fn due(
    hosts: &Hosts,
    bundle: &str,
    certificate: Option<&str>,
    is_settled: bool,
    now: Timestamp,
    jitter: f64,
) -> Timestamp {
    let Some(certificate) = certificate else { return now };
    let Ok(span) = Span::of(certificate) else { return now };
    if hosts.misfit(bundle, certificate, now).is_some() {
        return now;
    }
    // two thirds of its life, or a little earlier
    let at = span.from + span.length().mul_f64((2.0 - 0.2 * jitter) / 3.0);
    let all = each(bundle);
    let spans: Vec<_> = all.iter().filter_map(|one| Span::of(one).ok()).collect();
    let signer = succession::signs(&spans, now);
    let is_signers = signer
        .and_then(|at| all.get(at))
        .is_none_or(|signer| hosts.misfit(signer, certificate, now).is_none());
    let changes = if is_signers {
        let next = spans.iter().skip(signer.map_or(0, |at| at + 1));
        next.map(|span| succession::takes_over(*span)).min()
    } else {
        (!is_settled).then_some(now)
    };
    changes.map_or(at, |changes| at.min(changes.max(now) + SPREAD.mul_f64(jitter)))
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// This certificate, in PEM.
    Signed(String),
    /// None: why.
    Refused(String),
    /// Nothing yet.
    Open,
}

/// Reads it from the object.
pub(super) fn answer(request: &CertificateSigningRequest) -> Answer {
    let Some(status) = &request.status else { return Answer::Open };
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let refused =
        conditions.iter().find(|condition| ["Denied", "Failed"].contains(&condition.type_.as_str()));
    if let Some(refused) = refused {
        let (reason, words) = (refused.reason.as_deref(), refused.message.as_deref());
        return Answer::Refused(format!(
            "{}: {}",
            reason.unwrap_or(&refused.type_),
            words.unwrap_or("no words")
        ));
    }
    let text = status.certificate.as_ref().and_then(|bytes| String::from_utf8(bytes.0.clone()).ok());
    text.map_or(Answer::Open, Answer::Signed)
}

#[cfg(test)]
mod tests {
    use rcgen::{KeyPair, PublicKeyData as _};
    use serde_json::json;

    use super::*;
    use crate::x509::Authority;
    use crate::x509::succession::{BACKDATED, LEAD, LEAF_LIFE};

    fn start() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    fn days(days: i64) -> SignedDuration {
        SignedDuration::from_hours(24 * days)
    }

    fn signed(ca: &Authority, hosts: &Hosts, now: Timestamp) -> String {
        let key = KeyPair::generate().unwrap().subject_public_key_info();
        ca.sign(&key, &hosts.names, &hosts.addresses, now, LEAF_LIFE).unwrap()
    }

    #[test]
    fn it_is_asked_for_at_two_thirds_or_when_something_else_is_needed() {
        let hosts = Hosts::of("node-a", "192.0.2.7");
        let (ca, other) = (Authority::make(start()).unwrap(), Authority::make(start()).unwrap());
        let leaf = signed(&ca, &hosts, start());
        let now = start() + days(3);
        let due = |hosts: &Hosts, bundle: &str, jitter| due(hosts, bundle, Some(&leaf), false, now, jitter);
        let two_thirds = start() - BACKDATED + (days(30) + BACKDATED) * 2 / 3;
        let off = due(&hosts, ca.certificate(), 0.0).duration_since(two_thirds);
        assert!(off.abs() <= SignedDuration::from_secs(1), "{off}");
        let early = due(&hosts, ca.certificate(), 1.0);
        assert!((start() + days(17)..start() + days(19)).contains(&early), "{early}");

        assert_eq!(due(&hosts, other.certificate(), 1.0), now, "nobody trusts it");
        assert_eq!(due(&hosts, "", 1.0), now, "nobody trusts anybody");
        assert_eq!(due(&Hosts::of("node-a", "192.0.2.8"), ca.certificate(), 1.0), now, "another address");
        assert_eq!(super::due(&hosts, ca.certificate(), None, false, now, 1.0), now, "none yet");
        assert_eq!(super::due(&hosts, ca.certificate(), Some("?"), false, now, 1.0), now, "damaged");
        let ended = start() + days(31);
        assert_eq!(super::due(&hosts, ca.certificate(), Some(&leaf), true, ended, 1.0), ended, "it ended");
    }

    #[test]
    fn another_ca_is_gone_over_to_once_it_signs() {
        let hosts = Hosts::of("node-a", "node-a");
        let old = Authority::make(start()).unwrap();
        let leaf = signed(&old, &hosts, start() + days(243));
        let new = Authority::make(start() + days(244)).unwrap();
        let both = format!("{}{}", old.certificate(), new.certificate());
        let at = |now| due(&hosts, &both, Some(&leaf), false, now, 1.0);
        let before = start() + days(245);
        assert_eq!(at(before), start() + days(244) + LEAD + SPREAD, "it does not sign yet");
        let now = start() + days(244) + LEAD;
        assert_eq!(at(now), now + SPREAD);
        let again = due(&hosts, &both, Some(&leaf), true, now, 1.0);
        assert!(again > now + days(1), "it was asked for with this bundle: once is enough");
    }

    #[test]
    fn an_answer_is_what_the_operator_wrote() {
        let of = |status: serde_json::Value| {
            answer(
                &serde_json::from_value(json!({"metadata": {}, "spec": {"signerName": "s", "request": ""},
                "status": status}))
                .unwrap(),
            )
        };
        let condition =
            |type_: &str| json!([{"type": type_, "status": "True", "reason": "R", "message": "m"}]);
        assert_eq!(of(json!({})), Answer::Open);
        assert_eq!(of(json!({"conditions": condition("Approved")})), Answer::Open);
        assert_eq!(of(json!({"conditions": condition("Denied")})), Answer::Refused("R: m".to_owned()));
        assert_eq!(of(json!({"conditions": condition("Failed")})), Answer::Refused("R: m".to_owned()));
        let signed = json!({"conditions": condition("Approved"), "certificate": "cGVt"});
        assert_eq!(of(signed), Answer::Signed("pem".to_owned()));
    }
}
