//! The server: wires the rooms together, and ends them in order. The only place that knows all of them.
//!
//! Start: lock the data directory, bind the ports, find out who this member is, recover the log, start the tasks.
//! Stop: no new requests; those in flight finish; leadership is handed over; the log is synced; the peers are left.

mod bind;
#[doc(hidden)]
pub mod data;
mod open;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::data::Data;
use self::open::Opened;
use crate::api::{Api, Limits};
use crate::channel::{self, Leadership};
use crate::command::Command;
use crate::config::{Config, NotAFounder, WAL_SEGMENT_BYTES_MIN};
use crate::kv::Service;
use crate::metrics::Metrics;
use crate::node::{self, Ends, Node};
use crate::store;
use crate::transport::{self, SnapshotFiles, SnapshotSink, Transport};
use crate::wal;
use crate::wal::disk::RealDisk;
use crate::wal::identity::{Identity, Lock};
use crate::wal::snapshot::{Incoming, Snapshots};
use crate::wal::writer::Writer;

// The flag's bound and the log's need are written apart, for neither room may import the other.
const _: () = assert!(WAL_SEGMENT_BYTES_MIN == wal::SEGMENT_BYTES_MIN);

/// Proposals on their way from the front ends to the node. More than this are answered busy.
const PROPOSALS_MAX: usize = 8192;

/// Events on their way from the peers to the node. More than this wait in TCP's buffers.
const PEER_EVENTS_MAX: usize = 4096;

/// What appends leave of a full disk's log: enough for any number of elections.
const LOG_RESERVE_BYTES: u64 = 1 << 20;

/// Entries that go to a follower together, in bytes.
const MESSAGE_BYTES_MAX: u64 = 1 << 20;

/// What the log takes in memory while no follower needs more of it: a second of writes at full speed.
const LOG_MEMORY_BYTES: u64 = 8 << 20;

/// How long a start tries for what a process before it may still hold, and the pause between two tries.
const PATIENCE: Duration = Duration::from_secs(1);
const TRY_AGAIN: Duration = Duration::from_millis(10);

/// What a stop waits for beyond the request time-out: the answers' way to their clients.
const GRACE: Duration = Duration::from_secs(1);

/// Why a server did not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    NotAFounder(#[from] NotAFounder),
    #[error("--id {id}: the data directory {} belongs to member {owner}; give --id {owner} or another --data-dir", data_dir.display())]
    NotTheOwner { id: u64, owner: u64, data_dir: PathBuf },
    #[error(
        "--cluster lists none of the members that the data directory {} knows ({members}): it belongs to another \
         cluster; give another --data-dir, or leave --cluster away",
        data_dir.display()
    )]
    AnotherCluster { data_dir: PathBuf, members: String },
    #[error("{flag} {address} cannot be bound: {source}")]
    Bind { flag: &'static str, address: String, source: io::Error },
    #[error(
        "--id {id}: this member was removed from the cluster, and its ID is never used again; add it under a new one"
    )]
    WasRemoved { id: u64 },
    #[error(
        "--join: member {id} was not added to the cluster, or with another URL ({refusals}); add it with POST /{id} first"
    )]
    NotAdded { id: u64, refusals: String },
    #[error(
        "the snapshot at {index} cannot be restored: {error}; remove this member and add the machine under a new ID"
    )]
    Image { index: u64, error: store::BadImage },
    #[error("the snapshot at {index} cannot be restored: {error}")]
    NewerImage { index: u64, error: store::BadImage },
    #[error(
        "the snapshot at {index} holds the state at {found}; remove this member and add the machine under a new ID"
    )]
    WrongImage { index: u64, found: u64 },
    #[error("--id {id}: no address of this member is known; give it in --cluster, or as --listen-peer")]
    NoAddress { id: u64 },
    #[error(transparent)]
    Wal(#[from] wal::Error),
    #[error(transparent)]
    Node(#[from] node::Stopped),
    #[error(transparent)]
    Store(#[from] store::Stopped),
    #[error("the runtime does not start: {0}")]
    Runtime(io::Error),
}

impl Error {
    /// 2 for what the user typed, 1 for the rest.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::NotAFounder(_)
            | Error::NotTheOwner { .. }
            | Error::AnotherCluster { .. }
            | Error::WasRemoved { .. }
            | Error::NotAdded { .. }
            | Error::NoAddress { .. } => 2,
            Error::Bind { .. }
            | Error::Image { .. }
            | Error::NewerImage { .. }
            | Error::WrongImage { .. }
            | Error::Wal(_)
            | Error::Node(_)
            | Error::Store(_)
            | Error::Runtime(_) => 1,
        }
    }
}

fn policy(config: &Config) -> node::Policy {
    node::Policy {
        count: config.snapshot_count,
        interval: config.snapshot_interval,
        min_entries: config.snapshot_min_entries,
        log_bytes: config.snapshot_log_bytes,
        catchup_entries: config.snapshot_catchup_entries,
        catchup_bytes: config.snapshot_catchup_bytes,
        memory_bytes: LOG_MEMORY_BYTES,
        keep: config.snapshot_keep,
    }
}

/// Files that the log, the peers and the process itself may open beside the clients' connections.
const OWN_FILES_MAX: u64 = 512;

/// Takes as many open files as the system lets it, and says how many of them may be clients: a server that runs out of
/// them could not open its next log segment.
fn connections_max() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    let files = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            warn!(%error, "the limit of open files stays as it is");
            limit.current
        }
    };
    let files = files.unwrap_or(u64::MAX);
    let clients = files.saturating_sub(OWN_FILES_MAX).max(files / 4);
    let wanted = Limits::default().connections_max;
    let allowed = usize::try_from(clients).unwrap_or(usize::MAX).min(wanted);
    if allowed < wanted {
        warn!(files, "few files may be open: at most {allowed} client connections are taken");
    }
    allowed
}

/// Runs a server until it is told to stop by TERM or INT (a second one ends the process at once), or cannot go on.
pub fn run(config: Config) -> Result<(), Error> {
    let started = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime)?;
    let outcome = runtime.block_on(serve(config, started));
    // What is still read or written then, a long log or a snapshot, is of use to nobody.
    runtime.shutdown_background();
    outcome
}

async fn serve(config: Config, started: Instant) -> Result<(), Error> {
    let mut signals = Signals::listen().map_err(Error::Runtime)?;
    if Identity::load(&RealDisk, &config.data_dir)?.is_none() {
        // Before anything is created: a mistyped command leaves no trace.
        config.check_founding()?;
    }
    // For as long as the process lives: a thread that is not waited for at the end may still be in the directory.
    std::mem::forget(lock(&config).await?);
    let clients = bind::clients(&config).await?;
    let metrics = Arc::new(Metrics::new());
    let opened = tokio::select! {
        opened = open::open(&config, &metrics) => opened?,
        // A newcomer may wait long for the cluster that it joins.
        _ = signals.next() => {
            info!("stopped before it had started");
            return Ok(());
        }
    };
    info!(
        id = config.id,
        cluster = %format_args!("{:016x}", opened.data.identity.cluster),
        members = opened.members.len(),
        snapshot = opened.data.meta.index,
        entries = opened.data.recovered.entries.len(),
        clients = %clients.local_addr().map_err(Error::Runtime)?,
        "started in {:.1?}", started.elapsed(),
    );
    let mut running = Running::start(&config, opened, clients, metrics)?;
    let outcome = tokio::select! {
        outcome = running.log.ended() => outcome,
        _ = signals.next() => {
            info!("stopping");
            tokio::select! {
                outcome = running.stop(config.request_timeout + GRACE) => outcome,
                signal = signals.next() => {
                    warn!("told again to stop: ending at once");
                    std::process::exit(128 + signal);
                }
            }
        }
    };
    match outcome {
        Ok(()) => info!("stopped"),
        // As the user wished: a good end.
        Err(Error::Node(node::Stopped::Removed)) => {
            info!("this member was removed from the cluster: stopped for good");
            // Whoever asked for it here is still to hear so.
            running.stop_clients(GRACE).await;
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Locks the data directory. A process that was killed a moment ago may hold it a little longer.
async fn lock(config: &Config) -> Result<Lock, Error> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Lock::take(&config.data_dir) {
            Err(wal::Error::Locked(_)) if Instant::now() < deadline => tokio::time::sleep(TRY_AGAIN).await,
            taken => return Ok(taken?),
        }
    }
}

/// The tasks of a server that serves.
struct Running {
    api: JoinHandle<()>,
    log: Log,
    stop_api: CancellationToken,
    stop_node: CancellationToken,
}

/// The node, and the store behind it.
struct Log {
    node: JoinHandle<Result<(), node::Stopped>>,
    store: JoinHandle<Result<(), store::Stopped>>,
}

impl Log {
    /// Waits until both have ended: because they were told to, or because one of them could not go on.
    async fn ended(&mut self) -> Result<(), Error> {
        tokio::select! {
            outcome = &mut self.node => match finished(outcome) {
                // The reason is the store's to tell.
                Err(node::Stopped::ServiceGone(_)) => finished((&mut self.store).await).map_err(Error::from),
                Err(stopped) => Err(stopped.into()),
                // The store sees the end of the commits.
                Ok(()) => finished((&mut self.store).await).map_err(Error::from),
            },
            outcome = &mut self.store => {
                finished(outcome)?;
                // It ends well only behind a node that has ended.
                finished((&mut self.node).await).map_err(Error::from)
            }
        }
    }
}

impl Running {
    fn start(config: &Config, opened: Opened, clients: TcpListener, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let Opened { data, members, urls, listeners } = opened;
        let Data { identity, wal, recovered, snapshots, resume, store, .. } = data;
        let (proposals_in, proposals) = mpsc::channel(PROPOSALS_MAX);
        let (peer_events_in, peer_events) = mpsc::channel(PEER_EVENTS_MAX);
        let (wal_events_in, wal_events) = mpsc::unbounded_channel();
        let (commits, commits_out) = channel::commits();
        let (leadership_in, leadership) = watch::channel(Leadership::default());
        let (stop_api, stop_node) = (CancellationToken::new(), CancellationToken::new());

        let max_value_bytes = config.max_value_bytes as usize;
        let service = Service::new(proposals_in, leadership, store.view(), max_value_bytes);
        // The node outlives its log's events: where it is gone, nobody waits for them.
        let wal = Writer::spawn(wal, move |event| drop(wal_events_in.send(event)))?;
        let transport = Transport::start(
            transport::Settings {
                id: config.id,
                cluster: identity.cluster,
                nonce: identity.nonce,
                boot: recovered.boot,
                urls,
                snapshots: Arc::new(Files(snapshots.clone())),
                metrics: metrics.clone(),
            },
            listeners,
            members,
            peer_events_in,
            CancellationToken::new(),
        );
        let settings = node::Settings {
            id: config.id,
            cluster: identity.cluster,
            nonce: identity.nonce,
            tick: config.tick,
            election_ticks: config.election_ticks,
            seed: getrandom::u64().map_err(wal::Error::Random)?,
            request_timeout: config.request_timeout,
            reserve_bytes: LOG_RESERVE_BYTES,
            message_bytes_max: MESSAGE_BYTES_MAX,
        };
        let ends = Ends {
            proposals,
            commits,
            understands: Box::new(|command| Command::decode(command).is_ok()),
            leadership: leadership_in,
            wal,
            wal_events,
            peers: Box::new(transport),
            peer_events,
            snapshots,
            metrics: metrics.clone(),
        };
        let api = Api::new(service, metrics, Limits { connections_max: connections_max(), ..Limits::default() });
        Ok(Running {
            api: tokio::spawn(api.serve(vec![clients], stop_api.clone())),
            log: Log {
                node: tokio::spawn(Node::new(settings, resume, ends).run(stop_node.clone())),
                store: tokio::spawn(store.run(commits_out)),
            },
            stop_api,
            stop_node,
        })
    }

    /// The order of an orderly end.
    async fn stop(&mut self, grace: Duration) -> Result<(), Error> {
        let Running { api, log, stop_api, stop_node } = self;
        tokio::select! {
            () = stop_clients(api, stop_api, grace) => {}
            // A node that fails now leaves them without an answer.
            outcome = log.ended() => return outcome,
        }
        stop_node.cancel();
        log.ended().await
    }

    async fn stop_clients(&mut self, grace: Duration) {
        stop_clients(&mut self.api, &self.stop_api, grace).await;
    }
}

/// Takes no new requests, and lets those in flight finish within the grace time.
async fn stop_clients(api: &mut JoinHandle<()>, stop: &CancellationToken, grace: Duration) {
    stop.cancel();
    if tokio::time::timeout(grace, &mut *api).await.is_err() {
        warn!("requests were still in flight after {grace:?}: cut off");
        api.abort();
    }
}

/// The snapshot files, as the transport sees them.
struct Files(Arc<Snapshots>);

impl SnapshotFiles for Files {
    fn open(&self, index: u64, term: u64) -> io::Result<(u64, Box<dyn io::Read + Send>)> {
        let file = self.0.open_file(index, term).map_err(io::Error::other)?;
        Ok((file.size_bytes(), Box::new(file)))
    }

    fn receive(&self) -> io::Result<Box<dyn SnapshotSink>> {
        Ok(Box::new(Sink(self.0.receive().map_err(io::Error::other)?)))
    }
}

/// A snapshot that comes in.
struct Sink(Incoming);

impl SnapshotSink for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write(bytes).map_err(io::Error::other)
    }

    fn finish(self: Box<Self>) -> io::Result<(u64, u64)> {
        let meta = self.0.finish().map_err(|error| match error {
            wal::Error::BadIncoming { .. } => io::Error::new(io::ErrorKind::InvalidData, error),
            error => io::Error::other(error),
        })?;
        Ok((meta.index, meta.term))
    }
}

/// A task's outcome. A panic there is a bug, and goes on here.
fn finished<T>(outcome: Result<T, tokio::task::JoinError>) -> T {
    match outcome {
        Ok(outcome) => outcome,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => unreachable!("only the client port's task is ever aborted: {error}"),
        },
    }
}

/// TERM and INT.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The number of the next one.
    async fn next(&mut self) -> i32 {
        let kind = tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
        };
        kind.as_raw_value()
    }
}
