//! A start's way through its own log. What is surely committed there goes to the service before the node runs; of the
//! log itself only the end stays in memory, as in a node that never stopped. So a start takes no more memory than what
//! it starts, however long the log has grown behind the snapshot. Pure; driven by `server`.

use std::collections::VecDeque;

use raft::eraftpb::{Entry, EntryType, HardState};

use super::changes::MADE_MAX;
use super::core::{Core, FOUNDING, Start};
use super::members::{LoggedChange, Members, members_with};
use super::mirror::{entry_memory_bytes, entry_writes};
use super::snapshots::Origin;
use super::{Policy, Settings, Stopped, commit, metadata};
use crate::channel::{Commit, RequestId};
use crate::cluster::Member;
use crate::wal::Recovered;
use crate::wal::record::entry_bytes;
use crate::wal::snapshot::Meta;

/// How far a start has come in its log, entry by entry.
pub struct Resume {
    id: u64,
    boot: u64,
    members: Members,
    made: VecDeque<RequestId>,
    /// Raft where the snapshot stands, without a log: it knows what a change makes of the membership.
    raft: Core,
    hard_state: HardState,
    snapshot: Meta,
    snapshot_bytes: u64,
    /// Index of the last entry that the log on the disk no longer holds.
    log_base: u64,
    /// What is kept of the log, and index and term of the entry before.
    kept: VecDeque<Entry>,
    kept_bytes: u64,
    kept_writes: u64,
    base: (u64, u64),
    applied: (u64, u64),
    /// Bytes that the entries behind the snapshot take in the log, and how many writes of them are applied.
    grown_bytes: u64,
    applied_writes: u64,
    policy: Policy,
}

impl Resume {
    /// Stands behind the snapshot `meta` that the service starts from; its file has `snapshot_bytes`, 0 where there is
    /// none. `nonce` is that of the data directory of member `id`.
    pub fn new(id: u64, nonce: u64, recovered: &Recovered, meta: &Meta, snapshot_bytes: u64, policy: Policy) -> Self {
        let Recovered { boot, hard_state, entries, nonces, compacted, .. } = recovered;
        let base = compacted.unwrap_or(FOUNDING);
        let fresh = hard_state.term == 0 && entries.is_empty() && base == FOUNDING;
        let mut hard_state = hard_state.clone();
        hard_state.commit = hard_state.commit.max(meta.index);
        let place = (meta.index, meta.term);
        let raft = Core::new(Start {
            id,
            base: place,
            applied: metadata(meta),
            hard_state: HardState::default(),
            entries: Vec::new(),
            election_ticks: 10,
            seed: 0,
            message_bytes_max: 0,
        });
        Resume {
            id,
            boot: *boot,
            members: Members::new(id, nonce, meta, nonces.clone(), fresh),
            made: VecDeque::new(),
            raft,
            hard_state,
            snapshot: meta.clone(),
            snapshot_bytes,
            log_base: base.0,
            kept: VecDeque::new(),
            kept_bytes: 0,
            kept_writes: 0,
            base,
            applied: place,
            grown_bytes: 0,
            applied_writes: 0,
            policy,
        }
    }

    /// Takes the next entry of the log. What it means to the service, if it is committed and the snapshot lacks it.
    pub fn take<A>(&mut self, entry: Entry) -> Result<Option<Commit<A>>, Stopped> {
        self.keep(entry.clone());
        if entry.index <= self.snapshot.index {
            return Ok(None);
        }
        self.grown_bytes += entry_bytes(&entry) as u64;
        if entry.index > self.hard_state.commit {
            return Ok(None);
        }
        self.applied = (entry.index, entry.term);
        self.applied_writes += entry_writes(&entry);
        if entry.get_entry_type() == EntryType::EntryConfChangeV2
            && let Some(logged) = self.raft.apply_change(&entry.data).as_ref().and_then(LoggedChange::of)
        {
            self.members.apply(&logged.change, self.raft.conf_state());
            self.made.push_back(logged.request);
            if self.made.len() > MADE_MAX {
                self.made.pop_front();
            }
        }
        commit(entry, &mut self.members, |_| None).map(Some)
    }

    /// Keeps the end of what is committed, and all that is not.
    fn keep(&mut self, entry: Entry) {
        self.kept_bytes += entry_memory_bytes(&entry);
        self.kept_writes += entry_writes(&entry);
        self.kept.push_back(entry);
        while let Some(oldest) = self.kept.front()
            && oldest.index <= self.hard_state.commit
            && self.policy.may_forget(self.kept_writes - entry_writes(oldest), self.kept_bytes)
        {
            self.kept_bytes -= entry_memory_bytes(oldest);
            self.kept_writes -= entry_writes(oldest);
            self.base = (oldest.index, oldest.term);
            self.kept.pop_front();
        }
    }

    /// Index of the last entry that the service has.
    pub fn applied(&self) -> u64 {
        self.applied.0
    }

    /// Whom to call at a start: the members, and those that the end of the log may yet add or move, which is not known to be
    /// committed.
    pub fn members_in_log(&self) -> Vec<Member> {
        let open = self.kept.iter().filter(|entry| entry.index > self.applied.0);
        members_with(self.members.list(), open)
    }

    /// Ends the way through the log.
    pub(super) fn finish(self, settings: &Settings) -> Resumed {
        let mut applied = metadata(&self.snapshot);
        (applied.index, applied.term) = self.applied;
        applied.set_conf_state(self.raft.conf_state().clone());
        let mut core = Core::new(Start {
            id: self.id,
            base: self.base,
            applied,
            hard_state: self.hard_state,
            entries: self.kept.into(),
            election_ticks: settings.election_ticks,
            seed: settings.seed,
            message_bytes_max: settings.message_bytes_max,
        });
        if self.snapshot.index > FOUNDING.0 {
            core.compact(metadata(&self.snapshot), self.base.0);
        }
        let origin = Origin {
            last: self.snapshot.index,
            last_size_bytes: self.snapshot_bytes,
            grown_bytes: self.grown_bytes,
            applied_writes: self.applied_writes,
            log_base: self.log_base,
        };
        let Resume { boot, members, made, policy, .. } = self;
        Resumed { boot, core, members, made, applied: self.applied.0, origin, policy }
    }
}

/// What a node goes on with.
pub(super) struct Resumed {
    /// The number of this start.
    pub boot: u64,
    pub core: Core,
    pub members: Members,
    /// Changes of the membership that were made behind the snapshot, the newest last.
    pub made: VecDeque<RequestId>,
    /// Index of the last entry that the service has.
    pub applied: u64,
    pub origin: Origin,
    pub policy: Policy,
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use proptest::prelude::*;
    use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2};

    use super::super::core::Turn;
    use super::*;
    use crate::channel::{Change, Writes};
    use crate::cluster::PeerUrl;
    use crate::wal::disk_memory::MemoryDisk;
    use crate::wal::{Append, Options, Wal};

    const ID: u64 = 1;
    const NONCE: u64 = 99;

    fn member(id: u64) -> Member {
        Member { id, urls: vec![PeerUrl::parse(&format!("http://a:{id}")).unwrap()] }
    }

    fn policy(memory_bytes: u64) -> Policy {
        Policy {
            count: 100,
            interval: std::time::Duration::ZERO,
            min_entries: 1,
            log_bytes: 1 << 20,
            catchup_entries: 3,
            catchup_bytes: 4 * memory_bytes,
            memory_bytes,
            keep: 1,
        }
    }

    fn change(kind: ConfChangeType, id: u64, change: Change, index: u64) -> Entry {
        let logged = LoggedChange { request: RequestId { node: 2, boot: 2, counter: index }, change };
        let mut single = ConfChangeSingle { node_id: id, ..ConfChangeSingle::default() };
        single.set_change_type(kind);
        let context = serde_json::to_vec(&logged).unwrap().into();
        let change = ConfChangeV2 { changes: vec![single].into(), context, ..ConfChangeV2::default() };
        let data = protobuf::Message::write_to_bytes(&change).unwrap().into();
        let mut entry = Entry { data, ..Entry::default() };
        entry.set_entry_type(EntryType::EntryConfChangeV2);
        entry
    }

    /// An entry of some kind; of the changes some are impossible, or no changes at all.
    fn entry(kind: u8, number: u64, index: u64) -> Entry {
        let request = RequestId { node: 2, boot: 2, counter: index };
        let id = 1 + number % 5;
        let mut entry = match kind {
            0 => Entry::default(),
            1 => Entry { context: [id.to_le_bytes(), number.to_le_bytes()].concat().into(), ..Entry::default() },
            2 => change(ConfChangeType::AddLearnerNode, id, Change::Add(member(id)), index),
            3 => change(ConfChangeType::AddNode, id, Change::Promote(id), index),
            4 => change(ConfChangeType::RemoveNode, id, Change::Remove(id), index),
            5 => {
                let mut entry = Entry { data: vec![0xff; 3].into(), ..Entry::default() };
                entry.set_entry_type(EntryType::EntryConfChangeV2);
                entry
            }
            6 => {
                let write = |nth: u64| (RequestId { node: 2 + nth, ..request }, vec![kind; nth as usize].into());
                let writes: Vec<_> = (0..2 + number % 3).map(write).collect();
                let (context, data) = Writes::pack(&writes).remove(0).into_entry();
                Entry { context, data, ..Entry::default() }
            }
            _ => Entry {
                data: vec![kind; number as usize % 60].into(),
                context: request.to_bytes().to_vec().into(),
                ..Entry::default()
            },
        };
        (entry.index, entry.term) = (index, 1 + index / 7);
        entry
    }

    /// A log with these entries, as a start finds it.
    fn recovered(entries: &[Entry], commit: u64) -> Recovered {
        let disk = Arc::new(MemoryDisk::new());
        let options = Options { dir: Path::new("/data/wal").into(), segment_bytes: 8 << 10 };
        let founders = [member(1), member(2), member(3)];
        let (mut wal, _) = Wal::create(disk.clone(), &options, &founders, 1, Arc::default()).unwrap();
        let term = entries.last().map_or(1, |last| last.term);
        let hard_state = HardState { term, vote: 1, commit, ..HardState::default() };
        let append = Append { entries: entries.to_vec(), hard_state: Some(hard_state), ..Append::default() };
        wal.append(&[append]).unwrap();
        Wal::open(disk, &options, 2, Arc::default()).unwrap().1
    }

    /// As a node does it that is given the whole log: raft hands out what is committed, in its time.
    fn by_raft(recovered: &Recovered, entries: Vec<Entry>, meta: &Meta) -> (Vec<String>, Meta) {
        let mut core = Core::new(Start {
            id: ID,
            base: FOUNDING,
            applied: metadata(meta),
            hard_state: recovered.hard_state.clone(),
            entries,
            election_ticks: 10,
            seed: 0,
            message_bytes_max: 1 << 20,
        });
        let mut members = Members::new(ID, NONCE, meta, recovered.nonces.clone(), false);
        let Turn { committed, changes, .. } = core.turn();
        let (mut commits, mut changes) = (Vec::new(), changes.into_iter().peekable());
        let mut place = (meta.index, meta.term);
        for entry in committed {
            // The node's members see each change beside what all of them come to, and keep of that who votes.
            if let Some((_, change)) = changes.next_if(|(index, _)| *index == entry.index)
                && let Some(logged) = LoggedChange::of(&change)
            {
                members.apply(&logged.change, core.conf_state());
            }
            place = (entry.index, entry.term);
            commits.push(format!("{:?}", commit::<()>(entry, &mut members, |_| None).unwrap()));
        }
        (commits, members.meta(place.0, place.1, core.conf_state()))
    }

    /// To pass over an entry that another version would apply would split the replicas.
    #[test]
    fn an_entry_of_a_newer_kind_stops_a_start() {
        for context in [1, 23, 28, 57, 28 * 513] {
            let newer = Entry { index: 2, term: 1, context: vec![0; context].into(), ..Entry::default() };
            let founding = Meta::founding(&[member(1)]);
            let mut resume = Resume::new(ID, NONCE, &recovered(&[entry(0, 0, 2)], 2), &founding, 0, policy(1000));
            let taken: Result<Option<Commit<()>>, Stopped> = resume.take(newer);
            assert!(matches!(taken, Err(Stopped::NewerEntry { index: 2 })), "{context} bytes of context");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// The service hears the same, and the members come out the same, as if raft had handed it all out; and raft goes
        /// on with the end of the log as it would with all of it.
        #[test]
        fn a_log_that_is_read_means_what_it_means_to_raft(
            kinds in prop::collection::vec((0..12u8, any::<u64>()), 0..40), snapshot: u64, commit: u64, memory in 0..3000u64,
        ) {
            let entries: Vec<Entry> =
                (2..).zip(&kinds).map(|(index, (kind, number))| entry(*kind, *number, index)).collect();
            let last = 1 + entries.len() as u64;
            let commit = 1 + commit % last;
            let (covered, founding) = (1 + snapshot % commit, Meta::founding(&[member(1), member(2), member(3)]));
            let before = recovered(&entries, covered);
            let meta = by_raft(&before, entries.clone(), &founding).1;
            prop_assert_eq!(meta.index, covered);

            let recovered = recovered(&entries, commit);
            let mut resume = Resume::new(ID, NONCE, &recovered, &meta, 0, policy(memory));
            let mut commits = Vec::new();
            for entry in recovered.entries.read() {
                let commit: Option<Commit<()>> = resume.take(entry.unwrap()).unwrap();
                commits.extend(commit.map(|commit| format!("{commit:?}")));
            }
            let (expected, members) = by_raft(&recovered, entries.clone(), &meta);
            prop_assert_eq!(commits, expected);
            let conf_state = resume.raft.conf_state().clone();
            prop_assert_eq!(resume.members.meta(resume.applied.0, resume.applied.1, &conf_state), members);
            let behind = entries.iter().filter(|entry| entry.index > meta.index);
            prop_assert_eq!(resume.grown_bytes, behind.map(|entry| entry_bytes(entry) as u64).sum::<u64>());

            let kept = resume.kept.len() as u64;
            prop_assert!(resume.kept_bytes <= 4 * memory || kept <= last - commit, "{} bytes kept", resume.kept_bytes);
            let last_three = memory < 1000 || resume.base == FOUNDING || kept >= 3;
            prop_assert!(last_three, "a follower may need them");
            let settings = Settings {
                id: ID,
                cluster: 1,
                nonce: NONCE,
                tick: std::time::Duration::from_millis(100),
                election_ticks: 10,
                seed: 0,
                request_timeout: std::time::Duration::from_secs(5),
                reserve_bytes: 0,
                message_bytes_max: 1 << 20,
            };
            let mut core = resume.finish(&settings).core;
            let at = core.position();
            prop_assert_eq!((at.commit, at.last, core.conf_state()), (commit, last, &conf_state));
            prop_assert!(core.turn().committed.is_empty(), "all of it went to the service before");
            prop_assert_eq!(core.term_at(last), entries.last().map(|entry| entry.term).or(Some(1)));
        }
    }
}
