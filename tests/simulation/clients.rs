//! Clients: each asks one host after the other for one thing after the other, and writes down what it saw. Values are
//! unique, so that what is read tells who wrote it.

use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use raftkv::channel::Rejection;
use raftkv::kv::{Consistency, Error, Service};
use tokio::time::{sleep, timeout};

use crate::history::{Call, Operation, Outcome};
use crate::world::{Millis, Shared, World, lock};

/// What a node may need beyond the request time-out to give its word.
const GRACE: Duration = Duration::from_secs(2);

/// How the clients behave.
#[derive(Debug, Clone, Copy)]
pub struct Habits {
    pub clients: u64,
    pub keys: u64,
    /// Between two requests of one client, on average.
    pub pause_millis: Millis,
    /// Of 100 requests.
    pub reads: u32,
    pub value_bytes: usize,
    /// Requests that one client has in flight at once.
    pub burst: u64,
}

/// Starts the clients. They ask until the world says that it is enough.
pub fn start(world: &Shared, habits: Habits, until: Millis) {
    for client in 1..=habits.clients {
        for lane in 0..habits.burst {
            let rng = lock(world).rng.fork();
            let world = world.clone();
            tokio::spawn(async move { ask_on(&world, client * 100 + lane, habits, until, rng).await });
        }
    }
}

async fn ask_on(world: &Shared, client: u64, habits: Habits, until: Millis, mut rng: Rng) {
    let mut counter = 0;
    loop {
        sleep(Duration::from_millis(rng.u64(1..=2 * habits.pause_millis))).await;
        let host = {
            let world = lock(world);
            if world.now() >= until || world.oracle.has_failed() {
                return;
            }
            let running = world.running();
            if running.is_empty() { None } else { Some(running[rng.usize(0..running.len())]) }
        };
        let Some(host) = host else { continue };
        let key = format!("key{}", rng.u64(0..habits.keys)).into_bytes();
        // Whatever comes of it stands in the history.
        if rng.u32(0..100) < habits.reads {
            read(world, client, host, key).await.ok();
        } else {
            counter += 1;
            let mut value = format!("{client}.{counter}.").into_bytes();
            value.resize(value.len().max(rng.usize(0..=habits.value_bytes)), b'.');
            write(world, client, host, key, value.into()).await.ok();
        }
    }
}

/// A client's view of a host for one request.
struct Asked {
    host: u64,
    life: u64,
    service: Service,
    invoked: u64,
    patience: Duration,
}

fn ask(world: &mut World, host: u64) -> Option<Asked> {
    let invoked = world.instant();
    let process = world.hosts[&host].process.as_ref()?;
    let patience = world.limits.request_timeout + GRACE;
    let service = process.service.clone();
    Some(Asked { host, life: process.life, service, invoked, patience })
}

impl Asked {
    /// Whoever asks a node that goes on undisturbed gets a word in time.
    fn judge(&self, world: &mut World, in_time: bool, gone: bool) {
        let undisturbed = world.process(self.host, self.life).is_some_and(|process| {
            !process.was_frozen && !process.stopping && world.hosts[&self.host].sync_millis < 500
        });
        if undisturbed && !in_time {
            world.oracle.fail(format!("host {} left a request without a word for {:?}", self.host, self.patience));
        }
        if undisturbed && gone && !world.hosts[&self.host].disk_hurt {
            world.oracle.fail(format!("host {} dropped a request", self.host));
        }
    }
}

/// Writes, and says whether it was done.
pub async fn write(world: &Shared, client: u64, host: u64, key: Vec<u8>, value: Bytes) -> Result<(), Error> {
    let Some(asked) = ask(&mut lock(world), host) else { return Err(Error::NotApplied(Rejection::Stopping)) };
    let (call, invoked) = (Call::Put(value.to_vec()), asked.invoked);
    let open = Operation { client, key: key.clone(), call, invoked, outcome: Outcome::Unknown };
    lock(world).open.insert(client, open.clone());
    let answer = timeout(asked.patience, asked.service.put(&key, &value)).await;
    let mut world = lock(world);
    world.open.remove(&client);
    let gone = matches!(answer, Ok(Err(Error::NotApplied(Rejection::Stopping))));
    asked.judge(&mut world, answer.is_ok(), gone);
    let at = world.instant();
    let answer = answer.unwrap_or(Err(Error::Unknown));
    let outcome = match &answer {
        Ok(written) => {
            world.oracle.acknowledged(&value, *written);
            Outcome::Done { at, read: None }
        }
        Err(Error::NotApplied(_)) => {
            world.oracle.rejected(value.clone());
            Outcome::NotApplied
        }
        Err(Error::Unknown) => Outcome::Unknown,
        Err(error) => {
            world.oracle.fail(format!("host {host} refuses a sane write: {error}"));
            Outcome::NotApplied
        }
    };
    let done = u64::from(matches!(outcome, Outcome::Done { .. }));
    world.mark(&[5, client, host, at, done]);
    world.history.push(Operation { outcome, ..open });
    answer.map(drop)
}

/// Reads, linearizably.
pub async fn read(world: &Shared, client: u64, host: u64, key: Vec<u8>) -> Result<Option<Bytes>, Error> {
    let Some(asked) = ask(&mut lock(world), host) else { return Err(Error::NotApplied(Rejection::Stopping)) };
    let answer = timeout(asked.patience, asked.service.get(&key, Consistency::Linearizable)).await;
    let mut world = lock(world);
    let gone = matches!(answer, Ok(Err(Error::NotApplied(Rejection::Stopping))));
    asked.judge(&mut world, answer.is_ok(), gone);
    let at = world.instant();
    let found = answer.unwrap_or(Err(Error::Unknown))?.entry.map(|entry| entry.to_bytes());
    world.mark(&[6, client, host, at]);
    let outcome = Outcome::Done { at, read: found.as_ref().map(|value| value.to_vec()) };
    world.history.push(Operation { client, key, call: Call::Get, invoked: asked.invoked, outcome });
    Ok(found)
}
