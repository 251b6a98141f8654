//! The keys of the state, in order, and what each of them holds. Two maps, so that a place in the one for small values,
//! which is nearly all there is, takes 32 bytes: it needs none to tell them from large ones. A clone costs next to
//! nothing, however many keys there are.

use bytes::Bytes;
use imbl::OrdMap;

use super::key::Key;
use super::value::{KeyValue, Large, Revisions, Small, hash, is_small};

/// A key lies in one of the two.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Keys {
    small: OrdMap<Key, Small>,
    large: OrdMap<Key, Large>,
}

impl Keys {
    pub fn len(&self) -> usize {
        self.small.len() + self.large.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn get(&self, key: &[u8]) -> Option<KeyValue> {
        let small = self.small.get(key).map(|small| KeyValue::Small(small.clone()));
        small.or_else(|| self.large.get(key).map(|large| KeyValue::Large(large.clone())))
    }

    /// Writes `value`, which is a part of `whole`, at this revision of the store. The parts of the key in the content hash:
    /// what it was (0 where it was not there), and what it is.
    pub fn put(&mut self, key: &[u8], value: &[u8], whole: &Bytes, revision: u64) -> (u64, u64) {
        // One descent where the key is there and stays where it is, which is where it costs most.
        if let Some(entry) = self.small.get_mut(key) {
            let (before, old_value) = entry.parts();
            let (old, revisions) = (hash(key, old_value, before), before.next(revision));
            let new = hash(key, value, revisions);
            if is_small(value) {
                entry.replace(value, revisions);
            } else {
                self.small.remove(key);
                self.insert(key.into(), KeyValue::new(value, whole, revisions, new));
            }
            return (old, new);
        }
        let (revisions, old) = match self.large.remove(key) {
            Some(entry) => (entry.parts().0.next(revision), entry.hash()),
            None => (Revisions::first(revision), 0),
        };
        let new = hash(key, value, revisions);
        self.insert(key.into(), KeyValue::new(value, whole, revisions, new));
        (old, new)
    }

    /// Adds a key that is not there.
    pub fn insert(&mut self, key: Key, entry: KeyValue) {
        match entry {
            KeyValue::Small(small) => drop(self.small.insert(key, small)),
            KeyValue::Large(large) => drop(self.large.insert(key, large)),
        }
    }

    /// All of them, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, (Revisions, &[u8]))> {
        let mut small = self.small.iter().map(|(key, entry)| (key, entry.parts())).peekable();
        let mut large = self.large.iter().map(|(key, entry)| (key, entry.parts())).peekable();
        std::iter::from_fn(move || match (small.peek(), large.peek()) {
            (Some((one, _)), Some((other, _))) if other < one => large.next(),
            (None, Some(_)) => large.next(),
            (Some(_) | None, _) => small.next(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::value::SMALL_BYTES_MAX;
    use super::*;

    proptest! {
        /// As one map has it, whatever becomes larger or smaller.
        #[test]
        fn two_maps_are_as_one(writes in prop::collection::vec((0..6u8, 0..6usize), 1..60)) {
            let (mut keys, mut plain, mut content) = (Keys::default(), BTreeMap::new(), 0u64);
            let mut copies = Vec::new();
            for (revision, (key, len)) in (2..).zip(writes) {
                let len = [0, 1, 100, SMALL_BYTES_MAX, SMALL_BYTES_MAX + 1, 2 * SMALL_BYTES_MAX][len];
                let whole = Bytes::from(vec![revision as u8; len + 3]);
                copies.push((keys.clone(), plain.clone()));
                let (old, new) = keys.put(&[key], &whole[3..], &whole, revision);
                content = content.wrapping_sub(old).wrapping_add(new);
                let entry = plain.entry(vec![key]).or_insert((Bytes::new(), Revisions { create: revision, modify: 0, version: 0 }));
                *entry = (whole.slice(3..), Revisions { modify: revision, version: entry.1.version + 1, ..entry.1 });
            }
            copies.push((keys.clone(), plain));
            for (keys, plain) in &copies {
                let found: Vec<_> = keys.iter().map(|(key, (revisions, value))| (key.to_vec(), value.to_vec(), revisions)).collect();
                let expected: Vec<_> = plain.iter().map(|(key, (value, revisions))| (key.clone(), value.to_vec(), *revisions)).collect();
                prop_assert_eq!(found, expected);
                prop_assert_eq!(keys.len(), plain.len());
                for (key, (value, revisions)) in plain {
                    let found = keys.get(key).expect("it was written");
                    prop_assert_eq!((found.value(), found.revisions()), (&value[..], *revisions));
                }
                prop_assert_eq!(keys.get(&[6]), None);
            }
            let anew = keys.iter().map(|(key, (revisions, value))| hash(key, value, revisions));
            prop_assert_eq!(content, anew.fold(0, u64::wrapping_add));
        }
    }

    #[test]
    fn a_small_value_takes_little_room_in_the_map() {
        assert_eq!(size_of::<(Key, Small)>(), 32);
    }
}
