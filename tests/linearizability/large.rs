//! Histories as a real register makes them, with thousands of operations, late effects and answers that never come: they
//! pass, in few steps; and one stale read among them is found and told with few operations.

use std::time::Instant;

use crate::history::{Call, History, Operation, Outcome};

/// What is to be simulated.
#[derive(Debug, Clone, Copy)]
struct Load {
    seed: u64,
    operations: usize,
    clients: usize,
    keys: usize,
    /// Of a hundred operations: writes, and how many of those delete.
    writes: u64,
    deletes: u64,
    /// Of a hundred writes: those with no answer, and those that are refused.
    unknown: u64,
    refused: u64,
    /// How many values there are; each write has its own if None.
    values: Option<u64>,
}

const LOAD: Load = Load {
    seed: 1,
    operations: 10_000,
    clients: 16,
    keys: 1,
    writes: 50,
    deletes: 0,
    unknown: 2,
    refused: 2,
    values: None,
};

/// SplitMix64 (Steele, Lea and Flood): a seed makes the same history everywhere.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }

    fn percent(&mut self, percent: u64) -> bool {
        (self.below(100) as u64) < percent
    }
}

/// An operation on its way. The client's turns make it happen, then answer it.
struct Open {
    key: usize,
    call: Call,
    invoked: u64,
    happened: bool,
    read: Option<Vec<u8>>,
}

/// Each turn of time is one client's: it calls, its operation happens, or it is answered. A write whose client hears
/// nothing stays behind, to happen at some turn or never.
fn simulate(load: Load) -> Vec<Operation> {
    let mut chance = Chance(load.seed);
    let mut registers = vec![None; load.keys];
    let mut clients: Vec<Option<Open>> = (0..load.clients).map(|_| None).collect();
    let mut adrift: Vec<(usize, Call)> = Vec::new();
    let mut seen = Vec::new();
    let mut written = 0;
    let mut now = 0;
    while seen.len() < load.operations {
        now += 1;
        let client = chance.below(load.clients);
        let mut tell = |open: Open, outcome| {
            let key = format!("key-{}", open.key).into_bytes();
            seen.push(Operation { client: client as u64, key, call: open.call, invoked: open.invoked, outcome });
        };
        match clients[client].take() {
            None => {
                let call = if !chance.percent(load.writes) {
                    Call::Get
                } else if chance.percent(load.deletes) {
                    Call::Delete
                } else {
                    written += 1;
                    let value = load.values.map_or(written, |values| chance.below(values as usize));
                    Call::Put(format!("v{value}").into_bytes())
                };
                let key = chance.below(load.keys);
                let open = Open { key, call, invoked: now, happened: false, read: None };
                if open.call != Call::Get && chance.percent(load.refused) {
                    tell(open, Outcome::NotApplied);
                } else if open.call != Call::Get && chance.percent(load.unknown) {
                    adrift.push((key, open.call.clone()));
                    tell(open, Outcome::Unknown);
                } else {
                    clients[client] = Some(open);
                }
            }
            Some(mut open) if !open.happened => {
                match &open.call {
                    Call::Get => open.read = registers[open.key].clone(),
                    write => registers[open.key] = effect(write),
                }
                open.happened = true;
                clients[client] = Some(open);
            }
            Some(mut open) => {
                let read = open.read.take();
                tell(open, Outcome::Done { at: now, read });
            }
        }
        if !adrift.is_empty() && chance.percent(5) {
            let (key, write) = adrift.swap_remove(chance.below(adrift.len()));
            if chance.percent(70) {
                registers[key] = effect(&write);
            }
        }
    }
    // The history ends before they are answered.
    for (client, open) in (0..).zip(clients) {
        let Some(Open { key, call, invoked, .. }) = open else {
            continue;
        };
        let key = format!("key-{key}").into_bytes();
        seen.push(Operation { client, key, call, invoked, outcome: Outcome::Unknown });
    }
    seen
}

fn effect(write: &Call) -> Option<Vec<u8>> {
    match write {
        Call::Put(value) => Some(value.clone()),
        Call::Delete | Call::Get => None,
    }
}

/// The history passes, within `steps_each` steps for each operation. Says what it took.
#[track_caller]
fn passes(what: &str, load: Load, steps_each: u64) {
    let mut history = History::new();
    simulate(load).into_iter().for_each(|operation| history.push(operation));
    let before = Instant::now();
    let report = history.check().unwrap_or_else(|violation| panic!("{what}: {load:?}\n{violation}"));
    println!("{what}: {report:?} in {:?}", before.elapsed());
    assert!(report.steps <= steps_each * report.operations as u64, "{what}: {report:?}");
}

#[test]
fn ten_thousand_operations_on_a_key() {
    passes("16 clients", LOAD, 4);
    passes("64 clients", Load { clients: 64, ..LOAD }, 4);
    passes("64 clients, writes", Load { clients: 64, writes: 95, ..LOAD }, 4);
}

#[test]
fn a_hundred_thousand_operations() {
    passes("100 keys", Load { operations: 100_000, clients: 64, keys: 100, ..LOAD }, 4);
    passes("1 key", Load { operations: 100_000, clients: 64, ..LOAD }, 4);
}

#[test]
fn hundreds_of_unknown_writes_on_a_key() {
    passes("a fifth unknown", Load { unknown: 20, ..LOAD }, 4);
    passes("half unknown, 64 clients", Load { unknown: 50, clients: 64, ..LOAD }, 4);
}

/// Here the search has choices. Its steps are the same everywhere: the bounds are close, and hold its rules to it.
#[test]
fn writes_of_the_same() {
    passes("deletes", Load { deletes: 20, ..LOAD }, 20);
    passes("deletes, 64 clients", Load { deletes: 20, clients: 64, operations: 3000, ..LOAD }, 200);
    passes("deletes, a fifth unknown", Load { deletes: 20, unknown: 20, operations: 3000, ..LOAD }, 20);
    passes("three values, 5 clients", Load { values: Some(3), clients: 5, operations: 3000, ..LOAD }, 30);
}

#[test]
fn whatever_a_register_does_passes() {
    for seed in 0..300 {
        let (clients, values) = (1 + seed as usize % 9, [None, Some(2), Some(5)][seed as usize % 3]);
        let load = Load { seed, operations: 80, clients, keys: 2, deletes: 10, unknown: 10, values, ..LOAD };
        passes("a register", load, u64::MAX / 1000);
    }
}

/// Behind a write that was overwritten before, a read of it.
#[test]
fn one_stale_read_among_ten_thousand_operations() {
    for (seed, deletes) in [(1, 0), (2, 0), (3, 10)] {
        let mut operations = simulate(Load { seed, deletes, ..LOAD });
        let answered = |operation: &Operation| match operation.outcome {
            Outcome::Done { at, .. } => Some(at),
            Outcome::NotApplied | Outcome::Unknown => None,
        };
        let put_between = |from: u64, until: u64| {
            let put = operations.iter().filter(|one| matches!(one.call, Call::Put(_)) && one.invoked > from);
            put.filter_map(|one| Some((one.clone(), answered(one)?)))
                .filter(|(_, at)| *at < until)
                .min_by_key(|(_, at)| *at)
        };
        let (old, at) = put_between(10_000, u64::MAX).unwrap();
        let (_, at) = put_between(at, u64::MAX).unwrap();
        let is_after = |one: &Operation| one.call == Call::Get && one.invoked > at && answered(one).is_some();
        let stale = operations.iter().position(is_after).unwrap();
        let at = answered(&operations[stale]).unwrap();
        operations[stale].outcome = Outcome::Done { at, read: effect(&old.call) };
        let mut history = History::new();
        operations.iter().for_each(|operation| history.push(operation.clone()));
        let before = Instant::now();
        let violation = history.check().expect_err("a stale read");
        println!("found in {:?}:\n{violation}", before.elapsed());
        assert!(violation.contradict().contains(&operations[stale]) || violation.contradict().len() <= 3);
        assert!((2..=4).contains(&violation.contradict().len()), "{violation}");
    }
}
