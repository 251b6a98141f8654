//! Writes and reads on their way in: what front ends ask, what is turned away, and how a waiting write is brought into
//! the log, here if this node leads, else at the leader.

use tokio::task::JoinError;
use tracing::debug;

use super::{BACKLOG_BYTES_MAX, EVENTS_PER_TURN, Forwarded, Node, WAL_QUEUE_BYTES_MAX, core};
use crate::channel::{self, Failure, MemberStatus, NodeStatus, Proposal, Queues, Rejection, SnapshotStatus, Writes};
use crate::transport::{Position, ProposeError};
use crate::wal::Room;

/// Bytes of command proposed to raft, or forwarded, at once.
const PROPOSAL_BYTES_MAX: usize = 1 << 20;

/// What a write takes in the log beside its command, or an entry beside its context and data, and more.
const ENTRY_OVERHEAD_BYTES: usize = 128;

/// Forwarded proposals under way to the leader; what comes meanwhile waits and goes together.
const FORWARDS_MAX: usize = 4;

impl<A: Send + 'static> Node<A> {
    pub(super) fn on_proposal(&mut self, proposal: Proposal<A>) {
        // The tick under way counts for nothing, or a request would be given up before its time.
        let deadline = self.now + self.request_ticks + 1;
        match proposal {
            Proposal::Reconfigure { change, reply } => self.on_reconfigure(change, reply),
            Proposal::Status { reply } => channel::answer(reply, self.status()),
            Proposal::Read { reply } if self.stop_by.is_some() => channel::answer(reply, Err(Rejection::Stopping)),
            Proposal::Read { reply } => self.reads.admit(reply, deadline),
            Proposal::Write { command, reply } => match self.closed_to_writes() {
                Some(rejection) => channel::answer(reply, Err(Failure::Rejected(rejection))),
                None => self.pending.admit(command, reply, deadline),
            },
        }
    }

    /// Whether writes with commands of these sizes, or entries of these sizes, find room in the log, with some left for terms
    /// and votes; if so, it is theirs. What went in without it could be what stops the node on a full disk.
    pub(super) fn may_append(&mut self, sizes: impl Iterator<Item = usize>) -> bool {
        let bytes: u64 = sizes.map(|size| (size + ENTRY_OVERHEAD_BYTES) as u64).sum();
        let entering = self.entering_bytes + bytes;
        let fits = self.ends.wal.queued_bytes() <= WAL_QUEUE_BYTES_MAX
            && self.ends.wal.has_room_for(entering + self.settings.reserve_bytes);
        if fits {
            self.entering_bytes = entering;
        }
        fits
    }

    /// Why no write is taken now, here or from another member.
    pub(super) fn closed_to_writes(&self) -> Option<Rejection> {
        if self.stop_by.is_some() {
            Some(Rejection::Stopping)
        } else if self.room == Room::Full {
            Some(Rejection::DiskFull)
        } else if self.ends.commits.backlog_bytes() > BACKLOG_BYTES_MAX
            || self.ends.wal.queued_bytes() > WAL_QUEUE_BYTES_MAX
        {
            Some(Rejection::Busy)
        } else {
            None
        }
    }

    pub(super) fn propose(&mut self) {
        let core::Position { leader, commit, .. } = self.core.position();
        self.batches.committed(commit);
        let waiting = self.pending.waiting();
        if waiting == 0 || leader == 0 || self.propose_from > self.now {
            return;
        }
        // Half of so many bytes does not go at once anyway.
        let large = self.pending.bytes() > 2 * PROPOSAL_BYTES_MAX;
        if leader == self.settings.id && !large && !self.batches.may_go(waiting, self.pending.len()) {
            return;
        }
        while self.pending.waiting() > 0 && self.propose_from <= self.now {
            if leader != self.settings.id && self.forwards.len() >= FORWARDS_MAX {
                return;
            }
            let batch = self.pending.take(EVENTS_PER_TURN, PROPOSAL_BYTES_MAX);
            let commands: Vec<_> = batch.iter().map(|proposed| (proposed.request, proposed.command.clone())).collect();
            if leader != self.settings.id {
                if !commands.is_empty() {
                    let answer = self.ends.peers.propose(leader, commands);
                    self.forwards.spawn(async move { (batch, answer.await) });
                }
                continue;
            }
            if !self.may_append(commands.iter().map(|(_, command)| command.len())) {
                // Asked again in every turn, until the log has room.
                self.pending.not_proposed(&batch);
                if self.room == Room::Full {
                    self.pending.reject_waiting(Rejection::DiskFull);
                }
                return;
            }
            let entries = Writes::pack(&commands);
            let count = entries.len() as u64;
            match self.core.propose(entries) {
                // Those that waited may all have been given up by now.
                Ok((_, first)) => self.batches.went(first + count - 1),
                Err(Rejection::NoLeader) => {
                    self.pending.not_proposed(&batch);
                    self.propose_from = self.now + 1;
                }
                Err(rejection) => {
                    batch.iter().rev().for_each(|proposed| self.pending.refused(proposed, rejection));
                    self.propose_from = self.now + 1;
                }
            }
        }
    }

    pub(super) fn on_forwarded(&mut self, done: Result<Forwarded, JoinError>) {
        // The task only awaits an answer: a panic there is a bug that must not pass for a lost proposal.
        let (batch, answer) = done.expect("forwarding does not panic and is not aborted");
        match answer {
            Ok(outcomes) if outcomes.len() == batch.len() => {
                for (proposed, outcome) in batch.iter().zip(outcomes) {
                    match outcome {
                        Ok(Position { .. }) => {}
                        Err(Rejection::NoLeader | Rejection::Stopping) => {
                            self.pending.not_proposed(std::slice::from_ref(proposed));
                            self.propose_from = self.now + 1;
                        }
                        Err(
                            rejection @ (Rejection::Busy
                            | Rejection::DiskFull
                            | Rejection::Behind
                            | Rejection::NotUnderstood),
                        ) => {
                            self.pending.refused(proposed, rejection);
                            self.propose_from = self.now + 1;
                        }
                    }
                }
            }
            Err(ProposeError::NotSent(why)) => {
                debug!(why, "proposals not forwarded");
                self.pending.not_proposed(&batch);
                self.propose_from = self.now + 1;
            }
            Ok(_) => {
                debug!("the leader's answer names another number of proposals");
                self.pending.lost(&batch);
                self.propose_from = self.now + 1;
            }
            Err(ProposeError::Unknown(why)) => {
                debug!(why, "proposals forwarded with unknown outcome");
                self.pending.lost(&batch);
                self.propose_from = self.now + 1;
            }
        }
    }

    pub(super) fn status(&self) -> NodeStatus {
        let at = self.core.position();
        let connections = self.ends.peers.status();
        let members = self.members.iter().map(|member| MemberStatus {
            id: member.id,
            urls: member.urls.iter().map(ToString::to_string).collect(),
            votes: self.core.conf_state().voters.contains(&member.id),
            progress: self.core.progress(member.id),
            connection: connections.iter().find(|peer| peer.id == member.id).map(|peer| serde_json::json!(peer)),
        });
        NodeStatus {
            id: at.id,
            cluster: format!("{:016x}", self.settings.cluster),
            role: self.core.role(),
            term: at.term,
            leader: at.leader,
            commit: at.commit,
            members: members.collect(),
            snapshot: SnapshotStatus { index: self.snapshotting.newest(), log_from: self.snapshotting.log_from() },
            wal: serde_json::json!(self.ends.wal.status()),
            queues: Queues {
                proposals: self.pending.len(),
                proposed_bytes: self.pending.bytes(),
                reads: self.reads.len(),
                unapplied_bytes: self.ends.commits.backlog_bytes(),
            },
        }
    }
}
