//! Whatever order events come in, a backup ends with a thawed guest and nothing left on its host.

use proptest::prelude::*;

use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn because(reason: Reason) -> Because {
    Because::new(reason, "test")
}

/// The host as it really is, which the life only hears of through reports and observations.
#[derive(Debug, Default, PartialEq, Eq)]
struct Host {
    files: bool,
    frozen: bool,
    job: bool,
    checkpoint: bool,
    base: bool,
    off: bool,
    /// It was started again since the files were made.
    restarted: bool,
}

/// How a call to the host goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Works,
    FailsBefore,
    FailsAfter,
    /// It cannot be done now, and may be later.
    Waits,
    /// The process dies in the middle; a successor reads the record.
    DiesBefore,
    DiesAfter,
}

#[derive(Clone, Copy, Debug)]
enum World {
    Nothing,
    PowerOff,
    PowerCycle,
    JobVanishes,
    Cancel,
    Finalize,
    Deadline,
    Restart,
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        6 => Just(Call::Works),
        1 => Just(Call::FailsBefore),
        1 => Just(Call::FailsAfter),
        1 => Just(Call::Waits),
        1 => Just(Call::DiesBefore),
        1 => Just(Call::DiesAfter),
    ]
}

fn world() -> impl Strategy<Value = World> {
    prop_oneof![
        8 => Just(World::Nothing),
        1 => Just(World::PowerOff),
        1 => Just(World::PowerCycle),
        1 => Just(World::JobVanishes),
        1 => Just(World::Cancel),
        2 => Just(World::Finalize),
        1 => Just(World::Deadline),
        1 => Just(World::Restart),
    ]
}

impl Host {
    fn perform(&mut self, action: Action, from_base: bool) {
        match action {
            Action::MakeFiles => {
                self.files = true;
                self.restarted = false;
            }
            Action::Redefine => self.base = true,
            Action::ForgetBase => self.base = false,
            Action::Freeze => self.frozen = !self.off,
            Action::Begin => {
                assert!(self.base || !from_base, "begun without its base");
                if !self.off {
                    self.job = true;
                    self.checkpoint = true;
                }
            }
            Action::Thaw => self.frozen = false,
            Action::AbortJob => self.job = false,
            Action::DeleteCheckpoint | Action::ForgetCheckpoint => self.checkpoint = false,
            Action::RemoveFiles => self.files = false,
        }
    }

    fn seen(&self) -> Seen {
        Seen { active: !self.off, our_job: self.job, restarted: self.restarted }
    }
}

/// A successor reads what its predecessor stored.
fn successor(life: &Life) -> Life {
    let stored = serde_json::to_string(life).unwrap();
    let mut life: Life = serde_json::from_str(&stored).unwrap();
    life.interrupt();
    life
}

fn step(life: &mut Life, host: &mut Host, call: Call, required: bool, now: Timestamp) -> bool {
    life.observe(host.seen(), now);
    let Some(action) = life.next() else { return false };
    assert!(
        !host.frozen || matches!(action, Action::Thaw | Action::Begin),
        "{action:?} while the guest is frozen: {life:?}"
    );
    life.starting(action, true, now);
    if matches!(call, Call::Works | Call::FailsAfter | Call::DiesAfter) {
        host.perform(action, life.from_base);
    }
    let works = !host.off || !matches!(action, Action::Redefine | Action::Freeze | Action::Begin);
    let report = match call {
        Call::DiesBefore | Call::DiesAfter => {
            *life = successor(life);
            return true;
        }
        Call::Works if works && action == Action::Freeze => Report::Froze(Freeze::Frozen),
        Call::Works if works => Report::Done,
        Call::Waits if action != Action::Freeze => Report::Failed(because(Reason::VmBusy)),
        _ if action == Action::Freeze => Report::Froze(Freeze::Failed("test".to_owned())),
        _ => Report::Failed(because(Reason::HypervisorError)),
    };
    life.done(action, report, required, now);
    true
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn ends_thawed_and_clean(
        events in prop::collection::vec((world(), call()), 0..40),
        required: bool,
        from_base: bool,
    ) {
        let mut life = Life { from_base, ..Life::default() };
        let mut host = Host::default();
        let mut now = 0;
        let mut finalized_while_serving = false;
        let mut first_outcome = None;
        for (world, call) in events {
            now += 1;
            match world {
                World::Nothing => {}
                World::PowerOff => host = Host { off: true, frozen: false, job: false, ..host },
                World::PowerCycle => {
                    host = Host { off: false, frozen: false, job: false, restarted: true, ..host };
                }
                World::JobVanishes => host.job = false,
                World::Cancel => life.end(Outcome::Failed(because(Reason::Cancelled))),
                World::Deadline => life.end(Outcome::Failed(because(Reason::ReadyDeadlineExceeded))),
                World::Finalize => {
                    life.observe(host.seen(), at(now));
                    if life.is_serving() {
                        finalized_while_serving = true;
                        life.end(Outcome::Succeeded);
                    }
                }
                World::Restart => life = successor(&life),
            }
            life.retry();
            step(&mut life, &mut host, call, required, at(now));
            if let Some(outcome) = &life.outcome {
                let first = first_outcome.get_or_insert_with(|| outcome.clone());
                prop_assert_eq!(&*first, outcome, "an outcome changed");
            }
            prop_assert!(life.outcome != Some(Outcome::Succeeded) || finalized_while_serving);
        }
        // from here on the host does as it is told; the user gives up
        life.end(Outcome::Failed(because(Reason::Deleted)));
        for _ in 0..20 {
            now += 1;
            life.retry();
            if !step(&mut life, &mut host, Call::Works, required, at(now)) {
                break;
            }
        }
        prop_assert!(life.is_ended(), "{life:?}");
        let left = Host { off: host.off, restarted: host.restarted, ..Host::default() };
        prop_assert_eq!(host, left);
    }

    /// Processes that die, and calls that must wait, cost time on the way up, and nothing else.
    #[test]
    fn serves_in_the_end_however_often_its_process_dies(
        deaths in prop::collection::vec(prop_oneof![
            Just(Call::Works), Just(Call::Waits), Just(Call::DiesBefore), Just(Call::DiesAfter)], 0..20),
        from_base: bool,
    ) {
        let (mut life, mut host) = (Life { from_base, ..Life::default() }, Host::default());
        for (now, call) in deaths.into_iter().chain([Call::Works; 8]).enumerate() {
            life.retry();
            step(&mut life, &mut host, call, false, at(now.try_into().unwrap()));
        }
        prop_assert!(life.is_serving(), "{life:?}");
        let serving = Host { files: true, job: true, checkpoint: true, base: from_base, ..Host::default() };
        prop_assert_eq!(host, serving);
    }

    #[test]
    fn serves_when_all_works(required: bool, from_base: bool) {
        let (mut life, mut host) = (Life { from_base, ..Life::default() }, Host::default());
        let mut steps = 0;
        while step(&mut life, &mut host, Call::Works, required, at(steps)) {
            steps += 1;
        }
        prop_assert_eq!(steps, if from_base { 5 } else { 4 }, "files, base, freeze, begin, thaw");
        prop_assert!(life.is_serving());
        prop_assert!(!host.frozen);
        prop_assert_eq!(life.frozen_milliseconds(), Some(2000));
    }
}

#[test]
fn a_guest_without_agent_is_not_thawed() {
    let mut life = Life { stage: Stage::Prepared, ..Life::default() };
    life.starting(Action::Freeze, true, at(1));
    life.done(Action::Freeze, Report::Froze(Freeze::NotAsked("no agent".to_owned())), false, at(1));
    assert_eq!(life.next(), Some(Action::Begin));
    assert_eq!(life.quiet, Quiet::Not("no agent".to_owned()));
    assert!(!life.held.frozen);
}

#[test]
fn a_vm_that_was_started_again_at_once_was_stopped_all_the_same() {
    let cycled = Seen { active: true, our_job: false, restarted: true };
    let mut life = Life { stage: Stage::Begun, ..Life::default() };
    life.held.job = true;
    life.observe(cycled, at(1));
    assert!(matches!(&life.outcome, Some(Outcome::Failed(why)) if why.reason == Reason::VmStopped));
    assert!(!life.held.job);

    let mut life = Life { stage: Stage::Quiesced, ..Life::default() };
    life.held.frozen = true;
    life.observe(cycled, at(1));
    assert_eq!((life.stage, life.held.frozen, &life.outcome), (Stage::New, false, &None), "it starts over");
}

#[test]
fn a_required_freeze_that_fails_ends_it_and_still_thaws() {
    let mut life = Life { stage: Stage::Prepared, ..Life::default() };
    life.starting(Action::Freeze, true, at(1));
    life.done(Action::Freeze, Report::Froze(Freeze::Failed("hung".to_owned())), true, at(9));
    assert_eq!(life.next(), Some(Action::Thaw));
    assert!(matches!(&life.outcome, Some(Outcome::Failed(why)) if why.reason == Reason::QuiesceFailed));
}

#[test]
fn a_begin_that_takes_too_long_is_not_quiet() {
    for required in [false, true] {
        let mut life = Life { stage: Stage::Quiesced, quiet: Quiet::Frozen, ..Life::default() };
        life.held.frozen = true;
        life.starting(Action::Begin, true, at(1));
        life.thawed_early(10, required);
        life.done(Action::Begin, Report::Done, required, at(31));
        assert_eq!(life.next(), Some(Action::Thaw), "once more, for certain");
        assert_eq!(life.is_serving(), !required);
        assert!(matches!(&life.quiet, Quiet::Not(why) if why.contains("10 s")));
        assert_eq!(life.frozen_milliseconds(), None);
    }
}

#[test]
fn thawing_is_given_up_in_the_end() {
    let mut life = Life { stage: Stage::Begun, ..Life::default() };
    life.held.frozen = true;
    for _ in 0..THAW_TRIES {
        assert!(life.held.frozen);
        life.retry();
        assert_eq!(life.next(), Some(Action::Thaw));
        life.done(Action::Thaw, Report::Failed(because(Reason::GuestMayBeFrozen)), false, at(1));
    }
    life.retry();
    assert_eq!(life.next(), None);
    assert!(life.is_serving(), "an unthawed guest does not end the backup that waits for its reader");
}

#[test]
fn a_job_without_a_record_is_ended_and_all_that_belongs_to_it_is_removed() {
    let (mut life, mut host) =
        (Life::default(), Host { files: true, job: true, checkpoint: true, ..Host::default() });
    for now in 0..10 {
        if !step(&mut life, &mut host, Call::Works, false, at(now)) {
            break;
        }
    }
    assert!(life.is_ended());
    assert_eq!(host, Host::default());
    assert!(matches!(&life.outcome, Some(Outcome::Failed(why)) if why.reason == Reason::HypervisorError));
}
