//! Messages between the members of a cluster, over HTTP in the shape of etcd's rafthttp. It owns every connection to
//! and from a peer: who may connect, streams, the pipeline, forwarded proposals, probes. It knows nothing of raft's
//! rules: it hands over what a proven sender sent to this member, once, and reports what it could not send. The node
//! holds a [`Transport`] and receives [`Event`]s; `docs/peer-protocol.md` has the protocol.
//!
//! ```text
//! node ── send ──▶ outbox ──▶ stream (a response that never ends) or pipeline (POST) ──▶ peer
//! node ◀─ events ─ receive ◀── stream (our GET) or listener (its POST)              ◀── peer
//! file ── snapshot/send ──▶ a POST of its own ──▶ snapshot/receive ──▶ file
//! ```
//!
//! Reading order: `handshake`, `frame`, `outbox`, `stream`, `listener`, `snapshot`; then `hub` and `peer`, which hold the
//! state that these share.

mod dial;
mod forward;
#[doc(hidden)]
pub mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod handshake;
mod hub;
mod introduce;
mod listener;
mod outbox;
mod peer;
mod pipeline;
mod probe;
mod propose;
mod seldom;
mod snapshot;
mod stream;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use raft::eraftpb::Message;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub use self::forward::{ProposeError, RECONFIGURE_BYTES_MAX};
pub use self::frame::{FRAME_BYTES_MAX, FRAME_ENTRIES_MAX, FRAME_OVERHEAD_BYTES};
pub use self::handshake::Refusal;
pub use self::introduce::{IntroduceError, Introduction, introduce};
pub use self::peer::PeerStatus;
pub use self::propose::{PROPOSE_BYTES_MAX, Position};
#[cfg(test)]
use self::snapshot::NoSnapshots;
pub use self::snapshot::{SnapshotFiles, SnapshotProgress, SnapshotSink};
use crate::channel::{Rejection, RequestId};
use crate::cluster::{Member, PeerUrl};
use crate::metrics::Metrics;

/// A stream without a byte for this long is dead; an exchange without an answer is lost.
const IO_TIMEOUT: Duration = Duration::from_secs(5);

/// What this member says of itself to its peers.
pub struct Settings {
    pub id: u64,
    pub cluster: u64,
    /// Of the data directory: tells a member from one that lost its data.
    pub nonce: u64,
    /// Of this start: rises with each and is durable by now, so that what an earlier one sent is known as old, and of two
    /// processes on copies of a directory one is refused.
    pub boot: u64,
    pub urls: Vec<PeerUrl>,
    pub metrics: Arc<Metrics>,
    pub snapshots: Arc<dyn SnapshotFiles>,
}

/// What the transport tells the node. The channel is bounded and the transport waits when it is full: peers then wait
/// too, for their data stay in TCP's buffers.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "nearly every event is a message, and a box would cost an allocation each"
)]
pub enum Event {
    /// From a proven sender to this member, not a repeat. Nothing else in it was checked.
    Message(Message),
    /// Writes that member `from` forwards to the leader. To drop `reply` is to say that the outcome is unknown.
    Propose { from: u64, proposals: Vec<(RequestId, Bytes)>, reply: oneshot::Sender<Vec<Result<Position, Rejection>>> },
    /// A change of the members that member `from` forwards to the leader, opaque here as its answer is, of at most
    /// [`RECONFIGURE_BYTES_MAX`] bytes. To drop `reply` is to say that the outcome is unknown.
    Reconfigure { from: u64, body: Bytes, reply: oneshot::Sender<Bytes> },
    /// A snapshot from a proven sender: its file is verified and durable, and the message says where raft is to go.
    Snapshot { message: Message },
    /// How a [`Peers::send_snapshot`] ended, once for each.
    SnapshotSent { peer: u64, delivered: bool },
    /// Who says to be member `id`, at these URLs, asks where it belongs. Nothing of it is proven. To drop `reply` makes it
    /// ask again.
    Introduce { id: u64, urls: Vec<PeerUrl>, reply: oneshot::Sender<Introduction> },
    /// The first contact with a peer's data directory: it is dealt with once the node has recorded it durably and
    /// answered [`Meeting::Known`]. Asked again until then.
    Meet { peer: u64, nonce: u64, reply: oneshot::Sender<Meeting> },
    /// That peer accepted us, and our stream of its messages is open. `leader` is the one it knows, 0 for none.
    Accepted { peer: u64, leader: u64 },
    /// That peer opened its stream of our messages.
    Attached { peer: u64 },
    /// Messages to that peer were lost, or a stream broke. Reports that the node has not taken yet are merged.
    Unreachable { peer: u64 },
    /// The systems at all of that peer's addresses answer that nobody listens there: its process is gone. Repeated with each
    /// try.
    NobodyListens { peer: u64 },
    /// Who answers at that peer's address refused us; `OtherNonce`, `Superseded`, `NotAMember` and `Removed` come from the
    /// proven peer itself. Repeated with each try.
    Refused { peer: u64, refusal: Refusal },
}

/// The node's verdict over a peer's ID and nonce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meeting {
    /// Deal with it: recorded.
    Known,
    /// That ID belongs to another data directory.
    OtherNonce,
    NotAMember,
    Removed,
}

/// The connections to and from all peers.
pub struct Transport {
    hub: Arc<hub::Hub>,
}

impl Transport {
    /// Serves peers on `listeners` and connects to `peers` (this member among them is ignored) until `shutdown` or
    /// [`Peers::close`].
    pub fn start(
        settings: Settings,
        listeners: Vec<TcpListener>,
        peers: Vec<Member>,
        events: mpsc::Sender<Event>,
        shutdown: CancellationToken,
    ) -> Transport {
        let hub = hub::Hub::new(settings, events, shutdown.child_token());
        hub.spawn(hub.clone().report());
        for listener in listeners {
            hub.spawn(listener::serve(hub.clone(), listener));
        }
        hub.set_peers(peers);
        Transport { hub }
    }
}

/// The way to all peers, as the node sees it. All methods are cheap and none waits. The other implementor is the
/// simulator's network.
pub trait Peers: Send {
    /// Queues each message for the peer in its `to`. A full queue drops the message and reports the peer unreachable;
    /// messages to no peer are dropped. Give one turn's messages in one call: each peer is woken once a call.
    fn send(&self, messages: Vec<Message>);

    /// Sends the snapshot file that a MsgSnapshot names by its metadata, and the message ahead of it. It ends with
    /// [`Event::SnapshotSent`], unless the transport does. One at a time for each peer, four in all; another is refused.
    /// Asserts that the message is one, without data.
    fn send_snapshot(&self, message: Message);

    /// Forwards writes to the leader: an outcome for each, in order. Asserts that they fit [`PROPOSE_BYTES_MAX`].
    fn propose(&self, leader: u64, proposals: Vec<(RequestId, Bytes)>) -> Answer<Vec<Result<Position, Rejection>>>;

    /// Forwards a membership change to the leader, for its answer. At most [`RECONFIGURE_BYTES_MAX`] bytes both ways.
    fn reconfigure(&self, leader: u64, body: Bytes) -> Answer<Bytes>;

    /// The leader that peers are told of from now on, 0 for none.
    fn set_leader(&self, leader: u64);

    /// Makes `peers` the members to connect to: starts what is new, cuts what leads to an old address and dials the new
    /// one, drops who was a member and is none now. Who introduced itself but was never listed stays.
    fn set_peers(&self, peers: Vec<Member>);

    /// Cuts all connections with a member, listed or not, and forgets the verdict over it: the node is asked again when it
    /// comes back. For removed members that were never in [`Peers::set_peers`], as after a snapshot.
    fn drop_peer(&self, id: u64);

    /// All peers, by ID.
    fn status(&self) -> Vec<PeerStatus>;

    /// Ends all tasks and connections. What was queued is lost.
    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// What the leader says to what was forwarded, when it comes.
pub type Answer<T> = Pin<Box<dyn Future<Output = Result<T, ProposeError>> + Send>>;

impl Peers for Transport {
    fn send(&self, mut messages: Vec<Message>) {
        messages.sort_by_key(|message| message.to);
        let mut messages = messages.into_iter().peekable();
        while let Some(to) = messages.peek().map(|message| message.to) {
            let group = std::iter::from_fn(|| messages.next_if(|message| message.to == to));
            match self.hub.peer(to) {
                Some(peer) => {
                    let dropped = peer.outbox.push(group);
                    self.hub.lost(&peer, dropped);
                }
                None => {
                    // Outside of the log line, which may not be evaluated: they are taken all the same.
                    let messages = group.count();
                    tracing::debug!(to, messages, "dropped messages to a member without address");
                }
            }
        }
    }

    fn send_snapshot(&self, message: Message) {
        snapshot::send(&self.hub, message);
    }

    fn propose(&self, leader: u64, proposals: Vec<(RequestId, Bytes)>) -> Answer<Vec<Result<Position, Rejection>>> {
        let hub = self.hub.clone();
        Box::pin(async move { forward::propose(&hub, leader, &proposals).await })
    }

    fn reconfigure(&self, leader: u64, body: Bytes) -> Answer<Bytes> {
        let hub = self.hub.clone();
        Box::pin(async move { forward::reconfigure(&hub, leader, body).await })
    }

    fn set_leader(&self, leader: u64) {
        self.hub.set_leader(leader);
    }

    fn set_peers(&self, peers: Vec<Member>) {
        self.hub.set_peers(peers);
    }

    fn drop_peer(&self, id: u64) {
        self.hub.forget(id);
    }

    fn status(&self) -> Vec<PeerStatus> {
        self.hub.status()
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.hub.close())
    }
}

/// Locks a mutex whose holders never panic.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder of a transport lock panics")
}
