//! Where tests kill or stop a process: in a build with the feature `killpoints`, one that has reached the step named
//! in `VIRTMARK_DIE_AT` sends itself SIGKILL, as if the kernel had, and at the one in `VIRTMARK_PAUSE_AT` SIGSTOP. In
//! every other build this is nothing.

use crate::step::Step;

/// The environment variable that names the step, or the step and how often it is passed first: `BitmapRemoved:1`.
pub const VARIABLE: &str = "VIRTMARK_DIE_AT";

/// The same, for where it stops until it is told to go on.
pub const PAUSE_VARIABLE: &str = "VIRTMARK_PAUSE_AT";

/// The environment variable that names a folder. While it has a file `JobAborted@db01-1`, the backup db01-1 does not
/// get past that step, and nothing else is held up; the file is renamed to `held-JobAborted@db01-1` when it stands there.
pub const HOLD_VARIABLE: &str = "VIRTMARK_HOLD_IN";

/// The step was taken.
#[cfg(not(feature = "killpoints"))]
pub fn reached(_: Step) {}

/// Whether the backup `name` is to stand at this step.
#[cfg(not(feature = "killpoints"))]
pub fn holds(_: Step, _name: &str) -> bool {
    false
}

/// Calls `call`, during which the process may be killed.
#[cfg(not(feature = "killpoints"))]
pub fn during<T>(_: Step, call: impl FnOnce() -> T) -> T {
    call()
}

#[cfg(feature = "killpoints")]
pub use armed::{during, holds, reached};

#[cfg(feature = "killpoints")]
mod armed {
    use std::path::Path;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    use super::{HOLD_VARIABLE, PAUSE_VARIABLE, Step, VARIABLE};

    /// How long a call is given before the process dies in it: libvirt has it by then, and has not answered.
    const IN_THE_MIDDLE: Duration = Duration::from_millis(5);

    /// A step that is waited for, and how often it was passed.
    struct Awaited {
        variable: &'static str,
        passed: AtomicU32,
    }

    static DEATH: Awaited = Awaited { variable: VARIABLE, passed: AtomicU32::new(0) };
    static PAUSE: Awaited = Awaited { variable: PAUSE_VARIABLE, passed: AtomicU32::new(0) };

    impl Awaited {
        fn is_due(&self, step: Step) -> bool {
            let named = std::env::var(self.variable).unwrap_or_default();
            let (name, passes) = named.split_once(':').unwrap_or((&named, "0"));
            name == step.as_str() && self.passed.fetch_add(1, Ordering::SeqCst) == passes.parse().unwrap_or(0)
        }
    }

    fn die() {
        // the answer does not come
        let _ = kill_process(getpid(), Signal::KILL);
    }

    /// The step was taken: dies or stops here, if it is the one.
    pub fn reached(step: Step) {
        if DEATH.is_due(step) {
            die();
        }
        if PAUSE.is_due(step) {
            // comes back when it is told to go on
            let _ = kill_process(getpid(), Signal::STOP);
        }
    }

    /// Whether the backup `name` is to stand at this step. Who asks waits, and asks again.
    pub fn holds(step: Step, name: &str) -> bool {
        let Some(folder) = std::env::var_os(HOLD_VARIABLE) else { return false };
        let held = Path::new(&folder).join(format!("held-{step}@{name}"));
        let _ = std::fs::rename(Path::new(&folder).join(format!("{step}@{name}")), &held);
        held.exists()
    }

    /// Calls `call`, and dies in the middle of it, if the step is the one.
    pub fn during<T>(step: Step, call: impl FnOnce() -> T) -> T {
        if DEATH.is_due(step) {
            std::thread::spawn(|| {
                std::thread::sleep(IN_THE_MIDDLE);
                die();
            });
        }
        call()
    }
}
