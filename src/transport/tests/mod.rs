//! Transports over real sockets, by subject. Here: a transport with the node's side of it, and members played by hand.

mod forwarding;
mod joining;
mod messages;
mod peers;
mod refusals;
mod snapshots;

use std::collections::HashMap;

use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use raft::eraftpb::{Entry, MessageType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::frame::{Decoder, encode};
use super::handshake::{INTRODUCE, Identity, Life, PIPELINE, PROBING, PROPOSE, RECONFIGURE, SNAPSHOT, STREAM};
use super::*;
use crate::metrics::Reason;

const CLUSTER: u64 = 0xc0ffee;
const DEADLINE: Duration = Duration::from_secs(20);

/// A transport and the node's side of it, which knows everyone unless told otherwise.
struct Node {
    id: u64,
    url: PeerUrl,
    transport: Transport,
    metrics: Arc<Metrics>,
    events: mpsc::UnboundedReceiver<Event>,
    verdicts: Arc<Mutex<HashMap<u64, Meeting>>>,
    meetings: Arc<Mutex<Vec<(u64, u64)>>>,
    pump: JoinHandle<()>,
}

fn nonce(id: u64) -> u64 {
    0x1000 + id
}

async fn listen() -> (TcpListener, PeerUrl) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = PeerUrl::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    (listener, url)
}

/// A URL where nobody listens.
async fn dead_url() -> PeerUrl {
    listen().await.1
}

fn member(id: u64, url: &PeerUrl) -> Member {
    Member { id, urls: vec![url.clone()] }
}

impl Node {
    fn start(id: u64, boot: u64, listener: TcpListener, url: &PeerUrl, peers: Vec<Member>) -> Node {
        Node::start_with(id, boot, listener, url, peers, Arc::new(NoSnapshots))
    }

    fn start_with(
        id: u64,
        boot: u64,
        listener: TcpListener,
        url: &PeerUrl,
        peers: Vec<Member>,
        snapshots: Arc<dyn SnapshotFiles>,
    ) -> Node {
        let metrics = Arc::new(Metrics::new());
        let settings = Settings {
            id,
            cluster: CLUSTER,
            nonce: nonce(id),
            boot,
            urls: vec![url.clone()],
            metrics: metrics.clone(),
            snapshots,
        };
        let (sender, mut receiver) = mpsc::channel(64);
        let (passed, events) = mpsc::unbounded_channel();
        let verdicts = Arc::new(Mutex::new(HashMap::new()));
        let meetings = Arc::new(Mutex::new(Vec::new()));
        let (judge, record) = (verdicts.clone(), meetings.clone());
        let pump = tokio::spawn(async move {
            while let Some(event) = receiver.recv().await {
                if let Event::Meet { peer, nonce, reply } = event {
                    record.lock().unwrap().push((peer, nonce));
                    let verdict = judge.lock().unwrap().get(&peer).copied().unwrap_or(Meeting::Known);
                    reply.send(verdict).ok();
                } else if passed.send(event).is_err() {
                    return;
                }
            }
        });
        let transport = Transport::start(settings, vec![listener], peers, sender, CancellationToken::new());
        Node { id, url: url.clone(), transport, metrics, events, verdicts, meetings, pump }
    }

    async fn alone(id: u64) -> Node {
        let (listener, url) = listen().await;
        Node::start(id, 1, listener, &url, Vec::new())
    }

    /// The first event from now on that `wanted` makes something of.
    async fn event<T>(&mut self, what: &str, mut wanted: impl FnMut(Event) -> Option<T>) -> T {
        let found = timeout(DEADLINE, async {
            loop {
                if let Some(found) = wanted(self.events.recv().await.expect("the transport runs")) {
                    return found;
                }
            }
        });
        found.await.unwrap_or_else(|_| panic!("node {} waited for {what}: {:?}", self.id, self.transport.status()))
    }

    /// Waits until something that no event tells of is so.
    async fn until(&self, what: &str, so: impl Fn(&Node) -> bool) {
        let waiting = timeout(DEADLINE, async {
            while !so(self) {
                tokio::task::yield_now().await;
            }
        });
        waiting.await.unwrap_or_else(|_| panic!("node {} waited for {what}: {:?}", self.id, self.transport.status()))
    }

    async fn message(&mut self) -> Message {
        let wanted = |event| if let Event::Message(message) = event { Some(message) } else { None };
        self.event("a message", wanted).await
    }

    async fn connected(&mut self, with: u64) {
        let (mut accepted, mut attached) = (false, false);
        self.event(&format!("streams with {with}"), |event| {
            accepted |= matches!(event, Event::Accepted { peer, .. } if peer == with);
            attached |= matches!(event, Event::Attached { peer } if peer == with);
            (accepted && attached).then_some(())
        })
        .await
    }

    async fn unreachable(&mut self, peer: u64) {
        let wanted = |event| matches!(event, Event::Unreachable { peer: found } if found == peer).then_some(());
        self.event("an unreachable peer", wanted).await
    }

    async fn refused(&mut self) -> (u64, Refusal) {
        let wanted = |event| if let Event::Refused { peer, refusal } = event { Some((peer, refusal)) } else { None };
        self.event("a refusal", wanted).await
    }

    /// Whether the node heard nothing but that nobody is at an address.
    fn is_silent(&mut self) -> bool {
        std::iter::from_fn(|| self.events.try_recv().ok()).all(|event| matches!(event, Event::NobodyListens { .. }))
    }

    fn count(&self, reason: &'static str) -> u64 {
        self.metrics.transport_refused.get_or_create(&Reason { reason }).get()
    }

    /// Waits until something was refused for this reason.
    async fn refusing(&self, reason: &'static str) {
        self.until(reason, |node| node.count(reason) > 0).await;
    }

    async fn close(self) {
        self.transport.close().await;
        // Ends when nothing holds the events' sender any more: no task outlives its transport.
        drop(self.transport);
        timeout(DEADLINE, self.pump).await.expect("no task is left").unwrap();
    }
}

async fn pair() -> (Node, Node) {
    let ((one, one_url), (two, two_url)) = (listen().await, listen().await);
    let members = vec![member(1, &one_url), member(2, &two_url)];
    let mut one = Node::start(1, 1, one, &one_url, members.clone());
    let mut two = Node::start(2, 1, two, &two_url, members);
    one.connected(2).await;
    two.connected(1).await;
    (one, two)
}

fn message(from: u64, to: u64, msg_type: MessageType, index: u64) -> Message {
    Message { msg_type, from, to, index, term: 1, ..Message::default() }
}

fn heartbeat(from: u64, to: u64, index: u64) -> Message {
    message(from, to, MessageType::MsgHeartbeat, index)
}

fn append(from: u64, to: u64, index: u64, bytes: usize) -> Message {
    let mut message = message(from, to, MessageType::MsgAppend, index);
    message.entries.push(Entry { index: index + 1, term: 1, data: vec![7; bytes].into(), ..Entry::default() });
    message
}

fn sealed(boot: u64, sequence: u64, message: &Message) -> Bytes {
    let mut buffer = bytes::BytesMut::new();
    encode(&mut buffer, boot, sequence, message);
    buffer.freeze()
}

/// Member `id` as these tests play it by hand, in its first life.
fn player(id: u64, url: &PeerUrl) -> Identity {
    player_at(id, 1, url)
}

/// Its start of this number.
fn player_at(id: u64, boot: u64, url: &PeerUrl) -> Identity {
    Identity::new(id, CLUSTER, Life { nonce: nonce(id), boot }, std::slice::from_ref(url))
}

/// How a member's answer begins that is written by hand, status line apart.
fn signature(id: u64) -> String {
    format!(
        "X-Raft-From: {id}\r\nX-Raft-Cluster-ID: {CLUSTER:016x}\r\nX-Raft-Nonce: {:016x}\r\nX-Raft-Boot: 1\r\n\r\n",
        nonce(id)
    )
}

async fn call(url: &PeerUrl, request: Request<Full<Bytes>>) -> Response<Incoming> {
    let stream = TcpStream::connect(url.authority()).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    timeout(DEADLINE, sender.send_request(request)).await.unwrap().unwrap()
}

fn refusal(headers: &HeaderMap) -> &str {
    headers.get("x-raft-refusal").map_or("", |token| token.to_str().unwrap())
}

/// A peer that answers every stream request with this status and these bytes, by hand.
async fn fake_peer(id: u64, status: &'static str, body: Bytes) -> (PeerUrl, JoinHandle<()>) {
    let (listener, url) = listen().await;
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n")
                && let Ok(byte) = stream.read_u8().await
            {
                head.push(byte);
            }
            if !head.starts_with(b"GET /raft/stream") {
                continue;
            }
            let answer = format!("HTTP/1.1 {status}\r\n{}", signature(id));
            // Whoever hung up does not mind.
            stream.write_all(&[answer.as_bytes(), &body].concat()).await.ok();
        }
    });
    (url, serving)
}
