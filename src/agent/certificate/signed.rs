//! A certificate that the operator signs: asked for by a CertificateSigningRequest, kept in the state directory, renewed in time.
//!
//! ```text
//!   next.key --request--> operator --certificate, trusted by the bundle?--> tls.pem, ca.crt --> shown
//!        ^                                                                      |
//!        +------- two thirds of its life, another CA, another address <---------+
//! ```
//!
//! What it has it goes on with, however long nobody answers. Its requests are left to kube-controller-manager, which removes
//! those that are done.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use rcgen::KeyPair;
use tokio::sync::watch;

use super::asker::{AskError, Asker};
use super::renewal::{self, Hosts};
use super::{Folder, MAX_PEM, Shown};
use crate::api::AUTHORITY;
use crate::clock;
use crate::cluster;
use crate::probe::Sign;
use crate::x509::Span;

/// How soon it is tried again after something went wrong, at first and in the end.
const AGAIN: Duration = Duration::from_secs(5);
const AGAIN_AT_MOST: Duration = Duration::from_secs(300);

/// How long the bundle may be behind the certificate.
const BUNDLE: Duration = Duration::from_secs(60);

/// The longest sleep: the clock may be set.
const SLEEP: Duration = Duration::from_secs(3600);

/// Its files: certificate chain and key in one, so that they are each other's; whom to trust; the key of the next one.
const KEPT: &str = "tls.pem";
const TRUST: &str = "ca.crt";
const NEXT: &str = "next.key";

/// Who asks, and for what.
pub(super) struct Signed {
    asker: Asker,
    maps: Api<ConfigMap>,
    hosts: Hosts,
    folder: Folder,
}

/// A certificate with its key, and a bundle that trusts it; all PEM. It is never printed.
#[derive(Clone)]
struct Held {
    pair: String,
    bundle: String,
}

impl Signed {
    pub(super) fn new(client: &Client, namespace: &str, node: &str, host: &str, folder: Folder) -> Self {
        let hosts = Hosts::of(node, host);
        let maps = Api::namespaced(client.clone(), namespace);
        Self { asker: Asker::new(client, node, &hosts), maps, hosts, folder }
    }

    fn read(&self, name: &str) -> Option<String> {
        String::from_utf8(self.folder.read(name, MAX_PEM).ok()??).ok()
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = || self.folder.path().join(name).display().to_string();
        self.folder.write(name, text.as_bytes()).with_context(path)
    }

    fn kept(&self) -> Option<Held> {
        Some(Held { pair: self.read(KEPT)?, bundle: self.read(TRUST)? })
    }

    /// Shows the one that was kept, even if it has ended: it is all there is.
    pub(super) fn load(&self, shown: &Shown) {
        if let Some(Held { pair, bundle }) = self.kept()
            && let Err(error) = shown.show(&pair, &pair, &bundle)
        {
            tracing::warn!(%error, "the certificate that was kept cannot be used: another one is asked for");
        }
    }

    /// Renews it in time, for ever.
    pub(super) async fn follow(&self, shown: &Shown, sign: &Sign) {
        let held = self.kept().filter(|_| shown.server.initialized());
        let (told, heard) = watch::channel(held.as_ref().map(|held| held.bundle.clone()));
        tokio::join!(self.hear(&told), self.renew(heard, held, shown, sign));
    }

    /// Hears of whom to trust. What was told holds while there is nothing.
    async fn hear(&self, told: &watch::Sender<Option<String>>) {
        let mut changes = watcher::watch_object(self.maps.clone(), AUTHORITY).default_backoff().boxed();
        while let Some(change) = changes.next().await {
            match change {
                Ok(map) => {
                    let bundle = map.and_then(|map| map.data?.remove(TRUST)).filter(|text| !text.is_empty());
                    told.send_if_modified(|last| {
                        let is_news = bundle.is_some() && *last != bundle;
                        if is_news {
                            *last = bundle;
                        }
                        is_news
                    });
                }
                Err(error) => cluster::watch_broke("whom to trust", &error),
            }
        }
    }

    async fn renew(
        &self,
        mut heard: watch::Receiver<Option<String>>,
        mut held: Option<Held>,
        shown: &Shown,
        sign: &Sign,
    ) {
        let (mut jitter, mut pause, mut signed_for) = (rand::random(), AGAIN, None);
        loop {
            let bundle = heard.borrow_and_update().clone();
            if let (Some(held), Some(bundle)) = (&mut held, &bundle) {
                self.trust(held, bundle, shown);
            }
            self.tell(held.as_ref(), "", sign);
            let pair = held.as_ref().map(|held| held.pair.as_str());
            let is_settled = bundle.is_some() && signed_for == bundle;
            let trusted = bundle.as_deref().unwrap_or_default();
            let due = renewal::due(&self.hosts, trusted, pair, is_settled, clock::now(), jitter);
            while clock::now() < due {
                let sleep = clock::until(due, clock::now()).min(SLEEP);
                tokio::select! {
                    () = tokio::time::sleep(sleep) => {}
                    changed = heard.changed() => if changed.is_ok() { break },
                }
            }
            if clock::now() < due {
                continue;
            }
            match self.obtain(&mut heard, held.as_ref(), sign).await.and_then(|new| self.take(new, shown)) {
                Ok(new) => {
                    signed_for = Some(new.bundle.clone());
                    held = Some(new);
                    (jitter, pause) = (rand::random(), AGAIN);
                }
                Err(error) => {
                    let words = format!("{error:#}");
                    tracing::warn!(error = words, "no certificate was signed: asked for again");
                    self.tell(held.as_ref(), &words, sign);
                    tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..=1.0))).await;
                    pause = (pause * 2).min(AGAIN_AT_MOST);
                }
            }
        }
    }

    /// Takes another bundle, if it trusts what is shown. One that does not is taken with the next certificate.
    fn trust(&self, held: &mut Held, bundle: &str, shown: &Shown) {
        if held.bundle == bundle || self.hosts.misfit(bundle, &held.pair, clock::now()).is_some() {
            return;
        }
        if let Err(error) = self.write(TRUST, bundle) {
            tracing::warn!(%error, "whom to trust is not kept");
        }
        bundle.clone_into(&mut held.bundle);
        shown.tell(bundle);
        tracing::info!("clients are told of other CAs");
    }

    /// Says whether clients can take what is shown, or why they cannot.
    fn tell(&self, held: Option<&Held>, words: &str, sign: &Sign) {
        let wrong = match held {
            None => Some("there is none yet".to_owned()),
            Some(held) => self.hosts.misfit(&held.bundle, &held.pair, clock::now()),
        };
        match wrong {
            None => sign.good(),
            Some(wrong) if words.is_empty() => sign.bad(wrong),
            Some(wrong) => sign.bad(format!("{wrong}; {words}")),
        }
    }

    /// Asks for another one, until it is there and trusted.
    async fn obtain(
        &self,
        heard: &mut watch::Receiver<Option<String>>,
        held: Option<&Held>,
        sign: &Sign,
    ) -> Result<Held> {
        let key = self.next_key()?;
        let signed = self.asker.ask(&key, |words| self.tell(held, words, sign)).await;
        if signed.as_ref().is_err_and(AskError::is_final) {
            self.folder.remove(NEXT)?;
        }
        let signed = signed?;
        let pair = format!("{signed}{}", key.serialize_pem());
        let is_trusted = |bundle: &Option<String>| {
            bundle.as_ref().is_some_and(|bundle| self.hosts.misfit(bundle, &pair, clock::now()).is_none())
        };
        let bundle = match tokio::time::timeout(BUNDLE, heard.wait_for(is_trusted)).await {
            Ok(Ok(bundle)) => bundle.clone(),
            _ => None,
        };
        let Some(bundle) = bundle else {
            self.folder.remove(NEXT)?;
            bail!("ConfigMap {AUTHORITY} does not trust the certificate that was signed");
        };
        Ok(Held { pair, bundle })
    }

    /// The key of the next certificate: kept, so that an agent that starts again asks for no other one.
    fn next_key(&self) -> Result<KeyPair> {
        if let Some(Ok(key)) = self.read(NEXT).map(|pem| KeyPair::from_pem(&pem)) {
            return Ok(key);
        }
        let key = KeyPair::generate()?;
        self.write(NEXT, &key.serialize_pem())?;
        Ok(key)
    }

    /// Keeps it, and shows it. The bundle comes first: it trusts the old one too, or nobody does.
    fn take(&self, new: Held, shown: &Shown) -> Result<Held> {
        self.write(TRUST, &new.bundle)?;
        self.write(KEPT, &new.pair)?;
        self.folder.remove(NEXT)?;
        shown.show(&new.pair, &new.pair, &new.bundle)?;
        let until = Span::of(&new.pair)?.to;
        tracing::info!(%until, "the image server shows a certificate that the operator signed");
        Ok(new)
    }
}
