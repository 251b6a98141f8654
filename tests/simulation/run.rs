//! One seed from its beginning to its verdict, and many of them.

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use fastrand::Rng;

use crate::clients::{self, read, write};
use crate::panics;
use crate::weather::{self, Forecast};
use crate::world::{Millis, Shared, World, lock, run_until};

/// After the weather has cleared, all must be well again within this time.
const CALM_MILLIS: Millis = 60_000;

#[derive(Debug, Clone, Copy)]
pub struct Length {
    pub weather_millis: Millis,
}

#[derive(Debug)]
pub struct Outcome {
    pub failure: Option<String>,
    pub diary: Vec<String>,
    pub trace: u64,
    pub simulated_millis: Millis,
    pub operations: usize,
    pub commits: usize,
    pub terms: usize,
}

impl Outcome {
    pub fn report(&self, seed: u64, length: Length) -> String {
        let mut text = String::new();
        for line in self.diary.iter().rev().take(60).rev() {
            writeln!(text, "{line}").expect("a string takes it");
        }
        let failure = self.failure.as_deref().unwrap_or("no failure");
        let seconds = length.weather_millis / 1000;
        write!(text, "seed {seed}: {failure}\nReplay it: scripts/simulate --seconds {seconds} {seed}")
            .expect("as above");
        text
    }

    pub fn summary(&self, seed: u64) -> String {
        format!(
            "seed {seed}: {:.1} s, {} operations, {} entries, {} terms led, trace {:016x}",
            self.simulated_millis as f64 / 1000.0,
            self.operations,
            self.commits,
            self.terms,
            self.trace
        )
    }
}

/// Runs one seed on this thread.
pub fn run(seed: u64, length: Length, tell: bool) -> Outcome {
    raftkv::blocking::in_place();
    panics::keep();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime");
    let mut rng = Rng::with_seed(seed);
    let forecast = Forecast::of(&mut rng);
    let world = {
        let _clock = runtime.enter();
        World::new(rng.u64(..), forecast.limits.clone())
    };
    let ran = catch_unwind(AssertUnwindSafe(|| runtime.block_on(one(&world, &forecast, length, tell))));
    panics::print();
    if ran.is_err() {
        lock(&world).oracle.fail(format!("a start or the world panicked: {}", panics::last()));
    }
    let _clock = runtime.enter();
    verdict(&world)
}

async fn one(world: &Shared, forecast: &Forecast, length: Length, tell: bool) {
    {
        let mut world = lock(world);
        world.diary = tell.then(Vec::new);
        world.note(format_args!("{forecast:?}"));
        for id in 1..=forecast.founders {
            world.add_host(id, true);
            let skew = world.rng.u64(0..=2 * forecast.skew);
            world.host(id).tick = std::time::Duration::from_millis(100 - forecast.skew + skew);
        }
        world.oracle.founded(1..=forecast.founders);
        weather::set_fair(&mut world, forecast);
        for id in 1..=forecast.founders {
            let pause = world.rng.u64(0..300);
            world.after(pause, move |world| world.start(id));
        }
        weather::strike_on(&mut world, forecast.clone(), length.weather_millis);
    }
    clients::start(world, forecast.habits, length.weather_millis);
    run_until(world, length.weather_millis).await;
    weather::clear(&mut lock(world), forecast);
    calm(world, forecast.habits.keys).await;
}

/// Once faults end there is progress: every member serves reads and writes, and all agree.
pub async fn calm(world: &Shared, keys: u64) {
    let began = lock(world).now();
    let mut last = String::new();
    loop {
        let now = lock(world).now();
        if lock(world).oracle.has_failed() {
            return;
        }
        if now >= began + CALM_MILLIS {
            lock(world).oracle.fail(format!("no progress in fair weather: {last}"));
            return;
        }
        run_until(world, now + 500).await;
        let now = lock(world).now();
        let task = tokio::spawn(settle(world.clone(), keys));
        while !task.is_finished() && !lock(world).oracle.has_failed() && lock(world).now() < now + 2 * CALM_MILLIS {
            let now = lock(world).now();
            run_until(world, now + 50).await;
        }
        if !task.is_finished() {
            lock(world).oracle.fail("some request in fair weather gets no answer at all".to_owned());
            return;
        }
        match task.await {
            Ok(Ok(())) => return,
            Ok(Err(why)) => last = why,
            Err(error) => last = error.to_string(),
        }
    }
}

async fn settle(world: Shared, keys: u64) -> Result<(), String> {
    let expected: Vec<u64> = weather::expected(&lock(&world)).into_iter().collect();
    let down: Vec<u64> = expected.iter().copied().filter(|id| lock(&world).hosts[id].process.is_none()).collect();
    down.iter().for_each(|id| lock(&world).start(*id));
    if !down.is_empty() {
        return Err(format!("hosts {down:?} are down"));
    }
    for id in &expected {
        let value = format!("last.{id}.{}", lock(&world).now());
        write(&world, 1_000_000 + id, *id, b"key0".to_vec(), value.into())
            .await
            .map_err(|error| format!("no write at host {id}: {error}"))?;
    }
    weather::check_members(&lock(&world))?;
    for id in &expected {
        for key in 0..keys {
            let key = format!("key{key}").into_bytes();
            read(&world, 1_000_000 + id, *id, key).await.map_err(|error| format!("no read at host {id}: {error}"))?;
        }
    }
    for id in &expected {
        let service = lock(&world).hosts[id].process.as_ref().map(|process| process.service.clone());
        let Some(service) = service else { return Err(format!("host {id} is down")) };
        let status = service.status().await.map_err(|error| error.to_string())?;
        let queues = &status.node.queues;
        if queues.proposals + queues.proposed_bytes + queues.reads > 0 {
            return Err(format!("at host {id} something waits: {queues:?}"));
        }
        let last = lock(&world).oracle.last();
        if status.applied != last {
            return Err(format!("host {id} has applied {} of {last}", status.applied));
        }
    }
    Ok(())
}

fn verdict(world: &Shared) -> Outcome {
    let mut world = lock(world);
    let open = std::mem::take(&mut world.open);
    open.into_values().for_each(|operation| world.history.push(operation));
    if !world.oracle.has_failed()
        && let Err(violation) = world.history.check()
    {
        let text = violation.to_string();
        world.oracle.fail(text);
    }
    let hosts = std::mem::take(&mut world.hosts);
    let outcome = Outcome {
        failure: world.oracle.failure().map(str::to_owned),
        diary: world.diary.take().unwrap_or_default(),
        trace: world.trace(),
        simulated_millis: world.now(),
        operations: world.history.len(),
        commits: world.oracle.commits(),
        terms: world.oracle.elections(),
    };
    drop(hosts);
    outcome
}

/// Seeds to run, and how far to go.
pub struct Batch {
    pub first: u64,
    pub seeds: u64,
    /// No more than `at_least` are begun after it.
    pub deadline: Option<Instant>,
    pub at_least: u64,
    /// The end, too.
    pub failures_max: u64,
    pub threads: u64,
    pub length: Length,
}

/// Runs seed after seed, and tells how it goes. Panics with the first failure.
pub fn many(batch: &Batch) {
    let Batch { first, threads, length, .. } = *batch;
    let (next, done, simulated, operations) =
        (AtomicU64::new(first), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    let failures = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let late = batch.deadline.is_some_and(|deadline| Instant::now() >= deadline);
                    let failed = failures.lock().expect("no panic").len() as u64;
                    let nth = seed - first;
                    if (late && nth >= batch.at_least) || nth >= batch.seeds || failed >= batch.failures_max {
                        return;
                    }
                    let outcome = run(seed, length, false);
                    simulated.fetch_add(outcome.simulated_millis, Ordering::Relaxed);
                    operations.fetch_add(outcome.operations as u64, Ordering::Relaxed);
                    if let Some(failure) = &outcome.failure {
                        println!("seed {seed} FAILED: {failure}");
                        failures.lock().expect("no panic").push(seed);
                    }
                    let count = done.fetch_add(1, Ordering::Relaxed) + 1;
                    if count.is_multiple_of(1000) {
                        println!("{count} seeds, {:.0} s", began.elapsed().as_secs_f64());
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no panic");
    let (seconds, elapsed) = (simulated.into_inner() as f64 / 1000.0, began.elapsed().as_secs_f64());
    println!(
        "{} seeds from {first}: {:.1} simulated hours, {} operations, in {elapsed:.1} s on {threads} threads: {:.0} times \
         real time each; {} failed",
        done.into_inner(),
        seconds / 3600.0,
        operations.into_inner(),
        seconds / elapsed / threads as f64,
        failures.len()
    );
    if let Some(seed) = failures.first() {
        let outcome = run(*seed, length, true);
        panic!("\n{}", outcome.report(*seed, length));
    }
}
