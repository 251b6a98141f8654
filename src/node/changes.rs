//! Changes of the membership on their way: asked here or by another member, judged and proposed by the leader one at a
//! time, answered when they are committed and known here. The leader proposes one by itself: a learner that has caught
//! up becomes a voter.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use raft::eraftpb::ConfChangeV2;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinSet};
use tracing::{debug, info};

use super::members::{LoggedChange, Verdict};
use super::{Node, Stopped};
use crate::channel::{self, Change, ChangeFailure, ChangeReply, Progress, Rejection, RequestId};
use crate::transport::ProposeError;

/// Changes that may wait at one node.
const CHANGES_MAX: usize = 64;

/// Changes that are remembered once made, so that a repeated request finds itself done.
pub(super) const MADE_MAX: usize = 256;

/// Ticks after which a change that was taken by the leader, and has not come back committed, is asked for again.
const RETRY_TICKS: u64 = 10;

/// Who waits for a change.
enum Asker {
    Here(ChangeReply),
    /// Another member, which waits for the commit itself and only asks whether this one takes it.
    Member(oneshot::Sender<Bytes>),
}

/// A change that waits to be made.
struct Waiting {
    logged: LoggedChange,
    asker: Asker,
    deadline: u64,
    /// It may be in some log.
    proposed: bool,
    /// Questions to leaders that are not answered: each may yet bring it into a log.
    open_questions: u32,
    /// Not before this tick: it was asked for a moment ago.
    ask_from: u64,
}

impl Waiting {
    /// Whether it may be in some log, or may still come into one.
    fn is_in_doubt(&self) -> bool {
        self.proposed || self.open_questions > 0
    }
}

/// The leader's word to a member that forwards a change.
#[derive(Debug, Serialize, Deserialize)]
enum Word {
    /// It is in the log.
    Taken,
    /// The members are as it would have them.
    Made,
    Refused(ChangeFailure),
    /// Ask whoever leads now.
    NotLeader,
}

/// All changes on their way at this node.
pub struct Changes {
    node: u64,
    boot: u64,
    last_counter: u64,
    waiting: VecDeque<Waiting>,
    /// The user's change that this leader proposed and that is not applied.
    in_flight: Option<RequestId>,
    made: VecDeque<RequestId>,
    /// For each learner, the commit index that it must reach: what there was when it was looked at first.
    rounds: BTreeMap<u64, u64>,
    asking: JoinSet<(RequestId, Result<Bytes, ProposeError>)>,
}

impl Changes {
    /// `made` are those that the log told of at the start.
    pub fn new(node: u64, boot: u64, made: VecDeque<RequestId>) -> Self {
        Changes {
            node,
            boot,
            last_counter: 0,
            waiting: VecDeque::new(),
            in_flight: None,
            made,
            rounds: BTreeMap::new(),
            asking: JoinSet::new(),
        }
    }

    fn next_request(&mut self) -> RequestId {
        self.last_counter += 1;
        RequestId { node: self.node, boot: self.boot, counter: self.last_counter }
    }

    /// The answer of the leader that was asked about a change, when there is one.
    pub async fn answered(&mut self) -> Option<Result<(RequestId, Result<Bytes, ProposeError>), JoinError>> {
        self.asking.join_next().await
    }

    /// A change in the log came to nothing: whatever it was, none is under way.
    pub fn passed_over(&mut self) {
        self.in_flight = None;
    }

    /// This node learnt of its own removal, from the log or from a peer: whoever asked for it here has it.
    pub fn own_removal(&mut self) {
        for Waiting { logged, asker, .. } in self.waiting.drain(..) {
            if logged.change == Change::Remove(self.node) {
                asker.made();
            }
        }
    }

    fn remove(&mut self, request: RequestId) -> Option<Waiting> {
        let at = self.waiting.iter().position(|waiting| waiting.logged.request == request)?;
        self.waiting.remove(at)
    }
}

impl<A: Send + 'static> Node<A> {
    /// A user of this node asks for a change.
    pub(super) fn on_reconfigure(&mut self, change: Change, reply: ChangeReply) {
        if let Some(rejection) = self.closed_to_writes() {
            return channel::answer(reply, Err(ChangeFailure::Rejected(rejection)));
        }
        let logged = LoggedChange { request: self.changes.next_request(), change };
        self.wait_for_change(logged, Asker::Here(reply));
    }

    /// A user of another member does.
    pub(super) fn on_foreign_change(&mut self, body: &[u8], reply: oneshot::Sender<Bytes>) {
        let Ok(logged) = serde_json::from_slice(body) else {
            return say(reply, &Word::Refused(ChangeFailure::Invalid("a change that cannot be read".to_owned())));
        };
        if !self.core.is_leader() || self.stop_by.is_some() {
            return say(reply, &Word::NotLeader);
        }
        self.wait_for_change(logged, Asker::Member(reply));
    }

    fn wait_for_change(&mut self, logged: LoggedChange, asker: Asker) {
        let deadline = self.now + self.request_ticks;
        let waiting = Waiting { logged, asker, deadline, proposed: false, open_questions: 0, ask_from: 0 };
        if self.changes.waiting.len() >= CHANGES_MAX {
            return waiting.asker.refuse(ChangeFailure::Rejected(Rejection::Busy));
        }
        self.changes.waiting.push_back(waiting);
    }

    /// Brings waiting changes into the log: here if this node leads, else at the leader.
    pub(super) fn propose_changes(&mut self) {
        if self.core.is_leader() {
            for _ in 0..self.changes.waiting.len() {
                let Some(waiting) = self.changes.waiting.pop_front() else { return };
                if let Some(waiting) = self.propose_change(waiting) {
                    self.changes.waiting.push_back(waiting);
                }
            }
            return;
        }
        // Who asked this node because it led asks the next.
        while let Some(at) = self.changes.waiting.iter().position(|waiting| matches!(waiting.asker, Asker::Member(_))) {
            if let Some(Waiting { asker: Asker::Member(reply), .. }) = self.changes.waiting.remove(at) {
                say(reply, &Word::NotLeader);
            }
        }
        let leader = self.core.position().leader;
        for waiting in &mut self.changes.waiting {
            if leader == 0 || waiting.ask_from > self.now {
                continue;
            }
            waiting.ask_from = self.now + RETRY_TICKS;
            waiting.open_questions += 1;
            let request = waiting.logged.request;
            let body = serde_json::to_vec(&waiting.logged).expect("a change is plain data");
            let answer = self.ends.peers.reconfigure(leader, body.into());
            self.changes.asking.spawn(async move { (request, answer.await) });
        }
    }

    /// Proposes a change if it may be made now. Returns it while it must wait, here or for its commit.
    fn propose_change(&mut self, mut waiting: Waiting) -> Option<Waiting> {
        let request = waiting.logged.request;
        if self.changes.made.contains(&request) {
            waiting.asker.made();
            return None;
        }
        if self.changes.in_flight == Some(request) {
            return waiting.asker.taken().map(|asker| Waiting { asker, ..waiting });
        }
        // What an earlier try may have brought into a log is not refused: the log tells, or the deadline.
        if waiting.is_in_doubt() && (self.changes.in_flight.is_some() || self.judge(&waiting.logged).is_err()) {
            return Some(waiting);
        }
        if self.changes.in_flight.is_some() {
            let why = "another change of the membership is under way: try again when it is made";
            waiting.asker.refuse(ChangeFailure::Conflict(why.to_owned()));
            return None;
        }
        // The cluster's own change, or a hand-over: wait for it.
        if !self.core.may_change() {
            return Some(waiting);
        }
        match self.judge(&waiting.logged) {
            // A leader that is new does not know yet who is up.
            Err(_) if self.now < self.leading_since + self.settings.election_ticks as u64 => Some(waiting),
            Err(failure) => {
                waiting.asker.refuse(failure);
                None
            }
            Ok(Verdict::AlreadySo) => {
                waiting.asker.made();
                None
            }
            Ok(Verdict::HandOver) => {
                self.core.hand_over();
                Some(waiting)
            }
            Ok(Verdict::Propose(change)) => {
                if self.core.propose_change(change).is_err() {
                    return Some(waiting);
                }
                info!(change = %waiting.logged.change, "membership change proposed");
                self.changes.in_flight = Some(request);
                waiting.proposed = true;
                waiting.asker.taken().map(|asker| Waiting { asker, ..waiting })
            }
        }
    }

    fn judge(&self, logged: &LoggedChange) -> Result<Verdict, ChangeFailure> {
        self.members.judge(logged, self.core.conf_state(), |id| self.is_up(id))
    }

    /// The leader's word on a change that was forwarded.
    pub(super) fn on_change_answered(&mut self, answered: Result<(RequestId, Result<Bytes, ProposeError>), JoinError>) {
        // As with writes: a panic there is a bug that must not pass for a lost request.
        let (request, answer) = answered.expect("forwarding does not panic and is not aborted");
        let Some(mut waiting) = self.changes.remove(request) else {
            return;
        };
        waiting.open_questions -= 1;
        match answer.map(|body| serde_json::from_slice(&body)) {
            Ok(Ok(Word::Taken)) => waiting.proposed = true,
            Ok(Ok(Word::Made)) => return waiting.asker.made(),
            Ok(Ok(Word::Refused(failure))) if !waiting.is_in_doubt() => return waiting.asker.refuse(failure),
            // An earlier try may be what this one collides with: wait for the commit.
            Ok(Ok(Word::Refused(failure))) => debug!(%failure, "a change asked for again was refused"),
            Ok(Ok(Word::NotLeader)) => waiting.ask_from = self.now + 1,
            Err(ProposeError::NotSent(why)) => {
                debug!(why, "change not forwarded");
                waiting.ask_from = self.now + 1;
            }
            Ok(Err(_)) | Err(ProposeError::Unknown(_)) => {
                waiting.proposed = true;
                waiting.ask_from = self.now + 1;
            }
        }
        self.changes.waiting.push_back(waiting);
    }

    /// A change is committed and raft has made it.
    pub(super) fn on_change_made(&mut self, change: &ConfChangeV2) -> Result<(), Stopped> {
        let Some(LoggedChange { request, change }) = LoggedChange::of(change) else {
            return Ok(());
        };
        self.members.apply(&change, self.core.conf_state());
        match &change {
            Change::Add(member) => info!(id = member.id, "member added, or moved"),
            Change::Remove(id) => info!(id, "member removed"),
            Change::Promote(id) => info!(id, "member votes"),
        }
        self.changes.made.push_back(request);
        if self.changes.made.len() > MADE_MAX {
            self.changes.made.pop_front();
        }
        if self.changes.in_flight == Some(request) {
            self.changes.in_flight = None;
        }
        self.tell_transport();
        if let Some(waiting) = self.changes.remove(request) {
            waiting.asker.made();
        }
        if change == Change::Remove(self.settings.id) {
            return Err(Stopped::Removed);
        }
        Ok(())
    }

    /// The transport connects to the members, and to nobody who was removed.
    pub(super) fn tell_transport(&self) {
        self.ends.peers.set_peers(self.members.list());
        for id in self.members.removed() {
            self.ends.peers.drop_peer(id);
        }
    }

    /// Another leader, or none: what the one before had under way may come back committed or not at all.
    pub(super) fn changes_lost_leader(&mut self) {
        self.changes.in_flight = None;
        self.changes.rounds.clear();
        for waiting in &mut self.changes.waiting {
            waiting.ask_from = 0;
        }
    }

    /// Gives up what is due, and promotes learners that have caught up.
    pub(super) fn tick_changes(&mut self) {
        let now = self.now;
        let due = |waiting: &Waiting| waiting.deadline <= now;
        while let Some(at) = self.changes.waiting.iter().position(due) {
            let waiting = self.changes.waiting.remove(at).expect("it was found there");
            let failure = match waiting.is_in_doubt() {
                true => ChangeFailure::Unknown,
                false => ChangeFailure::Rejected(Rejection::NoLeader),
            };
            waiting.asker.refuse(failure);
        }
        if self.core.may_change() && self.changes.in_flight.is_none() {
            self.promote();
            self.replicate_nonce();
        }
    }

    fn promote(&mut self) {
        let commit = self.core.position().commit;
        let learners = self.core.conf_state().learners.clone();
        self.changes.rounds.retain(|id, _| learners.contains(id));
        for id in learners {
            let target = *self.changes.rounds.entry(id).or_insert(commit);
            // Not only while raft replicates to it: where nothing is written, it need not.
            let caught_up = |progress: &Progress| progress.matched >= target && progress.state != "snapshot";
            if !self.is_up(id) || !self.core.progress(id).as_ref().is_some_and(caught_up) {
                continue;
            }
            let logged = LoggedChange { request: self.changes.next_request(), change: Change::Promote(id) };
            if let Ok(Verdict::Propose(change)) = self.judge(&logged)
                && self.core.propose_change(change).is_ok()
            {
                info!(id, "caught up: it is to vote");
                return;
            }
        }
    }

    /// So that a member that was wiped is known to all, not only to those that met it.
    fn replicate_nonce(&mut self) {
        if let Some((member, nonce)) = self.members.nonce_to_replicate() {
            self.core.propose_nonce(member, nonce);
        }
    }
}

impl Asker {
    fn refuse(self, failure: ChangeFailure) {
        match self {
            Asker::Here(reply) => channel::answer(reply, Err(failure)),
            Asker::Member(reply) => say(reply, &Word::Refused(failure)),
        }
    }

    fn made(self) {
        match self {
            Asker::Here(reply) => channel::answer(reply, Ok(())),
            Asker::Member(reply) => say(reply, &Word::Made),
        }
    }

    /// It is in the log: another member waits for the commit by itself, a user here waits on.
    fn taken(self) -> Option<Asker> {
        match self {
            Asker::Here(_) => Some(self),
            Asker::Member(reply) => {
                say(reply, &Word::Taken);
                None
            }
        }
    }
}

fn say(reply: oneshot::Sender<Bytes>, word: &Word) {
    channel::answer(reply, serde_json::to_vec(word).expect("a word is plain data").into());
}
