//! Asks each peer for its time now and then: how long the way is, and how far the clocks are apart. Nothing but figures
//! and a warning depends on it.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval};

use super::dial::exchange;
use super::handshake::PROBING;
use super::hub::Hub;
use super::peer::Peer;
use crate::metrics;

const PROBE_EVERY: Duration = Duration::from_secs(4);
/// Clocks further apart than this are warned of. Nothing in the store depends on them; logs are hard to read then.
const DRIFT_SECONDS_MAX: f64 = 1.0;

/// The answer to `GET /raft/probing`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Probe {
    pub id: u64,
    /// 16 hex digits, as in the headers.
    pub cluster: String,
    pub unix_micros: u64,
}

impl Probe {
    pub fn of(hub: &Hub) -> Self {
        Probe { id: hub.identity.id, cluster: format!("{:016x}", hub.identity.cluster), unix_micros: unix_micros() }
    }
}

/// Probes one peer for as long as it is one.
pub async fn probe(hub: Arc<Hub>, peer: Arc<Peer>) {
    let label = metrics::Peer { peer: peer.id };
    let mut drifting = false;
    let mut ticks = interval(PROBE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let request = hub.identity.request(Method::GET, PROBING, peer.id, Bytes::new());
        let Ok(answer) = exchange(&hub, &peer, request).await else { continue };
        let local_micros = unix_micros();
        let remote = match serde_json::from_slice::<Probe>(answer.response.body()) {
            Ok(probe) if answer.response.status() == StatusCode::OK => probe.unix_micros,
            _ => {
                peer.note(format!("probe: {}", answer.failure()));
                continue;
            }
        };
        let drift = drift_seconds(local_micros, remote, answer.elapsed);
        peer.probed(answer.elapsed, drift);
        if !peer.stop.is_cancelled() {
            hub.metrics.peer_round_trip_seconds.get_or_create(&label).set(answer.elapsed.as_secs_f64());
            hub.metrics.peer_clock_drift_seconds.get_or_create(&label).set(drift);
        }
        let drifts = drift.abs() > DRIFT_SECONDS_MAX;
        if drifts && !drifting {
            tracing::warn!(peer = peer.id, drift_seconds = drift, "the peer's clock differs from ours");
        } else if drifting && !drifts {
            tracing::info!(peer = peer.id, drift_seconds = drift, "the peer's clock agrees with ours again");
        }
        drifting = drifts;
    }
}

/// The peer's clock less ours, if it looked at its clock half a round trip before the answer was here.
fn drift_seconds(local_micros: u64, remote_micros: u64, round_trip: Duration) -> f64 {
    (remote_micros as f64 - local_micros as f64) / 1e6 + round_trip.as_secs_f64() / 2.0
}

/// A clock before 1970 counts as 1970.
fn unix_micros() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_the_round_trip_is_not_drift() {
        let drift = drift_seconds(10_000_000, 9_900_000, Duration::from_millis(200));
        assert!(drift.abs() < 1e-9, "{drift}");
        assert!((drift_seconds(10_000_000, 12_000_000, Duration::ZERO) - 2.0).abs() < 1e-9);
    }
}
