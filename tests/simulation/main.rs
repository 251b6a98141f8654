//! The deterministic simulation: clusters of the shipped node, log, store and service in a world of bad luck. One seed
//! is one run, to the byte. `scripts/simulate` runs as many as one likes; here a kept few run with every test.

mod clients;
mod damage;
#[path = "../history/mod.rs"]
mod history;
mod host;
mod network;
mod oracle;
mod panics;
mod run;
mod weather;
mod world;

use std::time::{Duration, Instant};

use run::{Length, run};

/// A run of the seeds that are kept is this long.
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
    for line in include_str!("seeds.txt").lines().filter(|line| !line.starts_with('#')) {
        let seed: u64 = line.split_whitespace().next().and_then(|seed| seed.parse().ok()).expect("a seed");
        let outcome = run(seed, SHORT, false);
        assert!(outcome.failure.is_none(), "{}", outcome.report(seed, SHORT));
    }
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
    let first = number("SIMULATE_FIRST").unwrap_or(0);
    let seeds = number("SIMULATE_SEEDS").unwrap_or(u64::MAX);
    let minutes = number("SIMULATE_MINUTES").map(|minutes| Duration::from_secs(60 * minutes));
    let (threads, failures_max) = (number("SIMULATE_THREADS").unwrap_or(1), number("SIMULATE_FAILURES").unwrap_or(10));
    run::many(first, seeds, failures_max, minutes.map(|minutes| Instant::now() + minutes), threads, length);
}
