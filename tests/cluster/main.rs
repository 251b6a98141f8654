//! Real processes, real sockets: what a user sees. Nodes are started on free ports, killed, stopped, paused, wiped and
//! restarted; every write that was acknowledged must be there in the end, on every member.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bench;
mod catch_up;
mod damage;
mod defects;
mod disk;
mod formats;
mod grow;
mod harness;
#[path = "../history/mod.rs"]
mod history;
mod kept;
mod linearizable;
mod lone;
mod refusals;
mod sockets;
mod survive;
