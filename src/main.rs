//! The `raftkv` program: reads the command line, directs the logs, runs the server, or the load generator if asked for
//! `bench`, and turns how it ended into an exit code.

use std::process::ExitCode;

use mimalloc::MiMalloc;
use raftkv::{bench, cli, logs, server};

/// What a write allocates is mostly freed on another thread than it was made on.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|first| first == cli::bench::NAME) {
        return load();
    }
    let args = match cli::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(exit) => return exit.report(),
    };
    if let Err(error) = logs::init(args.log_format) {
        return cli::complain(error, 2);
    }
    match server::run(args.config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::complain(&error, error.exit_code()),
    }
}

/// `raftkv bench`.
fn load() -> ExitCode {
    let (plan, output) = match cli::bench::parse(std::env::args_os().skip(2)) {
        Ok(asked) => asked,
        Err(exit) => return exit.report(),
    };
    match bench::main(&plan, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::complain(format_args!("{error:#}"), 1),
    }
}
