//! A certificate from files. They are read again when they change, as they do when cert-manager, say, renews what is in a mounted
//! Secret. They are never written.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::Shown;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(5);

/// The admin's files.
#[derive(Clone)]
pub(super) struct Files {
    pub(super) cert: PathBuf,
    pub(super) key: PathBuf,
    pub(super) ca: Option<PathBuf>,
}

/// What was in them. It is never printed: a key is in it.
#[derive(PartialEq, Eq)]
pub(super) struct Texts {
    pub(super) cert: String,
    pub(super) key: String,
    pub(super) ca: String,
}

impl Files {
    pub(super) fn read(&self) -> Result<Texts> {
        let read = |path: &Path| fs::read_to_string(path).with_context(|| path.display().to_string());
        Ok(Texts {
            cert: read(&self.cert)?,
            key: read(&self.key)?,
            ca: self.ca.as_deref().map(read).transpose()?.unwrap_or_default(),
        })
    }

    /// Takes what the files have become, for ever. What cannot be used is not taken: a certificate whose key is not there yet.
    pub(super) async fn follow(&self, shown: &Shown) {
        let mut taken = self.read().ok();
        let mut told = String::new();
        loop {
            tokio::time::sleep(LOOK).await;
            let read = self.clone();
            let Ok(texts) = tokio::task::spawn_blocking(move || read.read()).await else { continue };
            match texts.and_then(|texts| take(shown, texts, &mut taken)) {
                Ok(()) => told.clear(),
                Err(error) => {
                    let words = format!("{error:#}");
                    if words != told {
                        tracing::warn!(
                            error = words,
                            "the new certificate is not taken: the old one is shown still"
                        );
                        told = words;
                    }
                }
            }
        }
    }
}

/// Takes what was read, if it is not what was `taken` before.
fn take(shown: &Shown, texts: Texts, taken: &mut Option<Texts>) -> Result<()> {
    if taken.as_ref() == Some(&texts) {
        return Ok(());
    }
    shown.show(&texts.cert, &texts.key, &texts.ca)?;
    tracing::info!("the image server shows a new certificate");
    *taken = Some(texts);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::imageio::tls;

    #[test]
    fn files_that_change_are_taken_once_they_fit() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        let write = |name: &str, text: &str| fs::write(file(name), text).unwrap();
        let (old, new) = (tls::self_signed(&[], &[]).unwrap(), tls::self_signed(&[], &[]).unwrap());
        write("tls.crt", &old.cert_pem);
        write("tls.key", &old.key_pem);
        write("ca.crt", &old.ca_pem);
        let files = Files { cert: file("tls.crt"), key: file("tls.key"), ca: Some(file("ca.crt")) };
        let (shown, mut taken) = (Shown::default(), None);
        let config = || shown.server.get().unwrap().current();
        let ca = || shown.ca.read().unwrap().clone().unwrap();
        take(&shown, files.read().unwrap(), &mut taken).unwrap();
        let first = config();
        take(&shown, files.read().unwrap(), &mut taken).unwrap();
        assert!(Arc::ptr_eq(&first, &config()), "nothing changed");

        write("tls.crt", &new.cert_pem);
        write("ca.crt", &new.ca_pem);
        assert!(take(&shown, files.read().unwrap(), &mut taken).is_err(), "its key is not there yet");
        assert_eq!(ca(), old.ca_pem, "nothing of it is taken");
        assert!(Arc::ptr_eq(&first, &config()));

        write("tls.key", &new.key_pem);
        take(&shown, files.read().unwrap(), &mut taken).unwrap();
        assert_eq!(ca(), new.ca_pem);
        assert!(!Arc::ptr_eq(&first, &config()));
    }
}
