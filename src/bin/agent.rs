//! The agent's executable.

use clap::Parser as _;
use virtmark::{agent, telemetry};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = agent::config::Config::parse();
    telemetry::init(config.log_format);
    telemetry::install_crypto();
    agent::run(config, telemetry::stop_on_signal()?).await
}
