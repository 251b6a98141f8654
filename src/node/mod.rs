//! The node: one task that owns raft and everything around it. It takes proposals, ticks, steps what peers send, has
//! entries made durable, sends, and publishes what is committed. It waits for events only, never for a disk, a peer or
//! the store. Bytes go up, an opaque answer `A` comes back: what is replicated is not its business.
//!
//! One turn: drain what waits, propose it in one go, then carry out what raft asks for (`core`). Everything that
//! peers say passes `admit` first.

mod admit;
mod batches;
mod changes;
#[doc(hidden)]
pub mod core;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod intake;
mod logger;
mod members;
mod mirror;
mod peers;
mod pending;
mod reads;
mod resume;
mod snapshots;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use self::batches::Batches;
use self::changes::Changes;
pub use self::core::FOUNDING;
use self::core::{Core, Turn};
use self::members::Members;
use self::mirror::entry_writes;
use self::pending::{Pending, Proposed};
use self::reads::Reads;
pub use self::resume::Resume;
use self::resume::Resumed;
use self::snapshots::Snapshotting;
pub use self::snapshots::{Policy, conf_state, metadata};
use crate::blocking;
use crate::channel::{
    self, Commit, CommitSender, Leadership, Proposal, Rejection, Reply, RequestId, Role, ServiceGone, Writes,
};
use crate::metrics::{Metrics, Reason};
use crate::transport::{self, Meeting, Peers, Position, ProposeError};
use crate::wal::snapshot::Snapshots;
use crate::wal::writer::{self, Writer};
use crate::wal::{self, Append, Room};

/// Events taken in one turn from each source, so that no source starves another.
const EVENTS_PER_TURN: usize = 1024;

/// Bytes that may wait for the log before proposals and appends are turned away.
const WAL_QUEUE_BYTES_MAX: u64 = 64 << 20;

/// Bytes of command that may wait for the store before proposals are turned away.
const BACKLOG_BYTES_MAX: usize = 64 << 20;

/// What passes for a tick where the leader's process is gone: this part of one. A vote takes a round trip and a sync.
const QUICK_TICKS_PER_TICK: u32 = 10;

/// The context of an entry that names a member's data directory: member and nonce, little-endian.
const NONCE_BYTES: usize = 16;

/// How the node keeps time and who it is.
#[derive(Debug)]
pub struct Settings {
    pub id: u64,
    pub cluster: u64,
    /// Of the data directory.
    pub nonce: u64,
    pub tick: Duration,
    pub election_ticks: usize,
    /// Of the random part of election time-outs: with it, a node does the same again.
    pub seed: u64,
    pub request_timeout: Duration,
    /// Room in the log that appends leave for terms and votes when the disk is full.
    pub reserve_bytes: u64,
    /// Of the entries in one message to a follower, unless one entry has more.
    pub message_bytes_max: u64,
}

/// The service's word on a command, before it is in the log.
pub type Understands = Box<dyn Fn(&[u8]) -> bool + Send>;

/// What connects the node to the rest.
pub struct Ends<A> {
    pub proposals: mpsc::Receiver<Proposal<A>>,
    pub commits: CommitSender<A>,
    /// Whether the service can apply a command; asked of what other members forward.
    pub understands: Understands,
    pub leadership: watch::Sender<Leadership>,
    pub wal: Writer,
    pub wal_events: mpsc::UnboundedReceiver<writer::Event>,
    pub peers: Box<dyn Peers>,
    pub peer_events: mpsc::Receiver<transport::Event>,
    pub snapshots: Arc<Snapshots>,
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
        "member {peer} met a later start of this member: another process runs on a copy of this member's data directory \
         (or ran on it later). A member must never run twice. Stop the other one; if this directory is the older copy, \
         remove this member and add the machine under a new ID"
    )]
    Superseded { peer: u64 },
    #[error(
        "leader {leader} has entries up to {commit} as acknowledged by this member, whose log ends at {last}: its disk \
         lost data. Remove this member from the cluster and add the machine under a new ID, with an empty directory"
    )]
    DataLost { leader: u64, commit: u64, last: u64 },
    /// The one good end among these.
    #[error("this member was removed from the cluster")]
    Removed,
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
    batches: Batches,
    reads: Reads,
    forwards: JoinSet<Forwarded>,
    changes: Changes,
    snapshotting: Snapshotting,
    /// Writes to the log that are not durable yet, by sequence number.
    writing: VecDeque<(u64, Durable)>,
    last_write: u64,
    room: Room,
    /// Bytes of entries that raft was given in this turn and the log was not yet.
    entering_bytes: u64,
    /// Ticks since the start.
    now: u64,
    request_ticks: u64,
    /// No proposal before this tick: the last one found nobody to take it.
    propose_from: u64,
    /// Index of the last entry given to the service.
    published: u64,
    leadership: Leadership,
    /// The tick at which this node last came to lead.
    leading_since: u64,
    /// The tick at which each member was last heard of.
    heard: BTreeMap<u64, u64>,
    /// How long the election clock still runs faster, in ticks of that.
    quick_ticks: usize,
    /// Whose process was said to be gone last.
    believed_gone: Leadership,
    /// Whether this node stood for election ahead of time, which it does once.
    stood_first: bool,
    /// The tick at which a stopping node no longer waits for a successor.
    stop_by: Option<u64>,
}

impl<A: Send + 'static> Node<A> {
    /// A node that goes on from where its log was read to.
    pub fn new(settings: Settings, resume: Resume, ends: Ends<A>) -> Self {
        let request_ticks = settings.request_timeout.as_micros().div_ceil(settings.tick.as_micros().max(1)) as u64;
        let id = settings.id;
        let Resumed { boot, core, members, made, applied, origin, policy } = resume.finish(&settings);
        ends.metrics.raft_commit_index.set(core.position().commit as i64);
        Node {
            core,
            members,
            pending: Pending::new(id, boot),
            batches: Batches::default(),
            reads: Reads::new(id, boot),
            forwards: JoinSet::new(),
            changes: Changes::new(id, boot, made),
            snapshotting: Snapshotting::new(ends.snapshots.clone(), policy, origin),
            writing: VecDeque::new(),
            last_write: 0,
            room: Room::Ok,
            entering_bytes: 0,
            now: 0,
            request_ticks,
            propose_from: 0,
            published: applied,
            leadership: Leadership::default(),
            leading_since: 0,
            heard: BTreeMap::new(),
            quick_ticks: 0,
            believed_gone: Leadership::default(),
            stood_first: false,
            stop_by: None,
            settings,
            ends,
        }
    }

    /// Runs until `stop` is cancelled and leadership is handed over, or until the node cannot go on.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), Stopped> {
        let outcome =
            if self.members.is_removed(self.settings.id) { Err(Stopped::Removed) } else { self.serve(stop).await };
        self.close(outcome).await
    }

    async fn serve(&mut self, stop: CancellationToken) -> Result<(), Stopped> {
        let mut ticks = tokio::time::interval(self.settings.tick);
        // A process that was paused must not make up for it: its election clock would run wild.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        ticks.tick().await;
        let mut quick_ticks = tokio::time::interval(self.settings.tick / QUICK_TICKS_PER_TICK);
        quick_ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.turn()?;
            if self.has_stopped() {
                return Ok(());
            }
            let event = tokio::select! {
                biased;
                () = stop.cancelled(), if self.stop_by.is_none() => { self.begin_stop(); Ok(()) }
                _ = ticks.tick() => { self.tick(); Ok(()) }
                _ = quick_ticks.tick(), if self.quick_ticks > 0 => { self.quick_tick(); Ok(()) }
                Some(event) = self.ends.wal_events.recv() => self.on_wal(event),
                Some(event) = self.ends.peer_events.recv() => self.on_peer(event),
                Some(done) = self.forwards.join_next() => { self.on_forwarded(done); Ok(()) }
                Some(done) = self.changes.answered() => { self.on_change_answered(done); Ok(()) }
                Some(done) = self.snapshotting.done() => self.on_snapshot_done(done),
                () = self.batches.waited() => Ok(()),
                Some(proposal) = self.ends.proposals.recv() => { self.on_proposal(proposal); Ok(()) }
            };
            event.and_then(|()| self.drain())?;
        }
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
        if self.members.may_vote() || self.core.is_leader() {
            self.core.tick();
        }
        self.stand_first(true);
        self.tick_changes();
        self.tick_snapshots();
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
    }

    /// The system on which the leader ran says that nobody listens there: there is no silence to wait out. A leader that is
    /// only slow, or cut off, still has its port. The random part of the time-outs, which keeps candidates apart, runs
    /// faster for as long as two elections may take.
    ///
    /// It may be a mistake: a firewall that rejects connections, a wrong address. Then the leader is still heard, and whoever hears it
    /// refuses to vote; and of one leadership it is believed once, so that it does not disturb over and over.
    fn leader_is_gone(&mut self) {
        let may_stand = self.members.may_vote() && self.core.role() == Role::Follower;
        if !may_stand || self.believed_gone == self.leadership {
            return;
        }
        info!(leader = self.leadership.leader, "the leader's process is gone");
        self.believed_gone = self.leadership;
        self.core.end_lease();
        self.quick_ticks = 3 * self.settings.election_ticks;
    }

    fn quick_tick(&mut self) {
        self.quick_ticks -= 1;
        if !self.core.is_leader() {
            self.core.tick();
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
                        Room::Full => {
                            error!("the disk is full: writes are refused until there is room");
                            // Another member may have room.
                            self.core.hand_over();
                        }
                        Room::Ok => info!("there is room on the disk again: writes are taken"),
                    }
                }
                self.room = room;
            }
            writer::Event::Failed(error) => return Err(error.into()),
        }
        Ok(())
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
        self.propose_changes();
        self.ask_read_index();
        let Turn { messages, writes, restored, committed, changes, reads } = self.core.turn();
        for core::Write { number, snapshot, entries, hard_state } in writes {
            self.write(Append { snapshot, entries, hard_state, ..Append::default() }, Durable::Ready(number));
        }
        self.entering_bytes = 0;
        self.send(messages);
        let mut commits = Vec::with_capacity(committed.len() + 2);
        if let Some(metadata) = restored {
            self.restore(&metadata, &mut commits);
        }
        self.settle_received();
        let mut changes = changes.into_iter().peekable();
        let mut removed = Ok(());
        for entry in committed {
            if let Some((_, change)) = changes.next_if(|(index, _)| *index == entry.index) {
                removed = removed.and(self.on_change_made(&change));
            } else if entry.get_entry_type() == EntryType::EntryConfChangeV2 {
                self.changes.passed_over();
            }
            self.published = entry.index;
            self.snapshotting.published_writes += entry_writes(&entry);
            commits.push(commit(entry, &mut self.members, |request| self.pending.committed(request))?);
        }
        for read in reads {
            self.reads.answered(&read.request_ctx, read.index);
        }
        let replies = self.reads.due(self.published);
        if !replies.is_empty() {
            commits.push(Commit::Barrier { replies });
        }
        self.snapshot_if_due(&mut commits);
        self.shrink_log();
        if !commits.is_empty() {
            self.ends.metrics.raft_commit_index.set(self.core.position().commit as i64);
            self.ends.commits.publish(commits)?;
        }
        removed
    }

    fn send(&mut self, mut messages: Vec<Message>) {
        if messages.is_empty() {
            return;
        }
        // A snapshot's message goes with its file, on a connection of its own.
        let is_snapshot = |message: &mut Message| message.get_msg_type() == MessageType::MsgSnapshot;
        for message in messages.extract_if(.., is_snapshot) {
            self.ends.peers.send_snapshot(message);
        }
        self.ends.peers.send(messages);
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
        self.ends.peers.set_leader(at.leader);
        self.ends.leadership.send_replace(leadership);
        self.changes_lost_leader();
        if at.leader == at.id {
            self.leading_since = self.now;
        }
        // What was forwarded to another leader may hang there: its outcome is unknown, and it is proposed again.
        self.forwards = JoinSet::new();
        if at.leader != 0 {
            self.quick_ticks = 0;
            self.propose_from = 0;
            self.pending.leader_changed();
            self.reads.leader_changed();
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
        if let Err(Stopped::Removed) = &outcome {
            self.changes.own_removal();
        }
        if let (Ok(()), Some(hard_state)) = (&outcome, self.core.unwritten()) {
            self.last_write += 1;
            let number = self.last_write;
            self.ends.wal.append(Append { number, hard_state: Some(hard_state), ..Append::default() });
        }
        self.ends.peers.close().await;
        let wal = self.ends.wal;
        blocking::run(move || wal.close()).await.expect("closing the log does not panic");
        outcome?;
        while let Ok(event) = self.ends.wal_events.try_recv() {
            if let writer::Event::Failed(error) = event {
                return Err(error.into());
            }
        }
        Ok(())
    }
}

/// What a committed entry means to the service; what it says of a member's directory is noted. `ticket` finds who waits for
/// a write.
fn commit<A>(
    entry: Entry,
    members: &mut Members,
    mut ticket: impl FnMut(RequestId) -> Option<Reply<A>>,
) -> Result<Commit<A>, Stopped> {
    let Entry { index, term, .. } = entry;
    match entry.get_entry_type() {
        EntryType::EntryNormal => {}
        EntryType::EntryConfChangeV2 => return Ok(Commit::Skip { index, term }),
        EntryType::EntryConfChange => return Err(Stopped::NewerEntry { index }),
    }
    if let Ok(nonce) = <&[u8; NONCE_BYTES]>::try_from(&entry.context[..]) {
        let (member, nonce) = nonce.split_at(8);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
        members.learn_nonce(number(member), number(nonce));
        return Ok(Commit::Skip { index, term });
    }
    if entry.context.is_empty() {
        return Ok(Commit::Skip { index, term });
    }
    // To pass over what another version would apply would split the replicas.
    let writes = Writes::read(entry.context, entry.data).ok_or(Stopped::NewerEntry { index })?;
    let replies = writes.iter().map(|(request, _)| ticket(request)).collect();
    Ok(Commit::Apply { index, term, writes, replies })
}
