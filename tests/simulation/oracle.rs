//! What must hold whatever happens, checked while it happens. It listens to what leaves the nodes (votes, entries), to
//! what they publish as committed, to each state after each batch, and to what clients were told; the first breach
//! ends the run. What a node only thinks is its own affair.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{ConfChangeType, ConfChangeV2, Entry, EntryType, Message, MessageType};
use raftkv::channel::{Commit, RequestId};
use raftkv::command::Command;
use raftkv::kv::Written;
use raftkv::store::State;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Index of the snapshot that every founder starts from.
const FOUNDING_INDEX: u64 = 1;

#[derive(Default)]
pub struct Oracle {
    failure: Option<String>,
    /// For whom each member voted, by member and term. It outlives every crash, as a vote must.
    votes: HashMap<(u64, u64), u64>,
    leaders: HashMap<u64, u64>,
    /// Every entry that ever left a leader, by index and term: its hash, and the term before it.
    entries: HashMap<(u64, u64), Sent>,
    /// What is committed, from the first entry on.
    committed: Vec<Committed>,
    /// The next index that each host will publish.
    next: BTreeMap<u64, u64>,
    /// Content and log hash at each index at which any host was looked at.
    hashes: HashMap<u64, (u64, u64)>,
    reference: Reference,
    /// Values of writes that the client was told would never be applied, and of those committed.
    rejected: HashSet<Bytes>,
    applied: HashMap<Bytes, Written>,
    /// Changes of the membership that left a leader, by index and term.
    changes: HashMap<(u64, u64), ConfChangeV2>,
    voters: BTreeSet<u64>,
    /// Index of the entry that made them so.
    voters_since: u64,
    removed: BTreeSet<u64>,
    members: BTreeSet<u64>,
    /// Indices of the changes that took effect.
    changed: BTreeSet<u64>,
    /// IDs whose addition, or removal, was surely refused.
    refused: BTreeSet<u64>,
    stays: BTreeSet<u64>,
}

#[derive(Clone, Copy, PartialEq)]
struct Sent {
    hash: u64,
    /// Term of the entry before it.
    before: u64,
}

struct Committed {
    term: u64,
    /// The least term in which a node was seen to know it committed.
    known_in: u64,
    hash: u64,
    revision: u64,
}

/// The state as it should be: every write once, in log order, with nothing forgotten.
#[derive(Default)]
struct Reference {
    keys: BTreeMap<Bytes, (Bytes, u64)>,
    writes: u64,
    seen: HashSet<RequestId>,
    boots: HashMap<u64, u64>,
}

impl Reference {
    fn apply(&mut self, request: RequestId, command: &Bytes) -> Option<Bytes> {
        let boot = self.boots.entry(request.node).or_insert(request.boot);
        // An older start's process is gone: what it still had on its way is passed over.
        if request.boot < *boot {
            return None;
        }
        *boot = request.boot;
        if !self.seen.insert(request) {
            return None;
        }
        self.writes += 1;
        let Ok(Command::Put { key, value }) = Command::decode(command) else { return None };
        let (key, value) = (command.slice_ref(key), command.slice_ref(value));
        self.keys.insert(key, (value.clone(), self.revision()));
        Some(value)
    }

    fn revision(&self) -> u64 {
        1 + self.writes
    }
}

impl Oracle {
    pub fn fail(&mut self, why: String) {
        self.failure.get_or_insert(why);
    }

    pub fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// A cluster begins.
    pub fn founded(&mut self, voters: impl Iterator<Item = u64>) {
        self.voters = voters.collect();
        self.members = self.voters.clone();
    }

    /// Who votes, as of the last entry known to be committed.
    pub fn voters(&self) -> &BTreeSet<u64> {
        &self.voters
    }

    /// Whether this host knows who votes. One that does not may need the vote of somebody who is gone, to learn it.
    pub fn knows_voters(&self, host: u64) -> bool {
        self.next.get(&host).is_some_and(|next| *next > self.voters_since)
    }

    /// Entries known to be committed.
    pub fn commits(&self) -> usize {
        self.committed.len()
    }

    pub fn elections(&self) -> usize {
        self.leaders.len()
    }

    fn expect(&mut self, holds: bool, why: impl FnOnce() -> String) {
        if !holds {
            self.fail(why());
        }
    }

    /// A message leaves a node: what it says, the node must stand by for ever.
    pub fn sent(&mut self, from: u64, message: &Message) {
        let (term, kind) = (message.term, message.get_msg_type());
        match kind {
            MessageType::MsgRequestVote => self.voted(from, term, from),
            MessageType::MsgRequestVoteResponse if !message.reject => self.voted(from, term, message.to),
            MessageType::MsgAppend => {
                self.leads(from, term);
                let mut before = message.log_term;
                let mut index = message.index;
                self.in_line(from, term, index, before);
                for entry in &message.entries {
                    self.expect(entry.index == index + 1, || {
                        format!("node {from} sends entry {} behind {index}", entry.index)
                    });
                    self.entry(from, entry, before);
                    self.in_line(from, term, entry.index, entry.term);
                    (before, index) = (entry.term, entry.index);
                }
            }
            MessageType::MsgHeartbeat | MessageType::MsgSnapshot => self.leads(from, term),
            _ => {}
        }
    }

    /// Never two votes in a term, whatever crashes lie between.
    fn voted(&mut self, voter: u64, term: u64, candidate: u64) {
        let first = *self.votes.entry((voter, term)).or_insert(candidate);
        self.expect(first == candidate, || format!("{voter} votes for {first} and for {candidate} in term {term}"));
    }

    /// Election safety.
    fn leads(&mut self, leader: u64, term: u64) {
        let first = *self.leaders.entry(term).or_insert(leader);
        self.expect(first == leader, || format!("term {term} has two leaders: {first} and {leader}"));
    }

    /// Log matching: an index and a term name one entry, and all before it.
    fn entry(&mut self, from: u64, entry: &Entry, before: u64) {
        let hash = hash(&entry.context, &entry.data);
        let sent = Sent { hash, before };
        if entry.get_entry_type() == EntryType::EntryConfChangeV2 {
            let mut change = ConfChangeV2::default();
            let read = change.merge_from_bytes(&entry.data);
            self.expect(read.is_ok(), || format!("node {from} sends a change that cannot be read: {read:?}"));
            self.changes.insert((entry.index, entry.term), change);
            // Who votes alone commits it before anybody hears of it.
            self.change(entry.index, entry.term);
        }
        let first = *self.entries.entry((entry.index, entry.term)).or_insert(sent);
        if first != sent {
            self.fail(format!("node {from} sends another entry {} of term {}", entry.index, entry.term));
        }
    }

    /// What a process finds in its log when it starts, behind an entry of the term `before`: log matching holds for that.
    pub fn recovered(&mut self, host: u64, mut before: u64, entries: &[Entry]) {
        for entry in entries {
            let found = Sent { hash: hash(&entry.context, &entry.data), before };
            let differs = self.entries.get(&(entry.index, entry.term)).is_some_and(|sent| *sent != found);
            self.expect(!differs, || {
                format!("host {host} finds another entry {} of term {}, behind term {before}", entry.index, entry.term)
            });
            before = entry.term;
        }
    }

    /// Leader completeness: who leads in a later term than one in which an entry was known to be committed has it. A
    /// late election of an old term is legal, so the terms of commits are compared, and not the times.
    fn in_line(&mut self, leader: u64, term: u64, index: u64, entry_term: u64) {
        let Some(committed) = self.at(index) else { return };
        let holds = committed.known_in >= term || committed.term == entry_term;
        let (expected, known_in) = (committed.term, committed.known_in);
        self.expect(holds, || {
            format!(
                "leader {leader} of term {term} has an entry {index} of term {entry_term}, but one of term {expected} was \
                 committed by term {known_in}"
            )
        });
    }

    fn at(&self, index: u64) -> Option<&Committed> {
        self.committed.get(index.checked_sub(FOUNDING_INDEX + 1)? as usize)
    }

    /// A process starts from a snapshot at this index, and will publish what is behind it.
    pub fn starts(&mut self, host: u64, snapshot: u64) {
        self.next.insert(host, snapshot + 1);
    }

    /// A node publishes: state machine safety, in order and without a gap. `term` is the one that it knows of.
    pub fn committed<A>(&mut self, host: u64, term: u64, commit: &Commit<A>) {
        let (index, entry_term, what) = match commit {
            Commit::Apply { index, term, writes, .. } => (*index, *term, Some(writes)),
            Commit::Skip { index, term } => (*index, *term, None),
            Commit::Restore { index, .. } => {
                let next = self.next[&host];
                self.expect(*index >= next, || format!("host {host} is restored to {index}, but had {next}"));
                self.expect(*index <= self.last(), || format!("host {host} is restored to {index}: never committed"));
                self.next.insert(host, index + 1);
                return;
            }
            Commit::Barrier { .. } | Commit::Snapshot { .. } => return,
        };
        let next = self.next.insert(host, index + 1).expect("it started");
        self.expect(index == next, || format!("host {host} publishes entry {index} instead of {next}"));
        let hash = what.map_or(0, |writes| {
            let (context, data) = writes.clone().into_entry();
            hash(&context, &data)
        });
        if index > self.last() {
            self.expect(index == self.last() + 1, || format!("entry {index} is committed before {}", index - 1));
            for (request, command) in what.iter().flat_map(|writes| writes.iter()) {
                self.apply((index, entry_term), request, &Bytes::copy_from_slice(command));
            }
            let revision = self.reference.revision();
            self.committed.push(Committed { term: entry_term, known_in: term.max(entry_term), hash, revision });
            self.change(index, entry_term);
            return;
        }
        let same = {
            let at = (index - FOUNDING_INDEX - 1) as usize;
            let known = &mut self.committed[at];
            known.known_in = known.known_in.min(term.max(entry_term));
            (known.term, known.hash) == (entry_term, hash)
        };
        self.expect(same, || format!("host {host} has another entry {index} committed, of term {entry_term}"));
    }

    /// A change of the members that has left a leader and is committed takes effect, once.
    fn change(&mut self, index: u64, term: u64) {
        let committed = self.at(index).is_some_and(|committed| committed.term == term);
        let Some(change) = self.changes.get(&(index, term)).cloned() else { return };
        if !committed || !self.changed.insert(index) {
            return;
        }
        for single in &change.changes {
            let (id, kind) = (single.node_id, single.get_change_type());
            self.voters_since = index;
            if kind == ConfChangeType::RemoveNode {
                self.voters.remove(&id);
                self.members.remove(&id);
                self.removed.insert(id);
                let stays = self.stays.contains(&id);
                self.expect(!stays, || {
                    format!("entry {index} removes member {id}, and who asked was told that it stays")
                });
                continue;
            }
            // Its votes are forgotten with its data, and old messages still name it.
            let (removed, refused) = (self.removed.contains(&id), self.refused.contains(&id));
            self.expect(!removed, || format!("entry {index} adds member {id}, which was removed"));
            self.expect(!refused, || {
                format!("entry {index} adds member {id}, and who asked was told that it does not")
            });
            self.members.insert(id);
            if kind == ConfChangeType::AddNode {
                self.voters.insert(id);
            } else {
                self.voters.remove(&id);
            }
        }
    }

    /// Members, those that learn included, as of the last entry known to be committed.
    pub fn members(&self) -> &BTreeSet<u64> {
        &self.members
    }

    /// Somebody was told that a member is surely not added. Its ID is asked for only once.
    pub fn not_added(&mut self, id: u64) {
        let was_added = self.members.contains(&id) || self.removed.contains(&id);
        self.expect(!was_added, || format!("member {id} was added, and who asked was told that it is not"));
        self.refused.insert(id);
    }

    /// Somebody was told that a member surely stays, and nobody else asked for its removal.
    pub fn not_removed(&mut self, id: u64) {
        let was_removed = self.removed.contains(&id);
        self.expect(!was_removed, || format!("member {id} was removed, and who asked was told that it stays"));
        self.stays.insert(id);
    }

    /// Its removal is asked for.
    pub fn may_leave(&mut self, id: u64) {
        self.stays.remove(&id);
    }

    /// Index of the last entry known to be committed.
    pub fn last(&self) -> u64 {
        FOUNDING_INDEX + self.committed.len() as u64
    }

    fn apply(&mut self, (index, term): (u64, u64), request: RequestId, command: &Bytes) {
        let Some(value) = self.reference.apply(request, command) else { return };
        self.expect(!self.rejected.contains(&value), || {
            format!("entry {index} writes {:?}, and its client was told that it is not applied", text(&value))
        });
        let written = Written { index, term, revision: self.reference.revision() };
        let before = self.applied.insert(value.clone(), written);
        self.expect(before.is_none(), || format!("{:?} is applied as {before:?} and as {written:?}", text(&value)));
    }

    /// A state after a batch: equal to all others at that index, and no write more or fewer than there should be.
    pub fn applied(&mut self, host: u64, state: &State) {
        let index = state.applied();
        let found = (state.content_hash(), state.log_hash());
        let first = *self.hashes.entry(index).or_insert(found);
        self.expect(first == found, || format!("host {host} has another state at entry {index}"));
        if index > FOUNDING_INDEX {
            let expected = self.at(index).map(|committed| committed.revision);
            self.expect(expected == Some(state.revision()), || {
                format!("host {host} has revision {} at entry {index} instead of {expected:?}", state.revision())
            });
        }
        if index == self.last() {
            let keys = &self.reference.keys;
            let same = state.len() == keys.len()
                && keys.iter().all(|(key, (value, revision))| {
                    state
                        .get(key)
                        .is_some_and(|found| (found.value(), found.revisions().modify) == (&value[..], *revision))
                });
            self.expect(same, || format!("host {host} holds other keys than it should at entry {index}"));
        }
    }

    /// A client was told that its write is done.
    pub fn acknowledged(&mut self, value: &Bytes, written: Written) {
        let applied = self.applied.get(value).copied();
        self.expect(applied == Some(written), || {
            format!("{:?} is acknowledged as {written:?}, and is applied as {applied:?}", text(value))
        });
    }

    /// A client was told that its write is not applied and never will be.
    pub fn rejected(&mut self, value: Bytes) {
        let at = self.applied.get(&value).copied();
        self.expect(at.is_none(), || format!("{:?} is rejected, but was applied at {at:?}", text(&value)));
        self.rejected.insert(value);
    }
}

fn hash(context: &[u8], data: &[u8]) -> u64 {
    xxh3_64_with_seed(data, xxh3_64_with_seed(context, 0))
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).into_owned()
}
