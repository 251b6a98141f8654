//! The server: wires the rooms together, and ends them in order. The only place that knows all of them.
//!
//! Start: lock the data directory, bind the ports, find out who this member is, recover the log, start the tasks.
//! Stop: no new requests; those in flight finish; leadership is handed over; the log is synced; the peers are left.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpSocket, lookup_host};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::api::{Api, Limits};
use crate::channel::{self, Leadership};
use crate::cluster::{Member, PeerUrl, cluster_id};
use crate::command::Command;
use crate::config::{Config, NotAFounder};
use crate::kv::Service;
use crate::metrics::Metrics;
use crate::node::{self, Ends, Node};
use crate::store::{self, State, Store};
use crate::transport::{self, Transport};
use crate::wal::disk::RealDisk;
use crate::wal::identity::{Identity, LOG_DIR, Lock};
use crate::wal::writer::Writer;
use crate::wal::{self, Options, Recovered, Wal};

/// Proposals on their way from the front ends to the node. More than this are answered busy.
const PROPOSALS_MAX: usize = 8192;

/// Events on their way from the peers to the node. More than this wait in TCP's buffers.
const PEER_EVENTS_MAX: usize = 4096;

/// Connections that the kernel holds until they are accepted.
const BACKLOG: u32 = 1024;

/// What a stop waits for beyond the request time-out: the answers' way to their clients.
const GRACE: Duration = Duration::from_secs(1);

/// Why a server did not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    NotAFounder(#[from] NotAFounder),
    #[error("--id {id}: the data directory {} belongs to member {owner}; give --id {owner} or another --data-dir", data_dir.display())]
    NotTheOwner { id: u64, owner: u64, data_dir: PathBuf },
    #[error("{flag} {address} cannot be bound: {source}")]
    Bind { flag: &'static str, address: String, source: io::Error },
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
            Error::NotAFounder(_) | Error::NotTheOwner { .. } => 2,
            Error::Bind { .. } | Error::Wal(_) | Error::Node(_) | Error::Store(_) | Error::Runtime(_) => 1,
        }
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
    runtime.block_on(serve(config, started))
}

async fn serve(config: Config, started: Instant) -> Result<(), Error> {
    let mut signals = Signals::listen().map_err(Error::Runtime)?;
    if Identity::load(&RealDisk, &config.data_dir)?.is_none() {
        // Before anything is created: a mistyped command leaves no trace.
        config.check_founding()?;
    }
    let _lock = Lock::take(&config.data_dir)?;
    let clients = bind_clients(&config).await?;
    let metrics = Arc::new(Metrics::new());
    let opened = open(&config, &metrics).await?;
    info!(
        id = config.id,
        cluster = %format_args!("{:016x}", opened.identity.cluster),
        members = opened.recovered.founders.len(),
        entries = opened.recovered.entries.len(),
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
    if outcome.is_ok() {
        info!("stopped");
    }
    outcome
}

/// What a start finds in the data directory, or puts there.
struct Opened {
    identity: Identity,
    wal: Wal,
    recovered: Recovered,
    /// This member's own URLs, and the listeners for them.
    urls: Vec<PeerUrl>,
    peers: Vec<TcpListener>,
}

/// Finds out who this member is and recovers its log, or founds both.
async fn open(config: &Config, metrics: &Arc<Metrics>) -> Result<Opened, Error> {
    let disk = Arc::new(RealDisk);
    let log = Options { dir: config.data_dir.join(LOG_DIR), segment_bytes: config.wal_segment_bytes };
    let now_micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
    let identity = Identity::load(disk.as_ref(), &config.data_dir)?;
    if let Some(Identity { member, .. }) = identity.filter(|identity| identity.member != config.id) {
        return Err(Error::NotTheOwner { id: config.id, owner: member, data_dir: config.data_dir.clone() });
    }
    match identity {
        Some(identity) if Wal::exists(disk.as_ref(), &log.dir)? => {
            let (wal, recovered) = Wal::open(disk, &log, now_micros, metrics.clone())?;
            if identity.cluster != cluster_id(&config.cluster) {
                warn!("--cluster is not the list that this cluster was founded on: the members in the log count");
            }
            let urls = urls_of(&recovered.founders, config.id);
            let peers = bind_peers(config, &urls).await?;
            Ok(Opened { identity, wal, recovered, urls, peers })
        }
        // No log, whatever became of it: a new nonce says so to whoever knew the old one.
        Some(_) | None => {
            config.check_founding()?;
            let urls = urls_of(&config.cluster, config.id);
            // Before anything is written, so that a port in use leaves no trace.
            let peers = bind_peers(config, &urls).await?;
            let identity = Identity::create(disk.as_ref(), &config.data_dir, cluster_id(&config.cluster), config.id)?;
            let (wal, recovered) = Wal::create(disk, &log, &config.cluster, now_micros, metrics.clone())?;
            info!(data_dir = %config.data_dir.display(), "first start: the data directory is new");
            Ok(Opened { identity, wal, recovered, urls, peers })
        }
    }
}

fn urls_of(members: &[Member], id: u64) -> Vec<PeerUrl> {
    members.iter().find(|member| member.id == id).map(|member| member.urls.clone()).unwrap_or_default()
}

async fn bind_clients(config: &Config) -> Result<TcpListener, Error> {
    if let Some(address) = &config.listen {
        return bind("--listen", address).await;
    }
    // All interfaces: IPv6 takes IPv4 too, where there is IPv6.
    match bind("--port", &format!("[::]:{}", config.port)).await {
        Err(Error::Bind { source, .. }) if source.kind() != io::ErrorKind::AddrInUse => {
            bind("--port", &format!("0.0.0.0:{}", config.port)).await
        }
        bound => bound,
    }
}

async fn bind_peers(config: &Config, urls: &[PeerUrl]) -> Result<Vec<TcpListener>, Error> {
    if let Some(address) = &config.listen_peer {
        return Ok(vec![bind("--listen-peer", address).await?]);
    }
    let mut listeners = Vec::new();
    for url in urls {
        listeners.push(bind("this member's entry in --cluster,", &url.authority()).await?);
    }
    Ok(listeners)
}

async fn bind(flag: &'static str, address: &str) -> Result<TcpListener, Error> {
    let failed = |source| Error::Bind { flag, address: address.to_owned(), source };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for resolved in lookup_host(address).await.map_err(failed)? {
        match listen(resolved) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restart must not wait for old connections to time out. Never SO_REUSEPORT: a second process would bind too.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
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
        let Opened { identity, wal, recovered, urls, peers } = opened;
        let (proposals_in, proposals) = mpsc::channel(PROPOSALS_MAX);
        let (peer_events_in, peer_events) = mpsc::channel(PEER_EVENTS_MAX);
        let (wal_events_in, wal_events) = mpsc::unbounded_channel();
        let (commits, commits_out) = channel::commits();
        let (leadership_in, leadership) = watch::channel(Leadership::default());
        let (stop_api, stop_node) = (CancellationToken::new(), CancellationToken::new());

        let store = Store::new(State::founded(node::FOUNDING.0), metrics.clone());
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
                metrics: metrics.clone(),
            },
            peers,
            recovered.founders.clone(),
            peer_events_in,
            CancellationToken::new(),
        );
        let settings = node::Settings {
            id: config.id,
            cluster: identity.cluster,
            tick: config.tick,
            election_ticks: config.election_ticks,
            request_timeout: config.request_timeout,
        };
        let ends = Ends {
            proposals,
            commits,
            understands: Box::new(|command| Command::decode(command).is_ok()),
            leadership: leadership_in,
            wal,
            wal_events,
            transport,
            peer_events,
            metrics: metrics.clone(),
        };
        let api = Api::new(service, metrics, Limits { connections_max: connections_max(), ..Limits::default() });
        Ok(Running {
            api: tokio::spawn(api.serve(vec![clients], stop_api.clone())),
            log: Log {
                node: tokio::spawn(Node::new(settings, recovered, ends).run(stop_node.clone())),
                store: tokio::spawn(store.run(commits_out)),
            },
            stop_api,
            stop_node,
        })
    }

    /// The order of an orderly end.
    async fn stop(&mut self, grace: Duration) -> Result<(), Error> {
        self.stop_api.cancel();
        tokio::select! {
            answered = tokio::time::timeout(grace, &mut self.api) => if answered.is_err() {
                warn!("requests were still in flight after {grace:?}: cut off");
                self.api.abort();
            },
            // A node that fails now would leave them without an answer.
            outcome = self.log.ended() => return outcome,
        }
        self.stop_node.cancel();
        self.log.ended().await
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
