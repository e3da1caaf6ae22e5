//! What waits to be sent to an NBD server: whole requests with their data, in order, in buffers that are used again.
//!
//! ```text
//! take -> filled with a request -> put -> next/sent, piece by piece --all of it sent--> here again, for the next take
//! ```
//!
//! There are never more buffers than were in use at one time; that is bounded by whoever puts requests here. It knows no
//! socket.

use std::collections::VecDeque;

use bytes::BytesMut;

/// The requests, see the module.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    waiting: VecDeque<BytesMut>,
    /// Bytes of the first that were sent.
    sent: usize,
    spare: Vec<BytesMut>,
}

impl Outbox {
    /// An empty buffer with room for `length` bytes.
    pub(super) fn take(&mut self, length: usize) -> BytesMut {
        let kept = self.spare.pop().filter(|buffer| buffer.capacity() >= length);
        kept.unwrap_or_else(|| BytesMut::with_capacity(length))
    }

    /// Puts a request behind the others.
    pub(super) fn put(&mut self, request: BytesMut) {
        self.waiting.push_back(request);
    }

    /// What is sent next; empty when nothing waits.
    pub(super) fn next(&self) -> &[u8] {
        self.waiting.front().map_or(&[], |first| &first[self.sent..])
    }

    /// So many bytes of [`Outbox::next`] were sent.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        if let Some(mut done) = self.waiting.pop_front_if(|first| first.len() <= self.sent) {
            self.sent = 0;
            done.clear();
            self.spare.push(done);
        }
    }

    /// Frees the buffers; nothing waits.
    pub(super) fn rest(&mut self) {
        *self = Outbox::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn all_is_sent_in_order_and_buffers_come_back(
            requests in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..8),
            step in 1..50usize,
        ) {
            let mut outbox = Outbox::default();
            for request in &requests {
                let mut buffer = outbox.take(request.len());
                buffer.extend_from_slice(request);
                outbox.put(buffer);
            }
            let mut sent = Vec::new();
            while !outbox.next().is_empty() {
                let some = outbox.next().len().min(step);
                sent.extend_from_slice(&outbox.next()[..some]);
                outbox.sent(some);
            }
            prop_assert_eq!(sent, requests.concat());
            prop_assert_eq!(outbox.spare.len(), requests.len());
            prop_assert!(outbox.take(1).is_empty());
        }
    }
}
