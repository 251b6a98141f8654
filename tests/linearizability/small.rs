//! Small histories of all sorts are judged as by trying every order. Which operations contradict each other is judged
//! the same way: they do, and without any one of them they do not.

use proptest::prelude::*;

use crate::history::{Call, History, Operation, Outcome};
use crate::operation;

/// Whether there is an order that `left`, with `value` there, can happen in: every one is tried.
fn has_order(left: &[Operation], value: Option<&[u8]>) -> bool {
    let is_answered = |operation: &Operation| matches!(operation.outcome, Outcome::Done { .. });
    if !left.iter().any(is_answered) {
        return true;
    }
    (0..left.len()).any(|at| {
        let next = &left[at];
        let is_later = |other: &Operation| matches!(other.outcome, Outcome::Done { at, .. } if at < next.invoked);
        if left.iter().any(is_later) {
            return false;
        }
        let value = match (&next.call, &next.outcome) {
            (_, Outcome::NotApplied) | (Call::Get, Outcome::Unknown) => return false,
            (Call::Put(put), _) => Some(put.as_slice()),
            (Call::Delete, _) => None,
            (Call::Get, Outcome::Done { read, .. }) if read.as_deref() == value => value,
            (Call::Get, Outcome::Done { .. }) => return false,
        };
        has_order(&[&left[..at], &left[at + 1..]].concat(), value)
    })
}

/// `all`, with nothing asked of those that are not in `core`.
fn only(all: &[Operation], core: &[Operation]) -> Vec<Operation> {
    let mut all = all.to_vec();
    for operation in &mut all {
        if !core.contains(operation) && operation.outcome != Outcome::NotApplied {
            operation.outcome = Outcome::Unknown;
        }
    }
    all
}

/// Up to `count` operations with few values; so few that chance finds orders often enough.
fn operations(count: usize) -> impl Strategy<Value = Vec<Operation>> {
    let one = (0..8u8, 0..3u8, 0..4u8, 0..16u64, 0..10u64, 0..8u8);
    proptest::collection::vec(one, 1..=count).prop_map(|drawn| {
        let make = |(client, (call, value, read, invoked, took, outcome))| {
            let name = |value: u8| vec![b'a' + value];
            let call = match call {
                0..=2 => Call::Put(name(value)),
                3 => Call::Delete,
                _ => Call::Get,
            };
            let read = if call == Call::Get && read > 0 { Some(name(read - 1)) } else { None };
            let outcome = match outcome {
                0 => Outcome::Unknown,
                1 if call != Call::Get => Outcome::NotApplied,
                _ => Outcome::Done { at: invoked + took, read },
            };
            operation(client, call, invoked, outcome)
        };
        (0..).zip(drawn).map(make).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn small_histories_are_judged_as_by_every_order(operations in operations(7)) {
        let mut history = History::new();
        operations.iter().for_each(|operation| history.push(operation.clone()));
        match history.check() {
            Ok(_) => prop_assert!(has_order(&operations, None), "passed, but has no order"),
            Err(violation) => {
                prop_assert!(!has_order(&operations, None), "has an order, but:\n{violation}");
                let core = violation.contradict();
                prop_assert!(!has_order(&only(&operations, core), None), "no contradiction:\n{violation}");
                for at in 0..core.len() {
                    let less = [&core[..at], &core[at + 1..]].concat();
                    prop_assert!(has_order(&only(&operations, &less), None), "{at} is not needed:\n{violation}");
                }
            }
        }
    }
}
