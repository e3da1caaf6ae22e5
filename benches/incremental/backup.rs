//! One incremental backup as a backup product takes it: objects by the API, bytes by the unix socket, each step timed.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{HOST, RANGE};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use virtmark::api::{BackupType, ImageTransfer, VmBackup, VmCheckpoint};
use virtmark_bed::component::VM_NAMESPACE;

/// Time for anything to happen.
const BOUND: Duration = Duration::from_secs(60);

/// Seconds of each step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Steps {
    /// From the creation of the VmBackup until it is seen Ready.
    pub(crate) ready: f64,
    /// From there until the ImageTransfer is seen Ready and its Secret is read.
    pub(crate) ticket: f64,
    /// The list of extents, and the bytes.
    pub(crate) read: f64,
    /// From the finalize until the VmBackup is seen Succeeded.
    pub(crate) finalize: f64,
    /// Bytes that were read.
    pub(crate) bytes: u64,
}

impl Steps {
    pub(crate) fn total(&self) -> f64 {
        self.ready + self.ticket + self.read + self.finalize
    }
}

/// A backup product. It watches what it drives, all the time.
pub(crate) struct Product {
    client: Client,
    backups: Mutex<Watched>,
    transfers: Mutex<Watched>,
}

/// Objects of a kind as they change.
type Watched = UnboundedReceiver<DynamicObject>;

impl Product {
    /// To be called in a runtime.
    pub(crate) fn new(client: Client) -> Product {
        let (backups, transfers) = (watch::<VmBackup>(&client), watch::<ImageTransfer>(&client));
        Product { client, backups: Mutex::new(backups), transfers: Mutex::new(transfers) }
    }

    /// Backs up disk `vda` of a VM, and keeps `most` checkpoints.
    pub(crate) async fn backup(&self, vm: &str, name: &str, kind: BackupType, most: usize) -> Result<Steps> {
        let (backups, transfer) = (api::<VmBackup>(&self.client), format!("{name}-vda"));
        let (mut watched, mut moved) = (self.backups.lock().await, self.transfers.lock().await);
        let spec = json!({"vm": vm, "type": kind, "maxCheckpoints": most, "onInvalidCheckpoint": "Fail"});
        let object = json!({"apiVersion": VmBackup::api_version(&()), "kind": VmBackup::kind(&()),
            "metadata": {"name": name, "namespace": VM_NAMESPACE}, "spec": spec});
        let object = serde_json::from_value(object)?;

        let begun = Instant::now();
        backups.create(&PostParams::default(), &object).await?;
        phase(&mut watched, name, "Ready").await?;
        let ready = begun.elapsed();
        let status = phase(&mut moved, &transfer, "Ready").await?;
        let secret = status["ticketSecret"].as_str().context("no ticketSecret")?;
        let ticket = Ticket::read(&self.client, secret).await?;
        let ticketed = begun.elapsed();
        let bytes = read(&ticket, kind).await?;
        let read = begun.elapsed();
        let patch = Patch::Merge(json!({"spec": {"state": "Finalized"}}));
        backups.patch(name, &PatchParams::default(), &patch).await?;
        phase(&mut watched, name, "Succeeded").await?;
        let finalized = begun.elapsed();

        let seconds = |to: Duration, from: Duration| (to - from).as_secs_f64();
        Ok(Steps {
            ready: ready.as_secs_f64(),
            ticket: seconds(ticketed, ready),
            read: seconds(read, ticketed),
            finalize: seconds(finalized, read),
            bytes,
        })
    }

    /// Waits until what a backup set off is over, and removes the object: the next one finds what this one found.
    pub(crate) async fn settle(&self, vm: &str, name: &str, most: usize) -> Result<()> {
        let (checkpoints, backups) = (api::<VmCheckpoint>(&self.client), api::<VmBackup>(&self.client));
        let of_vm = ListParams::default().fields(&format!("spec.vm={vm}"));
        until("the checkpoints to be as many as are kept", async || {
            let found = checkpoints.list(&of_vm).await?.items;
            let usable = |object: &DynamicObject| object.data["status"]["phase"] == "Ready";
            Ok((found.len() <= most && found.iter().all(usable)).then_some(()))
        })
        .await?;
        backups.delete(name, &DeleteParams::default()).await?;
        until("the VmBackup to go", async || Ok(backups.get_opt(name).await?.is_none().then_some(()))).await
    }
}

fn api<K: Resource<DynamicType = ()>>(client: &Client) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), VM_NAMESPACE, &ApiResource::erase::<K>(&()))
}

fn watch<K: Resource<DynamicType = ()>>(client: &Client) -> Watched {
    let (sender, watched) = unbounded_channel();
    let events = watcher(api::<K>(client), watcher::Config::default()).applied_objects();
    tokio::spawn(events.for_each(move |event| {
        // a watch that breaks is made again; nobody may listen any more
        if let Ok(object) = event {
            let _ = sender.send(object);
        }
        std::future::ready(())
    }));
    watched
}

/// Waits for a phase; answers the status.
async fn phase(watched: &mut Watched, name: &str, phase: &str) -> Result<Value> {
    let wait = async {
        loop {
            let object = watched.recv().await.context("the watch ended")?;
            if object.metadata.name.as_deref() != Some(name) {
                continue;
            }
            let now = object.data["status"]["phase"].as_str().unwrap_or_default();
            if now == phase {
                return Ok(object.data["status"].clone());
            }
            ensure!(!["Succeeded", "Failed", "Cancelled"].contains(&now), "{now}: {}", object.data["status"]);
        }
    };
    tokio::time::timeout(BOUND, wait).await.with_context(|| format!("waiting for phase {phase}"))?
}

/// Asks until there is an answer.
pub(crate) async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let ask = async {
        loop {
            if let Some(answer) = ask().await? {
                return Ok(answer);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(4 * BOUND, ask).await.with_context(|| format!("waiting for {what}"))?
}

/// What a client finds in a ticket's Secret.
struct Ticket {
    path: String,
    socket: String,
}

impl Ticket {
    async fn read(client: &Client, secret: &str) -> Result<Ticket> {
        let data = Api::<Secret>::namespaced(client.clone(), VM_NAMESPACE).get(secret).await?.data;
        let data = data.context("an empty Secret")?;
        let text = |key: &str| -> Result<String> {
            Ok(String::from_utf8(data.get(key).with_context(|| format!("no {key}"))?.0.clone())?)
        };
        let url: hyper::Uri = text("url")?.parse()?;
        Ok(Ticket { path: url.path().to_owned(), socket: text("unixSocket")? })
    }
}

/// Reads what must be read, over one connection to the unix socket. Answers how many bytes that was.
async fn read(ticket: &Ticket, kind: BackupType) -> Result<u64> {
    let stream = TokioIo::new(UnixStream::connect(&ticket.socket).await?);
    let (mut sender, connection) = handshake(stream).await?;
    let connection = tokio::spawn(connection);
    let incremental = kind == BackupType::Incremental;
    let context = if incremental { "dirty" } else { "zero" };
    let extents = get(&mut sender, &format!("{}/extents?context={context}", ticket.path), None).await?;
    let extents: Vec<Value> = serde_json::from_slice(&extents)?;
    let mut bytes = 0;
    for extent in extents {
        if extent["zero"] == true || (incremental && extent["dirty"] != true) {
            continue;
        }
        let number = |key: &str| extent[key].as_u64().with_context(|| format!("an extent without {key}"));
        let (start, length) = (number("start")?, number("length")?);
        let body = get(&mut sender, &ticket.path, Some((start, start + length))).await?;
        ensure!(body.len() as u64 == length, "{} bytes for {length} at {start}", body.len());
        bytes += length;
    }
    drop(sender);
    connection.await??;
    Ok(bytes)
}

async fn get(sender: &mut SendRequest<Empty<Bytes>>, path: &str, range: Option<(u64, u64)>) -> Result<Bytes> {
    let mut request = Request::get(path).header(HOST, "localhost");
    if let Some((start, end)) = range {
        request = request.header(RANGE, format!("bytes={start}-{}", end - 1));
    }
    sender.ready().await?;
    let answer = sender.send_request(request.body(Empty::new())?).await?;
    let status = answer.status();
    let body = answer.into_body().collect().await?.to_bytes();
    ensure!(status.is_success(), "HTTP {status}: {}", String::from_utf8_lossy(&body));
    Ok(body)
}
