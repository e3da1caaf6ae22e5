//! A ticket: the permission to read or to write one disk, and the secret that proves it.
//!
//! The id is a bearer secret, the only authentication of the images API. It is compared in constant time,
//! shows itself only through [`TicketId::expose`] and serde, and never through `Debug` or a log: those name
//! the transfer, which is public.

use std::fmt;

use rand::TryRngCore as _;
use serde::{Deserialize, Serialize};
use subtle::{Choice, ConstantTimeEq};

use crate::nbd::Export;

/// 128 random bits, written as a uuid.
#[derive(Clone, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct TicketId([u8; 16]);

/// The text is not a ticket id.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a ticket id is 32 hexadecimal digits grouped 8-4-4-4-12")]
pub struct BadTicketId;

impl TicketId {
    /// A new one, from the kernel's random numbers.
    pub fn random() -> Result<TicketId, std::io::Error> {
        let mut bytes = [0; 16];
        rand::rngs::OsRng.try_fill_bytes(&mut bytes).map_err(std::io::Error::other)?;
        Ok(TicketId(bytes))
    }

    /// Reads the uuid form; capitals are accepted.
    pub fn parse(text: &str) -> Result<TicketId, BadTicketId> {
        let text: &[u8; 36] = text.as_bytes().try_into().map_err(|_| BadTicketId)?;
        let mut digits = Vec::with_capacity(32);
        for (at, byte) in text.iter().enumerate() {
            match (matches!(at, 8 | 13 | 18 | 23), byte) {
                (true, b'-') => {}
                (false, byte) if byte.is_ascii_hexdigit() => digits.push(*byte),
                _ => return Err(BadTicketId),
            }
        }
        let mut id = [0; 16];
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| BadTicketId)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| BadTicketId)?;
        }
        Ok(TicketId(id))
    }

    /// The secret in clear, for the URL of a ticket's Secret.
    #[must_use]
    pub fn expose(&self) -> String {
        let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
    }
}

impl ConstantTimeEq for TicketId {
    fn ct_eq(&self, other: &TicketId) -> Choice {
        self.0.ct_eq(&other.0)
    }
}

impl PartialEq for TicketId {
    fn eq(&self, other: &TicketId) -> bool {
        self.ct_eq(other).into()
    }
}

impl Eq for TicketId {}

impl fmt::Debug for TicketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketId(redacted)")
    }
}

impl From<TicketId> for String {
    fn from(id: TicketId) -> String {
        id.expose()
    }
}

impl TryFrom<String> for TicketId {
    type Error = BadTicketId;

    fn try_from(text: String) -> Result<TicketId, BadTicketId> {
        TicketId::parse(&text)
    }
}

/// What a ticket permits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Access {
    /// To read.
    #[default]
    Read,
    /// To write, and to read.
    Write {
        /// What is made zero may become a hole; else it stays allocated.
        sparse: bool,
    },
}

/// The permission to read or to write one disk of one backup.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ticket {
    /// The secret.
    pub id: TicketId,
    /// Uid of the ImageTransfer: its public name, in logs and in answers.
    pub transfer: String,
    /// Uid of the VmBackup, for logs.
    pub backup: String,
    /// The disk's target (`vda`), for logs.
    pub disk: String,
    /// What may be done.
    #[serde(default)]
    pub access: Access,
    /// Bytes that it may be done to.
    pub size: u64,
    /// Where they are.
    pub export: Export,
    /// Dirty extents may be asked for.
    pub dirty: bool,
    /// Name that browsers save the disk as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filename: Option<String>,
}

/// How a ticket ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Requests hear that the transfer was canceled.
    Canceled,
    /// Requests hear that the ticket expired: as those of a paused transfer do with oVirt. It may be added again.
    Paused,
    /// Requests hear that there is no such ticket.
    Removed,
}

/// Why a request is not permitted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Denied {
    /// No ticket has that id.
    NoSuchTicket,
    /// The ticket's transfer is paused.
    Expired {
        /// Its uid.
        transfer: String,
    },
    /// The ticket's transfer was canceled.
    Canceled {
        /// Its uid.
        transfer: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ids_come_back(bytes: [u8; 16]) {
            let id = TicketId(bytes);
            let text = id.expose();
            prop_assert_eq!(text.len(), 36);
            prop_assert!(TicketId::parse(&text).unwrap() == id);
            prop_assert!(TicketId::parse(&text.to_uppercase()).unwrap() == id);
            let json = serde_json::to_string(&id).unwrap();
            prop_assert!(serde_json::from_str::<TicketId>(&json).unwrap() == id);
            let shown = format!("{id:?}");
            prop_assert_eq!(shown, "TicketId(redacted)");
        }

        #[test]
        fn other_text_is_refused(text in "[0-9a-g-]{0,40}") {
            let form = text.len() == 36
                && text.char_indices().all(|(at, c)| (c == '-') == matches!(at, 8 | 13 | 18 | 23) && c != 'g');
            prop_assert_eq!(TicketId::parse(&text).is_ok(), form);
        }
    }

    #[test]
    fn tickets_of_before_there_were_writes_read() {
        let stored = r#"{"id": "5ec2e700-feed-4ace-8bad-0123456789ab", "transfer": "t", "backup": "b", "disk": "vda",
            "size": 1, "export": {"socket": "/s", "name": "vda", "bitmap": null}, "dirty": false}"#;
        let mut ticket: Ticket = serde_json::from_str(stored).unwrap();
        assert_eq!(ticket.access, Access::Read);
        ticket.access = Access::Write { sparse: true };
        let again = serde_json::to_string(&ticket).unwrap();
        assert_eq!(serde_json::from_str::<Ticket>(&again).unwrap(), ticket);
    }

    #[test]
    fn random_ids_differ() {
        assert_ne!(TicketId::random().unwrap(), TicketId::random().unwrap());
    }
}
