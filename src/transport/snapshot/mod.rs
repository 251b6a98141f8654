//! Snapshots on their way between members: `POST /raft/snapshot`, whose body is the message as one frame, then the file.
//! Both ends hold a few blocks of it at once, however large it is. Nothing is sent twice and nothing resumed: what broke
//! is reported, and raft's next try starts anew.
//!
//! It knows nothing of the file's format. Whoever keeps the files vouches for what came in, before the node hears of it.

mod meter;
mod receive;
mod send;

use std::io;
use std::time::Duration;

pub use self::meter::{SnapshotProgress, Transfers};
pub use self::receive::receive;
pub use self::send::send;

/// The largest file that is taken.
const FILE_BYTES_MAX: u64 = 64 << 30;
/// The file is read, sent and written in blocks of this size.
const BLOCK_BYTES: usize = 256 << 10;
/// Blocks that wait between the connection and the thread that reads or writes the file.
const BLOCKS_QUEUED_MAX: usize = 4;
/// The frame ahead of the file: a message without entries or data is far below.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// A transfer without a byte for this long is given up.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);
/// After the last byte the receiver verifies the file and makes it durable; that takes the longer the slower its disk.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Snapshots on their way to all peers at once; one for each peer.
pub const SENDING_MAX: usize = 4;
/// Snapshots on their way in at once.
pub const RECEIVING_MAX: usize = 2;

/// The files of snapshots, as the transport sees them. Called on threads that may block.
pub trait SnapshotFiles: Send + Sync + 'static {
    /// The file of the snapshot at that index and term, and its size in bytes. It stays readable if it is purged
    /// meanwhile.
    fn open(&self, index: u64, term: u64) -> io::Result<(u64, Box<dyn io::Read + Send>)>;

    /// A place for a file that comes in.
    fn receive(&self) -> io::Result<Box<dyn SnapshotSink>>;
}

/// A file that comes in. Dropped unfinished, it leaves nothing behind.
pub trait SnapshotSink: Send {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Verifies the whole file and makes it durable under its own name. Returns the index and term that it says of
    /// itself. [`io::ErrorKind::InvalidData`] and [`io::ErrorKind::UnexpectedEof`] say that it is damaged, and nothing of
    /// it stays; any other error is the disk's.
    fn finish(self: Box<Self>) -> io::Result<(u64, u64)>;
}

/// A member that keeps no snapshots: it has none to send and takes none.
#[cfg(test)]
pub struct NoSnapshots;

#[cfg(test)]
impl SnapshotFiles for NoSnapshots {
    fn open(&self, _index: u64, _term: u64) -> io::Result<(u64, Box<dyn io::Read + Send>)> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn receive(&self) -> io::Result<Box<dyn SnapshotSink>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
