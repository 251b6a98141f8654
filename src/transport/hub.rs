//! What all connections share: who this member is, whom it knows, whom it has met, and the way to the node. It decides
//! who is a peer; what a peer is stands in `peer`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use raft::eraftpb::Message;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frame::{Frame, FrameError};
use super::handshake::{Caller, Denied, Identity, Life, Refusal};
use super::peer::{Admission, Peer, PeerStatus};
use super::snapshot::{self, SnapshotFiles};
use super::{Event, IO_TIMEOUT, Meeting, Settings, locked, pipeline, probe, stream};
use crate::cluster::{Member, PeerUrl};
use crate::metrics::{self, Metrics, Reason};

/// Connections that peers may hold open to us; further ones wait in the listener's backlog.
pub const CONNECTIONS_MAX: usize = 256;
/// Bytes of request bodies in memory at once; more is answered 503.
pub const BODY_BYTES_MAX: usize = 64 << 20;
/// Peers that introduced themselves and are not members, as far as we know.
const VISITORS_MAX: usize = 64;

pub struct Hub {
    pub identity: Identity,
    pub boot: u64,
    pub metrics: Arc<Metrics>,
    /// Ends everything.
    pub stop: CancellationToken,
    pub connections: Arc<Semaphore>,
    pub bodies: Semaphore,
    pub snapshots: Arc<dyn SnapshotFiles>,
    /// Held by each snapshot on its way out, and on its way in.
    pub sending: Arc<Semaphore>,
    pub receiving: Arc<Semaphore>,
    leader: AtomicU64,
    events: mpsc::Sender<Event>,
    peers: Mutex<BTreeMap<u64, Arc<Peer>>>,
    met: Mutex<Met>,
    /// Held while the node is asked, so that it is asked once.
    meeting: tokio::sync::Mutex<()>,
    unreachable: Mutex<BTreeSet<u64>>,
    reports: Notify,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Met {
    /// The nonce that the node has accepted for each peer.
    nonces: HashMap<u64, u64>,
    /// Counts the peers that were dropped: a verdict from before is worth nothing after.
    dropped: u64,
}

impl Hub {
    pub fn new(settings: Settings, events: mpsc::Sender<Event>, stop: CancellationToken) -> Arc<Hub> {
        let Settings { id, cluster, nonce, boot, urls, metrics, snapshots } = settings;
        Arc::new(Hub {
            identity: Identity::new(id, cluster, Life { nonce, boot }, &urls),
            boot,
            metrics,
            stop,
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            bodies: Semaphore::new(BODY_BYTES_MAX),
            snapshots,
            sending: Arc::new(Semaphore::new(snapshot::SENDING_MAX)),
            receiving: Arc::new(Semaphore::new(snapshot::RECEIVING_MAX)),
            leader: AtomicU64::new(0),
            events,
            peers: Mutex::default(),
            met: Mutex::default(),
            meeting: tokio::sync::Mutex::default(),
            unreachable: Mutex::default(),
            reports: Notify::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Runs a task that ends with the transport.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn_until(&self.stop, task);
    }

    /// Runs a task until it ends or `stop` is cancelled, whichever is first.
    pub fn spawn_until(&self, stop: &CancellationToken, task: impl Future<Output = ()> + Send + 'static) {
        let stop = stop.clone();
        self.tasks.spawn(async move {
            // Cancelled or done: both are an end, and neither has an outcome.
            stop.run_until_cancelled(task).await;
        });
    }

    /// Runs what blocks on a thread of its own. [`Hub::close`] waits for it too: it must end when the task that feeds it
    /// does.
    pub fn spawn_blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        self.tasks.spawn_blocking(work)
    }

    pub async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    pub fn leader(&self) -> u64 {
        self.leader.load(Ordering::Relaxed)
    }

    pub fn set_leader(&self, leader: u64) {
        self.leader.store(leader, Ordering::Relaxed);
    }

    pub fn peer(&self, id: u64) -> Option<Arc<Peer>> {
        locked(&self.peers).get(&id).cloned()
    }

    pub fn status(&self) -> Vec<PeerStatus> {
        let peers: Vec<_> = locked(&self.peers).values().cloned().collect();
        peers.iter().map(|peer| peer.status()).collect()
    }

    pub fn set_peers(self: &Arc<Self>, members: Vec<Member>) {
        let mut peers = locked(&self.peers);
        let listed: BTreeSet<u64> = members.iter().map(|member| member.id).collect();
        let gone: Vec<u64> =
            peers.values().filter(|p| !p.is_visitor() && !listed.contains(&p.id)).map(|p| p.id).collect();
        for id in gone {
            self.remove(&mut peers, id);
        }
        for Member { id, urls } in members {
            if id == self.identity.id {
                continue;
            }
            match peers.get(&id) {
                Some(peer) => peer.list(urls),
                None => {
                    let peer = self.start_peer(id, urls, false);
                    peers.insert(id, peer);
                }
            }
        }
    }

    /// Drops a peer, listed or not.
    pub fn forget(&self, id: u64) {
        self.remove(&mut locked(&self.peers), id);
    }

    fn remove(&self, peers: &mut BTreeMap<u64, Arc<Peer>>, id: u64) {
        let mut met = locked(&self.met);
        met.nonces.remove(&id);
        met.dropped += 1;
        drop(met);
        let Some(peer) = peers.remove(&id) else { return };
        peer.stop.cancel();
        peer.outbox.close();
        let label = metrics::Peer { peer: id };
        self.metrics.peer_sent_bytes.remove(&label);
        self.metrics.peer_received_bytes.remove(&label);
        self.metrics.peer_snapshot_sent_bytes.remove(&label);
        self.metrics.peer_snapshot_received_bytes.remove(&label);
        self.metrics.peer_dropped_messages.remove(&label);
        self.metrics.peer_round_trip_seconds.remove(&label);
        self.metrics.peer_clock_drift_seconds.remove(&label);
    }

    fn start_peer(self: &Arc<Self>, id: u64, urls: Vec<PeerUrl>, visitor: bool) -> Arc<Peer> {
        let peer = Arc::new(Peer::new(id, urls, visitor, &self.metrics, self.stop.child_token()));
        self.spawn_until(&peer.stop, stream::pull(self.clone(), peer.clone()));
        self.spawn_until(&peer.stop, probe::probe(self.clone(), peer.clone()));
        for _ in 0..super::outbox::PIPELINE_WORKERS {
            self.spawn_until(&peer.stop, pipeline::work(self.clone(), peer.clone()));
        }
        peer
    }

    /// The peer that makes a request, if it may. A member that was away does not know those who joined meanwhile, and
    /// may need their entries to learn of them: whom the node accepts becomes a peer, at the URLs it names.
    pub async fn admit(self: &Arc<Self>, caller: Caller) -> Result<Arc<Peer>, Denied> {
        self.meet(caller.id, caller.life.nonce).await?;
        let mut peers = locked(&self.peers);
        if !self.has_met(caller.id, caller.life.nonce) {
            // Dropped since: the node has another verdict for its next try.
            return Err(Denied::Busy);
        }
        if let Some(peer) = peers.get(&caller.id) {
            peer.greet(caller.life)?;
            peer.visit(caller.urls);
            return Ok(peer.clone());
        }
        if peers.values().filter(|peer| peer.is_visitor()).count() >= VISITORS_MAX {
            return Err(Denied::Busy);
        }
        tracing::info!(peer = caller.id, "a member that we do not know yet introduced itself");
        let peer = self.start_peer(caller.id, caller.urls, true);
        peer.greet(caller.life)?;
        peers.insert(caller.id, peer.clone());
        Ok(peer)
    }

    /// Whether the node deals with this peer and data directory. Asked once; a refusal is asked again each time.
    pub async fn meet(&self, peer: u64, nonce: u64) -> Result<(), Denied> {
        if self.has_met(peer, nonce) {
            return Ok(());
        }
        let _turn = self.meeting.lock().await;
        if self.has_met(peer, nonce) {
            return Ok(());
        }
        let dropped = locked(&self.met).dropped;
        match self.ask(|reply| Event::Meet { peer, nonce, reply }).await.ok_or(Denied::Busy)? {
            Meeting::Known => {
                let mut met = locked(&self.met);
                if met.dropped != dropped {
                    // Perhaps this one, and the verdict is from before.
                    return Err(Denied::Busy);
                }
                met.nonces.insert(peer, nonce);
                Ok(())
            }
            Meeting::OtherNonce => Err(Refusal::OtherNonce.into()),
            Meeting::NotAMember => Err(Refusal::NotAMember.into()),
            Meeting::Removed => Err(Refusal::Removed.into()),
        }
    }

    fn has_met(&self, peer: u64, nonce: u64) -> bool {
        locked(&self.met).nonces.get(&peer) == Some(&nonce)
    }

    /// Hands a peer's frame to the node, if it is new. Waits while the node is behind.
    pub async fn receive(&self, peer: &Peer, frame: Frame) -> Result<(), FrameError> {
        if let Some(message) = self.open(peer, frame)? {
            self.tell(Event::Message(message)).await;
        }
        Ok(())
    }

    /// The message in a peer's frame; `None` for a repeat.
    pub fn open(&self, peer: &Peer, frame: Frame) -> Result<Option<Message>, FrameError> {
        let Frame { boot, sequence, message } = frame;
        if message.from != peer.id {
            return Err(FrameError::WrongSender(message.from));
        }
        if message.to != self.identity.id {
            return Err(FrameError::WrongReceiver(message.to));
        }
        match peer.admit(boot, sequence) {
            Admission::New => Ok(Some(message)),
            Admission::Repeat => {
                self.metrics.transport_repeats.inc();
                Ok(None)
            }
            Admission::OldBoot => Err(FrameError::OldBoot(boot)),
        }
    }

    /// Puts a question before the node. `None` if it does not answer in time, though it may have taken the question.
    pub async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Event) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.tell(question(reply)).await;
            answer.await.ok()
        };
        timeout(IO_TIMEOUT, asked).await.ok().flatten()
    }

    /// Gives the node an event, and waits while its queue is full.
    pub async fn tell(&self, event: Event) {
        if self.events.send(event).await.is_err() {
            // The node has ended, and this transport is about to.
            std::future::pending().await
        }
    }

    /// Counts messages to a peer that will not arrive, and reports it unreachable if there were any.
    pub fn lost(&self, peer: &Peer, messages: usize) {
        if messages > 0 {
            peer.figures.dropped_messages.inc_by(messages as u64);
            self.unreachable(peer.id);
        }
    }

    /// Has the node told that a peer is unreachable, once for all reports that it has not taken yet.
    pub fn unreachable(&self, peer: u64) {
        if locked(&self.unreachable).insert(peer) {
            self.reports.notify_one();
        }
    }

    /// Passes the reports on, so that who makes them need not wait.
    pub async fn report(self: Arc<Self>) {
        loop {
            self.reports.notified().await;
            while let Some(peer) = self.next_report() {
                self.tell(Event::Unreachable { peer }).await;
            }
        }
    }

    fn next_report(&self) -> Option<u64> {
        locked(&self.unreachable).pop_first()
    }

    pub fn count_refused(&self, reason: &'static str) {
        self.metrics.transport_refused.get_or_create(&Reason { reason }).inc();
    }
}
