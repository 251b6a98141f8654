//! A key as the map of the state holds it. A short one lies in the map's own node, so that a search compares without following
//! a pointer for each comparison: at a hundred thousand keys and more, those are what a write costs.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::ops::Deref;

use compact_bytes::CompactBytes;

/// Ordered by its bytes. Up to 23 of them take no allocation of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(CompactBytes);

impl From<&[u8]> for Key {
    fn from(bytes: &[u8]) -> Self {
        Key(CompactBytes::new(bytes))
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        self[..].cmp(&other[..])
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl Deref for Key {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_ordered_by_its_bytes_however_many() {
        let bytes = |len: usize| [vec![0; len], vec![255; len], [vec![7; len], vec![0]].concat()];
        let all: Vec<Vec<u8>> = [0, 1, 22, 23, 24, 100].into_iter().flat_map(bytes).collect();
        for (one, other) in all.iter().flat_map(|one| all.iter().map(move |other| (one, other))) {
            let (key, clone, other_key) = (Key::from(&one[..]), Key::from(&one[..]).clone(), Key::from(&other[..]));
            assert_eq!((key.cmp(&other_key), key == other_key), (one.cmp(other), one == other), "{one:?} {other:?}");
            assert_eq!((&clone[..], clone.borrow()), (&one[..], &one[..]));
        }
    }

    #[test]
    fn it_takes_little_room_in_the_map() {
        assert_eq!(size_of::<Key>(), 24);
    }
}
