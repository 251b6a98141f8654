//! The two channels between a service and its replicated log: *proposals* go up, *commits* come back. Bytes go up and
//! an opaque answer `A` comes back, so the node knows nothing of what it replicates. Uses nobody.
//!
//! Whoever wants to replicate another service implements the receiving end of the commits and holds a sender of
//! proposals; `store` is one such service.

mod writes;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

pub use self::writes::{SHARED_COMMAND_BYTES_MAX, Writes};
use crate::cluster::Member;

/// The largest command, in bytes: above every flag, equal on all nodes, so that what one node takes every other can
/// store and send on.
pub const COMMAND_BYTES_MAX: usize = (4 << 20) + (8 << 10);

/// Names one write for ever: the node that took it, that node's start, and a counter within it. It travels inside the
/// log entry; the service skips what it has seen, so a proposal may be repeated safely.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct RequestId {
    pub node: u64,
    /// Rises with every start of that node.
    pub boot: u64,
    /// Rises with every write; the first is 1.
    pub counter: u64,
}

impl RequestId {
    pub const BYTES: usize = 24;

    /// Three little-endian u64: node, boot, counter.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.node.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.boot.to_le_bytes());
        bytes[16..].copy_from_slice(&self.counter.to_le_bytes());
        bytes
    }

    /// The inverse of [`RequestId::to_bytes`]; `None` for any other length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self::from_array)
    }

    fn from_array(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        RequestId { node: word(0), boot: word(8), counter: word(16) }
    }
}

/// What a front end asks of the node.
#[derive(Debug)]
pub enum Proposal<A> {
    /// Replicate `command`; answered when it is applied here, refused, or given up.
    Write { command: Bytes, reply: Reply<A> },
    /// Answered as soon as all that was committed when it was asked is applied here: a local read behind it is
    /// linearizable.
    Read { reply: ReadReply },
    /// Change who the members are; answered when the change is committed and known here.
    Reconfigure { change: Change, reply: ChangeReply },
    /// How the node is; answered at once.
    Status { reply: oneshot::Sender<NodeStatus> },
}

/// A change of the membership.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// A newcomer, which learns first and votes once it has caught up; or new URLs of a member.
    Add(Member),
    /// For good: its ID is never used again.
    Remove(u64),
    /// A learner that has caught up becomes a voter. The leader proposes it by itself.
    Promote(u64),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Add(Member { id, urls }) => {
                let urls: Vec<String> = urls.iter().map(ToString::to_string).collect();
                write!(f, "add member {id} at {}", urls.join(" and "))
            }
            Change::Remove(id) => write!(f, "remove member {id}"),
            Change::Promote(id) => write!(f, "let member {id} vote"),
        }
    }
}

pub type ChangeReply = oneshot::Sender<Result<(), ChangeFailure>>;

/// Why a change of the membership has no answer, or a sad one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
pub enum ChangeFailure {
    /// It makes no sense, whatever the membership is.
    #[error("not applied: {0}")]
    Invalid(String),
    /// It does not fit the membership as it is now.
    #[error("not applied: {0}")]
    Conflict(String),
    #[error("not applied: {0}")]
    Rejected(Rejection),
    #[error("outcome unknown: the change was proposed but not seen committed in time, and may still be made")]
    Unknown,
}

/// What the node knows of itself and of the others.
#[derive(Debug, Clone, serde::Serialize)]
pub struct NodeStatus {
    pub id: u64,
    /// The cluster's identity, 16 hexadecimal digits.
    pub cluster: String,
    pub role: Role,
    pub term: u64,
    /// 0 while there is none.
    pub leader: u64,
    pub commit: u64,
    pub members: Vec<MemberStatus>,
    pub snapshot: SnapshotStatus,
    /// What the log says of itself.
    pub wal: serde_json::Value,
    pub queues: Queues,
}

/// How far back a node's history reaches.
#[derive(Debug, Clone, serde::Serialize)]
pub struct SnapshotStatus {
    /// Of the newest one, 0 before the first.
    pub index: u64,
    /// The first entry that the log on the disk still holds.
    pub log_from: u64,
}

/// A node's part in its cluster, in the words of the Raft thesis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Leader,
    Follower,
    Candidate,
    Learner,
}

/// A member as this node sees it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct MemberStatus {
    pub id: u64,
    pub urls: Vec<String>,
    /// A member that does not is a learner.
    pub votes: bool,
    /// How far the log of that member is known to go; only at the leader.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// What the transport says of it; not for this node itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection: Option<serde_json::Value>,
}

/// A follower's log as the leader knows it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Progress {
    /// The follower's log agrees with the leader's up to here.
    pub matched: u64,
    /// The next entry to send.
    pub next: u64,
    /// `probe`, `replicate` or `snapshot`.
    pub state: &'static str,
    /// Heard of within the last election time-out.
    pub active: bool,
}

/// What waits in the node.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Queues {
    pub proposals: usize,
    pub proposed_bytes: usize,
    pub reads: usize,
    pub unapplied_bytes: usize,
}

/// Who leads, as far as this node knows: published whenever it changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leadership {
    pub term: u64,
    /// 0 while there is none.
    pub leader: u64,
}

pub type Reply<A> = oneshot::Sender<Result<Applied<A>, Failure>>;
pub type ReadReply = oneshot::Sender<Result<(), Rejection>>;

/// Answers. Whoever no longer waits is not told: the client hung up.
pub fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    reply.send(value).ok();
}

/// A write that is durable on a majority and applied here, with the service's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied<A> {
    pub index: u64,
    pub term: u64,
    pub answer: A,
}

/// Why a write has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Surely not applied, now or later.
    #[error("not applied: {0}")]
    Rejected(Rejection),
    /// It may have been applied, or may still be.
    #[error("outcome unknown: it was proposed but not seen committed in time, and may still be applied")]
    Unknown,
}

/// Why the node did not take a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
pub enum Rejection {
    #[error("no leader within the request time-out")]
    NoLeader,
    #[error("too many requests in flight")]
    Busy,
    #[error("the disk is full")]
    DiskFull,
    #[error("this member does not catch up with the others")]
    Behind,
    #[error("the leader does not understand it: it may run an older version")]
    NotUnderstood,
    #[error("the node is stopping")]
    Stopping,
}

/// Writes a service's state, as it was at one index, in the service's own format.
pub type WriteImage = Box<dyn FnOnce(&mut dyn io::Write) -> io::Result<()> + Send>;

/// What the log tells the service, in log order.
pub enum Commit<A> {
    /// Apply the writes of an entry. `replies` has one for each, which is there on the node that took that write, if its
    /// client still waits.
    Apply { index: u64, term: u64, writes: Writes, replies: Vec<Option<Reply<A>>> },
    /// An entry that carries nothing for the service; only the applied index moves.
    Skip { index: u64, term: u64 },
    /// All before it is applied: answer these reads.
    Barrier { replies: Vec<ReadReply> },
    /// Hand out a view of the state at exactly this place in the log: cheap, consistent, and written elsewhere while
    /// writes go on.
    Snapshot { reply: oneshot::Sender<WriteImage> },
    /// Replace the whole state by that of another member at `index`. The image was verified; it is read to its end.
    Restore { index: u64, image: Box<dyn io::Read + Send> },
}

impl<A> fmt::Debug for Commit<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Commit::Apply { index, term, writes, .. } => {
                let requests: Vec<RequestId> = writes.iter().map(|(request, _)| request).collect();
                write!(f, "Apply({index}, term {term}, {requests:?})")
            }
            Commit::Skip { index, term } => write!(f, "Skip({index}, term {term})"),
            Commit::Barrier { replies } => write!(f, "Barrier({} reads)", replies.len()),
            Commit::Snapshot { .. } => write!(f, "Snapshot"),
            Commit::Restore { index, .. } => write!(f, "Restore({index})"),
        }
    }
}

impl<A> Commit<A> {
    /// Bytes of command that wait in the channel with this commit.
    fn size_bytes(&self) -> usize {
        match self {
            Commit::Apply { writes, .. } => writes.commands().len(),
            Commit::Skip { .. } | Commit::Barrier { .. } | Commit::Snapshot { .. } | Commit::Restore { .. } => 0,
        }
    }
}

/// The commit channel. It takes whatever is committed, for the node must never wait for the service; the sender sees
/// the backlog and sheds *proposals* while it is too long, and what waits here is shared with the log's own memory.
pub fn commits<A>() -> (CommitSender<A>, CommitReceiver<A>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let backlog_bytes = Arc::new(AtomicUsize::new(0));
    (
        CommitSender { sender, backlog_bytes: backlog_bytes.clone() },
        CommitReceiver { receiver, backlog_bytes, taken: 0 },
    )
}

pub struct CommitSender<A> {
    sender: mpsc::UnboundedSender<Vec<Commit<A>>>,
    backlog_bytes: Arc<AtomicUsize>,
}

impl<A> CommitSender<A> {
    /// Publishes one turn's commits. Fails when the service is gone.
    pub fn publish(&self, commits: Vec<Commit<A>>) -> Result<(), ServiceGone> {
        let size = commits.iter().map(Commit::size_bytes).sum();
        self.backlog_bytes.fetch_add(size, Ordering::Relaxed);
        self.sender.send(commits).map_err(|_| ServiceGone)
    }

    /// Bytes of commands that are published and not applied yet.
    pub fn backlog_bytes(&self) -> usize {
        self.backlog_bytes.load(Ordering::Relaxed)
    }
}

/// The service behind the commit channel has ended.
#[derive(Debug, thiserror::Error)]
#[error("the service that applies commits has ended")]
pub struct ServiceGone;

pub struct CommitReceiver<A> {
    receiver: mpsc::UnboundedReceiver<Vec<Commit<A>>>,
    backlog_bytes: Arc<AtomicUsize>,
    taken: usize,
}

impl<A> CommitReceiver<A> {
    /// Appends all that waits to `batch`, or waits for something. False when the node has ended. What an earlier call
    /// returned counts as applied from here on.
    pub async fn receive(&mut self, batch: &mut Vec<Commit<A>>) -> bool {
        self.backlog_bytes.fetch_sub(std::mem::take(&mut self.taken), Ordering::Relaxed);
        let Some(first) = self.receiver.recv().await else {
            return false;
        };
        batch.extend(first);
        while let Ok(more) = self.receiver.try_recv() {
            batch.extend(more);
        }
        self.taken = batch.iter().map(Commit::size_bytes).sum();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_survives_its_bytes() {
        let id = RequestId { node: 1, boot: u64::MAX, counter: 3 };
        assert_eq!(RequestId::from_bytes(&id.to_bytes()), Some(id));
        assert_eq!(RequestId::from_bytes(&[0; 23]), None);
    }

    #[tokio::test]
    async fn the_backlog_counts_what_is_not_applied() {
        let (sender, mut receiver) = commits::<()>();
        let request = RequestId { node: 1, boot: 1, counter: 1 };
        let writes = Writes::one(request, Bytes::from_static(b"12345"));
        let apply = Commit::Apply { index: 2, term: 1, writes, replies: vec![None] };
        sender.publish(vec![apply, Commit::Skip { index: 3, term: 1 }]).unwrap();
        assert_eq!(sender.backlog_bytes(), 5);
        let mut batch = Vec::new();
        assert!(receiver.receive(&mut batch).await);
        assert_eq!((batch.len(), sender.backlog_bytes()), (2, 5), "taken is not applied");
        sender.publish(vec![]).unwrap();
        assert!(receiver.receive(&mut batch).await);
        assert_eq!(sender.backlog_bytes(), 0);
    }
}
