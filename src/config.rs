//! What a server is started with, already checked. `cli` makes it from flags and environment; tests make it by hand.

use std::path::PathBuf;
use std::time::Duration;

use crate::cluster::Member;

/// The largest value that `--max-value-bytes` may allow: what a log frame and a peer frame can carry beside its key
/// on every node, whatever the flags of each.
pub const VALUE_BYTES_MAX: u64 = 4 << 20;

/// Everything a server needs to start.
#[derive(Debug, Clone)]
pub struct Config {
    pub id: u64,
    /// The founding members, `id` among them, in the order of their IDs.
    pub cluster: Vec<Member>,
    /// Where clients are served, `HOST:PORT`; `None` is all interfaces at `port`.
    pub listen: Option<String>,
    pub port: u16,
    /// Where peers are served, `HOST:PORT`; `None` is this node's own URLs in `cluster`.
    pub listen_peer: Option<String>,
    pub data_dir: PathBuf,
    pub tick: Duration,
    /// Ticks without a word from the leader after which a follower stands for election (randomised up to twice that).
    pub election_ticks: usize,
    pub request_timeout: Duration,
    pub max_value_bytes: u64,
    /// Size of one log segment. At least `wal::SEGMENT_BYTES_MIN`.
    pub wal_segment_bytes: u64,
}
