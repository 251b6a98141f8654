//! (the tour comes here)
pub mod api;
pub mod channel;
pub mod cluster;
pub mod command;
pub mod config;
pub mod kv;
pub mod metrics;
pub mod store;
pub mod window;
