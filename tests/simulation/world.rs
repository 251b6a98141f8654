//! The world: one clock, one queue of what is to happen, one source of chance. Everything that happens does so in an
//! order that follows from the seed. Nodes run as tasks of one thread under tokio's paused clock; the world wakes when
//! something of its own is due.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use fastrand::Rng;
use raftkv::node::Policy;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use xxhash_rust::xxh3::Xxh3;

use crate::history::{History, Operation};
use crate::host::Host;
use crate::network::Network;
use crate::oracle::Oracle;

/// Milliseconds since the world began.
pub type Millis = u64;

pub type Shared = Arc<Mutex<World>>;

type Action = Box<dyn FnOnce(&mut World) + Send>;

/// What all nodes of a world have in common.
#[derive(Debug, Clone)]
pub struct Limits {
    pub segment_bytes: u64,
    pub snapshot_count: u64,
    pub catchup_entries: u64,
    pub snapshot_keep: usize,
    pub request_timeout: Duration,
    pub peer_events_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            segment_bytes: 16 << 10,
            snapshot_count: 100,
            catchup_entries: 20,
            snapshot_keep: 2,
            request_timeout: Duration::from_secs(5),
            peer_events_max: 256,
        }
    }
}

impl Limits {
    pub fn policy(&self) -> Policy {
        Policy {
            count: self.snapshot_count,
            interval: Duration::ZERO,
            min_entries: 1,
            log_bytes: 1 << 20,
            catchup_entries: self.catchup_entries,
            catchup_bytes: 64 << 10,
            memory_bytes: 16 << 10,
            keep: self.snapshot_keep,
        }
    }
}

pub struct World {
    me: Weak<Mutex<World>>,
    origin: Instant,
    queue: BTreeMap<(Millis, u64), Action>,
    sequence: u64,
    /// When the world is going to wake, unless it is woken.
    wakes_at: Millis,
    wake: Arc<Notify>,
    pub rng: Rng,
    /// A script says who starts and what a power cut leaves. Little is left to chance, so that its story changes with
    /// what the nodes do, and not with who drew which number.
    pub scripted: bool,
    pub limits: Limits,
    pub hosts: BTreeMap<u64, Host>,
    /// IDs that the operator asked to have removed; and whether another request is in doubt.
    pub leaving: BTreeMap<u64, bool>,
    /// Who has a member's data directory on record, by witness and member.
    pub witnesses: BTreeSet<(u64, u64)>,
    /// IDs whose addition, or removal, was acknowledged.
    pub added: BTreeSet<u64>,
    pub gone: BTreeSet<u64>,
    pub net: Network,
    pub oracle: Oracle,
    pub history: History,
    /// Writes on their way, by client.
    pub open: BTreeMap<u64, Operation>,
    trace: Xxh3,
    /// What happened, in words; kept where somebody is to read it.
    pub diary: Option<Vec<String>>,
}

impl World {
    pub fn new(seed: u64, limits: Limits) -> Shared {
        Arc::new_cyclic(|me| {
            Mutex::new(World {
                me: me.clone(),
                origin: Instant::now(),
                queue: BTreeMap::new(),
                sequence: 0,
                wakes_at: 0,
                wake: Arc::default(),
                rng: Rng::with_seed(seed),
                scripted: false,
                limits,
                hosts: BTreeMap::new(),
                leaving: BTreeMap::new(),
                witnesses: BTreeSet::new(),
                added: BTreeSet::new(),
                gone: BTreeSet::new(),
                net: Network::default(),
                oracle: Oracle::default(),
                history: History::new(),
                open: BTreeMap::new(),
                trace: Xxh3::new(),
                diary: None,
            })
        })
    }

    pub fn now(&self) -> Millis {
        self.origin.elapsed().as_millis() as Millis
    }

    /// A number that rises with time and tells apart what happens within a millisecond.
    pub fn instant(&mut self) -> u64 {
        self.sequence += 1;
        (self.now() << 32) + self.sequence
    }

    /// The world as a task holds it.
    pub fn shared(&self) -> Shared {
        self.me.upgrade().expect("whoever calls holds it")
    }

    /// Has something happen after so long.
    pub fn after(&mut self, delay: Millis, action: impl FnOnce(&mut World) + Send + 'static) {
        let at = self.now() + delay;
        self.sequence += 1;
        self.queue.insert((at, self.sequence), Box::new(action));
        if at < self.wakes_at {
            self.wake.notify_one();
        }
    }

    /// Writes down what happens: two runs of one seed must write the same.
    pub fn note(&mut self, event: fmt::Arguments<'_>) {
        let now = self.now();
        self.mark(&[now]);
        let text = event.to_string();
        self.trace.update(text.as_bytes());
        tracing::info!("{:.3} {text}", now as f64 / 1000.0);
        if let Some(diary) = &mut self.diary {
            diary.push(format!("{:>8.3} {text}", now as f64 / 1000.0));
        }
    }

    /// As [`World::note`], for what happens too often to be told.
    pub fn mark(&mut self, numbers: &[u64]) {
        for number in numbers {
            self.trace.update(&number.to_le_bytes());
        }
    }

    /// A digest of all that happened.
    pub fn trace(&self) -> u64 {
        self.trace.digest()
    }

    fn pop_due(&mut self) -> Option<Action> {
        let now = self.now();
        let first = self.queue.first_entry().filter(|first| first.key().0 <= now)?;
        Some(first.remove())
    }
}

/// Locks the world. Where a holder panicked the run has failed, and says why elsewhere.
pub fn lock(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets time pass until `end`, or until an oracle has seen enough.
pub async fn run_until(world: &Shared, end: Millis) {
    let (origin, wake) = {
        let world = lock(world);
        (world.origin, world.wake.clone())
    };
    loop {
        let until = {
            let mut world = lock(world);
            while !world.oracle.has_failed()
                && let Some(action) = world.pop_due()
            {
                action(&mut world);
            }
            if world.oracle.has_failed() || world.now() >= end {
                world.wakes_at = 0;
                return;
            }
            let next = world.queue.first_key_value().map_or(end, |((at, _), _)| *at);
            world.wakes_at = next.min(end);
            world.wakes_at
        };
        tokio::select! {
            biased;
            () = wake.notified() => {}
            () = sleep_until(origin + Duration::from_millis(until)) => {}
        }
    }
}
