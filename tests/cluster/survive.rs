//! Three and five members lose no acknowledged write, whoever is killed, stopped or paused, and agree in the end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{Cluster, wait_for};

#[test]
fn a_write_at_one_is_read_at_any() {
    let mut cluster = Cluster::start(3);
    for writer in 0..3 {
        let (key, value) = (format!("from-{writer}"), format!("value {writer}"));
        cluster.nodes[writer].must_put(&key, &value);
        for reader in &cluster.nodes {
            assert_eq!(reader.must_get(&key), value.as_bytes(), "written at {writer}, read at {}", reader.id);
        }
    }
    cluster.must_agree();
}

/// Writers at every member while members are killed one after the other: the leader, a follower, then all at once.
#[test]
fn nothing_acknowledged_is_lost_to_kill_9() {
    let mut cluster = Cluster::start(3);
    let mut acknowledged = BTreeMap::new();
    for round in 0..4 {
        let victim = match round {
            0 | 2 => cluster.leader(),
            _ => cluster.follower(),
        };
        let stop = AtomicBool::new(false);
        let ports: Vec<_> = cluster.nodes.iter().map(|node| node.port).collect();
        let written: Vec<_> = std::thread::scope(|scope| {
            let (stop, ports) = (&stop, &ports);
            let writers: Vec<_> = (0..3)
                .map(|writer| scope.spawn(move || write_until(stop, ports[writer], &format!("{round}-{writer}"))))
                .collect();
            wait_for("writes before the kill", || applied(&cluster, 20 * (round + 1)));
            cluster.nodes[victim].kill();
            let survivor = &cluster.nodes[(victim + 1) % 3];
            survivor.must_put(&format!("after-kill-{round}"), "x");
            cluster.nodes[victim].start();
            cluster.nodes[victim].wait_ready();
            stop.store(true, Ordering::Relaxed);
            writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect()
        });
        assert!(!written.is_empty());
        acknowledged.extend(written);
    }
    cluster.must_hold(&acknowledged);
    cluster.must_agree();

    cluster.nodes.iter_mut().for_each(|node| node.kill());
    cluster.start_all();
    cluster.must_hold(&acknowledged);
    cluster.must_agree();
}

/// A system that answers for a leader that nobody listens there says all that silence could.
#[test]
fn a_leader_whose_process_is_gone_is_replaced_before_its_silence_could_tell() {
    let mut cluster = Cluster::with_flags(3, &["--tick", "1s", "--election-ticks", "30"]);
    cluster.start_all();
    let leader = cluster.leader();
    let start = Instant::now();
    cluster.nodes[leader].kill();
    let survivor = &cluster.nodes[(leader + 1) % 3];
    wait_for("a write", || survivor.put("key", "value").ok().filter(|answer| answer.status == 204));
    assert!(start.elapsed() < Duration::from_secs(30), "it took {:?}", start.elapsed());
}

fn applied(cluster: &Cluster, at_least: u64) -> Option<()> {
    let applied = cluster.nodes.iter().filter_map(|node| node.status()?["applied"].as_u64()).max()?;
    (applied >= at_least).then_some(())
}

/// Writes one key after the other; returns what was acknowledged. Every answer is an honest one.
fn write_until(stop: &AtomicBool, port: u16, name: &str) -> Vec<(String, String)> {
    let mut acknowledged = Vec::new();
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (key, value) = (format!("{name}-{n}"), format!("value of {name}-{n}"));
        // A connection that breaks leaves the outcome open, as 503 and 504 do.
        if let Ok(answer) = crate::harness::request("PUT", port, &format!("/{key}"), value.as_bytes()) {
            match answer.status {
                204 => acknowledged.push((key, value)),
                503 | 504 => {}
                other => panic!("PUT {key}: {other} {}", answer.text()),
            }
        }
    }
    acknowledged
}

#[test]
fn five_go_on_with_three() {
    let mut cluster = Cluster::start(5);
    let mut acknowledged = BTreeMap::new();
    let mut put = |cluster: &Cluster, at: usize, key: &str| {
        cluster.nodes[at].must_put(key, "value");
        acknowledged.insert(key.to_owned(), "value".to_owned());
    };
    put(&cluster, 0, "all-five");
    let leader = cluster.leader();
    let other = (leader + 1) % 5;
    cluster.nodes[leader].kill();
    cluster.nodes[other].kill();
    let survivor = (leader + 2) % 5;
    put(&cluster, survivor, "three-of-five");
    cluster.nodes[leader].start();
    cluster.nodes[other].start();
    cluster.nodes[leader].wait_alive();
    put(&cluster, leader, "five-again");
    cluster.nodes[other].wait_ready();
    cluster.must_hold(&acknowledged);
    cluster.must_agree();
}

/// Step 4 of raftexample's walkthrough, with no wait between the steps, the leader the one that goes.
#[test]
fn a_member_that_was_away_catches_up() {
    let mut cluster = Cluster::start(3);
    let away = cluster.leader();
    let (a, b) = ((away + 1) % 3, (away + 2) % 3);
    cluster.nodes[a].must_put("my-key", "foo");
    assert_eq!(cluster.nodes[away].stop(), Some(0), "{}", cluster.nodes[away].log());
    cluster.nodes[a].must_put("my-key", "bar");
    assert_eq!(cluster.nodes[b].must_get("my-key"), b"bar");
    cluster.nodes[away].start();
    cluster.nodes[away].wait_alive();
    assert_eq!(cluster.nodes[away].must_get("my-key"), b"bar");
}

/// A leader that stops hands over: the next write finds another leader, and no election time-out is waited for.
#[test]
fn a_leader_that_stops_hands_over() {
    let mut cluster = Cluster::with_flags(3, &["--election-ticks", "600"]);
    cluster.start_all();
    for _ in 0..2 {
        let leader = cluster.leader();
        let next = (leader + 1) % 3;
        assert_eq!(cluster.nodes[leader].stop(), Some(0), "{}", cluster.nodes[leader].log());
        // With a time-out of a minute, only a hand-over lets this through within the request's five seconds.
        cluster.nodes[next].must_put("after-stop", "x");
        cluster.nodes[leader].start();
        cluster.nodes[leader].wait_ready();
    }
}

/// A leader that was paused believes that it still leads when it wakes. Its reads go through a majority all the same.
#[test]
fn a_leader_that_was_paused_serves_no_stale_read() {
    let mut cluster = Cluster::start(3);
    cluster.nodes[0].must_put("k", "old");
    let paused = cluster.leader();
    let other = &cluster.nodes[(paused + 1) % 3];
    cluster.nodes[paused].signal(Signal::STOP);
    other.must_put("k", "new");
    std::thread::scope(|scope| {
        let node = &cluster.nodes[paused];
        // Asked while it sleeps, answered with its first breath.
        let reads: Vec<_> = (0..8).map(|_| scope.spawn(|| node.get("k"))).collect();
        node.signal(Signal::CONT);
        for read in reads {
            let answer = read.join().unwrap().unwrap();
            match answer.status {
                200 => assert_eq!(answer.text(), "new"),
                status => assert_eq!(status, 503, "{}", answer.text()),
            }
        }
    });
    cluster.must_agree();
}

/// A paused follower is not missed, and catches up.
#[test]
fn a_paused_follower_holds_nobody_up() {
    let mut cluster = Cluster::start(3);
    let paused = cluster.follower();
    cluster.nodes[paused].signal(Signal::STOP);
    for n in 0..50 {
        cluster.nodes[(paused + 1) % 3].must_put(&format!("k{n}"), "v");
    }
    cluster.nodes[paused].signal(Signal::CONT);
    cluster.nodes[paused].wait_ready();
    cluster.must_agree();
}
