//! Messages between members: both ways, in order, once, heartbeats first, and what is said when they cannot arrive.

use super::*;

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
async fn a_frame_that_came_twice_is_stepped_once() {
    let mut one = Node::alone(1).await;
    let url = dead_url().await;
    let [seventh, eighth] = [7, 8].map(|boot| player_at(2, boot, &url));
    let post = |boot, sequence, index| {
        let two = if boot == 7 { &seventh } else { &eighth };
        two.request(Method::POST, PIPELINE, 1, sealed(boot, sequence, &heartbeat(2, 1, index)))
    };
    for (boot, sequence, index) in [(7, 1, 10), (7, 1, 11), (7, 2, 12), (8, 1, 13)] {
        assert_eq!(call(&one.url, post(boot, sequence, index)).await.status(), StatusCode::NO_CONTENT);
    }
    let received = [one.message().await.index, one.message().await.index, one.message().await.index];
    assert_eq!(received, [10, 12, 13]);
    assert_eq!(one.metrics.transport_repeats.get(), 1);
    let late = eighth.request(Method::POST, PIPELINE, 1, sealed(7, 3, &heartbeat(2, 1, 14)));
    let response = call(&one.url, late).await;
    assert_eq!((response.status().as_u16(), refusal(response.headers())), (400, "frame-old-boot"));
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
        snapshots: Arc::new(NoSnapshots),
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
    let settings = Settings {
        id: 1,
        cluster: CLUSTER,
        nonce: 1,
        boot: 1,
        urls: vec![],
        metrics: metrics.clone(),
        snapshots: Arc::new(NoSnapshots),
    };
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
