//! The CAs that sign for agents, as a Secret keeps them and a ConfigMap publishes them: the newest, the one before it while that
//! one signs still, and the certificates of all that have not ended. Pure.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::api::ObjectMeta;

use crate::api::AUTHORITY;
use crate::x509::{Authority, Span, X509Error, certificate, succession};

/// The type of the Secret. A policy lets the operator create this type only.
pub const SECRET_TYPE: &str = "kubernetes.io/tls";

/// Where the one before the newest is in the Secret; the newest is where the type wants it.
const PREVIOUS: [&str; 2] = ["previous.crt", "previous.key"];
const NEWEST: [&str; 2] = ["tls.crt", "tls.key"];

/// The bundle, in Secret and ConfigMap.
pub const BUNDLE: &str = "ca.crt";

/// What is to be done about the CAs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing but to leave out what has ended.
    Keep,
    /// A new one is to be made.
    Rotate,
}

/// The CAs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorities {
    newest: Authority,
    previous: Option<Authority>,
    /// The certificates of those before, oldest first.
    retired: Vec<String>,
}

impl Authorities {
    /// The first one.
    pub fn first(newest: Authority) -> Self {
        Self { newest, previous: None, retired: Vec::new() }
    }

    /// As the Secret has them.
    ///
    /// # Errors
    /// When a CA in it cannot be read.
    pub fn read(secret: &Secret) -> Result<Self, X509Error> {
        let text = |key: &str| {
            let bytes = secret.data.as_ref().and_then(|data| data.get(key))?;
            String::from_utf8(bytes.0.clone()).ok()
        };
        let pair = |[certificate, key]: [&str; 2]| text(certificate).zip(text(key));
        let read = |(certificate, key): (String, String)| Authority::read(&certificate, &key);
        let newest = read(pair(NEWEST).ok_or(X509Error::NoCertificate)?)?;
        let previous = pair(PREVIOUS).map(read).transpose()?;
        let mut retired = certificate::each(&text(BUNDLE).unwrap_or_default());
        let held = [Some(&newest), previous.as_ref()];
        retired.retain(|one| held.iter().flatten().all(|held| held.certificate() != one));
        retired.retain(|one| Span::of(one).is_ok());
        Ok(Self { newest, previous, retired })
    }

    /// What is to be done at `now`.
    pub fn turn(&self, now: Timestamp) -> Turn {
        if succession::is_due(self.newest.span(), now) { Turn::Rotate } else { Turn::Keep }
    }

    /// Without what has ended, and without a key that signs no more.
    #[must_use]
    pub fn tidied(mut self, now: Timestamp) -> Self {
        if let Some(previous) = self.previous.take() {
            let spans = [previous.span(), self.newest.span()];
            if succession::signs(&spans, now) == Some(0) {
                self.previous = Some(previous);
            } else {
                self.retired.push(previous.certificate().to_owned());
            }
        }
        self.retired.retain(|one| Span::of(one).is_ok_and(|span| now <= span.to));
        self
    }

    /// With another one after the newest.
    #[must_use]
    pub fn followed_by(self, newest: Authority, now: Timestamp) -> Self {
        let mut retired = self.retired;
        retired.extend(self.previous.map(|previous| previous.certificate().to_owned()));
        Self { newest, previous: Some(self.newest), retired }.tidied(now)
    }

    /// The one that signs.
    pub fn signer(&self, now: Timestamp) -> &Authority {
        match &self.previous {
            Some(previous) if succession::signs(&[previous.span(), self.newest.span()], now) == Some(0) => {
                previous
            }
            _ => &self.newest,
        }
    }

    /// Whom to trust, in PEM, oldest first.
    pub fn bundle(&self) -> String {
        let held = self.previous.iter().chain([&self.newest]).map(Authority::certificate);
        self.retired.iter().map(String::as_str).chain(held).collect()
    }

    /// The Secret that keeps them, for the namespace of the operator.
    pub fn secret(&self) -> Secret {
        let mut data = BTreeMap::from([(BUNDLE.to_owned(), ByteString(self.bundle().into_bytes()))]);
        let mut put = |[certificate, key]: [&str; 2], authority: &Authority| {
            data.insert(certificate.to_owned(), ByteString(authority.certificate().as_bytes().to_vec()));
            data.insert(key.to_owned(), ByteString(authority.key().as_bytes().to_vec()));
        };
        put(NEWEST, &self.newest);
        if let Some(previous) = &self.previous {
            put(PREVIOUS, previous);
        }
        Secret {
            metadata: named(),
            type_: Some(SECRET_TYPE.to_owned()),
            data: Some(data),
            ..Secret::default()
        }
    }

    /// The ConfigMap that publishes them.
    pub fn published(&self) -> ConfigMap {
        let data = BTreeMap::from([(BUNDLE.to_owned(), self.bundle())]);
        ConfigMap { metadata: named(), data: Some(data), ..ConfigMap::default() }
    }
}

fn named() -> ObjectMeta {
    ObjectMeta { name: Some(AUTHORITY.to_owned()), ..ObjectMeta::default() }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::SignedDuration;
    use proptest::prelude::*;
    use rcgen::{KeyPair, PublicKeyData as _};

    use super::*;
    use crate::x509::certificate::check;
    use crate::x509::succession::{CA_LIFE, LEAD, leaf_life};

    fn start() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    fn days(days: i64) -> SignedDuration {
        SignedDuration::from_hours(days * 24)
    }

    fn made(at: Timestamp) -> Authority {
        Authority::make(at).unwrap()
    }

    /// What the operator does when it looks.
    fn look(kept: Authorities, now: Timestamp) -> Authorities {
        match kept.turn(now) {
            Turn::Rotate => kept.followed_by(made(now), now),
            Turn::Keep => kept.tidied(now),
        }
    }

    #[test]
    fn a_rotation_overlaps_and_ends() {
        let first = Authorities::first(made(start()));
        assert_eq!(first.turn(start() + days(243)), Turn::Keep);
        let begun = start() + days(244);
        assert_eq!(first.turn(begun), Turn::Rotate);
        let both = look(first.clone(), begun);
        assert_eq!(both.turn(begun), Turn::Keep);
        assert_eq!(both.signer(begun), &first.newest, "nobody knows the new one yet");
        assert_eq!(certificate::each(&both.bundle()).len(), 2);
        let settled = begun + LEAD + days(1);
        assert_eq!(both.signer(settled), &both.newest);
        let settled = (both.clone().tidied(settled), settled);
        assert_eq!(settled.0.previous, None, "the old key is forgotten");
        assert_eq!(certificate::each(&settled.0.bundle()).len(), 2, "what it signed is trusted still");
        assert_eq!(settled.0.signer(settled.1), &both.newest);
        let over = settled.0.tidied(start() + CA_LIFE + days(1));
        assert_eq!(over.bundle(), both.newest.certificate());
    }

    #[test]
    fn it_comes_back_from_the_secret_as_it_was() {
        let now = start() + days(300);
        let one = Authorities::first(made(start()));
        let two = one.clone().followed_by(made(now), now);
        let three =
            two.clone().tidied(now + LEAD + days(1)).followed_by(made(now + days(200)), now + days(30));
        assert_eq!(certificate::each(&three.bundle()).len(), 3);
        for kept in [one, two, three] {
            assert_eq!(Authorities::read(&kept.secret()).unwrap(), kept);
            assert_eq!(kept.published().data.unwrap()[BUNDLE], kept.bundle());
            assert!(!format!("{kept:?}").contains("PRIVATE"));
            assert!(!kept.bundle().contains("PRIVATE"));
        }
    }

    #[test]
    fn a_secret_with_a_key_that_does_not_fit_is_not_used() {
        let mut secret = Authorities::first(made(start())).secret();
        let other = made(start());
        secret
            .data
            .as_mut()
            .unwrap()
            .insert("tls.key".to_owned(), ByteString(other.key().as_bytes().to_vec()));
        assert!(Authorities::read(&secret).is_err());
        assert!(Authorities::read(&Secret::default()).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// However seldom the operator looks, within reason: while a certificate of an agent is in use, the published bundle
        /// trusts it, and so does each one that was published a week before it was signed, or later.
        #[test]
        fn what_is_in_use_is_trusted_by_what_is_published(
            pauses in prop::collection::vec(1_i64..=80, 1..14),
            asked in prop::sample::select(vec![None, Some(3_600), Some(86_400 * 7)]),
        ) {
            let key = KeyPair::generate().unwrap().subject_public_key_info();
            let name = ["node-a".to_owned()];
            let mut now = start();
            let mut kept = Authorities::first(made(now));
            // when each bundle was published, and each certificate signed
            let mut bundles = vec![(now, kept.bundle())];
            let mut leaves: Vec<(Timestamp, String)> = Vec::new();
            for pause in pauses {
                now += days(pause);
                kept = look(kept, now);
                kept = Authorities::read(&kept.secret()).unwrap();
                bundles.push((now, kept.bundle()));
                let signed = kept.signer(now).sign(&key, &name, &[], now, leaf_life(asked)).unwrap();
                leaves.push((now, signed));
                leaves.retain(|(_, leaf)| Span::of(leaf).unwrap().holds(now));
                for (signed, leaf) in &leaves {
                    let ends = bundles.iter().skip(1).map(|(published, _)| *published).chain([Timestamp::MAX]);
                    for ((_, bundle), until) in bundles.iter().zip(ends) {
                        // a client that took it within the last week before
                        if until > *signed - LEAD {
                            prop_assert!(check(bundle, leaf, "node-a", now).is_ok(), "{signed}");
                        }
                    }
                }
            }
        }
    }
}
