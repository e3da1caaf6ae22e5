//! The command line of `transfer`, as the user types it. It decides nothing: `command` gives it its meaning.

use clap::Subcommand;

use super::output::Output;

/// `transfer`.
#[derive(Subcommand, Debug)]
pub enum Transfer {
    /// Show a transfer, or all of the namespace
    #[command(after_help = "Examples:
  virtmark transfer show -n vms
  virtmark transfer show db01-20261130-221509-vda -n vms -o yaml
  virtmark transfer show db01-20261130-221509-vda -n vms --ticket -o json | jq -r .ca > ca.pem
  curl --cacert ca.pem -r 0-511 \"$(virtmark transfer show db01-20261130-221509-vda -n vms --ticket -o json | jq -r .url)\"")]
    Show {
        /// The ImageTransfer (kubectl get imgt). Default: all
        #[arg(required_if_eq("ticket", "true"))]
        name: Option<String>,
        /// Print its ticket instead: URL, unix socket and CA. Whoever has the URL can read the disk
        #[arg(long)]
        ticket: bool,
        /// How it is printed
        #[arg(long, short = 'o', value_enum, default_value_t)]
        output: Output,
    },
    /// Answer no request for a while; the ticket stays the same
    Pause {
        /// The ImageTransfer (kubectl get imgt)
        name: String,
    },
    /// Answer requests again
    Resume {
        /// The ImageTransfer (kubectl get imgt)
        name: String,
    },
    /// End it, and leave nothing of it; its backup stays
    Cancel {
        /// The ImageTransfer (kubectl get imgt)
        name: String,
    },
    /// Let it go unused for longer (spec.inactivityTimeoutSeconds)
    #[command(after_help = "Example:
  virtmark transfer extend db01-20261130-221509-vda --seconds 3600 -n vms")]
    Extend {
        /// The ImageTransfer (kubectl get imgt)
        name: String,
        /// Seconds without a request that end or pause it, more than it has now
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(i32).range(1..=2_592_000))]
        seconds: i32,
    },
}
