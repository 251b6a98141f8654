//! Snapshots go over whole, block by block, beside everything else; or not at all, and that is said once.

use std::io::{self, Read};
use std::sync::Condvar;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use raft::eraftpb::Snapshot;
use tokio::net::TcpSocket;

use super::*;

const SIZE: u64 = 64 << 20;
/// What both ends may hold: blocks in their channels and hands, and what sockets buffer on the way.
const IN_FLIGHT_MAX: u64 = 24 << 20;

/// Both ends' files. A byte of a file follows from its place, so that no file need exist.
struct Files {
    size_bytes: u64,
    /// Bytes that the source can really give.
    readable_bytes: AtomicU64,
    read: AtomicU64,
    written: AtomicU64,
    /// The most that was read and not written yet.
    in_flight: AtomicU64,
    /// The sink waits at it before each block.
    open: (Mutex<bool>, Condvar),
    /// What a finished file says of itself.
    named: Mutex<(u64, u64)>,
    sinks: AtomicUsize,
    kept: AtomicUsize,
}

impl Files {
    fn new(size_bytes: u64) -> Arc<Files> {
        Arc::new(Files {
            size_bytes,
            readable_bytes: AtomicU64::new(size_bytes),
            read: AtomicU64::new(0),
            written: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            open: (Mutex::new(true), Condvar::new()),
            named: Mutex::new((7, 3)),
            sinks: AtomicUsize::new(0),
            kept: AtomicUsize::new(0),
        })
    }

    fn gate(&self, open: bool) {
        *self.open.0.lock().unwrap() = open;
        self.open.1.notify_all();
    }

    fn nothing_stayed(&self) -> bool {
        self.sinks.load(Ordering::SeqCst) == 0 && self.kept.load(Ordering::SeqCst) == 0
    }
}

fn byte_at(place: u64) -> u8 {
    (place % 251) as u8
}

struct Ends(Arc<Files>);

impl SnapshotFiles for Ends {
    fn open(&self, index: u64, term: u64) -> io::Result<(u64, Box<dyn Read + Send>)> {
        assert_eq!((index, term), (7, 3));
        Ok((self.0.size_bytes, Box::new(Source { files: self.0.clone(), place: 0 })))
    }

    fn receive(&self) -> io::Result<Box<dyn SnapshotSink>> {
        self.0.sinks.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Sink { files: self.0.clone(), place: 0, damaged: false }))
    }
}

struct Source {
    files: Arc<Files>,
    place: u64,
}

impl Read for Source {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.files.readable_bytes.load(Ordering::SeqCst).saturating_sub(self.place);
        let taken = left.min(bytes.len() as u64);
        for byte in &mut bytes[..taken as usize] {
            *byte = byte_at(self.place);
            self.place += 1;
        }
        let read = self.files.read.fetch_add(taken, Ordering::SeqCst) + taken;
        let written = self.files.written.load(Ordering::SeqCst);
        self.files.in_flight.fetch_max(read - written, Ordering::SeqCst);
        Ok(taken as usize)
    }
}

struct Sink {
    files: Arc<Files>,
    place: u64,
    damaged: bool,
}

impl SnapshotSink for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        assert!(bytes.len() <= 256 << 10, "a block of {}", bytes.len());
        let (open, opened) = &self.files.open;
        drop(opened.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
        for byte in bytes {
            self.damaged |= *byte != byte_at(self.place);
            self.place += 1;
        }
        self.files.written.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        Ok(())
    }

    fn finish(self: Box<Self>) -> io::Result<(u64, u64)> {
        if self.damaged || self.place != self.files.size_bytes {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.files.kept.fetch_add(1, Ordering::SeqCst);
        Ok(*self.files.named.lock().unwrap())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.files.sinks.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Member 1, which has the snapshot, and member 2, which it reaches through a meddler.
async fn pair(files: &Arc<Files>) -> (Node, Node, Arc<Mutex<Meddling>>) {
    let ((one, one_url), (two, two_url)) = (listen().await, listen_narrowly());
    let (between, meddling) = meddler(&two_url).await;
    let peers = vec![member(1, &one_url), member(2, &between)];
    let mut one = Node::start_with(1, 1, one, &one_url, peers.clone(), Arc::new(Ends(files.clone())));
    let mut two = Node::start_with(2, 1, two, &two_url, peers, Arc::new(Ends(files.clone())));
    one.connected(2).await;
    two.connected(1).await;
    (one, two, meddling)
}

/// Listens with receive buffers that do not grow: the kernel's could hold half of a large file.
fn listen_narrowly() -> (TcpListener, PeerUrl) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(256 << 10).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1024).unwrap();
    let url = PeerUrl::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    (listener, url)
}

/// What is done to a connection that carries a lot.
#[derive(Clone, Copy, PartialEq)]
enum Meddling {
    None,
    Cut,
    FlipABit,
}

/// Forwards connections to `to`, and meddles with them behind their first MiB.
async fn meddler(to: &PeerUrl) -> (PeerUrl, Arc<Mutex<Meddling>>) {
    let (listener, url) = listen_narrowly();
    let (to, meddling) = (to.authority(), Arc::new(Mutex::new(Meddling::None)));
    let told = meddling.clone();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let (to, meddling) = (to.clone(), told.clone());
            tokio::spawn(async move {
                let Ok(far) = TcpStream::connect(to).await else { return };
                let ((mut from_near, mut to_near), (mut from_far, mut to_far)) = (near.into_split(), far.into_split());
                let up = async {
                    let (mut buffer, mut passed) = (vec![0; 64 << 10], 0);
                    while let Ok(read @ 1..) = from_near.read(&mut buffer).await {
                        passed += read;
                        let meddling = *meddling.lock().unwrap();
                        match meddling {
                            Meddling::Cut if passed > 1 << 20 => return,
                            Meddling::FlipABit if passed > 1 << 20 && passed - read <= 1 << 20 => buffer[read / 2] ^= 1,
                            _ => {}
                        }
                        if to_far.write_all(&buffer[..read]).await.is_err() {
                            return;
                        }
                    }
                };
                tokio::select! {
                    () = up => {}
                    // However it ends, it ends.
                    _ = tokio::io::copy(&mut from_far, &mut to_near) => {}
                }
            });
        }
    });
    (url, meddling)
}

fn snapshot(from: u64, to: u64) -> Message {
    let mut message = message(from, to, MessageType::MsgSnapshot, 0);
    let mut snapshot = Snapshot::default();
    (snapshot.mut_metadata().index, snapshot.mut_metadata().term) = (7, 3);
    snapshot.mut_metadata().mut_conf_state().voters = vec![1, 2];
    message.set_snapshot(snapshot);
    message
}

async fn sent(node: &mut Node) -> (u64, bool) {
    let wanted = |event| match event {
        Event::SnapshotSent { peer, delivered } => Some((peer, delivered)),
        _ => None,
    };
    node.event("the end of a snapshot", wanted).await
}

/// Waits until the source has stood still for a while: everything on the way is full.
async fn settled(files: &Files) {
    let settling = timeout(DEADLINE, async {
        let (mut read, mut since) = (0, std::time::Instant::now());
        while since.elapsed() < Duration::from_millis(300) {
            let now = files.read.load(Ordering::SeqCst);
            if now != read {
                (read, since) = (now, std::time::Instant::now());
            }
            tokio::task::yield_now().await;
        }
    });
    settling.await.expect("the source stands still");
}

async fn received(node: &mut Node) -> Message {
    let wanted = |event| if let Event::Snapshot { message } = event { Some(message) } else { None };
    node.event("a snapshot", wanted).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_snapshot_goes_over_in_bounded_memory_beside_heartbeats() {
    let files = Files::new(SIZE);
    let (mut one, mut two, _) = pair(&files).await;
    files.gate(false);
    one.transport.send_snapshot(snapshot(1, 2));
    one.until("bytes on their way", |_| files.in_flight.load(Ordering::SeqCst) > 1 << 20).await;
    // Its disk stands still, and everything else goes on.
    for index in 0..100 {
        one.transport.send(vec![heartbeat(1, 2, index)]);
        assert_eq!(two.message().await.index, index);
        two.transport.send(vec![heartbeat(2, 1, index)]);
        assert_eq!(one.message().await.index, index);
    }
    let progress = |node: &Node| serde_json::to_value(node.transport.status()[0].snapshot).unwrap();
    assert!(progress(&one)["sent_bytes"].as_u64().unwrap() > 0, "{}", progress(&one));
    assert!(progress(&two)["received_bytes"].is_u64(), "{}", progress(&two));
    assert_eq!((&progress(&one)["total_bytes"], &progress(&two)["total_bytes"]), (&SIZE.into(), &SIZE.into()));
    settled(&files).await;
    files.gate(true);
    assert_eq!(received(&mut two).await, snapshot(1, 2));
    assert_eq!(sent(&mut one).await, (2, true));
    assert_eq!((files.kept.load(Ordering::SeqCst), files.written.load(Ordering::SeqCst)), (1, SIZE));
    let in_flight = files.in_flight.load(Ordering::SeqCst);
    assert!(in_flight <= IN_FLIGHT_MAX, "{in_flight} bytes were read and not written");
    one.until("the end", |one| one.transport.status()[0].snapshot.is_none()).await;
    two.until("the end", |two| two.transport.status()[0].snapshot.is_none()).await;
    assert_eq!(one.metrics.peer_snapshot_sent_bytes.get_or_create(&crate::metrics::Peer { peer: 2 }).get(), SIZE);
    assert_eq!(two.metrics.peer_snapshot_received_bytes.get_or_create(&crate::metrics::Peer { peer: 1 }).get(), SIZE);
    one.close().await;
    two.close().await;
}

#[tokio::test]
async fn a_snapshot_that_breaks_leaves_nothing_and_the_next_try_works() {
    let files = Files::new(8 << 20);
    let (mut one, mut two, meddling) = pair(&files).await;
    *meddling.lock().unwrap() = Meddling::Cut;
    one.transport.send_snapshot(snapshot(1, 2));
    assert_eq!(sent(&mut one).await, (2, false));
    two.until("the sink's end", |_| files.nothing_stayed()).await;
    assert!(files.written.load(Ordering::SeqCst) < files.size_bytes);
    *meddling.lock().unwrap() = Meddling::None;
    // The source is at fault: the file is shorter than it said.
    files.readable_bytes.store(5 << 20, Ordering::SeqCst);
    one.transport.send_snapshot(snapshot(1, 2));
    assert_eq!(sent(&mut one).await, (2, false));
    two.until("the sink's end", |_| files.nothing_stayed()).await;
    files.readable_bytes.store(files.size_bytes, Ordering::SeqCst);
    one.transport.send_snapshot(snapshot(1, 2));
    assert_eq!(received(&mut two).await, snapshot(1, 2));
    assert_eq!(sent(&mut one).await, (2, true));
    assert_eq!(files.kept.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_snapshot_damaged_on_its_way_is_refused() {
    let files = Files::new(4 << 20);
    let (mut one, mut two, meddling) = pair(&files).await;
    *meddling.lock().unwrap() = Meddling::FlipABit;
    one.transport.send_snapshot(snapshot(1, 2));
    assert_eq!(sent(&mut one).await, (2, false));
    assert_eq!(two.count("snapshot-damaged"), 1);
    assert!(files.nothing_stayed());
    while let Ok(event) = two.events.try_recv() {
        assert!(!matches!(event, Event::Snapshot { .. }), "{event:?}");
    }
    let error = one.transport.status().remove(0).last_error.unwrap();
    assert!(error.contains("400") && error.contains("damaged"), "{error}");
}

#[tokio::test]
async fn a_file_that_holds_another_snapshot_is_refused() {
    let files = Files::new(100);
    let (mut one, mut two, _) = pair(&files).await;
    for named in [(8, 3), (7, 4)] {
        *files.named.lock().unwrap() = named;
        one.transport.send_snapshot(snapshot(1, 2));
        assert_eq!(sent(&mut one).await, (2, false));
    }
    assert_eq!(two.count("snapshot-mismatch"), 2);
    while let Ok(event) = two.events.try_recv() {
        assert!(!matches!(event, Event::Snapshot { .. }), "{event:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_snapshot_to_the_same_peer_is_refused_at_once() {
    let files = Files::new(1000);
    let (mut one, mut two, _) = pair(&files).await;
    files.gate(false);
    one.transport.send_snapshot(snapshot(1, 2));
    one.transport.send_snapshot(snapshot(1, 2));
    assert_eq!(sent(&mut one).await, (2, false), "the second, while the first is on its way");
    files.gate(true);
    assert_eq!(sent(&mut one).await, (2, true));
    received(&mut two).await;
    one.transport.send_snapshot(snapshot(1, 2));
    assert_eq!(sent(&mut one).await, (2, true), "its slot is free when its end is told");
}

#[tokio::test]
async fn four_snapshots_are_on_their_way_at_once_and_a_fifth_is_refused() {
    let (listener, url) = listen().await;
    // They take connections and never say a word.
    let (mut silent, mut peers) = (Vec::new(), Vec::new());
    for id in 2..=6 {
        let (listener, url) = listen().await;
        silent.push(listener);
        peers.push(member(id, &url));
    }
    let mut one = Node::start_with(1, 1, listener, &url, peers, Arc::new(Ends(Files::new(SIZE))));
    for to in 2..=6 {
        one.transport.send_snapshot(snapshot(1, to));
    }
    assert_eq!(sent(&mut one).await, (6, false));
    // Dropped while its snapshot is on its way.
    one.transport.set_peers(vec![]);
    let mut ended = Vec::new();
    for _ in 2..=5 {
        ended.push(sent(&mut one).await);
    }
    ended.sort_unstable();
    assert_eq!(ended, [(2, false), (3, false), (4, false), (5, false)]);
    one.close().await;
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_sent_says_so() {
    let (listener, url) = listen().await;
    let peers = vec![member(2, &dead_url().await)];
    let mut one = Node::start_with(1, 1, listener, &url, peers, Arc::new(Ends(Files::new(100))));
    for to in [2, 3] {
        one.transport.send_snapshot(snapshot(1, to));
        assert_eq!(sent(&mut one).await, (to, false));
    }
    // No such file here; then no place for it there.
    let (mut three, _four) = super::pair().await;
    three.transport.send_snapshot(snapshot(1, 2));
    assert_eq!(sent(&mut three).await, (2, false));
    let two = Node::alone(2).await;
    one.transport.set_peers(vec![member(2, &two.url)]);
    one.connected(2).await;
    one.transport.send_snapshot(snapshot(1, 2));
    assert_eq!(sent(&mut one).await, (2, false));
    assert_eq!(two.count("snapshot-not-stored"), 1);
}

/// Cut off in the middle: the sender leaves, and so does the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_member_is_cut_off_from_its_snapshot() {
    let files = Files::new(SIZE);
    let (mut one, two, _) = pair(&files).await;
    files.gate(false);
    one.transport.send_snapshot(snapshot(1, 2));
    one.until("bytes on their way", |_| files.in_flight.load(Ordering::SeqCst) > 1 << 20).await;
    one.transport.set_peers(vec![]);
    assert_eq!(sent(&mut one).await, (2, false));
    files.gate(true);
    two.until("the sink's end", |_| files.nothing_stayed()).await;
}

#[tokio::test]
async fn who_may_not_speak_may_not_send_a_snapshot() {
    let files = Files::new(100);
    let (listener, url) = listen().await;
    let mut one = Node::start_with(1, 1, listener, &url, vec![], Arc::new(Ends(files.clone())));
    one.verdicts.lock().unwrap().insert(3, Meeting::Removed);
    let dead = dead_url().await;
    let stranger = Identity::new(2, CLUSTER + 1, Life { nonce: nonce(2), boot: 1 }, std::slice::from_ref(&dead));
    let file: Vec<u8> = (0..100).map(byte_at).collect();
    let body = |message: &Message| -> Bytes { [&sealed(1, 1, message)[..], &file].concat().into() };
    let mut with_data = snapshot(2, 1);
    with_data.mut_snapshot().data = vec![1].into();
    let mut long = sealed(1, 1, &snapshot(2, 1)).to_vec();
    long[5] = 2;
    for (sender, to, body, status, token) in [
        (&stranger, 1, body(&snapshot(2, 1)), 412, "cluster-mismatch"),
        (&player(2, &dead), 3, body(&snapshot(2, 1)), 412, "wrong-receiver"),
        (&player(3, &dead), 1, body(&snapshot(3, 1)), 410, "removed"),
        (&player(2, &dead), 1, body(&snapshot(4, 1)), 400, "frame-wrong-sender"),
        (&player(2, &dead), 1, body(&heartbeat(2, 1, 1)), 400, "malformed"),
        // The number of the one before.
        (&player(2, &dead), 1, body(&snapshot(2, 1)), 400, "malformed"),
        (&player(4, &dead), 1, sealed(1, 1, &snapshot(4, 1)).slice(..30), 400, "malformed"),
        (&player(4, &dead), 1, body(&Message { from: 4, ..with_data }), 400, "malformed"),
        (&player(2, &dead), 1, Bytes::from([long, vec![0; 200_000]].concat()), 413, "too-large"),
    ] {
        let response = call(&one.url, sender.request(Method::POST, SNAPSHOT, to, body)).await;
        assert_eq!((response.status().as_u16(), refusal(response.headers())), (status, token));
    }
    assert!(one.is_silent() && files.nothing_stayed());
    let good = player(5, &dead).request(Method::POST, SNAPSHOT, 1, body(&snapshot(5, 1)));
    assert_eq!(call(&one.url, good).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(received(&mut one).await, snapshot(5, 1));
}

#[tokio::test]
async fn a_third_snapshot_at_once_is_refused_and_so_is_one_without_a_length() {
    let one = Node::alone(1).await;
    let begin = async |length: &str| {
        let request = player(2, &dead_url().await).request(Method::POST, SNAPSHOT, 1, Bytes::new());
        let headers = request.headers().iter();
        let headers: String = headers.map(|(name, value)| format!("{name}: {}\r\n", value.to_str().unwrap())).collect();
        let mut stream = TcpStream::connect(one.url.authority()).await.unwrap();
        stream.write_all(format!("POST {SNAPSHOT} HTTP/1.1\r\n{headers}{length}\r\n\r\n").as_bytes()).await.unwrap();
        stream
    };
    let status = async |mut stream: TcpStream| {
        let mut line = [0; 12];
        timeout(DEADLINE, stream.read_exact(&mut line)).await.unwrap().unwrap();
        String::from_utf8(line.to_vec()).unwrap()
    };
    assert_eq!(status(begin("Transfer-Encoding: chunked").await).await, "HTTP/1.1 400");
    assert_eq!(status(begin(&format!("Content-Length: {}", 65_u64 << 30)).await).await, "HTTP/1.1 413");
    let _two = (begin("Content-Length: 1000").await, begin("Content-Length: 1000").await);
    one.until("two snapshots", |one| one.transport.hub.receiving.available_permits() == 0).await;
    assert_eq!(status(begin("Content-Length: 1000").await).await, "HTTP/1.1 503");
}
