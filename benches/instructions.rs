//! Runs one workload some number of times, for callgrind to count. `scripts/instructions` calls it and does the sums.

mod workloads;

use std::process::ExitCode;

use workloads::{ALL, Run, Workload};

/// About how many operations are counted: enough to even out what grows now and then, and soon over under valgrind.
const OPERATIONS: u64 = 4096;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--list"] => {
            for Workload { name, operations, .. } in ALL {
                println!("{name} {} {operations}", (OPERATIONS / operations).max(1));
            }
        }
        // By cargo, which runs all that there is in benches.
        [] | [.., "--bench"] => println!("instructions: counted by scripts/instructions"),
        [name, runs] => {
            let workload = ALL.iter().find(|workload| workload.name == name);
            let (Some(workload), Ok(runs)) = (workload, runs.parse()) else {
                eprintln!("no workload {name}, or not a number of runs: {runs}");
                return ExitCode::from(2);
            };
            let mut run = (workload.start)();
            // What is only done the first time is not counted.
            run();
            counted(&mut run, runs);
        }
        _ => {
            eprintln!("usage: instructions --list     name, runs and operations in a run of each workload");
            eprintln!("       instructions NAME RUNS");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

/// Callgrind counts from here to its end, by its name.
#[inline(never)]
fn counted(run: &mut Run, runs: u64) {
    for _ in 0..runs {
        run();
    }
}
