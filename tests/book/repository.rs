//! The files of this repository by their paths from its root, and the pages among them. It changes none.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::{fs, io};

use super::page::Page;

/// Folders that are no source.
const LEFT_OUT: [&str; 3] = [".git", "target", "venv"];

/// All files, and what the pages have.
#[derive(Default)]
pub struct Repository {
    files: BTreeSet<String>,
    pages: BTreeMap<String, Page>,
}

impl Repository {
    /// This one: the tests' working directory.
    pub fn here() -> Self {
        let mut files = BTreeSet::new();
        walk(Path::new(""), &mut files).expect("the repository can be read");
        let pages: Vec<String> = files.iter().filter(|path| path.ends_with(".md")).cloned().collect();
        assert!(pages.len() > 10, "this is not the repository's root: {pages:?}");
        let read = |path: String| {
            let text = fs::read_to_string(&path).expect("a page");
            (path, Page::read(&text))
        };
        Self { files, pages: pages.into_iter().map(read).collect() }
    }

    /// One made up of these pages, by path and text.
    pub fn of(pages: &[(&str, &str)]) -> Self {
        let pages: BTreeMap<_, _> =
            pages.iter().map(|(path, text)| ((*path).to_owned(), Page::read(text))).collect();
        Self { files: pages.keys().cloned().collect(), pages }
    }

    /// The pages.
    pub fn pages(&self) -> impl Iterator<Item = (&str, &Page)> {
        self.pages.iter().map(|(path, page)| (path.as_str(), page))
    }

    /// A page by its path.
    pub fn page(&self, path: &str) -> Option<&Page> {
        self.pages.get(path)
    }

    /// All files.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(String::as_str)
    }

    /// Whether there is such a file, or a folder with files.
    pub fn has(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        self.files.contains(path) || self.files.iter().any(|file| is_below(file, path))
    }
}

fn is_below(file: &str, folder: &str) -> bool {
    file.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

fn walk(folder: &Path, into: &mut BTreeSet<String>) -> io::Result<()> {
    let read = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    for entry in fs::read_dir(read)? {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        if !entry.file_type()?.is_dir() {
            into.insert(path.to_string_lossy().into_owned());
        } else if !LEFT_OUT.iter().any(|name| entry.file_name() == *name) {
            walk(&path, into)?;
        }
    }
    Ok(())
}
