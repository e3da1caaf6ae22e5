//! The restore points in a folder: which there are, and which are not whole. It never writes.

use std::fs;
use std::path::{Path, PathBuf};

use super::chain;
use super::exit::Failure;
use super::manifest::Manifest;
use super::names;

/// What is in a folder of restore points.
#[derive(Debug, Default)]
pub struct Store {
    /// Its path.
    pub root: PathBuf,
    /// Those with a manifest that can be read, oldest first.
    pub points: Vec<Manifest>,
    /// Folders with a manifest that cannot be believed, and why.
    pub unreadable: Vec<(String, String)>,
    /// Names of those that are being written, or were when their process ended.
    pub unfinished: Vec<String>,
    /// Folders that `chain` has beside restore points, or had when its process ended: whose, and which.
    pub asides: Vec<(String, names::Aside)>,
}

impl Store {
    /// Reads the folder. One that is not there has none.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read(root: &Path) -> Result<Self, Failure> {
        let mut store = Self { root: root.to_owned(), ..Self::default() };
        let entries = match fs::read_dir(root) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(store),
            entries => entries.map_err(Failure::file(root))?,
        };
        for entry in entries {
            let entry = entry.map_err(Failure::file(root))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if let Some(point) = names::of_partial(&name) {
                store.unfinished.push(point.to_owned());
                continue;
            }
            if let Some((point, aside)) = names::of_aside(&name) {
                store.asides.push((point.to_owned(), aside));
                continue;
            }
            let file = entry.path().join(names::MANIFEST);
            let text = match fs::read_to_string(&file) {
                Ok(text) => text,
                // some other folder
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => {
                    store.unreadable.push((name, error.to_string()));
                    continue;
                }
            };
            match Manifest::parse(&text) {
                Ok(manifest) if manifest.name == name => store.points.push(manifest),
                Ok(manifest) => {
                    let words =
                        format!("its manifest is of {}: give the folder that name again", manifest.name);
                    store.unreadable.push((name, words));
                }
                Err(error) => store.unreadable.push((name, error.to_string())),
            }
        }
        chain::sort(&mut store.points);
        store.unreadable.sort();
        store.unfinished.sort();
        store.asides.sort();
        Ok(store)
    }

    /// The restore points of `path`: a folder of them, or one of them, whose name is answered too.
    ///
    /// # Errors
    /// When there is nothing.
    pub fn find(path: &Path) -> Result<(Self, Option<String>), Failure> {
        let is_one = path.join(names::MANIFEST).exists();
        let whole = path.canonicalize().map_err(Failure::file(path))?;
        let root = if is_one { whole.parent().unwrap_or(&whole) } else { &whole };
        let store = Self::read(root)?;
        let only =
            is_one.then(|| whole.file_name().map(|name| name.to_string_lossy().into_owned())).flatten();
        if store.points.is_empty() && store.unreadable.is_empty() && store.asides.is_empty() {
            let words =
                format!("{} has no restore point: virtmark backup VM --to DIR makes one", path.display());
            return Err(Failure::NotFound(words));
        }
        Ok((store, only))
    }

    /// The restore point of this name.
    #[must_use]
    pub fn point(&self, name: &str) -> Option<&Manifest> {
        self.points.iter().find(|point| point.name == name)
    }

    /// A file of a restore point.
    #[must_use]
    pub fn file(&self, point: &str, file: &str) -> PathBuf {
        self.root.join(point).join(file)
    }

    /// Whether a name is taken, by what is whole or not.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.root.join(name).exists() || self.unfinished.iter().any(|point| point == name)
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::example;
    use super::*;

    #[test]
    fn what_is_whole_and_what_is_not() {
        let root = tempfile::tempdir().unwrap();
        let make = |folder: &str, text: &str| {
            fs::create_dir(root.path().join(folder)).unwrap();
            fs::write(root.path().join(folder).join(names::MANIFEST), text).unwrap();
        };
        make("b", &example("b", Some("a")).text());
        make("a", &example("a", None).text());
        make("cut", &example("cut", None).text()[..40]);
        make("moved", &example("other", None).text());
        make(".x.partial", &example("x", None).text());
        make(".a.chain-new", &example("a", None).text());
        fs::create_dir(root.path().join("lost+found")).unwrap();
        let (store, only) = Store::find(root.path()).unwrap();
        let names: Vec<_> = store.points.iter().map(|point| point.name.as_str()).collect();
        assert_eq!((names.as_slice(), only), (["a", "b"].as_slice(), None));
        let bad: Vec<_> = store.unreadable.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(bad, ["cut", "moved"]);
        assert_eq!(store.unfinished, ["x"]);
        assert_eq!(store.asides, [("a".to_owned(), names::Aside::New)]);
        assert!(store.has("x") && store.has("a") && !store.has("y"));
        assert_eq!(Store::find(&root.path().join("b")).unwrap().1.as_deref(), Some("b"));
    }

    #[test]
    fn nothing_is_told() {
        let root = tempfile::tempdir().unwrap();
        assert!(matches!(Store::find(root.path()), Err(Failure::NotFound(_))));
        assert!(Store::read(&root.path().join("no")).unwrap().points.is_empty());
    }
}
