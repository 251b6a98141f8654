//! The whole write path in one thread, without sockets: the service's call, the node of a lone member, its log on a disk
//! that is memory, the store, the answer. The parts are wired as `server` wires them; the log's work is done by a task.

use std::future::{Future, pending, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use raft::eraftpb::Message;
use raftkv::channel::{self, Leadership, RequestId};
use raftkv::cluster::{Member, PeerUrl, cluster_id};
use raftkv::command::Command;
use raftkv::kv::Service;
use raftkv::node::{self, Ends, Node, Policy};
use raftkv::server::data::{Data, Place};
use raftkv::transport::{Answer, PeerStatus, Peers};
use raftkv::wal::SEGMENT_BYTES_MIN;
use raftkv::wal::writer::{Hand, Writer};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::disk::PlainDisk;
use super::{Run, VALUE, key};

/// Writes in one run, shared by the clients.
pub const WRITES: u64 = 1024;

const ID: u64 = 1;
const KEYS: u64 = 10_000;
/// Clients that fill the store before the first run.
const FILLERS: u64 = 64;

/// So many clients, each with one write in flight at a time.
pub fn write(clients: u64) -> Run {
    let lone = Lone::start();
    lone.write(FILLERS, 0..KEYS.next_multiple_of(FILLERS));
    let mut next = 0;
    Box::new(move || {
        lone.write(clients, next..next + WRITES);
        next += WRITES;
    })
}

/// A member of a cluster of one, leading.
struct Lone {
    runtime: Runtime,
    service: Service,
    keys: Arc<[Vec<u8>]>,
}

impl Lone {
    fn start() -> Self {
        // Its clock goes on only while nobody has anything to do: no tick comes between two writes.
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.expect("a runtime without threads or sockets");
        let service = runtime.block_on(async {
            let (service, mut leadership) = run();
            leadership.wait_for(|now| now.leader == ID).await.expect("the node runs");
            service.caught_up().await.expect("the node runs");
            service
        });
        Lone { runtime, service, keys: (0..KEYS).map(|n| key(n, KEYS)).collect() }
    }

    /// Makes these writes, each client its share of them one after the other.
    fn write(&self, clients: u64, writes: std::ops::Range<u64>) {
        self.runtime.block_on(async {
            let mut tasks = JoinSet::new();
            for client in 0..clients {
                let (service, keys, writes) = (self.service.clone(), self.keys.clone(), writes.clone());
                tasks.spawn(async move {
                    for n in writes.skip(client as usize).step_by(clients as usize) {
                        service.put(&keys[(n % KEYS) as usize], &VALUE).await.expect("a healthy node takes it");
                    }
                });
            }
            while let Some(outcome) = tasks.join_next().await {
                outcome.expect("no client panics");
            }
        });
    }
}

/// Starts node, log and store as tasks.
fn run() -> (Service, watch::Receiver<Leadership>) {
    let member = Member { id: ID, urls: vec![PeerUrl::parse("http://10.0.0.1:1").expect("a URL")] };
    let founders = [member];
    let place = Place {
        disk: Arc::new(PlainDisk::default()),
        data_dir: "/data".into(),
        segment_bytes: SEGMENT_BYTES_MIN,
        // Written by a thread of their own, so that none may come while instructions are counted.
        policy: Policy {
            count: u64::MAX,
            interval: Duration::ZERO,
            min_entries: 1,
            log_bytes: 64 << 20,
            catchup_entries: 5000,
            catchup_bytes: 1 << 20,
            memory_bytes: 1 << 20,
            keep: 1,
        },
        metrics: Arc::default(),
    };
    let data = place.found(cluster_id(&founders), ID, &founders, 1).expect("a disk without faults");
    let Data { identity, wal, snapshots, resume, store, .. } = data;
    let (proposals_in, proposals) = mpsc::channel(8192);
    let (peer_events_in, peer_events) = mpsc::channel(1);
    let (wal_events_in, wal_events) = mpsc::unbounded_channel();
    let (commits, commits_out) = channel::commits();
    let (leadership_in, leadership) = watch::channel(Leadership::default());
    // The node outlives its log's events, as in `server`.
    let (wal, hand) = Writer::by_hand(wal, move |event| drop(wal_events_in.send(event)));
    let service = Service::new(proposals_in, leadership.clone(), store.view(), VALUE.len());
    let settings = node::Settings {
        id: ID,
        cluster: identity.cluster,
        nonce: identity.nonce,
        tick: Duration::from_millis(100),
        election_ticks: 10,
        seed: 1,
        request_timeout: Duration::from_secs(5),
        reserve_bytes: 1 << 20,
        message_bytes_max: 1 << 20,
    };
    let ends = Ends {
        proposals,
        commits,
        understands: Box::new(|command| Command::decode(command).is_ok()),
        leadership: leadership_in,
        wal,
        wal_events,
        peers: Box::new(Nobody { _events: peer_events_in }),
        peer_events,
        snapshots,
        metrics: place.metrics.clone(),
    };
    tokio::spawn(Node::new(settings, resume, ends).run(CancellationToken::new()));
    tokio::spawn(write_by(hand));
    tokio::spawn(store.run(commits_out));
    (service, leadership)
}

/// The log's threads.
async fn write_by(mut hand: Hand) {
    loop {
        hand.work().await;
        if !hand.turn() {
            return;
        }
        hand.prepare_spare(false);
    }
}

/// The peers of a lone member.
struct Nobody {
    /// Held: who has a transport may still hear of peers.
    _events: mpsc::Sender<raftkv::transport::Event>,
}

impl Peers for Nobody {
    fn send(&self, messages: Vec<Message>) {
        assert!(messages.is_empty(), "a lone member has nobody to send to");
    }

    fn send_snapshot(&self, _message: Message) {
        unreachable!("a lone member has nobody to send to");
    }

    fn propose(
        &self,
        _leader: u64,
        _proposals: Vec<(RequestId, Bytes)>,
    ) -> Answer<Vec<Result<raftkv::transport::Position, channel::Rejection>>> {
        Box::pin(pending())
    }

    fn reconfigure(&self, _leader: u64, _body: Bytes) -> Answer<Bytes> {
        Box::pin(pending())
    }

    fn set_leader(&self, _leader: u64) {}

    fn set_peers(&self, _peers: Vec<Member>) {}

    fn drop_peer(&self, _id: u64) {}

    fn status(&self) -> Vec<PeerStatus> {
        Vec::new()
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(ready(()))
    }
}
