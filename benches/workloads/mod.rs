//! What is measured: the steps of a write, each alone, and the whole of it in one thread without sockets. No randomness
//! and no threads: a workload does the same in every run. Timed by `benches/micro.rs`, counted by
//! `benches/instructions.rs`.

mod codec;
mod core;
mod disk;
mod node;
mod store;
mod wal;

use bytes::Bytes;
use raft::eraftpb::Entry;
use raftkv::channel::RequestId;
use raftkv::command::Command;

/// As in `scripts/bench`.
const VALUE: [u8; 128] = [b'v'; 128];

/// Entries after which a log is compacted, so that it does not grow for as long as somebody measures.
const COMPACT_EVERY: u64 = 1 << 14;

pub struct Workload {
    pub name: &'static str,
    /// What one run does; a cost is that of one of them.
    pub operations: u64,
    /// Makes all that is there before the first run.
    pub start: fn() -> Run,
}

/// One run of a workload.
pub type Run = Box<dyn FnMut()>;

pub const ALL: &[Workload] = &[
    Workload { name: "codec/encode-command", operations: codec::COMMANDS, start: codec::encode_commands },
    Workload { name: "codec/decode-command", operations: codec::COMMANDS, start: codec::decode_commands },
    Workload { name: "codec/encode-message/1", operations: 1, start: || codec::encode_message(1) },
    Workload { name: "codec/encode-message/64", operations: 64, start: || codec::encode_message(64) },
    Workload { name: "codec/decode-message/1", operations: 1, start: || codec::decode_message(1) },
    Workload { name: "codec/decode-message/64", operations: 64, start: || codec::decode_message(64) },
    Workload { name: "wal/encode-frame/1", operations: 1, start: || wal::encode_frame(1) },
    Workload { name: "wal/encode-frame/64", operations: 64, start: || wal::encode_frame(64) },
    Workload { name: "wal/append/1", operations: 1, start: || wal::append(1) },
    Workload { name: "wal/append/16", operations: 16, start: || wal::append(16) },
    Workload { name: "wal/append/64", operations: 64, start: || wal::append(64) },
    Workload { name: "core/lone/1", operations: 1, start: || core::lead(1, 1) },
    Workload { name: "core/lone/16", operations: 16, start: || core::lead(1, 16) },
    Workload { name: "core/lone/64", operations: 64, start: || core::lead(1, 64) },
    Workload { name: "core/three/1", operations: 1, start: || core::lead(3, 1) },
    Workload { name: "core/three/16", operations: 16, start: || core::lead(3, 16) },
    Workload { name: "core/three/64", operations: 64, start: || core::lead(3, 64) },
    Workload { name: "store/apply", operations: store::APPLIED, start: store::apply },
    Workload { name: "store/write-snapshot", operations: store::KEYS, start: store::write_snapshot },
    Workload { name: "store/read-snapshot", operations: store::KEYS, start: store::read_snapshot },
    Workload { name: "node/write/1", operations: node::WRITES, start: || node::write(1) },
    Workload { name: "node/write/64", operations: node::WRITES, start: || node::write(64) },
];

/// The `n`th key of `keys`, in an order that is not the store's.
fn key(n: u64, keys: u64) -> Vec<u8> {
    const STRIDE: u64 = 7919;
    format!("key-{:08}", n * STRIDE % keys).into_bytes()
}

/// The `n`th write to a store of so many keys.
fn command(n: u64, keys: u64) -> Bytes {
    Command::Put { key: &key(n, keys), value: &VALUE }.encode()
}

fn request(n: u64) -> RequestId {
    RequestId { node: 1, boot: 1, counter: n }
}

/// An entry as the leader logs it.
fn entry(index: u64, command: &Bytes) -> Entry {
    let context = Bytes::copy_from_slice(&request(index).to_bytes());
    Entry { term: 1, index, data: command.clone(), context, ..Entry::default() }
}
