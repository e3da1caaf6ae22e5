//! The ticket of an ImageTransfer on this node: made, kept, paused, and told in a Secret.
//!
//! Its id is a bearer secret. It goes into the Secret and the agent's own state directory (0600), and nowhere else: never into
//! status, Events or logs.

use std::collections::BTreeMap;
use std::path::Path;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::ObjectMeta;
use kube::{Api, Resource as _, ResourceExt as _};
use serde::{Deserialize, Serialize};

use super::status::Standing;
use crate::agent::registry::Live;
use crate::agent::state::Record;
use crate::agent::{AgentError, Context};
use crate::api::{self, ImageTransfer, NbdExport, Phase, Protocol};
use crate::cluster;
use crate::imageio::{Access, End, Ticket, TicketId};
use crate::killpoint;
use crate::reason::{Because, Reason};
use crate::step::Step;

/// A ticket, as the state directory keeps it.
#[derive(Clone, Serialize, Deserialize)]
pub struct StoredTicket {
    /// The ticket.
    pub ticket: Ticket,
    /// Which of the transfer's Secrets has it.
    pub secret: u32,
    /// Bytes of the disk that must be read.
    pub required: u64,
    /// It answers no request for now.
    #[serde(default)]
    pub paused: bool,
}

impl StoredTicket {
    /// Whether it permits no more than to read a disk of this backup, for this transfer.
    pub fn is_of(&self, transfer: &str, record: &Record, socket: &Path) -> bool {
        let Ticket { access, export, disk, size, .. } = &self.ticket;
        let planned = record.disks.iter().find(|planned| planned.target == *disk);
        self.ticket.transfer == transfer
            && self.ticket.backup == record.uid
            && *access == Access::Read
            && planned.is_some_and(|planned| planned.size == *size)
            && (export.socket == socket && export.name == *disk)
    }
}

/// Those of a backup's stored tickets that are believed, see [`StoredTicket::is_of`]. Pure.
pub fn believed<'a>(
    stored: Vec<(String, StoredTicket)>,
    record: &'a Record,
    socket: &'a Path,
) -> impl Iterator<Item = StoredTicket> + 'a {
    let ours = stored.into_iter().filter(move |(transfer, stored)| stored.is_of(transfer, record, socket));
    ours.map(|(_, stored)| stored)
}

/// The stored ticket of a transfer.
fn kept(uid: &str, record: &Record, context: &Context) -> Result<Option<StoredTicket>, AgentError> {
    let state = &context.host.state;
    let socket = state.socket_of(&record.uid)?;
    let stored = state.tickets(&record.uid)?;
    Ok(believed(stored, record, &socket).find(|stored| stored.ticket.transfer == uid))
}

/// Opens the way to the bytes; what is open already stays as it is.
pub(super) async fn open(
    transfer: &ImageTransfer,
    uid: &str,
    live: &Live,
    record: &Record,
    context: &Context,
) -> Result<Standing, AgentError> {
    let disk = transfer.spec.disk();
    let Some(planned) = record.disks.iter().find(|planned| planned.target == disk) else {
        let because = Because::new(Reason::DiskNotFound, format!("the backup has no disk {disk}"));
        return Ok(Standing::Ended(Phase::Failed, because));
    };
    let export = context.export(record, disk)?;
    if transfer.spec.protocol == Protocol::Nbd {
        live.unseen(uid, true);
        let nbd = NbdExport {
            socket: export.socket.to_string_lossy().into_owned(),
            export: export.name,
            changed_from: export.changed_from.and_then(|from| i64::try_from(from).ok()),
        };
        return Ok(Standing::Open { secret: None, nbd: Some(nbd) });
    }
    let coverage = context.coverage(live, record, disk);
    let kept = kept(uid, record, context)?;
    let is_new = kept.is_none();
    let mut ticket = match kept {
        Some(kept) => kept,
        None => StoredTicket {
            ticket: Ticket {
                id: TicketId::random().map_err(AgentError::Random)?,
                transfer: uid.to_owned(),
                backup: record.uid.clone(),
                disk: disk.to_owned(),
                access: Access::Read,
                size: planned.size,
                export,
                dirty: planned.incremental,
                filename: None,
            },
            secret: 1,
            required: context.unread(live, record, disk).await?,
            paused: false,
        },
    };
    if is_new {
        // a successor cannot see any more what was zero before the client came
        context.store_coverage(&record.uid, live);
    }
    live.require(disk, ticket.required);
    live.ticketed(uid);
    // a predecessor may have stored a ticket, and not lived to make its Secret
    if transfer.status.as_ref().is_some_and(|status| status.ticket_secret.is_some()) {
        live.announce(uid);
    }
    if live.is_announced(uid) && context.tickets.is_valid(uid) {
        return Ok(Standing::Open { secret: Some(secret_name(uid, ticket.secret)), nbd: None });
    }
    let Some(ca) = context.certificate.ca() else {
        return Ok(uncertified());
    };
    let api = Api::<Secret>::namespaced(context.client.clone(), &record.namespace);
    ticket.paused = false;
    loop {
        // stored first: a Secret of this number that is there already is then known to be ours
        context.host.state.store_ticket(&record.uid, uid, &ticket)?;
        killpoint::reached(Step::TicketStored);
        let created =
            cluster::create(&api, &secret(transfer, &ticket.ticket, ticket.secret, &ca, context), api::AGENT)
                .await?;
        if created || !is_new {
            break;
        }
        ticket.secret += 1;
    }
    live.announce(uid);
    killpoint::reached(Step::SecretMade);
    let name = secret_name(uid, ticket.secret);
    context.tickets.add(ticket.ticket, coverage);
    Ok(Standing::Open { secret: Some(name), nbd: None })
}

/// Has the ticket answer no request until it is opened again; one that is not there yet is not made. Its Secret stays.
pub(super) fn pause(uid: &str, record: &Record, context: &Context) -> Result<(), AgentError> {
    // whatever becomes of the state directory
    if context.tickets.is_valid(uid) {
        context.tickets.end(uid, End::Paused);
    }
    if let Some(open) = kept(uid, record, context)?.filter(|stored| !stored.paused) {
        let paused = StoredTicket { paused: true, ..open };
        context.host.state.store_ticket(&record.uid, uid, &paused)?;
    }
    Ok(())
}

/// A client could not know the image server yet.
pub fn uncertified() -> Standing {
    let why = "the node's image server waits for its certificate";
    Standing::Waiting(Because::new(Reason::BackupNotReady, why))
}

/// The name of a transfer's Secret with this number.
pub fn secret_name(uid: &str, number: u32) -> String {
    format!("ticket-{uid}-{number}")
}

/// The Secret that a client reads. Owned by the transfer, so that it goes with it.
pub fn secret(transfer: &ImageTransfer, ticket: &Ticket, number: u32, ca: &str, context: &Context) -> Secret {
    let text = |text: String| ByteString(text.into_bytes());
    let mut owner = transfer.owner_ref(&()).unwrap_or_default();
    owner.block_owner_deletion = None;
    owner.controller = None;
    Secret {
        metadata: ObjectMeta {
            name: Some(secret_name(&ticket.transfer, number)),
            namespace: transfer.namespace(),
            // of an upload it is empty, and there all the same: by it the policy for tickets is asked
            labels: Some(BTreeMap::from([(api::LABEL_BACKUP.to_owned(), ticket.backup.clone())])),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        type_: Some(api::TICKET_SECRET_TYPE.to_owned()),
        immutable: Some(true),
        data: Some(BTreeMap::from([
            ("url".to_owned(), text(format!("https://{}/images/{}", context.advertised, ticket.id.expose()))),
            ("unixSocket".to_owned(), text(context.unix_socket.clone())),
            ("ca.crt".to_owned(), text(ca.to_owned())),
        ])),
        ..Secret::default()
    }
}
