//! **raftkv**: a key-value server that is replicated with raft, in the shape of etcd's raftexample.
//!
//! ```text
//!          curl
//!            │ HTTP
//!          api/       the client port: paths, statuses, limits
//!            │
//!           kv        the service: one meaning for each operation, whatever the protocol
//!            │ Proposal (Write · Read · Reconfigure · Status), a bounded channel
//!          node/      one task around the raft core: drain, step, write, send, publish
//!         ╱    ╲
//!      wal/   transport/ ⇄ the other members, over HTTP
//!            │ Commit (Apply · Skip · Barrier · Snapshot · Restore), in log order
//!          store/     the state in memory: applies, then answers whoever waits
//! ```
//!
//! # A write's journey
//!
//! 1. `curl -XPUT` reaches [`api`], which turns path and body into a key and a value and asks [`kv`].
//! 2. [`kv`] checks limits, encodes a [`command`], and sends it up the propose channel ([`channel::Proposal`]) with a
//!    place for the answer.
//! 3. The [`node`] gives it a [`channel::RequestId`] and keeps the place for the answer as a ticket. If this member
//!    leads, the command goes into a log entry, with others that came at the same time ([`channel::Writes`]); if not, it is
//!    forwarded to the leader, again and again if need be: the store knows a repeat when it sees one.
//! 4. The entry goes to the [`wal`] and, at the same time, through the [`transport`] to the others. Nothing in the node
//!    waits for a disk or a peer: both report back as events.
//! 5. When it is durable on a majority, raft calls it committed. On every member it goes down the commit channel
//!    ([`channel::Commit`]); where the ticket is, the ticket goes with it.
//! 6. The [`store`] applies it and answers the ticket. Only now curl sees its 204.
//!
//! If anything goes wrong on the way, the client learns which of two things is true: the write was *not applied* and
//! never will be, or its outcome is *unknown*.
//!
//! # A read's journey
//!
//! A GET asks the node for a barrier. One question to the leader (which asks a majority whether it still leads) serves
//! all reads that wait; the answer is an index, and once this member has applied that much, its own state may be read.
//!
//! # A member's journey
//!
//! 1. `curl -XPOST -d http://…` reaches any member; [`kv`] sends a [`channel::Change`] up, and the [`node`] passes it on to
//!    the leader.
//! 2. The leader judges it against the members that there are, and refuses it with the reason, or proposes it. One
//!    change is under way at a time. Once it is committed, every member knows the newcomer's address, and curl sees its 204.
//! 3. The newcomer, started with `--join`, asks a member where it belongs ([`transport`]), and starts from the snapshot
//!    that every founder started from. It is a learner, and counts for no majority.
//! 4. It catches up by the log; or, where the leader has forgotten that part of it, by the leader's newest snapshot,
//!    which goes from file to file, and the log behind it.
//! 5. When it has what was committed when the leader first looked at it, the leader proposes by itself that it votes.
//!
//! A removal takes the same way. A leader that is to go hands over first.
//!
//! # Snapshots
//!
//! When one is due, the [`node`] asks the service for its state at exactly this place in the log
//! ([`channel::Commit::Snapshot`]): a cheap view, written to a file elsewhere while writes go on. When the file is
//! durable, the log behind it goes, but for what slow followers may need.
//!
//! # A start
//!
//! The [`wal`] is read once to see that it is whole and where it ends. The [`store`] begins with the newest snapshot that
//! it leads to; then the log is read again, one entry after the other, and what is surely committed is applied
//! (`node::Resume`). Only the end of the log stays in memory, and the [`node`] goes on from there.
//!
//! # Reading order
//!
//! [`channel`] (what goes up and what comes back), [`store`] (the service), `node::core` (raft and the order of
//! effects), [`node`] (the task), [`wal`], [`transport`], [`kv`] and [`api`], and at last [`server`], which wires them.
//! [`mod@bench`] stands apart: a client, and the load generator.
//!
//! # Who may use whom
//!
//! Data flows one way, and so do the imports; `tests/tidy.rs` holds them to it. [`cluster`], [`window`], [`blocking`],
//! [`config`], [`metrics`] and [`channel`] are leaves. [`mod@bench`] uses none of them and meets the others over the
//! network. The node never sees the store, and cannot decode a command: whoever wants to replicate another service
//! takes the two channels and writes another store.

pub mod api;
pub mod bench;
pub mod blocking;
pub mod channel;
pub mod cli;
pub mod cluster;
pub mod command;
pub mod config;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod kv;
pub mod logs;
pub mod metrics;
pub mod node;
pub mod server;
pub mod store;
pub mod transport;
pub mod wal;
pub mod window;
