//! A hostile NBD server reports block status: from its maps to the extents and the JSON that clients read.

use arbitrary::Unstructured;
use bytes::{BufMut as _, BytesMut};
use virtmark::extent::{self, Extent, Flags, Run};
use virtmark::imageio::wire::{Context, ExtentsJson};
use virtmark::nbd::handshake::Contexts;
use virtmark::nbd::proto::{ReplyHead, chunk};
use virtmark::nbd::transmission::{Reply, Transmission};

use super::number;

/// Whatever the maps say: the extents are sorted, without gap or overlap, inside the disk, as long as the shortest
/// map, and hold at each byte what the maps hold; the JSON tells the same.
pub fn check(input: &[u8]) {
    let mut script = Unstructured::new(input);
    let (choice, near): (u8, u32) = (number(&mut script), number(&mut script));
    let offset = if choice & 8 == 0 { u64::from(near) } else { u64::MAX / 2 - u64::from(near) };
    let size = offset.saturating_add(number::<u32>(&mut script).into()).min(u64::MAX / 2);
    let id = |bit: u8, id| (choice & bit != 0).then_some(id);
    let contexts = Contexts { allocation: id(1, 10), depth: id(2, 11), dirty: id(4, 12) };
    let mut maps: Vec<(u32, Vec<(u32, u32)>)> = Vec::new();
    for id in [contexts.allocation, contexts.depth, contexts.dirty].into_iter().flatten() {
        let count = 1 + number::<u8>(&mut script) % 16;
        let mut run = || (number::<u32>(&mut script).max(1), number::<u8>(&mut script).into());
        maps.push((id, (0..count).map(|_| run()).collect()));
    }
    let Some(runs) = told(contexts, &maps) else { return assert!(maps.is_empty()) };
    let extents: Vec<Extent> = extent::coalesce(extent::place(offset, size, runs)).collect();

    let shortest = maps.iter().map(|(_, runs)| runs.iter().map(|run| u64::from(run.0)).sum::<u64>()).min();
    let end = offset.saturating_add(shortest.unwrap_or(0)).min(size);
    let mut at = offset;
    for extent in &extents {
        assert!(extent.start == at && extent.length > 0, "a gap, an overlap or nothing at {at}: {extents:?}");
        at = extent.end();
        for byte in [extent.start, extent.start + extent.length / 2, extent.end() - 1] {
            assert_eq!(extent.flags, facts(contexts, &maps, byte - offset), "at {byte}");
        }
    }
    assert_eq!(at, end.max(offset));
    assert!(extents.windows(2).all(|pair| pair[0].flags != pair[1].flags), "neighbours that tell the same");
    json(Context::Zero, &extents, offset, end);
    json(Context::Dirty, &extents, offset, end);
}

/// Through the protocol's machine, as one reply; `None` without any context.
fn told(contexts: Contexts, maps: &[(u32, Vec<(u32, u32)>)]) -> Option<Vec<Run>> {
    let (mut wire, mut requests) = (Transmission::new(true, contexts), BytesMut::new());
    let cookie = wire.block_status(0, 4096, &mut requests);
    let mut server = BytesMut::new();
    for (at, (id, runs)) in maps.iter().enumerate() {
        let flags = if at + 1 == maps.len() { chunk::FLAG_DONE } else { 0 };
        let length = u32::try_from(4 + 8 * runs.len()).expect("few runs");
        ReplyHead::Chunk { flags, kind: chunk::BLOCK_STATUS, cookie, length }.encode(&mut server);
        server.put_u32(*id);
        for (length, state) in runs {
            server.put_u32(*length);
            server.put_u32(*state);
        }
    }
    let mut server = &server[..];
    loop {
        match wire.advance().expect("maps that are well formed") {
            Some(Reply::Status { result, .. }) => {
                return Some(result.expect("no error was sent").runs().collect());
            }
            Some(Reply::Read { .. } | Reply::Done { .. }) => panic!("nothing was read or written"),
            None if server.is_empty() => return None,
            None => {
                let mut space = wire.space();
                let (now, later) = server.split_at(server.len().min(space.remaining_mut()));
                space.put_slice(now);
                server = later;
            }
        }
    }
}

/// What the maps say of one byte.
fn facts(contexts: Contexts, maps: &[(u32, Vec<(u32, u32)>)], byte: u64) -> Flags {
    let mut flags = Flags::DATA;
    for (id, runs) in maps {
        let mut behind = 0;
        let state = runs.iter().find_map(|(length, state)| {
            behind += u64::from(*length);
            (byte < behind).then_some(*state)
        });
        let state = state.expect("an extent ends with the shortest map");
        let (holds, flag) = match Some(*id) {
            id if id == contexts.allocation => (state & 2 != 0, Flags::ZERO),
            id if id == contexts.depth => (state == 0, Flags::HOLE),
            _ => (state & 1 != 0, Flags::DIRTY),
        };
        flags = if holds { flags.union(flag) } else { flags };
    }
    flags
}

fn json(context: Context, extents: &[Extent], offset: u64, end: u64) {
    let (mut list, mut out) = (ExtentsJson::new(context), BytesMut::new());
    for extent in extents {
        list.push(*extent, &mut out);
    }
    list.finish(&mut out);
    let told: Vec<serde_json::Value> = serde_json::from_slice(&out).expect("a JSON list");
    assert!(told.len() <= extents.len());
    let mut at = offset;
    for extent in told {
        assert_eq!(extent["start"].as_u64(), Some(at));
        at += extent["length"].as_u64().expect("a length");
    }
    assert_eq!(at, end.max(offset));
}
