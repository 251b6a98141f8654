//! The log as raft sees it: a mirror in memory of what the WAL holds or is about to hold. Raft reads entries from here;
//! the node writes here before it tells raft that it has done so. Pure; used by `core`.

use std::collections::VecDeque;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Result, Storage, StorageError};

/// Entries behind a start that is known by its index and term only.
#[derive(Debug)]
pub struct Mirror {
    /// Index and term of the entry just before the first one held: the founding snapshot's, at first.
    start: (u64, u64),
    entries: VecDeque<Entry>,
    hard_state: HardState,
    conf_state: ConfState,
}

impl Mirror {
    /// A log that starts behind (index, term) and holds `entries`, contiguous from index + 1 on.
    pub fn new(start: (u64, u64), conf_state: ConfState, hard_state: HardState, entries: Vec<Entry>) -> Self {
        let mut mirror = Mirror { start, entries: VecDeque::new(), hard_state, conf_state };
        mirror.append(entries);
        mirror
    }

    /// Appends, replacing what conflicts. The entries are contiguous and leave no gap behind what is held.
    pub fn append(&mut self, entries: Vec<Entry>) {
        let Some(first) = entries.first() else {
            return;
        };
        let (first, next) = (first.index, self.last() + 1);
        assert!(self.start.0 < first && first <= next, "append at {first} to a log of {:?}..{next}", self.start);
        self.entries.truncate((first - self.start.0 - 1) as usize);
        self.entries.extend(entries);
    }

    pub fn hard_state(&self) -> &HardState {
        &self.hard_state
    }

    pub fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }

    /// Index of the last entry.
    fn last(&self) -> u64 {
        self.start.0 + self.entries.len() as u64
    }
}

impl Storage for Mirror {
    fn initial_state(&self) -> Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> Result<Vec<Entry>> {
        if low <= self.start.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        assert!(high <= self.last() + 1, "entries {low}..{high} of a log that ends at {}", self.last());
        let offset = self.start.0 + 1;
        let range = (low - offset) as usize..(high - offset) as usize;
        let max_size = max_size.into().unwrap_or(u64::MAX);
        let (mut size, mut taken) = (0, Vec::new());
        for entry in self.entries.range(range) {
            // At least one, however large.
            size += u64::from(protobuf::Message::compute_size(entry));
            if size > max_size && !taken.is_empty() {
                break;
            }
            taken.push(entry.clone());
        }
        Ok(taken)
    }

    fn term(&self, index: u64) -> Result<u64> {
        if index == self.start.0 {
            return Ok(self.start.1);
        }
        match index.checked_sub(self.start.0 + 1) {
            None => Err(Error::Store(StorageError::Compacted)),
            Some(at) => match self.entries.get(at as usize) {
                Some(entry) => Ok(entry.term),
                None => Err(Error::Store(StorageError::Unavailable)),
            },
        }
    }

    fn first_index(&self) -> Result<u64> {
        Ok(self.start.0 + 1)
    }

    fn last_index(&self) -> Result<u64> {
        Ok(self.last())
    }

    /// Nothing is compacted, so every follower finds its next entry in the log and none is asked for.
    fn snapshot(&self, _request: u64, _to: u64) -> Result<Snapshot> {
        Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, data: vec![7; 100].into(), ..Entry::default() }
    }

    fn mirror(entries: Vec<Entry>) -> Mirror {
        Mirror::new((1, 1), ConfState::default(), HardState::default(), entries)
    }

    #[test]
    fn a_conflicting_suffix_is_replaced() {
        let mut mirror = mirror(vec![entry(2, 1), entry(3, 1), entry(4, 1)]);
        mirror.append(vec![entry(3, 2)]);
        assert_eq!(mirror.last_index().unwrap(), 3);
        assert_eq!((mirror.term(1).unwrap(), mirror.term(2).unwrap(), mirror.term(3).unwrap()), (1, 1, 2));
        assert!(mirror.term(0).is_err() && mirror.term(4).is_err());
    }

    #[test]
    fn a_size_limit_still_gives_one_entry() {
        let mirror = mirror(vec![entry(2, 1), entry(3, 1), entry(4, 1)]);
        let take = |max| mirror.entries(2, 5, max, GetEntriesContext::empty(false)).unwrap().len();
        assert_eq!((take(0), take(250), take(u64::MAX)), (1, 2, 3));
        assert!(mirror.entries(1, 2, None, GetEntriesContext::empty(false)).is_err());
    }
}
