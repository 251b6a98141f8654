//! The weather: what a seed holds for a cluster, and how it strikes. Each seed takes a few kinds of fault, not all at
//! once, so that each kind meets calm and storm; limits are small, so that what is rare in life is daily here.

use std::collections::BTreeSet;
use std::time::Duration;

use fastrand::Rng;
use raftkv::channel::{Change, ChangeFailure};
use raftkv::wal::disk_memory::MemoryDisk;

use crate::clients::Habits;
use crate::damage;
use crate::host::{Host, State, member};
use crate::world::{Limits, Millis, World};

/// More members than this are not added.
const MEMBERS_MAX: usize = 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// Power is lost, now or at one of the next operations of the disk.
    PowerCut,
    /// All hosts at once.
    Blackout,
    Kill,
    Freeze,
    Partition,
    OneWay,
    BadNetwork,
    SlowDisk,
    FullDisk,
    FailedOperation,
    FlippedBit,
    Wipe,
    ClockJump,
    Stop,
    /// Each in its turn, as for an upgrade; who leads hands over.
    RollingRestart,
    Add,
    Remove,
}

const ALL: [Fault; 17] = [
    Fault::PowerCut,
    Fault::Blackout,
    Fault::Kill,
    Fault::Freeze,
    Fault::Partition,
    Fault::OneWay,
    Fault::BadNetwork,
    Fault::SlowDisk,
    Fault::FullDisk,
    Fault::FailedOperation,
    Fault::FlippedBit,
    Fault::Wipe,
    Fault::ClockJump,
    Fault::Stop,
    Fault::RollingRestart,
    Fault::Add,
    Fault::Remove,
];

/// What a seed holds.
#[derive(Debug, Clone)]
pub struct Forecast {
    pub founders: u64,
    pub limits: Limits,
    pub habits: Habits,
    pub faults: Vec<Fault>,
    /// Between two faults, on average.
    pub pause_millis: Millis,
    pub latency: Millis,
    pub jitter: Millis,
    /// Per mille, in good times.
    pub loss: u32,
    pub duplicates: u32,
    pub sync_millis: Millis,
    /// Ticks of the hosts differ by so many per cent.
    pub skew: u64,
}

impl Forecast {
    pub fn of(rng: &mut Rng) -> Self {
        let founders = pick(rng, &[1, 2, 3, 3, 3, 3, 3, 3, 4, 5, 5, 5, 6, 7]);
        let chance = pick(rng, &[15, 30, 60]);
        let faults: Vec<Fault> = ALL.into_iter().filter(|_| rng.u32(0..100) < chance).collect();
        Forecast {
            founders,
            limits: Limits {
                segment_bytes: pick(rng, &[12 << 10, 16 << 10, 64 << 10]),
                snapshot_count: pick(rng, &[5, 20, 50, 200, 1_000_000]),
                catchup_entries: pick(rng, &[0, 5, 50]),
                snapshot_keep: pick(rng, &[1, 2]),
                request_timeout: Duration::from_secs(pick(rng, &[2, 5])),
                peer_events_max: pick(rng, &[4, 32, 256]),
            },
            habits: Habits {
                clients: pick(rng, &[1, 2, 4]),
                keys: pick(rng, &[1, 2, 5]),
                pause_millis: pick(rng, &[200, 500, 1500]),
                reads: pick(rng, &[20, 50, 80]),
                value_bytes: pick(rng, &[0, 20, 300]),
                burst: pick(rng, &[1, 1, 1, 4]),
            },
            faults,
            pause_millis: pick(rng, &[500, 2000, 8000]),
            latency: pick(rng, &[1, 1, 5]),
            jitter: pick(rng, &[0, 2, 20]),
            loss: pick(rng, &[0, 0, 1, 10]),
            duplicates: pick(rng, &[0, 0, 10]),
            sync_millis: pick(rng, &[0, 1, 10]),
            skew: pick(rng, &[0, 0, 3, 10]),
        }
    }
}

fn pick<T: Copy>(rng: &mut Rng, choices: &[T]) -> T {
    choices[rng.usize(0..choices.len())]
}

/// Makes the world what the forecast says, in good times.
pub fn set_fair(world: &mut World, forecast: &Forecast) {
    world.net.latency = forecast.latency;
    world.net.jitter = forecast.jitter;
    world.net.loss = forecast.loss;
    world.net.duplicates = forecast.duplicates;
    world.net.cut.clear();
    let ids: Vec<u64> = world.hosts.keys().copied().collect();
    for id in ids {
        let host = world.host(id);
        host.sync_millis = forecast.sync_millis;
        host.disk.set_capacity(None);
        world.thaw(id);
    }
}

/// Strikes now and then, until `until`.
pub fn strike_on(world: &mut World, forecast: Forecast, until: Millis) {
    if forecast.faults.is_empty() {
        return;
    }
    let pause = world.rng.u64(1..=2 * forecast.pause_millis);
    world.after(pause, move |world| {
        if world.now() < until {
            let fault = pick(&mut world.rng, &forecast.faults);
            strike(world, &forecast, fault);
            strike_on(world, forecast, until);
        }
    });
}

fn strike(world: &mut World, forecast: &Forecast, fault: Fault) {
    let hosts: Vec<u64> = world.hosts.values().filter(|host| host.state == State::Well).map(|host| host.id).collect();
    if hosts.is_empty() {
        return;
    }
    let id = pick(&mut world.rng, &hosts);
    let lasts = world.rng.u64(100..10_000);
    world.note(format_args!("{fault:?} at {id}, {lasts} ms"));
    match fault {
        Fault::PowerCut => power_cut(world, id),
        Fault::Blackout => hosts.into_iter().for_each(|id| power_cut(world, id)),
        Fault::Kill => {
            let life = world.hosts[&id].life;
            world.kill(id, life);
            world.after(lasts / 3, move |world| world.start(id));
        }
        Fault::Freeze => {
            world.freeze(id);
            world.after(lasts, move |world| world.thaw(id));
        }
        Fault::Partition => {
            let (one, other): (Vec<u64>, Vec<u64>) = hosts.into_iter().partition(|_| world.rng.bool());
            let pairs: Vec<_> = one.iter().flat_map(|a| other.iter().map(move |b| (*a, *b))).collect();
            let pairs = pairs.into_iter().flat_map(|(a, b)| [(a, b), (b, a)]).collect();
            cut(world, pairs, lasts);
        }
        Fault::OneWay => {
            let from_it = world.rng.bool();
            let others = hosts.into_iter().filter(|other| *other != id);
            let pairs = others.map(|other| if from_it { (id, other) } else { (other, id) }).collect();
            cut(world, pairs, lasts);
        }
        Fault::BadNetwork => {
            world.net.loss = pick(&mut world.rng, &[20, 100, 400]);
            world.net.jitter = pick(&mut world.rng, &[5, 50, 500]);
            world.net.duplicates = pick(&mut world.rng, &[0, 100]);
            let (loss, jitter, duplicates) = (forecast.loss, forecast.jitter, forecast.duplicates);
            world.after(lasts, move |world| {
                (world.net.loss, world.net.jitter, world.net.duplicates) = (loss, jitter, duplicates)
            });
        }
        Fault::SlowDisk => {
            world.host(id).sync_millis = pick(&mut world.rng, &[50, 500, 3000]);
            let fair = forecast.sync_millis;
            world.after(lasts, move |world| world.host(id).sync_millis = fair);
        }
        Fault::FullDisk => {
            let room = world.rng.u64(0..2 * world.limits.segment_bytes);
            let host = world.host(id);
            let used = host.disk.used_bytes();
            host.disk_filled = true;
            host.disk.set_capacity(Some(used + room));
            world.after(lasts, move |world| world.host(id).disk.set_capacity(None));
        }
        Fault::FailedOperation => {
            let ahead = world.rng.u64(0..20);
            let host = world.host(id);
            host.disk_hurt = true;
            host.disk.fail_at(host.disk.operations() + ahead);
            // The process stops by itself; somebody starts it again.
            world.after(lasts, move |world| world.start(id));
        }
        Fault::FlippedBit => flip(world, id),
        Fault::Wipe => wipe(world, id),
        Fault::ClockJump => world.host(id).clock_micros = world.rng.i64(-10_000_000..10_000_000),
        Fault::Stop => {
            world.stop(id);
            world.after(lasts, move |world| world.start(id));
        }
        Fault::RollingRestart => {
            for (nth, id) in hosts.into_iter().enumerate() {
                let at = nth as Millis * 2000;
                world.after(at, move |world| world.stop(id));
                world.after(at + 1000, move |world| world.start(id));
            }
        }
        Fault::Add => add(world),
        Fault::Remove => remove(world, id),
    }
}

fn power_cut(world: &mut World, id: u64) {
    let host = world.host(id);
    if host.process.is_some() {
        // In the middle of one of the next operations; if none comes, nothing is lost by waiting.
        let ahead = world.rng.u64(0..12);
        let host = world.host(id);
        host.disk.stop_at(host.disk.operations() + ahead);
    } else {
        world.power_is_out(id);
    }
}

fn cut(world: &mut World, pairs: Vec<(u64, u64)>, lasts: Millis) {
    world.net.cut.extend(pairs.iter().copied());
    world.after(lasts, move |world| world.net.cut.retain(|pair| !pairs.contains(pair)));
}

/// Whether the cluster goes on if one more loses its data: no system of this kind survives the loss of a majority.
fn can_lose_one(world: &World) -> bool {
    let voters = world.oracle.voters();
    // Elections go by the membership that a member knows to be committed: a majority must know of the newest.
    let well = |id: &&u64| {
        let host = &world.hosts[*id];
        host.process.is_some()
            && world.oracle.knows_voters(**id)
            && !host.wiped
            && !host.damaged
            && !world.leaving.contains_key(id)
    };
    // A learner may become a voter any time, by an entry that its own loss came too late for.
    let members = world.oracle.members();
    [voters, members].iter().all(|ids| ids.iter().filter(well).count() > ids.len() / 2 + 1)
}

/// Flips a bit on the disk of a host, as far as it may be noticed, and starts it.
fn flip(world: &mut World, id: u64) {
    if !can_lose_one(world) {
        return;
    }
    let life = world.hosts[&id].life;
    world.kill(id, life);
    let mut rng = world.rng.fork();
    let segment_bytes = world.limits.segment_bytes;
    match damage::flip(&world.hosts[&id].disk, segment_bytes, &mut rng) {
        Ok(Some(flip)) => {
            world.note(format_args!("host {id}: a bit is flipped, {flip}"));
            let host = world.host(id);
            host.damaged = true;
            host.flipped.insert(flip.file);
        }
        Ok(None) => {}
        Err(why) => world.oracle.fail(format!("host {id}: {why}")),
    }
    world.start(id);
    replace_if_lost(world, id);
}

fn wipe(world: &mut World, id: u64) {
    // The only founder, its directory empty, founds its cluster anew: nobody is left whom it would have to ask.
    let only_founder = world.hosts.values().filter(|host| !host.joiner).all(|host| host.id == id);
    // Whom only some have met, may meet the others first when it comes back.
    let is_known = world.oracle.voters().iter().all(|voter| *voter == id || world.witnesses.contains(&(*voter, id)));
    if only_founder || !is_known || !can_lose_one(world) || world.hosts[&id].life == 0 {
        return;
    }
    let life = world.hosts[&id].life;
    world.kill(id, life);
    let seed = world.rng.u64(..);
    let host = world.host(id);
    host.disk = MemoryDisk::seeded(seed);
    host.flipped.clear();
    host.wiped = true;
    world.note(format_args!("host {id}: its directory is emptied"));
    world.start(id);
    replace_if_lost(world, id);
}

/// What an operator does about a member whose data are lost: removes it, and adds another.
fn replace_if_lost(world: &mut World, id: u64) {
    world.after(3000, move |world| match world.hosts[&id].state {
        State::Lost(_) => {
            remove(world, id);
            add(world);
            replace_if_lost(world, id);
        }
        State::Well if world.hosts[&id].wiped => replace_if_lost(world, id),
        State::Well | State::Removed => {}
    });
}

fn members(world: &World) -> Vec<u64> {
    world.hosts.values().filter(|host| host.state == State::Well && !host.wiped).map(|host| host.id).collect()
}

fn add(world: &mut World) {
    let removed: Vec<u64> =
        world.hosts.values().filter(|host| host.state == State::Removed).map(|host| host.id).collect();
    if !removed.is_empty() && world.rng.u32(0..3) == 0 {
        // An operator's mistake, to be refused.
        let id = pick(&mut world.rng, &removed);
        return reconfigure(world, Change::Add(member(id)), id);
    }
    if members(world).len() >= MEMBERS_MAX {
        return;
    }
    let id = world.hosts.last_key_value().map_or(1, |(last, _)| last + 1);
    world.add_host(id, false);
    reconfigure(world, Change::Add(member(id)), id);
}

fn remove(world: &mut World, id: u64) {
    let is_lost = world.hosts[&id].state != State::Well || world.hosts[&id].wiped;
    if is_lost || can_lose_one(world) {
        // Of two requests nobody knows which it was that came through.
        world.leaving.entry(id).and_modify(|doubt| *doubt = true).or_insert(false);
        world.oracle.may_leave(id);
        reconfigure(world, Change::Remove(id), id);
    }
}

/// Asks some member for a change, once; what becomes of it shows later.
fn reconfigure(world: &mut World, change: Change, id: u64) {
    let running: Vec<u64> = world.running().into_iter().filter(|host| *host != id).collect();
    if running.is_empty() {
        return;
    }
    let at = pick(&mut world.rng, &running);
    let service = world.hosts[&at].process.as_ref().expect("it runs").service.clone();
    let shared = world.shared();
    tokio::spawn(async move {
        let outcome = service.reconfigure(change.clone()).await;
        let mut world = crate::world::lock(&shared);
        world.note(format_args!("{change:?} at {at}: {outcome:?}"));
        let surely_not =
            matches!(outcome, Err(ChangeFailure::Rejected(_) | ChangeFailure::Invalid(_) | ChangeFailure::Conflict(_)));
        match change {
            Change::Add(_) => {
                if outcome.is_ok() {
                    world.added.insert(id);
                } else if surely_not && world.hosts[&id].state == State::Well {
                    world.oracle.not_added(id);
                }
                world.start(id);
            }
            Change::Remove(_) if outcome.is_ok() => {
                world.gone.insert(id);
                let host = world.host(id);
                if host.state != State::Well || host.process.is_none() {
                    host.state = State::Removed;
                }
            }
            Change::Remove(_) if surely_not => {
                // Unless somebody asked for it before.
                if world.leaving.get(&id) == Some(&false) {
                    world.leaving.remove(&id);
                    world.oracle.not_removed(id);
                }
            }
            Change::Remove(_) => drop(world.leaving.insert(id, true)),
            Change::Promote(_) => {}
        }
    });
}

/// All that was made bad is made good, and whoever may start is started.
pub fn clear(world: &mut World, forecast: &Forecast) {
    let forecast = Forecast { loss: 0, ..forecast.clone() };
    set_fair(world, &forecast);
    let ids: Vec<u64> = world.hosts.keys().copied().collect();
    for id in ids {
        // Faults that were to come, do not.
        world.host(id).disk.heal();
        world.start(id);
    }
    world.note(format_args!("the weather clears"));
}

/// Hosts that belong to the cluster and must come back once the weather is fair: those that took part, and those whose
/// addition was acknowledged.
pub fn expected(world: &World) -> BTreeSet<u64> {
    let takes_part = |host: &&Host| host.life > 0 || world.added.contains(&host.id);
    let well = |host: &&Host| host.state == State::Well && !host.wiped && !world.leaving.contains_key(&host.id);
    world.hosts.values().filter(well).filter(takes_part).map(|host| host.id).collect()
}

/// Whether the members are as those who asked were told; and whether the world left a majority to try anything with.
pub fn check_members(world: &World) -> Result<(), String> {
    let (members, voters) = (world.oracle.members(), world.oracle.voters());
    if let Some(id) = world.gone.intersection(members).next() {
        return Err(format!("member {id} is there, and who asked was told that it is removed"));
    }
    let mut added = world.added.iter().filter(|id| !world.leaving.contains_key(id));
    if let Some(id) = added.find(|id| !voters.contains(id) && world.hosts[id].state == State::Well) {
        return Err(format!("member {id} was added, and does not vote"));
    }
    let well = |id: &&u64| world.hosts[*id].process.is_some() && !world.hosts[*id].wiped;
    if voters.iter().filter(well).count() <= voters.len() / 2 {
        return Err(format!("of {voters:?} too few are left"));
    }
    Ok(())
}
