//! What must hold of the log's and the snapshots' files, whatever bytes are in them: recovered or refused, never a panic,
//! never a guess. Called by `crate::fuzzing`; not in any binary that ships.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use raft::eraftpb::{Entry, HardState};

use super::disk::Disk;
use super::disk_memory::MemoryDisk;
use super::record::{self, FRAME_ALIGN, Frame, Malformed, Record, read_frame};
use super::segment::{self, HEADER_BYTES, Header};
use super::snapshot::{Image, Meta, Snapshots};
use super::{Append, Error, Options, Recovered, Wal, recovery};
use crate::cluster::{Member, PeerUrl};

/// Room for a few frames in each segment.
const SEGMENT_BYTES: u64 = HEADER_BYTES + 1024;
const DATA_DIR: &str = "/data";
/// As of builds that did not write the size down.
const HEADER: Header = Header { id: 1, salt: 7, first_sequence: 1, recycled: false, size_bytes: 0 };

fn options() -> Options {
    Options { dir: Path::new(DATA_DIR).join("wal"), segment_bytes: SEGMENT_BYTES }
}

/// Any bytes as a frame, as the payload of one, and as a segment.
pub fn frame(bytes: &[u8]) {
    if let Some(found) = read_frame(bytes, 0) {
        assert!(bytes.starts_with(&sealed(found.payload, 0, found.sequence)[..16 + found.payload.len()]));
    }
    payload(bytes);
    // There is no more to read when the choices end.
    segment_of(&mut Unstructured::new(bytes)).ok();
}

/// What is taken for records is written again as the same bytes.
fn payload(bytes: &[u8]) {
    if !bytes.is_empty() {
        let frame = sealed(bytes, 3, 9);
        let expected = Frame { sequence: 9, payload: bytes };
        assert_eq!(read_frame(&frame, 3), Some(expected), "what was sealed is read");
        assert_eq!(read_frame(&frame[..15 + bytes.len()], 3), None, "a frame that was cut");
    }
    let read = |bytes: &[u8]| record::records(bytes).collect::<std::result::Result<Vec<Record>, Malformed>>();
    let Ok(records) = read(bytes) else { return };
    let mut again = Vec::new();
    records.iter().for_each(|record| put(&mut again, record));
    assert_eq!(read(&again).as_ref(), Ok(&records));
    // A URL has several spellings, of which one is written.
    if !records.iter().any(|record| matches!(record, Record::Founding(_))) {
        assert_eq!(again, bytes);
    }
}

fn put(out: &mut Vec<u8>, record: &Record) {
    match record {
        Record::Founding(founders) => record::put_founding(out, founders),
        Record::Entry(entry) => record::put_entry(out, entry),
        Record::HardState(state) => record::put_hard_state(out, state),
        Record::Boot(number) => record::put_boot(out, *number),
        Record::Nonce { member, nonce } => record::put_nonce(out, *member, *nonce),
        Record::Compacted { index, term, last } => record::put_compacted(out, *index, *term, *last),
    }
}

fn sealed(payload: &[u8], seed: u32, sequence: u64) -> Vec<u8> {
    let mut frame = Vec::new();
    record::begin_frame(&mut frame);
    frame.extend_from_slice(payload);
    record::seal_frame(&mut frame, seed, sequence);
    frame
}

/// A segment put together from pieces with right checksums and pieces without.
fn segment_of(u: &mut Unstructured<'_>) -> Result<()> {
    let flags: u8 = u.arbitrary()?;
    let header = Header { recycled: flags & 1 != 0, ..HEADER };
    assert_eq!(Header::decode(&header.encode()), Ok(header));
    let (mut bytes, mut sequence) = (header.encode(), 1);
    if flags & 2 == 0 {
        let mut first = Vec::new();
        record::put_founding(&mut first, &founders());
        record::put_boot(&mut first, 1);
        bytes.extend(sealed(&first, header.frame_seed(), sequence));
        sequence += 1;
    }
    while !u.is_empty() {
        let (kind, len): (u8, u8) = u.arbitrary()?;
        let piece = u.bytes(usize::from(len).min(u.len()))?;
        match kind % 8 {
            0..4 => {
                bytes.extend(sealed(piece, header.frame_seed(), sequence));
                sequence += 1;
            }
            4 => bytes.extend(sealed(piece, header.frame_seed(), sequence + 1)),
            5 => bytes.extend(sealed(piece, header.frame_seed() ^ 1, sequence)),
            6 => bytes.extend_from_slice(piece),
            _ => bytes.resize(bytes.len().next_multiple_of(FRAME_ALIGN) + usize::from(len), 0),
        }
    }
    if flags & 4 != 0 {
        let size_bytes = bytes.len() as u64;
        bytes[..HEADER_BYTES as usize].copy_from_slice(&Header { size_bytes, ..header }.encode());
    }
    let disk = MemoryDisk::new();
    disk.set_content(&segment::path(&options().dir, HEADER.id), bytes);
    let found = recovery::recover(&disk, &options().dir);
    let opened = open(&disk);
    assert_eq!(found.is_ok(), opened.is_ok(), "a log that can be read can be opened");
    if let Ok((wal, recovered)) = opened {
        goes_on(&disk, wal, &recovered);
    }
    Ok(())
}

/// A directory of valid segments that something happened to: what comes back is what was there at some time, or the
/// start is refused; and what came back can be gone on from.
pub fn recover(bytes: &[u8]) {
    // There is nothing to do when the choices end.
    recover_with(&mut Unstructured::new(bytes)).ok();
}

fn recover_with(u: &mut Unstructured<'_>) -> Result<()> {
    let disk = MemoryDisk::new();
    let (wal, _) = Wal::create(Arc::new(disk.clone()), &options(), &founders(), 100, Arc::default())
        .expect("a memory disk takes a log");
    let history = written(u, &disk, wal)?;
    let mut forged = false;
    for _ in 0..u.int_in_range(0..=3)? {
        forged |= damage(u, &disk)?;
    }
    if let Ok((wal, recovered)) = open(&disk) {
        let content = content(&recovered);
        assert!(forged || history.contains(&content), "a log that never was: {content:?}");
        goes_on(&disk, wal, &recovered);
    }
    Ok(())
}

fn open(disk: &MemoryDisk) -> std::result::Result<(Wal, Recovered), Error> {
    Wal::open(Arc::new(disk.clone()), &options(), 50, Arc::default())
}

fn founders() -> Vec<Member> {
    vec![Member { id: 1, urls: vec![PeerUrl::parse("http://a:1").expect("a URL")] }]
}

/// What a log holds, but for what each start adds.
#[derive(Debug, Clone, PartialEq)]
struct Content {
    founders: Vec<Member>,
    hard_state: HardState,
    entries: Vec<Entry>,
    nonces: BTreeMap<u64, u64>,
    compacted: Option<(u64, u64)>,
}

fn content(recovered: &Recovered) -> Content {
    let Recovered { founders, hard_state, entries, nonces, compacted, .. } = recovered.clone();
    let entries: Vec<Entry> = entries.read().collect::<std::result::Result<_, _>>().expect("it can be read again");
    assert!(entries.iter().all(|entry| recovered.entries.term(entry.index) == Some(entry.term)));
    Content { founders, hard_state, entries, nonces, compacted }
}

/// Fills a log, and tells what it held after each step.
fn written(u: &mut Unstructured<'_>, disk: &MemoryDisk, mut wal: Wal) -> Result<Vec<Content>> {
    let mut history = vec![reopened(disk)];
    let (mut term, mut base, mut last, mut commit) = (1, 1, 1, 1);
    for _ in 0..u.int_in_range(0..=12)? {
        let (what, count): (u8, u8) = u.arbitrary()?;
        let mut append = Append::default();
        let first = match what % 8 {
            0..4 => last + 1,
            // A new leader replaces what was not committed.
            4 => {
                term += 1;
                commit + 1
            }
            5 if commit > base => {
                base = base + 1 + u64::from(count) % (commit - base);
                let term = term_at(&history[history.len() - 1], base);
                wal.compact(base, term).expect("a memory disk takes a compaction");
                history.push(reopened(disk));
                continue;
            }
            6 => {
                wal.prepare_spare().expect("a memory disk takes a spare");
                continue;
            }
            _ => {
                base = last.max(commit) + u64::from(count % 4);
                (last, commit) = (base, base);
                append.snapshot = Some((base, term));
                base + 1
            }
        };
        for index in first..first + u64::from(count % 4) {
            // All of an append fits a frame: one that takes several may come back in part.
            let data = vec![what; usize::from(count % 64)].into();
            append.entries.push(Entry { term, index, data, ..Entry::default() });
            last = index;
        }
        if append.entries.is_empty() && append.snapshot.is_none() {
            append.nonces.push((u64::from(what), u64::from(count)));
        }
        commit = if what & 0x80 == 0 { commit } else { last };
        append.hard_state = Some(HardState { term, vote: 1, commit, ..HardState::default() });
        wal.append(&[append]).expect("a memory disk takes an append");
        history.push(reopened(disk));
    }
    Ok(history)
}

/// What a start now would find.
fn reopened(disk: &MemoryDisk) -> Content {
    let (_, recovered) = open(&disk.fork()).expect("an undamaged log opens");
    content(&recovered)
}

fn term_at(log: &Content, index: u64) -> u64 {
    log.entries.iter().find(|entry| entry.index == index).expect("a committed entry is there").term
}

/// Does something to the files. True where checksums were made right again: then any log may come back.
fn damage(u: &mut Unstructured<'_>, disk: &MemoryDisk) -> Result<bool> {
    let dir = options().dir;
    let ids = segment::ids(disk, &dir).expect("a memory disk lists");
    let Some(last) = ids.last() else { return Ok(false) };
    // Mostly the last one, the only one whose end may be cut.
    let (what, which, at, len): (u8, u8, u16, u8) = u.arbitrary()?;
    let id = if which < 128 { *last } else { ids[usize::from(which) % ids.len()] };
    let path = segment::path(&dir, id);
    let mut bytes = disk.content(&path).expect("it was listed");
    if bytes.is_empty() {
        return Ok(false);
    }
    // The header, or what lies behind it.
    let at = if at % 32 == 0 { usize::from(len) } else { HEADER_BYTES as usize + usize::from(at) % 1100 };
    let at = at.min(bytes.len() - 1);
    let end = (at + usize::from(len)).min(bytes.len());
    match what % 9 {
        0 => bytes[at] ^= 1 << (len % 8),
        1 => bytes[at..end].fill(0),
        2 => bytes.truncate(at),
        3 => {
            let new = u.bytes((end - at).min(u.len()))?;
            bytes[at..at + new.len()].copy_from_slice(new);
        }
        // What a disk wrote to the wrong place.
        4 => {
            let to = (HEADER_BYTES as usize).min(bytes.len() - (end - at));
            bytes.copy_within(at..end, to);
        }
        5 => bytes.resize(bytes.len() + usize::from(len), 0xff),
        6 => {
            disk.remove(&path).expect("it was listed");
            return Ok(false);
        }
        7 => {
            let other = segment::path(&dir, id + u64::from(len % 3));
            disk.rename(&path, &other).expect("it was listed");
            return Ok(false);
        }
        _ => {
            let forged = forge(u, &mut bytes, usize::from(len))?;
            disk.set_content(&path, bytes);
            return Ok(forged);
        }
    }
    disk.set_content(&path, bytes);
    Ok(false)
}

/// Changes the payload of a frame and seals it again. False where there is no such frame.
fn forge(u: &mut Unstructured<'_>, bytes: &mut [u8], nth: usize) -> Result<bool> {
    let Ok(seed) = Header::decode(bytes).map(|header| header.frame_seed()) else { return Ok(false) };
    let mut at = HEADER_BYTES as usize;
    for _ in 0..nth % 8 {
        at += read_frame(&bytes[at.min(bytes.len())..], seed).map_or(0, |frame| frame.size_bytes());
    }
    let Some(frame) = read_frame(&bytes[at.min(bytes.len())..], seed) else { return Ok(false) };
    let (mut payload, sequence) = (frame.payload.to_vec(), frame.sequence);
    for _ in 0..u.int_in_range(1..=4)? {
        let (place, byte): (u8, u8) = u.arbitrary()?;
        let place = usize::from(place) % payload.len();
        payload[place] = byte;
    }
    let frame = sealed(&payload, seed, sequence);
    bytes[at..at + 16 + payload.len()].copy_from_slice(&frame[..16 + payload.len()]);
    Ok(true)
}

/// Whatever came back, more is appended behind it, and all of it comes back again.
fn goes_on(disk: &MemoryDisk, mut wal: Wal, recovered: &Recovered) {
    let mut expected = content(recovered);
    let (base, _) = recovered.compacted.unwrap_or((1, 1));
    let Some(index) = recovered.entries.last().unwrap_or(base).checked_add(1) else { return };
    let entry = Entry { term: recovered.hard_state.term, index, data: "on".into(), ..Entry::default() };
    expected.entries.push(entry.clone());
    wal.append(&[Append { entries: vec![entry], ..Append::default() }]).expect("a log that was recovered takes more");
    drop(wal);
    let (_, again) = open(disk).unwrap_or_else(|error| panic!("what was recovered is refused: {error}"));
    assert_eq!(content(&again), expected);
    assert!(again.boot > recovered.boot || recovered.boot == u64::MAX, "{} after {}", again.boot, recovered.boot);
}

/// Any bytes as a snapshot file, and a whole one that something happened to: what is delivered to its end is what was
/// written.
pub fn snapshot(bytes: &[u8]) {
    let disk = MemoryDisk::new();
    let snapshots = Snapshots::open(Arc::new(disk.clone()), Path::new(DATA_DIR)).expect("a memory disk takes it");
    disk.set_content(&snapshot_path(2, 1), bytes.to_vec());
    if let Ok((meta, image)) = snapshots.read(2, 1) {
        assert_eq!(meta.check(), Ok(()));
        drop(read_all(image));
    }
    // There is nothing to do when the choices end.
    damaged_snapshot(&mut Unstructured::new(bytes), &disk, &snapshots).ok();
}

fn damaged_snapshot(u: &mut Unstructured<'_>, disk: &MemoryDisk, snapshots: &Snapshots) -> Result<()> {
    let len: u16 = u.arbitrary()?;
    let Ok(meta) = serde_json::from_slice::<Meta>(u.bytes(usize::from(len).min(u.len()))?) else { return Ok(()) };
    let len: u16 = u.arbitrary()?;
    let written = u.bytes(usize::from(len).min(u.len()))?.repeat(1 + usize::from(u.arbitrary::<u8>()?));
    let outcome = snapshots.write(&meta, |out| out.write_all(&written));
    assert_eq!(outcome.is_ok(), meta.check().is_ok(), "{outcome:?}");
    if outcome.is_err() {
        return Ok(());
    }
    let (read, image) = snapshots.read(meta.index, meta.term).expect("what was written is read");
    assert_eq!((&read, read_all(image).as_deref()), (&meta, Some(&written[..])));

    let path = snapshot_path(meta.index, meta.term);
    let mut bytes = disk.content(&path).expect("it was written");
    let whole = bytes.clone();
    let (what, at, with): (u8, u32, u8) = u.arbitrary()?;
    let at = at as usize % bytes.len();
    match what % 4 {
        0 => bytes[at] ^= with,
        1 => bytes.truncate(at),
        2 => bytes.extend_from_slice(&vec![with; at]),
        _ => bytes.copy_within(at.., at / 2),
    }
    let mut incoming = snapshots.receive().expect("a memory disk takes it");
    bytes.chunks(1 + usize::from(with)).for_each(|piece| incoming.write(piece).expect("a memory disk takes it"));
    let same = bytes == whole;
    assert_eq!(incoming.finish().is_ok(), same, "a damaged snapshot is taken, or a whole one is not");
    disk.set_content(&path, bytes);
    let delivered = snapshots.read(meta.index, meta.term).ok().and_then(|(meta, image)| Some((meta, read_all(image)?)));
    assert_eq!(delivered, same.then_some((meta, written)));
    Ok(())
}

fn snapshot_path(index: u64, term: u64) -> PathBuf {
    Path::new(DATA_DIR).join(format!("snap/{term:016x}-{index:016x}.snap"))
}

/// The content of an image, if its end is reached.
fn read_all(mut image: Image) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let outcome: io::Result<usize> = image.read_to_end(&mut bytes);
    outcome.ok().map(|_| bytes)
}

/// Inputs to begin with, made by the encoders themselves: of [`frame`], [`recover`], [`snapshot`].
#[cfg(test)]
pub fn seeds() -> [Vec<Vec<u8>>; 3] {
    let entry = Entry { term: 2, index: 2, data: "data".into(), context: "context".into(), ..Entry::default() };
    let state = HardState { term: 2, vote: 1, commit: 2, ..HardState::default() };
    let records = [
        Record::Founding(founders()),
        Record::Boot(7),
        Record::Entry(entry),
        Record::HardState(state),
        Record::Nonce { member: 2, nonce: 9 },
        Record::Compacted { index: 2, term: 2, last: 2 },
    ];
    let payloads = records.map(|record| {
        let mut payload = Vec::new();
        put(&mut payload, &record);
        payload
    });
    let mut segment = vec![0];
    for payload in &payloads {
        segment.extend([0, payload.len() as u8]);
        segment.extend(payload);
    }
    let frames = [payloads.to_vec(), vec![payloads.concat(), segment, sealed(&payloads[2], 0, 1)]].concat();
    // Steps of what and how much, then one damage of each kind.
    let steps = [6, 0, 3, 0x81, 3, 4, 2, 0x82, 3, 5, 1, 7, 2];
    let histories = (0..9).map(|what| [&steps[..], &[1, what, 0, 33, 0, 9, 1, 2, 3]].concat()).collect();
    let meta = serde_json::to_vec(&Meta { index: 2, ..Meta::founding(&founders()) }).unwrap();
    let mut file = (meta.len() as u16).to_le_bytes().to_vec();
    file.extend(meta);
    file.extend([5, 0]);
    file.extend(b"image");
    let snapshots = (0..4).map(|what| [&file[..], &[2, what, 60, 0, 0, 0, 1]].concat()).collect();
    [frames, histories, snapshots]
}
