//! A line of the log that would come too often: at most one a second of its kind is written, the others are left out.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::locked;

const EVERY: Duration = Duration::from_secs(1);

/// When a kind of line was last written.
#[derive(Default)]
pub struct Seldom {
    last: Mutex<Option<Instant>>,
}

impl Seldom {
    /// Whether one may be written now; if so, it counts as written.
    pub fn is_due(&self) -> bool {
        self.is_due_at(Instant::now())
    }

    fn is_due_at(&self, now: Instant) -> bool {
        let mut last = locked(&self.last);
        let due = last.is_none_or(|last| now.saturating_duration_since(last) >= EVERY);
        if due {
            *last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_asked_for_all_the_time_comes_once_a_second() {
        let (seldom, start) = (Seldom::default(), Instant::now());
        let written = (0..10_000).filter(|millis| seldom.is_due_at(start + Duration::from_millis(*millis))).count();
        assert_eq!(written, 10);
    }
}
