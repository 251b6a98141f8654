//! What is no request is told why and closed; it is never applied, and others do not notice.

use super::*;

#[tokio::test]
async fn garbage_is_answered_and_closed() {
    let server = Server::start().await;
    for (garbage, status, what) in [
        ("\x16\x03\x01\x02\x01\r\n\r\n", 400, "no HTTP request"),
        ("hello\r\n\r\n", 400, "no HTTP request"),
        ("GET /k\r\n\r\n", 400, "no HTTP request"),
        ("GET /k HTTP/3.0\r\n\r\n", 400, "version"),
        ("GET /k HTTP/1.1\r\nno colon\r\n\r\n", 400, "header"),
        ("GET /<k> HTTP/1.1\r\nhost: h\r\n\r\n", 400, "no HTTP request"),
        ("PUT /k HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400, "content-length"),
        ("PUT /k HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", 400, "content-length"),
        ("PUT /k HTTP/1.1\r\ntransfer-encoding: gzip\r\n\r\nab", 400, "transfer-encoding"),
        ("PUT /k HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400, "transfer-encoding"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/1.1"),
    ] {
        let mut client = server.client().await;
        let answer = client.ask(garbage).await;
        answer.refuses(status, what);
        assert!(answer.closes(), "{garbage:?}");
        client.stream.shutdown().await.unwrap();
        client.closed().await;
    }
    assert!(server.metrics.encode().contains("raftkv_http_requests_total{method=\"none\",status=\"400\"} 10\n"));
    server.ask(get("k")).await.refuses(404, "Failed to GET");
}

#[tokio::test]
async fn garbage_behind_a_request_does_not_cost_its_answer() {
    let server = Server::start().await;
    let mut client = server.client().await;
    client.send(put("k", "v") + "garbage\r\n\r\n" + &put("k", "smuggled")).await;
    assert_eq!(client.receive().await.status, 204);
    client.receive().await.refuses(400, "no HTTP request");
    client.stream.shutdown().await.unwrap();
    client.closed().await;
    assert_eq!(server.ask(get("k")).await.text(), "v");
}

#[tokio::test]
async fn half_a_request_is_none() {
    let server = Server::start().await;
    for half in ["PUT /k HTT", "PUT /k HTTP/1.1\r\ncontent-le"] {
        let mut client = server.client().await;
        client.send(half).await;
        client.stream.shutdown().await.unwrap();
        client.receive().await.refuses(400, "ended within a request");
        client.closed().await;
    }
    for half in [
        "PUT /k HTTP/1.1\r\ncontent-length: 9\r\n\r\nlies",
        "PUT /k HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n9\r\nlies",
        "PUT /k HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n4\r\nlies\r\n",
    ] {
        let mut client = server.client().await;
        client.send(half).await;
        client.stream.shutdown().await.unwrap();
        client.receive().await.refuses(400, "not applied: the body is broken");
        client.closed().await;
    }
    for broken in ["zz\r\n", "4\r\nlies--", "fffffffffffffffff\r\n"] {
        let mut client = server.client().await;
        let answer = client.ask(format!("PUT /k HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n{broken}")).await;
        answer.refuses(400, "not applied: the body is broken");
        assert!(answer.closes());
    }
    server.ask(get("k")).await.refuses(404, "Failed to GET");
}

/// A length that says too little leaves the rest of the body where the next request should be.
#[tokio::test]
async fn a_short_content_length_ends_the_connection() {
    let server = Server::start().await;
    let mut client = server.client().await;
    client.send("PUT /k HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\nvalue\r\n\r\n").await;
    assert_eq!(client.receive().await.status, 204);
    client.receive().await.refuses(400, "no HTTP request");
    assert_eq!(server.ask(get("k")).await.text(), "va");
}

/// hyper drops the Content-Length before anybody sees it (RFC 9112 §6.3): what looks like a second request to one that
/// believes the length is never read.
#[tokio::test]
async fn content_length_beside_chunked_smuggles_nothing() {
    let server = Server::start().await;
    for headers in
        ["content-length: 3\r\ntransfer-encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 3"]
    {
        let mut client = server.client().await;
        let answer = client
            .ask(format!("PUT /k HTTP/1.1\r\nhost: h\r\n{headers}\r\n\r\n1\r\nv\r\n0\r\n\r\n{}", put("k", "smuggled")))
            .await;
        assert_eq!(answer.status, 204);
        assert!(answer.closes());
        // The kernel may reset it over what was left unread.
        let mut rest = Vec::new();
        timeout(PATIENCE, client.stream.read_to_end(&mut rest)).await.unwrap().ok();
        assert_eq!(rest, b"");
        assert_eq!(server.ask(get("k")).await.text(), "v");
    }
}

#[tokio::test]
async fn headers_are_limited_in_number_and_bytes() {
    let server = Server::start().await;
    let numbered = |count: usize| {
        let headers: String = (1..count).map(|n| format!("x-{n}: y\r\n")).collect();
        format!("GET /k HTTP/1.1\r\nhost: h\r\n{headers}\r\n")
    };
    let sized = |bytes: usize| format!("GET /k HTTP/1.1\r\nhost: h\r\nx: {}\r\n\r\n", "y".repeat(bytes));
    assert_eq!(server.ask(numbered(100)).await.status, 404);
    server.ask(numbered(101)).await.refuses(431, "more than 100 headers");
    server.ask(numbered(1000)).await.refuses(431, "more than 100 headers");
    assert_eq!(server.ask(sized(16_000)).await.status, 404);
    for bytes in [17_000, 40_000, 100_000] {
        server.ask(sized(bytes)).await.refuses(431, "16384 bytes");
    }
    // As many bytes in front of the headers as a key can have are no reason.
    let longest = format!("GET /{} HTTP/1.1\r\nhost: h\r\nx: {}\r\n\r\n", "%41".repeat(4096), "y".repeat(16_000));
    assert_eq!(server.ask(longest).await.status, 404);
}
