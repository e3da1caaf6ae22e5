//! A record or a ticket of the state directory, as text: truncated, foreign, or made up.

use std::path::{Component, Path};

use virtmark::agent::state::Record;
use virtmark::agent::transfer::StoredTicket;

/// Any text is an error, or a value that comes back from its own text; a record that passes for sound leads to no
/// other folder and no other object, and a ticket never shows its secret.
pub fn check(input: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<Record>(input) {
        let again = serde_json::to_vec(&record).expect("JSON");
        assert_eq!(serde_json::from_slice::<Record>(&again).expect("its own text"), record);
        if record.unsound().is_none() {
            sound(&record);
        }
    }
    if let Ok(stored) = serde_json::from_slice::<StoredTicket>(input) {
        let shown = format!("{:?}", stored.ticket).to_ascii_lowercase();
        // names may be anything: a secret that is one of them was not kept secret by whoever wrote the file
        let names =
            serde_json::to_string(&(&stored.ticket.transfer, &stored.ticket.backup, &stored.ticket.disk));
        let names = format!("{}{:?}{:?}", names.expect("JSON"), stored.ticket.export, stored.ticket.filename);
        let id = stored.ticket.id.expose();
        assert!(!shown.contains(&id) || names.to_ascii_lowercase().contains(&id), "{shown}");
        let again = serde_json::to_vec(&stored).expect("JSON");
        let again: StoredTicket = serde_json::from_slice(&again).expect("its own text");
        assert!(again.ticket == stored.ticket);
    }
}

fn sound(record: &Record) {
    let one = |text: &str| {
        let mut parts = Path::new(text).components();
        assert!(matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)), "{text:?}");
        assert!(!text.contains(['/', '\\', '?', '#', '%', '\n', '\0']) && text.len() <= 253, "{text:?}");
    };
    for text in [&record.uid, &record.vm_uuid, &record.namespace, &record.name, &record.vm] {
        one(text);
    }
    record.bitmap.as_deref().into_iter().for_each(one);
    for disk in &record.disks {
        one(&format!("{}.scratch", disk.target));
        one(&format!("coverage-{}", disk.target));
        assert!(disk.image.as_ref().is_none_or(|image| image.is_absolute()));
    }
}
