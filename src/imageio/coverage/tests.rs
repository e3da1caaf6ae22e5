use proptest::prelude::*;

use super::codec::DecodeError;
use super::*;

/// Ranges that favour the edges of granules.
fn ranges(size: u64) -> impl Strategy<Value = Vec<(u64, u64)>> {
    let near = (0..=size / GRANULE + 1, -3..4i64).prop_map(|(n, d)| (n * GRANULE).saturating_add_signed(d));
    let place = prop_oneof![near, 0..size + 10];
    proptest::collection::vec((place.clone(), place), 0..40)
}

proptest! {
    #[test]
    fn it_is_a_byte_exact_model(size in 0..70_000u64, marks in ranges(70_000), asked in ranges(70_000), excuse in any::<u64>()) {
        let mut coverage = Coverage::new(size);
        let mut model = vec![None; usize::try_from(size).unwrap()];
        for (number, (start, end)) in marks.into_iter().enumerate() {
            let served = excuse >> (number % 64) & 1 == 0;
            if served {
                coverage.mark(start, end);
            } else {
                coverage.excuse(start, end);
            }
            let cut = |at: u64| usize::try_from(at.min(size)).unwrap();
            if start < end {
                model[cut(start)..cut(end)].iter_mut().for_each(|byte| *byte = byte.or(Some(served)));
            }
            let count = |wanted: fn(&Option<bool>) -> bool| model.iter().filter(|byte| wanted(byte)).count() as u64;
            prop_assert_eq!(coverage.transferred(), count(|byte| *byte == Some(true)));
            prop_assert_eq!(coverage.settled(), count(Option::is_some));
        }
        for (start, end) in asked {
            let settled = |at: &u64| model.get(usize::try_from(*at).unwrap()).is_some_and(Option::is_some);
            let missing = (start..end).filter(|at| !settled(at)).count() as u64;
            prop_assert_eq!(coverage.missing_in(start, end), missing, "{}..{}", start, end);
        }
        prop_assert_eq!(Coverage::decode(&coverage.encode(), size), Ok(coverage));
    }

    #[test]
    fn a_damaged_file_is_refused(marks in ranges(70_000), at in any::<prop::sample::Index>(), bit in 0..8u8, cut in any::<prop::sample::Index>()) {
        let mut coverage = Coverage::new(70_000);
        for (start, end) in marks {
            coverage.mark(start, end);
        }
        let whole = coverage.encode();
        let mut flipped = whole.clone();
        flipped[at.index(whole.len())] ^= 1 << bit;
        prop_assert!(Coverage::decode(&flipped, 70_000).is_err());
        prop_assert!(Coverage::decode(&whole[..cut.index(whole.len())], 70_000).is_err());
    }

    #[test]
    fn any_bytes_decode_without_panic(bytes: Vec<u8>, size: u64) {
        let forged = [&b"vmkcov02"[..], &bytes].concat();
        let _ = (Coverage::decode(&bytes, size), Coverage::decode(&forged, size));
    }
}

#[test]
fn memory_is_bounded_whatever_the_disk() {
    for size in [1, 128 << 30, (128 << 30) + 1, 1 << 50, i64::MAX.unsigned_abs(), u64::MAX] {
        let coverage = Coverage::new(size);
        assert!(coverage.bits.len() * 8 <= 4 << 20, "{size}");
        assert!(u64::try_from(coverage.bits.len()).unwrap() * 64 >= size.div_ceil(coverage.granule));
    }
    assert_eq!(Coverage::new(128 << 30).granule, 4096);
    assert_eq!(Coverage::new((128 << 30) + 1).granule, 8192);
}

#[test]
fn beyond_the_bound_bytes_count_as_unread_and_reading_again_helps() {
    let size = 4096 * (MAX_PARTIAL as u64 + 10);
    let mut coverage = Coverage::new(size);
    for granule in 0..MAX_PARTIAL as u64 + 10 {
        coverage.mark(granule * 4096, granule * 4096 + 1);
    }
    assert_eq!(coverage.partial.len(), MAX_PARTIAL);
    assert_eq!(coverage.transferred(), MAX_PARTIAL as u64);
    assert_eq!(coverage.missing_in(size - 4096, size), 4096);
    coverage.mark(size - 4096, size);
    assert_eq!(coverage.missing_in(size - 4096, size), 0);
    coverage.mark_all();
    assert_eq!((coverage.transferred(), coverage.partial.len()), (size, 0));
    assert_eq!(coverage.missing([(0, size), (size, size + 5)]), 5);
}

#[test]
fn the_file_is_bounded_whatever_was_served() {
    let size = 4096 * 640;
    let mut coverage = Coverage::new(size);
    for granule in (0..640).step_by(2) {
        coverage.mark(granule * 4096, (granule + 1) * 4096);
    }
    coverage.mark(4096 + 1, 4096 + 9);
    let file = coverage.encode();
    assert_eq!(file.len(), 8 + 6 * 8 + 16 + 640 / 8 + 8, "the bits are shorter than 320 runs");
    assert_eq!(Coverage::decode(&file, size), Ok(coverage));
}

#[test]
fn another_disk_or_format_is_refused() {
    let mut coverage = Coverage::new(10_000);
    coverage.mark_all();
    let bytes = coverage.encode();
    let other = DecodeError::OtherSize { found: 10_000, expected: 10_001 };
    assert_eq!(Coverage::decode(&bytes, 10_001), Err(other));
    assert_eq!(Coverage::decode(b"vmkcov00........", 10_000), Err(DecodeError::Foreign));
}

#[test]
fn a_large_disk_read_in_order_is_kept_in_few_bytes() {
    let size = 1 << 40;
    let mut coverage = Coverage::new(size);
    for start in (0..size).step_by(1 << 30) {
        coverage.mark(start, start + (1 << 30));
    }
    assert_eq!(coverage.transferred(), size);
    assert_eq!(coverage.encode().len(), 8 + 6 * 8 + 16 + 8);
}
