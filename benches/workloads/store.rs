//! Commands applied to a store of many keys; its state to a snapshot file and back. The disk is memory.

use std::hint::black_box;
use std::sync::Arc;

use bytes::Bytes;
use raftkv::channel::Writes;
use raftkv::node::FOUNDING;
use raftkv::store::{State, read_image, write_image};
use raftkv::wal::snapshot::{Meta, Snapshots};

use super::disk::PlainDisk;
use super::{Run, command, request};

pub const KEYS: u64 = 100_000;
/// Commands applied in one run.
pub const APPLIED: u64 = 1000;

const TERM: u64 = 1;

/// Writes in one entry: as many as 64 clients at a leader make.
const ENTRY_WRITES: usize = 25;

/// Applies the next writes, entry by entry, the first one after the founding being the first.
fn apply_next(state: &mut State, commands: &[Bytes]) {
    for commands in commands.chunks(ENTRY_WRITES) {
        let named = (state.revision()..).map(request).zip(commands.iter().cloned());
        for writes in Writes::pack(&named.collect::<Vec<_>>()) {
            let outcome = |outcome| {
                black_box(outcome);
            };
            state.apply(state.applied() + 1, TERM, &writes, outcome).expect("commands of this version");
        }
    }
}

fn commands(count: u64) -> Vec<Bytes> {
    (0..count).map(|n| command(n, KEYS)).collect()
}

fn filled() -> State {
    let mut state = State::founded(FOUNDING.0);
    apply_next(&mut state, &commands(KEYS));
    assert_eq!(state.len() as u64, KEYS, "each key was written once");
    state
}

pub fn apply() -> Run {
    let mut state = filled();
    let commands = commands(APPLIED);
    Box::new(move || apply_next(&mut state, &commands))
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
