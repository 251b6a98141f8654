//! What the maps of the state hold for a key. Of a small value one pointer, to one allocation with numbers and value in it. A
//! snapshot copies the maps' nodes as writes go on behind it, so what they hold is small, and copied without an allocation.
//! Where no snapshot holds it, a value is overwritten by one of its size where it is: an allocation that is made here and freed
//! there is two more places in memory that the processor has not seen for long.

use std::sync::Arc;

use bytes::Bytes;
use integer_encoding::VarInt;
use triomphe::ThinArc;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::channel::SHARED_COMMAND_BYTES_MAX;

/// The largest value that is copied out of its log entry, in bytes. As a slice of it, a small value would keep all of the entry in
/// memory, for as long as nobody writes the key again; a large one is not worth a copy.
pub(super) const SMALL_BYTES_MAX: usize = 4 << 10;

// A large value has its entry to itself, or it would keep others' writes in memory.
const _: () = assert!(SHARED_COMMAND_BYTES_MAX <= SMALL_BYTES_MAX);

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

impl Revisions {
    /// Of a key that is created.
    pub(super) fn first(revision: u64) -> Self {
        Revisions { create: revision, modify: revision, version: 1 }
    }

    /// Of the same key, written again.
    pub(super) fn next(self, revision: u64) -> Self {
        Revisions { modify: revision, version: self.version + 1, ..self }
    }
}

/// A key's value and history. A clone is one count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyValue {
    Small(Small),
    Large(Large),
}

impl KeyValue {
    /// `value` is a part of `whole`, which is kept where the value is large; `hash` is what [`hash`] makes of it.
    pub(super) fn new(value: &[u8], whole: &Bytes, revisions: Revisions, hash: u64) -> Self {
        if is_small(value) {
            KeyValue::Small(Small::new(value, revisions))
        } else {
            KeyValue::Large(Large(Arc::new(Shared { revisions, hash, value: whole.slice_ref(value) })))
        }
    }

    pub fn value(&self) -> &[u8] {
        self.parts().1
    }

    /// The value for somebody else to keep; a large one is not copied.
    pub fn to_bytes(&self) -> Bytes {
        match self {
            KeyValue::Small(small) => Bytes::copy_from_slice(small.parts().1),
            KeyValue::Large(large) => large.0.value.clone(),
        }
    }

    pub fn revisions(&self) -> Revisions {
        self.parts().0
    }

    fn parts(&self) -> (Revisions, &[u8]) {
        match self {
            KeyValue::Small(small) => small.parts(),
            KeyValue::Large(large) => large.parts(),
        }
    }
}

pub(super) fn is_small(value: &[u8]) -> bool {
    value.len() <= SMALL_BYTES_MAX
}

/// The creation, how much later the last write was, and the version, each as a varint, and the value behind them: of a small
/// value the numbers would be a fifth. Its hash is made again when it is overwritten, rather than that one is kept for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Small(ThinArc<(), u8>);

impl Small {
    pub(super) fn new(value: &[u8], revisions: Revisions) -> Self {
        let (numbers, len) = pack(revisions);
        Small(in_one_piece(&[&numbers[..len], value], |packed| ThinArc::from_header_and_slice((), packed)))
    }

    /// Becomes what [`Small::new`] makes of the same.
    pub(super) fn replace(&mut self, value: &[u8], revisions: Revisions) {
        if !self.overwrite(value, revisions) {
            *self = Small::new(value, revisions);
        }
    }

    /// Writes a value over one that takes as much room and that nobody else holds; else this is false.
    fn overwrite(&mut self, value: &[u8], revisions: Revisions) -> bool {
        let (numbers, len) = pack(revisions);
        if self.0.slice.len() != len + value.len() {
            return false;
        }
        self.0.with_arc_mut(|packed| {
            let Some(own) = triomphe::Arc::get_mut(packed) else { return false };
            let (old_numbers, old_value) = own.slice_mut().split_at_mut(len);
            old_numbers.copy_from_slice(&numbers[..len]);
            old_value.copy_from_slice(value);
            true
        })
    }

    pub(super) fn parts(&self) -> (Revisions, &[u8]) {
        unpack(&self.0.slice)
    }
}

/// A value that is shared with the log entry it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Large(Arc<Shared>);

#[derive(Debug, PartialEq, Eq)]
struct Shared {
    revisions: Revisions,
    hash: u64,
    value: Bytes,
}

impl Large {
    pub(super) fn parts(&self) -> (Revisions, &[u8]) {
        (self.0.revisions, &self.0.value)
    }

    /// The part in the content hash of the key that this is kept for.
    pub(super) fn hash(&self) -> u64 {
        self.0.hash
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

/// The part of a key in the content hash: parts are added up, so that order does not matter and a change costs one key. Of the
/// length of the key, the key, the three numbers and the value, each behind the other.
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
    fn what_is_packed_comes_out() {
        for len in [0, 1, STACK_BYTES_MAX, SMALL_BYTES_MAX] {
            for (create, modify) in [(1, 1), (1, u64::MAX), (u64::MAX, 0)] {
                let (value, revisions) = (vec![7; len], Revisions { create, modify, version: modify });
                let entry = Small::new(&value, revisions);
                assert_eq!(entry.parts(), (revisions, &value[..]));
                assert_eq!(KeyValue::Small(entry).to_bytes(), value);
            }
        }
    }

    #[test]
    fn a_large_value_is_not_copied() {
        let value = Bytes::from(vec![7; SMALL_BYTES_MAX + 1]);
        let entry = KeyValue::new(&value, &value, REVISIONS, 9);
        assert_eq!((entry.value().as_ptr(), entry.revisions()), (value.as_ptr(), REVISIONS));
        assert_eq!(entry.to_bytes().as_ptr(), value.as_ptr());
    }

    #[test]
    fn to_replace_one_is_to_make_it_anew_and_leaves_its_copies_alone() {
        let made = |len: usize, modify| {
            let (value, revisions) = (vec![modify as u8; len], Revisions { modify, ..REVISIONS });
            (Small::new(&value, revisions), value, revisions)
        };
        let lens = [0, 1, 100, SMALL_BYTES_MAX];
        for (before, after) in lens.into_iter().flat_map(|before| lens.map(|after| (before, after))) {
            // As a varint the first takes as much room as what it was before, the second a byte more.
            for modify in [3, 300] {
                let ((mut entry, ..), (anew, value, revisions)) = (made(before, 2), made(after, modify));
                let copy = entry.clone();
                entry.replace(&value, revisions);
                assert_eq!((&entry, copy), (&anew, made(before, 2).0), "{before} to {after} bytes, copied");
                let mut entry = made(before, 2).0;
                entry.replace(&value, revisions);
                assert_eq!(entry, anew, "{before} to {after} bytes");
            }
        }
        let ((mut entry, ..), (anew, value, revisions)) = (made(100, 2), made(100, 3));
        let place = entry.parts().1.as_ptr();
        entry.replace(&value, revisions);
        assert_eq!(
            (entry.parts().1.as_ptr(), entry),
            (place, anew),
            "where nobody else holds it, it stays where it is"
        );
    }
}
