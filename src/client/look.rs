//! What is there in the cluster, listed, explained and purged. It makes nothing.

use std::time::Duration;

use kube::Api;
use kube::api::ListParams;

use super::args::{Checkpoint, Purge};
use super::backup::Session;
use super::exit::Failure;
use super::explain;
use super::inventory::{self, Rule};
use super::kubernetes::unless;
use crate::api::{LibvirtDomain, VmBackup, VmCheckpoint};

/// Time for a checkpoint's bitmaps to go. A backup of its VM holds it up.
const GONE: Duration = Duration::from_secs(300);

impl Session {
    /// The text of `vms`.
    ///
    /// # Errors
    /// The API server's.
    pub async fn vms(&self, output: super::output::Output) -> Result<String, Failure> {
        let found = unless(&self.stop, all(&self.cluster.of::<LibvirtDomain>())).await?;
        Ok(inventory::vms(&found).text(output))
    }

    /// The text of `disks`.
    ///
    /// # Errors
    /// The API server's, and when there is no such VM.
    pub async fn disks(&self, vm: &str, output: super::output::Output) -> Result<String, Failure> {
        Ok(inventory::disks(&self.cluster.domain(vm).await?).text(output))
    }

    /// The text of `explain`.
    ///
    /// # Errors
    /// The API server's, and when there is no such backup.
    pub async fn explain(&self, backup: &str) -> Result<String, Failure> {
        let hint = "list the backups with kubectl get vmbk, or give -n NAMESPACE";
        let found: VmBackup = self.cluster.get(backup, hint).await?;
        let said = explain::backup(&found, crate::clock::now());
        Ok(said.into_iter().map(|sentence| format!("{sentence}\n")).collect())
    }

    /// The text of `checkpoint`, once it is done.
    ///
    /// # Errors
    /// The API server's, and when a checkpoint is not there, or does not go.
    pub async fn checkpoint(&self, wanted: Checkpoint) -> Result<String, Failure> {
        let api = self.cluster.of::<VmCheckpoint>();
        let found = || unless(&self.stop, all(&api));
        match wanted {
            Checkpoint::List { vm, output } => {
                let mut found = found().await?;
                found.retain(|checkpoint| vm.as_ref().is_none_or(|vm| checkpoint.spec.vm == *vm));
                Ok(inventory::checkpoints(&found).text(output))
            }
            Checkpoint::Delete { names } => {
                for name in &names {
                    let hint = "list the checkpoints with virtmark checkpoint list, or give -n NAMESPACE";
                    let _: VmCheckpoint = self.cluster.get(name, hint).await?;
                }
                self.delete(&names).await
            }
            Checkpoint::Purge(Purge { vm, rule, owner, dry_run }) => {
                let rule = match (rule.days, rule.keep) {
                    (Some(days), _) => Rule::Days(days),
                    (None, keep) => Rule::Keep(keep.unwrap_or(usize::MAX)),
                };
                let names =
                    inventory::purged(&found().await?, &vm, owner.as_deref(), rule, crate::clock::now());
                match dry_run {
                    true => Ok(names.iter().map(|name| format!("{name}\n")).collect()),
                    false => self.delete(&names).await,
                }
            }
        }
    }

    /// Deletes checkpoints, and waits until their bitmaps are gone.
    async fn delete(&self, names: &[String]) -> Result<String, Failure> {
        let api = self.cluster.of::<VmCheckpoint>();
        for name in names {
            crate::cluster::delete(&api, name, None).await?;
        }
        let mut gone = String::new();
        for name in names {
            let is_gone = |object: Option<&VmCheckpoint>| Ok(object.is_none().then_some(()));
            unless(&self.stop, self.cluster.until(name, GONE, is_gone)).await?;
            gone.push_str(name);
            gone.push('\n');
        }
        Ok(gone)
    }
}

async fn all<K>(api: &Api<K>) -> Result<Vec<K>, Failure>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    Ok(api.list(&ListParams::default()).await?.items)
}
