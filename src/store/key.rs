//! A key as the map of the state holds it. A short one lies in the map's own node, so that a search compares without following
//! a pointer for each comparison: at a hundred thousand keys and more, those are what a write costs.

use std::borrow::Borrow;
use std::ops::Deref;

use smallvec::SmallVec;

/// The longest key that takes no allocation of its own, in bytes. With it a key takes as much room in the map as a `Bytes`.
const SHORT_BYTES_MAX: usize = 24;

/// Ordered by its bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(SmallVec<[u8; SHORT_BYTES_MAX]>);

impl From<&[u8]> for Key {
    fn from(bytes: &[u8]) -> Self {
        Key(SmallVec::from_slice(bytes))
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
