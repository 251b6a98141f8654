//! The deterministic simulation: clusters of the shipped node, log, store and service in a world of bad luck. One seed
//! is one run, to the byte. `scripts/simulate` runs as many as one likes; here a kept few run with every test.

mod clients;
mod damage;
#[path = "../history/mod.rs"]
mod history;
mod host;
mod narrator;
mod network;
mod oracle;
mod panics;
mod run;
mod script;
mod weather;
mod world;

use std::time::{Duration, Instant};

use run::{Batch, Length, run};

/// Long enough for a few faults.
const SHORT: Length = Length { weather_millis: 20_000 };

#[test]
fn a_seed_replays_to_the_byte() {
    for seed in 0..4 {
        let [first, second] = [(); 2].map(|()| run(seed, SHORT, true));
        assert_eq!(first.diary, second.diary, "seed {seed}");
        assert_eq!(first.trace, second.trace, "seed {seed}");
    }
}

#[test]
fn no_kept_seed_fails() {
    let lines = include_str!("seeds.txt").lines().filter(|line| !line.starts_with('#'));
    let kept = lines.map(|line| {
        let mut numbers = line.split_whitespace().map(|word| word.parse::<u64>());
        let mut next = || numbers.next().and_then(Result::ok).expect("a seed and its seconds");
        (next(), Length { weather_millis: next() * 1000 })
    });
    let kept = std::sync::Mutex::new(kept);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = kept.lock().expect("no panic").next();
                    let Some((seed, length)) = next else { return };
                    let outcome = run(seed, length, true);
                    assert!(outcome.failure.is_none(), "{}", outcome.report(seed, length));
                }
            });
        }
    });
}

/// Stories for readers, told by the nodes themselves. `RAFTKV_RECORD_SCRIPTS=1` writes them anew: read the difference.
#[test]
fn scripts_tell_the_same_story() {
    script::tell_all();
}

/// What `scripts/simulate` runs, told by its environment.
#[test]
#[ignore = "run by scripts/simulate"]
fn simulate() {
    if std::env::var_os("SIMULATE_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_env("SIMULATE_LOG");
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).without_time().with_target(false).init();
    }
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let length = Length { weather_millis: number("SIMULATE_SECONDS").unwrap_or(300) * 1000 };
    if let Some(seed) = number("SIMULATE_SEED") {
        let outcome = run(seed, length, true);
        outcome.diary.iter().for_each(|line| println!("{line}"));
        println!("{}", outcome.summary(seed));
        assert!(outcome.failure.is_none(), "{}", outcome.report(seed, length));
        return;
    }
    let minutes = number("SIMULATE_MINUTES").map(|minutes| Duration::from_secs(60 * minutes));
    run::many(&Batch {
        first: number("SIMULATE_FIRST").unwrap_or(0),
        seeds: number("SIMULATE_SEEDS").unwrap_or(u64::MAX),
        deadline: minutes.map(|minutes| Instant::now() + minutes),
        at_least: number("SIMULATE_AT_LEAST").unwrap_or(0),
        failures_max: number("SIMULATE_FAILURES").unwrap_or(10),
        threads: number("SIMULATE_THREADS").unwrap_or(1),
        length,
    });
}
