//! What peers say, and what becomes of it: messages for raft, writes that they forward, their handshakes.

use std::iter;

use bytes::Bytes;
use raft::eraftpb::{Message, MessageType};
use tokio::sync::oneshot;
use tracing::{debug, warn};

use super::admit::{Refusal, admit};
use super::members::Acquaintance;
use super::{Durable, Node, Stopped};
use crate::channel::{self, COMMAND_BYTES_MAX, Rejection, RequestId, Writes};
use crate::cluster::Member;
use crate::metrics::Reason;
use crate::transport::{self, Meeting, Position};
use crate::wal::Append;

impl<A: Send + 'static> Node<A> {
    pub(super) fn on_peer(&mut self, event: transport::Event) -> Result<(), Stopped> {
        match event {
            transport::Event::Message(message) => return self.on_message(message),
            transport::Event::Snapshot { message } => self.on_snapshot(message),
            transport::Event::SnapshotSent { peer, delivered } => self.on_snapshot_sent(peer, delivered),
            transport::Event::Reconfigure { body, reply, .. } => self.on_foreign_change(&body, reply),
            transport::Event::Introduce { id, urls, reply } => {
                channel::answer(reply, self.introduce(Member { id, urls }));
            }
            transport::Event::Propose { from, proposals, reply } => self.on_foreign_proposals(from, &proposals, reply),
            transport::Event::Meet { peer, nonce, reply } => self.on_meet(peer, nonce, reply),
            transport::Event::Accepted { peer, leader } => {
                self.members.accepted(peer, leader);
                for request in self.members.release_votes() {
                    self.on_message(request)?;
                }
                self.stand_first(false);
            }
            transport::Event::Attached { peer } => {
                self.members.attached(peer);
                self.stand_first(false);
            }
            transport::Event::Unreachable { peer } => {
                self.members.unreachable(peer);
                self.core.report_unreachable(peer);
            }
            transport::Event::NobodyListens { peer } if peer == self.leadership.leader => self.leader_is_gone(),
            transport::Event::NobodyListens { .. } => {}
            transport::Event::Refused { peer, refusal: transport::Refusal::OtherNonce } => {
                return Err(Stopped::OtherDirectory { peer });
            }
            transport::Event::Refused { peer, refusal: transport::Refusal::Superseded } => {
                return Err(Stopped::Superseded { peer });
            }
            transport::Event::Refused { refusal: transport::Refusal::Removed, .. } => return Err(Stopped::Removed),
            transport::Event::Refused { peer, refusal } => debug!(peer, ?refusal, "refused"),
        }
        Ok(())
    }

    fn on_message(&mut self, message: Message) -> Result<(), Stopped> {
        let kind = message.get_msg_type();
        if let Err(refusal) = admit(&message, &self.core) {
            return self.on_refused(&message, refusal);
        }
        self.heard.insert(message.from, self.now);
        if message.from == self.leadership.leader {
            self.quick_ticks = 0;
        }
        let asks_for_vote = matches!(kind, MessageType::MsgRequestVote | MessageType::MsgRequestPreVote);
        if asks_for_vote && !self.members.may_vote() {
            self.members.hold_vote(message);
        } else if kind == MessageType::MsgTimeoutNow && !self.members.may_vote() {
            self.count_refused("no vote yet");
        } else if kind == MessageType::MsgAppend && !self.has_room_for(&message) {
            // As good as lost on its way: the leader sends it again.
            self.count_refused("no room in the log");
        } else {
            self.core.step(message);
        }
        Ok(())
    }

    pub(super) fn on_refused(&self, message: &Message, refusal: Refusal) -> Result<(), Stopped> {
        match refusal {
            Refusal::Senseless(word) => {
                debug!(from = message.from, kind = ?message.get_msg_type(), word, "message refused");
                self.count_refused(word);
                Ok(())
            }
            // Nothing of it was ever here: whoever acknowledged it had another directory.
            Refusal::DataLost { .. } if self.members.is_fresh() => Err(Stopped::OtherDirectory { peer: message.from }),
            Refusal::DataLost { commit, last } => Err(Stopped::DataLost { leader: message.from, commit, last }),
        }
    }

    /// Tells a newcomer where it belongs.
    fn introduce(&self, newcomer: Member) -> transport::Introduction {
        match self.members.introduce(self.settings.cluster, &newcomer) {
            Ok(introduction) => transport::Introduction::Member {
                body: serde_json::to_vec(&introduction).expect("an introduction is plain data").into(),
            },
            Err(Some(reason)) => transport::Introduction::NotAMember(reason),
            Err(None) => transport::Introduction::Removed,
        }
    }

    pub(super) fn count_refused(&self, reason: &'static str) {
        self.ends.metrics.messages_refused.get_or_create(&Reason { reason }).inc();
    }

    /// Whether a member was heard of within an election time-out.
    pub(super) fn is_up(&self, id: u64) -> bool {
        self.was_up_within(self.settings.election_ticks as u64, id)
    }

    pub(super) fn was_up_within(&self, ticks: u64, id: u64) -> bool {
        let heard = |tick: &u64| self.now - tick <= ticks;
        id == self.settings.id || self.heard.get(&id).is_some_and(heard)
    }

    fn has_room_for(&mut self, append: &Message) -> bool {
        append.entries.is_empty()
            || self.may_append(append.entries.iter().map(|entry| entry.context.len() + entry.data.len()))
    }

    /// Another member's writes, if this one leads. What it appends comes back to that member as committed entries.
    fn on_foreign_proposals(
        &mut self,
        from: u64,
        proposals: &[(RequestId, Bytes)],
        reply: oneshot::Sender<Vec<Result<Position, Rejection>>>,
    ) {
        let outcomes = match self.append_foreign(from, proposals) {
            Ok(positions) => positions.into_iter().map(Ok).collect(),
            Err(rejection) => vec![Err(rejection); proposals.len()],
        };
        channel::answer(reply, outcomes);
    }

    /// Where each of them lies in the log then.
    fn append_foreign(&mut self, from: u64, proposals: &[(RequestId, Bytes)]) -> Result<Vec<Position>, Rejection> {
        // What a member may not send, no member may find in the log: it could not be stored, or not be applied.
        let fits = |(request, command): &(RequestId, Bytes)| {
            request.node == from && command.len() <= COMMAND_BYTES_MAX && (self.ends.understands)(command)
        };
        if !proposals.iter().all(fits) {
            warn!(from, "forwarded commands refused: too large, in another's name, or of a newer version");
            self.count_refused("forwarded command");
            return Err(Rejection::NotUnderstood);
        }
        if let Some(rejection) = self.closed_to_writes() {
            return Err(rejection);
        }
        if !self.may_append(proposals.iter().map(|(_, command)| command.len())) {
            return Err(Rejection::Busy);
        }
        let entries = Writes::pack(proposals);
        let counts: Vec<usize> = entries.iter().map(Writes::count).collect();
        let (term, first) = self.core.propose(entries)?;
        Ok(positions(term, first, counts))
    }

    fn on_meet(&mut self, peer: u64, nonce: u64, reply: oneshot::Sender<Meeting>) {
        match self.members.meet(peer, nonce) {
            // Another handshake may have brought it a moment ago: it is durable when all that was written is.
            Acquaintance::Known if self.writing.is_empty() => channel::answer(reply, Meeting::Known),
            Acquaintance::Known => self.write(Append::default(), Durable::Acquaintance(reply)),
            Acquaintance::New => {
                self.write(Append { nonces: vec![(peer, nonce)], ..Append::default() }, Durable::Acquaintance(reply));
            }
            Acquaintance::Other => {
                if self.members.is_new_suspect(peer, nonce) {
                    warn!(peer, "refused: this member was met with another data directory before");
                }
                channel::answer(reply, Meeting::OtherNonce);
            }
            Acquaintance::Removed => channel::answer(reply, Meeting::Removed),
            // Who leads knows all members there are. Anybody else may have been away when this one joined, and must hear
            // it to learn of it; raft takes no answers from strangers.
            Acquaintance::Stranger if self.core.is_leader() => channel::answer(reply, Meeting::NotAMember),
            Acquaintance::Stranger => channel::answer(reply, Meeting::Known),
        }
    }
}

/// Where each of the writes lies that share entries from `first` on, so many in each.
fn positions(term: u64, first: u64, counts: Vec<usize>) -> Vec<Position> {
    (first..).zip(counts).flat_map(|(index, count)| iter::repeat_n(Position { term, index }, count)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_forwarded_write_is_told_the_entry_that_it_shares() {
        let indexes: Vec<u64> = positions(3, 7, vec![2, 1, 3]).iter().map(|position| position.index).collect();
        assert_eq!(indexes, [7, 7, 8, 9, 9, 9]);
    }
}
