//! How often a leader brings writes into its log. A batch costs a turn here, a frame to each follower, a sync and some
//! wake-ups on every member, however many writes are in it. So writes wait until they are half of those that are under way: with
//! many clients two large batches take turns, one on its way to the disks while the other gathers from the clients that the
//! last one answered. A write that comes alone waits for nothing.
//!
//! That clients come back is a guess. So nothing waits for longer than a commit took, but for the timer, which comes up to two
//! milliseconds late; nothing waits at all where the last answers are as long ago; and after a wait in vain only those count that
//! are under way then.

use std::pin::Pin;
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// How long writes wait at most where commits take longer, on a slow network or disk.
const WAIT_MAX: Duration = Duration::from_millis(5);

#[derive(Default)]
pub struct Batches {
    /// The most writes that were under way at once, those that waited among them, since some waited in vain.
    most_under_way: usize,
    /// Since when writes wait.
    since: Option<Instant>,
    wait: Option<Pin<Box<Sleep>>>,
    /// The index of the last entry of a batch that is not committed, and when it went.
    timed: Option<(u64, Instant)>,
    /// When the last one of those was committed, and how long after it went.
    committed: Option<(Instant, Duration)>,
}

impl Batches {
    /// Whether the `waiting` writes may go, where so many are under way, they among them. If not, [`Batches::waited`] tells
    /// when to ask again at the latest.
    pub fn may_go(&mut self, waiting: usize, under_way: usize) -> bool {
        self.most_under_way = self.most_under_way.max(under_way);
        if waiting < self.most_under_way / 2 {
            let now = Instant::now();
            let mut since = *self.since.get_or_insert(now);
            let (committed, took) = self.committed.unwrap_or((now, Duration::ZERO));
            if waiting == under_way {
                // Nobody is to be answered now.
                since = since.min(committed);
            }
            let due = since + took.min(WAIT_MAX);
            if now < due {
                self.wait.get_or_insert_with(|| Box::pin(sleep_until(due)));
                return false;
            }
            self.most_under_way = under_way;
        }
        (self.since, self.wait) = (None, None);
        true
    }

    /// A batch went, and ends at the entry `last`.
    pub fn went(&mut self, last: u64) {
        self.timed.get_or_insert_with(|| (last, Instant::now()));
    }

    /// All entries up to `commit` are committed.
    pub fn committed(&mut self, commit: u64) {
        if let Some((_, went)) = self.timed.take_if(|(last, _)| *last <= commit) {
            self.committed = Some((Instant::now(), went.elapsed()));
        }
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
    use tokio::time::advance;

    use super::*;

    const COMMIT: Duration = Duration::from_millis(2);

    /// A batch was committed a moment ago.
    async fn batches() -> Batches {
        let mut batches = Batches::default();
        assert!(batches.may_go(1, 1), "the first waits for nothing");
        batches.went(7);
        batches.committed(6);
        advance(COMMIT).await;
        batches.committed(7);
        batches
    }

    #[tokio::test(start_paused = true)]
    async fn writes_wait_for_half_of_those_under_way() {
        let mut batches = batches().await;
        for (waiting, under_way, go) in [(1, 3, true), (1, 4, false), (2, 4, true), (1, 1, false), (2, 2, true)] {
            assert_eq!(batches.may_go(waiting, under_way), go, "{waiting} of {under_way}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn they_wait_no_longer_than_a_commit_takes_and_in_vain_only_once() {
        let mut batches = batches().await;
        let start = Instant::now();
        assert!(!batches.may_go(1, 9));
        advance(COMMIT / 2).await;
        assert!(!batches.may_go(2, 3));
        batches.waited().await;
        assert!((COMMIT..COMMIT * 2).contains(&start.elapsed()), "{:?}", start.elapsed());
        assert!(batches.may_go(2, 5));
        assert!(batches.may_go(2, 5), "five are under way, not nine");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lone_write_after_many_waits_for_nothing() {
        let mut batches = batches().await;
        assert!(batches.may_go(64, 64));
        batches.went(71);
        advance(COMMIT).await;
        batches.committed(71);
        assert!(!batches.may_go(1, 1), "the others may come back");
        advance(COMMIT).await;
        assert!(batches.may_go(1, 1), "they did not");

        assert!(batches.may_go(64, 64));
        advance(COMMIT).await;
        assert!(batches.may_go(1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn slow_commits_hold_up_nothing_for_long() {
        let mut batches = batches().await;
        batches.went(8);
        batches.went(9);
        advance(10 * WAIT_MAX).await;
        batches.committed(8);
        let start = Instant::now();
        assert!(!batches.may_go(1, 9));
        batches.waited().await;
        assert!((WAIT_MAX..2 * WAIT_MAX).contains(&start.elapsed()), "{:?}", start.elapsed());
    }
}
