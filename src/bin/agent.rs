//! The agent's executable.

use clap::Parser as _;
use virtmark::{agent, telemetry};

fn main() -> anyhow::Result<()> {
    let config = agent::config::Config::parse();
    telemetry::init(config.log_format);
    telemetry::install_crypto();
    let runtime = tokio::runtime::Runtime::new()?;
    let ended = runtime.block_on(async { agent::run(config, telemetry::stop_on_signal()?).await });
    // a call to a libvirt that does not answer is not waited for: it goes on there, and the successor finds it
    runtime.shutdown_background();
    ended
}
