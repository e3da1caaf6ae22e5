//! XML from libvirt, which holds what its users chose, and XML for libvirt, which holds it too.
//!
//! The first byte says which: a `<domain>` to read, or names (one a line) to be written.

use std::collections::HashSet;

use quick_xml::XmlVersion;
use quick_xml::events::Event;
use virtmark::agent::inventory::sighting;
use virtmark::api::DomainState;
use virtmark::libvirt::Listed;
use virtmark::libvirt::xml::{BackupDisk, Domain, backup_socket, backup_xml, checkpoint_xml, dirty_context};

/// Any text is an error or a domain that the inventory can hold; any name that XML can hold is written so that a
/// conforming parser reads exactly that name, in as many elements as were meant.
pub fn check(input: &[u8]) {
    let Some((choice, text)) = input.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    match choice {
        b'w' => written(&text),
        _ => read(&text),
    }
}

fn read(text: &str) {
    let _ = backup_socket(text);
    let Ok(domain) = Domain::parse(text) else { return };
    let _ = (domain.guest_agent_connected(), domain.qemu_owner(), domain.disks_with_block_job());
    let listed = Listed { state: DomainState::Running, qemu: None, xml: text.to_owned(), sizes: Vec::new() };
    let Some(seen) = sighting("node", &listed) else { return };
    // what the API server would refuse would keep every other domain out of the inventory, too
    let hex = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    let groups: Vec<&str> = seen.uuid.split('-').collect();
    assert_eq!(groups.iter().map(|group| group.len()).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
    assert!(groups.iter().all(|group| hex(group)));
    assert!((1..=1024).contains(&seen.name.chars().count()) && seen.disks.len() <= 128);
    let mut targets = HashSet::new();
    for disk in &seen.disks {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        assert!((1..=64).contains(&disk.target.len()) && disk.target.bytes().all(fits), "{:?}", disk.target);
        assert!(targets.insert(&disk.target), "two disks are {:?}", disk.target);
        assert!(disk.backing_chain.len() <= 256 && disk.format.chars().count() <= 32);
        assert!(disk.serial.as_ref().is_none_or(|serial| serial.chars().count() <= 256));
        assert!(disk.backing_chain.iter().all(|layer| layer.file.chars().count() <= 4096));
    }
}

fn written(text: &str) {
    // what XML 1.0 has no characters for cannot be a name in libvirt either
    let legal =
        |c: char| !matches!(c, '\0'..='\x08' | '\x0b' | '\x0c' | '\x0e'..='\x1f' | '\u{fffe}' | '\u{ffff}');
    let names: Vec<String> = text.split('\n').map(|name| name.replace('\u{1}', "\n")).collect();
    let names: Vec<String> = names.iter().map(|name| name.chars().filter(|c| legal(*c)).collect()).collect();
    let (first, rest) = names.split_first().expect("a line");
    let disks: Vec<BackupDisk<'_>> = rest
        .chunks_exact(2)
        .map(|pair| {
            let base = pair[0].len().is_multiple_of(2).then_some(pair[1].as_str());
            BackupDisk { target: &pair[0], scratch: &pair[1], base }
        })
        .collect();

    let xml = backup_xml(first, &disks);
    assert_eq!(backup_socket(&xml).as_ref(), Some(first));
    let mut expected = vec![("server".to_owned(), "socket", first.clone())];
    for disk in &disks {
        expected.push(("disk".to_owned(), "name", disk.target.to_owned()));
        if let Some(base) = disk.base {
            expected.push(("disk".to_owned(), "incremental", base.to_owned()));
            expected.push(("disk".to_owned(), "exportbitmap", dirty_context(disk.target)));
        }
        expected.push(("disk".to_owned(), "exportname", disk.target.to_owned()));
        expected.push(("scratch".to_owned(), "file", disk.scratch.to_owned()));
    }
    assert_eq!(
        attributes(&xml, &["socket", "name", "incremental", "exportbitmap", "exportname", "file"]),
        expected,
        "{xml}"
    );

    let targets: Vec<&str> = rest.iter().map(String::as_str).collect();
    let xml = checkpoint_xml(first, &targets, Some(7));
    let mut expected = Vec::new();
    for target in targets {
        expected.push(("disk".to_owned(), "name", target.to_owned()));
        expected.push(("disk".to_owned(), "bitmap", first.clone()));
    }
    assert_eq!(attributes(&xml, &["name", "bitmap"]), expected, "{xml}");
}

/// The attributes of these names in a document, with their elements, as a conforming parser reads them.
fn attributes(xml: &str, wanted: &[&'static str]) -> Vec<(String, &'static str, String)> {
    let (mut reader, mut found) = (quick_xml::Reader::from_str(xml), Vec::new());
    loop {
        match reader.read_event().expect("well-formed XML") {
            Event::Start(element) | Event::Empty(element) => {
                let name = element.name().as_ref().to_owned();
                for attribute in element.attributes() {
                    let attribute = attribute.expect("a well-formed attribute");
                    let value = attribute.normalized_value(XmlVersion::Implicit1_0).expect("known entities");
                    if let Some(key) = wanted.iter().find(|key| **key == attribute.key.as_ref()) {
                        found.push((name.clone(), *key, value.into_owned()));
                    }
                }
            }
            Event::Eof => return found,
            _ => {}
        }
    }
}
