//! What the map of the state holds for a key: one pointer, to one allocation with numbers and value in it. A snapshot copies the
//! map's nodes as writes go on behind it, so what they hold is small, and copied without an allocation.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;
use triomphe::ThinArc;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// The largest value that is copied out of its log entry, in bytes. As a slice of it, a small value would keep all of the entry in
/// memory, for as long as nobody writes the key again; a large one is not worth a copy.
const COPIED_BYTES_MAX: usize = 4 << 10;

/// Up to this is hashed in one piece, which takes a copy; a hasher that is fed piece by piece is a kilobyte to set up.
const HASHED_AT_ONCE_BYTES_MAX: usize = 512;

/// A key's history. Revisions are the store's (etcd's rule): it starts at 1 and rises with each write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revisions {
    pub create: u64,
    pub modify: u64,
    /// Writes since the key was created; the first is 1.
    pub version: u64,
}

/// A key's value and history. A clone is one count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue(Kept);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kept {
    Copied(ThinArc<Numbers, u8>),
    Shared(Arc<(Numbers, Bytes)>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Numbers {
    revisions: Revisions,
    /// The key's part in the content hash: parts are added up, so that order does not matter and a change costs one key.
    hash: u64,
}

impl KeyValue {
    /// `value` is a part of `whole`, which is kept where the value is large.
    pub(super) fn new(key: &[u8], value: &[u8], whole: &Bytes, revisions: Revisions) -> Self {
        let numbers = Numbers { revisions, hash: hash(key, value, revisions) };
        KeyValue(if value.len() <= COPIED_BYTES_MAX {
            Kept::Copied(ThinArc::from_header_and_slice(numbers, value))
        } else {
            Kept::Shared(Arc::new((numbers, whole.slice_ref(value))))
        })
    }

    pub fn value(&self) -> &[u8] {
        match &self.0 {
            Kept::Copied(kept) => &kept.slice,
            Kept::Shared(kept) => &kept.1,
        }
    }

    /// The value for somebody else to keep; a large one is not copied.
    pub fn to_bytes(&self) -> Bytes {
        match &self.0 {
            Kept::Copied(kept) => Bytes::copy_from_slice(&kept.slice),
            Kept::Shared(kept) => kept.1.clone(),
        }
    }

    pub fn revisions(&self) -> Revisions {
        self.numbers().revisions
    }

    pub(super) fn hash(&self) -> u64 {
        self.numbers().hash
    }

    fn numbers(&self) -> &Numbers {
        match &self.0 {
            Kept::Copied(kept) => &kept.header.header,
            Kept::Shared(kept) => &kept.0,
        }
    }
}

/// Of the length of the key, the key, the three numbers and the value, each behind the other.
pub(super) fn hash(key: &[u8], value: &[u8], revisions: Revisions) -> u64 {
    let len = (key.len() as u64).to_le_bytes();
    let numbers = [revisions.create, revisions.modify, revisions.version].map(u64::to_le_bytes);
    let parts = [&len, key, numbers.as_flattened(), value];
    if parts.iter().map(|part| part.len()).sum::<usize>() <= HASHED_AT_ONCE_BYTES_MAX {
        let mut whole = SmallVec::<[u8; HASHED_AT_ONCE_BYTES_MAX]>::new();
        parts.iter().for_each(|part| whole.extend_from_slice(part));
        return xxh3_64(&whole);
    }
    let mut hasher = Xxh3::new();
    parts.iter().for_each(|part| hasher.update(part));
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    const REVISIONS: Revisions = Revisions { create: 1, modify: 2, version: 3 };

    /// Snapshots hold it: however it is computed, it stays what it was.
    #[test]
    fn an_entry_hashes_alike_in_one_piece_and_in_several() {
        for len in (0..20).chain(HASHED_AT_ONCE_BYTES_MAX - 40..HASHED_AT_ONCE_BYTES_MAX + 5) {
            let value = vec![7; len];
            let mut hasher = Xxh3::new();
            for part in [&3u64.to_le_bytes()[..], b"key", &1u64.to_le_bytes(), &2u64.to_le_bytes(), &3u64.to_le_bytes()]
            {
                hasher.update(part);
            }
            hasher.update(&value);
            assert_eq!(hash(b"key", &value, REVISIONS), hasher.digest(), "a value of {len} bytes");
        }
    }

    #[test]
    fn a_small_value_lets_its_entry_go_and_a_large_one_is_not_copied() {
        for len in [0, 1, COPIED_BYTES_MAX, COPIED_BYTES_MAX + 1] {
            let whole = Bytes::from(vec![7; len + 10]);
            let entry = KeyValue::new(b"key", &whole[10..], &whole, REVISIONS);
            assert_eq!(
                (entry.value(), entry.to_bytes(), entry.revisions()),
                (&whole[10..], whole.slice(10..), REVISIONS)
            );
            let shared = len > COPIED_BYTES_MAX;
            assert_eq!(std::ptr::eq(entry.value(), &whole[10..]) && len > 0, shared, "{len} bytes");
            assert_eq!(std::ptr::eq(&entry.to_bytes()[..], entry.value()) && len > 0, shared);
        }
    }

    #[test]
    fn it_takes_little_room_in_the_map() {
        assert_eq!(size_of::<KeyValue>(), 16);
    }
}
