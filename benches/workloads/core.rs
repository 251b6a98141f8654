//! The leader's turns, without the node around them: proposed, handed out to be written and sent, durable here,
//! acknowledged by the others, committed. The others say yes at once and cost nothing.

use bytes::Bytes;
use raft::eraftpb::{HardState, Message, MessageType, SnapshotMetadata};
use raftkv::channel::{RequestId, Writes};
use raftkv::node::FOUNDING;
use raftkv::node::core::{Core, Start, Turn};

use super::{COMPACT_EVERY, Run, command, request};

const ID: u64 = 1;

/// So many commands proposed at once to the leader of so many voters.
pub fn lead(voters: u64, count: u64) -> Run {
    let mut leader = Leader::elected(voters);
    let command = command(0, 1);
    Box::new(move || assert_eq!(leader.write(count, &command), count, "all of it is committed"))
}

struct Leader {
    core: Core,
    voters: Vec<u64>,
    /// Kept for its room.
    proposals: Vec<(RequestId, Bytes)>,
    proposed: u64,
    compacted: u64,
}

impl Leader {
    fn elected(voters: u64) -> Self {
        let voters: Vec<u64> = (ID..ID + voters).collect();
        let core = Core::new(Start {
            id: ID,
            base: FOUNDING,
            applied: snapshot(FOUNDING, &voters),
            hard_state: HardState::default(),
            entries: Vec::new(),
            election_ticks: 10,
            seed: 1,
            message_bytes_max: 1 << 20,
        });
        let mut leader = Leader { core, voters, proposals: Vec::new(), proposed: 0, compacted: FOUNDING.0 };
        leader.core.campaign();
        leader.settle();
        assert!(leader.core.is_leader(), "everybody voted for it");
        leader
    }

    /// Returns how many writes were committed.
    fn write(&mut self, count: u64, command: &Bytes) -> u64 {
        self.proposals.clear();
        self.proposals.extend((self.proposed + 1..=self.proposed + count).map(|n| (request(n), command.clone())));
        self.proposed += count;
        self.core.propose(Writes::pack(&self.proposals)).expect("it leads");
        let committed = self.settle();
        let at = self.core.position();
        if at.commit - self.compacted >= COMPACT_EVERY {
            self.compacted = at.commit;
            self.core.compact(snapshot((at.commit, at.term), &self.voters), at.commit);
        }
        committed
    }

    /// Turns until nothing is left to do. Returns how many writes were committed.
    fn settle(&mut self) -> u64 {
        let mut count = 0;
        loop {
            let Turn { messages, writes, committed, .. } = self.core.turn();
            if messages.is_empty() && writes.is_empty() && committed.is_empty() {
                return count;
            }
            count += committed.iter().map(|entry| Writes::count_in(&entry.context) as u64).sum::<u64>();
            if let Some(last) = writes.last() {
                self.core.persisted(last.number);
            }
            messages.iter().filter_map(consent).for_each(|message| self.core.step(message));
        }
    }
}

fn snapshot((index, term): (u64, u64), voters: &[u64]) -> SnapshotMetadata {
    let mut snapshot = SnapshotMetadata { index, term, ..SnapshotMetadata::default() };
    snapshot.set_conf_state((voters.to_vec(), Vec::new()).into());
    snapshot
}

/// What a voter answers who has no objections.
fn consent(message: &Message) -> Option<Message> {
    let kind = match message.get_msg_type() {
        MessageType::MsgRequestPreVote => MessageType::MsgRequestPreVoteResponse,
        MessageType::MsgRequestVote => MessageType::MsgRequestVoteResponse,
        MessageType::MsgAppend => MessageType::MsgAppendResponse,
        _ => return None,
    };
    let index = message.index + message.entries.len() as u64;
    let mut answer = Message { from: message.to, to: message.from, term: message.term, index, ..Message::default() };
    answer.set_msg_type(kind);
    Some(answer)
}
