//! Histories of register operations as their clients saw them, and the question whether they are linearizable: whether
//! each operation can be said to have happened at one instant between its call and its answer. Test binaries include it
//! with `#[path]`: the simulation, the tests with real processes, and `tests/linearizability`, which tests it.
//!
//! A key is a register that holds nothing at first. Registers are independent, so that each key is checked alone
//! (Herlihy and Wing's locality). `search` looks for an order, `violation` says what cannot be ordered, `drawing` draws it.

#![allow(dead_code, reason = "each test binary uses a part")]

mod drawing;
pub mod http;
mod search;
mod violation;

use std::collections::{BTreeMap, HashMap};

use search::{Effect, Entry, Verdict};
pub use violation::{GaveUp, NotLinearizable, Violation};

/// Steps of the search on one key before it gives up: some seconds.
const STEPS_MAX: u64 = 10_000_000;

/// One operation as its client saw it. Times are in any unit that rises, e.g. microseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    pub client: u64,
    pub key: Vec<u8>,
    pub call: Call,
    pub invoked: u64,
    pub outcome: Outcome,
}

/// What was asked for. `search` relies on it that a call writes without a look, or looks without writing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    Put(Vec<u8>),
    Delete,
    Get,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Answered at this time; for Get what was read (None = no such key), for writes None.
    Done { at: u64, read: Option<Vec<u8>> },
    /// The server says the write was not applied and never will be.
    NotApplied,
    /// No answer, or one that says the outcome is unknown: may take effect at any time after `invoked`, or never.
    Unknown,
}

/// Operations of any number of clients, in any order.
#[derive(Debug, Clone, Default)]
pub struct History {
    operations: Vec<Operation>,
}

/// What was checked and found linearizable.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub keys: usize,
    pub operations: usize,
    /// Writes answered as not applied, and so in no order.
    pub not_applied: usize,
    /// Operations whose outcome nobody knows.
    pub unknown: usize,
    /// What the search took: a few for each operation, unless many writes wrote the same.
    pub steps: u64,
}

impl History {
    pub fn new() -> Self {
        History::default()
    }

    /// Panics on an operation that no client can have seen: an answer before the call, a write that read something.
    pub fn push(&mut self, operation: Operation) {
        if let Outcome::Done { at, read } = &operation.outcome {
            assert!(operation.invoked <= *at, "answered before it was called: {operation:?}");
            assert!(operation.call == Call::Get || read.is_none(), "a write reads nothing: {operation:?}");
        }
        self.operations.push(operation);
    }

    /// Takes in what others saw, by the same clock.
    pub fn merge(&mut self, other: History) {
        self.operations.extend(other.operations);
    }

    pub fn len(&self) -> usize {
        self.operations.len()
    }

    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }

    /// Looks for an order of each key's operations. An error is a proof that a key has none; or, if none is proven, that
    /// the search was too hard for a key.
    pub fn check(&self) -> Result<Report, Violation> {
        self.check_within(STEPS_MAX)
    }

    /// `check` with another bound on the steps for one key.
    pub fn check_within(&self, steps_max: u64) -> Result<Report, Violation> {
        let mut keys: BTreeMap<&[u8], Vec<&Operation>> = BTreeMap::new();
        for operation in &self.operations {
            keys.entry(&operation.key).or_default().push(operation);
        }
        let mut report = Report { keys: keys.len(), operations: self.len(), ..Report::default() };
        report.not_applied = self.count(&Outcome::NotApplied);
        report.unknown = self.count(&Outcome::Unknown);
        let mut too_hard = None;
        for operations in keys.into_values() {
            let register = Register::new(operations);
            match search::search(&register.entries, steps_max) {
                Verdict::Linearizable { steps } => report.steps += steps,
                Verdict::Stuck { order, .. } => {
                    return Err(Violation::NotLinearizable(Box::new(NotLinearizable::new(&register, order.len()))));
                }
                Verdict::GaveUp { steps } => {
                    too_hard.get_or_insert(Violation::GaveUp(GaveUp::new(&register, steps)));
                }
            }
        }
        too_hard.map_or(Ok(report), Err)
    }

    /// `check` for tests: panics with what is wrong, and leaves a picture of it behind.
    pub fn must_be_linearizable(&self, name: &str) -> Report {
        self.check().unwrap_or_else(|violation| {
            let picture = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.svg"));
            std::fs::write(&picture, violation.svg()).expect("write the picture");
            panic!("{violation}\nThe same as a picture: {}", picture.display())
        })
    }

    fn count(&self, outcome: &Outcome) -> usize {
        self.operations.iter().filter(|operation| operation.outcome == *outcome).count()
    }
}

/// One key's operations, and those of them that an order must, or may, have in it.
struct Register<'a> {
    operations: Vec<&'a Operation>,
    entries: Vec<Entry>,
    /// The operation behind each entry.
    behind: Vec<usize>,
}

impl<'a> Register<'a> {
    fn new(mut operations: Vec<&'a Operation>) -> Self {
        operations.sort_by_key(|operation| (operation.invoked, operation.client));
        // Values are numbered, absence among them: a Delete writes it, and it is what is there at first.
        let mut numbers: HashMap<Option<&[u8]>, u32> = HashMap::from([(None, search::FIRST)]);
        let mut number = |value| {
            let next = numbers.len() as u32;
            *numbers.entry(value).or_insert(next)
        };
        let mut register = Register { operations, entries: Vec::new(), behind: Vec::new() };
        for (at, operation) in register.operations.iter().enumerate() {
            let (returned, read) = match &operation.outcome {
                Outcome::Done { at, read } => (Some(*at), read.as_deref()),
                Outcome::Unknown => (None, None),
                // It is in no order: what it would have written must never be read.
                Outcome::NotApplied => continue,
            };
            let effect = match (&operation.call, returned) {
                (Call::Put(value), _) => Effect::Write(number(Some(value))),
                (Call::Delete, _) => Effect::Write(number(None)),
                (Call::Get, Some(_)) => Effect::Read(number(read)),
                // Nobody knows what it read: it fits anywhere.
                (Call::Get, None) => continue,
            };
            register.entries.push(Entry { invoked: operation.invoked, returned, effect });
            register.behind.push(at);
        }
        register
    }
}
