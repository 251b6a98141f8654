//! Raft itself, wrapped so that the order of effects is kept: no message leaves before the state that it relies on is
//! durable. Pure: no clock, no I/O, no channel; the node's task drives it, and so can a simulator.
//!
//! One turn of the caller: feed it ([`Core::tick`], [`Core::step`], [`Core::propose`], [`Core::persisted`] …), then
//! take [`Core::turn`] and carry out what it asks for. Writes are carried out in the order given; each is reported
//! back by its number once durable.

use std::collections::VecDeque;

use protobuf::Message as _;
use raft::eraftpb::{
    ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType, HardState, Message, MessageType, SnapshotMetadata,
};
use raft::{Config, ProgressState, RawNode, ReadOnlyOption, ReadState, SnapshotStatus, StateRole};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::logger;
use super::mirror::Mirror;
use crate::channel::{Progress, Rejection, RequestId, Role, Writes};

/// Index and term of the synthetic snapshot that every founder starts from.
pub const FOUNDING: (u64, u64) = (1, 1);

/// Bytes of command that may be in the leader's log and not committed.
const UNCOMMITTED_BYTES_MAX: u64 = 64 << 20;

/// What a node knows of its log when it starts.
#[derive(Debug)]
pub struct Start {
    pub id: u64,
    /// Index and term of the entry before the first in `entries`.
    pub base: (u64, u64),
    /// What is applied already, and who the members are there.
    pub applied: SnapshotMetadata,
    pub hard_state: HardState,
    /// Contiguous, up to what is applied at least.
    pub entries: Vec<Entry>,
    pub election_ticks: usize,
    /// Of the random part of election time-outs.
    pub seed: u64,
    /// Of the entries in one message, unless one entry has more.
    pub message_bytes_max: u64,
}

/// One thing to make durable: a received snapshot that the log starts anew behind, entries that replace what they
/// conflict with, then the hard state.
#[derive(Debug)]
pub struct Write {
    /// Rises from write to write.
    pub number: u64,
    pub snapshot: Option<(u64, u64)>,
    pub entries: Vec<Entry>,
    pub hard_state: Option<HardState>,
}

/// What a turn asks the caller to do.
#[derive(Debug, Default)]
pub struct Turn {
    /// To send now.
    pub messages: Vec<Message>,
    /// To make durable, in order.
    pub writes: Vec<Write>,
    /// A received snapshot that is durable now: what follows is committed behind it.
    pub restored: Option<SnapshotMetadata>,
    /// Committed and durable here, in log order.
    pub committed: Vec<Entry>,
    /// The changes of the membership among `committed` that took effect, by index.
    pub changes: Vec<(u64, ConfChangeV2)>,
    /// Reads that may be served once the index is applied.
    pub reads: Vec<ReadState>,
}

/// Where the log and the election stand, for checks and reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    pub id: u64,
    pub term: u64,
    pub leader: u64,
    pub commit: u64,
    pub last: u64,
}

/// Why a change of the membership cannot be proposed now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotProposed {
    /// It is not for this node to say.
    NotLeader,
    /// Another change is not applied yet.
    ChangePending,
}

/// The raft state machine of one node.
pub struct Core {
    raw: RawNode<Mirror>,
    election_ticks: usize,
    /// Of this node's election time-outs.
    seed: u64,
    /// Messages that wait until the write of the given number is durable.
    held: VecDeque<(u64, Vec<Message>)>,
    /// The last write handed out, and the last reported durable.
    written: u64,
    persisted: u64,
    /// Index of the last entry handed out, and the last write that replaced others, by a snapshot too.
    last_written: u64,
    replaced: u64,
    /// Term and vote as last written, and the write that changed them.
    vote: (u64, u64),
    voted: u64,
    /// The hard state changed since the last write. Where only the commit index did, it may be lost, so it rides in
    /// the next write.
    unwritten_state: bool,
    /// A received snapshot that is being made durable, and the number of that write.
    restoring: Option<(u64, SnapshotMetadata)>,
}

impl Core {
    /// Starts from what recovery found.
    pub fn new(start: Start) -> Self {
        let Start { id, base, applied, mut hard_state, entries, election_ticks, seed, message_bytes_max } = start;
        hard_state.term = hard_state.term.max(applied.term);
        hard_state.commit = hard_state.commit.max(applied.index);
        let config = Config {
            id,
            election_tick: election_ticks,
            heartbeat_tick: 1,
            applied: applied.index,
            check_quorum: true,
            pre_vote: true,
            read_only_option: ReadOnlyOption::Safe,
            max_size_per_msg: message_bytes_max,
            max_inflight_msgs: 256,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: 8 << 20,
            ..Config::default()
        };
        let last_written = base.0 + entries.len() as u64;
        let mirror = Mirror::new(base, applied.get_conf_state().clone(), hard_state, entries);
        let vote = (mirror.hard_state().term, mirror.hard_state().vote);
        let seed = xxh3_64_with_seed(&id.to_le_bytes(), seed);
        let raw = RawNode::new(&config, mirror, &logger::into_tracing()).expect("configuration and log are sane");
        Core {
            raw,
            election_ticks,
            seed,
            held: VecDeque::new(),
            written: 0,
            persisted: 0,
            last_written,
            replaced: 0,
            vote,
            voted: 0,
            unwritten_state: false,
            restoring: None,
        }
    }

    pub fn position(&self) -> Position {
        let raft = &self.raw.raft;
        Position {
            id: raft.id,
            term: raft.term,
            leader: raft.leader_id,
            commit: raft.raft_log.committed,
            last: raft.raft_log.last_index(),
        }
    }

    pub fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    pub fn role(&self) -> Role {
        match self.raw.raft.state {
            StateRole::Leader => Role::Leader,
            StateRole::Candidate | StateRole::PreCandidate => Role::Candidate,
            StateRole::Follower if self.raw.raft.promotable() => Role::Follower,
            StateRole::Follower => Role::Learner,
        }
    }

    /// Who votes and who learns, as of the last entry applied.
    pub fn conf_state(&self) -> &ConfState {
        self.raw.store().conf_state()
    }

    pub fn is_member(&self, id: u64) -> bool {
        self.raw.raft.prs().get(id).is_some()
    }

    /// The term of the entry at `index`, as far as it is held.
    pub fn term_at(&self, index: u64) -> Option<u64> {
        let log = &self.raw.raft.raft_log;
        (log.first_index() - 1 <= index && index <= log.last_index()).then(|| log.term(index).ok()).flatten()
    }

    /// A follower's log, as far as this node leads and knows it.
    pub fn progress(&self, id: u64) -> Option<Progress> {
        let progress = self.raw.raft.prs().get(id).filter(|_| self.is_leader())?;
        Some(Progress {
            matched: progress.matched,
            next: progress.next_idx,
            state: match progress.state {
                ProgressState::Probe => "probe",
                ProgressState::Replicate => "replicate",
                ProgressState::Snapshot => "snapshot",
            },
            active: progress.recent_active || id == self.raw.raft.id,
        })
    }

    /// Whether this node's own vote wins an election: it votes alone, on both sides of a joint configuration.
    fn elects_itself(&self) -> bool {
        let (id, members) = (self.raw.raft.id, self.conf_state());
        members.voters.iter().chain(&members.voters_outgoing).all(|voter| *voter == id)
    }

    /// Whether every entry of the log is durable, those included that no turn has handed out yet.
    pub fn log_is_durable(&self) -> bool {
        let log = &self.raw.raft.raft_log;
        log.persisted == log.last_index()
    }

    pub fn tick(&mut self) {
        // A lone voter wins the election that it calls, and raft asserts that a winner's log is durable.
        let lone_and_behind = self.elects_itself() && !self.log_is_durable();
        // Before an election raft reads what it has not applied, and a snapshot on its way in took the place of that.
        if self.is_leader() || !(lone_and_behind || self.is_restoring()) {
            self.settle_election_timeout();
            self.raw.tick();
        }
    }

    /// Raft draws its election time-outs from the thread's randomness, and would do nothing twice alike. Each draw is
    /// replaced, before it counts, by one that follows from seed, node and term: between one and two times the least,
    /// as in the Raft paper (§5.2).
    fn settle_election_timeout(&mut self) {
        let raft = &mut self.raw.raft;
        let draw = xxh3_64_with_seed(&raft.term.to_le_bytes(), self.seed) % self.election_ticks as u64;
        raft.set_randomized_election_timeout(self.election_ticks + draw as usize);
    }

    /// The leader's process is gone, and this node owes it no silence: it hears at once whoever asks for its vote, and its own
    /// time-out has only the random part to run.
    pub fn end_lease(&mut self) {
        let raft = &mut self.raw.raft;
        if raft.state == StateRole::Follower {
            raft.election_elapsed = raft.election_elapsed.max(self.election_ticks);
        }
    }

    /// Stands for election now instead of waiting for a time-out.
    pub fn campaign(&mut self) {
        if self.persisted == self.written
            && self.log_is_durable()
            && let Err(error) = self.raw.campaign()
        {
            tracing::debug!(%error, "campaign refused");
        }
    }

    /// Takes a message that `admit` let through.
    pub fn step(&mut self, message: Message) {
        if let Err(error) = self.raw.step(message) {
            tracing::debug!(%error, "message ignored by raft");
        }
    }

    /// Appends an entry for each of these, if this node leads: all of them or none. Returns term and index of the
    /// first. `NoLeader` means only that it is not for this node to say.
    pub fn propose(&mut self, writes: Vec<Writes>) -> Result<(u64, u64), Rejection> {
        let raft = &self.raw.raft;
        if !self.is_leader() || raft.lead_transferee.is_some() {
            return Err(Rejection::NoLeader);
        }
        let first = (raft.term, raft.raft_log.last_index() + 1);
        if writes.is_empty() {
            return Ok(first);
        }
        let entries = writes.into_iter().map(|writes| {
            let (context, data) = writes.into_entry();
            Entry { context, data, ..Entry::default() }
        });
        let mut message = Message { from: raft.id, entries: entries.collect(), ..Message::default() };
        message.set_msg_type(MessageType::MsgPropose);
        // What a leader drops was surely not appended: too much is uncommitted already.
        self.raw.step(message).map(|()| first).map_err(|_| Rejection::Busy)
    }

    /// Proposes a change of the membership, if this node leads and no other change is under way: raft would take it and
    /// log it as an empty entry. Returns term and index.
    pub fn propose_change(&mut self, change: ConfChangeV2) -> Result<(u64, u64), NotProposed> {
        let raft = &self.raw.raft;
        if !self.is_leader() || raft.lead_transferee.is_some() {
            return Err(NotProposed::NotLeader);
        }
        if raft.has_pending_conf() {
            return Err(NotProposed::ChangePending);
        }
        let position = (raft.term, raft.raft_log.last_index() + 1);
        self.raw.propose_conf_change(Vec::new(), change).map(|()| position).map_err(|_| NotProposed::ChangePending)
    }

    /// Whether a change of the membership may be proposed.
    pub fn may_change(&self) -> bool {
        self.is_leader() && self.raw.raft.lead_transferee.is_none() && !self.raw.raft.has_pending_conf()
    }

    /// There is a file of a snapshot now; the log up to `keep_from` is no longer needed.
    pub fn compact(&mut self, snapshot: SnapshotMetadata, keep_from: u64) {
        self.raw.mut_store().set_snapshot(snapshot);
        self.raw.mut_store().compact(keep_from);
    }

    /// Whether a follower waits for a snapshot newer than the last; asking clears it.
    pub fn take_snapshot_wanted(&self) -> bool {
        self.raw.store().take_snapshot_wanted()
    }

    /// Index of the last entry that is no longer held.
    pub fn forgotten(&self) -> u64 {
        self.raw.store().start()
    }

    /// What the log takes in memory.
    pub fn log_memory_bytes(&self) -> u64 {
        self.raw.store().memory_bytes()
    }

    /// Forgets entries, the oldest first, none above `index`, while `may_forget` says so of the oldest: it is told how many writes
    /// are behind it, and what all that is held takes in memory. What is forgotten is applied.
    pub fn shrink(&mut self, index: u64, may_forget: impl Fn(u64, u64) -> bool) {
        self.raw.mut_store().shrink(index, may_forget);
    }

    /// Bytes of entries that were appended to the log since the start.
    pub fn appended_bytes(&self) -> u64 {
        self.raw.store().appended_bytes()
    }

    /// The lowest index, but none below `from`, behind which the entries up to `index` hold no more than so many writes, and take
    /// no more than so many bytes in the log.
    pub fn reach_back(&self, index: u64, from: u64, writes: u64, bytes: u64) -> u64 {
        self.raw.store().reach_back(index, from, writes, bytes)
    }

    /// Up to where a follower's log goes, or the snapshot that it is being sent; only at the leader.
    pub fn reached(&self, id: u64) -> Option<u64> {
        let progress = self.raw.raft.prs().get(id).filter(|_| self.is_leader())?;
        Some(progress.matched.max(progress.pending_snapshot))
    }

    /// Whether a snapshot is on its way to this follower.
    pub fn is_sent_a_snapshot(&self, id: u64) -> bool {
        self.raw.raft.prs().get(id).is_some_and(|progress| progress.pending_snapshot > 0)
    }

    /// The newest snapshot does not arrive anywhere: the next follower that needs one has a new one made.
    pub fn forget_snapshot(&mut self) {
        self.raw.mut_store().forget_snapshot();
    }

    /// Whether a received snapshot is being made durable, or will be from the next turn on.
    pub fn is_restoring(&self) -> bool {
        self.restoring.is_some() || self.raw.raft.raft_log.unstable.snapshot.is_some()
    }

    /// Tells the members, through the log, which data directory a member has.
    pub fn propose_nonce(&mut self, member: u64, nonce: u64) {
        let context = [member.to_le_bytes(), nonce.to_le_bytes()].concat();
        if let Err(error) = self.raw.propose(context, Vec::new()) {
            tracing::debug!(%error, "nonce not proposed");
        }
    }

    /// How the transfer of a snapshot ended; raft waits for it.
    pub fn report_snapshot(&mut self, id: u64, delivered: bool) {
        if self.is_member(id) {
            let status = if delivered { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
            self.raw.report_snapshot(id, status);
        }
    }

    /// Asks the leader for its commit index. False where raft would drop the question in silence: there is no leader,
    /// or it has not committed in its term yet.
    pub fn read_index(&mut self, context: RequestId) -> bool {
        let raft = &self.raw.raft;
        if raft.leader_id == raft::INVALID_ID || (self.is_leader() && !raft.commit_to_current_term()) {
            return false;
        }
        self.raw.read_index(context.to_bytes().to_vec());
        true
    }

    pub fn report_unreachable(&mut self, id: u64) {
        if self.raw.raft.prs().get(id).is_some() {
            self.raw.report_unreachable(id);
        }
    }

    /// Starts to hand leadership to the follower that is closest behind. False if there is none.
    pub fn hand_over(&mut self) -> bool {
        let raft = &self.raw.raft;
        if !self.is_leader() {
            return false;
        }
        let next = raft
            .prs()
            .iter()
            .filter(|(id, progress)| {
                **id != raft.id && progress.recent_active && raft.prs().conf().voters().contains(**id)
            })
            .max_by_key(|(_, progress)| progress.matched)
            .map(|(id, _)| *id);
        if let Some(next) = next {
            self.raw.transfer_leader(next);
        }
        next.is_some()
    }

    /// The write of this number, and all before it, are durable.
    pub fn persisted(&mut self, number: u64) {
        assert!(self.persisted <= number && number <= self.written, "write {number} of {}", self.written);
        // Raft knows entries by index and term. Where one leader replaced some and the next brought the same ones back, it
        // would take them for durable with the first write, which the second is about to undo.
        if number < self.replaced {
            return;
        }
        self.persisted = number;
        self.raw.on_persist_ready(number);
        if let Some((_, snapshot)) = self.restoring.as_ref().filter(|(write, _)| *write <= number) {
            self.raw.advance_apply_to(snapshot.index);
        }
    }

    /// All that follows from what was fed in since the last turn.
    pub fn turn(&mut self) -> Turn {
        let mut turn = Turn::default();
        self.raw.mut_store().sweep();
        self.release(&mut turn);
        if let Some((_, snapshot)) = self.restoring.take_if(|(write, _)| *write <= self.persisted) {
            turn.restored = Some(snapshot);
        }
        while self.raw.has_ready() {
            let mut ready = self.raw.ready();
            let number = ready.number();
            let mut snapshot = None;
            if !ready.snapshot().is_empty() {
                let metadata = ready.snapshot().get_metadata().clone();
                self.raw.mut_store().restore(&metadata);
                (self.last_written, self.replaced) = (metadata.index, number);
                snapshot = Some((metadata.index, metadata.term));
                self.restoring = Some((number, metadata));
            }
            let entries = ready.take_entries();
            if let (Some(first), Some(last)) = (entries.first(), entries.last()) {
                if first.index <= self.last_written {
                    self.replaced = number;
                }
                self.last_written = last.index;
                self.raw.mut_store().append(entries.clone());
            }
            if let Some(hard_state) = ready.hs() {
                self.raw.mut_store().set_hard_state(hard_state.clone());
                self.unwritten_state = true;
            }
            if ready.must_sync() {
                let hard_state = self.raw.store().hard_state().clone();
                if self.vote != (hard_state.term, hard_state.vote) {
                    self.vote = (hard_state.term, hard_state.vote);
                    self.voted = number;
                }
                self.written = number;
                let hard_state = std::mem::take(&mut self.unwritten_state).then_some(hard_state);
                turn.writes.push(Write { number, snapshot, entries, hard_state });
            }
            let committed = ready.take_committed_entries();
            turn.reads.append(&mut ready.take_read_states());
            // A leader's messages rely on its term and vote only; everybody else's on all that was written before.
            self.hold(self.voted, ready.take_messages(), &mut turn);
            self.hold(self.written, ready.take_persisted_messages(), &mut turn);
            self.raw.advance_append_async(ready);
            let changes = turn.changes.len();
            self.take_committed(committed, &mut turn);
            // Elections go by the changes known to be committed. Members that forget in a blackout that one is would ask
            // for votes by the configuration before it, and perhaps wait for a member that is gone for good.
            if turn.changes.len() > changes
                && let Some(hard_state) = self.unwritten()
            {
                self.written = number;
                turn.writes.push(Write { number, snapshot: None, entries: Vec::new(), hard_state: Some(hard_state) });
            }
        }
        turn
    }

    /// What has not been written although it could be: only a commit index, on the way out.
    pub fn unwritten(&mut self) -> Option<HardState> {
        std::mem::take(&mut self.unwritten_state).then(|| self.raw.store().hard_state().clone())
    }

    /// Passes on what is committed. Changes of the membership take effect here, before raft is told that they are
    /// applied.
    fn take_committed(&mut self, committed: Vec<Entry>, turn: &mut Turn) {
        let Some(last) = committed.last().map(|entry| entry.index) else {
            return;
        };
        for entry in &committed {
            if entry.get_entry_type() == EntryType::EntryConfChangeV2
                && let Some(change) = self.apply_change(&entry.data)
            {
                turn.changes.push((entry.index, change));
            }
        }
        extend(&mut turn.committed, committed);
        self.raw.advance_apply_to(last);
    }

    /// Every node finds the same change impossible, and passes it alike.
    pub(super) fn apply_change(&mut self, data: &[u8]) -> Option<ConfChangeV2> {
        let mut change = ConfChangeV2::default();
        if let Err(error) = change.merge_from_bytes(data) {
            tracing::error!(%error, "a membership change cannot be read, and is passed over");
            return None;
        }
        let id = self.raw.raft.id;
        let removes = |id| {
            let gone = |single: &raft::eraftpb::ConfChangeSingle| {
                single.get_change_type() == ConfChangeType::RemoveNode && single.node_id == id
            };
            change.changes.iter().any(gone)
        };
        if self.is_leader() && removes(id) {
            // Leadership should have moved before. A leader that applies its own removal would lead on for ever.
            let term = self.raw.raft.term;
            self.raw.raft.become_follower(term, raft::INVALID_ID);
        }
        match self.raw.apply_conf_change(&change) {
            Ok(conf_state) => {
                self.raw.mut_store().set_conf_state(conf_state);
                Some(change)
            }
            Err(error) => {
                tracing::error!(%error, "an impossible membership change is passed over");
                None
            }
        }
    }

    fn hold(&mut self, until: u64, messages: Vec<Message>, turn: &mut Turn) {
        if messages.is_empty() {
            return;
        }
        if until <= self.persisted {
            extend(&mut turn.messages, messages);
        } else {
            self.held.push_back((until, messages));
        }
    }

    fn release(&mut self, turn: &mut Turn) {
        let persisted = self.persisted;
        // Not sorted: a leader's messages wait for its vote only.
        self.held.retain_mut(|(until, messages)| {
            let due = *until <= persisted;
            if due {
                extend(&mut turn.messages, std::mem::take(messages));
            }
            !due
        });
    }
}

/// Appends; what comes first keeps its allocation.
fn extend<T>(all: &mut Vec<T>, more: Vec<T>) {
    if all.is_empty() {
        *all = more;
    } else {
        all.extend(more);
    }
}

/// The synthetic snapshot that every founder starts from.
#[cfg(test)]
pub fn founding(voters: &[u64], learners: &[u64]) -> SnapshotMetadata {
    let mut snapshot = SnapshotMetadata { index: FOUNDING.0, term: FOUNDING.1, ..SnapshotMetadata::default() };
    snapshot.set_conf_state((voters.to_vec(), learners.to_vec()).into());
    snapshot
}

#[cfg(test)]
mod tests;
