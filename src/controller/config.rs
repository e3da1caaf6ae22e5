//! The operator's command line.

use std::path::PathBuf;

use clap::Parser;

use crate::probe::Listen;
use crate::telemetry::LogFormat;

/// The Virtmark operator: validates backups, binds them to nodes, publishes the inventory.
#[derive(Clone, Debug, Parser)]
#[command(name = "operator", version)]
pub struct Config {
    /// Kubeconfig file; default: the environment's, or the pod's service account.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// The operator's namespace, where agents write DomainSightings.
    #[arg(long, default_value = "virtmark-system")]
    pub system_namespace: String,
    /// The namespace where LibvirtDomains are published.
    #[arg(long, default_value = "vms")]
    pub domains_namespace: String,
    /// Seconds for which a VM that no libvirt knows any more stays listed, as Missing.
    #[arg(long, default_value_t = 3600)]
    pub missing_grace_seconds: u32,
    /// This operator's name among several: the pod's, say.
    #[arg(long, env = "POD_NAME", default_value = "operator")]
    pub identity: String,
    /// Seconds after which the lease of an operator that does not renew it is free for another one.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(3..=600))]
    pub lease_seconds: u32,
    /// Address for /healthz, /readyz and /metrics, over plain HTTP; `none` for none.
    #[arg(long, default_value = "[::]:8080")]
    pub health_listen: Listen,
    /// Sign the certificates of agents that run with --certificate-from signer, with a CA in Secret virtmark-ca.
    #[arg(long)]
    pub sign_certificates: bool,
    /// YAML file that says into which libvirt pools each namespace may upload; without it none. It is read again for each upload.
    #[arg(long, env = "VIRTMARK_TENANCY")]
    pub tenancy: Option<PathBuf>,
    /// Do not run: say whether VMs are served, an operator leads and agents answer.
    #[arg(long)]
    pub check: bool,
    /// Do not run: cancel all backups that are open, and wait for as many seconds until they have ended.
    #[arg(long, value_name = "SECONDS", conflicts_with = "check")]
    pub end_backups: Option<u32>,
    /// How to log.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}
