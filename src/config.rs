//! What a server is started with, already checked. `cli` makes it from flags and environment; tests make it by hand.

use std::path::PathBuf;
use std::time::Duration;

use crate::cluster::Member;

/// The largest value that `--max-value-bytes` may allow: what a log frame and a peer frame can carry beside its key
/// on every node, whatever the flags of each.
pub const VALUE_BYTES_MAX: u64 = 4 << 20;

/// The smallest log segment that `--wal-segment-bytes` may ask for: one must hold several of the largest frames.
pub const WAL_SEGMENT_BYTES_MIN: u64 = 16 << 20;
/// The largest: a spare of this size is zeroed beside the one in use.
pub const WAL_SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// What `--cluster` is where nobody says: a lone node.
pub const CLUSTER_DEFAULT: &str = "http://127.0.0.1:9021";

/// Everything a server needs to start.
#[derive(Debug, Clone)]
pub struct Config {
    pub id: u64,
    /// The founding members in the order of their IDs, none twice. They found a cluster on a first start only, and
    /// only then must `id` be among them: see [`Config::check_founding`].
    pub cluster: Vec<Member>,
    /// Where clients are served, `HOST:PORT`; `None` is all interfaces at `port`.
    pub listen: Option<String>,
    pub port: u16,
    /// Where peers are served, `HOST:PORT`; `None` is this node's own URLs in `cluster`.
    pub listen_peer: Option<String>,
    pub data_dir: PathBuf,
    /// Whether a first start joins a cluster that it was added to, instead of founding one.
    pub join: bool,
    pub tick: Duration,
    /// Ticks without a word from the leader after which a follower stands for election (randomised up to twice that).
    pub election_ticks: usize,
    pub request_timeout: Duration,
    pub max_value_bytes: u64,
    /// Size of one log segment, from [`WAL_SEGMENT_BYTES_MIN`] to [`WAL_SEGMENT_BYTES_MAX`].
    pub wal_segment_bytes: u64,
    /// Entries since the last snapshot that make one due.
    pub snapshot_count: u64,
    /// Time since the last snapshot that makes one due, if there are `snapshot_min_entries` new ones. Zero: never.
    pub snapshot_interval: Duration,
    pub snapshot_min_entries: u64,
    /// Bytes of log since the last snapshot that make one due.
    pub snapshot_log_bytes: u64,
    /// Snapshot files kept.
    pub snapshot_keep: usize,
    /// Entries kept behind a snapshot for slow followers, as long as they are no more than `snapshot_catchup_bytes`.
    pub snapshot_catchup_entries: u64,
    pub snapshot_catchup_bytes: u64,
}

impl Config {
    /// Whether `--cluster` was left as it is.
    pub fn is_default_cluster(&self) -> bool {
        matches!(&self.cluster[..], [Member { urls, .. }] if matches!(&urls[..], [url] if url.to_string() == CLUSTER_DEFAULT))
    }

    /// Whether this node may found a cluster with this list. The server asks on a first start, before it writes
    /// anything; later the data directory knows who the members are, and the list is not consulted.
    pub fn check_founding(&self) -> Result<(), NotAFounder> {
        if self.cluster.iter().any(|member| member.id == self.id) {
            return Ok(());
        }
        Err(NotAFounder { id: self.id, founders: self.cluster.len() })
    }
}

/// `--id` has no entry in `--cluster`. What the user typed: exit 2.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--id {id} has no entry in --cluster, which lists members 1 to {founders}; a first start needs one")]
pub struct NotAFounder {
    id: u64,
    founders: usize,
}

/// How log lines are written to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    /// One JSON object a line.
    Json,
}
