//! One node is a durable store: what it acknowledged survives `kill -9`, and it stops and starts in good order.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;

use rustix::process::Signal;

use crate::harness::{Cluster, request, wait_for};

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let mut cluster = Cluster::start(1);
    let mut acknowledged = BTreeMap::new();
    for life in 0..3 {
        for n in 0..20 {
            let (key, value) = (format!("key-{n}"), format!("life {life} value {n}"));
            cluster.nodes[0].must_put(&key, &value);
            acknowledged.insert(key, value);
        }
        let hash = cluster.nodes[0].status().unwrap()["state_hash"].clone();
        cluster.nodes[0].kill();
        cluster.nodes[0].start();
        cluster.nodes[0].wait_ready();
        cluster.must_hold(&acknowledged);
        assert_eq!(cluster.nodes[0].status().unwrap()["state_hash"], hash);
    }
    let status = cluster.nodes[0].status().unwrap();
    assert_eq!((status["role"].as_str(), status["revision"].as_u64()), (Some("leader"), Some(61)));
}

#[test]
fn term_stops_it_with_exit_code_0_and_nothing_is_lost() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut cluster = Cluster::start(1);
        let node = &mut cluster.nodes[0];
        node.must_put("a", "1");
        node.signal(signal);
        assert_eq!(node.wait().code(), Some(0), "{}", node.log());
        node.start();
        node.wait_ready();
        assert_eq!(node.must_get("a"), b"1");
    }
}

/// A client that is slow to send its request must not keep the server from stopping for ever, and one whose request is
/// in flight gets its answer.
#[test]
fn a_request_in_flight_is_finished_and_a_second_signal_ends_it_at_once() {
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    let mut client = TcpStream::connect(("127.0.0.1", node.port)).unwrap();
    client.write_all(b"PUT /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab").unwrap();
    wait_for("the request is in flight", || {
        let metrics = request("GET", node.port, "/metrics", b"").unwrap().text();
        // This request's own connection is the other one.
        metrics.contains("raftkv_http_connections 2\n").then_some(())
    });
    node.signal(Signal::TERM);
    wait_for("no new connection is taken", || TcpStream::connect(("127.0.0.1", node.port)).is_err().then_some(()));
    client.write_all(b"cd").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
    assert_eq!(node.wait().code(), Some(0), "{}", node.log());

    node.start();
    node.wait_ready();
    assert_eq!(node.must_get("slow"), b"abcd");
    let mut client = TcpStream::connect(("127.0.0.1", node.port)).unwrap();
    client.write_all(b"PUT /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nxy").unwrap();
    wait_for("the request is in flight", || {
        let metrics = request("GET", node.port, "/metrics", b"").unwrap().text();
        metrics.contains("raftkv_http_connections 2\n").then_some(())
    });
    node.signal(Signal::TERM);
    wait_for("it is stopping", || TcpStream::connect(("127.0.0.1", node.port)).is_err().then_some(()));
    node.signal(Signal::INT);
    assert_eq!(node.wait().code(), Some(128 + 2), "{}", node.log());
}
