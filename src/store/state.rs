//! The replicated state and how a command changes it: pure, total and deterministic, so that every replica that
//! applies the same log holds the same state. No clock, no randomness, no I/O; the apply task in `store` calls it.

use std::collections::BTreeMap;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::keys::Keys;
use super::value::KeyValue;
use crate::channel::{RequestId, Writes};
use crate::command::{Command, Unreadable};
use crate::window::{Seen, Window};

/// Writes of one node that may overtake each other on their way into the log.
pub(super) const WINDOW_SIZE: usize = 1 << 16;

/// What a write answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Put { revision: u64 },
}

/// What became of a committed command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Applied(Answer),
    /// Applied before: a proposal that was repeated on its way.
    Repeat,
    /// So old that nobody remembers whether it was applied: surely not applied now.
    TooOld,
    /// No command at all; every replica skips it alike.
    Malformed,
}

/// All that is replicated. A clone costs next to nothing, however many keys there are. `snapshot` keeps every field.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    pub(super) keys: Keys,
    pub(super) revision: u64,
    pub(super) applied: u64,
    pub(super) content_hash: u64,
    pub(super) log_hash: u64,
    /// For each node, its newest boot and the writes seen from it. An older boot's process is gone, and nobody waits
    /// for what it may still have had on its way.
    pub(super) seen: BTreeMap<u64, (u64, Window)>,
}

impl State {
    /// The state of a cluster that was just founded; `applied` is the index of its founding snapshot.
    pub fn founded(applied: u64) -> Self {
        State { keys: Keys::default(), revision: 1, applied, content_hash: 0, log_hash: 0, seen: BTreeMap::new() }
    }

    /// Applies the writes of the next entry, and tells what became of each, in order. An error is a command of a newer version:
    /// nothing of the entry is applied, and the caller must stop.
    pub fn apply(
        &mut self,
        index: u64,
        term: u64,
        writes: &Writes,
        mut tell: impl FnMut(Outcome),
    ) -> Result<(), Unreadable> {
        writes.iter().try_for_each(|(_, command)| Command::check_format(command))?;
        // A lone write is named nowhere in the hash: logs are older than entries of several.
        let names = if writes.count() > 1 { &writes.names()[..] } else { &[] };
        self.advance(index, term, names, writes.commands());
        for (request, command) in writes.iter() {
            tell(self.write(request, command, writes.commands()));
        }
        Ok(())
    }

    /// Applies an entry of one write.
    #[cfg(any(test, fuzzing))]
    pub(super) fn apply_one(
        &mut self,
        index: u64,
        term: u64,
        request: RequestId,
        command: &Bytes,
    ) -> Result<Outcome, Unreadable> {
        let mut told = None;
        self.apply(index, term, &Writes::one(request, command.clone()), |outcome| told = Some(outcome))?;
        Ok(told.expect("each write has an outcome"))
    }

    /// `command` is a part of `whole`.
    fn write(&mut self, request: RequestId, command: &[u8], whole: &Bytes) -> Outcome {
        let Ok(parsed) = Command::decode(command) else {
            return Outcome::Malformed;
        };
        match self.mark(request) {
            Seen::Repeat => return Outcome::Repeat,
            Seen::TooOld => return Outcome::TooOld,
            Seen::New => {}
        }
        self.revision += 1;
        match parsed {
            Command::Put { key, value } => self.put(key, value, whole),
        }
        Outcome::Applied(Answer::Put { revision: self.revision })
    }

    /// Passes an entry that carries nothing for the store.
    pub fn skip(&mut self, index: u64, term: u64) {
        self.advance(index, term, &[], &[]);
    }

    pub fn get(&self, key: &[u8]) -> Option<KeyValue> {
        self.keys.get(key)
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Index of the last entry applied.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// A hash of the content, whatever the order it was written in; equal on replicas at the same index.
    pub fn content_hash(&self) -> u64 {
        self.content_hash
    }

    /// A hash of all entries applied, in order.
    pub fn log_hash(&self) -> u64 {
        self.log_hash
    }

    fn advance(&mut self, index: u64, term: u64, names: &[u8], commands: &[u8]) {
        assert_eq!(index, self.applied + 1, "entries are applied in order and without a gap");
        self.applied = index;
        let mut seed = self.log_hash.rotate_left(1) ^ term;
        if !names.is_empty() {
            seed = xxh3_64_with_seed(names, seed);
        }
        self.log_hash = xxh3_64_with_seed(commands, seed);
    }

    fn mark(&mut self, request: RequestId) -> Seen {
        let (boot, window) = self.seen.entry(request.node).or_insert_with(|| (request.boot, Window::new(WINDOW_SIZE)));
        if request.boot < *boot {
            return Seen::TooOld;
        }
        if request.boot > *boot {
            (*boot, *window) = (request.boot, Window::new(WINDOW_SIZE));
        }
        window.mark(request.counter)
    }

    pub(super) fn put(&mut self, key: &[u8], value: &[u8], whole: &Bytes) {
        let (old, new) = self.keys.put(key, value, whole, self.revision);
        self.content_hash = self.content_hash.wrapping_sub(old).wrapping_add(new);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::value::{Revisions, hash};
    use super::*;

    fn put(key: &str, value: &str) -> Bytes {
        Command::Put { key: key.as_bytes(), value: value.as_bytes() }.encode()
    }

    fn request(counter: u64) -> RequestId {
        RequestId { node: 1, boot: 7, counter }
    }

    #[test]
    fn revisions_follow_etcd() {
        let mut state = State::founded(1);
        state.skip(2, 1);
        assert_eq!(
            state.apply_one(3, 1, request(1), &put("a", "1")),
            Ok(Outcome::Applied(Answer::Put { revision: 2 }))
        );
        assert_eq!(
            state.apply_one(4, 1, request(2), &put("b", "1")),
            Ok(Outcome::Applied(Answer::Put { revision: 3 }))
        );
        assert_eq!(
            state.apply_one(5, 1, request(3), &put("a", "2")),
            Ok(Outcome::Applied(Answer::Put { revision: 4 }))
        );
        let a = state.get(b"a").unwrap();
        assert_eq!((a.value(), a.revisions()), (&b"2"[..], Revisions { create: 2, modify: 4, version: 2 }));
        assert_eq!((state.applied(), state.revision(), state.len()), (5, 4, 2));
    }

    /// A follower repeats a proposal whose answer was lost; both copies commit, one counts.
    #[test]
    fn a_repeated_proposal_is_applied_once() {
        let mut state = State::founded(1);
        state.apply_one(2, 1, request(1), &put("a", "first")).unwrap();
        state.apply_one(3, 1, request(2), &put("a", "second")).unwrap();
        let (revision, hash) = (state.revision(), state.content_hash());
        assert_eq!(state.apply_one(4, 2, request(1), &put("a", "first")), Ok(Outcome::Repeat));
        assert_eq!((state.revision(), state.content_hash(), state.applied()), (revision, hash, 4));
    }

    /// What a dead process had on its way is not applied behind what its next start wrote.
    #[test]
    fn an_older_boot_is_refused() {
        let mut state = State::founded(1);
        state.apply_one(2, 1, RequestId { node: 1, boot: 8, counter: 1 }, &put("a", "new")).unwrap();
        let late = RequestId { node: 1, boot: 7, counter: 9 };
        assert_eq!(state.apply_one(3, 1, late, &put("a", "old")), Ok(Outcome::TooOld));
        let other = RequestId { node: 2, boot: 7, counter: 9 };
        assert!(matches!(state.apply_one(4, 1, other, &put("a", "other")), Ok(Outcome::Applied(_))));
    }

    #[test]
    fn writes_of_one_entry_are_applied_in_order() {
        let mut state = State::founded(1);
        let writes = [(1, put("a", "1")), (2, put("b", "2")), (1, put("a", "1")), (3, put("a", "3"))];
        let writes = Writes::pack(&writes.map(|(counter, command)| (request(counter), command))).remove(0);
        let mut outcomes = Vec::new();
        state.apply(2, 1, &writes, |outcome| outcomes.push(outcome)).unwrap();
        let written = |revision| Outcome::Applied(Answer::Put { revision });
        assert_eq!(outcomes, [written(2), written(3), Outcome::Repeat, written(4)]);
        assert_eq!((state.get(b"a").unwrap().value(), state.applied(), state.revision()), (&b"3"[..], 2, 4));
    }

    /// What is not understood is not applied in part.
    #[test]
    fn a_newer_format_anywhere_in_an_entry_stops_before_it() {
        let mut state = State::founded(1);
        let writes = [(request(1), put("a", "1")), (request(2), Bytes::from_static(&[9]))];
        let writes = Writes::pack(&writes).remove(0);
        let told = |_| panic!("no outcome");
        assert_eq!(state.apply(2, 1, &writes, told), Err(Unreadable::NewerFormat(9)));
        assert_eq!(state, State::founded(1));
    }

    #[test]
    fn damage_is_skipped_and_a_newer_format_stops() {
        let mut state = State::founded(1);
        assert_eq!(state.apply_one(2, 1, request(1), &Bytes::from_static(&[1, 9])), Ok(Outcome::Malformed));
        assert_eq!(state.apply_one(3, 1, request(2), &Bytes::from_static(&[9])), Err(Unreadable::NewerFormat(9)));
        assert_eq!(state.applied(), 2, "what is not understood is not passed");
    }

    proptest! {
        /// The hash that is kept up to date is the hash of what is there.
        #[test]
        fn the_content_hash_is_that_of_the_content(writes in prop::collection::vec((0..5u8, any::<u8>()), 1..60)) {
            let mut state = State::founded(1);
            for (n, (key, value)) in (1..).zip(&writes) {
                state.apply_one(n + 1, 1, request(n), &Command::Put { key: &[*key], value: &[*value] }.encode()).unwrap();
            }
            let anew = state.keys.iter().map(|(key, (revisions, value))| hash(key, value, revisions));
            prop_assert_eq!(state.content_hash(), anew.fold(0, u64::wrapping_add));
        }
    }
}
