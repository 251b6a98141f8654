//! The segment that is ready before it is needed. One thread of the log takes and recycles it, another prepares it;
//! whoever renames to or from its name holds the lock. `spare` under that name is always whole.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::disk::{Disk, DiskFile};
use super::error::Error;
use super::segment::{HEADER_BYTES, STRETCH_BYTES, draft_path, write_zeros};
use super::{Options, Room};
use crate::metrics::Metrics;

const NAME: &str = "spare";
const PREPARED: &str = "spare.new";
/// Zeros written between two syncs while a spare is prepared: what the log's own sync may have to wait for.
const SYNC_EVERY_BYTES: u64 = 4 * STRETCH_BYTES;

pub struct Spare {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segment_bytes: u64,
    state: Mutex<State>,
    /// The state is Ready: for those who may not wait for the lock, under which files are renamed.
    ready: AtomicBool,
    full: AtomicBool,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Absent,
    Preparing,
    Ready,
}

impl Spare {
    /// Looks for a spare of an earlier run. What was not finished then is removed.
    pub fn find(disk: Arc<dyn Disk>, options: &Options, metrics: Arc<Metrics>) -> Result<Spare, Error> {
        let (dir, segment_bytes) = (options.dir.clone(), options.segment_bytes);
        for unfinished in [dir.join(PREPARED), draft_path(&dir)] {
            if disk.size(&unfinished)?.is_some() {
                disk.remove(&unfinished)?;
            }
        }
        let state = match disk.size(&dir.join(NAME))? {
            Some(size) if size == segment_bytes => State::Ready,
            Some(_) => {
                disk.remove(&dir.join(NAME))?;
                State::Absent
            }
            None => State::Absent,
        };
        let (ready, full) = (AtomicBool::new(state == State::Ready), AtomicBool::new(false));
        Ok(Spare { disk, dir, segment_bytes, state: Mutex::new(state), ready, full, metrics })
    }

    /// Takes the spare, if there is one, under the name of a draft.
    pub fn take(&self) -> Result<Option<Box<dyn DiskFile>>, Error> {
        let mut state = self.lock();
        if *state != State::Ready {
            return Ok(None);
        }
        self.set(&mut state, State::Absent);
        let draft = draft_path(&self.dir);
        self.disk.rename(&self.dir.join(NAME), &draft)?;
        Ok(Some(self.disk.open(&draft)?))
    }

    /// Makes a freed segment the spare, or removes it where there is one. The caller syncs the directory.
    pub fn recycle(&self, freed: &Path) -> Result<(), Error> {
        let mut state = self.lock();
        if *state == State::Absent && self.disk.size(freed)? == Some(self.segment_bytes) {
            self.disk.rename(freed, &self.dir.join(NAME))?;
            self.set(&mut state, State::Ready);
            self.set_full(false);
        } else {
            self.disk.remove(freed)?;
        }
        Ok(())
    }

    /// Prepares a spare where there is none: takes its room and really writes its zeros. Gives up when `stop` is set.
    pub fn prepare(&self, stop: &AtomicBool) -> Result<(), Error> {
        {
            let mut state = self.lock();
            if *state != State::Absent {
                return Ok(());
            }
            self.set(&mut state, State::Preparing);
        }
        let written = self.write(stop);
        let mut state = self.lock();
        let outcome = written.and_then(|finished| {
            if finished {
                self.disk.rename(&self.dir.join(PREPARED), &self.dir.join(NAME))?;
                self.disk.sync_dir(&self.dir)?;
            }
            Ok(finished)
        });
        self.set(&mut state, if matches!(outcome, Ok(true)) { State::Ready } else { State::Absent });
        match outcome {
            Ok(true) => self.set_full(false),
            Ok(false) => {}
            Err(error) => {
                if error.is_disk_full() {
                    self.set_full(true);
                }
                self.remove_unfinished();
                return Err(error);
            }
        }
        Ok(())
    }

    fn write(&self, stop: &AtomicBool) -> Result<bool, Error> {
        let mut file = self.disk.create(&self.dir.join(PREPARED))?;
        file.allocate(self.segment_bytes)?;
        let mut at = 0;
        while at < self.segment_bytes {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let to = (at + SYNC_EVERY_BYTES).min(self.segment_bytes);
            write_zeros(file.as_mut(), at, to)?;
            file.sync_data()?;
            at = to;
        }
        Ok(true)
    }

    /// Gives the room of a spare that failed back at once: the log itself may need it.
    fn remove_unfinished(&self) {
        let path = self.dir.join(PREPARED);
        let removed = match self.disk.size(&path) {
            Ok(Some(_)) => self.disk.remove(&path),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!(%error, "an unfinished spare segment stays until the next start");
        }
    }

    fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
        self.metrics.wal_disk_full.set(full.into());
    }

    pub fn room(&self) -> Room {
        if self.full.load(Ordering::Relaxed) { Room::Full } else { Room::Ok }
    }

    /// What a spare that is ready adds to the room of the log.
    pub fn room_bytes(&self) -> u64 {
        if self.is_ready() { self.segment_bytes - HEADER_BYTES } else { 0 }
    }

    /// What a spare that is ready takes on the disk.
    pub fn disk_bytes(&self) -> u64 {
        if self.is_ready() { self.segment_bytes } else { 0 }
    }

    fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    fn set(&self, state: &mut State, to: State) {
        *state = to;
        self.ready.store(to == State::Ready, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the lock panics")
    }
}
