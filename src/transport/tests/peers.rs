//! Peers come, move, return and go.

use super::super::dial::{connect, is_refused};
use super::super::peer::Peer;
use super::*;

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
async fn a_peer_whose_first_url_is_dead_is_reached_at_its_second() {
    let two = Node::alone(2).await;
    let (listener, url) = listen().await;
    let urls = vec![dead_url().await, two.url.clone()];
    let mut one = Node::start(1, 1, listener, &url, vec![Member { id: 2, urls }]);
    one.connected(2).await;
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

/// Both ends of both streams are cut, and what the removed member tries next is answered with the new verdict.
#[tokio::test]
async fn a_removed_member_is_cut_off_and_told() {
    let (mut one, mut two) = pair().await;
    one.verdicts.lock().unwrap().insert(2, Meeting::Removed);
    one.transport.set_peers(vec![member(1, &one.url)]);
    two.unreachable(1).await;
    two.until("the end of our reading", |two| !two.transport.status()[0].stream_out).await;
    assert_eq!(two.refused().await, (1, Refusal::Removed));
    let change = two.transport.reconfigure(1, Bytes::new()).await;
    assert!(matches!(&change, Err(ProposeError::NotSent(text)) if text.contains("410")), "{change:?}");
    assert!(one.transport.status().is_empty());
    while let Ok(event) = one.events.try_recv() {
        assert!(!matches!(event, Event::Reconfigure { .. }), "{event:?}");
    }
}

/// It introduced itself, and was removed before this member ever listed it.
#[tokio::test]
async fn a_removed_member_that_was_never_listed_is_cut_off_and_told() {
    let mut one = Node::alone(1).await;
    let (listener, url) = listen().await;
    let mut two = Node::start(2, 1, listener, &url, vec![member(1, &one.url)]);
    one.connected(2).await;
    two.connected(1).await;
    one.verdicts.lock().unwrap().insert(2, Meeting::Removed);
    one.transport.drop_peer(2);
    assert_eq!(two.refused().await, (1, Refusal::Removed));
    two.until("the end of our reading", |two| !two.transport.status()[0].stream_out).await;
    assert!(one.transport.status().is_empty());
}

/// The node said *known*, and the removal overtook its answer.
#[tokio::test]
async fn a_verdict_from_before_a_removal_is_not_kept() {
    let (listener, url) = listen().await;
    let (sender, mut events) = mpsc::channel(2);
    let settings = Settings {
        id: 1,
        cluster: CLUSTER,
        nonce: nonce(1),
        boot: 1,
        urls: vec![url.clone()],
        metrics: Arc::default(),
        snapshots: Arc::new(NoSnapshots),
    };
    let one = Transport::start(settings, vec![listener], vec![], sender, CancellationToken::new());
    let request = player(2, &dead_url().await).request(Method::GET, STREAM, 1, Bytes::new());
    let called = tokio::spawn(async move { call(&url, request).await.status() });
    let Some(Event::Meet { reply, .. }) = events.recv().await else { panic!("no meeting") };
    one.drop_peer(2);
    reply.send(Meeting::Known).unwrap();
    assert_eq!(called.await.unwrap(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(one.status().is_empty());
}

/// At the old address somebody goes on answering, the old process or another: nothing of ours stays there.
#[tokio::test]
async fn connections_to_a_peers_old_address_are_cut() {
    let (old, old_url) = listen().await;
    let (listener, url) = listen().await;
    let mut one = Node::start(1, 1, listener, &url, vec![member(2, &old_url)]);
    let answer = format!("HTTP/1.1 200 OK\r\n{}", signature(2));
    let mut connections = Vec::new();
    // The stream and the first probe, which waits for the rest of its answer.
    for _ in 0..2 {
        let (mut stream, _) = timeout(DEADLINE, old.accept()).await.unwrap().unwrap();
        stream.write_all(answer.as_bytes()).await.unwrap();
        connections.push(stream);
    }
    one.event("the old stream", |event| matches!(event, Event::Accepted { peer: 2, .. }).then_some(())).await;
    let two = Node::alone(2).await;
    one.transport.set_peers(vec![member(2, &two.url)]);
    for mut stream in connections {
        // Sooner than anyone would notice its silence.
        let ended = timeout(IO_TIMEOUT / 2, stream.read_to_end(&mut Vec::new())).await;
        // Cut or reset: both are an end.
        drop(ended.expect("the old connection ends"));
    }
    one.event("the new stream", |event| matches!(event, Event::Accepted { peer: 2, .. }).then_some(())).await;
    two.transport.send(vec![heartbeat(2, 1, 1)]);
    assert_eq!(one.message().await.index, 1);
}

/// Dialled rarely at its old address; where it is now, it is dialled at once.
#[tokio::test]
async fn a_peer_that_moved_is_dialled_at_once() {
    let ((old, old_url), (new, new_url)) = (listen().await, listen().await);
    let (listener, url) = listen().await;
    let one = Node::start(1, 1, listener, &url, vec![member(2, &old_url)]);
    // One probe, and tries with pauses of 20, 40, … 640 ms: the next comes after half a second at least.
    for _ in 0..8 {
        drop(timeout(DEADLINE, old.accept()).await.unwrap().unwrap());
    }
    one.transport.set_peers(vec![member(2, &new_url)]);
    timeout(Duration::from_millis(400), new.accept()).await.expect("it is dialled").unwrap();
}

/// Refused connections are evidence that a process is gone, as long as no other address may lead to it.
#[tokio::test]
async fn nobody_listens_where_all_addresses_refuse() {
    let (listener, url) = listen().await;
    let mut one = Node::start(1, 1, listener, &url, vec![member(2, &dead_url().await)]);
    let wanted = |event| matches!(event, Event::NobodyListens { peer: 2 }).then_some(());
    one.event("that nobody listens", wanted).await;

    let (dead, unknown) = (dead_url().await, PeerUrl::parse("http://nowhere.invalid:1").unwrap());
    for (urls, all_refuse) in [
        (vec![dead.clone()], true),
        (vec![dead.clone(), dead_url().await], true),
        (vec![dead.clone(), unknown.clone()], false),
        (vec![unknown, dead], false),
    ] {
        let peer = Peer::new(2, urls, false, &Metrics::new(), CancellationToken::new());
        let Err(error) = connect::<Full<Bytes>>(&peer).await else { panic!("somebody listens") };
        assert_eq!(is_refused(&error), all_refuse, "{error}");
    }
}
