//! Who and what is refused, with which words, and who is believed.

use super::*;

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
    let get_at = |path| player(2, &url).request(Method::GET, path, 1, Bytes::new());
    for (request, status, token) in [
        (with("x-raft-cluster-id", "00000000000000ff"), 412, "cluster-mismatch"),
        (get(2, 9), 412, "wrong-receiver"),
        (with("x-raft-version", "1"), 412, "version"),
        (get(3, 1), 412, "other-nonce"),
        (get(4, 1), 403, "not-a-member"),
        (get(5, 1), 410, "removed"),
        (with("x-raft-nonce", "xyz"), 400, "malformed"),
        (post(STREAM, Bytes::new()), 405, "method"),
        (post(PROBING, Bytes::new()), 405, "method"),
        (get_at(SNAPSHOT), 405, "method"),
        (get_at(RECONFIGURE), 405, "method"),
        (post(INTRODUCE, Bytes::new()), 405, "method"),
        (post(RECONFIGURE, Bytes::from(vec![0; RECONFIGURE_BYTES_MAX + 1])), 413, "too-large"),
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
    assert!(one.is_silent(), "and the node heard nothing");
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
                assert!(one.is_silent(), "the node hears nothing of it");
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

/// Two processes on copies of one directory: the one that started first is told, whoever of both calls first, and the
/// other is dealt with.
#[tokio::test]
async fn of_two_starts_on_one_directory_the_later_one_counts() {
    let mut one = Node::alone(1).await;
    let (listener, url) = listen().await;
    let mut early = Node::start(2, 5, listener, &url, vec![member(1, &one.url)]);
    early.connected(1).await;
    one.connected(2).await;
    let (listener, other_url) = listen().await;
    let mut late = Node::start(2, 6, listener, &other_url, vec![member(1, &one.url)]);
    late.connected(1).await;
    assert_eq!(early.refused().await, (1, Refusal::Superseded), "its stream was taken over, and its next try refused");
    late.transport.send(vec![heartbeat(2, 1, 7)]);
    assert_eq!(one.message().await.index, 7);
    early.close().await;

    // And one that comes when the other is long there.
    let (listener, url) = listen().await;
    let mut early = Node::start(2, 4, listener, &url, vec![member(1, &one.url)]);
    assert_eq!(early.refused().await, (1, Refusal::Superseded));
    let response =
        call(&one.url, player_at(2, 4, &url).request(Method::POST, PIPELINE, 1, sealed(4, 1, &heartbeat(2, 1, 1))));
    let response = response.await;
    assert_eq!((response.status().as_u16(), refusal(response.headers())), (412, "superseded"));
}

/// The earlier start answers at the address that everyone knows: it is no longer called upon.
#[tokio::test]
async fn an_earlier_start_that_answers_is_not_used() {
    let (listener, url) = listen().await;
    let _early = Node::start(2, 5, listener, &url, vec![]);
    let mut one = Node::alone(1).await;
    let late = player_at(2, 6, &dead_url().await).request(Method::GET, STREAM, 1, Bytes::new());
    let _stream = call(&one.url, late).await;
    one.transport.set_peers(vec![member(2, &url)]);
    one.refusing("superseded").await;
    while let Ok(event) = one.events.try_recv() {
        assert!(!matches!(event, Event::Accepted { .. }), "{event:?}");
    }
}

/// 256 of these would keep every member out.
#[tokio::test]
async fn a_connection_that_asks_nothing_is_closed_before_one_that_asked() {
    let one = Node::alone(1).await;
    let mut silent = TcpStream::connect(one.url.authority()).await.unwrap();
    let mut slow = TcpStream::connect(one.url.authority()).await.unwrap();
    slow.write_all(b"GET /raft/probing HTTP/1.1\r\n").await.unwrap();
    let stream = TcpStream::connect(one.url.authority()).await.unwrap();
    let (mut kept, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let probe = || Request::get(PROBING).body(Full::<Bytes>::default()).unwrap();
    kept.send_request(probe()).await.unwrap().into_body().collect().await.unwrap();
    for stream in [&mut silent, &mut slow] {
        let ended = timeout(DEADLINE, stream.read_to_end(&mut Vec::new())).await;
        // Closed or reset: both are an end.
        drop(ended.expect("it is closed"));
    }
    assert_eq!(kept.send_request(probe()).await.unwrap().status(), StatusCode::OK, "an idle one may stay");
}
