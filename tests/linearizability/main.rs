//! Tests the checker of histories that other tests rely on: what is good passes, each kind of violation is found and
//! told, small histories are judged as by trying every order, large ones take few steps.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../history/mod.rs"]
mod history;

mod large;
mod planted;
mod small;

use history::{Call, Operation, Outcome};

/// An operation on the one key that most tests use.
fn operation(client: u64, call: Call, invoked: u64, outcome: Outcome) -> Operation {
    Operation { client, key: b"key".to_vec(), call, invoked, outcome }
}

fn put(client: u64, value: &str, invoked: u64, at: u64) -> Operation {
    operation(client, Call::Put(value.into()), invoked, Outcome::Done { at, read: None })
}

fn delete(client: u64, invoked: u64, at: u64) -> Operation {
    operation(client, Call::Delete, invoked, Outcome::Done { at, read: None })
}

/// `value` is empty for none.
fn get(client: u64, value: &str, invoked: u64, at: u64) -> Operation {
    let read = (!value.is_empty()).then(|| value.into());
    operation(client, Call::Get, invoked, Outcome::Done { at, read })
}
