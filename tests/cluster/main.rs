//! Real processes, real sockets: what a user sees. Nodes are started on free ports, killed, stopped, paused, wiped and
//! restarted; every write that was acknowledged must be there in the end, on every member.

mod defects;
mod disk;
mod harness;
mod lone;
mod refusals;
mod sockets;
mod survive;
