//! Reads a log back: recover or refuse, never guess. A bad frame with nothing behind it is the torn end of the last
//! write, which nobody was told about: it is cut. A bad frame with a later one behind it is damage: the log is
//! refused. This decides safely because frame n + 1 is written only after the sync of frame n has returned.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use super::disk::{Disk, read_all};
use super::error::Error;
use super::ranges::Ranges;
use super::record::{
    self, FRAME_ALIGN, FRAME_BYTES_MAX, FRAME_HEADER_BYTES, Record, frame_claim, head_crc, read_frame,
};
use super::replay::Replay;
use super::segment::{self, BadHeader, HEADER_BYTES, Header, Segment};

/// A segment that takes no more frames.
#[derive(Debug)]
pub struct Closed {
    pub id: u64,
    /// The highest index of an entry in it that is still needed, 0 where there is none.
    pub last_index: u64,
    pub size_bytes: u64,
}

/// A log as it was found.
pub struct Found {
    pub replay: Replay,
    /// Oldest first.
    pub closed: VecDeque<Closed>,
    pub active: Segment,
    pub next_sequence: u64,
    /// Where the last frame of the active segment begins, and its bytes.
    pub last_frame: Option<(u64, Vec<u8>)>,
    /// The length of the torn end behind it.
    pub cut_bytes: u64,
}

/// What one segment held.
struct Scan {
    /// Behind the last good frame.
    tail: usize,
    last_frame: Option<usize>,
    next_sequence: u64,
    /// The highest index of an entry that is still needed.
    last_index: u64,
    /// A snapshot took the place of the log before it.
    restarted: bool,
}

pub fn recover(disk: &dyn Disk, dir: &Path) -> Result<Found, Error> {
    let ids = segment::ids(disk, dir)?;
    let (first, last) = match (ids.first(), ids.last()) {
        (Some(first), Some(last)) => (*first, *last),
        _ => return Err(corrupt(dir, 0, "it has no segments")),
    };
    if let Some(pair) = ids.windows(2).find(|pair| pair[0] + 1 != pair[1]) {
        return Err(corrupt(&segment::path(dir, pair[0] + 1), 0, "this segment, in the middle of the log, is missing"));
    }
    let mut replay = Replay::new(first == 1);
    let mut closed: VecDeque<Closed> = VecDeque::new();
    let mut previous: Option<(PathBuf, Scan)> = None;
    for id in ids {
        let path = segment::path(dir, id);
        let file = disk.open(&path)?;
        let bytes = read_all(file.as_ref())?;
        let header = header(&path, &bytes, id)?;
        if (bytes.len() as u64) < header.size_bytes {
            let why = format!("it ends here, and was made with {} bytes", header.size_bytes);
            return Err(corrupt(&path, bytes.len(), why));
        }
        if let Some((path, scan)) = &previous
            && scan.next_sequence != header.first_sequence
        {
            let (expected, found) = (scan.next_sequence, header.first_sequence);
            let why = format!("frame {expected} should follow, yet the next segment begins with {found}");
            return Err(corrupt(path, scan.tail, why));
        }
        let scan = scan(&path, &bytes, &header, &mut replay)?;
        if scan.restarted {
            closed.iter_mut().for_each(|before| before.last_index = 0);
        }
        if id != last {
            closed.push_back(Closed { id, last_index: scan.last_index, size_bytes: bytes.len() as u64 });
            previous = Some((path, scan));
            continue;
        }
        match header.next_sequence(&bytes) {
            Ok(None) => {}
            Ok(Some(sequence)) => {
                let why = format!("this segment is missing: frame {sequence} and what follows are in it");
                return Err(corrupt(&segment::path(dir, id.saturating_add(1)), 0, why));
            }
            Err(_) => return Err(corrupt(&path, 0, "the word in its header that another segment follows is bad")),
        }
        if let Some((offset, sequence)) = later_frame(&bytes, &header, &scan) {
            let why = format!("frame {} is bad, yet frame {sequence} follows at byte {offset}", scan.next_sequence);
            return Err(corrupt(&path, scan.tail, why));
        }
        if replay.base.is_none() {
            let missing = segment::path(dir, first.saturating_sub(1));
            return Err(corrupt(&missing, 0, "this segment, which the log needs, is missing"));
        }
        replay.check().map_err(|why| corrupt(&path, scan.tail, why))?;
        let tail = scan.tail as u64;
        return Ok(Found {
            replay,
            closed,
            active: Segment::resume(file, header, bytes.len() as u64, tail, scan.last_index),
            next_sequence: scan.next_sequence,
            last_frame: scan.last_frame.map(|start| (start as u64, bytes[start..scan.tail].to_vec())),
            cut_bytes: torn_bytes(&bytes, &header, &scan),
        });
    }
    unreachable!("the last of the segments returned")
}

fn header(path: &Path, bytes: &[u8], id: u64) -> Result<Header, Error> {
    match Header::decode(bytes) {
        Ok(header) if header.id == id => Ok(header),
        Ok(header) => Err(corrupt(path, 0, format!("it holds segment {:016x}: the file was renamed", header.id))),
        Err(BadHeader::Newer { version }) => Err(Error::Newer { file: path.to_owned(), version }),
        Err(BadHeader::Damaged) => Err(corrupt(path, 0, "the header of the segment is bad")),
    }
}

/// Replays the good frames from the start of a segment.
fn scan(path: &Path, bytes: &[u8], header: &Header, replay: &mut Replay) -> Result<Scan, Error> {
    let seed = header.frame_seed();
    let tail = bytes.len().min(HEADER_BYTES as usize);
    let mut scan =
        Scan { tail, last_frame: None, next_sequence: header.first_sequence, last_index: 0, restarted: false };
    while let Some(frame) = read_frame(&bytes[scan.tail..], seed) {
        if frame.sequence != scan.next_sequence {
            let why = format!("frame {} where {} should be", frame.sequence, scan.next_sequence);
            return Err(corrupt(path, scan.tail, why));
        }
        for record in record::records(frame.payload) {
            let record = record.map_err(|why| corrupt(path, scan.tail, why.to_string()))?;
            if let Record::Entry(entry) = &record {
                scan.last_index = scan.last_index.max(entry.index);
            }
            if Replay::restarts_at(&record) {
                (scan.last_index, scan.restarted) = (0, true);
            }
            replay.apply(record).map_err(|why| corrupt(path, scan.tail, why))?;
        }
        scan.last_frame = Some(scan.tail);
        scan.next_sequence += 1;
        // A file cut inside of the padding ends before the place of the next frame.
        scan.tail = (scan.tail + frame.size_bytes()).min(bytes.len());
    }
    Ok(scan)
}

/// The first good frame behind a bad one, in the same segment: its offset and sequence.
fn later_frame(bytes: &[u8], header: &Header, scan: &Scan) -> Option<(usize, u64)> {
    let seed = header.frame_seed();
    let mut ranges = None;
    (scan.tail + FRAME_ALIGN..used_bytes(bytes)).step_by(FRAME_ALIGN).find_map(|offset| {
        let claim = frame_claim(&bytes[offset..])?;
        // Most offsets are told off by a sequence that could not be here, before the cost of a checksum.
        let frames_max = ((offset - scan.tail) / FRAME_HEADER_BYTES) as u64;
        let possible = scan.next_sequence..=scan.next_sequence.saturating_add(frames_max);
        if !possible.contains(&claim.sequence) {
            return None;
        }
        let ranges = ranges.get_or_insert_with(|| Ranges::new(bytes));
        let crc = ranges.append(head_crc(seed, claim.sequence, claim.len), offset + FRAME_HEADER_BYTES, claim.len);
        (crc == claim.crc).then_some((offset, claim.sequence))
    })
}

/// How much behind the tail was left by a write that tore; 0 where the log simply ends.
fn torn_bytes(bytes: &[u8], header: &Header, scan: &Scan) -> u64 {
    if !header.recycled {
        let end = used_bytes(bytes).min(scan.tail + FRAME_BYTES_MAX as usize);
        let behind = bytes.get(scan.tail..end).unwrap_or_default();
        return behind.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1);
    }
    // Behind the tail of a recycled segment lie frames of its earlier life: only a header with the awaited sequence
    // tells of a torn write there.
    match frame_claim(&bytes[scan.tail..]) {
        Some(claim) if claim.sequence == scan.next_sequence => (FRAME_HEADER_BYTES + claim.len) as u64,
        _ => 0,
    }
}

/// Where the zeros begin that a segment ends with, roughly: most of a young one is zeros, told at the speed of memory.
fn used_bytes(bytes: &[u8]) -> usize {
    const BLOCK: [u8; 4096] = [0; 4096];
    let zeros = bytes.rchunks(BLOCK.len()).take_while(|block| **block == BLOCK[..block.len()]).count();
    bytes.len().saturating_sub(zeros * BLOCK.len())
}

fn corrupt(file: &Path, offset: usize, why: impl Into<String>) -> Error {
    Error::Corrupt { file: file.to_owned(), offset: offset as u64, why: why.into() }
}
