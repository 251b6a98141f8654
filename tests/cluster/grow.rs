//! Members come and go by curl, while writes go on: none is lost, none is doubled, and nobody is left behind.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::{Cluster, free_port, raftkv, wait_for};

/// Steps 5 and 6 of raftexample's walkthrough, with no wait between the steps.
#[test]
fn a_fourth_joins_and_the_third_leaves() {
    let mut cluster = Cluster::start(3);
    cluster.nodes[0].must_put("my-key", "hello");
    let fourth = cluster.newcomer(4);
    let url = cluster.nodes[fourth].url();
    cluster.nodes[0].must_add(4, &url);
    cluster.nodes[fourth].start();
    cluster.nodes[fourth].wait_alive();
    assert_eq!(cluster.nodes[fourth].must_get("my-key"), b"hello");
    cluster.nodes[fourth].must_put("from-the-fourth", "hi");
    assert_eq!(cluster.nodes[0].must_get("from-the-fourth"), b"hi");
    cluster.wait_voter(4);
    cluster.nodes[0].must_remove(3);
    assert_eq!(cluster.nodes[2].wait().code(), Some(0), "{}", cluster.nodes[2].log());
    assert!(cluster.nodes[2].log().contains("was removed from the cluster"), "{}", cluster.nodes[2].log());
    cluster.nodes[1].must_put("after", "x");
    cluster.must_agree();
}

/// A lone node becomes a cluster of three, and a cluster shrinks to one.
#[test]
fn one_grows_to_three_and_back() {
    let mut cluster = Cluster::start(1);
    let mut acknowledged = BTreeMap::new();
    let mut put = |cluster: &Cluster, at: usize, key: &str| {
        cluster.nodes[at].must_put(key, "v");
        acknowledged.insert(key.to_owned(), "v".to_owned());
    };
    put(&cluster, 0, "alone");
    cluster.grow(0, 2);
    put(&cluster, 1, "two");
    cluster.grow(1, 3);
    put(&cluster, 2, "three");
    cluster.must_agree();
    let leader = cluster.leader();
    cluster.nodes[leader].kill();
    put(&cluster, (leader + 1) % 3, "two-of-three");
    cluster.nodes[leader].start();
    cluster.nodes[leader].wait_ready();
    for id in [1, 2] {
        cluster.nodes[2].must_remove(id);
        assert_eq!(cluster.nodes[id as usize - 1].wait().code(), Some(0));
        put(&cluster, 2, &format!("without-{id}"));
    }
    cluster.must_hold(&acknowledged);
    let last = cluster.nodes[2].remove(3);
    assert_eq!(last.status, 409);
    assert!(last.text().contains("last that votes"), "{}", last.text());
}

/// 3 → 5 → 1 → 3 under load, the leader always the one that goes.
#[test]
fn nothing_is_lost_while_members_come_and_go() {
    let mut cluster = Cluster::start(3);
    let stop = AtomicBool::new(false);
    let ports = Mutex::new(cluster.nodes.iter().map(|node| node.port).collect::<Vec<_>>());
    let acknowledged = std::thread::scope(|scope| {
        let (stop, ports) = (&stop, &ports);
        // The writers end even where this thread fails.
        let _end = StopOnDrop(stop);
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                scope.spawn(move || {
                    let mut acknowledged = Vec::new();
                    for n in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let port = {
                            let ports = ports.lock().unwrap();
                            ports[(writer + n) % ports.len()]
                        };
                        let (key, value) = (format!("{writer}-{n}"), format!("value {writer} {n}"));
                        // A member that is gone refuses; whoever is being removed may break the connection.
                        if let Ok(answer) = crate::harness::request("PUT", port, &format!("/{key}"), value.as_bytes()) {
                            match answer.status {
                                204 => acknowledged.push((key, value)),
                                status => assert!([503, 504].contains(&status), "{status} {}", answer.text()),
                            }
                        }
                    }
                    acknowledged
                })
            })
            .collect();
        for id in [4, 5] {
            let at = cluster.grow(0, id);
            ports.lock().unwrap().push(cluster.nodes[at].port);
        }
        for _ in 0..4 {
            let leader = cluster.leader();
            let id = cluster.nodes[leader].id;
            let port = cluster.nodes[leader].port;
            ports.lock().unwrap().retain(|other| *other != port);
            // Asked of the leader itself: it hands over first.
            cluster.nodes[leader].must_remove(id);
            assert_eq!(cluster.nodes[leader].wait().code(), Some(0), "{}", cluster.nodes[leader].log());
        }
        let last = cluster.leader();
        for id in [6, 7] {
            let at = cluster.grow(last, id);
            ports.lock().unwrap().push(cluster.nodes[at].port);
        }
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect::<BTreeMap<_, _>>()
    });
    assert!(acknowledged.len() > 20);
    cluster.must_agree();
    cluster.must_hold(&acknowledged);
}

/// The founders go one after the other; those who joined elect a leader among themselves, and it takes newcomers in.
#[test]
fn a_cluster_outlives_its_founders() {
    let mut cluster = Cluster::start(1);
    cluster.nodes[0].must_put("k", "v");
    for id in [2, 3, 4] {
        cluster.grow(0, id);
    }
    cluster.nodes[1].must_remove(1);
    assert_eq!(cluster.nodes[0].wait().code(), Some(0));
    let leader = cluster.leader();
    cluster.nodes[leader].kill();
    let survivor = if leader == 3 { 2 } else { 3 };
    cluster.nodes[survivor].must_put("k", "w");
    cluster.nodes[leader].start();
    cluster.nodes[leader].wait_ready();
    cluster.grow(survivor, 5);
    cluster.must_agree();
}

/// A list that names only the newcomer leaves nobody to ask.
#[test]
fn a_newcomer_needs_somebody_to_ask() {
    let root = tempfile::tempdir().unwrap();
    let url = format!("http://127.0.0.1:{}", free_port());
    let output = raftkv(&["--join", "--cluster", &url, "--port", &free_port().to_string(), "--data-dir"])
        .arg(root.path().join("data"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no other member to ask"));
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// raftexample took a URL with a trailing slash, and no node ever started again; it took an empty body and an ID that
/// was used before.
#[test]
fn a_change_that_makes_no_sense_is_refused_before_anybody_hears_of_it() {
    let mut cluster = Cluster::start(3);
    let follower = cluster.follower();
    let own = cluster.nodes[follower].url();
    let bad = [
        (400, 5, "http://127.0.0.1:45279/", "trailing slash"),
        (400, 5, "", "http://"),
        (400, 5, "https://127.0.0.1:45279", "http://"),
        (400, 5, "http://127.0.0.1", "no port"),
        (400, 5, "http://user@127.0.0.1:45279", "user information"),
        (400, 0, "http://127.0.0.1:45279", "IDs start at 1"),
        (409, 5, own.as_str(), "is the address of member"),
    ];
    for (status, id, url, why) in bad {
        for node in &cluster.nodes {
            let answer = node.add(id, url);
            assert_eq!(answer.status, status, "POST /{id} {url:?}: {}", answer.text());
            assert!(answer.text().contains(why), "POST /{id} {url:?}: {}", answer.text());
        }
    }
    let unknown = cluster.nodes[follower].remove(9);
    assert_eq!((unknown.status, unknown.text().contains("no member 9")), (409, true), "{}", unknown.text());
    // With one down, another removal would leave one of two.
    let down = (follower + 1) % 3;
    let up = (follower + 2) % 3;
    cluster.nodes[down].kill();
    let gone = cluster.nodes[up].id;
    let harmful = wait_for("the loss of one is noticed", || {
        let answer = cluster.nodes[follower].remove(gone);
        (answer.status != 503).then_some(answer)
    });
    assert_eq!((harmful.status, harmful.text().contains("quorum")), (409, true), "{}", harmful.text());
    cluster.nodes[follower].must_put("k", "v");
    cluster.nodes[follower].kill();
    cluster.nodes[up].kill();
    cluster.start_all();
    cluster.must_agree();
}

/// An ID is never used again, whatever the machine behind it.
#[test]
fn a_removed_member_stays_removed() {
    let mut cluster = Cluster::start(3);
    let away = cluster.follower();
    let stay = (away + 1) % 3;
    let id = cluster.nodes[away].id;
    cluster.nodes[away].kill();
    cluster.nodes[stay].must_remove(id);
    // It was away when it was removed: it is told when it comes back.
    cluster.nodes[away].start();
    assert_eq!(cluster.nodes[away].wait().code(), Some(0), "{}", cluster.nodes[away].log());
    assert!(cluster.nodes[away].log().contains("was removed from the cluster"));
    let again = cluster.nodes[stay].add(id, &format!("http://127.0.0.1:{}", free_port()));
    assert_eq!((again.status, again.text().contains("never used again")), (409, true), "{}", again.text());
    fs::remove_dir_all(&cluster.nodes[away].dir).unwrap();
    cluster.nodes[away].start();
    assert!(cluster.nodes[away].wait().code() == Some(0));
    cluster.nodes[stay].must_put("k", "v");
}

/// Who was not added is told so.
#[test]
fn a_stranger_does_not_join() {
    let mut cluster = Cluster::with_flags(1, &["--request-timeout", "500ms"]);
    cluster.start_all();
    let stranger = cluster.newcomer(2);
    cluster.nodes[stranger].start();
    assert_eq!(cluster.nodes[stranger].wait().code(), Some(2));
    assert!(cluster.nodes[stranger].log().contains("was not added"), "{}", cluster.nodes[stranger].log());
    cluster.nodes[0].must_put("k", "v");
}

/// Addresses live in the log: restarts work with lists that are stale, and a member may move to another address.
#[test]
fn addresses_survive_restarts_and_moves() {
    let mut cluster = Cluster::with_flags(3, &["--snapshot-count", "20", "--snapshot-catchup-entries", "0"]);
    cluster.start_all();
    let fourth = cluster.grow(0, 4);
    for n in 0..60 {
        cluster.nodes[0].must_put(&format!("k{n}"), "v");
    }
    // All of them know the founding list only, or less: the fourth is in none but its own.
    cluster.nodes.iter_mut().for_each(|node| node.kill());
    cluster.start_all();
    cluster.must_agree();

    let moved = free_port();
    let url = format!("http://127.0.0.1:{moved}");
    cluster.nodes[fourth].kill();
    cluster.nodes[0].must_add(4, &url);
    let listen = format!("127.0.0.1:{moved}");
    cluster.nodes[fourth].set_flags(&["--listen-peer", &listen]);
    cluster.nodes[fourth].peer_port = moved;
    cluster.nodes[fourth].start();
    cluster.nodes[fourth].wait_ready();
    cluster.nodes[fourth].must_put("moved", "x");
    cluster.must_agree();
}
