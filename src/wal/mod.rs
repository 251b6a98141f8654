//! The write-ahead log: what raft must remember is durable here before anybody is told. One append is one frame, one
//! write and one sync. It is recovered exactly, or the start is refused with the file, the offset and what to do;
//! never a guess. After any error the log takes nothing more: what a failed sync left behind is not known.
//!
//! Called by `server`, which opens it, and by `node`, through the thread in [`writer`]. Byte maps: `docs/formats.md`.
//! Reading order: `record` (what the bytes mean), `segment` (where they lie), `log` (how they are written), `frames` and
//! `recovery` (how they are read back, and what `terms` are left), `entries` (what they say); then [`snapshot`] (what stands in for the entries that were let go).

pub mod disk;
#[doc(hidden)]
pub mod disk_memory;
mod entries;
mod error;
mod frames;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod identity;
mod image;
mod log;
mod ranges;
pub mod record;
mod recovery;
mod replay;
mod segment;
pub mod snapshot;
mod spare;
mod terms;
#[cfg(test)]
mod tests;
pub mod writer;

use std::collections::BTreeMap;
use std::path::PathBuf;

use raft::eraftpb::{Entry, HardState};

pub use self::entries::Entries;
pub use self::error::Error;
pub use self::log::Wal;
pub use self::segment::SEGMENT_BYTES_MIN;
use crate::cluster::Member;

/// Where the log lies and how large its segments are.
#[derive(Debug, Clone)]
pub struct Options {
    /// `<data-dir>/wal`.
    pub dir: PathBuf,
    /// Size of new segments; those of another size are read all the same.
    pub segment_bytes: u64,
}

/// What one turn of the node wants remembered. Numbers rise.
#[derive(Debug, Clone, Default)]
pub struct Append {
    pub number: u64,
    /// Index and term of a snapshot that was installed, and is durable itself: the log is given up as a whole and begins
    /// anew behind it, with the entries of this append if there are any.
    pub snapshot: Option<(u64, u64)>,
    /// Contiguous, and at most one above the last entry of the log; they replace what is there from the first on.
    pub entries: Vec<Entry>,
    pub hard_state: Option<HardState>,
    /// Members, and the nonces of their data directories.
    pub nonces: Vec<(u64, u64)>,
}

impl Append {
    /// About what it takes in the log.
    pub fn size_bytes(&self) -> u64 {
        let entries: usize = self.entries.iter().map(record::entry_bytes).sum();
        let state = self.hard_state.as_ref().map_or(0, |_| record::HARD_STATE_BYTES);
        let snapshot = self.snapshot.map_or(0, |_| record::COMPACTED_BYTES);
        (snapshot + entries + state + self.nonces.len() * record::NONCE_BYTES) as u64
    }
}

/// What the log held when it was opened.
#[derive(Debug, Clone)]
pub struct Recovered {
    pub founders: Vec<Member>,
    /// The number of this start, above that of every earlier one; durable.
    pub boot: u64,
    /// What was compacted away is committed here, even where a commit index that said so was not durable yet.
    pub hard_state: HardState,
    /// Contiguous, from index 2 on, or from the one after `compacted`.
    pub entries: Entries,
    pub nonces: BTreeMap<u64, u64>,
    /// Index and term of the last entry that was compacted away, or that an installed snapshot stands for.
    pub compacted: Option<(u64, u64)>,
    /// Bytes of a torn last write that were cut; nobody had been told of them.
    pub cut_bytes: u64,
    pub segments: usize,
}

/// Whether the disk has room for the segment after this one. Full: take no more proposals, until it is Ok again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    Ok,
    Full,
}
