//! No client takes more room or time than it may, and each is told so.

use super::*;

#[tokio::test]
async fn a_declared_length_is_refused_before_the_body() {
    let server = Server::start().await;
    for expect in ["", "expect: 100-continue\r\n"] {
        for length in [VALUE_BYTES_MAX as u64 + 1, u64::MAX - 2] {
            let mut client = server.client().await;
            let head = format!("PUT /k HTTP/1.1\r\nhost: h\r\n{expect}content-length: {length}\r\n\r\n");
            let answer = client.ask(head).await;
            answer.refuses(413, "larger than 65536 bytes");
            assert!(answer.closes());
            client.stream.shutdown().await.unwrap();
            client.closed().await;
        }
    }
}

/// The client reads why it is refused, though it sends on: no reset overtakes the answer.
#[tokio::test]
async fn a_refused_client_that_sends_on_reads_the_reason() {
    let server = Server::start().await;
    let client = server.client().await;
    let (read, mut write) = client.stream.into_split();
    let sending = tokio::spawn(async move {
        let head = format!("PUT /k HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n", 8 << 20);
        write.write_all(head.as_bytes()).await.unwrap();
        write.write_all(&vec![b'v'; 8 << 20]).await.unwrap();
        write
    });
    let write = timeout(PATIENCE, sending).await.unwrap().unwrap();
    let mut client = Client { stream: read.reunite(write).unwrap(), read: Vec::new() };
    client.receive().await.refuses(413, "larger");
}

#[tokio::test]
async fn an_endless_chunked_body_is_cut_off() {
    let server = Server::with(Limits { linger_time: Duration::from_millis(50), ..Limits::default() }).await;
    let client = server.client().await;
    let (read, mut write) = client.stream.into_split();
    let sending = tokio::spawn(async move {
        let head = b"PUT /k HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n";
        write.write_all(head).await.unwrap();
        let chunk = [&b"1000\r\n"[..], &[b'v'; 4096], b"\r\n"].concat();
        // It ends when the server hangs up.
        while write.write_all(&chunk).await.is_ok() {}
        write
    });
    let mut answer = vec![0; 64];
    timeout(PATIENCE, read.readable()).await.unwrap().unwrap();
    let length = read.try_read(&mut answer).unwrap();
    assert!(answer[..length].starts_with(b"HTTP/1.1 413 "), "{:?}", String::from_utf8_lossy(&answer));
    timeout(PATIENCE, sending).await.expect("hung up").unwrap();
    server.ask(get("k")).await.refuses(404, "Failed to GET");
}

#[tokio::test]
async fn bodies_share_a_budget() {
    let mut server = Server::with(Limits { bodies_bytes_max: 100, ..Limits::default() }).await;
    server.mode.send_replace(Mode::Hold);
    let mut first = server.client().await;
    first.send(put("k", &"v".repeat(60))).await;
    server.holds(1).await;
    let refused = server.ask(put("k", &"v".repeat(60))).await;
    refused.refuses(503, "not applied: too many bytes");
    assert_eq!(refused.header("retry-after"), Some("1"));
    let mut second = server.client().await;
    second.send(put("k", &"v".repeat(40))).await;
    server.holds(2).await;
    server.mode.send_replace(Mode::Apply);
    assert_eq!((first.receive().await.status, second.receive().await.status), (204, 204));
    assert_eq!(server.ask(put("k", &"v".repeat(100))).await.status, 204, "all of it came back");
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let server = Server::with(Limits { connections_max: 2, ..Limits::default() }).await;
    let mut open = [server.client().await, server.client().await];
    for client in &mut open {
        assert_eq!(client.ask(put("k", "v")).await.status, 204);
    }
    let mut third = server.client().await;
    let answer = third.ask(get("k")).await;
    answer.refuses(503, "too many connections");
    assert!(answer.closes());
    assert_eq!(answer.header("retry-after"), Some("1"));
    let [mut first, second] = open;
    assert_eq!(first.ask(get("k")).await.text(), "v");
    drop(second);
    drop(third);
    // Its place is free as soon as the server has noticed.
    let served = async {
        while server.ask(get("k")).await.status != 200 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, served).await.unwrap();
}

#[tokio::test]
async fn many_idle_connections_do_not_matter() {
    let server = Server::start().await;
    // As many as the usual limit of 1,024 descriptors allows, both ends being here.
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(server.client().await);
    }
    assert_eq!(server.ask(put("k", "v")).await.status, 204);
    assert_eq!(idle[299].ask(get("k")).await.text(), "v");
    assert_eq!(idle[0].ask(get("k")).await.text(), "v");
}

#[tokio::test]
async fn slow_headers_are_told_and_closed_and_idle_connections_are_kept() {
    let server = Server::with(Limits { head_time: Duration::from_millis(30), ..Limits::default() }).await;
    let (mut idle, mut fresh) = (server.client().await, server.client().await);
    assert_eq!(idle.ask(put("k", "v")).await.status, 204);
    for slow in ["G", "PUT /k HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\n"] {
        let mut client = server.client().await;
        let answer = client.ask(slow).await;
        answer.refuses(408, "headers");
        assert!(answer.closes());
        client.stream.shutdown().await.unwrap();
        client.closed().await;
    }
    // A second request on a connection has its time too.
    let mut client = server.client().await;
    assert_eq!(client.ask(get("k")).await.text(), "v");
    client.ask("GET /k").await.refuses(408, "headers");
    assert_eq!(idle.ask(get("k")).await.text(), "v");
    assert_eq!(fresh.ask(get("k")).await.text(), "v");
}

/// One byte after the other wins no time.
#[tokio::test]
async fn headers_that_trickle_are_slow() {
    let server = Server::with(Limits { head_time: Duration::from_millis(50), ..Limits::default() }).await;
    let client = server.client().await;
    let (read, mut write) = client.stream.into_split();
    let trickle = async {
        write.write_all(b"GET /k HTTP/1.1\r\nx: ").await.unwrap();
        let mut drip = tokio::time::interval(Duration::from_millis(2));
        while write.write_all(b"y").await.is_ok() {
            drip.tick().await;
        }
    };
    tokio::select! {
        () = trickle => panic!("closed before the answer could be read"),
        ready = timeout(PATIENCE, read.readable()) => ready.unwrap().unwrap(),
    }
    let mut answer = [0; 12];
    assert_eq!(read.try_read(&mut answer).unwrap(), 12);
    assert_eq!(&answer, b"HTTP/1.1 408");
}

#[tokio::test]
async fn idle_connections_are_closed_in_time_and_in_silence() {
    let server = Server::with(Limits { idle_time: Duration::from_millis(200), ..Limits::default() }).await;
    let mut fresh = server.client().await;
    fresh.closed().await;
    let mut used = server.client().await;
    assert_eq!(used.ask(put("k", "v")).await.status, 204);
    used.closed().await;
    // The part of a request that came behind another is told.
    let mut half = server.client().await;
    half.send(get("k") + "GET").await;
    assert_eq!(half.receive().await.text(), "v");
    half.receive().await.refuses(408, "headers");
}

#[tokio::test]
async fn a_request_in_flight_is_not_idle() {
    let tight = Duration::from_millis(150);
    let mut server =
        Server::with(Limits { idle_time: tight, head_time: tight, write_time: tight, ..Limits::default() }).await;
    server.mode.send_replace(Mode::Hold);
    let mut held = server.client().await;
    held.send(put("k", "v")).await;
    server.holds(1).await;
    // An idle connection serves as the clock.
    for _ in 0..3 {
        server.client().await.closed().await;
    }
    server.mode.send_replace(Mode::Apply);
    assert_eq!(held.receive().await.status, 204);
}

#[tokio::test]
async fn slow_bodies_are_told_and_closed() {
    let gap = Limits { body_gap_time: Duration::from_millis(30), ..Limits::default() };
    let whole = Limits { body_time: Duration::from_millis(30), ..Limits::default() };
    for limits in [gap, whole] {
        let server = Server::with(limits).await;
        for slow in [
            "PUT /k HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\n",
            "PUT /k HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\nslow",
            "PUT /k HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n4\r\nslow\r\n",
        ] {
            let mut client = server.client().await;
            let answer = client.ask(slow).await;
            answer.refuses(408, "not applied: the body did not come in time");
            assert!(answer.closes());
            client.stream.shutdown().await.unwrap();
            client.closed().await;
        }
        server.ask(get("k")).await.refuses(404, "Failed to GET");
    }
}

/// A client that asks for much and reads nothing does not hold it for ever.
#[tokio::test]
async fn a_client_that_does_not_read_is_hung_up_on() {
    let server = Server::with(Limits { write_time: Duration::from_millis(50), ..Limits::default() }).await;
    assert_eq!(server.ask(put("k", &"v".repeat(VALUE_BYTES_MAX))).await.status, 204);
    let mut client = server.client().await;
    // 64 MiB of answers fit no socket's buffers.
    client.send(get("k").repeat(1000)).await;
    let closed = async {
        while server.metrics.http_connections.get() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, closed).await.unwrap();
}
