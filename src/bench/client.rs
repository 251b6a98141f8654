//! What every connection of a thread has at hand, whatever it speaks: where to connect, what to send, where to count.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::Protocol;
use super::alarm::Alarms;
use super::source::{Operation, Source};
use super::tally::{Answered, Failure, Tally};
use super::template::Templates;

/// Between dials to a server that broke a connection, or took none: longer each time, so that a load of many
/// connections does not keep a server from starting.
#[derive(Debug)]
pub struct Pause(Duration);

impl Pause {
    const MIN: Duration = Duration::from_millis(10);
    const MAX: Duration = Duration::from_millis(200);

    /// To be made anew when a connection was had.
    pub fn new() -> Self {
        Pause(Self::MIN)
    }

    pub fn next(&mut self) -> Duration {
        let longer = (self.0 * 2).min(Self::MAX);
        std::mem::replace(&mut self.0, longer)
    }
}

#[derive(Clone)]
pub struct Client {
    pub protocol: Protocol,
    /// `HOST:PORT`.
    pub address: String,
    pub templates: Arc<Templates>,
    pub pipeline: usize,
    pub timeout: Duration,
    /// The run ends by its number of operations alone.
    pub endless: bool,
    pub tally: Rc<RefCell<Tally>>,
    pub alarms: Alarms,
}

impl Client {
    pub async fn connect(&self) -> Result<TcpStream, Failure> {
        let stream = match tokio::time::timeout(self.timeout, TcpStream::connect(&self.address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(Failure::from_connect(&error)),
            Err(_) => return Err(Failure::Unreachable),
        };
        // What is written is whole requests: nothing is won by waiting for more.
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Counts how an operation ended, and has it done again if it must be and can be.
    pub fn settle(
        &self,
        source: &mut Source,
        operation: Operation,
        sent: Instant,
        now: Instant,
        outcome: Result<Answered, Failure>,
    ) {
        self.tally.borrow_mut().record(&operation, sent, now, outcome);
        if outcome.is_err_and(|failure| !failure.is_final()) {
            source.put_back(operation, now);
        }
    }

    /// A run is over for good a while after its end, answered or not; one that must not fail, when all else does.
    pub fn give_up_at(&self, source: &Source) -> Instant {
        if source.insists() { self.patient_until(source) } else { source.window().until + self.timeout }
    }

    /// For how long after its last success a server may be gone.
    fn patient_until(&self, source: &Source) -> Instant {
        self.tally.borrow().last_answer.unwrap_or(source.window().from) + self.timeout
    }

    /// Whether the run's end makes another connection useless for `source`, after one broke by `failure`. What breaks
    /// between requests took nothing with it, and does not count: whoever asks next finds out whether that matters.
    pub fn is_hopeless(&self, source: &mut Source, failure: Failure) -> bool {
        let now = Instant::now();
        if matches!(failure, Failure::Unreachable | Failure::Exhausted) {
            self.tally.borrow_mut().fail(failure, 1, now);
        }
        let end = if self.endless {
            // Else it would wait for ever for a server that is gone.
            self.patient_until(source)
        } else if source.is_closed_loop() {
            source.window().until
        } else {
            self.give_up_at(source)
        };
        if now >= end && !self.endless {
            self.tally.borrow_mut().fail(Failure::Unsent, source.give_up(), now);
        }
        now >= end
    }
}

/// A client and its sources, as tests want them: writes in a closed loop for an hour.
#[cfg(test)]
pub mod fixture {
    use super::super::keys::{Distribution, Keys};
    use super::super::source::{Arrivals, Budget, Load, Window};
    use super::super::tally::Progress;
    use super::super::{Consistency, Protocol};
    use super::*;

    /// Must be called on a `LocalSet`.
    pub fn client(protocol: Protocol, address: &str, pipeline: usize, timeout: Duration) -> Client {
        let value = [b'v'; 1 << 16];
        let progress = Arc::new(Progress::default());
        Client {
            protocol,
            address: address.to_owned(),
            templates: Arc::new(Templates::new(protocol, Consistency::Linearizable, address, &value)),
            pipeline,
            timeout,
            endless: false,
            tally: Rc::new(RefCell::new(Tally::new(window(), progress))),
            alarms: Alarms::start().unwrap(),
        }
    }

    /// Of as many clients, that make `limit` operations together.
    pub fn sources(clients: usize, limit: Option<u64>) -> Vec<Source> {
        let load = Load {
            keys: Keys::new(Distribution::Uniform, 9),
            reads_percent: 0,
            rate: None,
            arrivals: Arrivals::Fixed,
            budget: Arc::new(Budget::new(limit)),
            insists: false,
            seed: 1,
        };
        let window = window();
        (0..clients).map(|client| Source::new(&load, window, client, clients)).collect()
    }

    fn window() -> Window {
        let begin = Instant::now();
        Window { begin, from: begin, until: begin + Duration::from_secs(3600) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_dials_grow_up_to_a_bound() {
        let mut pause = Pause::new();
        let pauses: Vec<_> = (0..7).map(|_| pause.next().as_millis()).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 200, 200]);
    }
}
