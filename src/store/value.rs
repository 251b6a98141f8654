//! What the map of the state holds for a key: one pointer, to one allocation with numbers and value in it. A snapshot copies the
//! map's nodes as writes go on behind it, so what they hold is small, and copied without an allocation. Where no snapshot holds
//! it, a value is overwritten by one of its size where it is: an allocation that is made here and freed there is two more places in
//! memory that the processor has not seen for long.

use std::sync::Arc;

use bytes::Bytes;
use integer_encoding::VarInt;
use triomphe::ThinArc;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// The largest value that is copied out of its log entry, in bytes. As a slice of it, a small value would keep all of the entry in
/// memory, for as long as nobody writes the key again; a large one is not worth a copy.
const COPIED_BYTES_MAX: usize = 4 << 10;

/// What [`in_one_piece`] takes from the stack.
const STACK_BYTES_MAX: usize = 512;
const VARINT_BYTES_MAX: usize = 10;

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
    /// The creation, how much later the last write was, and the version, each as a varint, and the value behind them: of a
    /// small value the numbers would be a fifth.
    Packed(ThinArc<(), u8>),
    Shared(Arc<Large>),
}

#[derive(Debug, PartialEq, Eq)]
struct Large {
    revisions: Revisions,
    /// As [`KeyValue::hash`] says. A small value is hashed again when it is overwritten, rather than that a hash is kept for each.
    hash: u64,
    value: Bytes,
}

impl KeyValue {
    /// `value` is a part of `whole`, which is kept where the value is large; `hash` is what [`hash`] makes of both and the key.
    pub(super) fn new(value: &[u8], whole: &Bytes, revisions: Revisions, hash: u64) -> Self {
        KeyValue(if value.len() <= COPIED_BYTES_MAX {
            let (numbers, len) = pack(revisions);
            Kept::Packed(in_one_piece(&[&numbers[..len], value], |packed| ThinArc::from_header_and_slice((), packed)))
        } else {
            Kept::Shared(Arc::new(Large { revisions, hash, value: whole.slice_ref(value) }))
        })
    }

    /// Becomes what [`KeyValue::new`] makes of the same.
    pub(super) fn replace(&mut self, value: &[u8], whole: &Bytes, revisions: Revisions, hash: u64) {
        if !self.overwrite(value, revisions) {
            *self = KeyValue::new(value, whole, revisions, hash);
        }
    }

    /// Writes a small value over one that takes as much room and that nobody else holds; else this is false.
    fn overwrite(&mut self, value: &[u8], revisions: Revisions) -> bool {
        let Kept::Packed(packed) = &mut self.0 else { return false };
        let (numbers, len) = pack(revisions);
        if value.len() > COPIED_BYTES_MAX || packed.slice.len() != len + value.len() {
            return false;
        }
        packed.with_arc_mut(|packed| {
            let Some(own) = triomphe::Arc::get_mut(packed) else { return false };
            let (old_numbers, old_value) = own.slice_mut().split_at_mut(len);
            old_numbers.copy_from_slice(&numbers[..len]);
            old_value.copy_from_slice(value);
            true
        })
    }

    pub fn value(&self) -> &[u8] {
        match &self.0 {
            Kept::Packed(packed) => unpack(&packed.slice).1,
            Kept::Shared(large) => &large.value,
        }
    }

    /// The value for somebody else to keep; a large one is not copied.
    pub fn to_bytes(&self) -> Bytes {
        match &self.0 {
            Kept::Packed(packed) => Bytes::copy_from_slice(unpack(&packed.slice).1),
            Kept::Shared(large) => large.value.clone(),
        }
    }

    pub fn revisions(&self) -> Revisions {
        match &self.0 {
            Kept::Packed(packed) => unpack(&packed.slice).0,
            Kept::Shared(large) => large.revisions,
        }
    }

    /// The part in the content hash of the key that this is kept for: parts are added up, so that order does not matter and a
    /// change costs one key.
    pub(super) fn hash(&self, key: &[u8]) -> u64 {
        match &self.0 {
            Kept::Packed(packed) => {
                let (revisions, value) = unpack(&packed.slice);
                hash(key, value, revisions)
            }
            Kept::Shared(large) => large.hash,
        }
    }
}

/// The numbers in front of a packed value, and how many bytes they take.
fn pack(revisions: Revisions) -> ([u8; 3 * VARINT_BYTES_MAX], usize) {
    let (mut numbers, mut len) = ([0; 3 * VARINT_BYTES_MAX], 0);
    for number in [revisions.create, revisions.modify.wrapping_sub(revisions.create), revisions.version] {
        len += number.encode_var(&mut numbers[len..]);
    }
    (numbers, len)
}

fn unpack(packed: &[u8]) -> (Revisions, &[u8]) {
    let mut rest = packed;
    let mut number = || {
        let (number, len) = u64::decode_var(rest).expect("it was packed here");
        rest = &rest[len..];
        number
    };
    let [create, later, version] = [number(), number(), number()];
    (Revisions { create, modify: create.wrapping_add(later), version }, rest)
}

/// Of the length of the key, the key, the three numbers and the value, each behind the other.
pub(super) fn hash(key: &[u8], value: &[u8], revisions: Revisions) -> u64 {
    let len = (key.len() as u64).to_le_bytes();
    let numbers = [revisions.create, revisions.modify, revisions.version].map(u64::to_le_bytes);
    let parts = [&len, key, numbers.as_flattened(), value];
    if size_bytes(&parts) <= STACK_BYTES_MAX {
        return in_one_piece(&parts, xxh3_64);
    }
    let mut hasher = Xxh3::new();
    parts.iter().for_each(|part| hasher.update(part));
    hasher.digest()
}

fn size_bytes(parts: &[&[u8]]) -> usize {
    parts.iter().map(|part| part.len()).sum()
}

/// Short parts are put together on the stack: a hasher that is fed piece by piece, or a vector that grows, costs more than
/// all the rest.
fn in_one_piece<T>(parts: &[&[u8]], then: impl FnOnce(&[u8]) -> T) -> T {
    let len = size_bytes(parts);
    if len > STACK_BYTES_MAX {
        return then(&parts.concat());
    }
    let mut whole = [0; STACK_BYTES_MAX];
    let mut rest = &mut whole[..];
    for part in parts {
        let (room, behind) = rest.split_at_mut(part.len());
        room.copy_from_slice(part);
        rest = behind;
    }
    then(&whole[..len])
}

#[cfg(test)]
mod tests {
    use super::*;

    const REVISIONS: Revisions = Revisions { create: 1, modify: 2, version: 3 };

    /// Snapshots hold it: however it is computed, it stays what it was.
    #[test]
    fn an_entry_hashes_alike_in_one_piece_and_in_several() {
        for len in (0..20).chain(STACK_BYTES_MAX - 40..STACK_BYTES_MAX + 5) {
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
            for (create, modify) in [(1, 1), (1, u64::MAX), (u64::MAX, 0)] {
                let revisions = Revisions { create, modify, version: modify };
                assert_eq!(KeyValue::new(&whole[10..], &whole, revisions, 7).revisions(), revisions);
            }
            let entry = KeyValue::new(&whole[10..], &whole, REVISIONS, hash(b"key", &whole[10..], REVISIONS));
            assert_eq!(
                (entry.value(), entry.to_bytes(), entry.revisions()),
                (&whole[10..], whole.slice(10..), REVISIONS)
            );
            assert_eq!(entry.hash(b"key"), hash(b"key", &whole[10..], REVISIONS));
            let shared = len > COPIED_BYTES_MAX;
            assert_eq!(std::ptr::eq(entry.value(), &whole[10..]) && len > 0, shared, "{len} bytes");
            assert_eq!(std::ptr::eq(&entry.to_bytes()[..], entry.value()) && len > 0, shared);
        }
    }

    #[test]
    fn to_replace_one_is_to_make_it_anew_and_leaves_its_copies_alone() {
        let made = |len: usize, modify| {
            let (value, revisions) = (Bytes::from(vec![modify as u8; len]), Revisions { modify, ..REVISIONS });
            (value.clone(), revisions, KeyValue::new(&value, &value, revisions, modify))
        };
        let lens = [0, 1, 100, COPIED_BYTES_MAX, COPIED_BYTES_MAX + 1];
        for (before, after) in lens.into_iter().flat_map(|before| lens.map(|after| (before, after))) {
            // As a varint the first takes as much room as what it was before, the second a byte more.
            for modify in [3, 300] {
                let ((_, _, mut entry), (value, revisions, anew)) = (made(before, 2), made(after, modify));
                let copy = entry.clone();
                entry.replace(&value, &value, revisions, modify);
                assert_eq!((&entry, copy), (&anew, made(before, 2).2), "{before} to {after} bytes, copied");
                let mut entry = made(before, 2).2;
                entry.replace(&value, &value, revisions, modify);
                assert_eq!(entry, anew, "{before} to {after} bytes");
            }
        }
        let ((_, _, mut entry), (value, revisions, anew)) = (made(100, 2), made(100, 3));
        let place = entry.value().as_ptr();
        entry.replace(&value, &value, revisions, 3);
        assert_eq!((entry.value().as_ptr(), entry), (place, anew), "where nobody else holds it, it stays where it is");
    }

    #[test]
    fn it_takes_little_room_in_the_map() {
        assert_eq!(size_of::<KeyValue>(), 16);
    }
}
