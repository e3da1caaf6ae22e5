//! The operator's executable.

use std::time::Duration;

use clap::Parser as _;
use virtmark::{controller, telemetry};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = controller::config::Config::parse();
    telemetry::init(config.log_format);
    telemetry::install_crypto();
    if config.check {
        return controller::check(&config).await;
    }
    if let Some(seconds) = config.end_backups {
        return controller::end_backups(&config, Duration::from_secs(seconds.into())).await;
    }
    controller::run(config, telemetry::stop_on_signal()?).await
}
