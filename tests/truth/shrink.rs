//! Takes steps out of a history that fails, for as long as it still fails. It does not know what failing is.

use super::history::{History, Step};

/// The smallest history found that still fails, by asking `fails` again and again while `goes_on`.
pub fn shrink(history: &History, fails: &dyn Fn(&History) -> bool, goes_on: &dyn Fn() -> bool) -> History {
    let mut best = history.clone();
    let mut size = best.steps.len().div_ceil(2);
    while size > 0 && goes_on() {
        let mut from = 0;
        while from < best.steps.len() && goes_on() {
            let mut steps = best.steps.clone();
            steps.drain(from..(from + size).min(steps.len()));
            let smaller = History { steps, ..best.clone() };
            if fails(&smaller) {
                best = smaller;
            } else {
                from += size;
            }
        }
        size /= 2;
    }
    for smaller in [simpler_steps, fewer_disks] {
        let mut index = 0;
        while goes_on() {
            let Some(simpler) = smaller(&best, index) else { break };
            if simpler != best && fails(&simpler) {
                best = simpler;
            } else {
                index += 1;
            }
        }
    }
    best
}

/// The step with this index without what happens within it.
fn simpler_steps(history: &History, index: usize) -> Option<History> {
    let mut simpler = history.clone();
    match simpler.steps.get_mut(index)? {
        Step::Backup(backup) => {
            backup.meanwhile.clear();
            backup.kill = None;
        }
        Step::Restart { off } => off.clear(),
        _ => {}
    }
    Some(simpler)
}

/// The history with a disk less, as long as there is one.
fn fewer_disks(history: &History, index: usize) -> Option<History> {
    let mut simpler = history.clone();
    (index == 0 && simpler.disks.pop().is_some() && !simpler.disks.is_empty()).then_some(simpler)
}

#[test]
fn what_is_left_is_what_it_takes_to_fail() {
    let is_kill = |step: &Step| matches!(step, Step::KillVm | Step::Restart { .. });
    let mut shrunk = 0;
    for seed in 0..100 {
        let history = History::of(seed);
        // fails with a restart before a backup
        let fails = |history: &History| {
            let kill = history.steps.iter().position(is_kill);
            kill.is_some_and(|at| history.steps[at..].iter().any(|step| matches!(step, Step::Backup(_))))
        };
        if !fails(&history) {
            continue;
        }
        shrunk += 1;
        let small = shrink(&history, &fails, &|| true);
        assert_eq!((small.steps.len(), small.disks.len()), (2, 1), "{small}");
        let Step::Backup(backup) = &small.steps[1] else { panic!("{small}") };
        assert!(backup.meanwhile.is_empty() && backup.kill.is_none(), "{small}");
        // out of time: as it was
        assert_eq!(shrink(&history, &fails, &|| false), history);
    }
    assert!(shrunk > 20, "{shrunk}");
}
