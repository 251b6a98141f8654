//! How far a transfer is: for its own time-out, the log, the metrics and `/status`. Pure but for the clock.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use serde::Serialize;
use tokio::time::{Instant, sleep_until};

use super::{ANSWER_TIMEOUT, STALL_TIMEOUT};
use crate::transport::locked;
use crate::transport::peer::Peer;

const LOG_EVERY: Duration = Duration::from_secs(5);

/// How much of a snapshot has gone over, as an operator sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum SnapshotProgress {
    Sending { sent_bytes: u64, total_bytes: u64 },
    Receiving { received_bytes: u64, total_bytes: u64 },
}

/// The transfers that run between this member and one peer.
#[derive(Default)]
pub struct Transfers {
    sending: Mutex<Weak<Meter>>,
    receiving: Mutex<Weak<Meter>>,
}

impl Transfers {
    /// What is being sent, else what is being received.
    pub fn progress(&self) -> Option<SnapshotProgress> {
        if let Some(meter) = locked(&self.sending).upgrade() {
            return Some(SnapshotProgress::Sending { sent_bytes: meter.done_bytes(), total_bytes: meter.total_bytes });
        }
        let meter = locked(&self.receiving).upgrade()?;
        Some(SnapshotProgress::Receiving { received_bytes: meter.done_bytes(), total_bytes: meter.total_bytes })
    }
}

/// Counts the bytes of one file. The transfer runs for as long as it exists.
pub struct Meter {
    peer: u64,
    what: &'static str,
    total_bytes: u64,
    counter: Counter,
    state: Mutex<State>,
}

struct State {
    done_bytes: u64,
    moved: Instant,
    logged: Instant,
}

impl Meter {
    pub fn of_sending(peer: &Peer, total_bytes: u64) -> Arc<Meter> {
        let meter = Meter::start(peer.id, "sending a snapshot", total_bytes, peer.figures.snapshot_sent_bytes.clone());
        *locked(&peer.snapshots.sending) = Arc::downgrade(&meter);
        meter
    }

    pub fn of_receiving(peer: &Peer, total_bytes: u64) -> Arc<Meter> {
        let counter = peer.figures.snapshot_received_bytes.clone();
        let meter = Meter::start(peer.id, "receiving a snapshot", total_bytes, counter);
        *locked(&peer.snapshots.receiving) = Arc::downgrade(&meter);
        meter
    }

    fn start(peer: u64, what: &'static str, total_bytes: u64, counter: Counter) -> Arc<Meter> {
        tracing::info!(peer, total_bytes, "{what}");
        let now = Instant::now();
        let state = Mutex::new(State { done_bytes: 0, moved: now, logged: now });
        Arc::new(Meter { peer, what, total_bytes, counter, state })
    }

    /// These many bytes more have gone over.
    pub fn add(&self, bytes: u64) {
        self.counter.inc_by(bytes);
        let (mut state, now) = (locked(&self.state), Instant::now());
        state.done_bytes += bytes;
        state.moved = now;
        if now - state.logged >= LOG_EVERY {
            state.logged = now;
            let percent = state.done_bytes as f64 * 100.0 / self.total_bytes as f64;
            tracing::info!(peer = self.peer, done_bytes = state.done_bytes, "{}: {percent:.0} %", self.what);
        }
    }

    fn done_bytes(&self) -> u64 {
        locked(&self.state).done_bytes
    }

    /// Returns when nothing has moved for too long.
    pub async fn stalled(&self) {
        loop {
            let (moved, patience) = {
                let state = locked(&self.state);
                let sent = state.done_bytes >= self.total_bytes;
                (state.moved, if sent { ANSWER_TIMEOUT } else { STALL_TIMEOUT })
            };
            if moved.elapsed() >= patience {
                return;
            }
            sleep_until(moved + patience).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_transfer_is_given_up_when_nothing_moves_and_waits_longer_for_the_answer() {
        let meter = Meter::start(2, "sending a snapshot", 100, Counter::default());
        let start = Instant::now();
        meter.stalled().await;
        assert_eq!(start.elapsed().as_secs(), STALL_TIMEOUT.as_secs());
        meter.add(50);
        meter.stalled().await;
        assert_eq!(start.elapsed().as_secs(), 2 * STALL_TIMEOUT.as_secs());
        meter.add(50);
        meter.stalled().await;
        assert_eq!(start.elapsed().as_secs(), 2 * STALL_TIMEOUT.as_secs() + ANSWER_TIMEOUT.as_secs());
        assert_eq!(meter.counter.get(), 100);
    }

    #[test]
    fn progress_names_the_direction() {
        let sending = SnapshotProgress::Sending { sent_bytes: 1, total_bytes: 2 };
        assert_eq!(serde_json::to_string(&sending).unwrap(), r#"{"sent_bytes":1,"total_bytes":2}"#);
        let receiving = SnapshotProgress::Receiving { received_bytes: 1, total_bytes: 2 };
        assert_eq!(serde_json::to_string(&receiving).unwrap(), r#"{"received_bytes":1,"total_bytes":2}"#);
    }
}
