//! Where log lines go: stderr, filtered by `RUST_LOG`, as text for people or JSON for machines. Called once, by `main`.

use std::env::{self, VarError};
use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Directs all tracing events to stderr from here on.
pub fn init(format: LogFormat) -> Result<(), InvalidFilter> {
    // A write to a closed stderr is dropped: reporting it there again would panic.
    let lines = tracing_subscriber::fmt().with_env_filter(filter()?).with_writer(io::stderr).log_internal_errors(false);
    match format {
        LogFormat::Text => lines.with_ansi(colour()).init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
    Ok(())
}

fn filter() -> Result<EnvFilter, InvalidFilter> {
    let invalid = |filter, why| Err(InvalidFilter { filter, why });
    match env::var("RUST_LOG") {
        Ok(text) if !text.trim().is_empty() => match EnvFilter::try_new(&text) {
            Ok(filter) => Ok(filter),
            Err(error) => invalid(text, error.to_string()),
        },
        Ok(_) | Err(VarError::NotPresent) => Ok(EnvFilter::new("info")),
        Err(VarError::NotUnicode(raw)) => invalid(raw.to_string_lossy().into_owned(), "is not UTF-8".to_owned()),
    }
}

/// Colour for a terminal, unless the user asked for none (no-color.org: set, and not empty).
fn colour() -> bool {
    io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// `RUST_LOG` cannot be read. What the user typed: exit 2.
#[derive(Debug, thiserror::Error)]
#[error(
    "RUST_LOG {filter:?}: {why}; use a level (error, warn, info, debug, trace) or a list like info,raftkv::node=debug"
)]
pub struct InvalidFilter {
    filter: String,
    why: String,
}
