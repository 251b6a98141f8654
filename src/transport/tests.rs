//! Transports over real sockets: what arrives, what is refused and with which words, and what is said when nothing
//! can arrive.

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
use super::handshake::{Identity, PIPELINE, PROBING, PROPOSE, STREAM};
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
        let metrics = Arc::new(Metrics::new());
        let settings = Settings {
            id,
            cluster: CLUSTER,
            nonce: nonce(id),
            boot,
            urls: vec![url.clone()],
            metrics: metrics.clone(),
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

    fn count(&self, reason: &'static str) -> u64 {
        self.metrics.transport_refused.get_or_create(&Reason { reason }).get()
    }

    /// Waits until something was refused for this reason.
    async fn refusing(&self, reason: &'static str) {
        let counted = timeout(DEADLINE, async {
            while self.count(reason) == 0 {
                tokio::task::yield_now().await;
            }
        });
        counted.await.unwrap_or_else(|_| panic!("nothing was refused for {reason}"));
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

/// Member `id` as these tests play it by hand.
fn player(id: u64, url: &PeerUrl) -> Identity {
    Identity::new(id, CLUSTER, nonce(id), std::slice::from_ref(url))
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
            let answer = format!(
                "HTTP/1.1 {status}\r\nX-Raft-From: {id}\r\nX-Raft-Cluster-ID: {CLUSTER:016x}\r\nX-Raft-Nonce: {:016x}\r\n\r\n",
                nonce(id)
            );
            // Whoever hung up does not mind.
            stream.write_all(&[answer.as_bytes(), &body].concat()).await.ok();
        }
    });
    (url, serving)
}

#[tokio::test]
async fn two_members_exchange_messages_both_ways() {
    let (mut one, mut two) = pair().await;
    one.transport.send(vec![append(1, 2, 5, 100_000), heartbeat(1, 2, 6)]);
    two.transport.send(vec![message(2, 1, MessageType::MsgAppendResponse, 7)]);
    let mut received = [two.message().await, two.message().await];
    received.sort_by_key(|message| message.index);
    assert_eq!(received, [append(1, 2, 5, 100_000), heartbeat(1, 2, 6)]);
    assert_eq!(one.message().await.index, 7);
    let status = one.transport.status();
    assert!(status.len() == 1 && status[0].id == 2 && status[0].stream_in && status[0].stream_out, "{status:?}");
    assert!(serde_json::to_string(&status).unwrap().contains("\"urls\":[\"http://127.0.0.1:"));
    assert_eq!(*one.meetings.lock().unwrap(), [(2, nonce(2))], "asked once for all connections");
    one.close().await;
    two.close().await;
}

#[tokio::test]
async fn thousands_of_messages_arrive_in_order_and_once() {
    let (one, mut two) = pair().await;
    let mut next = 0;
    for batch in 0..50 {
        one.transport.send((0..60).map(|i| append(1, 2, batch * 60 + i, 300)).collect());
        while next < (batch + 1) * 60 {
            assert_eq!(two.message().await.index, next);
            next += 1;
        }
    }
    assert_eq!(two.metrics.transport_repeats.get(), 0);
}

/// The last founder's start connects the cluster at once, however long the others waited: its own dials tell them.
#[tokio::test]
async fn a_late_starter_is_connected_without_waiting_for_the_next_try() {
    let mut places = Vec::new();
    for _ in 0..3 {
        places.push(listen().await);
    }
    let members: Vec<_> = (1..).zip(&places).map(|(id, (_, url))| member(id, url)).collect();
    let (late, late_url) = places.pop().unwrap();
    let late_address = late.local_addr().unwrap();
    drop(late);
    let mut early: Vec<_> =
        (1..).zip(places).map(|(id, (listener, url))| Node::start(id, 1, listener, &url, members.clone())).collect();
    early[0].connected(2).await;
    early[1].connected(1).await;
    let start = std::time::Instant::now();
    let listener = TcpListener::bind(late_address).await.unwrap();
    let mut late = Node::start(3, 1, listener, &late_url, members);
    let (mut accepted, mut attached) = (0, 0);
    late.event("streams with both", |event| {
        accepted += usize::from(matches!(event, Event::Accepted { .. }));
        attached += usize::from(matches!(event, Event::Attached { .. }));
        (accepted == 2 && attached == 2).then_some(())
    })
    .await;
    println!("connected after {:?}", start.elapsed());
}

/// The stream's reader stalls, bulk piles up, and then a heartbeat comes: it arrives before bulk that was sent first.
#[tokio::test]
async fn a_heartbeat_overtakes_bulk_that_waits() {
    let mut one = Node::alone(1).await;
    let two = player(2, &dead_url().await);
    let mut body = call(&one.url, two.request(Method::GET, STREAM, 1, Bytes::new())).await.into_body();
    one.event("the stream", |event| matches!(event, Event::Attached { peer: 2 }).then_some(())).await;
    one.transport.send((0..25).map(|index| append(1, 2, index, 1 << 20)).collect());
    one.transport.send(vec![heartbeat(1, 2, 0)]);
    let (mut decoder, mut types) = (Decoder::default(), Vec::new());
    while types.len() < 26 {
        let piece = timeout(DEADLINE, body.frame()).await.unwrap().unwrap().unwrap();
        decoder.push(piece.into_data().unwrap());
        while let Some(frame) = decoder.next().unwrap() {
            types.push(frame.message.msg_type);
        }
    }
    let place = types.iter().position(|found| *found == MessageType::MsgHeartbeat).unwrap();
    assert!(place < 20, "the heartbeat came behind {place} appends");
}

#[tokio::test]
async fn without_a_stream_messages_go_through_the_pipeline() {
    let mut two = Node::alone(2).await;
    let (listener, _) = listen().await;
    // It names a URL where nobody listens, so no stream can ever be opened to it.
    let one = Node::start(1, 1, listener, &dead_url().await, vec![member(2, &two.url)]);
    one.transport.send((0..20).map(|index| heartbeat(1, 2, index)).collect());
    let mut received = Vec::new();
    while received.len() < 20 {
        received.push(two.message().await.index);
    }
    received.sort_unstable();
    assert_eq!(received, (0..20).collect::<Vec<_>>());
    assert!(!one.transport.status()[0].stream_out);
}

#[tokio::test]
async fn each_refusal_has_its_status_and_its_word() {
    let mut one = Node::alone(1).await;
    {
        let mut verdicts = one.verdicts.lock().unwrap();
        verdicts.insert(3, Meeting::OtherNonce);
        verdicts.insert(4, Meeting::NotAMember);
        verdicts.insert(5, Meeting::Removed);
    }
    let url = dead_url().await;
    let get = |id: u64, to: u64| player(id, &url).request(Method::GET, STREAM, to, Bytes::new());
    let with = |name: &'static str, value: &'static str| {
        let mut request = get(2, 1);
        request.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        request
    };
    let post = |path, bytes| player(2, &url).request(Method::POST, path, 1, bytes);
    for (request, status, token) in [
        (with("x-raft-cluster-id", "00000000000000ff"), 412, "cluster-mismatch"),
        (get(2, 9), 412, "wrong-receiver"),
        (with("x-raft-version", "2"), 412, "version"),
        (get(3, 1), 412, "other-nonce"),
        (get(4, 1), 403, "not-a-member"),
        (get(5, 1), 410, "removed"),
        (with("x-raft-nonce", "xyz"), 400, "malformed"),
        (post(STREAM, Bytes::new()), 405, "method"),
        (post(PROBING, Bytes::new()), 405, "method"),
        (post("/raft/snapshots", Bytes::new()), 404, "not-found"),
        (post(PIPELINE, Bytes::from(vec![0; FRAME_BYTES_MAX + 100])), 413, "too-large"),
        (post(PROPOSE, Bytes::from_static(b"\x02")), 400, "malformed"),
    ] {
        let before = one.count(token);
        let response = call(&one.url, request).await;
        assert_eq!((response.status().as_u16(), refusal(response.headers())), (status, token));
        assert_eq!(response.headers()["x-raft-from"], "1");
        assert_eq!(response.headers()["x-raft-cluster-id"], format!("{CLUSTER:016x}"));
        assert_eq!(response.headers().contains_key("allow"), status == 405);
        assert_eq!(one.count(token), before + 1, "{token}");
        if status != 413 {
            let text = response.into_body().collect().await.unwrap().to_bytes();
            assert!(text.ends_with(b"\n") && text.len() > 10, "{text:?}");
        }
    }
    let peers = one.transport.status();
    assert!(peers.iter().all(|peer| peer.id == 2), "who was refused is no peer: {peers:?}");
    assert!(one.events.try_recv().is_err(), "and the node heard nothing");
}

#[tokio::test]
async fn a_member_that_is_refused_is_told_why() {
    let mut one = Node::alone(1).await;
    for (verdict, expected) in [
        (Meeting::NotAMember, Refusal::NotAMember),
        (Meeting::OtherNonce, Refusal::OtherNonce),
        (Meeting::Removed, Refusal::Removed),
    ] {
        one.verdicts.lock().unwrap().insert(2, verdict);
        let (listener, url) = listen().await;
        let mut two = Node::start(2, 1, listener, &url, vec![member(1, &one.url)]);
        assert_eq!(two.refused().await, (1, expected));
        two.close().await;
    }
    // A sender that is not known *yet* tries again until it is.
    one.verdicts.lock().unwrap().insert(2, Meeting::NotAMember);
    let (listener, url) = listen().await;
    let mut two = Node::start(2, 1, listener, &url, vec![member(1, &one.url)]);
    assert_eq!(two.refused().await, (1, Refusal::NotAMember));
    one.verdicts.lock().unwrap().insert(2, Meeting::Known);
    two.connected(1).await;
    one.connected(2).await;
}

#[tokio::test]
async fn another_member_at_a_peers_address_is_not_taken_for_it() {
    let three = Node::alone(3).await;
    let (listener, url) = listen().await;
    let mut one = Node::start(1, 1, listener, &url, vec![member(2, &three.url)]);
    assert_eq!(one.refused().await, (2, Refusal::WrongReceiver));
}

#[tokio::test]
async fn a_stranger_at_a_peers_address_cannot_tell_us_to_leave() {
    for (id, told) in [(3, None), (2, Some((2, Refusal::Removed)))] {
        let (fake_url, serving) = fake_peer(id, "410 Gone\r\nX-Raft-Refusal: removed", Bytes::new()).await;
        let (listener, url) = listen().await;
        let mut one = Node::start(1, 1, listener, &url, vec![member(2, &fake_url)]);
        match told {
            Some(refused) => assert_eq!(one.refused().await, refused),
            None => {
                one.refusing("wrong-receiver").await;
                assert!(one.events.try_recv().is_err(), "the node hears nothing of it");
            }
        }
        serving.abort();
    }
}

/// It would accept us: it knows nobody. But its answer would be that of a member without memory.
#[tokio::test]
async fn a_wiped_peer_is_not_used() {
    let wiped = Node::alone(2).await;
    let (listener, url) = listen().await;
    let mut one = Node::start(1, 1, listener, &url, vec![]);
    one.verdicts.lock().unwrap().insert(2, Meeting::OtherNonce);
    one.transport.set_peers(vec![member(2, &wiped.url)]);
    one.refusing("other-nonce").await;
    while let Ok(event) = one.events.try_recv() {
        assert!(!matches!(event, Event::Accepted { .. }), "{event:?}");
    }
}

/// It was away for so long that it is dialled rarely; when it comes, it is dialled at once.
#[tokio::test]
async fn a_peer_that_connects_to_us_is_dialled_at_once() {
    let (absent, absent_url) = listen().await;
    let (listener, url) = listen().await;
    let one = Node::start(1, 1, listener, &url, vec![member(2, &absent_url)]);
    // One probe, and tries with pauses of 20, 40, … 640 ms: the next comes after half a second at least.
    for _ in 0..8 {
        drop(timeout(DEADLINE, absent.accept()).await.unwrap().unwrap());
    }
    let _stream = call(&one.url, player(2, &absent_url).request(Method::GET, STREAM, 1, Bytes::new())).await;
    timeout(Duration::from_millis(400), absent.accept()).await.expect("it is dialled").unwrap();
}

#[tokio::test]
async fn a_frame_that_came_twice_is_stepped_once() {
    let mut one = Node::alone(1).await;
    let two = player(2, &dead_url().await);
    let post =
        |boot, sequence, index| two.request(Method::POST, PIPELINE, 1, sealed(boot, sequence, &heartbeat(2, 1, index)));
    for (boot, sequence, index) in [(7, 1, 10), (7, 1, 11), (7, 2, 12), (8, 1, 13)] {
        assert_eq!(call(&one.url, post(boot, sequence, index)).await.status(), StatusCode::NO_CONTENT);
    }
    let received = [one.message().await.index, one.message().await.index, one.message().await.index];
    assert_eq!(received, [10, 12, 13]);
    assert_eq!(one.metrics.transport_repeats.get(), 1);
    let response = call(&one.url, post(7, 3, 14)).await;
    assert_eq!((response.status().as_u16(), refusal(response.headers())), (400, "frame-old-boot"));
}

#[tokio::test]
async fn a_bad_frame_is_refused_and_its_connection_closed() {
    let mut one = Node::alone(1).await;
    let two = player(2, &dead_url().await);
    let good = sealed(1, 1, &heartbeat(2, 1, 1));
    let mut corrupt = good.to_vec();
    *corrupt.last_mut().unwrap() ^= 1;
    for (bytes, status, token) in [
        (Bytes::from_static(b"no frame at all"), 413, "frame-too-long"),
        (Bytes::new(), 400, "frame-truncated"),
        (good.slice(..good.len() - 1), 400, "frame-truncated"),
        (corrupt.into(), 400, "frame-checksum"),
        (sealed(1, 1, &heartbeat(3, 1, 1)), 400, "frame-wrong-sender"),
        (sealed(1, 1, &heartbeat(2, 3, 1)), 400, "frame-wrong-receiver"),
    ] {
        let response = call(&one.url, two.request(Method::POST, PIPELINE, 1, bytes)).await;
        assert_eq!((response.status().as_u16(), refusal(response.headers())), (status, token));
        assert_eq!(response.headers()["connection"], "close");
        assert!(one.count(token) > 0, "{token}");
    }
    assert_eq!(call(&one.url, two.request(Method::POST, PIPELINE, 1, good)).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(one.message().await.index, 1);
}

#[tokio::test]
async fn a_stream_of_garbage_is_closed_after_what_was_good() {
    for (garbage, token) in [
        (Bytes::from_static(b"\xff\xff\xff\xff\xff\xff\xff\xff"), "frame-too-long"),
        (Bytes::from_static(b"\0\0\0\0\0\0\0\x01x"), "frame-too-short"),
        (sealed(1, 2, &heartbeat(3, 1, 1)), "frame-wrong-sender"),
    ] {
        let body = [sealed(1, 1, &heartbeat(2, 1, 42)), garbage].concat();
        let (fake_url, serving) = fake_peer(2, "200 OK", body.into()).await;
        let (listener, url) = listen().await;
        let mut one = Node::start(1, 1, listener, &url, vec![member(2, &fake_url)]);
        assert_eq!(one.message().await.index, 42);
        one.unreachable(2).await;
        assert!(one.count(token) > 0, "{token}");
        one.close().await;
        serving.abort();
    }
}

#[tokio::test]
async fn a_peer_whose_first_url_is_dead_is_reached_at_its_second() {
    let two = Node::alone(2).await;
    let (listener, url) = listen().await;
    let urls = vec![dead_url().await, two.url.clone()];
    let mut one = Node::start(1, 1, listener, &url, vec![Member { id: 2, urls }]);
    one.connected(2).await;
}

/// The reader has stalled: what exceeds the queue is dropped, counted, and said once.
#[tokio::test]
async fn a_full_queue_drops_and_says_so() {
    let mut one = Node::alone(1).await;
    let two = player(2, &dead_url().await);
    let _stalled = call(&one.url, two.request(Method::GET, STREAM, 1, Bytes::new())).await;
    one.event("the stream", |event| matches!(event, Event::Attached { peer: 2 }).then_some(())).await;
    one.transport.send((0..80).map(|index| append(1, 2, index, 1 << 20)).collect());
    one.unreachable(2).await;
    let dropped = one.metrics.peer_dropped_messages.get_or_create(&crate::metrics::Peer { peer: 2 }).get();
    assert!((40..=49).contains(&dropped), "{dropped} of 80 MiB do not fit into 32 MiB");
    let status = one.transport.status();
    assert!(status[0].queued_bytes <= 32 << 20, "{status:?}");
}

#[tokio::test]
async fn a_second_stream_ends_the_first() {
    let mut one = Node::alone(1).await;
    let two = player(2, &dead_url().await);
    let get = || two.request(Method::GET, STREAM, 1, Bytes::new());
    let mut first = call(&one.url, get()).await.into_body();
    let mut second = call(&one.url, get()).await.into_body();
    let ended = timeout(DEADLINE, async { while let Some(Ok(_)) = first.frame().await {} });
    ended.await.expect("the first stream ends");
    one.transport.send(vec![heartbeat(1, 2, 3)]);
    let piece = timeout(DEADLINE, second.frame()).await.unwrap().unwrap().unwrap();
    let mut decoder = Decoder::default();
    decoder.push(piece.into_data().unwrap());
    assert_eq!(decoder.next().unwrap().unwrap().message.index, 3);
    assert!(one.events.try_recv().is_ok());
}

#[tokio::test]
async fn a_peer_that_was_restarted_is_connected_again() {
    let (mut one, two) = pair().await;
    let url = two.url.clone();
    two.close().await;
    one.unreachable(2).await;
    // Into the void: lost, and said so.
    one.transport.send(vec![heartbeat(1, 2, 1)]);
    one.unreachable(2).await;
    let listener = TcpListener::bind(url.authority()).await.unwrap();
    let mut two = Node::start(2, 2, listener, &url, vec![member(1, &one.url)]);
    two.connected(1).await;
    one.connected(2).await;
    one.transport.send(vec![heartbeat(1, 2, 2)]);
    assert_eq!(two.message().await.index, 2);
    two.transport.send(vec![heartbeat(2, 1, 3)]);
    assert_eq!(one.message().await.index, 3, "frames of the new start are numbered anew");
}

#[tokio::test]
async fn a_peer_hears_of_the_leader_when_it_connects() {
    let two = Node::alone(2).await;
    two.transport.set_leader(7);
    let (listener, url) = listen().await;
    let mut one = Node::start(1, 1, listener, &url, vec![member(2, &two.url)]);
    let wanted = |event| if let Event::Accepted { peer: 2, leader } = event { Some(leader) } else { None };
    assert_eq!(one.event("acceptance", wanted).await, 7);
}

/// A member that was away while another joined is dialled by it, and learns there where to dial back.
#[tokio::test]
async fn who_introduces_itself_becomes_a_peer_until_it_is_dropped() {
    let mut one = Node::alone(1).await;
    let (listener, url) = listen().await;
    let mut two = Node::start(2, 1, listener, &url, vec![member(1, &one.url)]);
    one.connected(2).await;
    two.connected(1).await;
    one.transport.send(vec![heartbeat(1, 2, 1)]);
    assert_eq!(two.message().await.index, 1);
    one.transport.set_peers(vec![]);
    assert_eq!(one.transport.status().len(), 1, "never listed, so not dropped");
    one.transport.set_peers(vec![member(1, &one.url), member(2, &url)]);
    one.verdicts.lock().unwrap().insert(2, Meeting::Removed);
    one.transport.set_peers(vec![member(1, &one.url)]);
    assert!(one.transport.status().is_empty());
    assert_eq!(two.refused().await, (1, Refusal::Removed), "it is told when it comes again");
    one.close().await;
    two.close().await;
}

#[tokio::test]
async fn a_member_that_moved_is_found_at_its_new_address() {
    let (mut one, two) = pair().await;
    two.close().await;
    one.unreachable(2).await;
    let (listener, moved) = listen().await;
    // It is silent about itself, so that only the new address can lead to it.
    let mut two = Node::start(2, 2, listener, &moved, vec![]);
    one.transport.set_peers(vec![member(1, &one.url), member(2, &moved)]);
    one.connected(2).await;
    one.transport.send(vec![heartbeat(1, 2, 1)]);
    assert_eq!(two.message().await.index, 1);
}

#[tokio::test]
async fn a_forwarded_proposal_comes_back_with_its_position_or_a_rejection() {
    let (one, mut two) = pair().await;
    let id = |counter| RequestId { node: 1, boot: 1, counter };
    let sent = vec![(id(1), Bytes::from_static(b"a")), (id(2), Bytes::from(vec![1; 100_000]))];
    let asked = tokio::spawn(one.transport.propose(2, sent.clone()));
    let wanted = |event| match event {
        Event::Propose { from: 1, proposals, reply } => Some((proposals, reply)),
        _ => None,
    };
    let (proposals, reply) = two.event("proposals", wanted).await;
    assert_eq!(proposals, sent);
    let outcomes = vec![Ok(Position { term: 3, index: 9 }), Err(Rejection::DiskFull)];
    reply.send(outcomes.clone()).unwrap();
    assert_eq!(asked.await.unwrap(), Ok(outcomes));
    // The leader took it and will not say what became of it.
    let asked = tokio::spawn(one.transport.propose(2, sent));
    drop(two.event("proposals", wanted).await);
    assert!(matches!(asked.await.unwrap(), Err(ProposeError::Unknown(_))));
}

#[tokio::test]
async fn a_proposal_that_surely_did_not_arrive_says_so() {
    let (listener, url) = listen().await;
    let one = Node::start(1, 1, listener, &url, vec![member(2, &dead_url().await)]);
    let proposals = || vec![(RequestId { node: 1, boot: 1, counter: 1 }, Bytes::new())];
    for leader in [2, 3] {
        let outcome = one.transport.propose(leader, proposals()).await;
        assert!(matches!(outcome, Err(ProposeError::NotSent(_))), "leader {leader}: {outcome:?}");
    }
    // Nor does a leader take it that does not count us as a member.
    let two = Node::alone(2).await;
    two.verdicts.lock().unwrap().insert(1, Meeting::NotAMember);
    one.transport.set_peers(vec![member(2, &two.url)]);
    let outcome = one.transport.propose(2, proposals()).await;
    assert!(matches!(outcome, Err(ProposeError::NotSent(_))), "{outcome:?}");
}

/// A leader that dies with a proposal in hand: it may have appended it.
#[tokio::test]
async fn a_proposal_whose_answer_is_lost_is_unknown() {
    let (one, mut two) = pair().await;
    let proposals = vec![(RequestId { node: 1, boot: 1, counter: 1 }, Bytes::new())];
    let asked = tokio::spawn(one.transport.propose(2, proposals));
    let wanted = |event| if let Event::Propose { reply, .. } = event { Some(reply) } else { None };
    let _reply = two.event("proposals", wanted).await;
    two.transport.close().await;
    assert!(matches!(asked.await.unwrap(), Err(ProposeError::Unknown(_))));
}

#[tokio::test]
async fn a_probe_measures_the_way_and_the_clock() {
    let (one, _two) = pair().await;
    let measured = timeout(DEADLINE, async {
        loop {
            let status = one.transport.status().remove(0);
            if let (Some(round_trip), Some(drift)) = (status.round_trip_seconds, status.clock_drift_seconds) {
                return (round_trip, drift);
            }
            tokio::task::yield_now().await;
        }
    });
    let (round_trip, drift) = measured.await.unwrap();
    assert!(round_trip > 0.0 && drift.abs() < round_trip.max(0.001), "{round_trip} {drift}");
    let request = Request::get("/raft/probing").body(Full::default()).unwrap();
    let body = call(&one.url, request).await.into_body().collect().await.unwrap().to_bytes();
    let probe: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((&probe["id"], &probe["cluster"]), (&1.into(), &format!("{CLUSTER:016x}").into()));
}

/// A slow node holds its peers back through TCP, and loses nothing.
#[tokio::test]
async fn a_node_that_is_behind_makes_its_peer_wait() {
    let (listener, url) = listen().await;
    let metrics = Arc::new(Metrics::new());
    let settings = Settings {
        id: 1,
        cluster: CLUSTER,
        nonce: nonce(1),
        boot: 1,
        urls: vec![url.clone()],
        metrics: metrics.clone(),
    };
    let (sender, mut events) = mpsc::channel(2);
    let two = Node::alone(2).await;
    let one = Transport::start(settings, vec![listener], vec![member(2, &two.url)], sender, CancellationToken::new());
    let mut next = 0;
    let all = timeout(DEADLINE, async {
        while next < 1000 {
            match events.recv().await.unwrap() {
                Event::Meet { reply, .. } => reply.send(Meeting::Known).unwrap(),
                Event::Attached { .. } => {}
                Event::Accepted { .. } => {
                    two.transport.send((0..1000).map(|index| append(2, 1, index, 2000)).collect());
                }
                Event::Message(message) => {
                    assert_eq!(message.index, next);
                    next += 1;
                }
                event => panic!("{event:?}"),
            }
        }
    });
    all.await.unwrap();
    one.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_stream_says_that_it_lives() {
    let metrics = Arc::new(Metrics::new());
    let settings = Settings { id: 1, cluster: CLUSTER, nonce: 1, boot: 1, urls: vec![], metrics: metrics.clone() };
    let hub = hub::Hub::new(settings, mpsc::channel(1).0, CancellationToken::new());
    let peer = Arc::new(peer::Peer::new(2, vec![], false, &metrics, CancellationToken::new()));
    let mut stream = stream::Outgoing::attach(hub, peer.clone(), CancellationToken::new());
    let start = tokio::time::Instant::now();
    for beat in 1..=3 {
        let piece = stream.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(piece[..], [0; 8]);
        assert_eq!(start.elapsed().as_millis().div_ceil(100), beat * 15);
    }
    peer.outbox.push(std::iter::once(heartbeat(1, 2, 1)));
    assert!(stream.frame().await.unwrap().unwrap().into_data().unwrap().len() > 8, "a message does not wait");
}
