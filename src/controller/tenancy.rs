//! What an admin lets each namespace do beyond backing up: into which libvirt pools it may upload.
//!
//! A YAML file, read again whenever it is asked, so that a change of the ConfigMap it is mounted from holds at once. What is not
//! written there is denied: without a file, or with one that cannot be read, nobody may anything. Pure: others read the file.
//!
//! ```yaml
//! namespaces:
//!   vms:
//!     pools: [default]
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Why it is not known what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum TenancyError {
    /// The file cannot be read.
    #[error("the tenancy file {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not say what it should.
    #[error("the tenancy file {}: {words}", path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        words: String,
    },
}

/// What namespaces may do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tenancy {
    #[serde(default)]
    namespaces: BTreeMap<String, Tenant>,
}

/// What one namespace may do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Tenant {
    /// The libvirt pools, on any node, in which it may make volumes.
    #[serde(default)]
    pools: BTreeSet<String>,
}

impl Tenancy {
    /// What the file at `path` says, whose content was read now; nothing is allowed without one. Pure.
    ///
    /// # Errors
    /// When it could not be read, or says anything else.
    pub fn said(path: Option<&Path>, read: io::Result<String>) -> Result<Self, TenancyError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text = read.map_err(|source| TenancyError::Io { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|words| TenancyError::Content { path: path.to_owned(), words })
    }

    fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            // somebody is about to write it: one that allows nothing says so
            return Err("it is empty; `namespaces: {}` allows nothing".to_owned());
        }
        serde_saphyr::from_str(text)
            .map_err(|error| error.to_string().lines().next().unwrap_or_default().to_owned())
    }

    /// Whether a namespace may make volumes in a pool. Pure.
    pub fn allows_pool(&self, namespace: &str, pool: &str) -> bool {
        self.namespaces.get(namespace).is_some_and(|tenant| tenant.pools.contains(pool))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_written_is_denied() {
        let tenancy = Tenancy::parse("namespaces:\n  vms: {pools: [default, fast]}\n  other: {}\n").unwrap();
        for (namespace, pool, allowed) in [
            ("vms", "default", true),
            ("vms", "fast", true),
            ("vms", "fas", false),
            ("vms", "", false),
            ("other", "default", false),
            ("", "default", false),
        ] {
            assert_eq!(tenancy.allows_pool(namespace, pool), allowed, "{namespace} {pool}");
        }
        assert!(!Tenancy::said(None, Ok(String::new())).unwrap().allows_pool("vms", "default"));
    }

    #[test]
    fn a_file_that_says_something_else_allows_nothing_and_says_why() {
        for text in [
            "namespace: {}",
            "namespaces: {vms: {pool: [default]}}",
            "namespaces: [vms]",
            "- x",
            "{",
            "",
            " \n",
        ] {
            assert!(!Tenancy::parse(text).unwrap_err().is_empty(), "{text}");
        }
        let missing =
            Tenancy::said(Some(Path::new("/t.yaml")), Err(io::ErrorKind::NotFound.into())).unwrap_err();
        assert!(missing.to_string().contains("/t.yaml"), "{missing}");
    }
}
