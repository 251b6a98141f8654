//! Looks for an order of one register's operations. Called by `History::check`, and by `violation` again and again with
//! fewer demands, to find those that contradict each other.
//!
//! It goes through calls and answers in the order of time and keeps all *configurations* that there can be: the value,
//! and which of the open operations have happened. An operation happens no sooner than it must: when it is answered, or
//! when one that is answered needs it before (just-in-time linearization: Lowe, "Testing for linearizability"; after
//! Wing and Gong). No configuration left: no order.
//!
//! Lowe's search would try open writes in every order. That writes are blind and reads change nothing allows for less,
//! each by moving operations within an order that is good without making it bad:
//!
//! - A read happens as soon as the value is there: nothing depends on when.
//! - Open writes that are not last are *buried*: overwritten at once. In which order is all the same.
//! - When all reads of a value have been called, its open writes are buried at the next occasion, with those reads: later
//!   it would serve nobody. While reads of it are still to come, its only write is not buried.
//! - Of open writes of one value, the one that is answered first happens first: they can change places.
//! - A value that nobody will read is as good as any other such value.
//! - Of two configurations that differ in writes with unknown outcome only, the one that used fewer is enough.
//!
//! Where each write has its own value, one configuration is left at each instant, and the search is a sweep. Choices
//! remain where many write the same, as Delete does: how many of them to bury. A compare-and-set or a transaction is not
//! blind: a key (or, for transactions, keys that hang together) with one in it needs Lowe's every order in `answer`, and
//! only the first of these rules.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// The value that is there at first.
pub const FIRST: u32 = 0;
/// Any value that no read is to see any more.
const UNREAD: u32 = u32::MAX;
/// The order with nothing in it.
const NOTHING: usize = usize::MAX;

/// An operation, as far as an order is concerned.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub invoked: u64,
    /// None: it happens at any time after it was called, or never. Such reads are not given to the search.
    pub returned: Option<u64>,
    pub effect: Effect,
}

/// Values are numbered from 0 without gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    Write(u32),
    Read(u32),
}

impl Effect {
    pub fn value(self) -> u32 {
        match self {
            Effect::Write(value) | Effect::Read(value) => value,
        }
    }
}

/// Entries are told by their places in the slice that was searched.
#[derive(Debug)]
pub enum Verdict {
    Linearizable {
        steps: u64,
    },
    /// When `stuck` was answered, it could have happened in no order; `order` is a longest one of all before.
    Stuck {
        stuck: usize,
        order: Vec<usize>,
        steps: u64,
    },
    GaveUp {
        steps: u64,
    },
}

pub fn search(entries: &[Entry], steps_max: u64) -> Verdict {
    let mut search = Search::new(entries, steps_max);
    let mut frontier = Frontier::default();
    frontier.insert(Configuration { value: FIRST, answered: Vec::new(), unknown: Vec::new(), order: NOTHING });
    for (_, event, at) in search.events() {
        frontier = match event {
            Event::Call => search.call(frontier, at),
            Event::Answer => {
                let mut next = Frontier::default();
                for configuration in frontier.configurations() {
                    search.answer(configuration, at, &mut next);
                }
                if search.steps > steps_max {
                    return Verdict::GaveUp { steps: search.steps };
                }
                if next.0.is_empty() {
                    return Verdict::Stuck { stuck: at, order: search.longest(&frontier), steps: search.steps };
                }
                search.open.retain(|open| *open != at);
                next
            }
            Event::Forget => search.forget(frontier, at),
        };
    }
    Verdict::Linearizable { steps: search.steps }
}

/// At one time calls come first: the clock may be too coarse to tell that an answer was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Call,
    Answer,
    /// A write with unknown outcome that nobody can see any more.
    Forget,
}

/// One way how things may stand.
#[derive(Debug, Clone)]
struct Configuration {
    value: u32,
    /// What has happened, but is not answered yet; sorted.
    answered: Vec<usize>,
    /// Writes with unknown outcome that have happened; sorted.
    unknown: Vec<usize>,
    /// In `Search::orders`.
    order: usize,
}

/// By value and what has happened: the sets of unknown writes that were used, none within another.
#[derive(Debug, Default)]
struct Frontier(BTreeMap<(u32, Vec<usize>), Vec<Used>>);

/// What tells apart configurations with the same value and the same answers to come.
#[derive(Debug)]
struct Used {
    unknown: Vec<usize>,
    order: usize,
}

impl Frontier {
    fn insert(&mut self, new: Configuration) {
        let within = |a: &[usize], b: &[usize]| a.iter().all(|one| b.binary_search(one).is_ok());
        let used = self.0.entry((new.value, new.answered)).or_default();
        if !used.iter().any(|old| within(&old.unknown, &new.unknown)) {
            used.retain(|old| !within(&new.unknown, &old.unknown));
            used.push(Used { unknown: new.unknown, order: new.order });
        }
    }

    fn configurations(&self) -> impl Iterator<Item = Configuration> {
        self.0.iter().flat_map(|((value, answered), used)| {
            used.iter().map(|Used { unknown, order }| Configuration {
                value: *value,
                answered: answered.clone(),
                unknown: unknown.clone(),
                order: *order,
            })
        })
    }
}

/// What one value's open operations, in one configuration, have not done yet.
#[derive(Debug, Default)]
struct Waiting {
    /// Writes that will be answered, in the order of their answers; behind them, those that will not.
    writes: Vec<usize>,
    answered: usize,
    is_read: bool,
}

struct Search<'a> {
    entries: &'a [Entry],
    /// Called, not answered yet nor forgotten.
    open: Vec<usize>,
    /// Of each value: how many reads, and how many writes, are not called yet.
    reads_to_come: Vec<usize>,
    writes_to_come: Vec<usize>,
    /// Each order as its last entry and the order before it; with their number.
    orders: Vec<(usize, usize, usize)>,
    steps: u64,
    /// Past it nothing more is tried: time and memory go with the steps.
    steps_max: u64,
}

impl<'a> Search<'a> {
    fn new(entries: &'a [Entry], steps_max: u64) -> Self {
        let values = entries.iter().map(|entry| entry.effect.value()).max().map_or(0, |value| value as usize + 1);
        let (reads_to_come, writes_to_come) = (vec![0; values], vec![0; values]);
        Search { entries, open: Vec::new(), reads_to_come, writes_to_come, orders: Vec::new(), steps: 0, steps_max }
    }

    /// All events in order of time; counts what is to come.
    fn events(&mut self) -> Vec<(u64, Event, usize)> {
        let mut last_read = vec![None; self.reads_to_come.len()];
        for entry in self.entries {
            if let Effect::Read(value) = entry.effect {
                last_read[value as usize] = last_read[value as usize].max(entry.returned);
            }
        }
        let mut events = Vec::with_capacity(self.entries.len() * 2);
        for (at, entry) in self.entries.iter().enumerate() {
            let value = entry.effect.value() as usize;
            match (entry.returned, last_read[value]) {
                (Some(returned), _) => events.push((returned, Event::Answer, at)),
                // It may serve reads until the last of them is answered.
                (None, Some(until)) if entry.invoked <= until => events.push((until, Event::Forget, at)),
                // No read can have seen it: an order with it is as good without it, for a write that does not look
                // helps nobody else. So for Delete, whose value is absence: it stays where an absence was read later.
                // (A compare-and-set that another one may have seen would have to stay, too.)
                (None, _) => continue,
            }
            events.push((entry.invoked, Event::Call, at));
            match entry.effect {
                Effect::Read(_) => self.reads_to_come[value] += 1,
                Effect::Write(_) => self.writes_to_come[value] += 1,
            }
        }
        events.sort_unstable();
        events
    }

    fn call(&mut self, frontier: Frontier, at: usize) -> Frontier {
        self.open.push(at);
        let value = match self.entries[at].effect {
            Effect::Write(value) => {
                self.writes_to_come[value as usize] -= 1;
                return frontier;
            }
            Effect::Read(value) => value,
        };
        self.reads_to_come[value as usize] -= 1;
        let mut next = Frontier::default();
        for mut configuration in frontier.configurations() {
            self.steps += 1;
            if configuration.value == value {
                self.happen(&mut configuration, at);
                self.set(&mut configuration, value);
            }
            next.insert(configuration);
        }
        next
    }

    /// All that may have happened until `at` is answered, if it did not happen already: open writes that are buried, a
    /// last write, and the reads of each.
    fn answer(&mut self, configuration: Configuration, at: usize, next: &mut Frontier) {
        self.steps += 1;
        let mut reached = vec![configuration];
        if reached[0].answered.binary_search(&at).is_err() {
            let mut waiting = self.waiting(&reached[0]);
            let value = self.entries[at].effect.value();
            let Some(last) = waiting.get_mut(&value).and_then(Waiting::take_first) else {
                return;
            };
            for (buried, waiting) in &waiting {
                let counts = self.counts(*buried, waiting, *buried == value);
                let mut more = Vec::new();
                for configuration in reached {
                    for count in counts.clone() {
                        if self.steps > self.steps_max {
                            return;
                        }
                        let mut configuration = configuration.clone();
                        for write in &waiting.writes[..count] {
                            self.write(&mut configuration, *write);
                        }
                        more.push(configuration);
                    }
                }
                reached = more;
            }
            for configuration in &mut reached {
                self.write(configuration, last);
            }
        }
        for mut configuration in reached {
            configuration.answered.retain(|answered| *answered != at);
            next.insert(configuration);
        }
    }

    /// How many of a value's open writes may be buried. `is_last`: the value is the one that is there afterwards.
    fn counts(&self, value: u32, waiting: &Waiting, is_last: bool) -> RangeInclusive<usize> {
        // A write that need not happen does so only for a read.
        let for_a_read = usize::from(waiting.is_read && !is_last && !waiting.writes.is_empty());
        let most = waiting.answered.max(for_a_read);
        if self.reads_to_come[value as usize] == 0 {
            return most..=most;
        }
        let leaves_none = most == waiting.writes.len() && self.writes_to_come[value as usize] == 0;
        0..=if leaves_none && !is_last { most.saturating_sub(1) } else { most }
    }

    fn waiting(&self, configuration: &Configuration) -> BTreeMap<u32, Waiting> {
        let mut waiting: BTreeMap<u32, Waiting> = BTreeMap::new();
        for at in &self.open {
            let entry = self.entries[*at];
            let happened = if entry.returned.is_some() { &configuration.answered } else { &configuration.unknown };
            if happened.binary_search(at).is_ok() {
                continue;
            }
            let waiting = waiting.entry(entry.effect.value()).or_default();
            match entry.effect {
                Effect::Read(_) => waiting.is_read = true,
                Effect::Write(_) => {
                    waiting.writes.push(*at);
                    waiting.answered += usize::from(entry.returned.is_some());
                }
            }
        }
        for waiting in waiting.values_mut() {
            waiting.writes.sort_by_key(|at| (self.entries[*at].returned.unwrap_or(u64::MAX), *at));
        }
        waiting
    }

    /// A write happens, and the open reads of what it wrote.
    fn write(&mut self, configuration: &mut Configuration, at: usize) {
        self.happen(configuration, at);
        let value = self.entries[at].effect.value();
        for next in 0..self.open.len() {
            let open = self.open[next];
            let reads = self.entries[open].effect == Effect::Read(value);
            if reads && configuration.answered.binary_search(&open).is_err() {
                self.happen(configuration, open);
            }
        }
        self.set(configuration, value);
    }

    fn set(&self, configuration: &mut Configuration, value: u32) {
        configuration.value = if self.reads_to_come[value as usize] == 0 { UNREAD } else { value };
    }

    fn happen(&mut self, configuration: &mut Configuration, at: usize) {
        self.steps += 1;
        let answered = self.entries[at].returned.is_some();
        let set = if answered { &mut configuration.answered } else { &mut configuration.unknown };
        let place = set.binary_search(&at).expect_err("an operation happens once");
        set.insert(place, at);
        let count = self.orders.get(configuration.order).map_or(0, |order| order.2) + 1;
        self.orders.push((at, configuration.order, count));
        configuration.order = self.orders.len() - 1;
    }

    fn forget(&mut self, frontier: Frontier, at: usize) -> Frontier {
        self.open.retain(|open| *open != at);
        let mut next = Frontier::default();
        for mut configuration in frontier.configurations() {
            configuration.unknown.retain(|unknown| *unknown != at);
            next.insert(configuration);
        }
        next
    }

    fn longest(&self, frontier: &Frontier) -> Vec<usize> {
        let orders = frontier.configurations().map(|configuration| configuration.order);
        let longest = orders.max_by_key(|order| self.orders.get(*order).map_or(0, |order| order.2));
        let mut next = longest.expect("a frontier is not empty");
        let mut order = Vec::new();
        while let Some((at, before, _)) = self.orders.get(next) {
            order.push(*at);
            next = *before;
        }
        order.reverse();
        order
    }
}

impl Waiting {
    fn take_first(&mut self) -> Option<usize> {
        if self.writes.is_empty() {
            return None;
        }
        self.answered = self.answered.saturating_sub(1);
        Some(self.writes.remove(0))
    }
}
