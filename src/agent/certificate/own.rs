//! A certificate of this agent's own making. It is kept in the state directory, so that a restart keeps the CA that clients were
//! told, and never renewed: it does not end.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::{Folder, MAX_PEM, Shown};
use crate::imageio::tls;

/// Shows the one that was made earlier for this host, or makes one.
pub(super) fn load_or_make(folder: &Folder, host: &str, node: &str, shown: &Shown) -> Result<()> {
    if show_kept(folder, host, shown).is_some() {
        return Ok(());
    }
    tracing::info!(host, "a certificate of this agent's own is made");
    make(folder, host, node)?;
    show_kept(folder, host, shown).context("the certificate that was just made cannot be used")
}

/// Shows the one that was made earlier for this host; another address, or files that were damaged, need another.
fn show_kept(folder: &Folder, host: &str, shown: &Shown) -> Option<()> {
    let read = |name: &str| String::from_utf8(folder.read(name, MAX_PEM).ok()??).ok();
    let (made_for, ca) = (read("host")?, read("ca.crt")?);
    CertificateDer::from_pem_slice(ca.as_bytes()).ok()?;
    if made_for != host {
        return None;
    }
    shown.show(&read("tls.crt")?, &read("tls.key")?, &ca).ok()
}

fn make(folder: &Folder, host: &str, node: &str) -> Result<()> {
    let mut names = vec![node.to_owned(), "localhost".to_owned()];
    let mut addresses = vec![IpAddr::from([127, 0, 0, 1])];
    match host.trim_matches(['[', ']']).parse() {
        Ok(address) => addresses.push(address),
        Err(_) => names.push(host.to_owned()),
    }
    let made = tls::self_signed(&names, &addresses)?;
    // the host comes last: what is there before it is not used
    folder.remove("host")?;
    let files = [("ca.crt", &made.ca_pem), ("tls.crt", &made.cert_pem), ("tls.key", &made.key_pem)];
    for (name, text) in files.into_iter().map(|(name, text)| (name, text.as_str())).chain([("host", host)]) {
        folder
            .write(name, text.as_bytes())
            .with_context(|| folder.path().join(name).display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::fs::Mode;

    use super::*;

    #[test]
    fn it_is_kept_and_made_anew_when_it_is_damaged() {
        crate::telemetry::install_crypto();
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::make(&dir.path().join("tls"), Mode::RWXU).unwrap();
        let kept = |host: &str| {
            let shown = Shown::default();
            show_kept(&folder, host, &shown)?;
            shown.ca.into_inner().unwrap()
        };
        assert!(kept("node-a").is_none());
        make(&folder, "node-a", "node-a").unwrap();
        let ca = kept("node-a").unwrap();
        assert_eq!(kept("node-a").unwrap(), ca);
        assert!(kept("node-b").is_none(), "another address");
        for name in ["ca.crt", "tls.crt", "tls.key", "host"] {
            let whole = folder.read(name, MAX_PEM).unwrap().unwrap();
            folder.write(name, &whole[..3]).unwrap();
            assert!(kept("node-a").is_none(), "{name} is cut");
            folder.write(name, &whole).unwrap();
        }
        assert!(kept("node-a").is_some());
    }
}
