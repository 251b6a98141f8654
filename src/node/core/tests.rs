//! A hostile world for a few cores: messages are lost, repeated and reordered, disks are slow, and power fails.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::node::admit::admit;

fn request(counter: u64) -> RequestId {
    RequestId { node: 1, boot: 1, counter }
}

/// A node on a disk that keeps only what was reported durable.
struct Machine {
    core: Core,
    disk: Disk,
    /// Written and not durable.
    cache: VecDeque<Write>,
    committed: Vec<Entry>,
}

#[derive(Clone, Default)]
struct Disk {
    hard_state: HardState,
    entries: Vec<Entry>,
}

impl Disk {
    fn write(&mut self, write: Write) {
        if let Some(first) = write.entries.first() {
            self.entries.retain(|entry| entry.index < first.index);
            self.entries.extend(write.entries);
        }
        if let Some(hard_state) = write.hard_state {
            self.hard_state = hard_state;
        }
    }

    fn start(&self, id: u64, voters: &[u64]) -> Core {
        self.start_behind(id, founding(voters, &[]))
    }

    fn start_behind(&self, id: u64, snapshot: SnapshotMetadata) -> Core {
        let Disk { hard_state, entries } = self.clone();
        Core::new(Start {
            id,
            base: FOUNDING,
            applied: snapshot,
            hard_state,
            entries,
            election_ticks: 10,
            seed: 7,
            message_bytes_max: 1 << 20,
        })
    }
}

/// A cluster in a hostile world, driven by a list of choices.
struct World {
    voters: Vec<u64>,
    machines: BTreeMap<u64, Machine>,
    network: Vec<Message>,
    proposed: u64,
    /// Entries that some node has seen committed, by index.
    agreed: BTreeMap<u64, (u64, Bytes)>,
    leaders: BTreeMap<u64, u64>,
    votes: BTreeMap<(u64, u64), u64>,
}

impl World {
    fn new(count: u64) -> Self {
        let voters: Vec<u64> = (1..=count).collect();
        let machine = |id| Machine {
            core: Disk::default().start(id, &voters),
            disk: Disk::default(),
            cache: VecDeque::new(),
            committed: Vec::new(),
        };
        World {
            machines: voters.iter().map(|id| (*id, machine(*id))).collect(),
            voters,
            network: Vec::new(),
            proposed: 0,
            agreed: BTreeMap::new(),
            leaders: BTreeMap::new(),
            votes: BTreeMap::new(),
        }
    }

    fn act(&mut self, what: u8, which: usize) {
        let id = self.voters[which % self.voters.len()];
        match what {
            // Most of the time messages arrive, in any order, sometimes twice, sometimes not at all.
            0..=119 | 240..=243 if !self.network.is_empty() => {
                let at = which % self.network.len();
                let message = if what < 120 { self.network.swap_remove(at) } else { self.network[at].clone() };
                self.deliver(message);
            }
            120..=124 if !self.network.is_empty() => {
                self.network.swap_remove(which % self.network.len());
            }
            125..=179 => self.persist(id),
            180..=209 => self.machine(id).core.tick(),
            210..=234 => {
                self.proposed += 1;
                let proposal = (request(self.proposed), Bytes::from(self.proposed.to_string()));
                self.machine(id).core.propose(Writes::pack(&[proposal])).ok();
            }
            235..=237 => self.machine(id).core.campaign(),
            238..=239 => self.crash(id),
            _ => {}
        }
        self.turn(id);
    }

    fn machine(&mut self, id: u64) -> &mut Machine {
        self.machines.get_mut(&id).unwrap()
    }

    fn deliver(&mut self, message: Message) {
        let id = message.to;
        let core = &mut self.machine(id).core;
        if admit(&message, core) == Ok(()) {
            core.step(message);
        }
        self.turn(id);
    }

    fn persist(&mut self, id: u64) {
        let machine = self.machine(id);
        if let Some(write) = machine.cache.pop_front() {
            let number = write.number;
            machine.disk.write(write);
            machine.core.persisted(number);
        }
    }

    /// Power is lost: what was not durable is gone.
    fn crash(&mut self, id: u64) {
        let voters = self.voters.clone();
        let machine = self.machine(id);
        machine.cache.clear();
        machine.committed.clear();
        machine.core = machine.disk.start(id, &voters);
    }

    fn turn(&mut self, id: u64) {
        let machine = self.machines.get_mut(&id).unwrap();
        let turn = machine.core.turn();
        machine.cache.extend(turn.writes);
        for entry in &turn.committed {
            assert!(machine.disk.entries.contains(entry), "committed here before it is durable here");
            let agreed = self.agreed.entry(entry.index).or_insert_with(|| (entry.term, entry.data.clone()));
            assert_eq!(*agreed, (entry.term, entry.data.clone()), "two nodes committed different entries");
            assert_eq!(entry.index, machine.committed.last().map_or(FOUNDING.0, |last| last.index) + 1);
            machine.committed.push(entry.clone());
        }
        if machine.core.is_leader() {
            let term = machine.core.position().term;
            assert_eq!(*self.leaders.entry(term).or_insert(id), id, "two leaders in term {term}");
        }
        for message in &turn.messages {
            check_durable(message, &machine.disk);
            if message.get_msg_type() == MessageType::MsgRequestVoteResponse && !message.reject {
                let vote = *self.votes.entry((id, message.term)).or_insert(message.to);
                assert_eq!(vote, message.to, "node {id} voted twice in term {}", message.term);
            }
        }
        self.network.extend(turn.messages);
    }

    /// The world turns kind: everything arrives, every disk is fast.
    fn settle(&mut self) {
        for _ in 0..200 {
            for id in self.voters.clone() {
                self.machine(id).core.tick();
                self.turn(id);
            }
            while !self.network.is_empty() || self.machines.values().any(|machine| !machine.cache.is_empty()) {
                for message in std::mem::take(&mut self.network) {
                    self.deliver(message);
                }
                for id in self.voters.clone() {
                    self.persist(id);
                    self.turn(id);
                }
            }
        }
    }
}

/// Nothing leaves a node before the state that it relies on is durable.
fn check_durable(message: &Message, disk: &Disk) {
    use MessageType::*;
    let kind = message.get_msg_type();
    let promises = !matches!(kind, MsgRequestPreVote | MsgRequestPreVoteResponse | MsgReadIndex);
    assert!(!promises || message.term <= disk.hard_state.term.max(FOUNDING.1), "{kind:?} of a term not durable");
    match kind {
        MsgRequestVoteResponse if !message.reject => assert_eq!(disk.hard_state.vote, message.to),
        MsgRequestVote => assert_eq!(disk.hard_state.vote, message.from),
        MsgAppendResponse if !message.reject => {
            let last = disk.entries.last().map_or(FOUNDING.0, |entry| entry.index);
            assert!(message.index <= last, "acknowledged {} of {last} durable entries", message.index);
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Lost, repeated and reordered messages, slow disks and crashes that lose all that was not synced: no two
    /// leaders in a term, no vote twice, no acknowledgement ahead of the disk, no two histories; and when the
    /// world turns kind, the cluster goes on with everything that was ever committed.
    #[test]
    fn nothing_is_promised_before_it_is_durable(
        count in 1u64..=5,
        choices in prop::collection::vec((any::<u8>(), any::<usize>()), 100..1500),
    ) {
        let mut world = World::new(count);
        for (what, which) in choices {
            world.act(what, which);
        }
        world.settle();
        let leaders: Vec<u64> = world.voters.iter().copied().filter(|id| world.machines[id].core.is_leader()).collect();
        prop_assert_eq!(leaders.len(), 1, "one leader in the end");
        world.proposed += 1;
        let last = request(world.proposed);
        world.machine(leaders[0]).core.propose(Writes::pack(&[(last, Bytes::from_static(b"last"))])).unwrap();
        world.settle();
        let histories: BTreeSet<Vec<u64>> =
            world.machines.values().map(|machine| machine.committed.iter().map(|entry| entry.term).collect()).collect();
        prop_assert_eq!(histories.len(), 1, "equal logs");
        prop_assert_eq!(&world.machines[&1].committed.last().unwrap().data[..], b"last");
        prop_assert_eq!(world.machines[&1].committed.len(), world.agreed.len());
    }
}

/// A lone voter that has a learner wins its election in the turn that writes its vote, and would send in it.
#[test]
fn a_lone_voter_s_appends_wait_for_its_vote() {
    let mut core = Disk::default().start_behind(1, founding(&[1], &[2]));
    core.campaign();
    let turn = core.turn();
    assert!(core.is_leader());
    assert!(turn.messages.is_empty(), "{:?}", turn.messages);
    core.persisted(turn.writes.last().unwrap().number);
    assert!(core.turn().messages.iter().any(|message| message.get_msg_type() == MessageType::MsgAppend));
}

/// One leader replaces entries that are on their way to the disk, the next brings them back: durable is what the last write
/// holds, and no earlier one.
#[test]
fn entries_that_were_replaced_and_came_back_are_durable_with_the_last_write() {
    let mut core = Disk::default().start(1, &[1, 2, 3]);
    let mut append = |from, term, terms: &[u64], commit| {
        let mut message = Message { from, to: 1, term, index: 1, log_term: 1, commit, ..Message::default() };
        message.set_msg_type(MessageType::MsgAppend);
        let entry = |(index, term): (u64, &u64)| Entry { index, term: *term, data: vec![1].into(), ..Entry::default() };
        message.entries = (2..).zip(terms).map(entry).collect();
        assert_eq!(admit(&message, &core), Ok(()));
        core.step(message);
        core.turn().writes.pop().unwrap().number
    };
    let first = append(2, 2, &[2, 2], 1);
    append(3, 3, &[3], 1);
    let last = append(2, 4, &[2, 2], 3);
    core.persisted(first);
    assert_eq!(core.turn().committed, []);
    core.persisted(last);
    assert_eq!(core.turn().committed.len(), 2);
}

/// As long as it hears from its leader it refuses to vote; where the leader is known to be gone, it does not.
#[test]
fn a_follower_hears_candidates_as_soon_as_the_lease_is_ended() {
    let mut core = Disk::default().start(1, &[1, 2, 3]);
    let mut step = |kind: MessageType, from, end_lease: bool| {
        // Who asks for a vote beforehand names the term that is to come.
        let term = if kind == MessageType::MsgHeartbeat { 2 } else { 3 };
        let mut message = Message { from, to: 1, term, index: 1, log_term: 1, ..Message::default() };
        message.set_msg_type(kind);
        assert_eq!(admit(&message, &core), Ok(()));
        core.step(message);
        if end_lease {
            core.end_lease();
        }
        let mut messages = Vec::new();
        loop {
            let turn = core.turn();
            messages.extend(turn.messages);
            let Some(last) = turn.writes.last() else { break };
            core.persisted(last.number);
        }
        messages.into_iter().find(|answer| answer.to == 3).map(|answer| answer.get_msg_type())
    };
    assert_eq!(step(MessageType::MsgHeartbeat, 2, false), None);
    assert_eq!(step(MessageType::MsgRequestPreVote, 3, false), None, "the leader was heard of");
    assert_eq!(step(MessageType::MsgHeartbeat, 2, true), None);
    assert_eq!(step(MessageType::MsgRequestPreVote, 3, false), Some(MessageType::MsgRequestPreVoteResponse));
    assert_eq!(step(MessageType::MsgHeartbeat, 2, false), None);
    assert_eq!(step(MessageType::MsgRequestPreVote, 3, false), None, "the leader is there after all");
}

/// A leader that is alone is deposed by a stranger of a later term, and calls an election before any turn has handed out
/// what it appended: raft asserts that a winner's log is durable.
#[test]
fn a_lone_voter_calls_no_election_before_its_log_is_durable() {
    let mut core = Disk::default().start(1, &[1]);
    core.campaign();
    assert!(core.is_leader());
    let mut message = Message { from: 2, to: 1, term: 9, index: 1, log_term: 1, ..Message::default() };
    message.set_msg_type(MessageType::MsgAppend);
    assert_eq!(admit(&message, &core), Ok(()));
    core.step(message);
    core.campaign();
    (0..40).for_each(|_| core.tick());
    assert!(!core.is_leader());
    while let Some(last) = core.turn().writes.last() {
        core.persisted(last.number);
    }
    (0..40).for_each(|_| core.tick());
    assert!(core.is_leader());
}

/// A disk may take longer to make a received snapshot durable than an election time-out.
#[test]
fn no_election_is_called_while_a_snapshot_is_made_durable() {
    let mut core = Disk::default().start(1, &[1, 2, 3]);
    let mut message = Message { from: 2, to: 1, term: 2, ..Message::default() };
    message.set_msg_type(MessageType::MsgSnapshot);
    let snapshot = SnapshotMetadata { index: 7, term: 2, ..founding(&[1, 2, 3], &[]) };
    message.mut_snapshot().set_metadata(snapshot);
    assert_eq!(admit(&message, &core), Ok(()));
    core.step(message);
    let write = core.turn().writes.pop().unwrap();
    assert!(core.is_restoring());
    (0..40).for_each(|_| core.tick());
    assert_eq!(core.role(), Role::Follower);
    core.persisted(write.number);
    assert!(core.turn().restored.is_some());
    (0..40).for_each(|_| core.tick());
    assert_eq!(core.role(), Role::Candidate);
}

/// Later appends go out beside the leader's own sync: replication and sync run in parallel.
#[test]
fn a_leader_sends_entries_before_its_own_sync() {
    let mut world = World::new(3);
    world.machine(1).core.campaign();
    world.settle_votes(1);
    let core = &mut world.machine(1).core;
    assert!(core.is_leader());
    core.propose(Writes::pack(&[(request(1), Bytes::from_static(b"x"))])).unwrap();
    let turn = core.turn();
    assert_eq!(turn.writes.len(), 1);
    assert!(turn.messages.iter().any(|message| message.get_msg_type() == MessageType::MsgAppend));
}

impl World {
    /// Delivers until `id` leads and its log is durable.
    fn settle_votes(&mut self, id: u64) {
        for _ in 0..20 {
            self.turn(id);
            for message in std::mem::take(&mut self.network) {
                self.deliver(message);
            }
            for id in self.voters.clone() {
                while !self.machine(id).cache.is_empty() {
                    self.persist(id);
                    self.turn(id);
                }
            }
        }
    }
}

/// Raft elects by the changes that are known to be committed. Were that forgotten by all who know it in one blackout, they
/// would ask a member for its vote that the change made dispensable, and that may be gone for good.
#[test]
fn that_a_change_of_the_members_is_committed_is_durable_at_once() {
    let mut core = Disk::default().start(1, &[1]);
    core.campaign();
    let persist = |core: &mut Core| {
        let turn = core.turn();
        turn.writes.iter().for_each(|write| core.persisted(write.number));
        turn
    };
    while !persist(&mut core).writes.is_empty() {}
    let mut change = ConfChangeV2::default();
    let mut single = raft::eraftpb::ConfChangeSingle { node_id: 2, ..Default::default() };
    single.set_change_type(ConfChangeType::AddLearnerNode);
    change.mut_changes().push(single);
    let (_, index) = core.propose_change(change).unwrap();
    assert_eq!(persist(&mut core).writes.len(), 1, "the entry");
    let turn = persist(&mut core);
    assert_eq!(turn.changes.len(), 1);
    let commit = turn.writes.iter().filter_map(|write| write.hard_state.as_ref()).map(|state| state.commit).max();
    assert_eq!(commit, Some(index));
    assert_eq!(persist(&mut core).writes.len(), 0, "once");
}
