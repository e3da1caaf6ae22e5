//! Where tests kill a process: in a build with the feature `killpoints`, one that has reached the step named in
//! `VIRTMARK_DIE_AT` sends itself SIGKILL, as if the kernel had. In every other build this is nothing.

use crate::step::Step;

/// The environment variable that names the step, or the step and how often it is passed first: `BitmapRemoved:1`.
pub const VARIABLE: &str = "VIRTMARK_DIE_AT";

/// The step was taken.
#[cfg(not(feature = "killpoints"))]
pub fn reached(_: Step) {}

/// Calls `call`, during which the process may be killed.
#[cfg(not(feature = "killpoints"))]
pub fn during<T>(_: Step, call: impl FnOnce() -> T) -> T {
    call()
}

#[cfg(feature = "killpoints")]
pub use armed::{during, reached};

#[cfg(feature = "killpoints")]
mod armed {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::{Step, VARIABLE};

    /// How long a call is given before the process dies in it: libvirt has it by then, and has not answered.
    const IN_THE_MIDDLE: Duration = Duration::from_millis(5);

    fn is_due(step: Step) -> bool {
        static PASSED: AtomicU32 = AtomicU32::new(0);
        let named = std::env::var(VARIABLE).unwrap_or_default();
        let (name, passes) = named.split_once(':').unwrap_or((&named, "0"));
        name == step.as_str() && PASSED.fetch_add(1, Ordering::SeqCst) == passes.parse().unwrap_or(0)
    }

    fn die() {
        // the answer does not come
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }

    /// The step was taken: dies here, if it is the one.
    pub fn reached(step: Step) {
        if is_due(step) {
            die();
        }
    }

    /// Calls `call`, and dies in the middle of it, if the step is the one.
    pub fn during<T>(step: Step, call: impl FnOnce() -> T) -> T {
        if is_due(step) {
            std::thread::spawn(|| {
                std::thread::sleep(IN_THE_MIDDLE);
                die();
            });
        }
        call()
    }
}
