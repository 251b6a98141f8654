//! Flips bits on the disk of a host that is down, and holds recovery to its word at once: it finds exactly what was
//! there, or refuses, or has lost the last frame, which cannot be told from a write that was torn. The last is not
//! done to the host, for no member could know.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fastrand::Rng;
use raftkv::metrics::Metrics;
use raftkv::wal::disk::Disk;
use raftkv::wal::disk_memory::MemoryDisk;
use raftkv::wal::record::{frame_seed, read_frame};
use raftkv::wal::{Options, Recovered, Wal};

/// Where the first frame of a segment begins.
const FIRST_FRAME: usize = 4096;

/// A bit that was flipped.
pub struct Flip {
    pub file: PathBuf,
    bit: u64,
}

impl fmt::Display for Flip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bit {} of {}", self.bit, self.file.display())
    }
}

/// Flips one bit, where that is fair. Says which.
pub fn flip(disk: &MemoryDisk, segment_bytes: u64, rng: &mut Rng) -> Result<Option<Flip>, String> {
    let Some((path, bit)) = choose(disk, rng) else { return Ok(None) };
    let options = Options { dir: "/data/wal".into(), segment_bytes };
    let recover = |disk: MemoryDisk| Wal::open(Arc::new(disk), &options, 1, Arc::new(Metrics::new()));
    let Ok((_, before)) = recover(disk.fork()) else { return Ok(None) };
    let damaged = disk.fork();
    damaged.flip(&path, bit);
    if let Ok((_, after)) = recover(damaged)
        && !same(&before, &after)
    {
        let last_frame = last_frame(disk).is_some_and(|(file, start)| path == file && start <= bit / 8);
        return if last_frame && cut_short(&before, &after) {
            Ok(None)
        } else {
            Err(format!("{} is flipped: {before:?} is recovered as {after:?}", Flip { file: path, bit }))
        };
    }
    disk.flip(&path, bit);
    Ok(Some(Flip { file: path, bit }))
}

/// A bit of a file of the log, or of a snapshot; more often near the start of the file, where there is something.
fn choose(disk: &MemoryDisk, rng: &mut Rng) -> Option<(PathBuf, u64)> {
    let mut files = Vec::new();
    for dir in ["/data", "/data/wal", "/data/snap"] {
        let names = disk.list(Path::new(dir)).ok()?;
        files.extend(names.into_iter().map(|name| Path::new(dir).join(name)));
    }
    files.retain(|file| disk.content(file).is_some_and(|content| !content.is_empty()));
    if files.is_empty() {
        return None;
    }
    let file = files.swap_remove(rng.usize(0..files.len()));
    let bits = disk.content(&file)?.len() as u64 * 8;
    let reach = if rng.bool() { bits } else { bits.min(8 * 8192) };
    Some((file, rng.u64(0..reach)))
}

fn same(before: &Recovered, after: &Recovered) -> bool {
    let entries = |log: &Recovered| -> Vec<_> { log.entries.read().map(|entry| entry.expect("it was read")).collect() };
    (&before.hard_state, entries(before), &before.nonces, before.compacted)
        == (&after.hard_state, entries(after), &after.nonces, after.compacted)
}

/// The file and the offset of the last frame of the log, found by its byte map: what lies before must not be cut.
fn last_frame(disk: &MemoryDisk) -> Option<(PathBuf, u64)> {
    let mut names = disk.list(Path::new("/data/wal")).ok()?;
    names.retain(|name| name.ends_with(".wal"));
    let path = Path::new("/data/wal").join(names.into_iter().max()?);
    let bytes = disk.content(&path)?;
    let number = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).expect("eight bytes");
    let seed = frame_seed(number(16), number(24));
    let (mut last, mut next) = (None, FIRST_FRAME);
    while let Some(frame) = bytes.get(next..).and_then(|rest| read_frame(rest, seed)) {
        last = Some(next as u64);
        next += frame.size_bytes();
    }
    last.map(|start| (path, start))
}

/// Whether `after` may be what the log held before its last frame.
fn cut_short(before: &Recovered, after: &Recovered) -> bool {
    after.hard_state.term <= before.hard_state.term
        && after.hard_state.commit <= before.hard_state.commit
        && after.cut_bytes > 0
}
