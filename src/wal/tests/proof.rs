//! The proof of recovery: a data directory of three small segments, two snapshots and an identity, with every file cut
//! at every byte, flipped at every byte, zeroed at every sector, dropped, and put back in an older state. A start
//! finds exactly what was written, or refuses and names the place.
//!
//! Where nothing lies behind the damage, the end of the log cannot be told from a write that tore: it is cut there, and
//! every frame before it is kept.

use std::io::Read;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::identity::Identity;
use super::super::snapshot::{Meta, Snapshots};
use super::*;

const DATA: &str = "/data";
const SECTOR_BYTES: usize = 512;
/// Index and term of the snapshots. The log was compacted up to the first.
const OLDER: (u64, u64) = (4, 1);
const NEWER: (u64, u64) = (10, 2);

/// What can happen to a file.
#[derive(Debug, Clone)]
enum Damage {
    /// Everything from here on is gone.
    Cut(usize),
    /// One bit of one byte.
    Flip(usize, u8),
    /// A sector that reads as zeros.
    Zero(Range<usize>),
    Gone,
    /// What the file was earlier, or what another is.
    Swap(&'static str),
}

impl Damage {
    /// The bytes that it touches, of a file of so many; `None` where it is about the file as a whole.
    fn range(&self, len: usize) -> Option<Range<usize>> {
        match self {
            Damage::Cut(at) => Some(*at..len),
            Damage::Flip(at, _) => Some(*at..at + 1),
            Damage::Zero(range) => Some(range.clone()),
            Damage::Gone | Damage::Swap(..) => None,
        }
    }
}

/// One frame of the log, and what the log held without it.
struct Frame {
    segment: u64,
    range: Range<usize>,
    before: Model,
}

/// A data directory, and all that is known of it.
struct Directory {
    disk: MemoryDisk,
    identity: Identity,
    frames: Vec<Frame>,
    model: Model,
    /// What files are swapped for.
    swaps: Vec<Swap>,
}

struct Swap {
    path: PathBuf,
    what: &'static str,
    bytes: Vec<u8>,
    /// A whole log from earlier was right once, and only what others hold could tell: this is what it held.
    log: Option<Model>,
}

impl Swap {
    /// What one file is now, for another.
    fn new(path: PathBuf, what: &'static str, disk: &MemoryDisk, from: &Path) -> Swap {
        Swap { path, what, bytes: disk.content(from).unwrap(), log: None }
    }
}

fn identity_path() -> PathBuf {
    Path::new(DATA).join("identity")
}

fn snapshot_path((index, term): (u64, u64)) -> PathBuf {
    format!("{DATA}/snap/{term:016x}-{index:016x}.snap").into()
}

fn meta((index, term): (u64, u64)) -> Meta {
    Meta { index, term, removed: [9].into(), ..Meta::founding(&founders()) }
}

fn image((index, term): (u64, u64)) -> Vec<u8> {
    format!("state at {index}, term {term} ").repeat(8).into_bytes()
}

fn snapshots(disk: &MemoryDisk) -> Result<Snapshots, Error> {
    Snapshots::open(Arc::new(disk.clone()), Path::new(DATA))
}

/// Entries, hard states and nonces, entries that replace others within a segment and across two, a restart, a
/// compaction that keeps all the segments, and the snapshots.
fn directory() -> Directory {
    let disk = MemoryDisk::new();
    let identity = Identity::create(&disk, Path::new(DATA), 0xc1, 1).unwrap();
    let mut swaps = vec![Swap::new(identity_path(), "before the log was made", &disk, &identity_path())];
    let mut wal = create(&disk).unwrap();
    let identity = identity.note_log(&disk, Path::new(DATA)).unwrap();
    let snapshots = snapshots(&disk).unwrap();
    let first = HEADER_BYTES as usize..wal.active.tail as usize;
    let mut frames = vec![Frame { segment: 1, range: first, before: Model::default() }];
    let mut model = Model::default();
    let acts = [
        append(1, 2..5),
        append(1, 5..8),
        append(2, 6..9),
        append(2, 9..12),
        append(3, 11..14),
        append(3, 14..16),
        append(4, 15..18),
        append(4, 18..21),
        append(5, 20..23),
        append(5, 23..25),
    ];
    for (nth, act) in acts.iter().enumerate() {
        let mut note = |wal: &Wal, was: (u64, u64), before: &Model| {
            let (segment, end) = (wal.active.header.id, wal.active.tail as usize);
            let start = if segment == was.0 { was.1 } else { HEADER_BYTES };
            frames.push(Frame { segment, range: start as usize..end, before: before.clone() });
        };
        let was = (wal.active.header.id, wal.active.tail);
        wal.append(std::slice::from_ref(act)).unwrap();
        note(&wal, was, &model);
        model = model.with(act);
        let was = (wal.active.header.id, wal.active.tail);
        if nth == 4 {
            snapshots.write(&meta(OLDER), |out| out.write_all(&image(OLDER))).unwrap();
            wal.compact(OLDER.0, OLDER.1).unwrap();
            model = model.above(OLDER.0);
            note(&wal, was, &model);
        }
        if nth == 6 {
            drop(wal);
            wal = open(&disk).unwrap().0;
            note(&wal, was, &model);
        }
        if nth == 8 {
            let log = Some(model.clone());
            swaps.push(Swap { log, ..Swap::new(segment_path(3), "a frame ago", &disk, &segment_path(3)) });
        }
        if nth == 4 {
            swaps.push(Swap::new(segment_path(2), "before it was full", &disk, &segment_path(2)));
        }
    }
    snapshots.write(&meta(NEWER), |out| out.write_all(&image(NEWER))).unwrap();
    swaps.push(Swap::new(snapshot_path(NEWER), "the older snapshot", &disk, &snapshot_path(OLDER)));
    swaps.push(Swap::new(segment_path(3), "the segment before it", &disk, &segment_path(2)));
    swaps.push(Swap::new(segment_path(2), "the segment behind it", &disk, &segment_path(3)));
    assert_eq!((wal.closed.len(), wal.active.header.id), (2, 3), "three segments");
    assert!(frames.iter().filter(|frame| frame.segment == 3).count() >= 3, "several frames in the last");
    Directory { disk, identity, frames, model, swaps }
}

impl Directory {
    fn files(&self) -> Vec<PathBuf> {
        let segments = (1..=3).map(segment_path);
        segments.chain([identity_path(), snapshot_path(OLDER), snapshot_path(NEWER)]).collect()
    }

    fn swap(&self, path: &Path, what: &str) -> &Swap {
        self.swaps.iter().find(|swap| swap.path == path && swap.what == what).unwrap()
    }

    /// A copy of the disk with this damage.
    fn damaged(&self, path: &Path, damage: &Damage) -> MemoryDisk {
        let disk = self.disk.fork();
        let mut bytes = disk.content(path).unwrap();
        match damage {
            Damage::Cut(at) => bytes.truncate(*at),
            Damage::Flip(at, bit) => bytes[*at] ^= 1 << bit,
            Damage::Zero(range) => bytes[range.clone()].fill(0),
            Damage::Swap(what) => bytes.clone_from(&self.swap(path, what).bytes),
            Damage::Gone => {
                disk.remove(path).unwrap();
                return disk;
            }
        }
        disk.set_content(path, bytes);
        disk
    }

    fn segment_of(&self, path: &Path) -> Option<u64> {
        (1..=3).find(|id| segment_path(*id) == path)
    }

    fn frames_of(&self, segment: u64) -> impl Iterator<Item = &Frame> {
        self.frames.iter().filter(move |frame| frame.segment == segment)
    }

    /// What the log may come back as, besides as it was: up to the first frame that was touched, where no frame lies
    /// behind the damage.
    fn torn(&self, path: &Path, damage: &Damage) -> Option<&Model> {
        let touched = match damage {
            Damage::Swap(what) => return self.swap(path, what).log.as_ref(),
            // The header tells the size.
            Damage::Cut(_) | Damage::Gone => return None,
            Damage::Flip(..) | Damage::Zero(_) => damage.range(self.disk.content(path)?.len())?,
        };
        let last = self.segment_of(path) == Some(3) && self.frames_of(3).all(|frame| frame.range.start < touched.end);
        self.frames_of(3).find(|frame| last && touched.start < frame.range.end).map(|frame| &frame.before)
    }

    /// Where a refusal may say that the damage is: from the front of the frame that it lies in. A snapshot whose length
    /// was damaged seems cut short, and says so at its end.
    fn places(&self, path: &Path, damage: &Damage) -> Range<u64> {
        let len = self.disk.content(path).unwrap().len();
        let touched = damage.range(len).expect("the damage is at some place");
        let Some(segment) = self.segment_of(path) else { return 0..len as u64 + 1 };
        let starts = self.frames_of(segment).map(|frame| frame.range.start).filter(|start| *start <= touched.start);
        starts.max().unwrap_or(0) as u64..touched.end.max(touched.start + 1) as u64
    }

    /// Starts from a copy with this damage, and says whether it was refused.
    fn judge(&self, path: &Path, damage: &Damage) -> bool {
        let disk = self.damaged(path, damage);
        let story = || format!("{} with {damage:?}", path.display());
        let started = catch_unwind(AssertUnwindSafe(|| start(&disk))).unwrap_or_else(|_| panic!("{}", story()));
        let (mut wal, started) = match started {
            Ok(started) => started,
            Err(error) => {
                self.named(path, damage, &error, &story());
                return true;
            }
        };
        let torn = self.torn(path, damage).is_some_and(|torn| *torn == started.log);
        assert!(started.log == self.model || torn, "{}: {:?}", story(), started.log);
        assert_eq!((started.identity, started.compacted), (self.identity, Some(OLDER)), "{}", story());
        assert_eq!(started.founders, founders(), "{}", story());
        let newest = if path == snapshot_path(NEWER) { [OLDER, NEWER] } else { [NEWER, NEWER] };
        assert!(newest.contains(&(started.meta.index, started.meta.term)), "{}: {:?}", story(), started.meta);
        let place = (started.meta.index, started.meta.term);
        assert_eq!((started.meta, started.image), (meta(place), image(place)), "{}", story());
        if torn {
            // What was cut is gone, also where the frame of this start is shorter than it was.
            drop(wal);
            let again = start(&disk).unwrap_or_else(|error| panic!("{}, and then: {error}", story()));
            wal = again.0;
            assert_eq!((&again.1.log, again.1.cut_bytes), (&started.log, 0), "{}, and then", story());
        }
        // It goes on from there.
        let last = *started.log.entries.keys().last().unwrap();
        let more = append(9, last + 1..last + 3);
        wal.append(std::slice::from_ref(&more)).unwrap_or_else(|error| panic!("{}, and then: {error}", story()));
        drop(wal);
        let again = start(&disk).unwrap_or_else(|error| panic!("{}, and again: {error}", story())).1;
        assert_eq!((again.log, again.cut_bytes), (started.log.with(&more), 0), "{}, and again", story());
        false
    }

    /// The refusal names the file, and the place in it.
    fn named(&self, path: &Path, damage: &Damage, error: &Error, story: &str) {
        let text = error.to_string();
        assert!(text.contains("backup") && !text.contains('\n'), "{story}: {text}");
        match (damage, error) {
            // A snapshot that is missing has no name that anybody could know.
            (Damage::Gone, Error::SnapshotMissing { dir, .. }) => assert_eq!(Some(dir.as_path()), path.parent()),
            (Damage::Gone, _) => assert!(text.starts_with(path.to_str().unwrap()), "{story}: {text}"),
            (Damage::Swap(_), _) => {
                assert!(text.contains(path.parent().unwrap().to_str().unwrap()), "{story}: {text}");
            }
            (_, Error::Corrupt { file, offset, .. }) => {
                assert_eq!(file, path, "{story}: {text}");
                let places = self.places(path, damage);
                assert!(places.contains(offset), "{story}: {text}, not within {places:?}");
            }
            _ => panic!("{story}: {text}"),
        }
    }

    /// Everything that is tried on a file.
    fn damages(&self, path: &Path) -> Vec<Damage> {
        let bytes = self.disk.content(path).unwrap();
        let mut damages = vec![Damage::Gone];
        damages.extend((0..bytes.len()).map(Damage::Cut));
        let sectors = (0..bytes.len()).step_by(SECTOR_BYTES);
        damages.extend(sectors.map(|at| Damage::Zero(at..(at + SECTOR_BYTES).min(bytes.len()))));
        for at in 0..bytes.len() {
            // All bits of what means something, and one of each byte that does not.
            let padding = self.segment_of(path).is_some() && (64..HEADER_BYTES as usize).contains(&at);
            let bits = if padding && at % SECTOR_BYTES > 63 { at as u8 % 8..at as u8 % 8 + 1 } else { 0..8 };
            damages.extend(bits.map(|bit| Damage::Flip(at, bit)));
        }
        let swaps = self.swaps.iter().filter(|swap| swap.path == path);
        damages.extend(swaps.map(|swap| Damage::Swap(swap.what)));
        damages
    }
}

/// What a start finds.
struct Started {
    identity: Identity,
    log: Model,
    founders: Vec<Member>,
    compacted: Option<(u64, u64)>,
    cut_bytes: u64,
    meta: Meta,
    image: Vec<u8>,
}

/// Reads a data directory in the order in which the server does.
fn start(disk: &MemoryDisk) -> Result<(Wal, Started), Error> {
    let identity = Identity::load(disk, Path::new(DATA))?;
    if !Wal::exists(disk, &options().dir)? {
        return Err(Error::LogMissing { log: options().dir });
    }
    let identity = identity.expect("refused where it is missing and the log is there");
    let identity = if identity.has_log { identity } else { identity.note_log(disk, Path::new(DATA))? };
    let (wal, recovered) = open(disk)?;
    let base = recovered.compacted.expect("it was compacted");
    let last = recovered.entries.last().unwrap_or(base.0);
    let snapshots = snapshots(disk)?;
    let meta = snapshots
        .newest(base, last, |index| recovered.entries.term(index))?
        .expect("refused where the log needs one and there is none");
    let mut bytes = Vec::new();
    let (_, mut image) = snapshots.read(meta.index, meta.term)?;
    image.read_to_end(&mut bytes).expect("it was verified");
    let log = Model::from(&recovered);
    let Recovered { founders, compacted, cut_bytes, .. } = recovered;
    Ok((wal, Started { identity, log, founders, compacted, cut_bytes, meta, image: bytes }))
}

/// Judges every damage of every file, on all processors: how many there were of each file, and how many were refused.
fn prove(directory: &Directory) -> Vec<(usize, usize)> {
    let judged = |path: &PathBuf| {
        let damages = directory.damages(path);
        let (next, refused) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| {
                    while let Some(damage) = damages.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                        refused.fetch_add(u64::from(directory.judge(path, damage)), Ordering::Relaxed);
                    }
                });
            }
        });
        (damages.len(), refused.into_inner() as usize)
    };
    directory.files().iter().map(judged).collect()
}

#[test]
fn a_directory_that_was_not_damaged_is_recovered_exactly() {
    let directory = directory();
    let started = start(&directory.disk).unwrap().1;
    assert_eq!((started.log, started.cut_bytes), (directory.model.clone(), 0));
    assert_eq!((started.meta, started.image), (meta(NEWER), image(NEWER)));
}

#[test]
fn every_damage_to_any_file_is_refused_by_its_place_or_does_no_harm() {
    let directory = directory();
    let counts = prove(&directory);
    let [first, second, third, identity, older, newer] = counts[..] else { panic!("six files: {counts:?}") };
    println!("damages and refusals: {counts:?}");
    for (damages, refused) in [first, second, third] {
        assert!(damages > 15_000 && refused > 5_000, "{counts:?}");
        assert!(damages - refused > 4_000, "padding and the room behind the last frame harm nobody: {counts:?}");
    }
    assert!(identity.0 > 900 && identity.1 > identity.0 - 10, "{counts:?}");
    assert_eq!((older.1, newer.1), (0, 0), "one of two snapshots may be damaged: {counts:?}");
}

/// The log begins behind what only this snapshot holds.
#[test]
fn every_damage_to_the_only_snapshot_is_refused_by_its_place() {
    let directory = directory();
    directory.disk.remove(&snapshot_path(NEWER)).unwrap();
    let damages = directory.damages(&snapshot_path(OLDER));
    assert!(damages.len() > 3_000, "{}", damages.len());
    for damage in &damages {
        assert!(directory.judge(&snapshot_path(OLDER), damage), "{damage:?}");
    }
}
