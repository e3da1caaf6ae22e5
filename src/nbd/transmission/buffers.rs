//! Buffers for the data of reads, used again when who read it has dropped it.
//!
//! ```text
//! take -> receive into it -> lend -> Bytes, dropped by the reader --> here again, for the next take
//!                                                  \-- after forget --> freed
//! ```
//!
//! Freshly allocated memory of that size comes from the kernel, page by page: the faults and the zeroing cost
//! more than the copy that fills it. There are never more buffers than were in use at one time.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::{Bytes, BytesMut};

/// Smaller ones are left to the allocator, which keeps them itself.
const SMALLEST: usize = 64 << 10;

/// The buffers that nobody uses now.
#[derive(Debug, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<BytesMut>>>);

impl Buffers {
    /// An empty buffer with room for `length` bytes.
    pub(super) fn take(&self, length: usize) -> BytesMut {
        let kept = if length < SMALLEST { None } else { lock(&self.0).pop() };
        kept.filter(|buffer| buffer.capacity() >= length).unwrap_or_else(|| BytesMut::with_capacity(length))
    }

    /// The bytes in a buffer; it comes back when the last handle of them is dropped.
    pub(super) fn lend(&self, buffer: BytesMut) -> Bytes {
        if buffer.capacity() < SMALLEST {
            return buffer.freeze();
        }
        Bytes::from_owner(Lent { buffer, home: Arc::downgrade(&self.0) })
    }

    /// Frees the buffers, those that are lent when they are dropped.
    pub(super) fn forget(&mut self) {
        *self = Buffers::default();
    }
}

struct Lent {
    buffer: BytesMut,
    home: Weak<Mutex<Vec<BytesMut>>>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            let mut buffer = std::mem::take(&mut self.buffer);
            buffer.clear();
            lock(&home).push(buffer);
        }
    }
}

fn lock(buffers: &Mutex<Vec<BytesMut>>) -> std::sync::MutexGuard<'_, Vec<BytesMut>> {
    buffers.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut as _;

    fn lent(buffers: &Buffers, fill: u8) -> Bytes {
        let mut buffer = buffers.take(SMALLEST);
        assert!(buffer.is_empty());
        buffer.put_bytes(fill, SMALLEST);
        buffers.lend(buffer)
    }

    #[test]
    fn a_buffer_is_used_again_only_when_its_last_handle_is_dropped() {
        let mut buffers = Buffers::default();
        let first = lent(&buffers, 1);
        let mut part = first.slice(7..9);
        let at = first.as_ptr();
        drop(first);
        let second = lent(&buffers, 2);
        assert_ne!(second.as_ptr(), at);
        assert_eq!(part, [1, 1].as_slice());
        part.clear();
        drop(part);
        let third = lent(&buffers, 3);
        assert_eq!(third.as_ptr(), at);
        assert!(second.iter().all(|byte| *byte == 2));

        buffers.forget();
        drop((second, third));
        assert!(lock(&buffers.0).is_empty());
    }

    #[test]
    fn small_ones_and_larger_requests_are_allocated() {
        let buffers = Buffers::default();
        drop(lent(&buffers, 1));
        assert!(buffers.take(2 * SMALLEST).capacity() >= 2 * SMALLEST);
        drop(buffers.lend(buffers.take(SMALLEST - 1)));
        assert!(lock(&buffers.0).is_empty());
    }
}
