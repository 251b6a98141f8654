//! (the tour comes here)
pub mod api;
pub mod channel;
pub mod cli;
pub mod cluster;
pub mod command;
pub mod config;
pub mod kv;
pub mod logs;
pub mod metrics;
pub mod node;
pub mod store;
pub mod wal;
pub mod window;
