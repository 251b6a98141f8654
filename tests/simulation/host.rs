//! A host: a disk that outlives its processes, and at most one process of the shipped server on it: node, log, store and
//! service, wired as `server` wires them. It can lose power at any operation of its disk, be killed, be frozen, and
//! start again.

use std::collections::BTreeSet;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use raftkv::channel::{self, Commit, CommitReceiver, CommitSender, Leadership};
use raftkv::cluster::{Introduction, Member, PeerUrl, cluster_id};
use raftkv::command::Command;
use raftkv::kv::Service;
use raftkv::metrics::Metrics;
use raftkv::node::{self, Ends, Node, Resume};
use raftkv::server::data::{Data, Place};
use raftkv::store::{Answer, View};
use raftkv::transport::{self, Event};
use raftkv::wal;
use raftkv::wal::disk_memory::MemoryDisk;
use raftkv::wal::snapshot::Snapshots;
use raftkv::wal::writer::{self, Hand, Writer};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::network::{Acquaintances, Wire};
use crate::world::{Millis, Shared, World, lock};

/// Between two questions of a newcomer where it belongs.
const ASK_AGAIN_MILLIS: Millis = 200;
/// How often a spare segment that could not be made is tried again.
const SPARE_RETRY: Duration = Duration::from_secs(1);
const PROPOSALS_MAX: usize = 256;
const VALUE_BYTES_MAX: usize = 4096;
/// Small, as the segments are.
const LOG_RESERVE_BYTES: u64 = 2 << 10;
const MESSAGE_BYTES_MAX: u64 = 1 << 10;

/// How a host fares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It runs, or may be started.
    Well,
    /// Its start was refused, with good reason: its data are lost to the cluster.
    Lost(String),
    /// Its member was removed: it stays down.
    Removed,
}

pub struct Host {
    pub id: u64,
    pub disk: MemoryDisk,
    pub state: State,
    /// Counts the starts.
    pub life: u64,
    pub process: Option<Process>,
    /// Somebody asks on its behalf where it belongs.
    joining: bool,
    /// It joins a cluster that is there, instead of founding one.
    pub joiner: bool,
    pub tick: Duration,
    /// A sync takes up to this long.
    pub sync_millis: Millis,
    /// Its wall clock less the world's.
    pub clock_micros: i64,
    /// Its disk was made to fail or to fill up in this life: it may stop.
    pub disk_hurt: bool,
    /// Its room was short in this life. That stops no node, unless the reserve is used up.
    pub disk_filled: bool,
    /// A bit was flipped since it last ran: the next start may be refused, naming a file of `flipped`.
    pub damaged: bool,
    /// Files in which bits were ever flipped. One of them may have been passed over before, and be missed now.
    pub flipped: BTreeSet<PathBuf>,
    /// Its directory was emptied: the others must not deal with it any more.
    pub wiped: bool,
    /// For its next process.
    metrics: Arc<Metrics>,
    /// The next power cut leaves the first sector of what was not synced, and no more: for a script.
    pub tears: bool,
}

/// A running process.
pub struct Process {
    pub life: u64,
    pub boot: u64,
    pub nonce: u64,
    pub service: Service,
    pub snapshots: Arc<Snapshots>,
    pub peer_events: mpsc::Sender<Event>,
    pub known: Acquaintances,
    pub stop: CancellationToken,
    pub stopping: bool,
    pub gate: Arc<Gate>,
    /// It was frozen in this life.
    pub was_frozen: bool,
    tasks: Vec<AbortHandle>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Holds a process's tasks while it is frozen, and for ever once its disk has lost power.
pub struct Gate {
    frozen: AtomicBool,
    thaw: Notify,
    disk: MemoryDisk,
}

impl Gate {
    pub fn freeze(&self) {
        self.frozen.store(true, Ordering::Relaxed);
    }

    pub fn thaw(&self) {
        self.frozen.store(false, Ordering::Relaxed);
        self.thaw.notify_waiters();
    }

    pub fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Relaxed)
    }
}

/// A task of a process, behind its gate.
struct Gated<F> {
    task: Pin<Box<F>>,
    gate: Arc<Gate>,
    thawed: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    world: Shared,
    id: u64,
    /// The node's log lines name their host.
    span: tracing::Span,
}

impl<F: Future> Future for Gated<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        if this.gate.is_frozen() {
            let gate = this.gate.clone();
            let thawed = this.thawed.get_or_insert_with(|| Box::pin(async move { gate.thaw.notified().await }));
            if thawed.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
        }
        this.thawed = None;
        let _host = this.span.enter();
        let outcome = if this.gate.disk.has_stopped() { Poll::Pending } else { this.task.as_mut().poll(context) };
        if this.gate.disk.has_stopped() {
            let id = this.id;
            lock(&this.world).after(0, move |world| world.power_is_out(id));
            return Poll::Pending;
        }
        outcome
    }
}

pub fn url(id: u64) -> PeerUrl {
    PeerUrl::parse(&format!("http://10.0.0.1:{}", 10_000 + id)).expect("a URL")
}

pub fn member(id: u64) -> Member {
    Member { id, urls: vec![url(id)] }
}

impl World {
    /// A host that was never started. A founder is one of `founders`; anybody else joins.
    pub fn add_host(&mut self, id: u64, founder: bool) {
        let disk = MemoryDisk::seeded(self.rng.u64(..));
        let host = Host {
            id,
            disk,
            state: State::Well,
            life: 0,
            process: None,
            joining: false,
            joiner: !founder,
            tick: Duration::from_millis(100),
            sync_millis: 1,
            clock_micros: 0,
            disk_hurt: false,
            disk_filled: false,
            damaged: false,
            flipped: BTreeSet::new(),
            wiped: false,
            metrics: Arc::default(),
            tears: false,
        };
        self.hosts.insert(id, host);
    }

    /// The process of that life, if it still runs.
    pub fn process(&self, id: u64, life: u64) -> Option<&Process> {
        self.hosts.get(&id)?.process.as_ref().filter(|process| process.life == life)
    }

    pub fn host(&mut self, id: u64) -> &mut Host {
        self.hosts.get_mut(&id).expect("a host of this ID")
    }

    /// Hosts whose process runs and is not frozen.
    pub fn running(&self) -> Vec<u64> {
        let runs = |host: &&Host| host.process.as_ref().is_some_and(|process| !process.gate.is_frozen());
        self.hosts.values().filter(runs).map(|host| host.id).collect()
    }

    fn place(&self, id: u64) -> Place {
        Place {
            disk: Arc::new(self.hosts[&id].disk.clone()),
            data_dir: "/data".into(),
            segment_bytes: self.limits.segment_bytes,
            policy: self.limits.policy(),
            metrics: self.hosts[&id].metrics.clone(),
        }
    }

    fn wall_clock_micros(&self, id: u64) -> u64 {
        // The world began in 2026.
        (1_780_000_000_000_000 + self.now() as i64 * 1000 + self.hosts[&id].clock_micros) as u64
    }

    /// Starts the process of a host that is well and down.
    pub fn start(&mut self, id: u64) {
        let host = self.host(id);
        if host.process.is_some() || host.joining || host.state != State::Well {
            return;
        }
        (host.disk_hurt, host.disk_filled) = (host.disk.is_to_fail(), host.disk.is_short());
        let _host = tracing::info_span!("host", id).entered();
        let (place, clock) = (self.place(id), self.wall_clock_micros(id));
        let joiner = self.hosts[&id].joiner;
        let opened = match place.used_by(id) {
            Ok(Some(identity)) => place.recover(identity, clock),
            Ok(None) if joiner => return self.join(id),
            Ok(None) => {
                let founders: Vec<Member> = self.hosts.values().filter(|h| !h.joiner).map(|h| member(h.id)).collect();
                place.found(cluster_id(&founders), id, &founders, clock)
            }
            Err(error) => Err(error),
        };
        match opened {
            Ok(data) if !self.hosts[&id].disk.has_stopped() => {
                let members = data.resume.members_in_log();
                self.run(id, &place, data, members);
            }
            Ok(_) => self.power_is_out(id),
            Err(error) => self.start_failed(id, &error.to_string()),
        }
    }

    fn start_failed(&mut self, id: u64, why: &str) {
        let host = self.host(id);
        if host.disk.has_stopped() {
            return self.power_is_out(id);
        }
        let hurt = host.disk_hurt || host.disk_filled;
        let is_named = |file: &PathBuf| why.contains(&*file.to_string_lossy());
        // A bad last frame is taken for torn. If it was the one by which an older segment was let go, that one is missed.
        let is_of_log = |file: &PathBuf| file.starts_with("/data/wal");
        let missed = why.contains("/data/wal") && why.contains("is missing") && host.flipped.iter().any(is_of_log);
        let damaged = host.damaged && (missed || host.flipped.iter().any(is_named));
        self.note(format_args!("host {id} does not start: {why}"));
        if damaged {
            self.host(id).state = State::Lost(why.to_owned());
        } else if hurt {
            self.start_later(id, 1000);
        } else {
            self.oracle.fail(format!("host {id} does not start: {why}"));
        }
    }

    /// Asks the members where this one belongs, until one knows.
    fn join(&mut self, id: u64) {
        let others: Vec<u64> = self.running().into_iter().filter(|other| *other != id).collect();
        let asked = match others.first() {
            Some(first) if self.scripted => Some(*first),
            Some(_) => Some(others[self.rng.usize(0..others.len())]),
            None => None,
        };
        let (reply, answer) = oneshot::channel();
        let sent =
            asked.filter(|other| self.net.reaches(id, *other) && self.net.reaches(*other, id)).is_some_and(|other| {
                let process = self.hosts[&other].process.as_ref().expect("it runs");
                process.peer_events.try_send(Event::Introduce { id, urls: vec![url(id)], reply }).is_ok()
            });
        if !sent {
            return self.after(ASK_AGAIN_MILLIS, move |world| world.start(id));
        }
        self.host(id).joining = true;
        let world = self.shared();
        tokio::spawn(async move {
            let answer = answer.await;
            let mut world = lock(&world);
            world.host(id).joining = false;
            match answer {
                Ok(transport::Introduction::Member { body }) => {
                    let introduction: Introduction = serde_json::from_slice(&body).expect("an introduction");
                    world.found_joiner(id, introduction);
                }
                Ok(transport::Introduction::Removed) => {
                    world.host(id).state = State::Removed;
                    if !world.leaving.contains_key(&id) {
                        world.oracle.fail(format!("host {id} hears that it was removed, and nobody asked for that"));
                    }
                }
                Ok(transport::Introduction::NotAMember(_)) | Err(_) => {
                    world.after(ASK_AGAIN_MILLIS, move |world| world.start(id));
                }
            }
        });
    }

    fn found_joiner(&mut self, id: u64, introduction: Introduction) {
        let (place, clock) = (self.place(id), self.wall_clock_micros(id));
        let Introduction { cluster, founders, members } = introduction;
        match place.found(cluster, id, &founders, clock) {
            Ok(data) if !self.hosts[&id].disk.has_stopped() => self.run(id, &place, data, members),
            Ok(_) => self.power_is_out(id),
            Err(error) => self.start_failed(id, &error.to_string()),
        }
    }

    /// What a process finds in its log, and what of it goes to its store before the node runs.
    fn resumes(&mut self, id: u64, place: &Place, data: &Data) -> Result<(), wal::Error> {
        let Data { identity, recovered, meta, .. } = data;
        let entries = recovered.entries.read().collect::<Result<Vec<_>, _>>()?;
        self.oracle.recovered(id, recovered.compacted.unwrap_or(node::FOUNDING).1, &entries);
        self.oracle.starts(id, meta.index);
        let mut resume = Resume::new(id, identity.nonce, recovered, meta, 0, place.policy.clone());
        for entry in entries {
            let commit = resume.take::<Answer>(entry).expect("the store has taken it");
            if let Some(commit) = commit {
                self.oracle.committed(id, recovered.hard_state.term, &commit);
            }
        }
        Ok(())
    }

    /// Wires a process, as `server` does.
    fn run(&mut self, id: u64, place: &Place, data: Data, members: Vec<Member>) {
        if let Err(error) = self.resumes(id, place, &data) {
            return self.start_failed(id, &error.to_string());
        }
        let Data { identity, wal, recovered, snapshots, resume, store, .. } = data;
        let life = self.hosts[&id].life + 1;
        let seed = if self.scripted { id << 32 | life } else { self.rng.u64(..) };
        let limits = self.limits.clone();
        let host = self.hosts.get_mut(&id).expect("it starts");
        host.life = life;
        host.damaged = false;
        host.metrics = Arc::default();
        let (proposals_in, proposals) = mpsc::channel(PROPOSALS_MAX);
        let (peer_events_in, peer_events) = mpsc::channel(limits.peer_events_max);
        let (wal_events_in, wal_events) = mpsc::unbounded_channel();
        let (commits, tapped) = channel::commits();
        let (commits_in, commits_out) = channel::commits();
        let (leadership_in, leadership) = watch::channel(Leadership::default());
        let gate = Arc::new(Gate { frozen: AtomicBool::new(false), thaw: Notify::new(), disk: host.disk.clone() });
        let stop = CancellationToken::new();
        let (done_in, done) = mpsc::unbounded_channel();
        let (writer, hand) = Writer::by_hand(wal, move |event| drop(done_in.send(event)));
        let view = store.view();
        let settings = node::Settings {
            id,
            cluster: identity.cluster,
            nonce: identity.nonce,
            tick: host.tick,
            election_ticks: 10,
            seed,
            request_timeout: limits.request_timeout,
            reserve_bytes: LOG_RESERVE_BYTES,
            message_bytes_max: MESSAGE_BYTES_MAX,
        };
        let boot = recovered.boot;
        let (world, shared) = (self.shared(), self.shared());
        let ends = Ends {
            proposals,
            commits,
            understands: Box::new(|command| Command::decode(command).is_ok()),
            leadership: leadership_in,
            wal: writer,
            wal_events,
            peers: Box::new(Wire { world: self.shared(), id, life }),
            peer_events,
            snapshots: snapshots.clone(),
            metrics: place.metrics.clone(),
        };
        let applied = resume.applied();
        let node = Node::new(settings, resume, ends).run(stop.clone());
        self.hosts.get_mut(&id).expect("it starts").process = Some(Process {
            life,
            boot,
            nonce: identity.nonce,
            service: Service::new(proposals_in, leadership, view.clone(), VALUE_BYTES_MAX),
            snapshots,
            peer_events: peer_events_in,
            known: Acquaintances::default(),
            stop,
            stopping: false,
            gate,
            was_frozen: false,
            tasks: Vec::new(),
        });
        self.note(format_args!("host {id} starts, life {life}, from entry {applied}"));
        self.oracle.applied(id, &view.state());
        Wire { world: shared, id, life }.start(self, members);
        let ended = async move {
            let outcome = node.await;
            lock(&world).ended(id, life, outcome);
        };
        let (tap_world, disk_world, store_world) = (self.shared(), self.shared(), self.shared());
        self.spawn(id, ended);
        self.spawn(id, tap(tap_world, id, life, tapped, commits_in, view));
        self.spawn(id, write(disk_world, id, hand, done, wal_events_in));
        self.spawn(id, async move {
            if let Err(stopped) = store.run(commits_out).await {
                let mut world = lock(&store_world);
                let host = &world.hosts[&id];
                let hurt = host.disk_hurt || host.disk.has_stopped();
                if !hurt {
                    world.oracle.fail(format!("the store of host {id} stopped: {stopped}"));
                }
            }
        });
    }

    fn spawn(&mut self, id: u64, task: impl Future<Output = ()> + Send + 'static) {
        let world = self.shared();
        let process = self.host(id).process.as_mut().expect("it runs");
        let (gate, span) = (process.gate.clone(), tracing::info_span!("host", id));
        let gated = Gated { task: Box::pin(task), gate, thawed: None, world: world.clone(), id, span };
        let task = tokio::spawn(gated);
        process.tasks.push(task.abort_handle());
        tokio::spawn(async move {
            if let Err(error) = task.await
                && error.is_panic()
            {
                let why = crate::panics::last();
                lock(&world).oracle.fail(format!("host {id} panicked: {why}"));
            }
        });
    }

    /// A node ended by itself.
    fn ended(&mut self, id: u64, life: u64, outcome: Result<(), node::Stopped>) {
        // Whose power is out has no last words.
        if self.process(id, life).is_none() || self.hosts[&id].disk.has_stopped() {
            return;
        }
        let (removed, text) = match &outcome {
            Ok(()) => (false, "stopped".to_owned()),
            Err(node::Stopped::Removed) => (true, "was removed".to_owned()),
            Err(stopped) => (false, stopped.to_string()),
        };
        self.note(format_args!("node {id}: {text}"));
        let host = self.host(id);
        let process = host.process.as_mut().expect("looked at above");
        let stopping = std::mem::replace(&mut process.stopping, true);
        let expected = match &outcome {
            Ok(()) => stopping,
            Err(node::Stopped::Removed) => {
                host.state = State::Removed;
                self.leaving.contains_key(&id)
            }
            Err(node::Stopped::Wal(error)) => host.disk_hurt || (host.disk_filled && error.is_disk_full()),
            // The service ends where it cannot read the snapshot that it is to go on from.
            Err(node::Stopped::ServiceGone(_)) => host.disk_hurt,
            Err(node::Stopped::OtherDirectory { .. }) => {
                host.state = State::Lost(text.clone());
                host.wiped
            }
            Err(_) => false,
        };
        if !expected {
            self.oracle.fail(format!("node {id} ended without a reason: {text}"));
        }
        if let Err(node::Stopped::Wal(_) | node::Stopped::ServiceGone(_)) = outcome {
            let pause = self.rng.u64(500..5000);
            self.start_later(id, pause);
        }
        // Its last words are still to be written.
        let grace = if removed || stopping { 50 } else { 0 };
        self.after(grace, move |world| world.kill(id, life));
    }

    /// Ends a process as `kill -9` does: the disk keeps what was written, synced or not.
    pub fn kill(&mut self, id: u64, life: u64) {
        if self.process(id, life).is_some() {
            self.note(format_args!("host {id}: the process is gone"));
            self.host(id).process = None;
        }
    }

    /// Cuts the power: what was not synced may be lost, whole or in part.
    pub fn power_is_out(&mut self, id: u64) {
        let mut rng = self.rng.fork();
        // Now all of it reaches the disk, now nothing, now this and that.
        let survives = [0, 1000, 500, 900, 100][rng.usize(0..5)];
        // Each task of the process notices: once told is enough.
        if self.hosts[&id].process.is_some() || self.hosts[&id].disk.has_stopped() {
            self.note(format_args!("host {id}: power lost"));
        }
        let scripted = self.scripted;
        let host = self.host(id);
        host.process = None;
        let mut tears = std::mem::take(&mut host.tears);
        host.disk.crash(&mut || {
            if scripted { std::mem::take(&mut tears) } else { rng.u32(0..1000) < survives }
        });
        let pause = self.rng.u64(200..5000);
        self.start_later(id, pause);
    }

    /// Somebody looks after hosts that are down, unless a script does.
    fn start_later(&mut self, id: u64, pause: Millis) {
        if !self.scripted {
            self.after(pause, move |world| world.start(id));
        }
    }

    /// Asks a process to end in order.
    pub fn stop(&mut self, id: u64) {
        if let Some(process) = self.host(id).process.as_mut() {
            process.stopping = true;
            process.stop.cancel();
            self.note(format_args!("host {id}: told to stop"));
        }
    }

    pub fn freeze(&mut self, id: u64) {
        if let Some(process) = self.host(id).process.as_mut() {
            process.gate.freeze();
            process.was_frozen = true;
            self.note(format_args!("host {id}: frozen"));
        }
    }

    pub fn thaw(&mut self, id: u64) {
        if let Some(process) = self.host(id).process.as_ref().filter(|process| process.gate.is_frozen()) {
            process.gate.thaw();
            self.note(format_args!("host {id}: thawed"));
        }
    }
}

impl Wire {
    /// The transport's start: the members in the log are dialled.
    fn start(self, world: &mut World, members: Vec<Member>) {
        let peers: Vec<u64> = members.into_iter().map(|member| member.id).filter(|peer| *peer != self.id).collect();
        let process = world.host(self.id).process.as_mut().expect("it starts");
        process.known.peers = peers.iter().copied().collect();
        peers.into_iter().for_each(|peer| world.dial(self.id, self.life, peer));
    }
}

/// Between node and store: what is committed passes the oracle on its way, one batch at a time, and the state is looked
/// at behind each.
async fn tap(
    world: Shared,
    id: u64,
    life: u64,
    mut commits: CommitReceiver<Answer>,
    store: CommitSender<Answer>,
    view: View,
) {
    let mut batch = Vec::new();
    while commits.receive(&mut batch).await {
        {
            let mut world = lock(&world);
            let Some(process) = world.process(id, life) else { return };
            let term = process.service.leadership().term;
            let now = world.now();
            world.mark(&[4, id, now, batch.len() as u64]);
            batch.iter().for_each(|commit| world.oracle.committed(id, term, commit));
        }
        let (reply, applied) = oneshot::channel();
        batch.push(Commit::Barrier { replies: vec![reply] });
        if store.publish(std::mem::take(&mut batch)).is_err() || applied.await.is_err() {
            return;
        }
        lock(&world).oracle.applied(id, &view.state());
    }
}

/// The log's threads, at the pace of the disk: what is done is told some time later, and more queues up meanwhile.
async fn write(
    world: Shared,
    id: u64,
    mut hand: Hand,
    mut done: mpsc::UnboundedReceiver<writer::Event>,
    told: mpsc::UnboundedSender<writer::Event>,
) {
    let mut retry_at = Instant::now() + SPARE_RETRY;
    loop {
        tokio::select! {
            biased;
            () = hand.work() => {}
            () = sleep_until(retry_at) => {}
        }
        let again = Instant::now() >= retry_at;
        if again {
            retry_at = Instant::now() + SPARE_RETRY;
        }
        let (before, behind) = {
            let mut world = lock(&world);
            let longest = world.hosts[&id].sync_millis;
            let whole = if world.scripted { longest } else { world.rng.u64(0..=longest) };
            let before = if world.scripted { whole } else { world.rng.u64(0..=whole) };
            (before, whole - before)
        };
        pause(before).await;
        let goes_on = hand.turn();
        if goes_on {
            hand.prepare_spare(again);
            pause(behind).await;
        }
        while let Ok(event) = done.try_recv() {
            // The node may have ended.
            told.send(event).ok();
        }
        if !goes_on {
            return;
        }
    }
}

async fn pause(millis: Millis) {
    if millis > 0 {
        sleep(Duration::from_millis(millis)).await;
    }
}
