//! Process torment: real processes that are killed, paused, parted, wiped and damaged while clients write and read through
//! every member; then all is mended, the members must agree, and the history must be linearizable. `cargo test` runs it
//! for some seconds with the faults that need no root; `scripts/torment --help` teaches the rest.

#![allow(clippy::unwrap_used, reason = "a test, though clippy does not know one without libtest's harness")]

mod clients;
mod course;
mod dice;
mod disk;
mod faults;
mod flip;
#[allow(dead_code, reason = "a part of it is used here")]
#[path = "../cluster/harness.rs"]
mod harness;
mod helpers;
#[path = "../history/mod.rs"]
mod history;
mod network;
mod options;
mod records;
mod storms;
mod world;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser as _;

use crate::course::Course;
use crate::dice::Dice;
use crate::helpers::Helpers;
use crate::history::{Call, History, Operation};
use crate::network::Network;
use crate::options::{Fault, Options};
use crate::world::World;

/// Between two lines that tell how far a long run is.
const PROGRESS: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let options = Options::parse();
    if !options.is_wanted() {
        return ExitCode::SUCCESS;
    }
    let (mut faults, mut skipped) = (options.faults(), Vec::new());
    faults.retain(|fault| {
        let why = helpers::missing(*fault, options.nodes);
        skipped.extend(why.map(|why| format!("torment: skipped: {}: {why}", fault.name())));
        why.is_none()
    });
    if faults.iter().any(|fault| fault.needs_root()) {
        match helpers::with_own_namespaces() {
            Ok(None) => {}
            Ok(Some(code)) => return code,
            Err(error) => {
                eprintln!("torment: {error:#}");
                return ExitCode::FAILURE;
            }
        }
    }
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = options.seed.unwrap_or_else(|| clock().as_micros() as u64 % 1_000_000_000);
    let home = records::home(seed);
    skipped.iter().for_each(|line| println!("{line}"));
    // Said at once, too: a run may be ended before it ends.
    println!("torment: {}", options.command(seed));
    match torment(&options, &faults, seed, &home) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("torment: FAILED: {error:#}");
            println!("torment: logs, data and history are in {}", home.display());
            println!("torment: repeat it with: {}", options.command(seed));
            ExitCode::FAILURE
        }
    }
}

/// One run, from an empty directory to the verdict. What fails leaves its records behind.
fn torment(options: &Options, faults: &[Fault], seed: u64, home: &Path) -> anyhow::Result<()> {
    records::begin(home)?;
    let course = Course::new(home)?;
    let network = Network::new(seed, faults.contains(&Fault::Packets))?;
    let helpers = Helpers::build(home, faults)?;
    let has_disks = faults.iter().any(|fault| fault.needs_disks());
    let mut world = World::found(options.nodes, home, &course, &network, helpers, has_disks)?;
    let began = Instant::now();
    let (result, mut history) = under_load(&mut world, options, faults, seed, &network);
    let time = began.elapsed();
    let result = result.and_then(|()| settle(&mut world, &mut history));
    let result = result.and_then(|()| records::no_panic(&world.logs()));
    let verdict = history.check();
    records::count_snapshots(&course, &world.logs())?;
    println!("{}", records::summary(options, seed, time, &course, &history, &result, &verdict));
    if result.is_err() || verdict.is_err() || options.keep {
        let kept = records::keep(&mut world, &history, &verdict);
        kept.unwrap_or_else(|error| println!("torment: not all records could be kept: {error:#}"));
    }
    drop(world);
    match (result, verdict) {
        (Ok(()), Ok(_)) => {}
        (Err(error), Ok(_)) => return Err(error),
        (Ok(()), Err(violation)) => anyhow::bail!("{violation}"),
        (Err(error), Err(violation)) => anyhow::bail!("{error:#}\n{violation}"),
    }
    if !options.keep {
        fs::remove_dir_all(home)?;
    }
    Ok(())
}

/// Faults and clients at once; ends with a calm network, and with no request under way.
fn under_load(
    world: &mut World<'_>,
    options: &Options,
    faults: &[Fault],
    seed: u64,
    network: &Network,
) -> (anyhow::Result<()>, History) {
    let course = world.course;
    std::thread::scope(|scope| {
        let pace = Duration::from_secs(options.clients).div_f64(options.rate as f64);
        let clients: Vec<_> = (0..options.clients)
            .map(|client| {
                let dice = Dice::new(seed, 100 + client);
                scope.spawn(move || clients::ask_away(course, client, pace, dice))
            })
            .collect();
        let storms = scope.spawn(|| {
            let stormed = storms::rage(course, network, faults, Dice::new(seed, 1));
            if stormed.is_err() {
                course.calm.ring();
            }
            stormed
        });
        let result = make_faults(world, options, faults, Dice::new(seed, 2));
        course.calm.ring();
        let stormed = storms.join().expect("the storms end");
        course.quiet.ring();
        let mut history = History::new();
        for client in clients {
            client.join().expect("a client ends").into_iter().for_each(|operation| history.push(operation));
        }
        (result.and(stormed), history)
    })
}

/// Faults of the members until the time is over, or enough was counted. Each comes once before any comes again.
fn make_faults(world: &mut World<'_>, options: &Options, faults: &[Fault], mut dice: Dice) -> anyhow::Result<()> {
    let deadline = Instant::now() + options.time_max();
    let mut first: Vec<Fault> = faults.iter().copied().filter(|fault| !fault.is_of_the_network()).collect();
    let any: Vec<Fault> = first.iter().flat_map(|fault| std::iter::repeat_n(*fault, fault.weight())).collect();
    dice.shuffle(&mut first);
    let course = world.course;
    let mut told = course.began.elapsed();
    let has_more = || {
        let short = |what, wanted: Option<u64>| wanted.is_some_and(|wanted| course.counted(what) < wanted);
        let is_counted = options.kills.is_some() || options.partitions.is_some();
        !is_counted || short("kills", options.kills) || short("partitions", options.partitions)
    };
    while Instant::now() < deadline && has_more() {
        // Calm before the end: the storms have failed.
        if !course.calm.rest(dice.millis(50..1_000)) {
            break;
        }
        world.check()?;
        if any.is_empty() {
            continue;
        }
        let fault = first.pop().unwrap_or_else(|| dice.pick(&any));
        // Of its own, for how often one tries again is not repeatable, and what comes next should be.
        faults::make(world, fault, &mut Dice::new(dice.next(), 0))?;
        if course.began.elapsed() > told + PROGRESS {
            told = course.began.elapsed();
            println!("torment: {} s{}", told.as_secs(), records::counts(course));
        }
    }
    world.check()
}

/// All is mended: every member serves, holds the same, and shows for every key what the history allows.
fn settle(world: &mut World<'_>, history: &mut History) -> anyhow::Result<()> {
    world.must_agree()?;
    let agent = course::agent(clients::PATIENCE);
    for member in &world.members {
        for key in clients::all_keys(world.course) {
            let read: Operation = clients::ask(world.course, &agent, 1_000 + member.id, member.port, &key, Call::Get);
            history.push(read);
        }
    }
    world.must_agree()?;
    world.stop()
}
