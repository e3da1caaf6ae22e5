//! A coverage file of the state directory: forged, torn, or honest.

use arbitrary::Unstructured;
use virtmark::imageio::Coverage;
use virtmark::imageio::coverage::GRANULE;

use super::number;

/// Sizes at which something changes: nothing, one granule, a word of granules, none of them round.
const SIZES: [u64; 8] = [0, 1, 4096, 12_345, 262_144, 262_145, 1 << 20, 70_000];

/// Any bytes are an error, or a coverage that claims no more than its disk, adds up, and comes back from its own
/// encoding. What was marked comes back exactly, and a changed or cut file is refused.
pub fn check(input: &[u8]) {
    let Some((choice, rest)) = input.split_first() else { return };
    let size = SIZES[usize::from(choice >> 2 & 7)];
    match choice & 3 {
        0 => decoded(rest, size),
        1 => decoded(&forged(rest), size),
        _ => marked(rest, size),
    }
}

fn decoded(bytes: &[u8], size: u64) {
    let Ok(coverage) = Coverage::decode(bytes, size) else { return };
    sound(&coverage, size);
    assert_eq!(Coverage::decode(&coverage.encode(), size).as_ref(), Ok(&coverage));
}

/// A file with the right head and checksum: numbers of the input's choice between them.
fn forged(bytes: &[u8]) -> Vec<u8> {
    let mut script = Unstructured::new(bytes);
    let mut file = b"vmkcov02".to_vec();
    while !script.is_empty() {
        let small = number::<u8>(&mut script);
        let value = match small {
            0xff => number::<u64>(&mut script),
            0xfe => u64::from(number::<u32>(&mut script)),
            0xf8..=0xfd => GRANULE << (small & 7),
            _ => u64::from(small),
        };
        file.extend_from_slice(&value.to_le_bytes());
    }
    let sum = file.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    file.extend_from_slice(&sum.to_le_bytes());
    file
}

fn marked(bytes: &[u8], size: u64) {
    let mut script = Unstructured::new(bytes);
    let mut coverage = Coverage::new(size);
    let mut model = (size < 1 << 20).then(|| vec![None; usize::try_from(size).expect("a small size")]);
    while !script.is_empty() {
        let (granule, within, length): (u8, i8, u16) =
            (number(&mut script), number(&mut script), number(&mut script));
        let start = (u64::from(granule) * GRANULE).saturating_add_signed(within.into());
        let end = start.saturating_add(u64::from(length));
        let served = length % 7 != 3;
        if served {
            coverage.mark(start, end);
        } else {
            coverage.excuse(start, end);
        }
        if let Some(model) = &mut model {
            let cut = |at: u64| usize::try_from(at.min(size)).expect("a small size");
            model[cut(start)..cut(end)].iter_mut().for_each(|byte| *byte = byte.or(Some(served)));
        }
    }
    sound(&coverage, size);
    if let Some(model) = model {
        assert_eq!(coverage.transferred(), model.iter().filter(|byte| **byte == Some(true)).count() as u64);
        assert_eq!(coverage.settled(), model.iter().flatten().count() as u64);
    }
    let file = coverage.encode();
    assert_eq!(Coverage::decode(&file, size).as_ref(), Ok(&coverage));
    let at = bytes.iter().map(|byte| usize::from(*byte)).sum::<usize>() % file.len();
    assert!(Coverage::decode(&file[..at], size).is_err(), "cut at {at}");
    let mut flipped = file;
    flipped[at] ^= 1 << (at % 8);
    assert!(Coverage::decode(&flipped, size).is_err(), "flipped at {at}");
}

fn sound(coverage: &Coverage, size: u64) {
    assert!(coverage.size() == size && coverage.transferred() <= coverage.settled());
    assert_eq!(coverage.missing_in(0, size), size - coverage.settled());
    assert_eq!(coverage.missing_in(size, u64::MAX), u64::MAX - size, "nothing beyond the disk was served");
    let limit = 8 * 7 + 8 + 16 * 65_536 + (4 << 20);
    assert!(coverage.encode().len() <= limit, "{} bytes", coverage.encode().len());
}
