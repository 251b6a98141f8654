//! A log comes back as it was, whatever happened to it, or the start is refused: power lost at any operation, the last
//! frame cut at any byte, any earlier bit flipped, a disk that fills or fails.

mod history;
mod proof;
mod snapshots;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use raft::eraftpb::{Entry, HardState};

use super::disk::{Disk, RealDisk};
use super::disk_memory::MemoryDisk;
use super::record::FRAME_BYTES_MAX;
use super::segment::HEADER_BYTES;
use super::{Append, Error, Options, Recovered, Room, SEGMENT_BYTES_MIN, Wal, record, segment};
use crate::cluster::Member;
use crate::metrics::Metrics;

/// Room for a few frames in each segment.
const SEGMENT_BYTES: u64 = HEADER_BYTES + 1024;

fn options() -> Options {
    Options { dir: "/data/wal".into(), segment_bytes: SEGMENT_BYTES }
}

fn segment_path(id: u64) -> PathBuf {
    segment::path(&options().dir, id)
}

fn founders() -> Vec<Member> {
    vec![Member { id: 1, urls: vec![crate::cluster::PeerUrl::parse("http://a:1").unwrap()] }]
}

fn create(disk: &MemoryDisk) -> Result<Wal, Error> {
    let created = Wal::create(Arc::new(disk.clone()), &options(), &founders(), 100, Arc::default());
    created.map(|(wal, _)| wal)
}

fn open(disk: &MemoryDisk) -> Result<(Wal, Recovered), Error> {
    // One for all: nobody reads them here, and a proof opens a log many thousand times.
    static METRICS: OnceLock<Arc<Metrics>> = OnceLock::new();
    Wal::open(Arc::new(disk.clone()), &options(), 50, METRICS.get_or_init(Arc::default).clone())
}

fn read(recovered: &Recovered) -> Vec<Entry> {
    recovered.entries.read().collect::<Result<_, _>>().unwrap()
}

/// Entries of a term, each with data that tells its term and index, and the state that goes with them.
fn append(term: u64, indexes: Range<u64>) -> Append {
    let entries = indexes.clone().map(|index| entry(term, index, format!("{term}/{index}").repeat(8).into_bytes()));
    let mut state = HardState::new();
    (state.term, state.vote, state.commit) = (term, 1, indexes.start - 1);
    Append {
        number: indexes.end,
        snapshot: None,
        entries: entries.collect(),
        hard_state: Some(state),
        nonces: vec![(2, indexes.end)],
    }
}

fn entry(term: u64, index: u64, data: Vec<u8>) -> Entry {
    let mut entry = Entry::new();
    (entry.term, entry.index, entry.data) = (term, index, data.into());
    entry
}

/// What must come back: the same log kept in the plainest way.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    entries: BTreeMap<u64, Entry>,
    hard_state: HardState,
    nonces: BTreeMap<u64, u64>,
}

impl Model {
    fn with(&self, append: &Append) -> Model {
        let mut next = self.clone();
        if let Some((index, _)) = append.snapshot {
            next.entries.clear();
            next = next.above(index);
        }
        for entry in &append.entries {
            next.entries.retain(|index, _| *index < entry.index);
            next.entries.insert(entry.index, entry.clone());
        }
        next.hard_state = append.hard_state.clone().unwrap_or(next.hard_state);
        next.nonces.extend(append.nonces.iter().copied());
        next
    }

    /// What is left of it behind a compaction.
    fn above(mut self, index: u64) -> Model {
        self.entries.retain(|at, _| index < *at);
        if index > 1 {
            self.hard_state.commit = self.hard_state.commit.max(index);
        }
        self
    }
}

impl From<&Recovered> for Model {
    fn from(recovered: &Recovered) -> Model {
        let (hard_state, nonces) = (recovered.hard_state.clone(), recovered.nonces.clone());
        let entries: BTreeMap<u64, Entry> = read(recovered).into_iter().map(|entry| (entry.index, entry)).collect();
        assert_eq!(entries.len() as u64, recovered.entries.len());
        Model { entries, hard_state, nonces }
    }
}

/// A log of three segments: its model before and after the last append, and where in the last segment that lies.
struct Sample {
    disk: MemoryDisk,
    before: Model,
    after: Model,
    last_frame: Range<u64>,
}

fn sample() -> Sample {
    let disk = MemoryDisk::new();
    let mut wal = create(&disk).unwrap();
    let mut after = Model::default();
    for index in 0.. {
        let append = append(1 + index / 4, 2 + 3 * index..5 + 3 * index);
        let (before, start) = (after.clone(), wal.active.tail);
        wal.append(std::slice::from_ref(&append)).unwrap();
        after = after.with(&append);
        if wal.closed.len() == 2 && start < wal.active.tail {
            return Sample { disk, before, after, last_frame: start..wal.active.tail };
        }
    }
    unreachable!()
}

/// Numbers that look random and are the same for the same seed (xorshift64*).
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % bound
    }
}

#[test]
fn what_was_appended_is_recovered_and_each_start_has_a_higher_number() {
    let disk = MemoryDisk::new();
    let mut wal = create(&disk).unwrap();
    let (first, second) = (append(1, 2..5), append(2, 4..6));
    wal.append(&[first.clone(), second.clone()]).unwrap();
    drop(wal);
    for boot in [101, 102] {
        let (_, recovered) = open(&disk).unwrap();
        assert_eq!(Model::from(&recovered), Model::default().with(&first).with(&second));
        assert_eq!((recovered.founders, recovered.boot), (founders(), boot));
        assert_eq!((recovered.compacted, recovered.cut_bytes, recovered.segments), (None, 0, 1));
    }
    let (_, recovered) = Wal::open(Arc::new(disk), &options(), 5000, Arc::default()).unwrap();
    assert_eq!(recovered.boot, 5000);
}

#[test]
fn the_real_disk_keeps_a_log_too() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { dir: dir.path().join("wal"), segment_bytes: SEGMENT_BYTES_MIN };
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    assert!(!Wal::exists(disk.as_ref(), &options.dir).unwrap());
    let (mut wal, _) = Wal::create(disk.clone(), &options, &founders(), 1, Arc::default()).unwrap();
    wal.append(&[append(1, 2..5)]).unwrap();
    wal.prepare_spare().unwrap();
    for index in 5..12 {
        let entries = vec![entry(1, index, vec![7; 4 << 20])];
        wal.append(&[Append { number: index, entries, ..Append::default() }]).unwrap();
    }
    wal.compact(8, 1).unwrap();
    drop(wal);
    assert!(Wal::exists(disk.as_ref(), &options.dir).unwrap());
    let (_, recovered) = Wal::open(disk, &options, 1, Arc::default()).unwrap();
    assert_eq!(recovered.compacted, Some((8, 1)));
    assert_eq!(read(&recovered).iter().map(|entry| entry.index).collect::<Vec<_>>(), [9, 10, 11]);
    // These were in the first segment, which has gone.
    assert_eq!((recovered.segments, recovered.founders), (2, founders()));
    assert_eq!(recovered.nonces, BTreeMap::from([(2, 5)]));
    assert_eq!((recovered.hard_state.term, recovered.hard_state.commit), (1, 8), "what was compacted was committed");
}

#[test]
fn one_append_of_many_costs_one_sync() {
    let disk = MemoryDisk::new();
    let mut wal = create(&disk).unwrap();
    let (syncs, operations) = (disk.syncs(), disk.operations());
    wal.append(&[append(1, 2..3), append(1, 3..4), append(1, 4..5)]).unwrap();
    assert_eq!(disk.syncs() - syncs, 1);
    assert_eq!(disk.operations() - operations, 2, "a write and a sync");
    wal.append(&[Append { number: 9, ..Append::default() }]).unwrap();
    assert_eq!(disk.syncs() - syncs, 1, "nothing to remember, nothing to sync");
}

#[test]
fn more_than_a_frame_can_hold_is_written_and_synced_in_turns() {
    let disk = MemoryDisk::new();
    let options = Options { segment_bytes: SEGMENT_BYTES_MIN, ..options() };
    let (mut wal, _) = Wal::create(Arc::new(disk.clone()), &options, &founders(), 1, Arc::default()).unwrap();
    let syncs = disk.syncs();
    let entries: Vec<Entry> = (2..7).map(|index| entry(1, index, vec![index as u8; 4_200_000])).collect();
    wal.append(&[Append { number: 1, entries: entries.clone(), ..Append::default() }]).unwrap();
    assert_eq!(disk.syncs() - syncs, 5 + 1, "no two entries fit one frame, and one segment is closed");
    assert_eq!(wal.closed.len(), 1);
    let (_, recovered) = Wal::open(Arc::new(disk), &options, 1, Arc::default()).unwrap();
    assert_eq!(read(&recovered), entries);

    let entries = vec![entry(1, 7, vec![0; FRAME_BYTES_MAX as usize])];
    let error = wal.append(&[Append { number: 2, entries, ..Append::default() }]).unwrap_err();
    assert!(matches!(error, Error::RecordTooLarge { .. }), "{error}");
}

#[test]
fn the_last_frame_cut_at_any_byte_is_dropped() {
    let Sample { disk, before, after, last_frame } = sample();
    let whole = disk.content(&segment_path(3)).unwrap();
    let start = last_frame.start as usize;
    let zeros_at_end = whole[..last_frame.end as usize].iter().rev().take_while(|byte| **byte == 0).count() as u64;
    let frame_bytes =
        record::FRAME_HEADER_BYTES + record::frame_claim(&whole[start..], whole.len() as u64).unwrap().len;
    for cut in last_frame.start..=last_frame.end {
        let mut zeros = whole.clone();
        zeros[cut as usize..].fill(0);
        let mut garbage = whole.clone();
        garbage[cut as usize..last_frame.end as usize].fill(0xa5);
        // Where the bytes of the frame behind the cut are what they were, nothing was cut.
        let same = last_frame.end - cut <= zeros_at_end;
        let reaches = cut >= (start + frame_bytes) as u64;
        for (torn, complete) in [(zeros, same), (garbage, reaches)] {
            let disk = disk.fork();
            disk.set_content(&segment_path(3), torn);
            let (mut wal, recovered) = open(&disk).unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
            let model = Model::from(&recovered);
            assert!(model == before || model == after, "cut at {cut}");
            assert_eq!(model == after, complete, "cut at {cut}");
            assert!(!complete || recovered.cut_bytes == 0, "cut at {cut}: {} bytes", recovered.cut_bytes);
            let again = open(&disk.fork()).unwrap().1;
            assert_eq!((Model::from(&again), again.cut_bytes), (model.clone(), 0), "cut at {cut}, once");
            // It goes on from there.
            let more = append(9, model.entries.len() as u64 + 2..model.entries.len() as u64 + 4);
            wal.append(std::slice::from_ref(&more)).unwrap();
            drop(wal);
            assert_eq!(Model::from(&open(&disk).unwrap().1), model.with(&more), "cut at {cut}");
        }
    }
}

/// Whatever of it is left must not lie behind the frames that come next.
#[test]
fn a_long_torn_frame_is_cut_to_its_end() {
    let disk = MemoryDisk::new();
    let options = Options { segment_bytes: SEGMENT_BYTES_MIN, ..options() };
    let (mut wal, _) = Wal::create(Arc::new(disk.clone()), &options, &founders(), 1, Arc::default()).unwrap();
    let start = wal.active.tail as usize;
    let entries = vec![entry(1, 2, vec![7; 3 << 20])];
    wal.append(&[Append { number: 1, entries, ..Append::default() }]).unwrap();
    let mut torn = disk.content(&segment_path(1)).unwrap();
    torn[start..start + 512].fill(0);
    disk.set_content(&segment_path(1), torn);
    for cut_bytes in [(3 << 20)..(3 << 20) + 100, 0..1] {
        let (_, recovered) = Wal::open(Arc::new(disk.clone()), &options, 1, Arc::default()).unwrap();
        assert!(cut_bytes.contains(&recovered.cut_bytes), "{} bytes cut", recovered.cut_bytes);
        assert!(recovered.entries.is_empty());
    }
}

#[test]
fn a_hole_in_the_log_is_refused_by_the_name_of_what_is_missing() {
    let Sample { disk, .. } = sample();
    for (missing, why) in [(1, "which the log needs, is missing"), (2, "in the middle of the log, is missing")] {
        let disk = disk.fork();
        disk.remove(&segment_path(missing)).unwrap();
        let error = open(&disk).err().unwrap().to_string();
        assert!(error.starts_with(segment_path(missing).to_str().unwrap()) && error.contains(why), "{error}");
    }
    let disk = disk.fork();
    disk.set_content(&segment_path(2), disk.content(&segment_path(1)).unwrap());
    let error = open(&disk).err().unwrap().to_string();
    assert!(error.contains("the file was renamed"), "{error}");
}

/// What was there when the log was opened, and is not when it is read, is missed: whoever reads gets no shorter log.
#[test]
fn an_entry_that_is_gone_between_two_readings_is_missed() {
    let Sample { disk, after, .. } = sample();
    let (_, recovered) = open(&disk).unwrap();
    let mut content = disk.content(&segment_path(2)).unwrap();
    content[HEADER_BYTES as usize + 100] ^= 1;
    disk.set_content(&segment_path(2), content);
    let read: Vec<Result<Entry, Error>> = recovered.entries.read().collect();
    let (last, before) = read.split_last().unwrap();
    let error = last.as_ref().unwrap_err().to_string();
    let next = before.last().unwrap().as_ref().unwrap().index + 1;
    assert!(error.contains(&format!("entry {next} was here")) && after.entries.contains_key(&next), "{error}");
    disk.remove(&segment_path(2)).unwrap();
    let read: Result<Vec<Entry>, Error> = recovered.entries.read().collect();
    assert!(read.unwrap_err().to_string().contains(segment_path(2).to_str().unwrap()));
}

/// The segments before it make a log too, and nothing in a record says that it goes on.
#[test]
fn a_log_that_lost_its_last_segment_is_refused() {
    let Sample { disk, .. } = sample();
    disk.remove(&segment_path(3)).unwrap();
    let error = open(&disk).err().unwrap().to_string();
    assert!(error.contains(segment_path(3).to_str().unwrap()) && error.contains("this segment is missing"), "{error}");
}

/// Its frames up to there make a log too.
#[test]
fn a_segment_that_lost_its_end_is_refused() {
    let Sample { disk, last_frame, .. } = sample();
    let whole = disk.content(&segment_path(3)).unwrap();
    for cut in [last_frame.start, last_frame.end, SEGMENT_BYTES - 1] {
        disk.set_content(&segment_path(3), whole[..cut as usize].to_vec());
        let error = open(&disk).err().unwrap().to_string();
        assert!(error.contains(&format!("damaged at byte {cut}: it ends here")), "{error}");
    }
}

/// The power goes when the new segment has its name and the one before it does not yet say so.
#[test]
fn a_segment_that_was_not_closed_is_no_damage() {
    let Sample { disk, after, .. } = sample();
    let mut bytes = disk.content(&segment_path(2)).unwrap();
    bytes[512..524].fill(0);
    disk.set_content(&segment_path(2), bytes);
    assert_eq!(Model::from(&open(&disk).unwrap().1), after);
}

/// A segment gets its name when its header and its first frame are durable: one without them has lost what it held.
#[test]
fn a_segment_that_is_empty_is_refused() {
    let Sample { disk, .. } = sample();
    for lost in [Vec::new(), vec![0; SEGMENT_BYTES as usize], vec![1; 100]] {
        let disk = disk.fork();
        disk.set_content(&segment_path(3), lost);
        let error = open(&disk).err().unwrap().to_string();
        assert!(error.contains("header"), "{error}");
    }
}

#[test]
fn a_newer_format_is_refused_as_such() {
    let disk = MemoryDisk::new();
    create(&disk).unwrap();
    let mut bytes = disk.content(&segment_path(1)).unwrap();
    bytes[8] = 2;
    let crc = crc32c::crc32c(&bytes[..40]);
    bytes[40..44].copy_from_slice(&crc.to_le_bytes());
    disk.set_content(&segment_path(1), bytes);
    assert!(matches!(open(&disk), Err(Error::Newer { version: 2, .. })));
}

#[test]
fn frames_of_an_earlier_life_of_the_file_are_not_read() {
    let Sample { disk, after, .. } = sample();
    let (mut wal, _) = open(&disk).unwrap();
    let last = *after.entries.keys().last().unwrap();
    wal.compact(last, 9).unwrap();
    assert_eq!(wal.closed.len(), 0);
    assert_eq!(disk.size(&options().dir.join("spare")).unwrap(), Some(SEGMENT_BYTES));

    let mut model = after.above(last);
    let id = wal.active.header.id;
    for index in last + 1.. {
        let append = append(9, index..index + 1);
        wal.append(std::slice::from_ref(&append)).unwrap();
        model = model.with(&append);
        if wal.active.header.id != id {
            break;
        }
    }
    assert!(wal.active.header.recycled);
    let bytes = disk.content(&segment_path(id + 1)).unwrap();
    assert!(bytes[wal.active.tail as usize..].windows(3).any(|window| window == b"1/2"), "old frames lie there");
    for _ in 0..3 {
        let (_, recovered) = open(&disk).unwrap();
        assert_eq!((Model::from(&recovered), recovered.cut_bytes), (model.clone(), 0));
        assert_eq!(recovered.compacted, Some((last, 9)));
    }
}

/// What a recycled file holds came from clients once. To read each of these claims to its end would take minutes.
#[test]
fn a_long_frame_claimed_at_every_place_is_no_frame() {
    let options = Options { segment_bytes: 4 << 20, ..options() };
    let disk = MemoryDisk::new();
    let (mut wal, _) = Wal::create(Arc::new(disk.clone()), &options, &founders(), 100, Arc::default()).unwrap();
    wal.append(&[append(1, 2..3)]).unwrap();
    let path = segment::path(&options.dir, 1);
    let mut bytes = disk.content(&path).unwrap();
    let (tail, end) = (wal.active.tail as usize, bytes.len());
    for at in (tail + 16..end - 16).step_by(16) {
        bytes[at..at + 4].copy_from_slice(&((end - at - 16) as u32).to_le_bytes());
        bytes[at + 8..at + 16].copy_from_slice(&(wal.active.header.first_sequence + 3).to_le_bytes());
    }
    disk.set_content(&path, bytes);
    let (_, recovered) = Wal::open(Arc::new(disk), &options, 50, Arc::default()).unwrap();
    assert_eq!(read(&recovered), append(1, 2..3).entries);
}

#[test]
fn compaction_frees_what_lies_below_and_keeps_what_recovery_needs() {
    let Sample { disk, after, .. } = sample();
    let last = *after.entries.keys().last().unwrap();
    for index in 1..=last + 2 {
        let disk = disk.fork();
        let (mut wal, _) = open(&disk).unwrap();
        wal.compact(index, 7).unwrap();
        wal.compact(index, 7).unwrap();
        let more = append(9, index.max(last) + 1..index.max(last) + 2);
        wal.append(std::slice::from_ref(&more)).unwrap();
        let segments = wal.closed.len() + 1;
        drop(wal);
        let (_, recovered) = open(&disk).unwrap();
        assert_eq!(Model::from(&recovered), after.clone().with(&more).above(index), "compacted to {index}");
        assert_eq!(recovered.compacted, (index > 1).then_some((index, 7)));
        assert_eq!((recovered.founders, recovered.segments), (founders(), segments));
        assert!(index < last || segments <= 2, "{segments} segments after all entries were compacted away");
    }
}

/// The snapshot lies behind the log, at its end, or before entries that were of another history.
#[test]
fn a_snapshot_takes_the_place_of_the_log_and_frees_it() {
    let Sample { disk, after, .. } = sample();
    let last = *after.entries.keys().last().unwrap();
    let mut freed_later = 0;
    for (index, entries) in
        [(last + 7, 2), (last + 7, 0), (last, 1), (last - 1, 0), (last - 1, 1), (last - 3, 0), (last - 3, 8)]
    {
        let story = format!("a snapshot at {index} of {last} and {entries} entries");
        let mut append = append(9, index + 1..index + 1 + entries);
        append.snapshot = Some((index, 8));
        // Where it is freed, and where the power goes before that.
        for stop in 0.. {
            let story = format!("{story}, stopped at operation {stop}");
            let disk = disk.fork();
            let (mut wal, _) = open(&disk).unwrap();
            disk.stop_at(disk.operations() + stop);
            let finished = wal.append(std::slice::from_ref(&append)).is_ok();
            assert!(!finished || wal.closed.is_empty(), "{story}: {} segments are left", wal.closed.len() + 1);
            drop(wal);
            disk.crash(&mut || true);
            let (mut wal, recovered) = open(&disk).unwrap_or_else(|error| panic!("{story}: {error}"));
            if recovered.compacted.is_none() {
                assert!(!finished && Model::from(&recovered) == after, "{story}");
                continue;
            }
            assert_eq!(recovered.compacted, Some((index, 8)), "{story}");
            assert_eq!(Model::from(&recovered), after.with(&append), "{story}");
            assert!(wal.closed.iter().all(|closed| closed.last_index == 0), "{story}: nothing in them is needed");
            freed_later += usize::from(wal.closed.len() > 1);
            let more = self::append(10, index + 1 + entries..index + 2 + entries);
            wal.append(std::slice::from_ref(&more)).unwrap();
            wal.compact(index + 1, 10).unwrap();
            assert!(wal.closed.len() <= 1, "{story}: {} segments are left in the end", wal.closed.len() + 1);
            drop(wal);
            let model = after.with(&append).with(&more).above(index + 1);
            assert_eq!(Model::from(&open(&disk).unwrap().1), model, "{story}, and on");
            if finished {
                break;
            }
        }
    }
    assert!(freed_later > 0, "the power never went between the snapshot and what it frees");
}

#[test]
fn a_snapshot_in_the_middle_of_a_batch_drops_what_came_before_it() {
    let disk = MemoryDisk::new();
    let mut wal = create(&disk).unwrap();
    let mut installed = append(3, 6..8);
    installed.snapshot = Some((5, 2));
    let batch = [append(1, 2..12), installed, append(3, 7..11)];
    let first = wal.active.header.id;
    wal.append(&batch).unwrap();
    assert!(first < wal.active.header.id, "they did not fit one frame");
    let last_indexes = wal.closed.iter().map(|closed| closed.last_index).chain([wal.active.last_index]);
    assert_eq!(last_indexes.max(), Some(10), "entry 11 keeps no segment");
    let (_, recovered) = open(&disk).unwrap();
    assert_eq!(recovered.compacted, Some((5, 2)));
    assert_eq!(Model::from(&recovered), batch.iter().fold(Model::default(), |model, append| model.with(append)));
}

#[test]
fn a_spare_that_finds_no_room_says_full_and_ok_once_there_is_room() {
    let disk = MemoryDisk::new();
    let mut wal = create(&disk).unwrap();
    disk.set_capacity(Some(2 * SEGMENT_BYTES - 1));
    assert!(wal.prepare_spare().unwrap_err().is_disk_full());
    assert_eq!(wal.room(), Room::Full);
    assert_eq!(disk.list(&options().dir).unwrap().len(), 1, "the unfinished spare is gone");
    let room_bytes = wal.room_bytes();
    // What the active segment has room for is still taken.
    wal.append(&[append(1, 2..3)]).unwrap();
    disk.set_capacity(None);
    wal.prepare_spare().unwrap();
    assert_eq!(wal.room(), Room::Ok);
    assert!(wal.room_bytes() > room_bytes);
}

#[test]
fn a_disk_without_room_for_the_next_segment_stops_the_log() {
    let Sample { disk, mut after, .. } = sample();
    let (mut wal, _) = open(&disk).unwrap();
    disk.set_capacity(Some(4 * SEGMENT_BYTES - 1));
    let error = loop {
        let last = *after.entries.keys().last().unwrap();
        let append = append(9, last + 1..last + 3);
        match wal.append(std::slice::from_ref(&append)) {
            Ok(()) => after = after.with(&append),
            Err(error) => break error,
        }
    };
    assert!(error.is_disk_full(), "{error}");
    assert!(matches!(wal.append(&[append(9, 2..3)]), Err(Error::Stopped)));
    assert!(matches!(wal.compact(3, 1), Err(Error::Stopped)));
    disk.set_capacity(None);
    assert_eq!(Model::from(&open(&disk).unwrap().1), after);
}

/// What a run did until its disk failed: what must come back, and what may.
struct Run {
    created: bool,
    durable: Model,
    /// The append that failed, if one did.
    attempted: Option<Append>,
    /// Entries up to here may be compacted away.
    compacted: u64,
    /// Entries up to here surely are: a snapshot stands for them.
    installed: u64,
    failed: bool,
}

/// Create, append, rotate, prepare, compact, append over a recycled segment, install snapshots.
fn run(disk: &MemoryDisk) -> Run {
    let mut run =
        Run { created: false, durable: Model::default(), attempted: None, compacted: 1, installed: 1, failed: true };
    let Ok(mut wal) = create(disk) else { return run };
    run.created = true;
    for turn in 0..24 {
        // Every third turn replaces the last entry.
        let last = run.durable.entries.keys().last().copied().unwrap_or(1);
        let next = if turn % 3 == 2 { last } else { last + 1 };
        // One snapshot is ahead of the log, one behind its last entry.
        let snapshot = match turn {
            11 => Some(last + 3),
            19 => Some(last - 1),
            _ => None,
        };
        let next = snapshot.map_or(next, |index| index + 1);
        let mut append = append(1 + turn, next..next + 2);
        append.snapshot = snapshot.map(|index| (index, turn));
        run.compacted = snapshot.unwrap_or(run.compacted);
        if wal.append(std::slice::from_ref(&append)).is_err() {
            assert!(matches!(wal.append(&[]), Err(Error::Stopped)));
            run.attempted = Some(append);
            return run;
        }
        run.durable = run.durable.with(&append);
        run.installed = snapshot.unwrap_or(run.installed);
        if turn == 4 && wal.prepare_spare().is_err() {
            return run;
        }
        if turn % 8 == 7 {
            run.compacted = next - 2;
            if wal.compact(run.compacted, run.durable.entries[&run.compacted].term).is_err() {
                return run;
            }
        }
    }
    run.failed = false;
    run
}

fn check(run: &Run, disk: &MemoryDisk, story: &str) {
    if !Wal::exists(disk, &options().dir).unwrap() {
        assert!(!run.created, "{story}: the log is gone");
        create(disk).unwrap_or_else(|error| panic!("{story}: created again: {error}"));
        return;
    }
    let (mut wal, recovered) = open(disk).unwrap_or_else(|error| panic!("{story}: {error}"));
    let compacted = recovered.compacted.map_or(1, |(index, _)| index);
    assert!((run.installed..=run.compacted).contains(&compacted), "{story}: compacted to {compacted}");
    let model = Model::from(&recovered);
    let durable = run.durable.clone().above(compacted);
    let attempted = run.attempted.as_ref().map(|append| run.durable.with(append).above(compacted));
    assert!(model == durable || Some(&model) == attempted.as_ref(), "{story}: {model:?}, not {durable:?}");
    assert_eq!(recovered.founders, founders(), "{story}");
    let last = model.entries.keys().last().copied().unwrap_or(compacted);
    let more = append(99, last + 1..last + 3);
    wal.append(std::slice::from_ref(&more)).unwrap();
    disk.crash(&mut || false);
    assert_eq!(Model::from(&open(disk).unwrap().1), model.with(&more), "{story}, and again");
}

#[test]
fn power_lost_at_any_operation_loses_nothing_that_was_synced() {
    for stop in 0.. {
        let mut finished = false;
        for seed in 0..6 {
            let mut dice = Dice::new(stop * 100 + seed);
            let disk = MemoryDisk::new();
            disk.stop_at(stop);
            let run = run(&disk);
            disk.crash(&mut || match seed {
                0 => false,
                1 => true,
                _ => dice.below(2) == 0,
            });
            check(&run, &disk, &format!("stopped at operation {stop}, seed {seed}"));
            finished = !run.failed;
        }
        if finished {
            assert!(stop > 100, "the run has {stop} operations");
            break;
        }
    }
}

/// The process is killed or stops at an error; what it wrote is in the kernel's memory. The next start loses power, or
/// the one after it, or what comes after a good start.
#[test]
fn an_error_and_then_power_lost_while_the_log_is_opened_loses_nothing() {
    for fail in 0.. {
        let mut finished = false;
        for seed in 0..12 {
            let mut dice = Dice::new(fail * 100 + seed);
            let disk = MemoryDisk::new();
            disk.fail_at(fail);
            let run = run(&disk);
            disk.fail_at(u64::MAX);
            for _ in 0..seed % 3 {
                let stop = disk.operations() + dice.below(24);
                disk.stop_at(stop);
                if let Ok((wal, _)) = open(&disk) {
                    drop(wal);
                }
                disk.crash(&mut || dice.below(2) == 0);
            }
            check(&run, &disk, &format!("failed at operation {fail}, seed {seed}"));
            finished = !run.failed;
        }
        if finished {
            break;
        }
    }
}
