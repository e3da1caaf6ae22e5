//! What people read is true where a program can tell: links and anchors lead somewhere, files that are named are there, every
//! page is in the book, manifests are what the kinds take, every reason has its help. It runs nothing that a page says.
#![allow(clippy::unwrap_used, reason = "tests")]

mod links;
mod manifests;
mod page;
mod repository;

use std::collections::BTreeSet;

use page::Page;
use repository::Repository;
use virtmark::reason::Reason;

/// The book's table of contents.
const SUMMARY: &str = "docs/SUMMARY.md";

fn none(found: &[String]) {
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn every_link_leads_somewhere() {
    let repository = Repository::here();
    none(&links::broken(&repository));
}

#[test]
fn every_file_that_is_named_is_there() {
    let repository = Repository::here();
    none(&links::missing(&repository));
}

/// A page that is in no table of contents is built by nobody, and one that is in it twice has two places.
#[test]
fn the_book_has_every_page_once() {
    let repository = Repository::here();
    let pages: BTreeSet<&str> =
        repository.pages().map(|(path, _)| path).filter(|path| path.starts_with("docs/")).collect();
    let listed = repository.page(SUMMARY).unwrap().links.iter().map(|(_, to)| format!("docs/{to}"));
    let mut listed: Vec<String> = listed.chain([SUMMARY.to_owned()]).collect();
    listed.sort();
    assert_eq!(listed, pages.into_iter().collect::<Vec<_>>(), "{SUMMARY} and docs/ differ");
}

#[test]
fn every_picture_is_shown_and_says_what_it_shows() {
    let repository = Repository::here();
    let shown: BTreeSet<String> = repository
        .pages()
        .flat_map(|(path, page)| page.links.iter().map(move |(_, to)| links::target(path, to).0))
        .collect();
    let pictures: Vec<&str> = repository.files().filter(|path| path.starts_with("docs/pictures/")).collect();
    assert!(!pictures.is_empty(), "docs/pictures is empty: this test looks at the wrong place");
    for picture in pictures {
        assert!(shown.contains(picture), "no page shows {picture}");
        let svg = std::fs::read_to_string(picture).unwrap();
        let mut reader = quick_xml::Reader::from_str(&svg);
        let mut titled = false;
        loop {
            match reader.read_event() {
                Ok(quick_xml::events::Event::Start(start)) => {
                    titled |= start.name().0 == "title";
                    assert_ne!(start.name().0, "script", "{picture}");
                }
                Ok(quick_xml::events::Event::Eof) => break,
                Ok(_) => {}
                Err(error) => panic!("{picture}: {error}"),
            }
        }
        assert!(titled, "{picture} has no title, which is read to those who do not see it");
    }
}

#[test]
fn every_manifest_of_ours_is_what_the_kinds_take() {
    let repository = Repository::here();
    let (mut found, mut seen) = (Vec::new(), BTreeSet::new());
    for (path, page) in repository.pages() {
        for (line, yaml) in manifests::of(page) {
            match manifests::faults(&yaml) {
                Ok((kinds, faults)) => {
                    seen.extend(kinds);
                    found.extend(faults.iter().map(|fault| format!("{path}:{line}: {fault}")));
                }
                Err(error) => found.push(format!("{path}:{line}: {error}")),
            }
        }
    }
    none(&found);
    for kind in ["VmBackup", "VmCheckpoint"] {
        assert!(seen.contains(kind), "no page has a {kind}: this test looks at the wrong place");
    }
}

/// The page promises it: what the chart has can be looked up.
#[test]
fn every_yes_beside_the_peers_names_its_file() {
    let path = "docs/peers.md";
    let text = std::fs::read_to_string(path).unwrap();
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split('|').map(str::trim).collect()).collect();
    let yes: Vec<_> = rows.iter().filter(|cells| cells.get(3).is_some_and(|said| *said == "yes")).collect();
    assert!(yes.len() > 20, "{path}: this test looks at the wrong place");
    for cells in yes {
        let files = Page::read(cells[4]).code.into_iter().filter(|(_, code)| links::is_file(code));
        assert!(files.count() > 0, "{path}: no file: {}", cells[1]);
    }
}

#[test]
fn every_reason_that_asks_for_something_has_its_help() {
    let page = "docs/troubleshooting.md";
    let repository = Repository::here();
    let code = &repository.page(page).unwrap().code;
    let named = |reason: &Reason| code.iter().any(|(_, code)| code == reason.as_str());
    let asks = |reason: &&Reason| !["wait", "nothing to do"].contains(&reason.next_step());
    let without: Vec<_> = Reason::ALL
        .iter()
        .filter(asks)
        .filter(|reason| !named(reason))
        .map(|reason| reason.as_str())
        .collect();
    // these two are how a backup that is well looks
    let without: Vec<_> =
        without.into_iter().filter(|name| !["AwaitingFinalize", "TicketReady"].contains(name)).collect();
    assert!(without.is_empty(), "{page} does not name {without:?}");
}
