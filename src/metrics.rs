//! What `/metrics` shows: one registry for each node, so that many nodes may live in one process. Uses nobody; every
//! room counts here what it does.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// The other member that a figure is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Peer {
    pub peer: u64,
}

/// Why something was refused: one of a fixed set of short words, never text from outside.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    pub reason: &'static str,
}

/// A request on the client port.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Request {
    pub method: &'static str,
    pub status: u16,
}

/// All figures of one node.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,

    pub http_requests: Family<Request, Counter>,
    pub http_connections: Gauge,

    pub raft_term: Gauge,
    pub raft_leader: Gauge,
    pub raft_leader_changes: Counter,
    pub raft_commit_index: Gauge,
    pub raft_applied_index: Gauge,
    pub proposals_pending: Gauge,
    pub proposals_unresolved: Family<Reason, Counter>,
    pub messages_refused: Family<Reason, Counter>,

    pub wal_fsync_seconds: Histogram,
    pub wal_written_bytes: Counter,
    pub wal_queued_bytes: Gauge,
    pub wal_segments: Gauge,
    pub wal_disk_full: Gauge,

    pub peer_sent_bytes: Family<Peer, Counter>,
    pub peer_received_bytes: Family<Peer, Counter>,
    pub peer_snapshot_sent_bytes: Family<Peer, Counter>,
    pub peer_snapshot_received_bytes: Family<Peer, Counter>,
    pub peer_dropped_messages: Family<Peer, Counter>,
    pub peer_round_trip_seconds: Family<Peer, Gauge<f64, std::sync::atomic::AtomicU64>>,
    pub peer_clock_drift_seconds: Family<Peer, Gauge<f64, std::sync::atomic::AtomicU64>>,
    /// Connections and frames that the transport refused, in either direction.
    pub transport_refused: Family<Reason, Counter>,
    /// Frames that came twice.
    pub transport_repeats: Counter,

    pub store_keys: Gauge,
    pub store_revision: Gauge,
}

impl Metrics {
    pub fn new() -> Self {
        let mut metrics = Metrics {
            registry: Registry::with_prefix("raftkv"),
            http_requests: Family::default(),
            http_connections: Gauge::default(),
            raft_term: Gauge::default(),
            raft_leader: Gauge::default(),
            raft_leader_changes: Counter::default(),
            raft_commit_index: Gauge::default(),
            raft_applied_index: Gauge::default(),
            proposals_pending: Gauge::default(),
            proposals_unresolved: Family::default(),
            messages_refused: Family::default(),
            wal_fsync_seconds: Histogram::new(exponential_buckets(0.000_05, 2.0, 16)),
            wal_written_bytes: Counter::default(),
            wal_queued_bytes: Gauge::default(),
            wal_segments: Gauge::default(),
            wal_disk_full: Gauge::default(),
            peer_sent_bytes: Family::default(),
            peer_received_bytes: Family::default(),
            peer_snapshot_sent_bytes: Family::default(),
            peer_snapshot_received_bytes: Family::default(),
            peer_dropped_messages: Family::default(),
            peer_round_trip_seconds: Family::default(),
            peer_clock_drift_seconds: Family::default(),
            transport_refused: Family::default(),
            transport_repeats: Counter::default(),
            store_keys: Gauge::default(),
            store_revision: Gauge::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let m = &mut self.registry;
        m.register("http_requests", "Requests answered on the client port", self.http_requests.clone());
        m.register("http_connections", "Client connections open now", self.http_connections.clone());
        m.register("raft_term", "Current term", self.raft_term.clone());
        m.register("raft_leader", "ID of the leader, 0 while there is none", self.raft_leader.clone());
        m.register("raft_leader_changes", "Times another leader was seen", self.raft_leader_changes.clone());
        m.register("raft_commit_index", "Highest index known committed", self.raft_commit_index.clone());
        m.register("raft_applied_index", "Highest index applied by the store", self.raft_applied_index.clone());
        m.register("proposals_pending", "Writes that wait for their outcome", self.proposals_pending.clone());
        m.register("proposals_unresolved", "Writes rejected or given up", self.proposals_unresolved.clone());
        m.register("messages_refused", "Peer messages kept away from raft", self.messages_refused.clone());
        m.register_with_unit("wal_fsync", "Time of one log sync", Unit::Seconds, self.wal_fsync_seconds.clone());
        m.register_with_unit("wal_written", "Bytes written to the log", Unit::Bytes, self.wal_written_bytes.clone());
        m.register_with_unit("wal_queued", "Bytes waiting for the log", Unit::Bytes, self.wal_queued_bytes.clone());
        m.register("wal_segments", "Log segments on disk", self.wal_segments.clone());
        m.register("wal_disk_full", "1 while there is no room for a spare segment", self.wal_disk_full.clone());
        m.register_with_unit("peer_sent", "Bytes sent to a peer", Unit::Bytes, self.peer_sent_bytes.clone());
        m.register_with_unit(
            "peer_received",
            "Bytes received from a peer",
            Unit::Bytes,
            self.peer_received_bytes.clone(),
        );
        m.register_with_unit(
            "peer_snapshot_sent",
            "Bytes of snapshots sent to a peer",
            Unit::Bytes,
            self.peer_snapshot_sent_bytes.clone(),
        );
        m.register_with_unit(
            "peer_snapshot_received",
            "Bytes of snapshots received from a peer",
            Unit::Bytes,
            self.peer_snapshot_received_bytes.clone(),
        );
        m.register(
            "peer_dropped_messages",
            "Messages to a peer dropped: queue full or unreachable",
            self.peer_dropped_messages.clone(),
        );
        m.register_with_unit(
            "peer_round_trip",
            "Round trip of the last probe",
            Unit::Seconds,
            self.peer_round_trip_seconds.clone(),
        );
        m.register_with_unit(
            "peer_clock_drift",
            "The peer's clock less ours",
            Unit::Seconds,
            self.peer_clock_drift_seconds.clone(),
        );
        m.register("transport_refused", "Connections and frames refused", self.transport_refused.clone());
        m.register("transport_repeats", "Frames that came twice", self.transport_repeats.clone());
        m.register("store_keys", "Keys in the store", self.store_keys.clone());
        m.register("store_revision", "Revision of the store", self.store_revision.clone());
    }

    /// The figures in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("a String takes any text");
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_two_nodes_do_not_mix() {
        let (one, other) = (Metrics::new(), Metrics::new());
        one.raft_term.set(7);
        one.peer_sent_bytes.get_or_create(&Peer { peer: 2 }).inc_by(10);
        assert!(one.encode().contains("raftkv_raft_term 7\n"));
        assert!(one.encode().contains("raftkv_peer_sent_bytes_total{peer=\"2\"} 10\n"));
        assert!(other.encode().contains("raftkv_raft_term 0\n"));
    }
}
