//! Why a history is not linearizable: few operations that already contradict each other, found by asking less and less of
//! the others for as long as there is no order. Made by `History::check`, shown by tests that fail.

use std::fmt;

use super::drawing::{self, Row};
use super::search::{self, Effect, Entry, Verdict};
use super::{Call, Operation, Outcome, Register};

/// For all the searches that a small set takes: some seconds. Where they are not enough, it stays larger than need be.
const STEPS_MAX: u64 = 20_000_000;
/// Operations drawn besides those that cannot be ordered.
const AROUND_MAX: usize = 12;
/// The end of the longest order that is told.
const ORDER_MAX: usize = 20;

/// No order was found.
#[derive(Debug)]
pub enum Violation {
    /// There is none: this is the proof.
    NotLinearizable(Box<NotLinearizable>),
    /// The search was too hard. It says nothing about the history; a test that hears it has checked nothing, and fails.
    GaveUp(GaveUp),
}

/// One key, and which of its operations have no order.
#[derive(Debug)]
pub struct NotLinearizable {
    key: Vec<u8>,
    operations: usize,
    /// How many operations of the key could be ordered before the first that could not.
    ordered: usize,
    /// Each of these is needed for the contradiction.
    contradict: Vec<Operation>,
    /// The longest order of these and of the writes that they saw.
    order: Vec<Operation>,
    /// Fits nowhere behind that order.
    stuck: Operation,
    /// Values that were read and cannot have been there.
    notes: Vec<String>,
    rows: Vec<Row>,
}

#[derive(Debug)]
pub struct GaveUp {
    key: Vec<u8>,
    operations: usize,
    steps: u64,
}

impl Violation {
    /// The operations that cannot be ordered; none if the search gave up.
    pub fn contradict(&self) -> &[Operation] {
        match self {
            Violation::NotLinearizable(found) => &found.contradict,
            Violation::GaveUp(_) => &[],
        }
    }

    pub fn gave_up(&self) -> bool {
        matches!(self, Violation::GaveUp(_))
    }

    /// What `Display` draws, as a picture.
    pub fn svg(&self) -> String {
        match self {
            Violation::NotLinearizable(found) => drawing::svg(&format!("key {}", text(&found.key)), &found.rows),
            Violation::GaveUp(gave_up) => drawing::svg(&gave_up.to_string(), &[]),
        }
    }
}

impl NotLinearizable {
    /// `ordered`: how far the search came with all operations of `register`, which has no order.
    pub(super) fn new(register: &Register<'_>, ordered: usize) -> Self {
        let core = contradiction(&register.entries);
        let asked = ask_only(&register.entries, &core);
        let entries: Vec<Entry> = asked.iter().map(|(_, entry)| *entry).collect();
        let operation = |at: usize| register.operations[register.behind[asked[at].0]].clone();
        let (stuck, order) = match search::search(&entries, u64::MAX) {
            Verdict::Stuck { stuck, order, .. } => (operation(stuck), order.into_iter().map(operation).collect()),
            other => panic!("what contradicts itself has no order: {other:?}"),
        };
        let places: Vec<usize> = core.iter().map(|at| register.behind[*at]).collect();
        NotLinearizable {
            key: register.operations[0].key.clone(),
            operations: register.operations.len(),
            ordered,
            notes: notes(register, &places),
            rows: rows(register, &places),
            contradict: places.iter().map(|at| register.operations[*at].clone()).collect(),
            order,
            stuck,
        }
    }
}

impl GaveUp {
    pub(super) fn new(register: &Register<'_>, steps: u64) -> Self {
        GaveUp { key: register.operations[0].key.clone(), operations: register.operations.len(), steps }
    }
}

/// Entries that have no order whatever the others did, each of them needed for it. Of the others nothing is asked: their
/// reads are left out, and their writes may have happened at any time after they were called, or never. To ask less
/// never takes an order away, so that to leave entries out one after the other finds such a set.
fn contradiction(entries: &[Entry]) -> Vec<usize> {
    let mut steps_left = STEPS_MAX;
    let mut has_none = |core: &[usize]| {
        if steps_left == 0 {
            return false;
        }
        let asked: Vec<Entry> = ask_only(entries, core).into_iter().map(|(_, entry)| entry).collect();
        let verdict = search::search(&asked, steps_left);
        let (Verdict::Stuck { steps, .. } | Verdict::Linearizable { steps } | Verdict::GaveUp { steps }) = verdict;
        // What is not asked is cheap, but not free.
        steps_left = steps_left.saturating_sub(steps + entries.len() as u64);
        matches!(verdict, Verdict::Stuck { .. })
    };
    let mut core: Vec<usize> = (0..entries.len()).filter(|at| entries[*at].returned.is_some()).collect();
    // As a rule it is within a short time: first find its end, then its beginning.
    core.sort_by_key(|at| entries[*at].returned);
    core.truncate(least(core.len(), |count| has_none(&core[..count])));
    core.sort_by_key(|at| entries[*at].invoked);
    let count = least(core.len(), |count| has_none(&core[core.len() - count..]));
    core.drain(..core.len() - count);
    let mut size = core.len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        while at < core.len() {
            let end = core.len().min(at + size);
            let without = [&core[..at], &core[end..]].concat();
            if has_none(&without) {
                core = without;
            } else {
                at = end;
            }
        }
        size /= 2;
    }
    core
}

/// The least count up to `all` that is enough; `all` is.
fn least(all: usize, mut is_enough: impl FnMut(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, all);
    while low < high {
        let middle = low.midpoint(high);
        if is_enough(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    high
}

/// `core` as it is, the others with nothing asked of them; each with its place.
fn ask_only(entries: &[Entry], core: &[usize]) -> Vec<(usize, Entry)> {
    let mut is_asked = vec![false; entries.len()];
    core.iter().for_each(|at| is_asked[*at] = true);
    let all = entries.iter().enumerate();
    all.filter_map(|(at, entry)| match entry.effect {
        _ if is_asked[at] => Some((at, *entry)),
        Effect::Read(_) => None,
        Effect::Write(_) => Some((at, Entry { returned: None, ..*entry })),
    })
    .collect()
}

/// What each value read by `places` has against it, whatever else happened.
fn notes(register: &Register<'_>, places: &[usize]) -> Vec<String> {
    let mut notes = Vec::new();
    for read in places.iter().map(|at| register.operations[*at]) {
        let Outcome::Done { at, read: Some(value) } = &read.outcome else {
            continue;
        };
        let writes = register.operations.iter().filter(|write| matches!(&write.call, Call::Put(put) if put == value));
        let (refused, writes): (Vec<&Operation>, Vec<_>) =
            writes.copied().partition(|write| write.outcome == Outcome::NotApplied);
        let (client, value) = (read.client, text(value));
        match (writes.iter().map(|write| write.invoked).min(), refused.first()) {
            (None, None) => notes.push(format!("client {client} read {value}, which nobody wrote")),
            (None, Some(write)) => notes.push(format!(
                "client {client} read {value}, which only a write left behind that was answered as not applied: client \
                 {}, called at {}",
                write.client, write.invoked
            )),
            (Some(first), _) if first > *at => {
                notes.push(format!("client {client} read {value} before anybody had called a write of it"));
            }
            (Some(_), _) => {}
        }
    }
    notes
}

/// `places`, the writes of what they read, and some of what went on meanwhile.
fn rows(register: &Register<'_>, places: &[usize]) -> Vec<Row> {
    let operations = &register.operations;
    let read = |operation: &Operation| match &operation.outcome {
        Outcome::Done { read: Some(value), .. } => Some(value.clone()),
        Outcome::Done { .. } | Outcome::NotApplied | Outcome::Unknown => None,
    };
    let seen: Vec<_> = places.iter().filter_map(|at| read(operations[*at])).collect();
    let wrote = |operation: &Operation| matches!(&operation.call, Call::Put(value) if seen.contains(value));
    let from = places.iter().map(|at| operations[*at].invoked).min().unwrap_or(0);
    let until = places.iter().filter_map(|at| answered(operations[*at])).max().unwrap_or(u64::MAX);
    let meanwhile = |operation: &Operation| {
        operation.invoked <= until && answered(operation).is_none_or(|answered| from <= answered)
    };
    let others = (0..operations.len()).filter(|at| !places.contains(at));
    let (writers, others): (Vec<_>, Vec<_>) = others.partition(|at| wrote(operations[*at]));
    // The latest: they are next to what cannot be ordered.
    let around = others.into_iter().rev().filter(|at| meanwhile(operations[*at]));
    let mut drawn: Vec<_> = writers.into_iter().chain(around).take(AROUND_MAX).chain(places.iter().copied()).collect();
    drawn.sort_unstable();
    let row = |at: usize| Row {
        is_marked: places.contains(&at),
        label: label(operations[at]),
        from: operations[at].invoked,
        until: answered(operations[at]),
        is_refused: operations[at].outcome == Outcome::NotApplied,
    };
    drawn.into_iter().map(row).collect()
}

fn answered(operation: &Operation) -> Option<u64> {
    match operation.outcome {
        Outcome::Done { at, .. } => Some(at),
        Outcome::NotApplied | Outcome::Unknown => None,
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::NotLinearizable(found) => found.fmt(to),
            Violation::GaveUp(gave_up) => gave_up.fmt(to),
        }
    }
}

impl std::error::Error for Violation {}

impl fmt::Display for NotLinearizable {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NotLinearizable { operations, ordered, .. } = self;
        writeln!(to, "key {}: not linearizable ({ordered} of {operations} operations were ordered)", text(&self.key))?;
        writeln!(to, "No order has all of these:")?;
        for operation in &self.contradict {
            writeln!(to, "  {}", line(operation))?;
        }
        for note in &self.notes {
            writeln!(to, "Note: {note}")?;
        }
        writeln!(to, "The longest order of them and the writes that they saw:")?;
        if self.order.len() > ORDER_MAX {
            writeln!(to, "  ({} before)", self.order.len() - ORDER_MAX)?;
        }
        for operation in &self.order[self.order.len().saturating_sub(ORDER_MAX)..] {
            writeln!(to, "  {}", line(operation))?;
        }
        writeln!(to, "and nowhere in it:\n  {}", line(&self.stuck))?;
        to.write_str(&drawing::text(&self.rows))
    }
}

impl fmt::Display for GaveUp {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GaveUp { key, operations, steps } = self;
        let key = text(key);
        write!(to, "key {key}: gave up, too hard: nothing is known of its {operations} operations after {steps} steps")
    }
}

fn line(operation: &Operation) -> String {
    let end = match &operation.outcome {
        Outcome::Done { at, .. } => at.to_string(),
        Outcome::NotApplied => "not applied".to_owned(),
        Outcome::Unknown => "unknown".to_owned(),
    };
    format!("{}  {}..{end}", label(operation), operation.invoked)
}

fn label(operation: &Operation) -> String {
    let call = match (&operation.call, &operation.outcome) {
        (Call::Put(value), _) => format!("put {}", text(value)),
        (Call::Delete, _) => "delete".to_owned(),
        (Call::Get, Outcome::Done { read: Some(value), .. }) => format!("get = {}", text(value)),
        (Call::Get, Outcome::Done { read: None, .. }) => "get = none".to_owned(),
        (Call::Get, Outcome::NotApplied | Outcome::Unknown) => "get".to_owned(),
    };
    format!("client {}  {call}", operation.client)
}

/// Bytes as a short word.
fn text(bytes: &[u8]) -> String {
    let mut word = bytes[..bytes.len().min(24)].escape_ascii().to_string();
    if bytes.len() > 24 {
        word += "...";
    }
    word
}
