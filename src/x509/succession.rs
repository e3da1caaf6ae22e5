//! How one CA follows another: when a new one is made, when it begins to sign, and for how long certificates last.
//!
//! ```text
//!   old  |-- signs ----------------------------------------|           |-- trusted until it ends
//!   new                                          made |-- trusted --|-- signs ------------------ ...
//!                                     a third is left ^     LEAD    ^
//! ```
//!
//! A new CA is published for a week before it signs: whoever took the bundle meanwhile, with a ticket say, trusts what is signed
//! then. The old one stays in the bundle until it ends, and nothing that it signed outlives it.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::Span;

/// How long a CA is valid.
pub const CA_LIFE: SignedDuration = SignedDuration::from_hours(365 * 24);

/// For how long a new CA is published before it signs.
pub const LEAD: SignedDuration = SignedDuration::from_hours(7 * 24);

/// How long a certificate is valid at most, and if its owner asks for nothing else.
pub const LEAF_LIFE: SignedDuration = SignedDuration::from_hours(30 * 24);

/// How long it is valid at least.
pub const LEAF_LEAST: SignedDuration = SignedDuration::from_hours(1);

/// How long before it is made a certificate begins: clocks of clients may be behind.
pub const BACKDATED: SignedDuration = SignedDuration::from_mins(5);

/// Whether another CA is to follow this one, the newest: a third of its life is left, or less.
pub fn is_due(newest: Span, now: Timestamp) -> bool {
    newest.left(now) <= newest.length() / 3
}

/// When a CA begins to sign, if there is an older one until then.
pub fn takes_over(span: Span) -> Timestamp {
    span.from + BACKDATED + LEAD
}

/// Which of these CAs, oldest first, signs now: the newest that was published for long enough, or else the one that was for
/// longest. One that ends too soon does not. `None` when there are none.
pub fn signs(authorities: &[Span], now: Timestamp) -> Option<usize> {
    let lasts = |span: &Span| span.left(now) >= LEAD;
    let is_known = |span: &Span| takes_over(*span) <= now;
    let known = authorities.iter().rposition(|span| is_known(span) && lasts(span));
    known.or_else(|| authorities.iter().position(lasts)).or_else(|| authorities.len().checked_sub(1))
}

/// How long a certificate lasts for whose owner asks for `asked` seconds.
pub fn leaf_life(asked: Option<i32>) -> SignedDuration {
    let asked = asked.map_or(LEAF_LIFE, |seconds| SignedDuration::from_secs(seconds.into()));
    asked.clamp(LEAF_LEAST, LEAF_LIFE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day(day: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + day * 86_400).unwrap()
    }

    fn made_on(made: i64) -> Span {
        Span { from: day(made) - BACKDATED, to: day(made + 365) }
    }

    #[test]
    fn a_third_of_its_life_before_its_end_another_is_made() {
        assert!(!is_due(made_on(0), day(243)));
        assert!(is_due(made_on(0), day(244)));
        assert!(is_due(made_on(0), day(400)));
    }

    #[test]
    fn the_newest_that_is_known_signs() {
        let cases: [(&str, &[i64], i64, Option<usize>); 9] = [
            ("none", &[], 0, None),
            ("the first, at once", &[0], 0, Some(0)),
            ("the old one, while the new one becomes known", &[0, 244], 250, Some(0)),
            ("the new one, once it is", &[0, 244], 251, Some(1)),
            ("the new one, after the old one's end", &[0, 244], 400, Some(1)),
            ("the new one at once, when the old one ends too soon", &[0, 359], 359, Some(1)),
            ("the new one at once, when the old one ended", &[0, 400], 400, Some(1)),
            ("the older of two that nobody knows", &[0, 1], 2, Some(0)),
            ("the last that was, when all ended", &[0, 1], 900, Some(1)),
        ];
        for (what, made, now, expected) in cases {
            let spans: Vec<_> = made.iter().map(|&made| made_on(made)).collect();
            assert_eq!(signs(&spans, day(now)), expected, "{what}");
        }
    }

    #[test]
    fn an_owner_may_ask_for_less_and_not_for_more() {
        assert_eq!(leaf_life(None), LEAF_LIFE);
        assert_eq!(leaf_life(Some(i32::MAX)), LEAF_LIFE);
        assert_eq!(leaf_life(Some(86_400)), SignedDuration::from_hours(24));
        assert_eq!(leaf_life(Some(600)), LEAF_LEAST);
    }
}
