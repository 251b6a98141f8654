//! (the tour comes here)
pub mod channel;
pub mod cluster;
pub mod config;
pub mod metrics;
pub mod wal;
pub mod window;
