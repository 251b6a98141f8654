//! The `raftkv` program: reads the command line, directs the logs, runs the server, and turns how it ended into an
//! exit code.

use std::process::ExitCode;

use mimalloc::MiMalloc;
use raftkv::{cli, logs, server};

/// What a write allocates is mostly freed on another thread than it was made on.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
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
