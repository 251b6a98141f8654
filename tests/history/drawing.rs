//! Draws operations over time, one row each: for a terminal, and as a picture. Called by `violation`.
//!
//! Time is stretched: what matters is what was before what, so that each instant at which something began or ended has
//! the same distance from the next.

use std::fmt::Write;

/// Columns for the time in a terminal, where they are enough.
const COLUMNS: usize = 64;

#[derive(Debug, Clone)]
pub struct Row {
    /// One of those that cannot be ordered.
    pub is_marked: bool,
    pub label: String,
    pub from: u64,
    /// None: it is open for ever.
    pub until: Option<u64>,
    /// Answered as not applied.
    pub is_refused: bool,
}

/// `*` marks what cannot be ordered, `>` what had no answer, `x` what was answered as not applied.
pub fn text(rows: &[Row]) -> String {
    let times = times(rows);
    let step = (COLUMNS / times.len().max(1)).clamp(2, 8);
    let width = rows.iter().map(|row| row.label.chars().count()).max().unwrap_or(0);
    let mut drawing = String::new();
    for row in rows {
        let from = place(&times, row.from) * step;
        let until = row.until.map_or(times.len(), |until| place(&times, until)) * step;
        let (line, end) = match (row.until, row.is_refused) {
            (Some(_), _) => ('=', '|'),
            (None, true) => ('.', 'x'),
            (None, false) => ('.', '>'),
        };
        let mark = if row.is_marked { '*' } else { ' ' };
        let inner: String = std::iter::repeat_n(line, until.saturating_sub(from + 1)).collect();
        let start = if until == from { "" } else { "|" };
        writeln!(drawing, "{mark} {:width$}  {:from$}{start}{inner}{end}", row.label, "")
            .expect("a String takes any text");
    }
    drawing
}

/// The rows under a title, as a file of its own.
pub fn svg(title: &str, rows: &[Row]) -> String {
    let times = times(rows);
    let (left, step, height) = (300, 40, 24);
    let (wide, high) = (left + (times.len() + 1) * step, (rows.len() + 2) * height);
    let mut picture = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{wide}\" height=\"{high}\" font-family=\"monospace\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"8\" y=\"17\">{}</text>\n",
        escape(title)
    );
    for (at, row) in rows.iter().enumerate() {
        let top = (at + 1) * height;
        let from = left + place(&times, row.from) * step;
        let until = left + row.until.map_or(times.len(), |until| place(&times, until)) * step;
        let colour = if row.is_marked { "#d33" } else { "#89b" };
        // What has no end that anybody knows is pale.
        let opacity = if row.until.is_some() { 1.0 } else { 0.4 };
        let label = escape(&row.label);
        writeln!(picture, "<text x=\"8\" y=\"{}\">{label}</text>", top + 17).expect("a String takes any text");
        writeln!(
            picture,
            "<rect x=\"{from}\" y=\"{}\" width=\"{}\" height=\"16\" fill=\"{colour}\" fill-opacity=\"{opacity}\">\
             <title>{label}, from {}{}</title></rect>",
            top + 4,
            (until - from).max(4),
            row.from,
            row.until.map_or(String::new(), |until| format!(" to {until}"))
        )
        .expect("a String takes any text");
    }
    picture + "</svg>\n"
}

/// Each instant once, in order.
fn times(rows: &[Row]) -> Vec<u64> {
    let mut times: Vec<_> = rows.iter().flat_map(|row| [Some(row.from), row.until]).flatten().collect();
    times.sort_unstable();
    times.dedup();
    times
}

fn place(times: &[u64], time: u64) -> usize {
    times.partition_point(|earlier| *earlier < time)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
