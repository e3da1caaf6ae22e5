//! The API by one client for the whole process: a kubectl each time would cost most of the test's time.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use virtmark::api::{ImageTransfer, LibvirtDomain, VmBackup, VmCheckpoint};
use virtmark_bed::Bed;
use virtmark_bed::component::VM_NAMESPACE;

/// How long an API server that has just been away may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The objects in the namespace of the VMs.
#[derive(Clone, Copy)]
pub struct Cluster {
    runtime: &'static Runtime,
    client: &'static Client,
}

impl Cluster {
    pub fn of(bed: &Bed) -> Result<Self> {
        static RUNTIME: OnceLock<(Runtime, Client)> = OnceLock::new();
        if RUNTIME.get().is_none() {
            virtmark::telemetry::install_crypto();
            let runtime = Runtime::new()?;
            let client = runtime.block_on(virtmark::cluster::connect(Some(&bed.plane.kubeconfig)))?;
            // another thread may have been first, which is as well
            let _ = RUNTIME.set((runtime, client));
        }
        let (runtime, client) = RUNTIME.get().context("no runtime")?;
        Ok(Self { runtime, client })
    }

    fn api(&self, kind: &str) -> Result<Api<DynamicObject>> {
        let resource = match kind {
            "vmbackup" => ApiResource::erase::<VmBackup>(&()),
            "imagetransfer" => ApiResource::erase::<ImageTransfer>(&()),
            "vmcheckpoint" => ApiResource::erase::<VmCheckpoint>(&()),
            "lvd" => ApiResource::erase::<LibvirtDomain>(&()),
            "secret" => ApiResource::erase::<k8s_openapi::api::core::v1::Secret>(&()),
            other => anyhow::bail!("which kind is {other}?"),
        };
        Ok(Api::namespaced_with(self.client.clone(), VM_NAMESPACE, &resource))
    }

    /// Asks until the API server answers: it has just been away.
    fn ask<T>(&self, mut ask: impl AsyncFnMut() -> Result<T, kube::Error>) -> Result<T> {
        let began = Instant::now();
        loop {
            match self.runtime.block_on(ask()) {
                Err(kube::Error::Api(status)) if status.code < 500 => {
                    return Err(kube::Error::Api(status).into());
                }
                Err(error) if began.elapsed() > PATIENCE => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
                Ok(answer) => return Ok(answer),
            }
        }
    }

    /// An object, or null.
    pub fn get(&self, kind: &str, name: &str) -> Result<Value> {
        let api = self.api(kind)?;
        let found = self.ask(async || api.get_opt(name).await)?;
        Ok(found.map(serde_json::to_value).transpose()?.unwrap_or_default())
    }

    pub fn list(&self, kind: &str) -> Result<Vec<Value>> {
        let api = self.api(kind)?;
        let found = self.ask(async || api.list(&ListParams::default()).await)?;
        Ok(found.items.into_iter().map(serde_json::to_value).collect::<Result<_, _>>()?)
    }

    /// Makes a VmBackup.
    pub fn backup(&self, name: &str, spec: Value) -> Result<()> {
        let object = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "VmBackup",
            "metadata": {"name": name}, "spec": spec});
        let object: DynamicObject = serde_json::from_value(object)?;
        let api = self.api("vmbackup")?;
        self.ask(async || api.create(&PostParams::default(), &object).await).map(drop)
    }

    /// Patches `spec.state`.
    pub fn state(&self, kind: &str, name: &str, state: &str) -> Result<()> {
        let patch = Patch::Merge(json!({"spec": {"state": state}}));
        let api = self.api(kind)?;
        self.ask(async || api.patch(name, &PatchParams::default(), &patch).await).map(drop)
    }

    /// Deletes an object; one that is gone is deleted.
    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        let api = self.api(kind)?;
        self.ask(async || match api.delete(name, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            other => other.map(drop),
        })
    }
}
