//! A data directory as a start finds or makes it: whose it is, its log, its newest snapshot and the state in that. On
//! any disk: the simulator's nodes start here too.

use std::path::PathBuf;
use std::sync::Arc;

use raft::eraftpb::Entry;

use super::Error;
use crate::cluster::Member;
use crate::metrics::Metrics;
use crate::store::{BadImage, State, read_image};
use crate::wal::disk::Disk;
use crate::wal::identity::{Identity, LOG_DIR};
use crate::wal::snapshot::{Meta, Snapshots};
use crate::wal::{self, Options, Recovered, Wal};

/// Where a data directory lies, and how its log is to be.
pub struct Place {
    pub disk: Arc<dyn Disk>,
    pub data_dir: PathBuf,
    pub segment_bytes: u64,
    pub metrics: Arc<Metrics>,
}

/// What a data directory holds.
pub struct Data {
    pub identity: Identity,
    pub wal: Wal,
    pub recovered: Recovered,
    pub snapshots: Arc<Snapshots>,
    /// The snapshot that the service starts from, the founding one at first.
    pub meta: Meta,
    /// Of its file; the founding one has none.
    pub snapshot_bytes: u64,
    pub state: State,
}

impl Place {
    fn log(&self) -> Options {
        Options { dir: self.data_dir.join(LOG_DIR), segment_bytes: self.segment_bytes }
    }

    /// What an earlier start of member `id` left here; `None` before one came so far that it told anybody of itself.
    pub fn used_by(&self, id: u64) -> Result<Option<Identity>, Error> {
        let (disk, log) = (self.disk.as_ref(), self.log());
        let identity = Identity::load(disk, &self.data_dir)?;
        if let Some(Identity { member: owner, .. }) = identity.filter(|identity| identity.member != id) {
            return Err(Error::NotTheOwner { id, owner, data_dir: self.data_dir.clone() });
        }
        match identity {
            Some(identity) if Wal::exists(disk, &log.dir)? => {
                // Where a crash came between the two, the log is there and the word of it is not.
                Ok(Some(if identity.has_log { identity } else { identity.note_log(disk, &self.data_dir)? }))
            }
            Some(Identity { has_log: true, .. }) => Err(wal::Error::LogMissing { log: log.dir }.into()),
            Some(_) | None => Ok(None),
        }
    }

    /// Recovers what an earlier start left.
    pub fn recover(&self, identity: Identity, now_micros: u64) -> Result<Data, Error> {
        let (wal, mut recovered) = Wal::open(self.disk.clone(), &self.log(), now_micros, self.metrics.clone())?;
        let snapshots = Arc::new(Snapshots::open(self.disk.clone(), &self.data_dir)?);
        let founding = Meta::founding(&recovered.founders);
        let base = recovered.compacted.unwrap_or((founding.index, founding.term));
        let last = base.0 + recovered.entries.len() as u64;
        let term_at = |index: u64| term_at(base, &recovered.entries, index);
        let (meta, snapshot_bytes, state) = match snapshots.newest(base, last, term_at)? {
            Some(meta) => {
                let (_, image) = snapshots.read(meta.index, meta.term)?;
                let size_bytes = image.size_bytes();
                let state = read_image(image).map_err(|error| match error {
                    BadImage::NewerFormat(_) => Error::NewerImage { index: meta.index, error },
                    BadImage::Damaged(_) | BadImage::Read(_) => Error::Image { index: meta.index, error },
                })?;
                if state.applied() != meta.index {
                    return Err(Error::WrongImage { index: meta.index, found: state.applied() });
                }
                (meta, size_bytes, state)
            }
            None => (founding.clone(), 0, State::founded(founding.index)),
        };
        recovered.hard_state.commit = recovered.hard_state.commit.max(meta.index);
        Ok(Data { identity, wal, recovered, snapshots, meta, snapshot_bytes, state })
    }

    /// Makes the directory of a member that starts for the first time.
    pub fn found(&self, cluster: u64, id: u64, founders: &[Member], now_micros: u64) -> Result<Data, Error> {
        let disk = self.disk.clone();
        let identity = Identity::create(disk.as_ref(), &self.data_dir, cluster, id)?;
        let (wal, recovered) = Wal::create(disk.clone(), &self.log(), founders, now_micros, self.metrics.clone())?;
        let identity = identity.note_log(disk.as_ref(), &self.data_dir)?;
        let snapshots = Arc::new(Snapshots::open(disk, &self.data_dir)?);
        let meta = Meta::founding(founders);
        let state = State::founded(meta.index);
        Ok(Data { identity, wal, recovered, snapshots, meta, snapshot_bytes: 0, state })
    }
}

fn term_at(base: (u64, u64), entries: &[Entry], index: u64) -> Option<u64> {
    match index.checked_sub(base.0)? {
        0 => Some(base.1),
        nth => entries.get(nth as usize - 1).map(|entry| entry.term),
    }
}
