//! Who tells a script's story: it hears the log lines of the nodes and the notes of the world, in the order in which
//! they come, and keeps them as lines for a reader. Installed on the thread that runs a script; called by `script`.

use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// What was told so far. Clones share it.
#[derive(Clone, Default)]
pub struct Narrator {
    told: Arc<Mutex<Told>>,
}

#[derive(Default)]
struct Told {
    lines: Vec<String>,
    /// Times are told from here on.
    since: Option<Instant>,
}

impl Narrator {
    /// Begins a command: times are told from its beginning.
    pub fn begin(&self) {
        self.told().since = Some(Instant::now());
    }

    /// Says something, and when: to a tenth of a second, where it did not come at once.
    pub fn happens(&self, text: &str) {
        let mut told = self.told();
        let seconds = told.since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        let when = if seconds < 0.1 { String::new() } else { format!("{seconds:.1} s") };
        told.lines.push(format!("{when:>8}  {text}"));
    }

    /// Answers a command.
    pub fn answers(&self, text: String) {
        self.told().lines.push(text);
    }

    /// Takes what was told.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.told().lines)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whose log lines are heard within a span.
struct Host(u64);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Narrator {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.is_span() || *metadata.level() <= Level::INFO
    }

    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        let mut line = Line::default();
        attributes.record(&mut line);
        if let (Some(span), Some(host)) = (context.span(id), line.id) {
            span.extensions_mut().insert(Host(host));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        let target = event.metadata().target();
        // What a process says while the power fails under it, nobody hears.
        let heard = target.starts_with("raftkv") && !line.fields.contains("(made up)");
        if heard {
            let host = context.lookup_current().and_then(|span| span.extensions().get::<Host>().map(|host| host.0));
            let host = host.map_or("a node".to_owned(), |host| format!("node {host}"));
            self.happens(&format!("{host}: {}{}", line.message, line.fields));
        } else if target.ends_with("::world") {
            // The world's own time stands before its note.
            let (_, note) = line.message.split_once(' ').expect("a time and a note");
            self.happens(note);
        }
    }
}

/// One event's words.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
    id: Option<u64>,
}

impl Visit for Line {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "id" {
            self.id = Some(value);
        }
        self.record_debug(field, &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, ", {name} {value:?}"),
        };
        written.expect("a string takes it");
    }
}
