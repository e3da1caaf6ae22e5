//! The agent's command line: what the admin of a node decides.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;

use crate::probe::Listen;
use crate::telemetry::LogFormat;

/// Who makes the image server's certificate, where no files are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum CertificateFrom {
    /// This agent, with a CA of its own.
    #[default]
    #[value(name = "self")]
    Own,
    /// The operator, which signs a CertificateSigningRequest.
    Signer,
}

/// The Virtmark agent: backs up the virtual machines of one node.
#[derive(Clone, Debug, Parser)]
#[command(name = "agent", version)]
pub struct Config {
    /// Kubeconfig file; default: the environment's, or the pod's service account.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Name of this node's Node object.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// The node's libvirt.
    #[arg(long, default_value = "qemu:///system")]
    pub libvirt_uri: String,
    /// Directory for records and tickets, kept over restarts; only root reads it.
    #[arg(long, default_value = "/var/lib/virtmark")]
    pub state_dir: PathBuf,
    /// Directory for scratch images and sockets; QEMU must be able to pass, at the same path.
    #[arg(long, default_value = "/var/lib/virtmark-run")]
    pub run_dir: PathBuf,
    /// The operator's namespace, where DomainSightings are written.
    #[arg(long, default_value = "virtmark-system")]
    pub system_namespace: String,
    /// Addresses of the image server (HTTPS).
    #[arg(long, default_value = "[::]:54322")]
    pub listen: Vec<SocketAddr>,
    /// Host and port that clients are told, `host:port`; default: the node's name and the first port.
    #[arg(long)]
    pub advertise: Option<String>,
    /// PEM file with the image server's certificate chain; default: as --certificate-from says. It, the key and the CA are read
    /// again when they change, and no connection is cut.
    ///
    /// Tickets that are out keep the CA that they were made with: have --tls-ca name the old and the new one while a CA is
    /// exchanged.
    #[arg(long, requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with its private key.
    #[arg(long, requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// PEM file with the CA that clients are told, with `--tls-cert`.
    #[arg(long, requires = "tls_cert")]
    pub tls_ca: Option<PathBuf>,
    /// Where the image server's certificate comes from without --tls-cert: made by this agent, or signed by an operator that runs
    /// with --sign-certificates.
    #[arg(long, value_enum, default_value_t, conflicts_with = "tls_cert")]
    pub certificate_from: CertificateFrom,
    /// MiB that the scratch images of all backups may take together; default: what their file system has free, but for
    /// a reserve.
    #[arg(long, env = "VIRTMARK_SCRATCH_LIMIT_MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    pub scratch_limit_mib: Option<u64>,
    /// Seconds for which a backup may go on after its node was cordoned: while it runs its VM cannot be migrated away.
    #[arg(long, env = "VIRTMARK_DRAIN_GRACE_SECONDS", default_value_t = 300)]
    pub drain_grace_seconds: u32,
    /// Seconds between two renewals of the Lease by which this agent says that it lives; it holds for four times that.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=600))]
    pub heartbeat_seconds: u16,
    /// Seconds between two looks at the bitmaps of a VM of which nothing else is heard.
    #[arg(long, env = "VIRTMARK_LOOK_SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=86400))]
    pub look_seconds: u32,
    /// Address for /healthz, /readyz and /metrics, over plain HTTP; `none` for none.
    #[arg(long, default_value = "[::]:8080")]
    pub health_listen: Listen,
    /// How to log.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

impl Config {
    /// The host and port that clients are told.
    pub fn advertised(&self) -> String {
        let port = self.listen.first().map_or(54322, SocketAddr::port);
        self.advertise.clone().unwrap_or_else(|| format!("{}:{port}", self.node_name))
    }

    /// Path of the image server's unix socket.
    pub fn unix_socket(&self) -> PathBuf {
        self.run_dir.join("imageio.sock")
    }
}
