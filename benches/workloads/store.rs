//! Commands applied to a store of many keys; its state to a snapshot file and back. The disk is memory.

use std::hint::black_box;
use std::sync::Arc;

use bytes::Bytes;
use raftkv::node::FOUNDING;
use raftkv::store::{State, read_image, write_image};
use raftkv::wal::snapshot::{Meta, Snapshots};

use super::disk::PlainDisk;
use super::{Run, command, request};

pub const KEYS: u64 = 100_000;
/// Commands applied in one run.
pub const APPLIED: u64 = 1000;

const TERM: u64 = 1;

/// Applies the next write, the first one after the founding being the first.
fn apply_next(state: &mut State, command: &Bytes) {
    let index = state.applied() + 1;
    black_box(state.apply(index, TERM, request(index), command).expect("a command of this version"));
}

fn filled() -> State {
    let mut state = State::founded(FOUNDING.0);
    (0..KEYS).for_each(|n| apply_next(&mut state, &command(n, KEYS)));
    assert_eq!(state.len() as u64, KEYS, "each key was written once");
    state
}

pub fn apply() -> Run {
    let mut state = filled();
    let commands: Vec<Bytes> = (0..APPLIED).map(|n| command(n, KEYS)).collect();
    Box::new(move || commands.iter().for_each(|command| apply_next(&mut state, command)))
}

struct Files {
    state: State,
    meta: Meta,
    snapshots: Snapshots,
}

impl Files {
    fn new() -> Self {
        let state = filled();
        let meta = Meta { index: state.applied(), term: TERM, voters: vec![1], ..Meta::default() };
        let snapshots =
            Snapshots::open(Arc::new(PlainDisk::default()), "/data".as_ref()).expect("a disk without faults");
        Files { state, meta, snapshots }
    }

    /// Writes the file over the one before.
    fn write(&self) {
        self.snapshots.write(&self.meta, |out| write_image(&self.state, out)).expect("a disk without faults");
    }
}

pub fn write_snapshot() -> Run {
    let files = Files::new();
    Box::new(move || files.write())
}

pub fn read_snapshot() -> Run {
    let files = Files::new();
    files.write();
    Box::new(move || {
        let (_, image) = files.snapshots.read(files.meta.index, files.meta.term).expect("a snapshot");
        black_box(read_image(image).expect("a whole image"));
    })
}
