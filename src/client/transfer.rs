//! ImageTransfers shown, paused, resumed, cancelled and given more time: what `kubectl patch` does, and the wait until it
//! holds. It makes none, and prints a ticket only where that was asked for.

use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use super::backup::Session;
use super::exit::Failure;
use super::kubernetes::{CLIENT, because, unless};
use super::output::Output;
use super::transfer_line::Transfer;
use super::transfer_state::{all_of, extended, one, reached, steps, ticket};
use crate::api::{ImageTransfer, TransferState};

/// Time for the node's agent to do as the spec says.
const OBEYED: Duration = Duration::from_secs(120);
/// What a name that is not there calls for.
const HINT: &str = "list the transfers with virtmark transfer show, or give -n NAMESPACE";

impl Session {
    /// The text of `transfer`, once it is done.
    ///
    /// # Errors
    /// The API server's, when there is no such transfer, and when it ended already.
    pub async fn transfer(&self, wanted: Transfer) -> Result<String, Failure> {
        match wanted {
            Transfer::Show { name: Some(name), ticket: true, output } => self.ticket(&name, output).await,
            Transfer::Show { name: Some(name), output, .. } => {
                Ok(one(&self.found(&name).await?).text(output))
            }
            Transfer::Show { name: None, output, .. } => {
                let api = self.cluster.of::<ImageTransfer>();
                let all = async { Ok(api.list(&ListParams::default()).await?.items) };
                Ok(all_of(&unless(&self.stop, all).await?).text(output))
            }
            Transfer::Pause { name } => self.set(&name, TransferState::Paused).await,
            Transfer::Resume { name } => self.set(&name, TransferState::Running).await,
            Transfer::Cancel { name } => self.set(&name, TransferState::Cancelled).await,
            Transfer::Extend { name, seconds } => {
                let found = self.found(&name).await?;
                extended(&found, seconds)?;
                self.patch(&name, &json!({"inactivityTimeoutSeconds": seconds})).await?;
                Ok(format!("{name}\n"))
            }
        }
    }

    async fn found(&self, name: &str) -> Result<ImageTransfer, Failure> {
        unless(&self.stop, self.cluster.get(name, HINT)).await
    }

    async fn set(&self, name: &str, state: TransferState) -> Result<String, Failure> {
        let mut found = self.found(name).await?;
        for state in steps(&found, state)? {
            found = self.patch(name, &json!({"state": state})).await?;
        }
        let holds = |object: Option<&ImageTransfer>| match object {
            Some(object) => reached(object, found.metadata.generation, state),
            // its backup was deleted meanwhile
            None if state == TransferState::Cancelled => Ok(Some(())),
            None => Err(Failure::NotFound(format!("ImageTransfer {name} is gone: somebody deleted it"))),
        };
        unless(&self.stop, self.cluster.until(name, OBEYED, holds)).await?;
        Ok(format!("{name}\n"))
    }

    async fn patch(&self, name: &str, spec: &Value) -> Result<ImageTransfer, Failure> {
        let params = PatchParams { field_manager: Some(CLIENT.to_owned()), ..PatchParams::default() };
        let api = self.cluster.of::<ImageTransfer>();
        Ok(api.patch(name, &params, &Patch::Merge(json!({"spec": spec}))).await?)
    }

    async fn ticket(&self, name: &str, output: Output) -> Result<String, Failure> {
        let found = self.found(name).await?;
        let status = found.status.clone().unwrap_or_default();
        if status.phase.is_terminal() {
            return Err(because("ImageTransfer", name, &status.conditions));
        }
        let Some(secret) = status.ticket_secret else {
            let words = format!("ImageTransfer {name} is {} and has no ticket", status.phase.as_str());
            return Err(Failure::NotFound(words));
        };
        let secret: Secret = unless(&self.stop, self.cluster.get(&secret, "the transfer has ended")).await?;
        Ok(ticket(name, &secret).text(output))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::sync::{Arc, Mutex};
    use std::task::{Context, Poll};

    use http_body_util::BodyExt as _;
    use hyper::{Method, Request, Response, StatusCode};
    use kube::client::Body;
    use tokio_util::sync::CancellationToken;

    use super::super::kubernetes::Cluster;
    use super::super::screen::Screen;
    use super::*;

    /// An API server with one transfer, whose agent does at once as the spec says.
    #[derive(Clone)]
    struct Fake(Arc<Mutex<(Value, Vec<Value>)>>);

    impl Fake {
        fn new(spec: &Value, phase: &str) -> Self {
            let mut all = json!({"backup": "b", "disk": "vda"});
            for (key, value) in spec.as_object().into_iter().flatten() {
                all[key] = value.clone();
            }
            let object = json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "ImageTransfer",
                "metadata": {"name": "t", "namespace": "vms", "generation": 1, "resourceVersion": "1"}, "spec": all,
                "status": {"phase": phase, "observedGeneration": 1, "ticketSecret": "ticket-1"}});
            Self(Arc::new(Mutex::new((object, Vec::new()))))
        }

        fn session(&self) -> Session {
            let cluster = Cluster::with(kube::Client::new(self.clone(), "vms"), "vms");
            Session { cluster, screen: Screen::new(true), stop: CancellationToken::new() }
        }

        fn patches(&self) -> Vec<Value> {
            self.0.lock().unwrap().1.clone()
        }

        fn answer(&self, method: &Method, path: &str, body: &[u8]) -> Value {
            let mut held = self.0.lock().unwrap();
            let (object, patches) = &mut *held;
            if *method == Method::PATCH {
                let patch: Value = serde_json::from_slice(body).unwrap();
                for (key, value) in patch["spec"].as_object().unwrap() {
                    object["spec"][key] = value.clone();
                }
                let generation = object["metadata"]["generation"].as_i64().unwrap() + 1;
                object["metadata"]["generation"] = generation.into();
                object["status"]["observedGeneration"] = generation.into();
                object["status"]["phase"] = match object["spec"]["state"].as_str() {
                    Some("Paused") => "Paused",
                    Some("Cancelled") => "Cancelled",
                    _ => "Ready",
                }
                .into();
                patches.push(patch);
            }
            match path.rsplit('/').next().unwrap() {
                "t" => object.clone(),
                "ticket-1" => json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ticket-1"},
                    "data": {"url": "aHR0cHM6Ly9uL3NlY3JldA=="}}),
                "imagetransfers" => {
                    json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": "ImageTransferList",
                    "metadata": {"resourceVersion": "1"}, "items": [object]})
                }
                _ => json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "message": "not found", "reason": "NotFound", "code": 404}),
            }
        }
    }

    impl tower_service::Service<Request<Body>> for Fake {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<Body>) -> Self::Future {
            let fake = self.clone();
            Box::pin(async move {
                let (parts, body) = request.into_parts();
                let body = body.collect().await.unwrap().to_bytes();
                let answer = fake.answer(&parts.method, parts.uri.path(), &body);
                let code = answer["code"].as_u64().map_or(200, |code| u16::try_from(code).unwrap());
                let status = StatusCode::from_u16(code).unwrap();
                let body = Body::from(answer.to_string().into_bytes());
                Ok(Response::builder().status(status).body(body).unwrap())
            })
        }
    }

    #[tokio::test]
    async fn what_is_patched_and_waited_for() {
        let name = || "t".to_owned();
        let state = |state: &str| json!({"spec": {"state": state}});
        let bound = json!({"inactivityTimeoutSeconds": 60});
        for (phase, wanted, patches) in [
            ("Ready", Transfer::Pause { name: name() }, vec![state("Paused")]),
            ("Paused", Transfer::Resume { name: name() }, vec![state("Paused"), state("Running")]),
            ("Ready", Transfer::Cancel { name: name() }, vec![state("Cancelled")]),
            ("Cancelled", Transfer::Cancel { name: name() }, vec![]),
            (
                "Ready",
                Transfer::Extend { name: name(), seconds: 90 },
                vec![json!({"spec": {"inactivityTimeoutSeconds": 90}})],
            ),
        ] {
            let fake = Fake::new(&bound, phase);
            assert_eq!(fake.session().transfer(wanted).await.unwrap(), "t\n");
            assert_eq!(fake.patches(), patches);
        }
        let fake = Fake::new(&bound, "Ready");
        for refused in
            [Transfer::Pause { name: "other".to_owned() }, Transfer::Extend { name: name(), seconds: 60 }]
        {
            assert!(fake.session().transfer(refused).await.is_err());
        }
        assert!(fake.patches().is_empty());
    }

    #[tokio::test]
    async fn a_ticket_is_printed_only_where_it_was_asked_for() {
        let session = Fake::new(&json!({}), "Ready").session();
        for output in [Output::Table, Output::Wide, Output::Json, Output::Yaml, Output::Name] {
            for (name, ticket) in [(None, false), (Some("t".to_owned()), false), (Some("t".to_owned()), true)]
            {
                let told = session.transfer(Transfer::Show { name, ticket, output }).await.unwrap();
                assert_eq!(
                    told.contains("https://n/secret"),
                    ticket && output != Output::Name,
                    "{output:?}: {told}"
                );
            }
        }
    }
}
