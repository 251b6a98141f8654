//! Reads a log back: recover or refuse, never guess. A bad frame with nothing behind it is the torn end of the last
//! write, which nobody was told about: it is cut. A bad frame with a later one behind it is damage: the log is
//! refused. This decides safely because frame n + 1 is written only after the sync of frame n has returned.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::disk::{Disk, DiskError, DiskFile};
use super::error::Error;
use super::frames::{Frames, STRETCH_BYTES};
use super::ranges::Ranges;
use super::record::{self, Claim, FRAME_ALIGN, FRAME_BYTES_MAX, FRAME_HEADER_BYTES, Record, frame_claim, head_crc};
use super::replay::Replay;
use super::segment::{self, BadHeader, HEADER_BYTES, Header, Segment};

/// Zeros are told by the block. Small in tests, as [`STRETCH_BYTES`] is.
const BLOCK_BYTES: usize = if cfg!(test) { 16 } else { 4096 };

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
    tail: u64,
    last_frame: Option<u64>,
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
        let Opened { header, block, file_bytes, mut frames } = open_segment(disk, &path, id)?;
        if file_bytes < header.size_bytes {
            let why = format!("it ends here, and was made with {} bytes", header.size_bytes);
            return Err(corrupt(&path, file_bytes, why));
        }
        if let Some((path, scan)) = &previous
            && scan.next_sequence != header.first_sequence
        {
            let (expected, found) = (scan.next_sequence, header.first_sequence);
            let why = format!("frame {expected} should follow, yet the next segment begins with {found}");
            return Err(corrupt(path, scan.tail, why));
        }
        let scan = scan(&path, &mut frames, &header, &mut replay)?;
        if scan.restarted {
            closed.iter_mut().for_each(|before| before.last_index = 0);
        }
        if id != last {
            closed.push_back(Closed { id, last_index: scan.last_index, size_bytes: file_bytes });
            previous = Some((path, scan));
            continue;
        }
        match header.next_sequence(&block) {
            Ok(None) => {}
            Ok(Some(sequence)) => {
                let why = format!("this segment is missing: frame {sequence} and what follows are in it");
                return Err(corrupt(&segment::path(dir, id.saturating_add(1)), 0, why));
            }
            Err(_) => return Err(corrupt(&path, 0, "the word in its header that another segment follows is bad")),
        }
        let file = frames.into_file();
        let (tail, awaited) = (scan.tail, scan.next_sequence);
        let behind = Behind { file: file.as_ref(), file_bytes, tail, header, awaited };
        if let Some((offset, sequence)) = behind.later_frame()? {
            let why = format!("frame {} is bad, yet frame {sequence} follows at byte {offset}", scan.next_sequence);
            return Err(corrupt(&path, scan.tail, why));
        }
        if replay.base.is_none() {
            let missing = segment::path(dir, first.saturating_sub(1));
            return Err(corrupt(&missing, 0, "this segment, which the log needs, is missing"));
        }
        replay.check().map_err(|why| corrupt(&path, scan.tail, why))?;
        let cut_bytes = behind.torn_bytes()?;
        let last_frame = match scan.last_frame {
            Some(start) => Some((start, read(file.as_ref(), start..scan.tail)?)),
            None => None,
        };
        return Ok(Found {
            replay,
            closed,
            active: Segment::resume(file, header, file_bytes, scan.tail, scan.last_index),
            next_sequence: scan.next_sequence,
            last_frame,
            cut_bytes,
        });
    }
    unreachable!("the last of the segments returned")
}

/// A segment, to be read.
pub struct Opened {
    header: Header,
    /// The block that the header is in.
    block: Vec<u8>,
    file_bytes: u64,
    pub frames: Frames,
}

/// Opens a segment and checks its header.
pub fn open_segment(disk: &dyn Disk, path: &Path, id: u64) -> Result<Opened, Error> {
    let file = disk.open(path)?;
    let file_bytes = file.size()?;
    let block = read(file.as_ref(), 0..file_bytes.min(HEADER_BYTES))?;
    let header = match Header::decode(&block) {
        Ok(header) if header.id == id => header,
        Ok(header) => {
            return Err(corrupt(path, 0, format!("it holds segment {:016x}: the file was renamed", header.id)));
        }
        Err(BadHeader::Newer { version }) => return Err(Error::Newer { file: path.to_owned(), version }),
        Err(BadHeader::Damaged) => return Err(corrupt(path, 0, "the header of the segment is bad")),
    };
    let frames = Frames::new(file, &header)?;
    Ok(Opened { header, block, file_bytes, frames })
}

/// Replays the good frames from the start of a segment.
fn scan(path: &Path, frames: &mut Frames, header: &Header, replay: &mut Replay) -> Result<Scan, Error> {
    let mut scan = Scan {
        tail: frames.tail(),
        last_frame: None,
        next_sequence: header.first_sequence,
        last_index: 0,
        restarted: false,
    };
    while let Some(frame) = frames.next()? {
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
        scan.tail = frames.tail();
    }
    Ok(scan)
}

/// What lies behind the last good frame of the last segment.
struct Behind<'a> {
    file: &'a dyn DiskFile,
    file_bytes: u64,
    tail: u64,
    header: Header,
    /// The sequence of the frame that is not there, or not whole.
    awaited: u64,
}

impl Behind<'_> {
    /// The first good frame behind a bad one: its offset and sequence.
    fn later_frame(&self) -> Result<Option<(u64, u64)>, DiskError> {
        // Most logs end without anything that could be one: only where something could is all of it read at once.
        let Some(first) = self.first_possible()? else { return Ok(None) };
        let bytes = read(self.file, self.tail..self.file_bytes)?;
        let (ranges, seed) = (Ranges::new(&bytes), self.header.frame_seed());
        Ok(((first - self.tail) as usize..bytes.len()).step_by(FRAME_ALIGN).find_map(|at| {
            let offset = self.tail + at as u64;
            let claim = self.possible(&bytes[at..], offset)?;
            let crc = ranges.append(head_crc(seed, claim.sequence, claim.len), at + FRAME_HEADER_BYTES, claim.len);
            (crc == claim.crc).then_some((offset, claim.sequence))
        }))
    }

    /// The first place that claims to be the header of a frame that could follow here.
    fn first_possible(&self) -> Result<Option<u64>, DiskError> {
        let mut found = None;
        self.stretches(self.tail + FRAME_ALIGN as u64..self.file_bytes, |start, bytes| {
            let blocks = (0..bytes.len()).step_by(BLOCK_BYTES);
            // Most of a young segment is zeros, told at the speed of memory. No frame begins with them.
            let used = blocks.filter(|at| !is_zero(&bytes[*at..(at + BLOCK_BYTES).min(bytes.len())]));
            let mut places = used.flat_map(|at| (at..at + BLOCK_BYTES).step_by(FRAME_ALIGN));
            found = places.find_map(|at| {
                let offset = start + at as u64;
                self.possible(bytes.get(at..)?, offset).map(|_| offset)
            });
            found.is_none()
        })?;
        Ok(found)
    }

    /// What the bytes at an offset claim, if the sequence could be in this segment, be it at another place. Most are told off by
    /// that, before the cost of a checksum.
    fn possible(&self, bytes: &[u8], offset: u64) -> Option<Claim> {
        let claim = frame_claim(bytes, self.file_bytes - offset)?;
        let frames_max = (self.file_bytes - self.tail) / FRAME_HEADER_BYTES as u64;
        (self.awaited..=self.awaited.saturating_add(frames_max)).contains(&claim.sequence).then_some(claim)
    }

    /// How much was left by a write that tore; 0 where the log simply ends.
    fn torn_bytes(&self) -> Result<u64, DiskError> {
        let reach = self.file_bytes.min(self.tail + FRAME_BYTES_MAX);
        if !self.header.recycled {
            let mut torn = 0;
            self.stretches(self.tail..reach, |start, bytes| {
                let last = bytes.iter().rposition(|byte| *byte != 0);
                torn = last.map_or(torn, |last| start - self.tail + last as u64 + 1);
                true
            })?;
            return Ok(torn);
        }
        // Behind the tail of a recycled segment lie frames of its earlier life: only a header with the awaited sequence
        // tells of a torn write there.
        let header = read(self.file, self.tail..reach.min(self.tail + FRAME_HEADER_BYTES as u64))?;
        Ok(match frame_claim(&header, self.file_bytes - self.tail) {
            Some(claim) if claim.sequence == self.awaited => (FRAME_HEADER_BYTES + claim.len) as u64,
            _ => 0,
        })
    }

    /// Shows the bytes of a range, a stretch at a time with the beginning of the next one, until `more` says that it
    /// is enough.
    fn stretches(&self, range: Range<u64>, mut more: impl FnMut(u64, &[u8]) -> bool) -> Result<(), DiskError> {
        let mut buffer = Vec::new();
        for start in range.clone().step_by(STRETCH_BYTES) {
            let end = range.end.min(start + (STRETCH_BYTES + FRAME_HEADER_BYTES) as u64);
            buffer.resize((end - start) as usize, 0);
            self.file.read_at(start, &mut buffer)?;
            if !more(start, &buffer) {
                break;
            }
        }
        Ok(())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes == &[0; BLOCK_BYTES][..bytes.len()]
}

fn read(file: &dyn DiskFile, range: Range<u64>) -> Result<Vec<u8>, DiskError> {
    let mut bytes = vec![0; range.end.saturating_sub(range.start) as usize];
    file.read_at(range.start, &mut bytes)?;
    Ok(bytes)
}

fn corrupt(file: &Path, offset: u64, why: impl Into<String>) -> Error {
    Error::Corrupt { file: file.to_owned(), offset, why: why.into() }
}
