//! Virtmark's objects as its users see them, without a kubectl for each look: many VMs are looked at at once.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use futures::StreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Event, Secret};
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::watch_object;
use kube::{Api, Client, Resource};
use serde_json::{Value, json};
use virtmark::api::{ImageTransfer, LibvirtDomain, VmBackup, VmCheckpoint};
use virtmark_bed::Bed;
use virtmark_bed::component::{SYSTEM_NAMESPACE, VM_NAMESPACE};

use super::Ticket;

/// Longer than a kill of both processes takes to be got over on a loaded machine.
const BOUND: Duration = Duration::from_secs(90);

/// The kind that kubectl knows by this name, of those that tests wait for.
pub fn resource(kind: &str) -> Option<ApiResource> {
    Some(match kind {
        "vmbackup" | "vmbackups" => ApiResource::erase::<VmBackup>(&()),
        "vmcheckpoint" | "vmcheckpoints" | "vmcp" => ApiResource::erase::<VmCheckpoint>(&()),
        "imagetransfer" | "imagetransfers" => ApiResource::erase::<ImageTransfer>(&()),
        "lvd" => ApiResource::erase::<LibvirtDomain>(&()),
        "secret" | "secrets" => ApiResource::erase::<Secret>(&()),
        "events" => ApiResource::erase::<Event>(&()),
        _ => return None,
    })
}

/// The API server, as the administrator.
pub struct Objects {
    runtime: tokio::runtime::Runtime,
    client: Client,
    patience: Duration,
}

impl Objects {
    pub fn of(bed: &Bed) -> Result<Self> {
        virtmark::telemetry::install_crypto();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let client = runtime.block_on(virtmark::cluster::connect(Some(&bed.plane.kubeconfig)))?;
        Ok(Self { runtime, client, patience: Duration::ZERO })
    }

    /// For tests that take the API server away: it is asked again for so long until it answers.
    pub fn patient(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    fn ask<T>(&self, mut ask: impl AsyncFnMut() -> Result<T, kube::Error>) -> Result<T, kube::Error> {
        let began = Instant::now();
        loop {
            let answer = self.runtime.block_on(ask());
            let is_word = match &answer {
                Ok(_) => true,
                Err(kube::Error::Api(status)) => status.code < 500,
                Err(_) => false,
            };
            if is_word || began.elapsed() >= self.patience {
                return answer;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn api(&self, resource: &ApiResource) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), VM_NAMESPACE, resource)
    }

    /// An object, or null.
    pub fn get<K: Resource<DynamicType = ()>>(&self, name: &str) -> Result<Value> {
        self.find(&ApiResource::erase::<K>(&()), name)
    }

    /// An object, or null, of a kind that is named at run time.
    pub fn find(&self, resource: &ApiResource, name: &str) -> Result<Value> {
        let api = self.api(resource);
        let found = self.ask(async || api.get_opt(name).await)?;
        Ok(found.map(serde_json::to_value).transpose()?.unwrap_or_default())
    }

    /// All objects of a kind.
    pub fn list<K: Resource<DynamicType = ()>>(&self) -> Result<Vec<Value>> {
        self.select(&ApiResource::erase::<K>(&()), "")
    }

    /// The objects with these labels, of a kind that is named at run time.
    pub fn select(&self, resource: &ApiResource, labels: &str) -> Result<Vec<Value>> {
        let api = self.api(resource);
        let found = self.ask(async || api.list(&ListParams::default().labels(labels)).await)?;
        Ok(found.items.into_iter().map(serde_json::to_value).collect::<Result<_, _>>()?)
    }

    pub fn create<K: Resource<DynamicType = ()>>(
        &self,
        name: &str,
        labels: &Value,
        spec: &Value,
    ) -> Result<Value> {
        let metadata = json!({"name": name, "labels": labels});
        self.make(&ApiResource::erase::<K>(&()), metadata, spec)
    }

    /// Makes an object of a kind that is named at run time. As with kubectl, a field that it has not is refused.
    pub fn make(&self, resource: &ApiResource, metadata: Value, spec: &Value) -> Result<Value> {
        let object = json!({"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata,
            "spec": spec});
        let path = DynamicObject::url_path(resource, Some(VM_NAMESPACE));
        let request = || {
            let request =
                hyper::Request::post(format!("{path}?fieldValidation=Strict&fieldManager=kubectl-create"));
            request.header("content-type", "application/json").body(object.to_string().into_bytes())
        };
        Ok(self.ask(async || self.client.request(request().map_err(kube::Error::HttpError)?).await)?)
    }

    /// Sets `spec.state`.
    pub fn state<K: Resource<DynamicType = ()>>(&self, name: &str, state: &str) -> Result<()> {
        self.patch(&ApiResource::erase::<K>(&()), name, &json!({"spec": {"state": state}}))
    }

    /// Merges into an object of a kind that is named at run time, by the name that kubectl goes by: Flux takes over what is its.
    pub fn patch(&self, resource: &ApiResource, name: &str, patch: &Value) -> Result<()> {
        let api = self.api(resource);
        let params =
            PatchParams { field_manager: Some("kubectl-patch".to_owned()), ..PatchParams::default() };
        let params = params.validation_strict();
        self.ask(async || api.patch(name, &params, &Patch::Merge(patch)).await)?;
        Ok(())
    }

    /// Who leads of the operators.
    pub fn leader(&self) -> Result<Option<String>> {
        let leases = Api::<Lease>::namespaced(self.client.clone(), SYSTEM_NAMESPACE);
        let lease = self.ask(async || leases.get_opt("virtmark-operator").await)?;
        Ok(lease.and_then(|lease| lease.spec?.holder_identity))
    }

    /// Has an object deleted, and does not wait for it.
    pub fn delete<K: Resource<DynamicType = ()>>(&self, name: &str) -> Result<()> {
        self.remove(&ApiResource::erase::<K>(&()), name).map(drop)
    }

    /// The same, of a kind that is named at run time; answers whether there was one.
    pub fn remove(&self, resource: &ApiResource, name: &str) -> Result<bool> {
        let api = self.api(resource);
        match self.ask(async || api.delete(name, &DeleteParams::default()).await) {
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(false),
            other => Ok(other.map(|_| true)?),
        }
    }

    /// Waits until an object is gone.
    pub fn gone<K: Resource<DynamicType = ()>>(&self, name: &str) -> Result<()> {
        self.until::<K>(name, "be gone", Value::is_null).map(drop)
    }

    /// Waits until something holds of an object, or of null when it is gone; answers it.
    pub fn until<K: Resource<DynamicType = ()>>(
        &self,
        name: &str,
        what: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        self.until_within::<K>(BOUND, name, what, holds)
    }

    /// The same with a bound of its own.
    pub fn until_within<K: Resource<DynamicType = ()>>(
        &self,
        bound: Duration,
        name: &str,
        what: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        self.wait(&ApiResource::erase::<K>(&()), bound, name, what, |object| Ok(holds(object)))
    }

    /// The same of a kind that is named at run time; what it comes to may be an error. The object is watched, not asked for
    /// again and again: that was most of what the tests cost the API server.
    pub fn wait(
        &self,
        resource: &ApiResource,
        bound: Duration,
        name: &str,
        what: &str,
        mut holds: impl FnMut(&Value) -> Result<bool>,
    ) -> Result<Value> {
        let mut last = self.find(resource, name)?;
        if holds(&last)? {
            return Ok(last);
        }
        let mut seen = Box::pin(watch_object(self.api(resource), name).default_backoff());
        let held = async {
            while let Some(seen) = seen.next().await {
                // while the API server is away it is watched again
                if let Ok(object) = seen {
                    last = serde_json::to_value(object)?;
                    if holds(&last)? {
                        return Ok(());
                    }
                }
            }
            Err(anyhow!("nobody watches {name} any more"))
        };
        match self.runtime.block_on(async { tokio::time::timeout(bound, held).await }) {
            Ok(held) => held.map(|()| last),
            Err(_) => {
                let kind = &resource.kind;
                Err(anyhow!("waited {} s in vain for {kind} {name} to {what}: {last}", bound.as_secs()))
            }
        }
    }

    /// What a client needs of a transfer, once that is Ready. The CA is stored in `files`.
    pub fn ticket(&self, transfer: &str, files: &Path) -> Result<Ticket> {
        let found = self.until::<ImageTransfer>(transfer, "be Ready", |object| {
            ["Ready", "Failed", "Cancelled", "Succeeded"]
                .contains(&object["status"]["phase"].as_str().unwrap_or_default())
        })?;
        let status = &found["status"];
        anyhow::ensure!(status["phase"] == "Ready", "{transfer}: {status}");
        self.secret(status["ticketSecret"].as_str().context("no ticketSecret")?, files)
    }

    /// What a client finds in a ticket's Secret. The CA is stored in `files`.
    pub fn secret(&self, secret: &str, files: &Path) -> Result<Ticket> {
        let api = Api::<Secret>::namespaced(self.client.clone(), VM_NAMESPACE);
        let found = self.ask(async || api.get(secret).await)?;
        let data = found.data.unwrap_or_default();
        let text = |key: &str| -> Result<String> {
            let bytes = data.get(key).with_context(|| format!("the Secret has no {key}"))?;
            Ok(String::from_utf8(bytes.0.clone())?)
        };
        let ca = files.join(format!("{secret}.pem"));
        std::fs::write(&ca, text("ca.crt")?)?;
        Ok(Ticket {
            url: text("url")?,
            unix_socket: text("unixSocket")?.into(),
            ca,
            secret: secret.to_owned(),
        })
    }
}
