//! What the store can be asked to change, and its bytes in the log: one format byte, then bincode. The only file that
//! knows bincode, so that another codec can take its place.
//!
//! Every version reads what every earlier one wrote: variants are appended, never changed or removed. A format byte
//! that is not known was written by a newer version, and refusing it is the only safe answer: skipping what others
//! apply would split the replicas.

use bincode::Options;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::channel::COMMAND_BYTES_MAX;

/// The largest key, in bytes, on every node.
pub const KEY_BYTES_MAX: usize = 4 << 10;

const FORMAT: u8 = 1;

/// One change of the store. Borrows from the bytes that it was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command<'a> {
    Put {
        #[serde(with = "serde_bytes")]
        key: &'a [u8],
        #[serde(with = "serde_bytes")]
        value: &'a [u8],
    },
}

/// Why bytes from the log are no command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("a command of format {0} was written by a newer version of raftkv: upgrade this node")]
    NewerFormat(u8),
    /// Every node finds the same bytes malformed, so all of them skip it alike.
    #[error("malformed command")]
    Malformed,
}

fn codec() -> impl Options {
    bincode::DefaultOptions::new().with_fixint_encoding().with_limit(COMMAND_BYTES_MAX as u64).reject_trailing_bytes()
}

impl<'a> Command<'a> {
    /// The bytes that go into the log.
    pub fn encode(&self) -> Bytes {
        let size = codec().serialized_size(self).expect("keys and values are checked against their limits");
        let mut bytes = Vec::with_capacity(1 + size as usize);
        bytes.push(FORMAT);
        codec().serialize_into(&mut bytes, self).expect("a Vec takes all that fits the limit");
        bytes.into()
    }

    /// Reads what [`Command::encode`] wrote, here or on another node.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Unreadable> {
        Self::check_format(bytes)?;
        match bytes.split_first() {
            Some((&FORMAT, body)) => codec().deserialize(body).map_err(|_| Unreadable::Malformed),
            Some(_) | None => Err(Unreadable::Malformed),
        }
    }

    /// An error is a command of a newer version; whether it is well-formed otherwise is not looked at.
    pub fn check_format(bytes: &[u8]) -> Result<(), Unreadable> {
        match bytes.first() {
            Some(&format) if format > FORMAT => Err(Unreadable::NewerFormat(format)),
            Some(_) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// These bytes are in logs on disks: they may never change.
    #[test]
    fn golden_bytes() {
        let put = Command::Put { key: b"k", value: b"hi" };
        let bytes = put.encode();
        assert_eq!(
            bytes[..],
            [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, b'k', 2, 0, 0, 0, 0, 0, 0, 0, b'h', b'i'],
            "format, variant u32, key length u64, key, value length u64, value"
        );
        assert_eq!(Command::decode(&bytes), Ok(put));
    }

    #[test]
    fn a_newer_format_is_told_from_damage() {
        assert_eq!(Command::decode(&[2, 0]), Err(Unreadable::NewerFormat(2)));
        assert_eq!(Command::decode(&[]), Err(Unreadable::Malformed));
        assert_eq!(Command::decode(&[0]), Err(Unreadable::Malformed));
        let mut trailing = Command::Put { key: b"k", value: b"v" }.encode().to_vec();
        trailing.push(0);
        assert_eq!(Command::decode(&trailing), Err(Unreadable::Malformed));
    }

    #[test]
    fn the_largest_put_fits() {
        let (key, value) = (vec![7; KEY_BYTES_MAX], vec![7; 4 << 20]);
        let bytes = Command::Put { key: &key, value: &value }.encode();
        assert!(bytes.len() <= COMMAND_BYTES_MAX);
        assert!(Command::decode(&bytes).is_ok());
    }

    proptest! {
        #[test]
        fn any_put_survives(key in prop::collection::vec(any::<u8>(), 0..99), value in prop::collection::vec(any::<u8>(), 0..99)) {
            let put = Command::Put { key: &key, value: &value };
            let bytes = put.encode();
            prop_assert_eq!(Command::decode(&bytes), Ok(put));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _any_answer_will_do = Command::decode(&bytes);
        }
    }
}
