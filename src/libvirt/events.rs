//! libvirt's events as a stream of notices: which domain to look at again, or all of them.
//!
//! Notices carry no facts, so that a lost one costs time and never truth: whoever gets one reads libvirt.

use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use virt::connect::Connect;

use super::{LibvirtError, ffi};

/// What to look at again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// One domain changed.
    Domain(String),
    /// The connection is new: anything may have changed.
    Everything,
    /// libvirt cannot be reached.
    Disconnected(String),
}

/// How often a quiet connection is looked at.
const PULSE: Duration = Duration::from_secs(1);

/// Watches the libvirt at `uri` from threads of its own, for as long as `notify` answers true.
///
/// # Errors
/// When libvirt's event loop cannot be registered. It must be called before any other connection.
pub fn watch(uri: &str, mut notify: impl FnMut(Notice) -> bool + Send + 'static) -> Result<(), LibvirtError> {
    virt::event::event_register_default_impl()?;
    // an idle timer, so that the loop wakes up even while nothing is connected
    virt::event::event_add_timeout(1000, |_, _| {}, std::ptr::null_mut())?;
    std::thread::spawn(|| {
        loop {
            if let Err(error) = virt::event::event_run_default_impl() {
                tracing::warn!(%error, "libvirt's event loop");
            }
        }
    });
    let uri = uri.to_owned();
    std::thread::spawn(move || {
        loop {
            let went_on = match follow(&uri, &mut notify) {
                Ok(went_on) => went_on,
                Err(error) => notify(Notice::Disconnected(error.to_string())),
            };
            if !went_on {
                return;
            }
            std::thread::sleep(PULSE);
        }
    });
    Ok(())
}

/// One connection's life. Answers false when nobody listens any more.
fn follow(uri: &str, notify: &mut impl FnMut(Notice) -> bool) -> Result<bool, LibvirtError> {
    let connection = Connect::open(Some(uri))?;
    connection.set_keep_alive(5, 3)?;
    let (sender, receiver) = std::sync::mpsc::channel();
    ffi::register(&connection, &sender)?;
    if !notify(Notice::Everything) {
        return Ok(false);
    }
    loop {
        match receiver.recv_timeout(PULSE) {
            Ok(uuid) => {
                if !notify(Notice::Domain(uuid)) {
                    return Ok(false);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                if !connection.is_alive().unwrap_or(false) {
                    return Ok(notify(Notice::Disconnected("the connection closed".to_owned())));
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(true),
        }
    }
}
