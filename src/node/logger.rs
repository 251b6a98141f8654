//! The raft crate's log lines, handed to `tracing`. What raft calls informational is its inner life, so it is shown
//! from `RUST_LOG=raftkv::raft=debug` on.

use slog::{Drain, Key, Level, Logger, Never, OwnedKVList, Record, Serializer, o};

/// A logger for the raft crate.
pub fn into_tracing() -> Logger {
    Logger::root(Tracing, o!())
}

struct Tracing;

impl Drain for Tracing {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, _: &OwnedKVList) -> Result<(), Never> {
        macro_rules! emit {
            ($level:ident) => {
                if tracing::enabled!(target: "raftkv::raft", tracing::Level::$level) {
                    tracing::event!(target: "raftkv::raft", tracing::Level::$level, "{}", Line::of(record))
                }
            };
        }
        match record.level() {
            Level::Critical | Level::Error => emit!(ERROR),
            Level::Warning => emit!(WARN),
            Level::Info => emit!(DEBUG),
            Level::Debug | Level::Trace => emit!(TRACE),
        }
        Ok(())
    }
}

/// Message and fields of a record in one line.
struct Line(String);

impl Line {
    fn of(record: &Record<'_>) -> String {
        let mut line = Line(record.msg().to_string());
        // Fields that cannot be shown are left out; the message stands.
        slog::KV::serialize(&record.kv(), record, &mut line).ok();
        line.0
    }
}

impl Serializer for Line {
    fn emit_arguments(&mut self, key: Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        self.0.push_str(&format!(" {key}={value}"));
        Ok(())
    }
}
