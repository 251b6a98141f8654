//! What the records of a log add up to. Pure: records go in, in their order; the state of the node comes out, or the
//! reason why they make no log. Called by `recovery`.

use std::collections::BTreeMap;

use raft::eraftpb::HardState;

use super::record::Record;
use super::terms::Terms;
use crate::cluster::Member;

/// The founding snapshot: index and term.
pub const FOUNDING: (u64, u64) = (1, 1);

#[derive(Debug, Default)]
pub struct Replay {
    /// `None` until the founding record comes.
    pub founders: Option<Vec<Member>>,
    pub boot: u64,
    pub hard_state: HardState,
    pub nonces: BTreeMap<u64, u64>,
    pub entries: Terms,
    /// Index and term of the entry before the first. Unknown while the records begin in the middle, behind segments
    /// that were compacted away, and until the record of that compaction comes.
    pub base: Option<(u64, u64)>,
}

impl Replay {
    /// `whole`: the records begin with the first one ever written.
    pub fn new(whole: bool) -> Self {
        Replay { base: whole.then_some(FOUNDING), ..Replay::default() }
    }

    pub fn apply(&mut self, record: Record) -> Result<(), String> {
        match record {
            Record::Founding(founders) => self.founders = Some(founders),
            Record::Boot(number) => self.boot = self.boot.max(number),
            Record::HardState(state) => self.hard_state = state,
            Record::Nonce { member, nonce } => {
                self.nonces.insert(member, nonce);
            }
            Record::Entry(entry) => self.entry(entry.index, entry.term)?,
            Record::Compacted { index, term, last } => self.compacted(index, term, last)?,
        }
        Ok(())
    }

    /// A later entry replaces the one at its index and all behind it.
    fn entry(&mut self, index: u64, term: u64) -> Result<(), String> {
        let first = match (self.base, self.entries.first()) {
            (Some((base, _)), _) => base.saturating_add(1),
            (None, Some(first)) if first <= index => first,
            // It replaces everything known so far.
            (None, _) => index,
        };
        let next = first.saturating_add(self.entries.len());
        if !(first..=next).contains(&index) {
            return Err(format!("entry {index} where at most {next} can follow"));
        }
        self.entries.cut(index);
        self.entries.push(index, term);
        Ok(())
    }

    fn compacted(&mut self, index: u64, term: u64, last: u64) -> Result<(), String> {
        if last < index || self.base.is_some_and(|(base, _)| index < base) {
            return Err(format!("a compaction up to {index} of a log that ends at {last} after {:?}", self.base));
        }
        self.entries.forget(index);
        if let Some(behind) = last.checked_add(1) {
            self.entries.cut(behind);
        }
        let ends_at = self.entries.last();
        if self.entries.len() == last - index {
            self.base = Some((index, term));
            Ok(())
        } else if self.base.is_none() && ends_at.is_none_or(|end| end == last) {
            // What it kept was in segments that a later compaction freed: the record of that one tells where the log
            // begins.
            Ok(())
        } else {
            Err(format!("entries between {index} and {last} are missing"))
        }
    }

    /// Whether a record says that nothing before it is needed any more, not even entries above its index.
    pub fn restarts_at(record: &Record) -> bool {
        matches!(record, Record::Compacted { index, last, .. } if last == index)
    }

    /// The hard state, with all that was compacted away committed: that may be durable before the commit index is.
    pub fn hard_state(&self) -> HardState {
        let mut state = self.hard_state.clone();
        state.commit = state.commit.max(self.base.filter(|base| *base != FOUNDING).map_or(0, |(index, _)| index));
        state
    }

    pub fn last_index(&self) -> u64 {
        self.entries.last().or(self.base.map(|(index, _)| index)).unwrap_or(0)
    }

    /// Whether the records together make a log.
    pub fn check(&self) -> Result<(), String> {
        if self.founders.is_none() {
            return Err("the founding members are nowhere in the log".to_owned());
        }
        if self.base.is_none() {
            return Err("the segments before this one are missing".to_owned());
        }
        if self.hard_state.commit > self.last_index() {
            return Err(format!(
                "entry {} was committed, yet the log ends at {}",
                self.hard_state.commit,
                self.last_index()
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::Entry;

    use super::*;

    fn entry(term: u64, index: u64) -> Record {
        let mut entry = Entry::new();
        (entry.term, entry.index) = (term, index);
        Record::Entry(entry)
    }

    fn replay(whole: bool, records: Vec<Record>) -> Result<Vec<(u64, u64)>, String> {
        let mut replay = Replay::new(whole);
        replay.founders = Some(Vec::new());
        records.into_iter().try_for_each(|record| replay.apply(record))?;
        replay.check()?;
        let (first, end) = (replay.entries.first().unwrap_or(1), replay.entries.last().map_or(1, |last| last + 1));
        Ok((first..end).map(|index| (replay.entries.at(index).expect("it is contiguous"), index)).collect())
    }

    #[test]
    fn a_later_entry_replaces_its_index_and_what_follows() {
        let log = vec![entry(1, 2), entry(1, 3), entry(1, 4), entry(2, 3)];
        assert_eq!(replay(true, log).unwrap(), [(1, 2), (2, 3)]);
    }

    #[test]
    fn a_gap_is_refused() {
        assert!(replay(true, vec![entry(1, 3)]).unwrap_err().contains("entry 3"));
        assert!(replay(true, vec![entry(1, 2), entry(1, 4)]).is_err());
        assert!(replay(true, vec![entry(1, 1)]).is_err());
        assert!(replay(true, vec![entry(1, 0)]).is_err());
    }

    #[test]
    fn a_commit_beyond_the_last_entry_is_refused() {
        let commit = |commit| {
            let mut state = HardState::new();
            state.commit = commit;
            Record::HardState(state)
        };
        replay(true, vec![entry(1, 2), commit(2)]).unwrap();
        assert!(replay(true, vec![entry(1, 2), commit(3)]).unwrap_err().contains("the log ends at 2"));
    }

    #[test]
    fn compaction_says_what_is_kept_and_the_rest_is_dropped() {
        let log = |last| vec![entry(1, 2), entry(1, 3), entry(1, 4), Record::Compacted { index: 3, term: 1, last }];
        assert_eq!(replay(true, log(4)).unwrap(), [(1, 4)]);
        // A log that conflicted with a snapshot was given up as a whole.
        assert_eq!(replay(true, log(3)).unwrap(), []);
        assert!(replay(true, log(5)).unwrap_err().contains("missing"));
    }

    /// The segments before these records are gone: only the compaction tells where the log begins.
    #[test]
    fn records_from_the_middle_make_a_log_once_a_compaction_is_seen() {
        let compacted = Record::Compacted { index: 7, term: 1, last: 8 };
        assert_eq!(replay(false, vec![entry(1, 6), entry(1, 7), entry(1, 8), compacted.clone()]).unwrap(), [(1, 8)]);
        assert_eq!(replay(false, vec![entry(1, 8), compacted.clone(), entry(1, 9)]).unwrap(), [(1, 8), (1, 9)]);
        // An old suffix, replaced from before where the records begin.
        assert_eq!(replay(false, vec![entry(1, 9), entry(2, 7), entry(2, 8), compacted.clone()]).unwrap(), [(2, 8)]);
        assert!(replay(false, vec![entry(1, 9), compacted]).is_err());
        assert!(replay(false, vec![entry(1, 8)]).unwrap_err().contains("are missing"));
    }

    /// The oldest segment that is left holds an old compaction, and the segments with what that one kept were freed by a
    /// later one.
    #[test]
    fn an_old_compaction_waits_for_the_later_one() {
        let compacted = |index, last| Record::Compacted { index, term: 1, last };
        let log = vec![entry(1, 7), compacted(3, 7), entry(1, 8), compacted(7, 8), entry(1, 9)];
        assert_eq!(replay(false, log).unwrap(), [(1, 8), (1, 9)]);
        let log = vec![compacted(3, 7), entry(1, 8), entry(1, 9), compacted(8, 9)];
        assert_eq!(replay(false, log).unwrap(), [(1, 9)]);
        assert!(replay(false, vec![entry(1, 7), compacted(3, 7), entry(1, 8)]).is_err(), "none comes");
        assert!(replay(false, vec![entry(1, 6), compacted(3, 7), entry(1, 7), compacted(5, 7)]).is_err(), "7 is lost");
    }
}
