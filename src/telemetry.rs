//! Logs: one line an occurrence, on standard error, with fields that follow one backup by its uid.

use tracing_subscriber::EnvFilter;

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// Starts logging. `RUST_LOG` overrides the levels.
pub fn init(format: LogFormat) {
    let quiet = "info,kube_client=warn,kube_runtime=warn,hyper=warn,rustls=warn,tower=warn";
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(quiet));
    let lines =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match format {
        LogFormat::Text => lines.with_ansi(false).init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
}

/// Makes aws-lc-rs the process's crypto: rustls cannot choose by itself when two are compiled in.
pub fn install_crypto() {
    // an error means that it is installed already
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// A token that SIGTERM and Ctrl-C cancel.
///
/// # Errors
/// When the signal cannot be listened for.
pub fn stop_on_signal() -> std::io::Result<tokio_util::sync::CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = tokio_util::sync::CancellationToken::new();
    let told = stop.clone();
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("stopping");
        told.cancel();
    });
    Ok(stop)
}
