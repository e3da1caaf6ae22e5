//! libvirt's storage pools, as far as a volume is made in one: where its files are, and to look at them again.

use std::path::PathBuf;

use serde::Deserialize;
use virt::storage_pool::StoragePool;

use super::{Libvirt, LibvirtError};

/// The types of pools whose volumes are the files of one folder (formatstorage, "Pool types").
const FOLDERS: [&str; 3] = ["dir", "fs", "netfs"];

/// A storage pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Whether it is started.
    pub active: bool,
    /// libvirt's name for what it is made of: `dir`, say.
    pub kind: String,
    /// The folder with its volumes, where its volumes are files.
    pub folder: Option<PathBuf>,
}

#[derive(Deserialize)]
struct PoolXml {
    #[serde(rename = "@type")]
    kind: String,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    path: Option<PathBuf>,
}

/// What a pool's XML says (formatstorage). Pure.
fn parse(xml: &str, active: bool) -> Option<Pool> {
    let PoolXml { kind, target } = quick_xml::de::from_str(xml).ok()?;
    let path = target.and_then(|target| target.path);
    let folder = path.filter(|path| FOLDERS.contains(&&*kind) && path.is_absolute());
    Some(Pool { active, kind, folder })
}

impl Libvirt {
    fn find_pool(&self, name: &str) -> Result<Option<StoragePool>, LibvirtError> {
        match self.connect()?.lookup_storage_pool_by_name(name) {
            Ok(pool) => Ok(Some(pool)),
            Err(error) => {
                let error = LibvirtError::from(error);
                if error.code == virt::sys::VIR_ERR_NO_STORAGE_POOL { Ok(None) } else { Err(error) }
            }
        }
    }

    /// The pool of this name; `None` when there is none.
    ///
    /// # Errors
    /// When libvirt cannot be reached, or has no storage driver.
    pub fn pool(&self, name: &str) -> Result<Option<Pool>, LibvirtError> {
        let Some(pool) = self.find_pool(name)? else { return Ok(None) };
        let (active, xml) = (pool.is_active()?, pool.xml_desc(0)?);
        let unreadable = || LibvirtError::invalid("the XML of the pool cannot be read");
        parse(&xml, active).map(Some).ok_or_else(unreadable)
    }

    /// Has libvirt look which volumes a pool has; one that is gone has none.
    ///
    /// # Errors
    /// What libvirt says: while it builds another volume there, say.
    pub fn refresh_pool(&self, name: &str) -> Result<(), LibvirtError> {
        match self.find_pool(name)? {
            Some(pool) => Ok(pool.refresh(0).map(drop)?),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_have_files() {
        let of = |kind: &str, target: &str| {
            let pool = parse(&format!("<pool type='{kind}'><name>x</name>{target}</pool>"), true).unwrap();
            (pool.kind, pool.folder.map(|path| path.to_string_lossy().into_owned()))
        };
        let target = "<target><path>/srv/images</path><permissions><mode>0711</mode></permissions></target>";
        for kind in FOLDERS {
            assert_eq!(of(kind, target), (kind.to_owned(), Some("/srv/images".to_owned())));
        }
        assert_eq!(of("logical", target).1, None);
        assert_eq!(of("rbd", "").1, None);
        assert_eq!(of("dir", "<target><path>images</path></target>").1, None);
        assert!(parse("<pool>", true).is_none());
    }
}
