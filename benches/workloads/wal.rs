//! Entries to a frame of the log; appends to a log whose disk is memory.

use std::hint::black_box;
use std::slice;
use std::sync::Arc;

use bytes::Bytes;
use raft::eraftpb::Entry;
use raftkv::node::FOUNDING;
use raftkv::wal::{Append, Options, SEGMENT_BYTES_MIN, Wal, record};

use super::disk::PlainDisk;
use super::{COMPACT_EVERY, Run, command, entry};

const TERM: u64 = 1;
const NO_FAULTS: &str = "a disk without faults";

fn entries(first: u64, count: u64, command: &Bytes) -> Vec<Entry> {
    (first..first + count).map(|index| entry(index, command)).collect()
}

pub fn encode_frame(count: u64) -> Run {
    let entries = entries(2, count, &command(0, 1));
    let (mut frame, mut sequence) = (Vec::new(), 0);
    Box::new(move || {
        sequence += 1;
        record::begin_frame(&mut frame);
        black_box(&entries).iter().for_each(|entry| record::put_entry(&mut frame, entry));
        record::seal_frame(&mut frame, record::frame_seed(1, 1), sequence);
        black_box(&frame);
    })
}

/// One append of so many entries.
pub fn append(count: u64) -> Run {
    let options = Options { dir: "/data/wal".into(), segment_bytes: SEGMENT_BYTES_MIN };
    let (mut wal, _) = Wal::create(Arc::new(PlainDisk::default()), &options, &[], 1, Arc::default()).expect(NO_FAULTS);
    wal.prepare_spare().expect(NO_FAULTS);
    let entries = entries(FOUNDING.0 + 1, count, &command(0, 1));
    let mut append = Append { entries, ..Append::default() };
    let mut compacted = FOUNDING.0;
    Box::new(move || {
        append.number += 1;
        wal.append(slice::from_ref(&append)).expect(NO_FAULTS);
        // The next ones, for the next run.
        append.entries.iter_mut().for_each(|entry| entry.index += count);
        let last = append.entries[0].index - 1;
        if last - compacted >= COMPACT_EVERY {
            compacted = last;
            wal.compact(last, TERM).and_then(|()| wal.prepare_spare()).expect(NO_FAULTS);
        }
    })
}
