//! (the tour comes here)
pub mod channel;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod logs;
pub mod metrics;
pub mod window;
