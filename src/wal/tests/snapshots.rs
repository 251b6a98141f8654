//! A snapshot is whole or it is not there: power lost, an error or a full disk at any operation, any byte flipped, blocks
//! moved, files renamed. Which one counts is for the log to say.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::Error;
use super::super::disk::{Disk, RealDisk};
use super::super::disk_memory::MemoryDisk;
use super::super::image::{Appender, BLOCK_BYTES_MAX, ImageWriter};
use super::super::snapshot::{Incoming, Meta, Snapshots};
use crate::cluster::{Member, PeerUrl};

const DATA: &str = "/data";

fn open(disk: &MemoryDisk) -> Snapshots {
    Snapshots::open(Arc::new(disk.clone()), Path::new(DATA)).unwrap()
}

fn path(index: u64, term: u64) -> PathBuf {
    format!("{DATA}/snap/{term:016x}-{index:016x}.snap").into()
}

fn meta(index: u64, term: u64) -> Meta {
    let member = |id| Member { id, urls: vec![PeerUrl::parse(&format!("http://a:{id}")).unwrap()] };
    Meta {
        index,
        term,
        voters: vec![1, 2],
        learners: vec![4],
        members: vec![member(1), member(2), member(4)],
        founders: vec![member(1)],
        nonces: [(1, 77), (2, u64::MAX)].into(),
        removed: [3].into(),
        ..Meta::default()
    }
}

/// An image that tells its index.
fn image(index: u64) -> Vec<u8> {
    format!("state at {index} ").repeat(20).into_bytes()
}

fn write(snapshots: &Snapshots, index: u64, term: u64) -> Result<u64, Error> {
    snapshots.write(&meta(index, term), |out| out.write_all(&image(index)))
}

fn read(snapshots: &Snapshots, index: u64, term: u64) -> Result<Vec<u8>, String> {
    let (found, mut image) = snapshots.read(index, term).map_err(|error| error.to_string())?;
    assert_eq!(found, meta(index, term));
    let mut bytes = Vec::new();
    image.read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn receive(snapshots: &Snapshots, file: &[u8]) -> Result<Meta, Error> {
    let mut incoming = snapshots.receive()?;
    for part in file.chunks(100) {
        incoming.write(part)?;
    }
    incoming.finish()
}

fn unfinished(disk: &MemoryDisk) -> usize {
    disk.list(Path::new("/data/snap")).unwrap().iter().filter(|name| name.ends_with(".new")).count()
}

/// A file as another member would send it.
fn file_of(index: u64, term: u64) -> Vec<u8> {
    let disk = MemoryDisk::new();
    write(&open(&disk), index, term).unwrap();
    disk.content(&path(index, term)).unwrap()
}

#[test]
fn the_bytes_of_a_snapshot_are_these() {
    let disk = MemoryDisk::new();
    let mut out = Appender::new(disk.create(Path::new("/file")).unwrap());
    let meta = Meta { voters: vec![1], nonces: [(1, 7)].into(), ..Meta { index: 3, term: 2, ..Meta::default() } };
    let mut writer = ImageWriter::begin(&mut out, &meta, 0x5a17).unwrap();
    let outcome = writer.write_all(b"image");
    writer.end(outcome).unwrap();
    let bytes = disk.content(Path::new("/file")).unwrap();
    let text = bytes.escape_ascii().to_string();
    assert_eq!(text, GOLDEN, "the format on disk changed: give it a new version, and keep reading this one");
}

const GOLDEN: &str = concat!(
    r"raftkvS\n\x01\x00\x00\x00\x17Z\x00\x00\x00\x00\x00\x00\xa3\x00\x00\x00\xea;\\c",
    r#"{\"index\":3,\"term\":2,\"voters\":[1],\"voters_outgoing\":[],\"learners\":[],\"learners_next\":[],"#,
    r#"\"auto_leave\":false,\"members\":[],\"founders\":[],\"nonces\":{\"1\":7},\"removed\":[]}"#,
    r"\x05\x00\x00\x00L\xb5\\\xecimage",
    r#"\x00\x00\x00\x00\x0cU\x1d\"\x05\x00\x00\x00\x00\x00\x00\x00\xbe\xfc\xfb\x95"#,
);

#[test]
fn what_was_written_is_read_whatever_its_size() {
    let disk = MemoryDisk::new();
    let snapshots = open(&disk);
    for size in [0, 1, BLOCK_BYTES_MAX - 1, BLOCK_BYTES_MAX, BLOCK_BYTES_MAX + 1, 3 * BLOCK_BYTES_MAX + 7] {
        let bytes: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
        let written = snapshots.write(&meta(5, 1), |out| bytes.chunks(70_001).try_for_each(|part| out.write_all(part)));
        assert_eq!(disk.size(&path(5, 1)).unwrap(), Some(written.unwrap()));
        assert_eq!(snapshots.read(5, 1).unwrap().1.size_bytes(), disk.size(&path(5, 1)).unwrap().unwrap());
        assert!(read(&snapshots, 5, 1).unwrap() == bytes, "{size} bytes");
        let received = receive(&open(&MemoryDisk::new()), &disk.content(&path(5, 1)).unwrap()).unwrap();
        assert_eq!(received, meta(5, 1));
    }
    assert_eq!(snapshots.list().unwrap(), [(5, 1)], "one replaced the other");
}

#[test]
fn a_file_is_sent_as_it_is_even_when_it_is_purged_meanwhile() {
    let disk = MemoryDisk::new();
    let snapshots = open(&disk);
    write(&snapshots, 5, 1).unwrap();
    write(&snapshots, 9, 1).unwrap();
    let whole = disk.content(&path(5, 1)).unwrap();
    let mut reading = snapshots.open_file(5, 1).unwrap();
    assert_eq!(reading.size_bytes(), whole.len() as u64);
    snapshots.purge(1, 9).unwrap();
    let mut again = vec![0; whole.len() - 50];
    reading.read_at(50, &mut again).unwrap();
    assert_eq!(again, whole[50..]);
    let mut bytes = Vec::new();
    reading.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, whole);
    assert!(snapshots.open_file(5, 1).is_err());
}

#[test]
fn every_cut_and_every_flipped_byte_is_refused_by_who_restores_and_by_who_receives() {
    let disk = MemoryDisk::new();
    let snapshots = open(&disk);
    let whole = file_of(5, 1);
    let refused = |bytes: Vec<u8>, story: &str| {
        let error = receive(&snapshots, &bytes).unwrap_err();
        assert!(matches!(error, Error::BadIncoming { .. }), "{story}: {error}");
        assert_eq!(unfinished(&disk), 0, "{story}");
        disk.set_content(&path(5, 1), bytes);
        let error = read(&snapshots, 5, 1).unwrap_err();
        assert!(error.contains(".snap is damaged at byte "), "{story}: {error}");
        disk.remove(&path(5, 1)).unwrap();
    };
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        refused(flipped, &format!("flipped at {at}"));
        refused(whole[..at].to_vec(), &format!("cut at {at}"));
    }
    refused([&whole[..], &[0]].concat(), "one byte more");
    receive(&snapshots, &whole).unwrap();
    assert_eq!(read(&snapshots, 5, 1).unwrap(), image(5));
}

#[test]
fn blocks_of_another_place_or_file_do_not_pass() {
    let bytes: Vec<u8> = (0..2 * BLOCK_BYTES_MAX).map(|at| (at % 253) as u8).collect();
    let file = |seed| {
        let disk = MemoryDisk::seeded(seed);
        open(&disk).write(&meta(5, 1), |out| out.write_all(&bytes)).unwrap();
        disk.content(&path(5, 1)).unwrap()
    };
    let (whole, other) = (file(1), file(2));
    // The end block has 20 bytes, each of the two others a header of 8.
    let block = 8 + BLOCK_BYTES_MAX;
    let start = whole.len() - 20 - 2 * block;
    let (front, first, second, end) = (
        &whole[..start],
        &whole[start..start + block],
        &whole[start + block..start + 2 * block],
        &whole[start + 2 * block..],
    );
    let disk = MemoryDisk::new();
    receive(&open(&disk), &[front, first, second, end].concat()).unwrap();
    for moved in [
        [front, second, first, end].concat(),
        [front, first, first, end].concat(),
        [front, first, end].concat(),
        [front, &other[start..]].concat(),
        [front, first, &other[start + block..]].concat(),
    ] {
        receive(&open(&disk), &moved).unwrap_err();
    }
}

#[test]
fn a_newer_format_and_a_description_that_cannot_be_are_refused_as_such() {
    let disk = MemoryDisk::new();
    let snapshots = open(&disk);
    let mut newer = file_of(5, 1);
    newer[8] = 2;
    let end = 28 + u32::from_le_bytes(newer[20..24].try_into().unwrap()) as usize;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&newer[..24]), &newer[28..end]);
    newer[24..28].copy_from_slice(&crc.to_le_bytes());
    disk.set_content(&path(5, 1), newer);
    assert!(matches!(snapshots.newest((1, 1), 9, |_| Some(1)), Err(Error::Newer { version: 2, .. })));

    for wrong in [
        Meta { index: 0, ..meta(5, 1) },
        Meta { voters: vec![], ..meta(5, 1) },
        Meta { voters: vec![0], ..meta(5, 1) },
        Meta { learners: vec![2], ..meta(5, 1) },
        Meta { learners_next: vec![9], ..meta(5, 1) },
    ] {
        let error = snapshots.write(&wrong, |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("snapshot"), "{error}");
    }
    disk.set_content(&path(6, 1), file_of(5, 1));
    assert!(read(&snapshots, 6, 1).unwrap_err().contains("renamed"));
}

#[test]
fn a_service_that_cannot_write_its_state_leaves_no_snapshot() {
    let disk = MemoryDisk::new();
    let snapshots = open(&disk);
    let error = snapshots.write(&meta(5, 1), |_| Err(std::io::Error::other("no"))).unwrap_err().to_string();
    assert_eq!(error, "write the state into a snapshot: no");
    drop(snapshots.receive().unwrap());
    assert_eq!((unfinished(&disk), snapshots.list().unwrap()), (0, vec![]));
}

#[test]
fn the_newest_is_the_one_that_the_log_vouches_for() {
    let disk = MemoryDisk::new();
    let snapshots = open(&disk);
    let terms = |index: u64| (index <= 40).then_some(1 + index / 20);
    assert_eq!(snapshots.newest((1, 1), 40, terms).unwrap(), None, "the log has everything");
    for (index, term) in [(10, 1), (20, 2), (30, 2), (31, 9), (50, 3)] {
        write(&snapshots, index, term).unwrap();
    }
    let newest = |base, last| snapshots.newest(base, last, terms).map(|found| found.map(|meta| meta.index));
    // Beyond the end, and of a term that this log does not have: nobody vouched for them.
    assert_eq!(newest((1, 1), 40).unwrap(), Some(30));
    assert_eq!(newest((25, 2), 29).unwrap_err().to_string().split(" holds no").next(), Some("/data/snap"));
    assert_eq!(newest((30, 2), 30).unwrap(), Some(30), "the base itself, which no entry tells of");
    assert!(newest((30, 1), 30).is_err());

    disk.flip(&path(30, 2), 8 * 400);
    assert_eq!(newest((1, 1), 40).unwrap(), Some(20), "the one before");
    assert_eq!(newest((20, 2), 40).unwrap(), Some(20));
    let error = newest((21, 2), 40).unwrap_err().to_string();
    assert!(error.starts_with(path(30, 2).to_str().unwrap()) && error.contains("backup"), "{error}");
    disk.flip(&path(20, 2), 8 * 400);
    disk.flip(&path(10, 1), 8 * 400);
    assert_eq!(newest((1, 1), 40).unwrap(), None, "the log still has everything");
}

#[test]
fn the_oldest_are_purged_and_what_is_needed_stays() {
    for (keep, needed_from, left) in [
        (1, 30, &[30, 50][..]),
        (2, 30, &[20, 30, 50]),
        (0, 50, &[50]),
        (1, 35, &[30, 50]),
        (9, 50, &[10, 20, 30, 50]),
        (1, 5, &[10, 20, 30, 50]),
        (1, u64::MAX, &[50]),
    ] {
        let disk = MemoryDisk::new();
        let snapshots = open(&disk);
        for index in [10, 20, 30, 50] {
            write(&snapshots, index, 1).unwrap();
        }
        snapshots.purge(keep, needed_from).unwrap();
        disk.crash(&mut || false);
        let indexes: Vec<u64> = open(&disk).list().unwrap().iter().map(|(index, _)| *index).collect();
        assert_eq!(indexes, left, "{keep} kept from {needed_from}");
    }
}

type Act = fn(&Snapshots) -> Result<(), Error>;

/// What can be done to a directory with the snapshots 10 and 20.
const ACTS: [(&str, Act); 4] = [
    ("write", |snapshots| write(snapshots, 30, 2).map(drop)),
    ("write again", |snapshots| write(snapshots, 20, 2).map(drop)),
    ("receive", |snapshots| receive(snapshots, &file_of(30, 2)).map(drop)),
    ("purge", |snapshots| snapshots.purge(1, 20)),
];

fn before() -> MemoryDisk {
    let disk = MemoryDisk::new();
    let snapshots = open(&disk);
    write(&snapshots, 10, 2).unwrap();
    write(&snapshots, 20, 2).unwrap();
    disk
}

/// The old set, or the new one, and each of it whole.
fn check(disk: &MemoryDisk, done: bool, act: &str, story: &str) {
    let snapshots = Snapshots::open(Arc::new(disk.clone()), Path::new(DATA)).unwrap();
    assert_eq!(unfinished(disk), 0, "{story}");
    let found: Vec<u64> = snapshots.list().unwrap().iter().map(|(index, _)| *index).collect();
    let (old, new): (&[u64], &[u64]) = match act {
        "purge" => (&[10, 20], &[20]),
        "write again" => (&[10, 20], &[10, 20]),
        _ => (&[10, 20], &[10, 20, 30]),
    };
    assert!(found == new || (!done && found == old), "{story}: {found:?}");
    for index in found {
        assert_eq!(read(&snapshots, index, 2), Ok(image(index)), "{story}");
    }
    write(&snapshots, 40, 2).unwrap_or_else(|error| panic!("{story}, and then: {error}"));
}

#[test]
fn power_lost_at_any_operation_leaves_the_old_set_or_the_new_one() {
    for (name, act) in ACTS {
        for stop in 0.. {
            let mut done = false;
            for seed in 0..6u64 {
                let disk = before();
                let snapshots = open(&disk);
                disk.stop_at(disk.operations() + stop);
                done = act(&snapshots).is_ok();
                let mut dice = stop * 7 + seed;
                disk.crash(&mut || match seed {
                    0 => false,
                    1 => true,
                    _ => {
                        dice = dice.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                        dice >> 63 == 0
                    }
                });
                check(&disk, done, name, &format!("{name}, stopped at operation {stop}, seed {seed}"));
            }
            if done {
                assert!(stop > 2, "{name} has {stop} operations");
                break;
            }
        }
    }
}

#[test]
fn an_error_at_any_operation_is_told_and_leaves_the_old_set_or_the_new_one() {
    for (name, act) in ACTS {
        for fail in 0.. {
            let disk = before();
            let snapshots = open(&disk);
            disk.fail_at(disk.operations() + fail);
            let outcome = act(&snapshots);
            let done = outcome.is_ok();
            assert!(done || matches!(outcome, Err(Error::Disk(_))), "{name}: {outcome:?}");
            assert!(done || fail == 0 || unfinished(&disk) == 0, "{name}, failed at operation {fail}");
            disk.fail_at(u64::MAX);
            check(&disk, done, name, &format!("{name}, failed at operation {fail}"));
            if done {
                break;
            }
        }
    }
}

/// What a failed sync should have made durable still reads as if it were: verifying it would prove nothing.
#[test]
fn what_could_not_be_written_is_never_finished() {
    let disk = MemoryDisk::new();
    let mut incoming = open(&disk).receive().unwrap();
    disk.fail_at(disk.operations());
    incoming.write(&file_of(5, 1)).unwrap_err();
    disk.fail_at(u64::MAX);
    assert!(matches!(incoming.finish(), Err(Error::BadIncoming { .. })));
    assert_eq!((unfinished(&disk), disk.list(Path::new("/data/snap")).unwrap().len()), (0, 0));
}

#[test]
fn a_full_disk_is_told_and_gives_its_room_back() {
    let used = 2 * file_of(10, 2).len() as u64;
    for (name, act) in &ACTS[..3] {
        for room in (0..used / 2).step_by(50) {
            let disk = before();
            let snapshots = open(&disk);
            disk.set_capacity(Some(used + room));
            let error = act(&snapshots).unwrap_err();
            assert!(error.is_disk_full(), "{name}: {error}");
            assert_eq!(unfinished(&disk), 0, "{name}");
            disk.set_capacity(None);
            check(&disk, false, name, &format!("{name}, with {room} bytes left"));
        }
    }
}

#[test]
fn the_real_disk_keeps_snapshots_too() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Snapshots::open(Arc::new(RealDisk), dir.path()).unwrap();
    let snapshots = open();
    let bytes = vec![7; 9 << 20];
    for index in [5, 6, 7] {
        snapshots.write(&meta(index, 3), |out| out.write_all(&bytes)).unwrap();
    }
    std::fs::write(dir.path().join("snap/0.new"), "half").unwrap();
    snapshots.purge(2, 7).unwrap();
    let snapshots = open();
    assert_eq!(snapshots.list().unwrap(), [(6, 3), (7, 3)]);
    let mut reading = snapshots.open_file(7, 3).unwrap();
    snapshots.purge(1, 9).unwrap();
    let mut incoming = snapshots.receive().unwrap();
    std::io::copy(&mut reading, &mut ToIncoming(&mut incoming)).unwrap();
    assert_eq!(incoming.size_bytes(), reading.size_bytes());
    assert_eq!(incoming.finish().unwrap(), meta(7, 3));
    assert_eq!(read(&snapshots, 7, 3).unwrap(), bytes);
    assert_eq!(snapshots.newest((7, 3), 7, |_| None).unwrap(), Some(meta(7, 3)));
}

struct ToIncoming<'a>(&'a mut Incoming);

impl Write for ToIncoming<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes).map_err(std::io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
