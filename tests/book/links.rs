//! Links, and names of files in code type: whether they lead to something. Links to other hosts are not followed.

use std::path::{Component, Path};

use regex::Regex;

use super::SUMMARY;
use super::page::Page;
use super::repository::Repository;

/// The folder of the book: what is not in it is not in the book that is built.
const BOOK: &str = "docs/";

/// Names that begin so are files of the repository.
const FOLDERS: [&str; 11] =
    ["src", "tests", "bed", "docs", "charts", "crds", "deploy", "examples", "fuzz", "gitops", "benches"];

/// Where a link of the page at `from` leads: path and anchor.
pub fn target(from: &str, link: &str) -> (String, Option<String>) {
    let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
    let path = if path.is_empty() { from.to_owned() } else { joined(from, path) };
    (path, anchor.map(str::to_owned))
}

/// `path` as the page at `from` means it; what leads out of the repository stays as `..`.
fn joined(from: &str, path: &str) -> String {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in Path::new(path).components() {
        match part {
            Component::ParentDir if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            Component::CurDir => {}
            part => parts.push(part.as_os_str().to_str().unwrap_or("?")),
        }
    }
    parts.join("/")
}

/// Links that lead nowhere.
pub fn broken(repository: &Repository) -> Vec<String> {
    let in_book = repository.page(SUMMARY).map(of_book).unwrap_or_default();
    let mut found = Vec::new();
    for (from, page) in repository.pages() {
        for (line, link) in &page.links {
            if ["https://", "http://", "mailto:"].iter().any(|scheme| link.starts_with(scheme)) {
                continue;
            }
            let (path, anchor) = target(from, link);
            let to = repository.page(&path);
            let lost = anchor.filter(|anchor| to.is_none_or(|to| !to.anchors.contains(anchor)));
            let fault = if !repository.has(&path) {
                format!("there is no {path}")
            } else if let Some(anchor) = lost {
                format!("{path} has no heading for #{anchor}")
            } else if from.starts_with(BOOK) && !path.starts_with(BOOK) {
                format!("{path} is not in the book: name it in code type")
            } else if from.starts_with(BOOK) && to.is_some() && !in_book.contains(&path) {
                format!("{SUMMARY} does not have {path}")
            } else {
                continue;
            };
            found.push(format!("{from}:{line}: {link}: {fault}"));
        }
    }
    found
}

fn of_book(summary: &Page) -> Vec<String> {
    summary.links.iter().map(|(_, link)| target(SUMMARY, link).0).collect()
}

/// Files that a page names in code type, and that are not there. `*` stands for any name, `{a,b}` for both; a file of `src`
/// may be named from there.
pub fn missing(repository: &Repository) -> Vec<String> {
    let mut found = Vec::new();
    for (from, page) in repository.pages() {
        for (line, code) in page.code.iter().filter(|(_, code)| is_file(code)) {
            let gone = alternatives(code).into_iter().filter(|path| !is_there(repository, path));
            found.extend(gone.map(|path| format!("{from}:{line}: there is no {path}")));
        }
    }
    found
}

/// Whether code type names a file of ours.
pub fn is_file(code: &str) -> bool {
    let named = Regex::new(r"^[\w.-]+/[\w./{},*-]*$").unwrap().is_match(code);
    let of_folder =
        FOLDERS.iter().any(|folder| code.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/')));
    named && (of_folder || code.ends_with(".rs"))
}

/// Each path that a name with `{a,b}` stands for.
fn alternatives(name: &str) -> Vec<String> {
    let parts = name.split_once('{').and_then(|(before, rest)| Some((before, rest.split_once('}')?)));
    let Some((before, (choices, after))) = parts else { return vec![name.to_owned()] };
    choices.split(',').flat_map(|choice| alternatives(&format!("{before}{choice}{after}"))).collect()
}

fn is_there(repository: &Repository, path: &str) -> bool {
    ["", "src/"].iter().any(|root| {
        let path = format!("{root}{path}");
        if !path.contains('*') {
            return repository.has(&path);
        }
        let pattern = regex::escape(path.trim_end_matches('/')).replace(r"\*", "[^/]*");
        let pattern = Regex::new(&format!("^{pattern}(/|$)")).unwrap();
        repository.files().any(|file| pattern.is_match(file))
    })
}

#[test]
fn a_link_that_leads_nowhere_is_found() {
    let summary = "[A](a.md) [B](sub/b.md)";
    let pages = |a: &str| -> Vec<String> {
        broken(&Repository::of(&[
            (SUMMARY, summary),
            ("docs/a.md", &format!("# One\n\n{a}\n")),
            ("docs/sub/b.md", "# Two words\n\n[up](../a.md#one)\n"),
            ("docs/hidden.md", "nobody lists it"),
            ("README.md", "# Read\n\n[in](docs/a.md#one) [out](https://example.com/#x)\n"),
        ]))
    };
    assert_eq!(pages("[b](sub/b.md#two-words) [here](#one) [there](./sub/b.md)"), Vec::<String>::new());
    for (link, fault) in [
        ("c.md", "there is no docs/c.md"),
        ("sub/B.md", "there is no docs/sub/B.md"),
        ("sub/b.md#three", "docs/sub/b.md has no heading for #three"),
        ("#two", "docs/a.md has no heading for #two"),
        ("../README.md", "README.md is not in the book: name it in code type"),
        ("../../README.md", "there is no ../README.md"),
        ("hidden.md", "docs/SUMMARY.md does not have docs/hidden.md"),
    ] {
        assert_eq!(pages(&format!("[x]({link})")), [format!("docs/a.md:3: {link}: {fault}")]);
    }
}

#[test]
fn a_file_that_is_named_and_not_there_is_found() {
    let named = |name: &str| -> Vec<String> {
        missing(&Repository::of(&[
            ("docs/a.md", &format!("`{name}`")),
            ("src/agent/backup/decide.rs", ""),
            ("tests/one.rs", ""),
            ("tests/two.rs", ""),
        ]))
    };
    for there in
        ["tests/", "tests/{one,two}.rs", "tests/*.rs", "agent/backup/decide.rs", "agent/*/decide.rs", "a/b"]
    {
        assert_eq!(named(there), Vec::<String>::new(), "{there}");
    }
    for (name, gone) in [
        ("tests/three.rs", "tests/three.rs"),
        ("tests/{one,three}.rs", "tests/three.rs"),
        ("tests/*.yaml", "tests/*.yaml"),
        ("agent/decide.rs", "agent/decide.rs"),
        ("crds/", "crds/"),
    ] {
        assert_eq!(named(name), [format!("docs/a.md:1: there is no {gone}")], "{name}");
    }
}
