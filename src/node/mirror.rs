//! The log as raft sees it: a mirror in memory of the end of what the WAL holds or is about to hold. Raft reads entries from here;
//! the node writes here before it tells raft that it has done so. Pure; used by `core`.

use std::cell::Cell;
use std::collections::VecDeque;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata};
use raft::{Error, GetEntriesContext, RaftState, Result, Storage, StorageError};

use crate::channel::Writes;
use crate::wal::record::entry_bytes;

/// Entries that [`Mirror::sweep`] frees at once, if no more than half as many were appended: to free all that a snapshot
/// covers would hold up every write behind it.
const SWEPT_MAX: usize = 2048;

/// Entries for which [`Storage::entries`] has room at once, where so many are asked for: most turns have fewer.
const TAKEN_MAX: usize = 512;

/// What an entry takes in memory beside its context and data: itself, and the room that the queue keeps for more.
const ENTRY_BYTES: u64 = (size_of::<Entry>() + size_of::<Entry>() / 2) as u64;

/// Entries behind a start that is known by its index and term only.
#[derive(Debug)]
pub struct Mirror {
    /// Index and term of the entry just before the first one held: the founding snapshot's, at first.
    start: (u64, u64),
    /// Those that are forgotten and not freed yet, then those behind `start`.
    entries: VecDeque<Entry>,
    forgotten: usize,
    /// Appended since the last sweep.
    unswept: usize,
    /// What those take that are not forgotten, and how many writes they hold.
    memory_bytes: u64,
    writes: u64,
    /// Bytes that all that were appended since the start take in the log.
    appended_bytes: u64,
    hard_state: HardState,
    conf_state: ConfState,
    /// The newest snapshot that can be sent, if there is a file of one.
    snapshot: Option<SnapshotMetadata>,
    /// A follower needs a newer snapshot than that.
    snapshot_wanted: Cell<bool>,
}

impl Mirror {
    /// A log that starts behind (index, term) and holds `entries`, contiguous from index + 1 on. `conf_state` is that of
    /// the last entry applied.
    pub fn new(start: (u64, u64), conf_state: ConfState, hard_state: HardState, entries: Vec<Entry>) -> Self {
        Mirror {
            start,
            memory_bytes: entries.iter().map(entry_memory_bytes).sum(),
            writes: entries.iter().map(entry_writes).sum(),
            entries: entries.into(),
            forgotten: 0,
            unswept: 0,
            appended_bytes: 0,
            hard_state,
            conf_state,
            snapshot: None,
            snapshot_wanted: Cell::new(false),
        }
    }

    /// Appends, replacing what conflicts. The entries are contiguous and leave no gap behind what is held.
    pub fn append(&mut self, entries: Vec<Entry>) {
        let Some(first) = entries.first() else {
            return;
        };
        let (first, next) = (first.index, self.last() + 1);
        assert!(self.start.0 < first && first <= next, "append at {first} to a log of {:?}..{next}", self.start);
        let kept = self.place(first);
        self.memory_bytes -= self.entries.range(kept..).map(entry_memory_bytes).sum::<u64>();
        self.writes -= self.entries.range(kept..).map(entry_writes).sum::<u64>();
        self.entries.truncate(kept);
        self.memory_bytes += entries.iter().map(entry_memory_bytes).sum::<u64>();
        self.writes += entries.iter().map(entry_writes).sum::<u64>();
        self.unswept += entries.len();
        self.appended_bytes += entries.iter().map(|entry| entry_bytes(entry) as u64).sum::<u64>();
        self.entries.extend(entries);
    }

    /// Forgets the entries up to `index`. Their memory is freed by [`Mirror::sweep`].
    pub fn compact(&mut self, index: u64) {
        self.shrink(index, |_, _| true);
    }

    /// Forgets entries, the oldest first, none above `index`, while `may_forget` says so of the oldest: it is told how many writes
    /// are behind it, and what all that is held takes in memory.
    pub fn shrink(&mut self, index: u64, may_forget: impl Fn(u64, u64) -> bool) {
        while self.start.0 < index
            && let Some(oldest) = self.entries.get(self.forgotten)
        {
            if !may_forget(self.writes - entry_writes(oldest), self.memory_bytes) {
                return;
            }
            self.memory_bytes -= entry_memory_bytes(oldest);
            self.writes -= entry_writes(oldest);
            self.start = (oldest.index, oldest.term);
            self.forgotten += 1;
        }
    }

    /// Frees some of what is forgotten.
    pub fn sweep(&mut self) {
        let swept = self.forgotten.min(SWEPT_MAX.max(2 * std::mem::take(&mut self.unswept)));
        self.entries.drain(..swept);
        self.forgotten -= swept;
    }

    /// Starts anew behind a snapshot that was received.
    pub fn restore(&mut self, snapshot: &SnapshotMetadata) {
        self.start = (snapshot.index, snapshot.term);
        (self.forgotten, self.memory_bytes, self.writes) = (self.entries.len(), 0, 0);
        self.conf_state = snapshot.get_conf_state().clone();
        self.snapshot = Some(snapshot.clone());
    }

    /// There is a file of this snapshot now.
    pub fn set_snapshot(&mut self, snapshot: SnapshotMetadata) {
        self.snapshot = Some(snapshot);
    }

    pub fn forget_snapshot(&mut self) {
        self.snapshot = None;
    }

    pub fn set_conf_state(&mut self, conf_state: ConfState) {
        self.conf_state = conf_state;
    }

    pub fn conf_state(&self) -> &ConfState {
        &self.conf_state
    }

    /// Whether a follower needs a newer snapshot than there is; asking clears it.
    pub fn take_snapshot_wanted(&self) -> bool {
        self.snapshot_wanted.take()
    }

    /// Index of the last entry that is no longer held.
    pub fn start(&self) -> u64 {
        self.start.0
    }

    /// The lowest index, but none below `from`, behind which the entries up to `index` hold no more than so many writes, and take
    /// no more than so many bytes in the log.
    pub fn reach_back(&self, index: u64, from: u64, writes: u64, bytes: u64) -> u64 {
        let index = index.min(self.last());
        if index <= self.start.0.max(from) {
            return index;
        }
        let from = from.max(self.start.0);
        let (mut held, mut taken) = (0, 0);
        let fits = |entry: &&Entry| {
            held += entry_writes(entry);
            taken += entry_bytes(entry) as u64;
            held <= writes && taken <= bytes
        };
        let behind = self.entries.range(self.place(from + 1)..self.place(index + 1));
        index - behind.rev().take_while(fits).count() as u64
    }

    /// What the entries take in memory, as good as one can tell.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Bytes that the entries take in the log that were appended since the start.
    pub fn appended_bytes(&self) -> u64 {
        self.appended_bytes
    }

    pub fn hard_state(&self) -> &HardState {
        &self.hard_state
    }

    pub fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }

    /// Index of the last entry.
    fn last(&self) -> u64 {
        self.start.0 + (self.entries.len() - self.forgotten) as u64
    }

    /// Where the entry at an index behind the start is, or would be.
    fn place(&self, index: u64) -> usize {
        self.forgotten + (index - self.start.0 - 1) as usize
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
        let max_size = max_size.into().unwrap_or(u64::MAX);
        let (mut size, mut taken) = (0, Vec::with_capacity(TAKEN_MAX.min((high - low) as usize)));
        for entry in self.entries.range(self.place(low)..self.place(high)) {
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
        if index < self.start.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        match self.entries.get(self.place(index)) {
            Some(entry) => Ok(entry.term),
            None => Err(Error::Store(StorageError::Unavailable)),
        }
    }

    fn first_index(&self) -> Result<u64> {
        Ok(self.start.0 + 1)
    }

    fn last_index(&self) -> Result<u64> {
        Ok(self.last())
    }

    /// The newest snapshot, if it will do for this follower: the log goes on where it ends, and the follower is in it,
    /// for it would ignore one that it is not part of. Else a newer one is asked for.
    fn snapshot(&self, request: u64, to: u64) -> Result<Snapshot> {
        let fits = |snapshot: &&SnapshotMetadata| {
            let members = snapshot.get_conf_state();
            snapshot.index >= self.start.0.max(request)
                && [&members.voters, &members.learners, &members.voters_outgoing].iter().any(|ids| ids.contains(&to))
        };
        match self.snapshot.as_ref().filter(fits) {
            Some(metadata) => {
                let mut snapshot = Snapshot::default();
                snapshot.set_metadata(metadata.clone());
                Ok(snapshot)
            }
            None => {
                self.snapshot_wanted.set(true);
                Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable))
            }
        }
    }
}

/// What an entry takes in memory, as good as one can tell.
pub fn entry_memory_bytes(entry: &Entry) -> u64 {
    ENTRY_BYTES + (entry.context.len() + entry.data.len()) as u64
}

/// How many writes it holds; one of another kind counts for one.
pub fn entry_writes(entry: &Entry) -> u64 {
    Writes::count_in(&entry.context) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::channel::RequestId;

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
    fn compaction_keeps_the_term_of_what_it_forgets() {
        let mut mirror = mirror(vec![entry(2, 1), entry(3, 2), entry(4, 2)]);
        mirror.compact(3);
        mirror.compact(2);
        assert_eq!((mirror.first_index().unwrap(), mirror.last_index().unwrap()), (4, 4));
        assert_eq!((mirror.term(3).unwrap(), mirror.term(2).is_err()), (2, true));
        mirror.append(vec![entry(5, 2), entry(6, 2)]);
        let (many, two) = (u64::MAX, 2 * entry_bytes(&entry(2, 1)) as u64);
        let reach_back = |index, from, bytes| mirror.reach_back(index, from, many, bytes);
        assert_eq!((reach_back(6, 0, two), reach_back(5, 0, two), reach_back(6, 0, two - 1)), (4, 3, 5));
        assert_eq!((reach_back(6, 5, two), reach_back(9, 8, two), reach_back(2, 0, two)), (5, 6, 2));
        assert_eq!(mirror.appended_bytes(), 2 * entry_bytes(&entry(2, 1)) as u64);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// What is forgotten is forgotten at once, however slowly its memory is freed.
        #[test]
        fn sweeping_changes_nothing(steps in prop::collection::vec((0..4u8, any::<u16>()), 1..40)) {
            let (mut swept, mut plain) = (mirror(Vec::new()), mirror(Vec::new()));
            for (step, number) in steps {
                let (start, last) = (plain.start(), plain.last_index().unwrap());
                let index = start + 1 + u64::from(number) % (last - start + 1);
                for mirror in [&mut swept, &mut plain] {
                    match step {
                        0 => mirror.append((index..index + 3000).map(|index| entry(index, u64::from(number))).collect()),
                        1 => mirror.compact(index.min(last)),
                        2 if number < 5000 => mirror.restore(&SnapshotMetadata { index, ..SnapshotMetadata::default() }),
                        _ => {}
                    }
                }
                swept.sweep();
                let answers = |mirror: &Mirror| {
                    let all = mirror.entries(mirror.start() + 1, mirror.last() + 1, None, GetEntriesContext::empty(false));
                    (mirror.start(), mirror.memory_bytes(), all, mirror.term(index), mirror.reach_back(index, 0, 4, 500))
                };
                prop_assert_eq!(answers(&swept), answers(&plain));
            }
            while swept.forgotten > 0 {
                swept.sweep();
            }
            prop_assert_eq!(swept.entries.len() as u64, swept.last() - swept.start());
        }
    }

    #[test]
    fn the_oldest_are_forgotten_where_memory_is_short() {
        let mut mirror = mirror((2..12).map(|index| entry(index, 1)).collect());
        let one = mirror.memory_bytes() / 10;
        mirror.shrink(11, |_, bytes| bytes > 7 * one);
        assert_eq!((mirror.start(), mirror.memory_bytes()), (4, 7 * one));
        mirror.shrink(5, |_, bytes| bytes > one);
        assert_eq!((mirror.start(), mirror.memory_bytes()), (5, 6 * one), "none above the index");
        mirror.shrink(3, |_, _| true);
        mirror.append(vec![entry(9, 2)]);
        assert_eq!((mirror.start(), mirror.memory_bytes()), (5, 4 * one));
    }

    /// What is kept for slow followers is counted in writes, however many of them share an entry.
    #[test]
    fn an_entry_of_many_writes_counts_as_many() {
        let shared = |index, count| {
            let writes = vec![(RequestId { node: 1, boot: 1, counter: index }, vec![7; 10].into()); count];
            let (context, data) = Writes::pack(&writes).remove(0).into_entry();
            Entry { index, term: 1, context, data, ..Entry::default() }
        };
        let mut mirror = mirror(vec![shared(2, 5), shared(3, 1), shared(4, 3), entry(5, 1)]);
        let reach_back = |writes| mirror.reach_back(5, 0, writes, u64::MAX);
        assert_eq!([0, 1, 3, 4, 5, 9, 10].map(reach_back), [5, 4, 4, 3, 2, 2, 1]);
        mirror.shrink(5, |behind, _| behind >= 6);
        assert_eq!(mirror.start(), 1, "that would leave five");
        mirror.shrink(5, |behind, _| behind >= 5);
        assert_eq!(mirror.start(), 2);
        mirror.append(vec![entry(4, 2)]);
        mirror.shrink(4, |behind, _| behind >= 2);
        assert_eq!(mirror.start(), 2, "two are left");
        mirror.shrink(4, |behind, _| behind >= 1);
        assert_eq!(mirror.start(), 3);
    }

    /// A snapshot that lacks its receiver is ignored there in silence, and the leader would wait for ever.
    #[test]
    fn a_snapshot_is_offered_only_to_its_members() {
        let mut mirror = mirror(vec![entry(2, 1), entry(3, 1)]);
        assert!(mirror.snapshot(0, 2).is_err() && mirror.take_snapshot_wanted());
        let mut metadata = SnapshotMetadata { index: 3, term: 1, ..SnapshotMetadata::default() };
        metadata.set_conf_state((vec![1], vec![2]).into());
        mirror.set_snapshot(metadata);
        assert_eq!(mirror.snapshot(0, 2).unwrap().get_metadata().index, 3);
        assert!(!mirror.take_snapshot_wanted());
        assert!(mirror.snapshot(0, 3).is_err() && mirror.take_snapshot_wanted());
        assert!(mirror.snapshot(4, 2).is_err(), "too old");
    }

    #[test]
    fn a_size_limit_still_gives_one_entry() {
        let mirror = mirror(vec![entry(2, 1), entry(3, 1), entry(4, 1)]);
        let take = |max| mirror.entries(2, 5, max, GetEntriesContext::empty(false)).unwrap().len();
        assert_eq!((take(0), take(250), take(u64::MAX)), (1, 2, 3));
        assert!(mirror.entries(1, 2, None, GetEntriesContext::empty(false)).is_err());
    }
}
