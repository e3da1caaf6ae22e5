//! What a person sees while a command runs, on standard error: a bar on a terminal, lines with the time elsewhere. Results
//! go to standard output, and not through here.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::words::{self, Far};

/// Between two lines of progress where there is no terminal.
const LINES: Duration = Duration::from_secs(10);
/// Between two pictures of the bar.
const PICTURES: Duration = Duration::from_millis(200);

/// Standard error.
#[derive(Debug)]
pub struct Screen {
    began: Instant,
    terminal: bool,
    quiet: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    bar: bool,
    shown: Option<Instant>,
}

impl Screen {
    /// Begins to count the time. `quiet` says nothing but warnings.
    #[must_use]
    pub fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { began: Instant::now(), terminal, quiet, state: Mutex::default() }
    }

    /// A step.
    pub fn say(&self, words: impl AsRef<str>) {
        if !self.quiet {
            self.write(words.as_ref());
        }
    }

    /// Something that the user must know.
    pub fn warn(&self, words: impl AsRef<str>) {
        self.write(&format!("WARNING: {}", words.as_ref()));
    }

    fn write(&self, words: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let clear = if std::mem::take(&mut state.bar) { "\r\x1b[K" } else { "" };
        // where nobody listens there is nothing to say
        let _ = writeln!(std::io::stderr(), "{clear}{}", words::line(self.began.elapsed(), words));
    }

    /// How far a disk is; shown now and then.
    pub fn progress(&self, disk: &str, far: Far) {
        if self.quiet {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let every = if self.terminal { PICTURES } else { LINES };
        let since = *state.shown.get_or_insert_with(Instant::now);
        if since.elapsed() < every {
            return;
        }
        state.shown = Some(Instant::now());
        if self.terminal {
            state.bar = true;
            let columns = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok()).unwrap_or(79);
            let _ = write!(std::io::stderr(), "\r\x1b[K{}", far.bar(disk, columns));
        } else {
            let _ = writeln!(std::io::stderr(), "{}", words::line(self.began.elapsed(), &far.told(disk)));
        }
    }
}
