//! The maps of one block status reply, and the extents they make.
//!
//! A server sends one map a context: `id, (length, flags)...`. Maps may differ in length, and the last run
//! of each may reach beyond what was asked. The extents end with the shortest map; who reads on asks again
//! from there. Payloads are kept as they came and decoded as they are walked. Source: the NBD
//! specification, "Metadata querying" and `NBD_REPLY_TYPE_BLOCK_STATUS`.

use bytes::Bytes;

use super::handshake::Contexts;
use super::proto;
use super::transmission::ProtocolError;
use crate::extent::{self, Flags, Run};

/// One map a context, as received.
#[derive(Clone, Debug, Default)]
pub struct Maps {
    allocation: Option<Bytes>,
    depth: Option<Bytes>,
    dirty: Option<Bytes>,
}

impl Maps {
    /// Takes the payload of a block status chunk: at least one descriptor, a context that was agreed on,
    /// not yet seen.
    pub(super) fn take(&mut self, contexts: Contexts, mut payload: Bytes) -> Result<(), ProtocolError> {
        let id = proto::be32(&payload, 0);
        let place = match id {
            None => return Err(ProtocolError::BadStatus("no context")),
            id if id == contexts.allocation => &mut self.allocation,
            id if id == contexts.depth => &mut self.depth,
            id if id == contexts.dirty => &mut self.dirty,
            Some(_) => return Err(ProtocolError::BadStatus("a context that was not agreed on")),
        };
        let runs = payload.split_off(4);
        if decode(&runs, |_| Flags::DATA).any(|run| run.length == 0) {
            return Err(ProtocolError::BadStatus("a descriptor of no length"));
        }
        match place.replace(runs) {
            None => Ok(()),
            Some(_) => Err(ProtocolError::BadStatus("a context came twice")),
        }
    }

    /// Itself, when each context that was agreed on came.
    pub(super) fn complete(self, contexts: Contexts) -> Result<Maps, ProtocolError> {
        let missing = [(contexts.allocation, &self.allocation), (contexts.depth, &self.depth)]
            .into_iter()
            .chain([(contexts.dirty, &self.dirty)])
            .any(|(agreed, map)| agreed.is_some() && map.is_none());
        if missing { Err(ProtocolError::BadStatus("a context is missing")) } else { Ok(self) }
    }

    /// The runs of all maps over each other; without any map there are none.
    pub fn runs(self) -> impl Iterator<Item = Run> + Send + use<> {
        let known = self.allocation.is_some() || self.depth.is_some() || self.dirty.is_some();
        let allocation = map(self.allocation, |state| flag(state & proto::STATE_ZERO != 0, Flags::ZERO));
        let depth = map(self.depth, |depth| flag(depth == 0, Flags::HOLE));
        let dirty = map(self.dirty, |state| flag(state & proto::STATE_DIRTY != 0, Flags::DIRTY));
        extent::zip(extent::zip(allocation, depth), dirty).take_while(move |_| known)
    }
}

fn flag(on: bool, flag: Flags) -> Flags {
    if on { flag } else { Flags::DATA }
}

/// The runs of a map; a context that was not agreed on says "data" of everything.
fn map(runs: Option<Bytes>, flags: fn(u32) -> Flags) -> impl Iterator<Item = Run> + Send {
    let endless = runs.is_none().then_some(Run { length: u64::MAX, flags: Flags::DATA });
    endless.into_iter().chain(runs.into_iter().flat_map(move |runs| owned(runs, flags)))
}

fn owned(runs: Bytes, flags: fn(u32) -> Flags) -> impl Iterator<Item = Run> + Send {
    (0..runs.len() / 8).filter_map(move |i| descriptor(&runs, i, flags))
}

fn decode(runs: &[u8], flags: fn(u32) -> Flags) -> impl Iterator<Item = Run> {
    (0..runs.len() / 8).filter_map(move |i| descriptor(runs, i, flags))
}

fn descriptor(runs: &[u8], i: usize, flags: fn(u32) -> Flags) -> Option<Run> {
    let length = u64::from(proto::be32(runs, 8 * i)?);
    Some(Run { length, flags: flags(proto::be32(runs, 8 * i + 4)?) })
}
