//! What clients at every member see while the leader is killed and comes back is linearizable: a read or a write at one
//! member counts for all the others.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use crate::harness::{Cluster, request, wait_for};
use crate::history::{Call, History, Operation, Outcome, http};

const KEYS: usize = 3;
const CLIENTS: usize = 9;

#[test]
fn clients_at_every_member_see_one_order_while_the_leader_is_killed() {
    let mut cluster = Cluster::start(3);
    let ports: Vec<_> = cluster.nodes.iter().map(|node| node.port).collect();
    let (clock, stop, answered) = (Instant::now(), AtomicBool::new(false), AtomicUsize::new(0));
    let mut history = History::new();
    std::thread::scope(|scope| {
        let (ports, stop, answered) = (&ports, &stop, &answered);
        let clients: Vec<_> =
            (0..CLIENTS).map(|client| scope.spawn(move || operate(client, ports, clock, stop, answered))).collect();
        let more = |what| {
            let before = answered.load(Ordering::Relaxed);
            wait_for(what, || (answered.load(Ordering::Relaxed) >= before + 200).then_some(()));
        };
        more("operations before the kill");
        let victim = cluster.leader();
        cluster.nodes[victim].kill();
        more("operations without the member that led");
        cluster.nodes[victim].start();
        cluster.nodes[victim].wait_ready();
        more("operations after its return");
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().for_each(|client| history.merge(client.join().unwrap()));
    });
    let report = history.must_be_linearizable("the-leader-is-killed");
    assert_eq!(report.keys, KEYS);
    println!("{report:?}");
}

/// Reads and writes in turn on each key, at one member after the other, each write with a value of its own; counts what
/// was answered.
fn operate(client: usize, ports: &[u16], clock: Instant, stop: &AtomicBool, answered: &AtomicUsize) -> History {
    let now = || clock.elapsed().as_micros() as u64;
    let mut history = History::new();
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let key = format!("key-{}", (turn / 2 + client) % KEYS);
        let (call, method, body) = if turn % 2 == 0 {
            let value = format!("{client}-{turn}").into_bytes();
            (Call::Put(value.clone()), "PUT", value)
        } else {
            (Call::Get, "GET", Vec::new())
        };
        let port = ports[(turn + client) % ports.len()];
        let invoked = now();
        // On a connection of its own: nobody repeats it unseen.
        let answer = request(method, port, &format!("/{key}"), &body).ok();
        let outcome =
            http::outcome(&call, answer.as_ref().map(|answer| (answer.status, answer.body.as_slice())), now());
        if outcome != Outcome::Unknown {
            answered.fetch_add(1, Ordering::Relaxed);
        }
        history.push(Operation { client: client as u64, key: key.into_bytes(), call, invoked, outcome });
    }
    history
}
