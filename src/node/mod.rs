//! The node: one task that owns raft and everything around it. It takes proposals, ticks, steps what peers send, has
//! entries made durable, sends, and publishes what is committed. It waits for events only, never for a disk, a peer or
//! the store. Bytes go up, an opaque answer `A` comes back: what is replicated is not its business.
//!
//! One turn: drain what waits, propose it in one go, then carry out what raft asks for ([`core`]). Everything that
//! peers say passes `admit` first.

mod admit;
mod core;
mod logger;
mod members;
mod mirror;
mod pending;
mod reads;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use raft::eraftpb::{EntryType, Message, MessageType};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

pub use self::core::FOUNDING;
use self::core::{Core, Start, Turn};
use self::members::{Acquaintance, Members};
use self::pending::{Pending, Proposed};
use self::reads::Reads;
use crate::channel::{
    self, Commit, CommitSender, Failure, Leadership, MemberStatus, NodeStatus, Proposal, Queues, Rejection, RequestId,
    ServiceGone,
};
use crate::metrics::{Metrics, Reason};
use crate::transport::{self, Meeting, Position, ProposeError, Transport};
use crate::wal::writer::{self, Writer};
use crate::wal::{self, Append, Recovered, Room};

/// Events taken in one turn from each source, so that no source starves another.
const EVENTS_PER_TURN: usize = 1024;

/// Bytes of command proposed to raft, or forwarded, at once.
const PROPOSAL_BYTES_MAX: usize = 1 << 20;

/// Forwarded proposals under way to the leader; what comes meanwhile waits and goes together.
const FORWARDS_MAX: usize = 4;

/// Bytes that may wait for the log before proposals and appends are turned away.
const WAL_QUEUE_BYTES_MAX: u64 = 64 << 20;

/// Bytes of command that may wait for the store before proposals are turned away.
const BACKLOG_BYTES_MAX: usize = 64 << 20;

/// Room in the log that appends leave for terms and votes when the disk is full.
const RESERVE_BYTES: u64 = 1 << 20;

/// How the node keeps time and who it is.
#[derive(Debug)]
pub struct Settings {
    pub id: u64,
    pub cluster: u64,
    pub tick: Duration,
    pub election_ticks: usize,
    pub request_timeout: Duration,
}

/// What connects the node to the rest.
pub struct Ends<A> {
    pub proposals: mpsc::Receiver<Proposal<A>>,
    pub commits: CommitSender<A>,
    pub leadership: watch::Sender<Leadership>,
    pub wal: Writer,
    pub wal_events: mpsc::UnboundedReceiver<writer::Event>,
    pub transport: Transport,
    pub peer_events: mpsc::Receiver<transport::Event>,
    pub metrics: Arc<Metrics>,
}

/// Why a node ended by itself. Nothing that it acknowledged is lost.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    #[error(transparent)]
    Wal(#[from] wal::Error),
    #[error(transparent)]
    ServiceGone(#[from] ServiceGone),
    #[error(
        "member {peer} knows this member by another data directory: this one was wiped, or is not its own. A member \
         that forgot its votes must not vote again. Put the old directory back; if it is lost, remove this member \
         from the cluster and add the machine under a new ID"
    )]
    OtherDirectory { peer: u64 },
    #[error(
        "leader {leader} has entries up to {commit} as acknowledged by this member, whose log ends at {last}: its disk \
         lost data. Remove this member from the cluster and add the machine under a new ID, with an empty directory"
    )]
    DataLost { leader: u64, commit: u64, last: u64 },
    #[error(
        "entry {index} is of a kind that this version of raftkv does not know: a newer version wrote it. Upgrade this \
         member"
    )]
    NewerEntry { index: u64 },
}

/// What becomes durable with a write to the log.
enum Durable {
    /// Raft's write of this number.
    Ready(u64),
    /// A peer's data directory, for which its handshake waits.
    Acquaintance(oneshot::Sender<Meeting>),
}

type Forwarded = (Vec<Proposed>, Result<Vec<Result<Position, Rejection>>, ProposeError>);

/// The node's task.
pub struct Node<A> {
    settings: Settings,
    ends: Ends<A>,
    core: Core,
    members: Members,
    pending: Pending<A>,
    reads: Reads,
    forwards: JoinSet<Forwarded>,
    /// Writes to the log that are not durable yet, by sequence number.
    writing: VecDeque<(u64, Durable)>,
    last_write: u64,
    room: Room,
    /// Ticks since the start.
    now: u64,
    request_ticks: u64,
    /// No proposal before this tick: the last one found nobody to take it.
    propose_from: u64,
    /// Index of the last entry given to the service.
    published: u64,
    leadership: Leadership,
    /// Whether this node stood for election ahead of time, which it does once.
    stood_first: bool,
    /// The tick at which a stopping node no longer waits for a successor.
    stop_by: Option<u64>,
}

impl<A: Send + 'static> Node<A> {
    /// A node that goes on from what its log holds.
    pub fn new(settings: Settings, recovered: Recovered, ends: Ends<A>) -> Self {
        let Recovered { founders, boot, hard_state, entries, nonces, .. } = recovered;
        let fresh = hard_state.term == 0 && entries.is_empty();
        let request_ticks = settings.request_timeout.as_micros().div_ceil(settings.tick.as_micros().max(1)) as u64;
        let id = settings.id;
        let core = Core::new(Start {
            id,
            conf_state: (founders.iter().map(|member| member.id).collect::<Vec<_>>(), vec![]).into(),
            hard_state,
            entries,
            election_ticks: settings.election_ticks,
        });
        Node {
            core,
            members: Members::new(id, founders, nonces, fresh),
            pending: Pending::new(id, boot),
            reads: Reads::new(id, boot),
            forwards: JoinSet::new(),
            writing: VecDeque::new(),
            last_write: 0,
            room: Room::Ok,
            now: 0,
            request_ticks,
            propose_from: 0,
            published: FOUNDING.0,
            leadership: Leadership::default(),
            stood_first: false,
            stop_by: None,
            settings,
            ends,
        }
    }

    /// Runs until `stop` is cancelled and leadership is handed over, or until the node cannot go on.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), Stopped> {
        let mut ticks = tokio::time::interval(self.settings.tick);
        // A process that was paused must not make up for it: its election clock would run wild.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        ticks.tick().await;
        let outcome = loop {
            if let Err(stopped) = self.turn() {
                break Err(stopped);
            }
            if self.has_stopped() {
                break Ok(());
            }
            let event = tokio::select! {
                biased;
                () = stop.cancelled(), if self.stop_by.is_none() => { self.begin_stop(); Ok(()) }
                _ = ticks.tick() => { self.tick(); Ok(()) }
                Some(event) = self.ends.wal_events.recv() => self.on_wal(event),
                Some(event) = self.ends.peer_events.recv() => self.on_peer(event),
                Some(done) = self.forwards.join_next() => { self.on_forwarded(done); Ok(()) }
                Some(proposal) = self.ends.proposals.recv() => { self.on_proposal(proposal); Ok(()) }
            };
            if let Err(stopped) = event.and_then(|()| self.drain()) {
                break Err(stopped);
            }
        };
        self.close(outcome).await
    }

    /// Takes what waits besides the event that woke the task, so that one turn serves all.
    fn drain(&mut self) -> Result<(), Stopped> {
        while let Ok(event) = self.ends.wal_events.try_recv() {
            self.on_wal(event)?;
        }
        while let Some(done) = self.forwards.try_join_next() {
            self.on_forwarded(done);
        }
        for _ in 0..EVENTS_PER_TURN {
            let Ok(event) = self.ends.peer_events.try_recv() else { break };
            self.on_peer(event)?;
        }
        for _ in 0..EVENTS_PER_TURN {
            let Ok(proposal) = self.ends.proposals.try_recv() else { break };
            self.on_proposal(proposal);
        }
        Ok(())
    }

    fn tick(&mut self) {
        self.now += 1;
        // Until it may vote, a fresh node stands for no election either.
        if self.members.may_vote() {
            self.core.tick();
        }
        self.stand_first(true);
        let why = if self.leadership.leader == 0 { Rejection::NoLeader } else { Rejection::Busy };
        let (rejected, unknown) = self.pending.expire(self.now, why);
        let unresolved = &self.ends.metrics.proposals_unresolved;
        for (reason, count) in [("rejected", rejected), ("unknown", unknown), ("read", self.reads.expire(self.now))] {
            if count > 0 {
                unresolved.get_or_create(&Reason { reason }).inc_by(count);
            }
        }
        let metrics = &self.ends.metrics;
        metrics.proposals_pending.set(self.pending.len() as i64);
        metrics.raft_commit_index.set(self.core.position().commit as i64);
    }

    fn on_proposal(&mut self, proposal: Proposal<A>) {
        let deadline = self.now + self.request_ticks;
        match proposal {
            Proposal::Status { reply } => channel::answer(reply, self.status()),
            Proposal::Read { reply } if self.stop_by.is_some() => channel::answer(reply, Err(Rejection::Stopping)),
            Proposal::Read { reply } => self.reads.admit(reply, deadline),
            Proposal::Write { command, reply } => match self.closed_to_writes() {
                Some(rejection) => channel::answer(reply, Err(Failure::Rejected(rejection))),
                None => self.pending.admit(command, reply, deadline),
            },
        }
    }

    /// Why no write is taken now, here or from another member.
    fn closed_to_writes(&self) -> Option<Rejection> {
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

    fn on_wal(&mut self, event: writer::Event) -> Result<(), Stopped> {
        match event {
            writer::Event::Persisted { number } => {
                while self.writing.front().is_some_and(|(write, _)| *write <= number) {
                    match self.writing.pop_front().expect("looked at above").1 {
                        Durable::Ready(ready) => self.core.persisted(ready),
                        Durable::Acquaintance(reply) => channel::answer(reply, Meeting::Known),
                    }
                }
            }
            writer::Event::Room(room) => {
                if room != self.room {
                    match room {
                        Room::Full => error!("the disk is full: writes are refused until there is room"),
                        Room::Ok => info!("there is room on the disk again: writes are taken"),
                    }
                }
                self.room = room;
            }
            writer::Event::Failed(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn on_peer(&mut self, event: transport::Event) -> Result<(), Stopped> {
        match event {
            transport::Event::Message(message) => return self.on_message(message),
            transport::Event::Propose { proposals, reply, .. } => self.on_foreign_proposals(&proposals, reply),
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
            transport::Event::Refused { peer, refusal: transport::Refusal::OtherNonce } => {
                return Err(Stopped::OtherDirectory { peer });
            }
            transport::Event::Refused { peer, refusal } => debug!(peer, ?refusal, "refused"),
        }
        Ok(())
    }

    fn on_message(&mut self, message: Message) -> Result<(), Stopped> {
        let kind = message.get_msg_type();
        if let Err(refusal) = admit::admit(&message, &self.core) {
            return match refusal {
                admit::Refusal::Senseless(word) => {
                    debug!(from = message.from, ?kind, word, "message refused");
                    self.count_refused(word);
                    Ok(())
                }
                admit::Refusal::DataLost { commit, last } => {
                    Err(Stopped::DataLost { leader: message.from, commit, last })
                }
            };
        }
        let asks_for_vote = matches!(kind, MessageType::MsgRequestVote | MessageType::MsgRequestPreVote);
        if asks_for_vote && !self.members.may_vote() {
            self.members.hold_vote(message);
        } else if kind == MessageType::MsgAppend && !self.has_room_for(&message) {
            // As good as lost on its way: the leader sends it again.
            self.count_refused("no room in the log");
        } else {
            self.core.step(message);
        }
        Ok(())
    }

    fn count_refused(&self, reason: &'static str) {
        self.ends.metrics.messages_refused.get_or_create(&Reason { reason }).inc();
    }

    fn has_room_for(&self, append: &Message) -> bool {
        let queued = self.ends.wal.queued_bytes();
        if append.entries.is_empty() || (self.room == Room::Ok && queued <= WAL_QUEUE_BYTES_MAX) {
            return true;
        }
        let size: u64 = append.entries.iter().map(|entry| entry.data.len() as u64 + 128).sum();
        queued <= WAL_QUEUE_BYTES_MAX && queued + size + RESERVE_BYTES <= self.ends.wal.status().room_bytes
    }

    /// Another member's writes, if this one leads. What it appends comes back to that member as committed entries.
    fn on_foreign_proposals(
        &mut self,
        proposals: &[(RequestId, Bytes)],
        reply: oneshot::Sender<Vec<Result<Position, Rejection>>>,
    ) {
        let outcome = match self.closed_to_writes() {
            Some(rejection) => Err(rejection),
            None => self.core.propose(proposals),
        };
        let positions = (0..proposals.len() as u64)
            .map(|nth| outcome.map(|(term, first)| Position { term, index: first + nth }))
            .collect();
        channel::answer(reply, positions);
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
                warn!(peer, "refused: this member was met with another data directory before");
                channel::answer(reply, Meeting::OtherNonce);
            }
            Acquaintance::Stranger => channel::answer(reply, Meeting::NotAMember),
        }
    }

    fn on_forwarded(&mut self, done: Result<Forwarded, tokio::task::JoinError>) {
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
                        Err(rejection @ (Rejection::Busy | Rejection::DiskFull)) => {
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

    /// Where a quorum is connected and nobody leads, the first of it stands for election now; if a lower ID may still
    /// come, only at the next tick. Random time-outs stay underneath.
    fn stand_first(&mut self, at_tick: bool) {
        if self.stood_first || self.leadership.leader != 0 || !self.members.may_vote() {
            return;
        }
        if self.members.first_candidate() == Some(self.settings.id) && (at_tick || self.members.is_lowest()) {
            self.stood_first = true;
            self.core.campaign();
        }
    }

    /// Brings what waits into the log, asks what reads need, and carries out what raft wants done.
    fn turn(&mut self) -> Result<(), Stopped> {
        // A lone node is its own quorum, and needs no event to find out.
        self.stand_first(false);
        self.note_leadership();
        self.propose();
        self.ask_read_index();
        let Turn { messages, writes, committed, reads } = self.core.turn();
        for core::Write { number, entries, hard_state } in writes {
            self.write(Append { entries, hard_state, ..Append::default() }, Durable::Ready(number));
        }
        if !messages.is_empty() {
            self.ends.transport.send(messages);
        }
        let mut commits = Vec::with_capacity(committed.len() + 1);
        for entry in committed {
            if entry.get_entry_type() != EntryType::EntryNormal {
                return Err(Stopped::NewerEntry { index: entry.index });
            }
            self.published = entry.index;
            commits.push(match RequestId::from_bytes(&entry.context) {
                None => Commit::Skip { index: entry.index, term: entry.term },
                Some(request) => Commit::Apply {
                    index: entry.index,
                    term: entry.term,
                    request,
                    command: entry.data,
                    reply: self.pending.committed(request),
                },
            });
        }
        for read in reads {
            self.reads.answered(&read.request_ctx, read.index);
        }
        let replies = self.reads.due(self.published);
        if !replies.is_empty() {
            commits.push(Commit::Barrier { replies });
        }
        if !commits.is_empty() {
            self.ends.commits.publish(commits)?;
        }
        Ok(())
    }

    fn propose(&mut self) {
        let leader = self.core.position().leader;
        while self.pending.has_waiting() && leader != 0 && self.propose_from <= self.now {
            if leader != self.settings.id && self.forwards.len() >= FORWARDS_MAX {
                return;
            }
            let batch = self.pending.take(EVENTS_PER_TURN, PROPOSAL_BYTES_MAX);
            let commands: Vec<_> = batch.iter().map(|proposed| (proposed.request, proposed.command.clone())).collect();
            if leader != self.settings.id {
                if !commands.is_empty() {
                    let answer = self.ends.transport.propose(leader, commands);
                    self.forwards.spawn(async move { (batch, answer.await) });
                }
                continue;
            }
            match self.core.propose(&commands) {
                Ok(_) => {}
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

    fn ask_read_index(&mut self) {
        if let Some(context) = self.reads.question(self.now)
            && self.core.read_index(context)
        {
            self.reads.asked(self.now);
        }
    }

    fn write(&mut self, append: Append, durable: Durable) {
        self.last_write += 1;
        self.writing.push_back((self.last_write, durable));
        self.ends.wal.append(Append { number: self.last_write, ..append });
    }

    fn note_leadership(&mut self) {
        let at = self.core.position();
        let leadership = Leadership { term: at.term, leader: at.leader };
        if leadership == self.leadership {
            return;
        }
        if leadership.leader != self.leadership.leader {
            match leadership.leader {
                0 => info!(term = at.term, "no leader"),
                leader if leader == at.id => info!(term = at.term, "this node leads"),
                leader => info!(term = at.term, leader, "following"),
            }
            self.ends.metrics.raft_leader_changes.inc();
        }
        self.leadership = leadership;
        self.ends.metrics.raft_term.set(at.term as i64);
        self.ends.metrics.raft_leader.set(at.leader as i64);
        self.ends.transport.set_leader(at.leader);
        self.ends.leadership.send_replace(leadership);
        if at.leader != 0 {
            self.propose_from = 0;
            self.pending.leader_changed();
            self.reads.leader_changed();
        }
    }

    fn status(&self) -> NodeStatus {
        let at = self.core.position();
        let connections = self.ends.transport.status();
        let members = self.members.iter().map(|member| MemberStatus {
            id: member.id,
            urls: member.urls.iter().map(ToString::to_string).collect(),
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
            wal: serde_json::json!(self.ends.wal.status()),
            queues: Queues {
                proposals: self.pending.len(),
                proposed_bytes: self.pending.bytes(),
                reads: self.reads.len(),
                unapplied_bytes: self.ends.commits.backlog_bytes(),
            },
        }
    }

    fn begin_stop(&mut self) {
        let patience = if self.core.hand_over() { self.settings.election_ticks as u64 } else { 0 };
        self.stop_by = Some(self.now + patience);
    }

    fn has_stopped(&self) -> bool {
        self.stop_by.is_some_and(|tick| tick <= self.now || !self.core.is_leader())
    }

    /// Ends in order: what is written becomes durable, then the peers are left.
    async fn close(mut self, outcome: Result<(), Stopped>) -> Result<(), Stopped> {
        if let (Ok(()), Some(hard_state)) = (&outcome, self.core.unwritten()) {
            self.last_write += 1;
            let number = self.last_write;
            self.ends.wal.append(Append { number, hard_state: Some(hard_state), ..Append::default() });
        }
        self.ends.transport.close().await;
        let wal = self.ends.wal;
        tokio::task::spawn_blocking(move || wal.close()).await.expect("closing the log does not panic");
        outcome?;
        while let Ok(event) = self.ends.wal_events.try_recv() {
            if let writer::Event::Failed(error) = event {
                return Err(error.into());
            }
        }
        Ok(())
    }
}
