//! What a client does next and when: the closed loop asks again as soon as it has its answer, the open loop at instants
//! that were fixed beforehand, however slow the server is. Pure: told what time it is, it reads no clock.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::keys::Keys;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
}

#[derive(Debug, Clone, Copy)]
pub struct Operation {
    pub kind: Kind,
    pub key: u64,
    /// When it was to be sent. Its latency counts from here: what a stalled server keeps from being sent has waited too.
    pub intended: Instant,
}

/// How the requests of an open loop are spaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrivals {
    /// As from many clients that know nothing of each other.
    Poisson,
    Fixed,
}

/// When a run begins, when what it does begins to count, and when it sends nothing more.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    pub begin: Instant,
    pub from: Instant,
    pub until: Instant,
}

/// What all clients of a run share.
#[derive(Debug, Clone)]
pub struct Load {
    pub keys: Keys,
    pub reads_percent: u8,
    /// Arrivals a second of all clients together; none for a closed loop.
    pub rate: Option<f64>,
    pub arrivals: Arrivals,
    pub budget: Arc<Budget>,
    /// What failed is to be done again, by who failed: each key of a preload must be written.
    pub insists: bool,
    pub seed: u64,
}

/// Operations that may still be sent, if they are numbered.
#[derive(Debug)]
pub struct Budget {
    limit: Option<u64>,
    taken: AtomicU64,
}

impl Budget {
    pub fn new(limit: Option<u64>) -> Self {
        Budget { limit, taken: AtomicU64::new(0) }
    }

    fn take(&self) -> bool {
        self.take_up_to(1) == 1
    }

    fn take_up_to(&self, wanted: u64) -> u64 {
        let Some(limit) = self.limit else { return wanted };
        // What is asked for in vain is counted too: far from overflowing.
        let taken = self.taken.fetch_add(wanted.min(limit), Ordering::Relaxed);
        wanted.min(limit.saturating_sub(taken))
    }

    /// Whether the run ends, or ended, by its number of operations.
    pub fn is_spent(&self) -> bool {
        self.limit.is_some_and(|limit| self.taken.load(Ordering::Relaxed) >= limit)
    }
}

/// Before what failed is tried again: a server that refuses at once is not to be flooded.
const AGAIN: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub enum Next {
    Send(Operation),
    Wait(Instant),
    Over,
}

/// One client of `clients`.
#[derive(Debug)]
pub struct Source {
    load: Load,
    window: Window,
    pace: Option<Pace>,
    random: fastrand::Rng,
    /// What failed and is to be done again, and when; no more than were in flight.
    again: VecDeque<(Instant, Operation)>,
    over: bool,
}

/// The schedule of an open loop.
#[derive(Debug)]
struct Pace {
    due: Instant,
    arrivals: Arrivals,
    interval: Duration,
}

impl Pace {
    /// At even distances from the next that is due, it included.
    fn arrivals_between(&self, from: Instant, until: Instant) -> u64 {
        let interval = self.interval.as_nanos().max(1);
        let in_warm_up = from.saturating_duration_since(self.due).as_nanos().div_ceil(interval);
        let all = until.saturating_duration_since(self.due).as_nanos().div_ceil(interval);
        u64::try_from(all.saturating_sub(in_warm_up)).unwrap_or(u64::MAX)
    }

    fn advance(&mut self, random: &mut fastrand::Rng) {
        self.due += match self.arrivals {
            Arrivals::Fixed => self.interval,
            Arrivals::Poisson => self.interval.mul_f64(-(1.0 - random.f64()).ln()),
        };
    }
}

impl Source {
    pub fn new(load: &Load, window: Window, client: usize, clients: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(load.seed.wrapping_mul(1_000_003).wrapping_add(client as u64));
        let pace = load.rate.map(|rate| {
            let interval = Duration::from_secs_f64(clients as f64 / rate);
            let mut pace = Pace { due: window.begin, arrivals: load.arrivals, interval };
            match load.arrivals {
                Arrivals::Poisson => pace.advance(&mut random),
                // The clients take turns.
                Arrivals::Fixed => pace.due += interval.mul_f64(client as f64 / clients as f64),
            }
            pace
        });
        Source { load: load.clone(), window, pace, random, again: VecDeque::new(), over: false }
    }

    pub fn next(&mut self, now: Instant) -> Next {
        // Nothing new before it: whatever ails the server, the others would fail of it too.
        match self.again.pop_front() {
            None => self.next_new(now),
            Some((due, operation)) if due > now => {
                self.again.push_front((due, operation));
                Next::Wait(due)
            }
            Some((_, operation)) => Next::Send(Operation { intended: now, ..operation }),
        }
    }

    /// Takes back what failed at `now`, if it is to be done again.
    pub fn put_back(&mut self, operation: Operation, now: Instant) {
        if self.load.insists {
            self.again.push_back((now + AGAIN, operation));
        }
    }

    fn next_new(&mut self, now: Instant) -> Next {
        let intended = self.pace.as_ref().map_or(now, |pace| pace.due);
        if self.over || intended >= self.window.until {
            return Next::Over;
        }
        if intended > now {
            return Next::Wait(intended);
        }
        if intended >= self.window.from && !self.load.budget.take() {
            self.over = true;
            return Next::Over;
        }
        if let Some(pace) = &mut self.pace {
            pace.advance(&mut self.random);
        }
        let read = self.random.u8(..100) < self.load.reads_percent;
        let kind = if read { Kind::Read } else { Kind::Write };
        Next::Send(Operation { kind, key: self.load.keys.draw(&mut self.random), intended })
    }

    /// What was due by the end of the run and has not been sent: it waited in vain, and must not be forgotten.
    ///
    /// Computed, for there may be more than can be counted: of Poisson's arrivals it is the mean.
    pub fn give_up(&mut self) -> u64 {
        let over = std::mem::replace(&mut self.over, true);
        match &self.pace {
            Some(pace) if !over => {
                self.load.budget.take_up_to(pace.arrivals_between(self.window.from, self.window.until))
            }
            Some(_) | None => 0,
        }
    }

    pub fn insists(&self) -> bool {
        self.load.insists
    }

    pub fn is_closed_loop(&self) -> bool {
        self.pace.is_none()
    }

    pub fn window(&self) -> &Window {
        &self.window
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::Distribution;
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn load(rate: Option<f64>, arrivals: Arrivals, limit: Option<u64>) -> Load {
        let keys = Keys::new(Distribution::Sequential, 1000);
        Load { keys, reads_percent: 25, rate, arrivals, budget: Arc::new(Budget::new(limit)), insists: false, seed: 1 }
    }

    /// One second of warm-up and ten that count.
    fn window() -> Window {
        let begin = Instant::now();
        Window { begin, from: begin + SECOND, until: begin + 11 * SECOND }
    }

    fn drain(source: &mut Source, now: Instant) -> Vec<Operation> {
        std::iter::from_fn(|| match source.next(now) {
            Next::Send(operation) => Some(operation),
            Next::Wait(_) | Next::Over => None,
        })
        .collect()
    }

    #[test]
    fn a_fixed_schedule_is_kept_whatever_the_time_is() {
        let (load, window) = (load(Some(100.0), Arrivals::Fixed, None), window());
        let mut sources: Vec<_> = (0..4).map(|client| Source::new(&load, window, client, 4)).collect();
        // Nobody asked for two seconds: all that was due meanwhile comes at once, each with its own instant.
        let mut sent: Vec<_> = sources.iter_mut().flat_map(|source| drain(source, window.begin + 2 * SECOND)).collect();
        sent.sort_by_key(|operation| operation.intended);
        assert_eq!(sent.len(), 201);
        for (place, operation) in sent.iter().enumerate() {
            assert_eq!(operation.intended, window.begin + Duration::from_millis(10) * place as u32);
        }
        assert!(matches!(sources[1].next(window.begin + 2 * SECOND), Next::Wait(_)));
        let unsent: u64 = sources.iter_mut().map(Source::give_up).sum();
        assert_eq!(unsent, 1100 - 201);
        assert!(matches!(sources[0].next(window.until), Next::Over));
    }

    #[test]
    fn what_was_never_sent_is_computed() {
        let week = Duration::from_secs(7 * 24 * 3600);
        let window = window();
        let window = Window { until: window.begin + week, ..window };
        let unsent = |arrivals, limit| Source::new(&load(Some(1e8), arrivals, limit), window, 0, 1).give_up();
        let due = (week - SECOND).as_nanos() as u64 / 10;
        assert_eq!(unsent(Arrivals::Fixed, None), due);
        assert!(unsent(Arrivals::Poisson, None).abs_diff(due) < due / 1000);
        assert_eq!(unsent(Arrivals::Fixed, Some(7)), 7, "no more than there were to be");
    }

    #[test]
    fn poisson_arrivals_have_their_rate_and_their_scatter() {
        let (load, window) = (load(Some(1000.0), Arrivals::Poisson, None), window());
        let mut source = Source::new(&load, window, 0, 1);
        let sent = drain(&mut source, window.until);
        assert!((10_600..11_400).contains(&sent.len()), "{}", sent.len());
        let gaps: Vec<f64> = sent.windows(2).map(|two| (two[1].intended - two[0].intended).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        let scatter = variance.sqrt() / mean;
        assert!((0.95..1.05).contains(&scatter), "an exponential gap scatters by its mean: {scatter}");
        let reads = sent.iter().filter(|operation| operation.kind == Kind::Read).count() as f64 / sent.len() as f64;
        assert!((0.23..0.27).contains(&reads), "{reads}");
    }

    #[test]
    fn the_closed_loop_asks_at_once_and_a_budget_leaves_the_warm_up_out() {
        let (load, window) = (load(None, Arrivals::Fixed, Some(5)), window());
        let mut source = Source::new(&load, window, 0, 1);
        for _ in 0..10 {
            assert!(matches!(source.next(window.begin), Next::Send(_)));
        }
        let sent = drain(&mut source, window.from);
        assert_eq!((sent.len(), sent[0].key, sent[0].intended), (5, 10, window.from));
        assert!(matches!(source.next(window.from), Next::Over));
        assert_eq!(source.give_up(), 0, "a closed loop owes nothing");
    }

    #[test]
    fn what_failed_comes_again_before_anything_new_if_it_must() {
        let (load, window) = (Load { insists: true, ..load(None, Arrivals::Fixed, Some(3)) }, window());
        let (mut source, now) = (Source::new(&load, window, 0, 1), window.from);
        let key = |source: &mut Source, now| match source.next(now) {
            Next::Send(operation) => Ok((operation.key, operation)),
            other => Err(format!("{other:?}")),
        };
        let (first, operation) = key(&mut source, now).unwrap();
        source.put_back(operation, now);
        assert!(matches!(source.next(now), Next::Wait(due) if due == now + AGAIN));
        assert_eq!(key(&mut source, now + AGAIN).unwrap().0, first);
        assert_eq!(drain(&mut source, now).iter().map(|operation| operation.key).collect::<Vec<_>>(), [1, 2]);
        source.put_back(operation, now);
        assert_eq!(key(&mut source, now + AGAIN).unwrap().0, first, "it takes nothing from the budget");
        assert!(matches!(source.next(now + AGAIN), Next::Over));
    }
}
