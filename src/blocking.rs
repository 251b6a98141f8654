//! Work that may wait for a disk goes to a thread that may wait: no task does. A leaf.

use std::cell::Cell;

use tokio::task::{JoinError, spawn_blocking};

thread_local! {
    static IN_PLACE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on a thread that may wait. An error is a panic there, or the end of the runtime before it began.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    if IN_PLACE.get() {
        return Ok(work());
    }
    spawn_blocking(work).await
}

/// From now on, what this thread would send away it does itself. For a simulator: it has one thread, whose order of
/// events never varies, and disks that never wait.
#[doc(hidden)]
pub fn in_place() {
    IN_PLACE.set(true);
}
