//! Signs the certificates of agents: what they ask for as CertificateSigningRequests, with a CA of its own.
//!
//! ```text
//!   request --decide--> Denied, with a reason
//!                  \--> Approved --authorities: signer--> status.certificate
//!   Secret virtmark-ca <--authorities: turn--> ConfigMap virtmark-ca, which agents read
//! ```
//!
//! It touches no request of another signer. One that somebody else approved is signed only if it fits.

pub mod authorities;
pub mod decide;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestStatus,
};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::PostParams;
use kube::runtime::controller::Action as Requeue;
use kube::{Api, ResourceExt as _};

use self::authorities::{Authorities, Turn};
use self::decide::{Decision, decide, node_of};
use super::{Context, OperatorError};
use crate::access;
use crate::api::{self, AUTHORITY};
use crate::clock;
use crate::x509::{Authority, Request, succession};

/// How soon to look again at a request whose node is not known yet.
const AGAIN: Duration = Duration::from_secs(2);

/// How often the CA is looked at.
const LOOK: Duration = Duration::from_secs(30);

const APPROVED: &str = "Approved";
const DENIED: &str = "Denied";
const FAILED: &str = "Failed";

/// Brings one request to its end.
///
/// # Errors
/// What could not be asked, signed or written; the caller tries again.
pub async fn reconcile(
    request: Arc<CertificateSigningRequest>,
    context: Arc<Context>,
) -> Result<Requeue, OperatorError> {
    if is_over(&request) {
        return Ok(Requeue::await_change());
    }
    let node = match node_of(&request) {
        Some(name) => Api::<Node>::all(context.client.clone()).get_opt(name).await?,
        None => None,
    };
    let agent = access::agent_user(&context.system_namespace);
    match decide(&request, &agent, node.as_ref(), clock::now()) {
        Decision::Ignore => {}
        Decision::Wait => return Ok(Requeue::requeue(AGAIN)),
        Decision::Deny(refusal, words) => {
            let user = request.spec.username.as_deref().unwrap_or_default();
            tracing::warn!(request = request.name_any(), user, %refusal, words, "a certificate request is refused");
            refuse(&request, &refusal.to_string(), &words, &context).await?;
        }
        Decision::Approve(fits) => sign(&request, &fits, &context).await?,
    }
    context.failures.clear(&*request);
    Ok(Requeue::await_change())
}

/// Whether it has a condition of this type.
fn has(request: &CertificateSigningRequest, type_: &str) -> bool {
    let conditions = request.status.as_ref().and_then(|status| status.conditions.as_deref());
    conditions.unwrap_or_default().iter().any(|condition| condition.type_ == type_)
}

/// Whether it was refused or has its certificate.
fn is_over(request: &CertificateSigningRequest) -> bool {
    let issued = request.status.as_ref().is_some_and(|status| status.certificate.is_some());
    issued || has(request, DENIED) || has(request, FAILED)
}

/// With one more condition.
fn with(
    request: &CertificateSigningRequest,
    type_: &str,
    reason: &str,
    words: &str,
) -> CertificateSigningRequest {
    let mut request = request.clone();
    request.metadata.managed_fields = None;
    let now = Time(clock::now());
    let status = request.status.get_or_insert_with(CertificateSigningRequestStatus::default);
    status.conditions.get_or_insert_default().push(CertificateSigningRequestCondition {
        type_: type_.to_owned(),
        status: "True".to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(words.to_owned()),
        last_update_time: Some(now.clone()),
        last_transition_time: Some(now),
    });
    request
}

fn params() -> PostParams {
    PostParams { field_manager: Some(api::OPERATOR.to_owned()), ..PostParams::default() }
}

/// Says why nothing is signed. What somebody else approved can only fail.
async fn refuse(
    request: &CertificateSigningRequest,
    reason: &str,
    words: &str,
    context: &Context,
) -> Result<(), OperatorError> {
    let api = Api::<CertificateSigningRequest>::all(context.client.clone());
    let name = request.name_any();
    if has(request, APPROVED) {
        api.replace_status(&name, &params(), &with(request, FAILED, reason, words)).await?;
    } else {
        let denied = with(request, DENIED, reason, words);
        api.replace_subresource("approval", &name, &params(), &denied).await?;
    }
    Ok(())
}

/// Approves it, unless that was done, and puts the certificate into its status.
async fn sign(
    request: &CertificateSigningRequest,
    fits: &Request,
    context: &Context,
) -> Result<(), OperatorError> {
    let api = Api::<CertificateSigningRequest>::all(context.client.clone());
    let name = request.name_any();
    // whoever gets the certificate can know whom to trust
    let authorities = publish(context).await?;
    let mut approved = if has(request, APPROVED) {
        request.clone()
    } else {
        let words = "the names and addresses are the node's, and its agent asks for them";
        let approved = with(request, APPROVED, "Fits", words);
        api.replace_subresource("approval", &name, &params(), &approved).await?
    };
    let now = clock::now();
    let life = succession::leaf_life(request.spec.expiration_seconds);
    let signed = authorities.signer(now).sign(&fits.key, &fits.names, &fits.addresses, now, life)?;
    approved.metadata.managed_fields = None;
    approved.status.get_or_insert_with(CertificateSigningRequestStatus::default).certificate =
        Some(ByteString(signed.into_bytes()));
    api.replace_status(&name, &params(), &approved).await?;
    let node = node_of(request).unwrap_or_default();
    tracing::info!(request = name, node, "an agent's certificate was signed");
    Ok(())
}

/// Brings the CAs to what they are to be now, and publishes whom to trust.
///
/// # Errors
/// What could not be read or written: a conflict when another operator was at it.
async fn publish(context: &Context) -> Result<Authorities, OperatorError> {
    let _alone = context.publishing.lock().await;
    let maps = Api::<ConfigMap>::namespaced(context.client.clone(), &context.system_namespace);
    let secrets = Api::<Secret>::namespaced(context.client.clone(), &context.system_namespace);
    // before the Secret: what is published from an older one than this meets a conflict
    let map = maps.get_opt(AUTHORITY).await?;
    let secret = secrets.get_opt(AUTHORITY).await?;
    let kept = secret.as_ref().map(Authorities::read).transpose().map_err(OperatorError::Authority)?;
    let now = clock::now();
    let wanted = match &kept {
        None => Authorities::first(Authority::make(now)?),
        Some(kept) if kept.turn(now) == Turn::Rotate => kept.clone().followed_by(Authority::make(now)?, now),
        Some(kept) => kept.clone().tidied(now),
    };
    if kept.as_ref() != Some(&wanted) {
        let mut new = wanted.secret();
        match secret {
            None => drop(secrets.create(&params(), &new).await?),
            Some(old) => {
                new.metadata = old.metadata;
                new.metadata.managed_fields = None;
                secrets.replace(AUTHORITY, &params(), &new).await?;
            }
        }
        tracing::info!(
            cas = crate::x509::certificate::each(&wanted.bundle()).len(),
            "the agents' CA is another one"
        );
    }
    let mut published = wanted.published();
    match map {
        None => drop(maps.create(&params(), &published).await?),
        Some(old) if old.data != published.data => {
            published.metadata = old.metadata;
            published.metadata.managed_fields = None;
            maps.replace(AUTHORITY, &params(), &published).await?;
        }
        Some(_) => {}
    }
    Ok(wanted)
}

/// Looks after the CAs, for ever.
pub(super) async fn follow(context: &Context) {
    let mut told = String::new();
    loop {
        match publish(context).await {
            Ok(_) => told.clear(),
            Err(error) if error.is_conflict() => continue,
            Err(error) => {
                let words = error.to_string();
                if words != told {
                    tracing::error!(error = words, "the agents' CA cannot be kept: no certificate is signed");
                    told = words;
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}
