//! Each request has its status, its headers and its reason.

use super::*;

#[tokio::test]
async fn a_value_is_put_and_got() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let put_answer = client.ask(put("my-key", "hello")).await;
    assert_eq!((put_answer.status, put_answer.text()), (204, ""));
    for (name, value) in [
        ("x-raft-index", "2"),
        ("x-raft-term", "3"),
        ("x-raft-leader", "7"),
        ("etag", "\"2\""),
        ("x-content-type-options", "nosniff"),
        ("cache-control", "no-store"),
    ] {
        assert_eq!(put_answer.header(name), Some(value), "{name}");
    }
    for target in ["/my-key", "/my%2Dkey", "http://h:1/my-key", "/my-key?consistency=stale", "/my-key?"] {
        let got = client.ask(request("GET", target)).await;
        assert_eq!((got.status, got.text()), (200, "hello"), "{target}");
        assert_eq!(got.header("content-type"), Some("application/octet-stream"));
        assert_eq!(got.header("etag"), Some("\"2\""));
        assert_eq!(got.header("x-raft-index"), Some("2"));
        assert_eq!(got.header("x-content-type-options"), Some("nosniff"));
    }
    let head = client.ask(request("HEAD", "/my-key")).await;
    assert_eq!((head.status, head.header("content-length"), head.header("etag")), (200, Some("5"), Some("\"2\"")));
    let absent = client.ask(get("other")).await;
    absent.refuses(404, "Failed to GET\n");
    assert_eq!((absent.header("etag"), absent.header("x-raft-index")), (None, Some("2")));
    assert_eq!(client.ask(put("my-key", "")).await.status, 204);
    let empty = client.ask(get("my-key")).await;
    assert_eq!((empty.status, empty.text(), empty.header("etag")), (200, "", Some("\"3\"")));
    assert_eq!(client.ask(request("HEAD", "/my-key")).await.header("content-length"), Some("0"));
}

#[tokio::test]
async fn keys_and_values_are_any_bytes() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let longest = "k".repeat(4096);
    let escaped = "%ff".repeat(4096);
    let keys =
        ["%00", "%ff%FE", "..", "../a", "a/../b", "/", "//", "a//b", "%2e%2e", "%252e", "a+b", "ü", &longest, &escaped];
    for (n, key) in keys.iter().enumerate() {
        // `..` and `%2e%2e` are one key, as they should be; hence each is read back before the next is written.
        let mut raw = format!("PUT /{key} HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\n").into_bytes();
        let value = [0, 0xff, b'<', n as u8];
        raw.extend(value);
        assert_eq!(client.ask(raw).await.status, 204, "{key}");
        let got = client.ask(get(key)).await;
        assert_eq!((got.status, &got.body[..]), (200, &value[..]), "{key}");
    }
    assert_eq!(client.ask(get("b")).await.status, 404, "a/../b is not normalised");
    assert_eq!(client.ask(get("..")).await.body, client.ask(get("%2e%2e")).await.body);
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let server = Server::start().await;
    let long = format!("/{}", "k".repeat(4097));
    let longer = format!("/{}", "k".repeat(60_000));
    let table = [
        ("PUT", "/", 400, "the key is empty"),
        ("GET", "/", 400, "the key is empty"),
        ("GET", "*", 400, "no path"),
        ("PUT", "/%zz", 400, "percent escape"),
        ("GET", "/%4", 400, "percent escape"),
        ("PUT", &long, 414, "longer than 4096"),
        ("GET", &long, 414, "longer than 4096"),
        ("GET", &longer, 414, "too long"),
        ("GET", "/k?consistency=Stale", 400, "'Stale'"),
        ("GET", "/k?consistancy=stale", 400, "'consistancy'"),
        ("HEAD", "/k?x", 400, ""),
        ("PUT", "/k?consistency=stale", 400, "'consistency'"),
        ("PUT", "/api/x", 409, "reserved"),
        ("PUT", "/%61pi/x", 409, "reserved"),
        ("PUT", "/v1/x", 409, "reserved"),
        ("PUT", "/v2/keys", 409, "reserved"),
        ("PUT", "/v3/kv", 409, "reserved"),
        ("PUT", "/raft/x", 409, "not applied"),
        ("PUT", "/ui/", 409, "reserved"),
        ("PUT", "/metrics", 409, "reserved"),
        ("PUT", "/livez", 409, "reserved"),
        ("PUT", "/readyz", 409, "reserved"),
        ("PUT", "/version", 409, "reserved"),
        ("PUT", "/status", 409, "reserved"),
        ("GET", "/api/v1/kv/k", 404, "reserved"),
        ("DELETE", "/my-key", 400, "/api/v1/kv/"),
        ("POST", "/my-key", 400, "ID"),
        ("POST", "/", 400, "empty"),
        ("POST", "/5", 400, "http://"),
        ("POST", "/0", 400, "IDs start at 1"),
        ("POST", "/+5", 400, "ID"),
        ("POST", "/5?x=1", 400, "x"),
        ("DELETE", "/0", 400, "IDs start at 1"),
        ("DELETE", "/4", 409, "no even IDs"),
        ("DELETE", "/99999999999999999999999", 400, "ID"),
        ("PATCH", "/k", 405, "PUT, GET, HEAD, POST, DELETE"),
        ("OPTIONS", "*", 405, "PUT, GET, HEAD, POST, DELETE"),
        ("BREW", "/%zz", 405, "PUT, GET, HEAD, POST, DELETE"),
        ("POST", "/metrics", 405, "GET, HEAD"),
        ("DELETE", "/api/v1/kv/k", 405, "GET, HEAD"),
    ];
    let before = server.ask(put("k", "kept")).await;
    for (method, target, status, what) in table {
        let answer = server.ask(request(method, target)).await;
        if method == "HEAD" {
            assert_eq!(answer.status, status, "{method} {target}");
            continue;
        }
        answer.refuses(status, what);
        match status {
            405 => assert!(answer.header("allow").unwrap().starts_with(what), "{method} {target}"),
            _ => assert_eq!(answer.header("allow"), None),
        }
    }
    assert_eq!(server.ask(get("k")).await.header("x-raft-index"), before.header("x-raft-index"), "none was applied");
    let refused = server.ask(request("PUT", "/k?x=1")).await;
    assert_eq!((refused.header("x-raft-index"), refused.header("x-raft-leader")), (Some("2"), Some("7")));
}

#[tokio::test]
async fn refusals_keep_the_connection() {
    let server = Server::start().await;
    let mut client = server.client().await;
    for (request, status) in [
        (put("%zz", "v"), 400),
        (put("metrics", "v"), 409),
        (put("k?x", "v"), 400),
        (put("k", "v").replace("PUT", "POST"), 400),
        (put("4", "v").replace("PUT", "POST"), 400),
        (put("4", "http://a:1").replace("PUT", "POST"), 409),
        (put("5", "http://a:1").replace("PUT", "POST"), 204),
        (put("5", "http://a:1/").replace("PUT", "POST"), 400),
        (put("5", "http://a:1+http://b:1").replace("PUT", "POST"), 204),
        (put("5", "http://a:1+http://a:1").replace("PUT", "POST"), 400),
        (put("k", "v").replace("PUT", "PATCH"), 405),
        (put("k", "v"), 204),
    ] {
        let answer = client.ask(&request).await;
        assert_eq!((answer.status, answer.closes()), (status, false), "{request}");
    }
}

#[tokio::test]
async fn each_failure_of_the_service_has_its_status() {
    let server = Server::start().await;
    for (mode, status, what) in [
        (rejected(Rejection::NoLeader), 503, "not applied: no leader"),
        (rejected(Rejection::Busy), 503, "not applied: too many"),
        (rejected(Rejection::Stopping), 503, "not applied: the node is stopping"),
        (rejected(Rejection::DiskFull), 507, "not applied: the disk is full"),
        (Mode::Refuse(Failure::Unknown), 504, "outcome unknown"),
    ] {
        server.mode.send_replace(mode);
        let answer = server.ask(put("k", "v")).await;
        answer.refuses(status, what);
        assert_eq!(answer.header("retry-after"), (status == 503).then_some("1"));
        assert_eq!(answer.header("x-raft-term"), Some("3"));
    }
    server.mode.send_replace(rejected(Rejection::NoLeader));
    server.leadership.send_replace(Leadership { term: 4, leader: 0 });
    let answer = server.ask(get("k")).await;
    answer.refuses(503, "not read: no leader");
    assert_eq!((answer.header("x-raft-leader"), answer.header("x-raft-term")), (None, Some("4")));
    server.ask(get("k?consistency=stale")).await.refuses(404, "Failed to GET");
}

#[tokio::test]
async fn a_full_queue_refuses_and_does_not_grow() {
    let mut server = Server::start().await;
    server.mode.send_replace(Mode::Hold);
    let mut first = server.client().await;
    first.send(put("held", "v")).await;
    server.holds(1).await;
    server.mode.send_replace(Mode::Deaf);
    // The node has stopped listening; one proposal fits the channel, and of two one is refused.
    let (mut one, mut other) = (server.client().await, server.client().await);
    one.send(put("one", "v")).await;
    other.send(put("other", "v")).await;
    let refused = tokio::select! {
        answer = one.receive() => answer,
        answer = other.receive() => answer,
    };
    refused.refuses(503, "not applied: too many requests in flight");
    assert_eq!(refused.header("retry-after"), Some("1"));
    server.mode.send_replace(Mode::Apply);
    assert_eq!(first.receive().await.status, 204);
}

#[tokio::test]
async fn services_answer() {
    let server = Server::start().await;
    assert_eq!(server.ask(put("k", "v")).await.status, 204);
    assert_eq!(server.ask(get("livez")).await.text(), "ok\n");
    assert_eq!(server.ask(get("readyz")).await.text(), "ok\n");
    let version: serde_json::Value = serde_json::from_slice(&server.ask(get("version")).await.body).unwrap();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    let answer = server.ask(get("status")).await;
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let status: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!((&status["id"], &status["applied"], &status["revision"]), (&7.into(), &2.into(), &2.into()));
    let metrics = server.ask(get("metrics?x=1")).await;
    assert_eq!(metrics.header("content-type"), Some("application/openmetrics-text; version=1.0.0; charset=utf-8"));
    assert!(metrics.text().contains("raftkv_http_requests_total{method=\"PUT\",status=\"204\"} 1\n"));
    assert!(metrics.text().ends_with("# EOF\n"));
    let head = server.ask(request("HEAD", "/metrics")).await;
    assert_eq!(head.status, 200);
    server.mode.send_replace(rejected(Rejection::NoLeader));
    server.ask(get("readyz")).await.refuses(503, "not ready: not read: no leader");
    assert_eq!(server.ask(get("livez")).await.status, 200);
}

#[tokio::test]
async fn readiness_does_not_wait_for_ever() {
    let limits = Limits { probe_time: Duration::from_millis(20), ..Limits::default() };
    let server = Server::with(limits).await;
    server.mode.send_replace(Mode::Hold);
    server.ask(get("readyz")).await.refuses(503, "not ready");
    server.ask(get("status")).await.refuses(503, "did not answer");
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let mut requests = String::new();
    for n in 0..40 {
        requests += &put("k", &n.to_string());
        requests += &get("k");
        requests += &request("HEAD", "/k");
        requests += &get("%zz");
    }
    client.send(&requests).await;
    for n in 0..40 {
        assert_eq!(client.receive().await.status, 204);
        assert_eq!(client.receive().await.text(), n.to_string());
        assert_eq!(client.head().await.status, 200);
        assert_eq!(client.receive().await.status, 400);
    }
}

/// hyper's own gathering of flushes would keep the first answer until the second request is whole.
#[tokio::test]
async fn an_answer_does_not_wait_for_the_rest_of_the_next_request() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let next = get("k");
    client.send(put("k", "v") + &next[..9]).await;
    assert_eq!(client.receive().await.status, 204);
    client.send(&next[9..]).await;
    assert_eq!(client.receive().await.text(), "v");
}

#[tokio::test]
async fn old_clients_are_served() {
    let server = Server::start().await;
    let mut client = server.client().await;
    assert_eq!(client.ask("PUT /k HTTP/1.0\r\ncontent-length: 1\r\n\r\nv").await.status, 204);
    client.closed().await;
    let mut client = server.client().await;
    let kept = client.ask("GET /k HTTP/1.0\r\nconnection: keep-alive\r\n\r\n").await;
    assert_eq!((kept.text(), kept.header("connection")), ("v", Some("keep-alive")));
    assert_eq!(client.ask("GET /k HTTP/1.0\r\n\r\n").await.text(), "v");
    client.closed().await;
}

/// `nc` closes its sending side behind the request.
#[tokio::test]
async fn a_client_that_has_said_all_gets_its_answer() {
    let mut server = Server::start().await;
    server.mode.send_replace(Mode::Hold);
    let mut client = server.client().await;
    client.send(put("k", "v")).await;
    client.stream.shutdown().await.unwrap();
    server.holds(1).await;
    server.mode.send_replace(Mode::Apply);
    assert_eq!(client.receive().await.status, 204);
    client.closed().await;
}

#[tokio::test]
async fn bodies_come_in_any_pieces() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let chunked = "PUT /k HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n";
    assert_eq!(client.ask(format!("{chunked}3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nt: u\r\n\r\n")).await.status, 204);
    assert_eq!(client.ask(get("k")).await.text(), "abcdefg");
    assert_eq!(client.ask(format!("{chunked}0\r\n\r\n")).await.status, 204);
    assert_eq!(client.ask(get("k")).await.text(), "");
    let large = "0123456789abcdef".repeat(VALUE_BYTES_MAX / 16);
    assert_eq!(client.ask(put("k", &large)).await.status, 204);
    assert_eq!(client.ask(get("k")).await.text(), large);
    for byte in put("k", "one by one").as_bytes().chunks(1) {
        client.send(byte).await;
    }
    assert_eq!(client.receive().await.status, 204);
    assert_eq!(client.ask(get("k")).await.text(), "one by one");
}

#[tokio::test]
async fn expect_continue_is_answered_before_the_body() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let head = "PUT /k HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n";
    client.send(head).await;
    assert_eq!(client.head().await.status, 100);
    assert_eq!(client.ask("hello").await.status, 204);
    assert_eq!(client.ask(get("k")).await.text(), "hello");
    // Refused: no body is asked for, and none is waited for.
    let refused = client.ask(head.replace("/k", "/metrics")).await;
    refused.refuses(409, "reserved");
    assert!(refused.closes());
    client.closed().await;
}
