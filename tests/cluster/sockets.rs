//! Clients that are rude, broken or slow, on raw sockets: each gets a clear status or a closed connection, and everybody
//! else is served.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::harness::{Cluster, DEADLINE, Node, free_port, request, request_with, wait_for};

fn connect(node: &Node) -> TcpStream {
    let socket = TcpStream::connect(("127.0.0.1", node.port)).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.set_write_timeout(Some(DEADLINE)).unwrap();
    socket
}

/// Sends bytes on a connection of their own, and reads until the server closes it.
fn exchange(node: &Node, request: &[u8]) -> String {
    let mut socket = connect(node);
    // The server may have answered and closed before it read everything.
    socket.write_all(request).ok();
    let mut answer = Vec::new();
    match socket.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
    String::from_utf8_lossy(&answer).into_owned()
}

fn put(path: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("PUT {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n{body}").into_bytes()
}

#[test]
fn each_gets_what_it_deserves_and_nobody_else_notices() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let many_headers = "X-A: b\r\n".repeat(101);
    let large_header = format!("X-A: {}\r\n", "b".repeat(20_000));
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("plain", put("/k", "Content-Length: 1\r\n", "v"), "204"),
        ("garbage", b"\x00\xff\x16\x03\x01 garbage\r\n\r\n".to_vec(), "400"),
        ("101 headers", put("/k", &format!("{many_headers}Content-Length: 1\r\n"), "v"), "431"),
        ("a large header", put("/k", &format!("{large_header}Content-Length: 1\r\n"), "v"), "431"),
        ("length beside chunked", put("/k", "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"), "204"),
        ("chunked", put("/k", "Transfer-Encoding: chunked\r\n", "1\r\nv\r\n0\r\n\r\n"), "204"),
        ("a NUL in the key", put("/a%00b", "Content-Length: 1\r\n", "v"), "204"),
        ("dots in the key", put("/a/../b", "Content-Length: 1\r\n", "v"), "204"),
        ("half an escape", put("/%4", "Content-Length: 1\r\n", "v"), "400"),
        ("no escape", put("/%zz", "Content-Length: 1\r\n", "v"), "400"),
        ("a bad length", put("/k", "Content-Length: minus\r\n", "v"), "400"),
        ("a huge length", put("/k", "Content-Length: 99999999999\r\n", "v"), "413"),
        ("absolute form", b"GET http://x/k HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_vec(), "200"),
        ("HTTP/1.0", b"GET /k HTTP/1.0\r\n\r\n".to_vec(), "200"),
        ("a long path", put(&format!("/{}", "k".repeat(70_000)), "Content-Length: 1\r\n", "v"), "414"),
    ];
    for (name, request, status) in cases {
        let answer = exchange(node, &request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) || answer.starts_with(&format!("HTTP/1.0 {status} ")),
            "{name}: {answer}"
        );
        assert!(!answer.to_ascii_lowercase().contains("text/html"), "{name}: {answer}");
        node.must_put("witness", name);
    }
}

#[test]
fn an_endless_body_is_cut_off() {
    let cluster = Cluster::start(1);
    let mut socket = connect(&cluster.nodes[0]);
    socket.write_all(b"PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    let started = Instant::now();
    // The server reads on for a moment, so that its answer is not lost to a reset; then it closes.
    while socket.write_all(chunk.as_bytes()).is_ok() {
        assert!(started.elapsed() < DEADLINE, "nobody stops it");
    }
    let mut answer = Vec::new();
    // What the server said may be lost to the reset that followed.
    socket.read_to_end(&mut answer).ok();
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 413 "), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(cluster.nodes[0].get("k").unwrap().status, 404);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let cluster = Cluster::start(1);
    let mut socket = connect(&cluster.nodes[0]);
    let mut requests = Vec::new();
    for n in 0..50 {
        requests.extend(format!("PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{n:02}").bytes());
        requests.extend(b"GET /k HTTP/1.1\r\nHost: x\r\n\r\n");
    }
    requests.extend(b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    socket.write_all(&requests).unwrap();
    let mut answers = String::new();
    socket.read_to_string(&mut answers).unwrap();
    let values: Vec<&str> = answers
        .split("HTTP/1.1 200 OK")
        .skip(1)
        .filter_map(|rest| rest.split("\r\n\r\n").nth(1))
        .map(|body| &body[..2])
        .collect();
    let expected: Vec<String> = (0..50).map(|n| format!("{n:02}")).collect();
    assert_eq!(values, expected);
    assert_eq!(answers.matches("HTTP/1.1 204 No Content").count(), 50);
}

/// Thousands of connections that say nothing, and half requests that never end, take no one's place.
#[test]
fn idle_connections_hold_nobody_up() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let idle: Vec<TcpStream> = (0..3000)
        .map(|n| {
            let mut socket = connect(node);
            if n % 3 == 0 {
                socket.write_all(b"PUT /half HTTP/1.1\r\nHost: x\r\nContent-Le").unwrap();
            }
            socket
        })
        .collect();
    wait_for("all connections are open", || {
        let metrics = request("GET", node.port, "/metrics", b"").unwrap().text();
        let open = metrics.lines().find_map(|line| line.strip_prefix("raftkv_http_connections "))?;
        (open.parse::<usize>().unwrap() > idle.len()).then_some(())
    });
    node.must_put("k", "v");
    assert_eq!(node.must_get("k"), b"v");
}

/// Clients may take all connections there are, but never the files that the log needs: a server that could not open its
/// next segment would have to stop.
#[test]
fn clients_do_not_take_the_log_s_files() {
    let root = tempfile::tempdir().unwrap();
    let (port, url) = (free_port(), format!("http://127.0.0.1:{}", free_port()));
    let mut server = std::process::Command::new("sh")
        .args(["-c", "ulimit -n 700 && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_raftkv")])
        .args(["--port", &port.to_string(), "--cluster", &url, "--wal-segment-bytes", "16MiB", "--data-dir"])
        .arg(root.path().join("data"))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for("it is ready", || request("GET", port, "/readyz", b"").ok().filter(|answer| answer.status == 200));
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    assert_eq!(request_with(&agent, "PUT", port, "/k", b"v").unwrap().status, 204);
    let idle: Vec<_> = (0..400).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    // Through three segments.
    for n in 0..40 {
        let answer = request_with(&agent, "PUT", port, &format!("/{n}"), &vec![7; 1 << 20]).unwrap();
        assert_eq!(answer.status, 204, "{}", answer.text());
    }
    drop(idle);
    server.kill().and_then(|()| server.wait()).unwrap();
}
