//! What a server refuses to do: start on what is not its own, or go on without what it needs. One line says why and what
//! to do, without a panic, and nothing is harmed.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;
use std::time::{Duration, Instant};

use crate::harness::{Cluster, Node, copy_dir, free_port, raftkv, wait_for};

fn run(args: &[&str]) -> Output {
    raftkv(args).env("RUST_LOG", "off").output().unwrap()
}

/// One line on stderr, the exit code, and no panic.
fn refusal(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("raftkv: "), "{stderr}");
    stderr
}

#[test]
fn a_port_in_use_is_named() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("data");
    let (port, peer) = (free_port(), free_port());
    let start = |port: u16, peer: u16| {
        let (port, cluster) = (port.to_string(), format!("http://127.0.0.1:{peer}"));
        run(&["--port", &port, "--cluster", &cluster, "--data-dir", dir.to_str().unwrap()])
    };
    let _taken = TcpListener::bind(("::", port)).unwrap();
    let said = refusal(&start(port, peer), 1);
    assert!(said.contains(&format!("--port [::]:{port}")), "{said}");
    let _taken = TcpListener::bind(("127.0.0.1", peer)).unwrap();
    let said = refusal(&start(free_port(), peer), 1);
    assert!(said.contains(&format!("127.0.0.1:{peer}")), "{said}");
    assert!(!dir.join("identity").exists(), "a start that failed is no first start");
}

#[test]
fn a_directory_that_cannot_be_used_is_named() {
    let mut cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let dir = node.dir.to_str().unwrap().to_owned();
    let (port, url) = (free_port().to_string(), format!("http://127.0.0.1:{}", free_port()));
    let said = refusal(&run(&["--port", &port, "--cluster", &url, "--data-dir", &dir]), 1);
    assert!(said.contains(&dir) && said.contains("another process"), "{said}");
    node.must_put("k", "v");

    cluster.nodes[0].kill();
    let list = format!("{url},http://127.0.0.1:{}", free_port());
    let said = refusal(&run(&["--id", "2", "--port", &port, "--cluster", &list, "--data-dir", &dir]), 2);
    assert!(said.contains("belongs to member 1"), "{said}");

    let file = cluster.root.path().join("file");
    fs::write(&file, "").unwrap();
    let said = refusal(&run(&["--port", &port, "--cluster", &url, "--data-dir", file.to_str().unwrap()]), 1);
    assert!(said.contains(file.to_str().unwrap()), "{said}");

    let locked = cluster.root.path().join("read-only");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o500)).unwrap();
    // Permissions do not bind root.
    if fs::write(locked.join("probe"), "").is_err() {
        let inside = locked.join("data");
        let said = refusal(&run(&["--port", &port, "--cluster", &url, "--data-dir", inside.to_str().unwrap()]), 1);
        assert!(said.contains(inside.to_str().unwrap()), "{said}");
    }
}

/// Damage in the middle of the log is refused with the place; the end of a log that a crash tore is cut.
#[test]
fn a_damaged_log_is_refused_with_the_place() {
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    for n in 0..20 {
        node.must_put(&format!("key-{n}"), "a value to be found");
    }
    assert_eq!(node.stop(), Some(0));
    let log = node.dir.join("wal/0000000000000001.wal");
    let intact = fs::read(&log).unwrap();
    let places: Vec<usize> = intact
        .windows(19)
        .enumerate()
        .filter(|(_, window)| window == b"a value to be found")
        .map(|(at, _)| at)
        .collect();
    assert_eq!(places.len(), 20);

    let mut damaged = intact.clone();
    damaged[places[10]] ^= 1;
    fs::write(&log, &damaged).unwrap();
    node.start();
    assert_eq!(node.wait().code(), Some(1));
    let said = node.log();
    let last = said.lines().last().unwrap();
    assert!(last.contains("0000000000000001.wal") && last.contains("damaged at byte"), "{last}");
    assert!(!said.contains("panicked"), "{said}");

    fs::write(&log, &intact).unwrap();
    node.start();
    node.wait_ready();
    assert_eq!(node.must_get("key-10"), b"a value to be found");
}

/// A member whose directory was wiped has forgotten how it voted. Its peers remember the directory: it stops, says what
/// to do, and the others go on.
#[test]
fn a_wiped_member_does_not_vote_again() {
    let mut cluster = Cluster::start(3);
    cluster.nodes[0].must_put("k", "v");
    let wiped = cluster.follower();
    cluster.nodes[wiped].kill();
    fs::remove_dir_all(&cluster.nodes[wiped].dir).unwrap();
    for _ in 0..2 {
        cluster.nodes[wiped].start();
        assert_eq!(cluster.nodes[wiped].wait().code(), Some(1));
        let said = cluster.nodes[wiped].log();
        let last = said.lines().last().unwrap();
        assert!(last.contains("wiped") && last.contains("new ID"), "{last}");
    }
    cluster.nodes[(wiped + 1) % 3].must_put("k", "w");
    cluster.must_agree();
}

/// `cargo run`, and then three nodes in the same directory: the first would serve the lone node's data as if they were
/// the cluster's.
#[test]
fn a_directory_of_another_cluster_is_not_served() {
    let mut cluster = Cluster::start(1);
    cluster.nodes[0].must_put("k", "v");
    cluster.nodes[0].kill();
    let list = format!("http://127.0.0.1:{},http://127.0.0.1:{}", free_port(), free_port());
    let (port, dir) = (free_port().to_string(), cluster.nodes[0].dir.to_str().unwrap().to_owned());
    let said = refusal(&run(&["--cluster", &list, "--port", &port, "--data-dir", &dir]), 2);
    assert!(said.contains("another cluster"), "{said}");
}

/// Only the log is gone, as where a volume is not mounted: nothing is served in its place, not even by a lone node.
#[test]
fn a_log_that_is_gone_is_asked_for() {
    let mut cluster = Cluster::start(1);
    let node = &mut cluster.nodes[0];
    node.must_put("k", "v");
    node.kill();
    let (log, away) = (node.dir.join("wal"), node.dir.with_extension("away"));
    fs::rename(&log, &away).unwrap();
    node.start();
    assert_eq!(node.wait().code(), Some(1));
    assert!(node.log().lines().last().unwrap().contains("is gone; put it back"), "{}", node.log());
    fs::rename(&away, &log).unwrap();
    node.start();
    node.wait_ready();
    assert_eq!(node.must_get("k"), b"v");
}

/// A directory was copied and both copies run: the process that started first stops and says why, be it the original or
/// the copy. The other one is the member from then on.
#[test]
fn of_two_copies_of_a_member_the_one_that_started_first_stops() {
    for copy_first in [false, true] {
        let mut cluster = Cluster::start(3);
        cluster.nodes[0].must_put("k", "v");
        // The founding, the leader's first entry, the directory of each member and the write. A directory is told at each
        // tick until it is known to all, on a busy machine more than once: no more comes by itself once none came in ten.
        let mut rest = (Vec::new(), Instant::now());
        wait_for("a log at rest", || {
            let applied = |node: &Node| node.status().and_then(|status| status["applied"].as_u64());
            let now = cluster.nodes.iter().map(applied).collect::<Option<Vec<u64>>>()?;
            if now != rest.0 {
                rest = (now, Instant::now());
            }
            (rest.0[0] >= 6 && rest.1.elapsed() >= Duration::from_secs(1)).then_some(())
        });
        cluster.must_agree();
        let original = cluster.follower();
        let other = (original + 1) % 3;
        assert_eq!(cluster.nodes[original].stop(), Some(0));
        let copy = cluster.copy(original);
        let (early, late) = if copy_first { (copy, original) } else { (original, copy) };
        // Nothing is written until one has ended: what it acknowledged, the other would not have.
        cluster.nodes[early].start();
        cluster.nodes[early].wait_alive();
        cluster.nodes[late].start();
        assert_eq!(cluster.nodes[early].wait().code(), Some(1), "{}", cluster.nodes[early].log());
        let said = cluster.nodes[early].log();
        assert!(said.lines().last().unwrap().contains("must never run twice"), "{said}");
        cluster.nodes[late].wait_ready();
        cluster.nodes[other].must_put("k", "w");
        cluster.nodes[late].must_put("l", "x");
        assert_eq!(cluster.nodes[late].must_get("k"), b"w");
        cluster.must_agree();
        assert!(cluster.nodes[late].is_running(), "{}", cluster.nodes[late].log());
    }
}

/// A log that is older than what the member acknowledged: its disk lost data, and the leader's word tells.
#[test]
fn a_member_whose_log_went_back_stops() {
    let mut cluster = Cluster::start(3);
    let back = cluster.follower();
    let old = cluster.root.path().join("old");
    assert_eq!(cluster.nodes[back].stop(), Some(0));
    copy_dir(&cluster.nodes[back].dir, &old);
    cluster.nodes[back].start();
    cluster.nodes[back].wait_ready();
    for n in 0..10 {
        cluster.nodes[back].must_put(&format!("k{n}"), "v");
    }
    cluster.must_agree();
    cluster.nodes[back].kill();
    fs::remove_dir_all(&cluster.nodes[back].dir).unwrap();
    copy_dir(&old, &cluster.nodes[back].dir);
    cluster.nodes[back].start();
    assert_eq!(cluster.nodes[back].wait().code(), Some(1), "{}", cluster.nodes[back].log());
    let said = cluster.nodes[back].log();
    assert!(said.lines().last().unwrap().contains("its disk lost data"), "{said}");
    cluster.nodes[(back + 1) % 3].must_put("k", "w");
}

/// Members of another cluster at the same addresses are refused and counted; raftexample had one ID for all clusters,
/// and let them mix.
#[test]
fn clusters_do_not_mix() {
    let mut ours = Cluster::start(3);
    let away = ours.follower();
    ours.nodes[away].kill();
    let peer_port = ours.nodes[away].peer_port;
    // A stranger who was told our addresses in another order, at the address of the one that is away.
    let other = (away + 1) % 3;
    let list = |ports: [u16; 3]| ports.map(|port| format!("http://127.0.0.1:{port}")).join(",");
    let urls = list([peer_port, ours.nodes[other].peer_port, ours.nodes[(away + 2) % 3].peer_port]);
    let original = list([0, 1, 2].map(|at: usize| ours.nodes[at].peer_port));
    let urls = if urls == original {
        list([peer_port, ours.nodes[(away + 2) % 3].peer_port, ours.nodes[other].peer_port])
    } else {
        urls
    };
    let dir = ours.root.path().join("stranger");
    let port = free_port();
    let mut stranger =
        raftkv(&["--id", "1", "--cluster", &urls, "--port", &port.to_string(), "--wal-segment-bytes", "16MiB"])
            .arg("--data-dir")
            .arg(&dir)
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
    wait_for("the stranger is refused", || {
        let metrics = crate::harness::request("GET", ours.nodes[other].port, "/metrics", b"").ok()?.text();
        metrics.lines().any(|line| line.starts_with("raftkv_transport_refused_total{reason=\"cluster")).then_some(())
    });
    ours.nodes[other].must_put("k", "v");
    assert_eq!(crate::harness::request("GET", port, "/readyz", b"").unwrap().status, 503);
    assert!(stranger.try_wait().unwrap().is_none(), "it waits for its own");
    stranger.kill().and_then(|()| stranger.wait()).unwrap();
    ours.nodes[away].start();
    ours.nodes[away].wait_ready();
    ours.must_agree();
}
