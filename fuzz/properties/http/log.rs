//! Listens to every log line, at every level, and panics when one has the ticket's id.

use std::fmt::{self, Write as _};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

struct Listener;

/// From now on, in the whole process.
pub(super) fn install() {
    // another one may listen already: then this process is no fuzzer
    let _ = tracing::subscriber::set_global_default(Listener);
}

impl Subscriber for Listener {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        span.record(&mut Line::default());
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, values: &Record<'_>) {
        values.record(&mut Line::default());
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Line::default());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.clear();
        write!(self.0, "{value:?}").expect("a string");
        self.0.make_ascii_lowercase();
        assert!(!self.0.contains(&super::TICKET[..8]), "{field} in a log line: {}", self.0);
    }
}
