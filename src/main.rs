//! The `raftkv` program: reads the command line, directs the logs, runs the server, and turns how it ended into an
//! exit code.

use std::process::ExitCode;

use raftkv::{cli, logs};

fn main() -> ExitCode {
    let args = match cli::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(exit) => return exit.report(),
    };
    if let Err(error) = logs::init(args.log_format) {
        return cli::complain(error, 2);
    }
    // In place of the server: what it checks first.
    match args.config.check_founding() {
        Ok(()) => cli::complain("there is no server yet", 1),
        Err(error) => cli::complain(error, 2),
    }
}
