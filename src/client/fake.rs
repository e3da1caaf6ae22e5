//! An API server in memory, for tests: VmBackups and what else is put there, and what becomes of a request as each test has it.
//! It admits everything, and knows nobody.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt as _};
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tower_service::Service;

use super::kubernetes::Cluster;

/// What became of a request that changes something, before its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was done, and is answered.
    Comes,
    /// It was done, and the answer is lost.
    IsLost,
    /// It was refused with this code, and nothing was done.
    Refused(u16),
}

/// What a test makes of a changed object: it is told the wish, and may change the object too, or have it vanish.
type React = Box<dyn FnMut(&str, &mut Option<Value>) -> Answer + Send>;

/// What is there, by plural and name.
#[derive(Clone)]
pub struct Fake(Arc<Mutex<Inside>>);

struct Inside {
    objects: BTreeMap<String, Value>,
    gone: BTreeMap<String, Value>,
    react: React,
    asked: Vec<String>,
}

impl Fake {
    pub fn new(react: impl FnMut(&str, &mut Option<Value>) -> Answer + Send + 'static) -> Self {
        let (objects, gone, asked) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        Self(Arc::new(Mutex::new(Inside { objects, gone, react: Box::new(react), asked })))
    }

    /// Puts an object there.
    pub fn put(&self, plural: &str, object: impl serde::Serialize) {
        let object = serde_json::to_value(object).unwrap();
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        self.0.lock().unwrap().objects.insert(format!("{plural}/{name}"), object);
    }

    /// The wishes that were heard, in order.
    pub fn asked(&self) -> Vec<String> {
        self.0.lock().unwrap().asked.clone()
    }

    pub fn cluster(&self) -> Cluster {
        Cluster::over(Client::new(self.clone(), "vms"), "vms")
    }
}

impl Inside {
    /// Answers a request; `None` when the answer is lost.
    fn answer(&mut self, method: &Method, path: &str, query: &str, body: &Value) -> Option<(u16, Value)> {
        let rest = path.rsplit("/namespaces/vms/").next().unwrap().to_owned();
        let (plural, name) = rest.split_once('/').unwrap_or((&rest, ""));
        if *method == Method::GET && !name.is_empty() {
            return Some(self.objects.get(&rest).map_or_else(|| status(404), |found| (200, found.clone())));
        }
        if *method == Method::GET {
            let name = query.split("metadata.name%3D").nth(1).unwrap_or_default();
            let key = format!("{plural}/{}", name.split('&').next().unwrap());
            let found = self.objects.get(&key);
            if !query.contains("watch=true") {
                let items: Vec<_> = found.into_iter().collect();
                let list = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "List",
                    "metadata": {"resourceVersion": "1"}, "items": items});
                return Some((200, list));
            }
            let event = match (found, self.gone.get(&key)) {
                (Some(found), _) => json!({"type": "MODIFIED", "object": found}),
                (None, Some(gone)) => json!({"type": "DELETED", "object": gone}),
                (None, None) => Value::Null,
            };
            return Some((200, event));
        }
        let is_new = *method == Method::POST;
        let name = if is_new { body["metadata"]["name"].as_str().unwrap() } else { name };
        let key = format!("{plural}/{name}");
        let mut object = self.objects.get(&key).cloned();
        let wish = if is_new { "make" } else { body["spec"]["state"].as_str().unwrap() };
        self.asked.push(wish.to_owned());
        match &mut object {
            Some(_) if is_new => return Some(status(409)),
            None if !is_new => return Some(status(404)),
            Some(found) => {
                let uid = &body["metadata"]["uid"];
                if !uid.is_null() && *uid != found["metadata"]["uid"] {
                    return Some(status(409));
                }
                found["spec"]["state"] = body["spec"]["state"].clone();
            }
            none => {
                let mut made = body.clone();
                made["metadata"]["uid"] = json!("made");
                *none = Some(made);
            }
        }
        let before = object.clone();
        let answer = (self.react)(wish, &mut object);
        if let Answer::Refused(code) = answer {
            return Some(status(code));
        }
        let told = object.clone().or(before).unwrap_or_default();
        match object {
            Some(object) => drop(self.objects.insert(key, object)),
            None => {
                self.gone.extend(self.objects.remove(&key).map(|gone| (key, gone)));
            }
        }
        (answer == Answer::Comes).then_some((200, told))
    }
}

fn status(code: u16) -> (u16, Value) {
    let reason = match code {
        404 => "NotFound",
        409 => "AlreadyExists",
        _ => "Other",
    };
    let words = json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code,
        "reason": reason, "message": reason, "metadata": {}});
    (code, words)
}

impl Service<Request<Body>> for Fake {
    type Response = Response<Full<Bytes>>;
    type Error = std::io::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let inside = Arc::clone(&self.0);
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
            let body = serde_json::from_slice(&body).unwrap_or_default();
            let query = head.uri.query().unwrap_or_default();
            if query.contains("watch=true") {
                // a watch that ends is begun again
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let answer = inside.lock().unwrap().answer(&head.method, head.uri.path(), query, &body);
            let (code, value) = answer.ok_or_else(|| std::io::Error::other("the connection broke"))?;
            let text = if value.is_null() { String::new() } else { format!("{value}\n") };
            Response::builder().status(code).body(Full::new(Bytes::from(text))).map_err(std::io::Error::other)
        }
        .boxed()
    }
}
