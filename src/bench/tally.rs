//! What came of a thread's operations: latencies by kind, failures by kind, answers by second. `report` turns it into
//! figures.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::io::Errno;

use super::source::{Kind, Operation, Window};

/// What a server's answer meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    Written,
    Found,
    /// A read of a key that is not there: a success of its own kind.
    Missing,
}

/// Why an operation did not succeed, or a connection could not be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    Status(u16),
    Grpc(u32),
    /// The server took no connection.
    Unreachable,
    /// This machine gave no descriptor, port or memory for a connection: the server was not asked.
    Exhausted,
    /// The connection broke with the operation under way.
    Broken,
    /// The server gave up this operation alone, and said so.
    Reset,
    /// No answer in time.
    TimedOut,
    /// What came is not what the protocol says.
    Malformed,
    /// Due in an open loop, and not sent by the end of the run.
    Unsent,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::local(&error).unwrap_or(Failure::Broken)
    }
}

impl Failure {
    /// Why there is no connection.
    pub fn from_connect(error: &io::Error) -> Self {
        Failure::local(error).unwrap_or(Failure::Unreachable)
    }

    /// Whether the same request would fail again: it is at fault itself.
    pub fn is_final(self) -> bool {
        match self {
            Failure::Status(408 | 429) => false,
            Failure::Status(status) => (400..500).contains(&status),
            // INVALID_ARGUMENT, UNIMPLEMENTED, UNAUTHENTICATED.
            Failure::Grpc(code) => matches!(code, 3 | 12 | 16),
            Failure::Unreachable
            | Failure::Exhausted
            | Failure::Broken
            | Failure::Reset
            | Failure::TimedOut
            | Failure::Malformed
            | Failure::Unsent => false,
        }
    }

    /// Whether it is this side's limit that was met.
    fn local(error: &io::Error) -> Option<Self> {
        let local = [Errno::MFILE, Errno::NFILE, Errno::ADDRNOTAVAIL, Errno::NOBUFS, Errno::NOMEM];
        Errno::from_io_error(error).is_some_and(|errno| local.contains(&errno)).then_some(Failure::Exhausted)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Status(status) => write!(f, "status {status}"),
            Failure::Grpc(code) => write!(f, "grpc-status {code}"),
            Failure::Unreachable => f.write_str("no connection"),
            Failure::Exhausted => f.write_str("out of open files, ports or memory at the generator"),
            Failure::Broken => f.write_str("connection broke"),
            Failure::Reset => f.write_str("call reset"),
            Failure::TimedOut => f.write_str("timed out"),
            Failure::Malformed => f.write_str("malformed answer"),
            Failure::Unsent => f.write_str("never sent"),
        }
    }
}

/// Read by whoever shows the progress while the run goes on.
#[derive(Debug, Default)]
pub struct Progress {
    pub done: AtomicU64,
    pub failed: AtomicU64,
}

#[derive(Debug)]
pub struct Tally {
    /// Nanoseconds.
    pub writes: Histogram<u64>,
    pub reads: Histogram<u64>,
    /// How far behind its intended instant a request was sent: the queue at the client of an open loop.
    pub lateness: Histogram<u64>,
    pub missing: u64,
    pub failures: BTreeMap<Failure, u64>,
    /// Successes by the second of their answer.
    pub seconds: Vec<u64>,
    /// The last success.
    pub last_answer: Option<Instant>,
    /// The last success or failure: what failed took its time too.
    pub last_outcome: Option<Instant>,
    window: Window,
    progress: Arc<Progress>,
}

impl Tally {
    pub fn new(window: Window, progress: Arc<Progress>) -> Self {
        Tally {
            writes: histogram(),
            reads: histogram(),
            lateness: histogram(),
            missing: 0,
            failures: BTreeMap::new(),
            seconds: Vec::new(),
            last_answer: None,
            last_outcome: None,
            window,
            progress,
        }
    }

    /// Counts an operation by the instant at which it was to be sent: those of the warm-up are left out.
    pub fn record(
        &mut self,
        operation: &Operation,
        sent: Instant,
        answered: Instant,
        outcome: Result<Answered, Failure>,
    ) {
        let counts = operation.intended >= self.window.from;
        match outcome {
            Ok(answer) => {
                self.progress.done.fetch_add(1, Ordering::Relaxed);
                if counts {
                    self.succeed(operation, sent, answered, answer);
                }
            }
            Err(failure) => {
                self.progress.failed.fetch_add(1, Ordering::Relaxed);
                if counts {
                    self.count_failures(failure, 1, answered);
                }
            }
        }
    }

    fn succeed(&mut self, operation: &Operation, sent: Instant, answered: Instant, answer: Answered) {
        let latencies = match operation.kind {
            Kind::Read => &mut self.reads,
            Kind::Write => &mut self.writes,
        };
        latencies.saturating_record(nanos(answered - operation.intended));
        self.lateness.saturating_record(nanos(sent - operation.intended));
        self.missing += u64::from(answer == Answered::Missing);
        self.last_answer = self.last_answer.max(Some(answered));
        self.last_outcome = self.last_outcome.max(Some(answered));
        let second = (answered - self.window.from).as_secs() as usize;
        if self.seconds.len() <= second {
            self.seconds.resize(second + 1, 0);
        }
        self.seconds[second] += 1;
    }

    /// Counts what failed at `at` without an operation that was sent, unless that was in the warm-up.
    pub fn fail(&mut self, failure: Failure, count: u64, at: Instant) {
        self.progress.failed.fetch_add(count, Ordering::Relaxed);
        if count > 0 && at >= self.window.from {
            self.count_failures(failure, count, at);
        }
    }

    fn count_failures(&mut self, failure: Failure, count: u64, at: Instant) {
        *self.failures.entry(failure).or_default() += count;
        self.last_outcome = self.last_outcome.max(Some(at));
    }

    /// Takes in what another thread of the same run counted.
    pub fn merge(&mut self, other: &Tally) {
        for (own, others) in
            [(&mut self.writes, &other.writes), (&mut self.reads, &other.reads), (&mut self.lateness, &other.lateness)]
        {
            own.add(others).expect("histograms of the same bounds");
        }
        self.missing += other.missing;
        for (failure, count) in &other.failures {
            *self.failures.entry(*failure).or_default() += count;
        }
        self.seconds.resize(self.seconds.len().max(other.seconds.len()), 0);
        for (own, others) in self.seconds.iter_mut().zip(&other.seconds) {
            *own += others;
        }
        self.last_answer = self.last_answer.max(other.last_answer);
        self.last_outcome = self.last_outcome.max(other.last_outcome);
    }
}

/// 100 ns to an hour, three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(100, 3_600_000_000_000, 3).expect("bounds that a histogram can have")
}

fn nanos(duration: Duration) -> u64 {
    duration.as_nanos().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_the_generator_is_not_laid_on_the_server() {
        let error = |errno: Errno| io::Error::from_raw_os_error(errno.raw_os_error());
        assert_eq!(Failure::from_connect(&error(Errno::MFILE)), Failure::Exhausted);
        assert_eq!(Failure::from(error(Errno::ADDRNOTAVAIL)), Failure::Exhausted);
        assert_eq!(Failure::from_connect(&error(Errno::CONNREFUSED)), Failure::Unreachable);
        assert_eq!(Failure::from(error(Errno::CONNRESET)), Failure::Broken);
    }

    #[test]
    fn the_warm_up_is_left_out_and_threads_add_up() {
        let begin = Instant::now();
        let after = |millis| begin + Duration::from_millis(millis);
        let window = Window { begin, from: after(1000), until: after(9000) };
        let progress = Arc::new(Progress::default());
        let mut tally = Tally::new(window, progress.clone());
        let write = |intended| Operation { kind: Kind::Write, key: 0, intended };
        let read = |intended| Operation { kind: Kind::Read, ..write(intended) };
        tally.record(&write(after(900)), after(900), after(1100), Ok(Answered::Written));
        tally.record(&write(after(900)), after(900), after(1100), Err(Failure::Status(503)));
        // Due 200 ms before it could be sent: it waited 300 ms.
        tally.record(&write(after(1000)), after(1200), after(1300), Ok(Answered::Written));
        let mut other = Tally::new(window, progress.clone());
        other.record(&read(after(2900)), after(2900), after(3100), Ok(Answered::Missing));
        other.record(&read(after(2900)), after(2900), after(3100), Err(Failure::Status(503)));
        other.fail(Failure::Unreachable, 5, after(999));
        other.fail(Failure::Unreachable, 2, after(3200));
        tally.merge(&other);

        assert_eq!((tally.writes.len(), tally.reads.len(), tally.missing), (1, 1, 1));
        assert!(tally.writes.equivalent(tally.writes.max(), 300_000_000), "{}", tally.writes.max());
        assert!(tally.lateness.equivalent(tally.lateness.max(), 200_000_000), "{}", tally.lateness.max());
        assert_eq!(tally.failures, BTreeMap::from([(Failure::Status(503), 1), (Failure::Unreachable, 2)]));
        assert_eq!((tally.seconds, tally.last_answer), (vec![1, 0, 1], Some(after(3100))));
        assert_eq!(tally.last_outcome, Some(after(3200)), "what failed last took its time");
        assert_eq!((progress.done.load(Ordering::Relaxed), progress.failed.load(Ordering::Relaxed)), (3, 9));
    }
}
