//! Counts the requests to the API server, in front of the client that makes them. It changes none.

use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::{BoxFuture, FutureExt as _};
use hyper::http::{Method, Request, Response};
use tower_layer::Layer;
use tower_service::Service;

use super::Metrics;

/// Counts what passes.
#[derive(Clone, Debug)]
pub struct Counting(pub Arc<Metrics>);

impl<S> Layer<S> for Counting {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, metrics: Arc::clone(&self.0) }
    }
}

/// A client whose requests are counted.
#[derive(Clone, Debug)]
pub struct Counted<S> {
    inner: S,
    metrics: Arc<Metrics>,
}

impl<S, B, R> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let query = request.uri().query().unwrap_or_default();
        let (verb, resource) = asked(request.method(), request.uri().path(), query);
        let metrics = Arc::clone(&self.metrics);
        let answer = self.inner.call(request);
        async move {
            let answer = answer.await;
            let code =
                answer.as_ref().map_or("error".to_owned(), |answer| answer.status().as_str().to_owned());
            metrics.requested(verb, &resource, &code);
            answer
        }
        .boxed()
    }
}

/// What a request asks for: the API's verb, and the resource with its subresource. Names of objects and namespaces are left
/// out. Pure.
fn asked(method: &Method, path: &str, query: &str) -> (&'static str, String) {
    let mut parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    // /api/VERSION/..., /apis/GROUP/VERSION/...
    let prefix = if parts.first() == Some(&"apis") { 3 } else { 2 };
    parts.drain(..prefix.min(parts.len()));
    if parts.first() == Some(&"namespaces") && parts.len() > 2 {
        parts.drain(..2);
    }
    let mut parts = parts.into_iter();
    let (resource, name, sub) = (parts.next(), parts.next(), parts.next());
    let is_watch = query.split('&').any(|pair| pair == "watch=true" || pair == "watch=1");
    let verb = match method.as_str() {
        "GET" if is_watch => "watch",
        "GET" if name.is_none() => "list",
        "GET" => "get",
        "POST" => "create",
        "PUT" => "update",
        "PATCH" => "patch",
        "DELETE" => "delete",
        _ => "other",
    };
    let resource = match (resource, sub) {
        (None, _) => "none".to_owned(),
        (Some(resource), None) => resource.to_owned(),
        (Some(resource), Some(sub)) => format!("{resource}/{sub}"),
    };
    (verb, resource)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_known_by_verb_and_resource_and_no_name_is_kept() {
        let ours = "/apis/virtmark.dev/v1alpha1";
        let cases = [
            (Method::GET, format!("{ours}/vmbackups"), "watch=true&limit=1", "watch", "vmbackups"),
            (Method::GET, format!("{ours}/vmbackups"), "fieldSelector=spec.vm%3Da", "list", "vmbackups"),
            (Method::GET, format!("{ours}/namespaces/vms/vmbackups"), "", "list", "vmbackups"),
            (Method::GET, format!("{ours}/namespaces/vms/vmbackups/a"), "", "get", "vmbackups"),
            (
                Method::PUT,
                format!("{ours}/namespaces/vms/vmbackups/a/status"),
                "",
                "update",
                "vmbackups/status",
            ),
            (Method::POST, "/api/v1/namespaces/vms/secrets".to_owned(), "", "create", "secrets"),
            (Method::DELETE, "/api/v1/namespaces/vms/secrets/s".to_owned(), "", "delete", "secrets"),
            (Method::GET, "/api/v1/nodes/n".to_owned(), "", "get", "nodes"),
            (Method::GET, "/api/v1/namespaces/kube-system".to_owned(), "", "get", "namespaces"),
            (
                Method::PATCH,
                "/apis/coordination.k8s.io/v1/namespaces/x/leases/l".to_owned(),
                "",
                "patch",
                "leases",
            ),
            (Method::GET, "/version".to_owned(), "", "list", "none"),
        ];
        for (method, path, query, verb, resource) in cases {
            assert_eq!(asked(&method, &path, query), (verb, resource.to_owned()), "{method} {path}");
        }
    }
}
