//! A hostile NBD server shakes hands. The first byte chooses the export, the bitmap and how the stream is cut;
//! the rest is what the server sends.

use virtmark::nbd::handshake::{Agreed, Handshake, HandshakeError};
use virtmark::nbd::proto;

type Outcome = Result<Option<Agreed>, HandshakeError>;

/// Whatever comes: no panic, the same outcome however the stream is cut, requests that are well formed and few,
/// and an agreement that the rest of the client may build on.
pub fn check(input: &[u8]) {
    let Some((choice, server)) = input.split_first() else { return };
    let export = ["", "vda", "x\0\u{1F4BE}\n"][usize::from(choice & 3).min(2)];
    let bitmap = [None, Some("b0"), Some("qemu:dirty-bitmap:b0"), Some("")][usize::from(choice >> 2 & 3)];
    let step = [1, 3, 19, 4096][usize::from(choice >> 4 & 3)];

    let mut whole = Handshake::new(export, bitmap);
    let outcome = whole.receive(server);
    let sent = whole.output();
    let (cut_outcome, cut_sent, unread) = piecewise(export, bitmap, server, step);
    match (&outcome, &cut_outcome) {
        // cut, the handshake is over before what comes behind it is seen
        (Err(HandshakeError::Protocol("bytes behind the handshake")), Ok(Some(_))) => assert!(unread > 0),
        _ => assert_eq!(outcome, cut_outcome),
    }
    assert_eq!(&sent[..], &cut_sent[..]);
    requests(&sent);
    match cut_outcome {
        Ok(Some(agreed)) => sound(&agreed, bitmap.is_some()),
        Ok(None) => {}
        Err(error) => {
            let words = error.to_string();
            assert!(words.chars().count() < 8192 && !words.contains('\n'), "{words:?}");
        }
    }
}

fn piecewise(export: &str, bitmap: Option<&str>, server: &[u8], step: usize) -> (Outcome, Vec<u8>, usize) {
    let (mut machine, mut sent) = (Handshake::new(export, bitmap), Vec::new());
    let (mut outcome, mut read) = (Ok(None), 0);
    for piece in server.chunks(step) {
        outcome = machine.receive(piece);
        read += piece.len();
        sent.extend_from_slice(&machine.output());
        if !matches!(outcome, Ok(None)) {
            break;
        }
    }
    // one piece may end the handshake and hold more: then both ways of cutting say so
    (outcome, sent, server.len() - read)
}

/// What the client sent: its flags, then options that the specification has, at most one of each kind.
fn requests(sent: &[u8]) {
    let Some(mut rest) = sent.get(4..) else { return assert!(sent.is_empty()) };
    let mut asked = Vec::new();
    while !rest.is_empty() {
        assert_eq!(proto::be64(rest, 0), Some(proto::OPTION_MAGIC));
        let option = proto::be32(rest, 8).expect("an option's number");
        let length = proto::be32(rest, 12).expect("an option's length") as usize;
        assert!(!asked.contains(&option) && length < 2 * proto::MAX_STRING);
        asked.push(option);
        rest = &rest[16 + length..];
    }
    let known = [
        proto::option::STRUCTURED_REPLY,
        proto::option::SET_META_CONTEXT,
        proto::option::LIST_META_CONTEXT,
        proto::option::GO,
    ];
    assert!(asked.iter().all(|option| known.contains(option)));
}

fn sound(agreed: &Agreed, bitmap: bool) {
    assert!(i64::try_from(agreed.size).is_ok());
    assert!(agreed.minimum_block.is_power_of_two() && agreed.minimum_block <= 1 << 16);
    assert!(agreed.maximum_block >= agreed.minimum_block);
    let ids = [agreed.contexts.allocation, agreed.contexts.depth, agreed.contexts.dirty];
    assert!(agreed.structured || ids == [None; 3], "contexts without structured replies: {agreed:?}");
    assert!(ids[2].is_some() == bitmap, "the bitmap that was asked for, and no other: {agreed:?}");
    let mut known: Vec<u32> = ids.into_iter().flatten().collect();
    let count = known.len();
    known.sort_unstable();
    known.dedup();
    assert_eq!(known.len(), count, "two contexts with one id: {agreed:?}");
}
