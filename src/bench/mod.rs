//! The load generator, `raftkv bench`: what a run is, and how it goes. Every connection is a task on one of few threads;
//! they connect, write every key if asked to, warm up, and then count. Knows servers by their protocol only: it measures
//! etcd, or a bare echo, by a load of the same shape.
//!
//! `source` says what is due and when, `http1` and `etcd` send it, `tally` counts, `report` and `plot` tell.

mod alarm;
mod answer;
mod client;
mod etcd;
mod http1;
mod keys;
mod output;
mod plot;
mod report;
mod source;
mod tally;
mod template;

use std::cell::RefCell;
use std::io::{self, IsTerminal, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use tokio::task::{JoinSet, LocalSet};
use tracing::debug;

use self::alarm::Alarms;
use self::client::Client;
pub use self::keys::Distribution;
use self::keys::Keys;
pub use self::output::{Format, Output, main};
pub use self::report::Report;
pub use self::source::Arrivals;
use self::source::{Budget, Load, Source, Window};
use self::tally::{Failure, Progress, Tally};
pub use self::template::KEYS_MAX;
use self::template::Templates;

/// Longer than any run: for one that ends by its number of operations.
const ENDLESS: Duration = Duration::from_secs(30 * 24 * 3600);
/// Between lines of progress.
const PROGRESS: Duration = Duration::from_secs(1);

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// raftkv's.
    Http,
    /// etcd's, over gRPC.
    Etcd,
    /// etcd's gateway, which turns HTTP and JSON into gRPC.
    EtcdJson,
    /// Any server that answers raftkv's requests with 2xx: a floor.
    Plain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    Linearizable,
    Stale,
}

/// A run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// `HOST:PORT` of each server; connections are dealt to them in turn.
    pub endpoints: Vec<String>,
    pub protocol: Protocol,
    pub connections: usize,
    /// Requests in flight on each connection, at most.
    pub pipeline: usize,
    pub threads: usize,
    /// Arrivals a second, all connections together; none for a closed loop.
    pub rate: Option<f64>,
    pub arrivals: Arrivals,
    pub reads_percent: u8,
    pub consistency: Consistency,
    pub value_bytes: usize,
    pub keys: u64,
    pub distribution: Distribution,
    /// None if the number of operations alone ends it.
    pub duration: Option<Duration>,
    pub warm_up: Duration,
    /// Operations behind the warm-up.
    pub stop_after: Option<u64>,
    pub preload: bool,
    /// Time that an answer may take.
    pub timeout: Duration,
    pub seed: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{endpoint}: cannot connect: {why}")]
    Unreachable { endpoint: String, why: String },
    #[error("--preload: {written} of {keys} keys written; {failures}")]
    Preload { written: u64, keys: u64, failures: String },
    #[error("start a thread: {0}")]
    Start(#[from] io::Error),
}

/// Runs the plan, its preload first. Tells on stderr how it goes, if that is a terminal.
pub fn run(plan: &Plan) -> Result<Report, Error> {
    raise_open_files();
    // A process with hundreds of connections refused would tell it hundreds of times.
    for endpoint in &plan.endpoints {
        reach(endpoint).map_err(|error| Error::Unreachable { endpoint: endpoint.clone(), why: error.to_string() })?;
    }
    if plan.preload {
        let preload = Plan {
            rate: None,
            reads_percent: 0,
            distribution: Distribution::Sequential,
            duration: None,
            warm_up: Duration::ZERO,
            stop_after: Some(plan.keys),
            preload: false,
            ..plan.clone()
        };
        let (tally, _) = attempt(&preload, Phase::Preload)?;
        let (written, keys) = (tally.writes.len(), plan.keys);
        if written < keys {
            return Err(Error::Preload { written, keys, failures: report::failures_line(&tally.failures) });
        }
    }
    let (tally, course) = attempt(plan, Phase::Load)?;
    Ok(Report::new(plan, tally, &course))
}

/// Each connection is an open file, and the soft limit of a shell is few.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        // Whoever runs into it is told by `Failure::Exhausted`.
        debug!(%error, "the limit of open files stays as it is");
    }
}

fn reach(endpoint: &str) -> io::Result<()> {
    let mut last = io::Error::other("the name has no address");
    for address in endpoint.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Writes every key, some of them more than once if need be.
    Preload,
    Load,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Preload => "preload",
            Phase::Load => "load",
        }
    }
}

/// How a run went, beside what it counted.
struct Course {
    window: Window,
    /// Seconds of CPU that the generator took from the start of its warm-up.
    cpu_seconds: f64,
    /// Its number of operations ended it, perhaps before its time was over.
    ended_by_number: bool,
}

/// One phase: threads connect, begin together, and end by themselves.
fn attempt(plan: &Plan, phase: Phase) -> Result<(Tally, Course), Error> {
    let load = Load {
        keys: Keys::new(plan.distribution, plan.keys),
        reads_percent: plan.reads_percent,
        rate: plan.rate,
        arrivals: plan.arrivals,
        budget: Arc::new(Budget::new(plan.stop_after)),
        insists: phase == Phase::Preload,
        seed: plan.seed,
    };
    // A value may be large, and the connections many: one copy for all that send it to the same server.
    let value = value(plan.value_bytes, plan.seed);
    let templates = |host: &String| Arc::new(Templates::new(plan.protocol, plan.consistency, host, &value));
    let templates: Vec<_> = plan.endpoints.iter().map(templates).collect();
    let threads = plan.threads.min(plan.connections);
    let progress = Arc::new(Progress::default());
    let (ready_sender, ready) = mpsc::channel();
    let (mut starts, mut handles) = (Vec::new(), Vec::new());
    for thread in 0..threads {
        let (start_sender, start) = mpsc::channel();
        let (plan, load, progress, ready) = (plan.clone(), load.clone(), progress.clone(), ready_sender.clone());
        let templates = templates.clone();
        starts.push(start_sender);
        let name = format!("bench-{thread}");
        handles.push(thread::Builder::new().name(name).spawn(move || {
            let part = Part { plan: &plan, load: &load, templates: &templates, thread, threads };
            part.run(&progress, &ready, &start)
        })?);
    }
    drop(ready_sender);
    for _ in 0..threads {
        // A thread that ends without a word has panicked, and the process with it.
        ready.recv().expect("each thread says how it went")?;
    }
    let begin = Instant::now();
    let from = begin + plan.warm_up;
    let window = Window { begin, from, until: from + plan.duration.unwrap_or(ENDLESS) };
    let cpu_before = cpu_seconds();
    for start in starts {
        start.send(window).expect("each thread waits for its start");
    }
    watch(&ready, &progress, phase, window);
    let mut total = Tally::new(window, progress);
    for handle in handles {
        total.merge(&handle.join().expect("a thread that panics ends the process"));
    }
    let course = Course { window, cpu_seconds: cpu_seconds() - cpu_before, ended_by_number: load.budget.is_spent() };
    Ok((total, course))
}

/// Shows the progress until every thread has let go of its end of `ready`.
fn watch(ready: &mpsc::Receiver<Result<(), Error>>, progress: &Progress, phase: Phase, window: Window) {
    let (mut before, mut last) = (0, Instant::now());
    loop {
        match ready.recv_timeout(PROGRESS) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(_) | Err(RecvTimeoutError::Disconnected) => return,
        }
        if !io::stderr().is_terminal() {
            continue;
        }
        let (now, done) = (Instant::now(), progress.done.load(Ordering::Relaxed));
        let rate = (done - before) as f64 / (now - last).as_secs_f64();
        let what = if now < window.from { "warm-up" } else { phase.name() };
        let second = (now - window.begin).as_secs();
        let failed = progress.failed.load(Ordering::Relaxed);
        // Nobody reading is no reason to stop.
        writeln!(io::stderr(), "{what} {second:>4} s: {done} done, {rate:.0}/s, {failed} failed").ok();
        (before, last) = (done, now);
    }
}

/// User and system time of this process.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// One thread's share of a run.
struct Part<'a> {
    plan: &'a Plan,
    load: &'a Load,
    /// By endpoint.
    templates: &'a [Arc<Templates>],
    thread: usize,
    threads: usize,
}

impl Part<'_> {
    fn run(
        &self,
        progress: &Arc<Progress>,
        ready: &mpsc::Sender<Result<(), Error>>,
        start: &mpsc::Receiver<Window>,
    ) -> Tally {
        let nothing = || {
            let now = Instant::now();
            Tally::new(Window { begin: now, from: now, until: now }, progress.clone())
        };
        // Who asked for the run may be gone: another thread could not connect.
        let tell = |word| ready.send(word).is_ok();
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tell(Err(error.into()));
                return nothing();
            }
        };
        let tasks = LocalSet::new();
        tasks.block_on(&runtime, async {
            let alarms = match Alarms::start() {
                Ok(alarms) => alarms,
                Err(error) => {
                    tell(Err(error.into()));
                    return nothing();
                }
            };
            let streams = match self.connect().await {
                Ok(streams) => streams,
                Err(error) => {
                    tell(Err(error));
                    return nothing();
                }
            };
            if !tell(Ok(())) {
                return nothing();
            }
            // Nothing else is to be done on this thread meanwhile.
            let Ok(window) = start.recv() else { return nothing() };
            let tally = Rc::new(RefCell::new(Tally::new(window, progress.clone())));
            self.drive(streams, window, &tally, &alarms).await;
            tally.replace(nothing())
        })
    }

    /// The numbers of this thread's connections.
    fn connections(&self) -> impl Iterator<Item = usize> {
        (self.thread..self.plan.connections).step_by(self.threads)
    }

    fn endpoint(&self, connection: usize) -> &str {
        &self.plan.endpoints[connection % self.plan.endpoints.len()]
    }

    async fn connect(&self) -> Result<Vec<tokio::net::TcpStream>, Error> {
        let mut streams = Vec::new();
        for connection in self.connections() {
            let endpoint = self.endpoint(connection);
            let unreachable = |why: String| Error::Unreachable { endpoint: endpoint.to_owned(), why };
            let connected = tokio::time::timeout(self.plan.timeout, tokio::net::TcpStream::connect(endpoint)).await;
            let stream = connected.map_err(|_| unreachable(Failure::TimedOut.to_string()))?.map_err(|error| {
                match Failure::from_connect(&error) {
                    Failure::Exhausted => unreachable(format!("{}: {error}", Failure::Exhausted)),
                    _ => unreachable(error.to_string()),
                }
            })?;
            stream.set_nodelay(true)?;
            streams.push(stream);
        }
        Ok(streams)
    }

    async fn drive(
        &self,
        streams: Vec<tokio::net::TcpStream>,
        window: Window,
        tally: &Rc<RefCell<Tally>>,
        alarms: &Alarms,
    ) {
        let plan = self.plan;
        let mut connections = JoinSet::new();
        for (connection, stream) in self.connections().zip(streams) {
            let client = Client {
                protocol: plan.protocol,
                address: self.endpoint(connection).to_owned(),
                templates: self.templates[connection % plan.endpoints.len()].clone(),
                pipeline: plan.pipeline,
                timeout: plan.timeout,
                endless: plan.duration.is_none(),
                tally: tally.clone(),
                alarms: alarms.clone(),
            };
            if plan.protocol == Protocol::Etcd {
                let clients = connection * plan.pipeline..(connection + 1) * plan.pipeline;
                let total = plan.connections * plan.pipeline;
                let sources = clients.map(|client| Source::new(self.load, window, client, total)).collect();
                connections.spawn_local(etcd::drive(client, sources, stream));
            } else {
                let source = Source::new(self.load, window, connection, plan.connections);
                connections.spawn_local(http1::drive(client, source, stream));
            }
        }
        connections.join_all().await;
    }
}

/// What is written: letters and digits without a pattern, so that nothing on the way compresses them.
fn value(bytes: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..bytes).map(|_| random.alphanumeric() as u8).collect()
}
