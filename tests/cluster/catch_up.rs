//! Snapshots: the log does not grow for ever, whoever was away for long is caught up, and nothing is lost on the way.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::harness::{Cluster, Node, wait_for};

const SMALL: &[&str] = &["--snapshot-count", "50", "--snapshot-catchup-entries", "10", "--snapshot-keep", "1"];

fn fill(cluster: &Cluster, at: usize, name: &str, count: usize, acknowledged: &mut BTreeMap<String, String>) {
    for n in 0..count {
        let (key, value) = (format!("{name}-{}", n % 40), format!("{name} value {n}"));
        cluster.nodes[at].must_put(&key, &value);
        acknowledged.insert(key, value);
    }
}

fn snapshots(dir: &Path) -> usize {
    fs::read_dir(dir.join("snap")).unwrap().filter(|entry| entry.as_ref().unwrap().path().extension().is_some()).count()
}

/// raftexample could not restart after its first snapshot.
#[test]
fn a_lone_node_restarts_from_its_snapshot() {
    let mut cluster = Cluster::with_flags(1, SMALL);
    cluster.start_all();
    let mut acknowledged = BTreeMap::new();
    for life in 0..3 {
        fill(&cluster, 0, &format!("life-{life}"), 120, &mut acknowledged);
        let node = &cluster.nodes[0];
        wait_for("a snapshot", || {
            let status = node.status()?;
            (status["snapshot"]["index"].as_u64()? + 60 > status["applied"].as_u64()?).then_some(())
        });
        let before = node.status().unwrap();
        assert!(before["snapshot"]["log_from"].as_u64() > Some(50), "{before}");
        cluster.nodes[0].kill();
        cluster.nodes[0].start();
        cluster.nodes[0].wait_ready();
        let after = cluster.nodes[0].status().unwrap();
        assert_eq!((&before["state_hash"], &before["revision"]), (&after["state_hash"], &after["revision"]));
        cluster.must_hold(&acknowledged);
        assert!(snapshots(&cluster.nodes[0].dir) <= 2);
    }
}

/// A large state that changes little is not written again: not after fifty entries, and not because of a restart.
#[test]
fn the_next_snapshot_of_a_large_state_waits_for_as_much_log() {
    let mut cluster = Cluster::with_flags(1, SMALL);
    cluster.start_all();
    let mut acknowledged = BTreeMap::new();
    for n in 0..3 {
        cluster.nodes[0].must_put(&format!("large-{n}"), vec![b'v'; 900_000]);
    }
    fill(&cluster, 0, "small", 60, &mut acknowledged);
    let index = |cluster: &Cluster| cluster.nodes[0].status()?["snapshot"]["index"].as_u64().filter(|index| *index > 0);
    let first = wait_for("a snapshot of them all, due by its count", || index(&cluster));
    for _ in 0..2 {
        fill(&cluster, 0, "small", 150, &mut acknowledged);
        assert_eq!(index(&cluster), Some(first));
        cluster.nodes[0].kill();
        cluster.nodes[0].set_flags(&[SMALL, &["--snapshot-log-bytes", "1MiB"]].concat());
        cluster.nodes[0].start();
        cluster.nodes[0].wait_ready();
    }
    for n in 0..2 {
        cluster.nodes[0].must_put(&format!("large-{n}"), vec![b'w'; 900_000]);
    }
    fill(&cluster, 0, "small", 60, &mut acknowledged);
    assert_eq!(index(&cluster), Some(first), "two thirds of its size");
    for n in 0..2 {
        cluster.nodes[0].must_put(&format!("large-{n}"), vec![b'x'; 900_000]);
    }
    let next = wait_for("the next snapshot", || index(&cluster).filter(|index| *index > first));

    cluster.nodes[0].kill();
    cluster.nodes[0].set_flags(SMALL);
    cluster.nodes[0].start();
    cluster.nodes[0].wait_ready();
    for n in 0..8 {
        cluster.nodes[0].must_put(&format!("large-{}", n % 3), vec![b'y'; 900_000]);
    }
    fill(&cluster, 0, "small", 150, &mut acknowledged);
    assert_eq!(index(&cluster), Some(next), "more than its size, less than 32 MiB");
    cluster.must_hold(&acknowledged);
}

/// They would all be due at the same place in the log, and slow down the same writes.
#[test]
fn members_take_turns_with_large_snapshots() {
    let mut cluster = Cluster::with_flags(3, &[SMALL, &["--snapshot-log-bytes", "4MiB"]].concat());
    cluster.start_all();
    for n in 0..3 {
        cluster.nodes[0].must_put(&format!("large-{n}"), vec![b'v'; 900_000]);
    }
    fill(&cluster, 0, "small", 60, &mut BTreeMap::new());
    let indexes = |above: u64| {
        let index = |node: &Node| node.status()?["snapshot"]["index"].as_u64().filter(|index| *index > above);
        cluster.nodes.iter().map(index).collect::<Option<Vec<u64>>>()
    };
    let first = wait_for("a snapshot of each, due by its count: it holds all three", || indexes(0));
    let second = wait_for("the next of each", || {
        cluster.nodes[0].must_put("large-0", vec![b'w'; 100_000]);
        indexes(*first.iter().max()?)
    });
    assert!(second.is_sorted_by(|one, next| one < next), "{second:?}");
}

/// A follower that is away past compaction is caught up by a snapshot while writes go on; killed while it installs one,
/// it starts again, and again.
#[test]
fn who_was_away_for_long_is_caught_up_by_a_snapshot() {
    caught_up_by_a_snapshot(SMALL);
}

/// The same where a snapshot of its own falls due all the time, while it installs the leader's too.
#[test]
fn snapshots_that_come_and_snapshots_that_are_due_do_not_meet() {
    caught_up_by_a_snapshot(&[SMALL, &["--snapshot-interval", "100ms", "--snapshot-min-entries", "1"]].concat());
}

fn caught_up_by_a_snapshot(flags: &[&str]) {
    let mut cluster = Cluster::with_flags(3, flags);
    cluster.start_all();
    let mut acknowledged = BTreeMap::new();
    fill(&cluster, 0, "before", 10, &mut acknowledged);
    let away = cluster.follower();
    let up = (away + 1) % 3;
    for round in 0..3 {
        let applied = wait_for("its status", || cluster.nodes[away].status()?["applied"].as_u64());
        cluster.nodes[away].kill();
        // A leader keeps the log for whom it heard of a moment ago, so this takes about an election time-out.
        wait_for("the log has forgotten what it needs", || {
            fill(&cluster, up, &format!("round-{round}"), 60, &mut acknowledged);
            let leader = cluster.leader();
            (cluster.nodes[leader].status()?["snapshot"]["log_from"].as_u64()? > applied + 1).then_some(())
        });
        cluster.nodes[away].start();
        if round < 2 {
            // Killed as soon as it is there, whatever it does then.
            cluster.nodes[away].wait_alive();
            fill(&cluster, up, "meanwhile", 20, &mut acknowledged);
        } else {
            cluster.nodes[away].wait_ready();
        }
    }
    assert!(cluster.nodes[away].log().contains("snapshot installed"), "{}", cluster.nodes[away].log());
    cluster.must_agree();
    cluster.must_hold(&acknowledged);
    cluster.nodes.iter_mut().for_each(|node| node.kill());
    cluster.start_all();
    cluster.must_agree();
    cluster.must_hold(&acknowledged);
}

/// A snapshot at the leader is damaged when a follower needs it: another is made, and sent.
#[test]
fn a_damaged_snapshot_is_made_anew() {
    let mut cluster = Cluster::with_flags(2, SMALL);
    cluster.nodes[0].start();
    cluster.nodes[1].start();
    cluster.nodes[0].wait_ready();
    cluster.grow(0, 3);
    let away = cluster.follower();
    let leader = cluster.leader();
    let applied = wait_for("its status", || cluster.nodes[away].status()?["applied"].as_u64());
    cluster.nodes[away].kill();
    let mut acknowledged = BTreeMap::new();
    wait_for("the log has forgotten what it needs", || {
        fill(&cluster, leader, "k", 60, &mut acknowledged);
        (cluster.nodes[leader].status()?["snapshot"]["log_from"].as_u64()? > applied + 1).then_some(())
    });
    wait_for("a quiet leader", || {
        let status = cluster.nodes[leader].status()?;
        (status["snapshot"]["index"].as_u64()? + 50 > status["applied"].as_u64()?).then_some(())
    });
    for file in fs::read_dir(cluster.nodes[leader].dir.join("snap")).unwrap().map(|entry| entry.unwrap().path()) {
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, bytes).unwrap();
    }
    cluster.nodes[away].start();
    cluster.nodes[away].wait_ready();
    cluster.must_agree();
    cluster.must_hold(&acknowledged);
}

/// A newcomer to a cluster that has forgotten its first entries.
#[test]
fn a_newcomer_joins_behind_a_snapshot() {
    let mut cluster = Cluster::with_flags(1, SMALL);
    cluster.start_all();
    let mut acknowledged = BTreeMap::new();
    fill(&cluster, 0, "before", 300, &mut acknowledged);
    let second = cluster.grow(0, 2);
    fill(&cluster, second, "after", 100, &mut acknowledged);
    cluster.must_agree();
    cluster.must_hold(&acknowledged);
    cluster.nodes.iter_mut().for_each(|node| node.kill());
    cluster.start_all();
    cluster.must_hold(&acknowledged);
    cluster.must_agree();
}

/// The last snapshot is damaged: the one before does as long as the log reaches back to it; else the start is refused
/// with the file, and nothing wrong is served.
#[test]
fn a_damaged_snapshot_is_never_served() {
    let mut cluster = Cluster::with_flags(1, SMALL);
    cluster.start_all();
    let mut acknowledged = BTreeMap::new();
    fill(&cluster, 0, "k", 200, &mut acknowledged);
    // Until then the log reaches back to the one before, which would do as well.
    wait_for("the newest snapshot, and the log cut behind it", || {
        let status = cluster.nodes[0].status()?;
        (status["snapshot"]["index"].as_u64()? + 50 > status["applied"].as_u64()?).then_some(())
    });
    assert_eq!(cluster.nodes[0].stop(), Some(0));
    let newest =
        fs::read_dir(cluster.nodes[0].dir.join("snap")).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    let intact = fs::read(&newest).unwrap();
    let mut damaged = intact.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    fs::write(&newest, damaged).unwrap();
    cluster.nodes[0].start();
    assert_eq!(cluster.nodes[0].wait().code(), Some(1));
    let said = cluster.nodes[0].log();
    assert!(said.lines().last().unwrap().contains(".snap"), "{said}");
    fs::write(&newest, intact).unwrap();
    cluster.nodes[0].start();
    cluster.nodes[0].wait_ready();
    cluster.must_hold(&acknowledged);
}

/// Overwrites for ever fill no disk: segments come back as new ones, and old snapshots go.
#[test]
fn disk_use_levels_off() {
    let mut cluster = Cluster::with_flags(1, &["--snapshot-log-bytes", "4MiB", "--snapshot-catchup-entries", "10"]);
    cluster.start_all();
    let value = vec![7; 1 << 20];
    let segments = |node: &Node| fs::read_dir(node.dir.join("wal")).unwrap().count();
    let mut most = 0;
    for n in 0..120 {
        cluster.nodes[0].must_put(&format!("k{}", n % 3), &value);
        most = most.max(segments(&cluster.nodes[0]));
        if n % 30 == 29 {
            cluster.nodes[0].kill();
            cluster.nodes[0].start();
            cluster.nodes[0].wait_ready();
        }
    }
    // 120 MiB were written through segments of 16.
    assert!(most <= 5, "{most} files in the log's directory");
    assert!(snapshots(&cluster.nodes[0].dir) <= 3);
}

/// A snapshot of 256 MiB goes from file to file: neither side holds it beside the state that it is of.
#[test]
fn a_large_snapshot_takes_no_memory_of_its_own() {
    const VALUES: u64 = 256;
    let flags = ["--snapshot-log-bytes", "32MiB", "--snapshot-catchup-entries", "0", "--snapshot-keep", "1"];
    let mut cluster = Cluster::with_flags(1, &flags);
    cluster.start_all();
    let value: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 253) as u8).collect();
    for n in 0..VALUES {
        cluster.nodes[0].must_put(&format!("k{n}"), &value);
    }
    wait_for("the log is compacted", || {
        cluster.nodes[0].must_put("k0", &value);
        (cluster.nodes[0].status()?["snapshot"]["log_from"].as_u64() > Some(200)).then_some(())
    });
    let (_, before) = cluster.nodes[0].memory();
    let second = cluster.grow(0, 2);
    cluster.must_agree();
    let (_, sender) = cluster.nodes[0].memory();
    let (_, receiver) = cluster.nodes[second].memory();
    assert!(cluster.nodes[second].log().contains("snapshot installed"), "{}", cluster.nodes[second].log());
    assert!(sender < before + (64 << 20), "the sender grew from {before} to {sender} bytes");
    assert!(receiver < (VALUES << 20) + (128 << 20), "the receiver took {receiver} bytes");
    assert_eq!(cluster.nodes[second].must_get("k255"), value);
}

/// A log of 160 MiB behind a state of 3: what a start has read it does not keep.
#[test]
fn a_start_takes_no_memory_for_a_long_log() {
    let flags = ["--snapshot-count", "100000", "--snapshot-log-bytes", "1GiB", "--snapshot-catchup-entries", "3"];
    let mut cluster = Cluster::with_flags(1, &flags);
    cluster.start_all();
    let value = vec![7; 1 << 20];
    for n in 0..160 {
        cluster.nodes[0].must_put(&format!("k{}", n % 3), &value);
    }
    cluster.nodes[0].kill();
    cluster.nodes[0].start();
    cluster.nodes[0].wait_ready();
    let status = cluster.nodes[0].status().unwrap();
    assert_eq!((status["revision"].as_u64(), status["snapshot"]["index"].as_u64()), (Some(161), Some(0)));
    let (_, most) = cluster.nodes[0].memory();
    assert!(most < 64 << 20, "the start took {most} bytes");
    assert_eq!(cluster.nodes[0].must_get("k2"), value);
}
