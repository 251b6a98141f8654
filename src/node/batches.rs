//! How often a leader brings writes into its log. A batch costs a turn here, a frame to each follower, a sync and some
//! wake-ups on every member, however many writes are in it. So writes wait while more of them are under way than wait, and go
//! together then: with many clients a few large batches follow each other, and a write that comes alone waits for nothing.

use std::pin::Pin;
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// How long writes wait at most, and up to as long again until the timer comes round: where a commit takes longer, on a slow network or disk, many batches are under way.
const WAIT_MAX: Duration = Duration::from_millis(1);

pub struct Batches {
    /// When the last one went.
    went: Instant,
    wait: Option<Pin<Box<Sleep>>>,
}

impl Batches {
    pub fn new() -> Self {
        Batches { went: Instant::now(), wait: None }
    }

    /// Whether the writes that wait may go, where so many entries are not committed yet. If not, [`Batches::waited`] tells
    /// when to ask again at the latest.
    pub fn may_go(&mut self, waiting: usize, uncommitted: u64) -> bool {
        let due = self.went + WAIT_MAX;
        if uncommitted <= waiting as u64 || due <= Instant::now() {
            self.wait = None;
            return true;
        }
        self.wait.get_or_insert_with(|| Box::pin(sleep_until(due)));
        false
    }

    /// A batch went.
    pub fn went(&mut self) {
        self.went = Instant::now();
    }

    /// Ends when writes have waited long enough; never, where none do.
    pub async fn waited(&mut self) {
        match &mut self.wait {
            Some(wait) => wait.await,
            None => std::future::pending().await,
        }
        self.wait = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn few_writes_wait_for_the_many_before_them_but_not_for_long() {
        let mut batches = Batches::new();
        assert!(batches.may_go(1, 0), "the first waits for nothing");
        batches.went();
        assert!(!batches.may_go(1, 2));
        assert!(batches.may_go(2, 2), "as many as are under way");
        assert!(batches.may_go(1, 1), "the others are committed");

        batches.went();
        let start = Instant::now();
        assert!(!batches.may_go(1, 2));
        batches.waited().await;
        assert!((WAIT_MAX..=2 * WAIT_MAX).contains(&start.elapsed()), "{:?}", start.elapsed());
        assert!(batches.may_go(1, 2));
    }
}
