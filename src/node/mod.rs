//! The node: raft and everything around it. Its pure parts come first; the task that drives them follows.

mod admit;
mod core;
mod logger;
mod members;
mod mirror;
mod pending;
mod reads;
