//! A data directory as a start finds or makes it: whose it is, its log, its newest snapshot, and the state as of the last
//! entry that is surely committed. On any disk: the simulator's nodes start here too.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::info;

use super::Error;
use crate::cluster::Member;
use crate::metrics::Metrics;
use crate::node::{FOUNDING, Policy, Resume};
use crate::store::{BadImage, State, Store, read_image};
use crate::wal::disk::Disk;
use crate::wal::identity::{Identity, LOG_DIR};
use crate::wal::snapshot::{Meta, Snapshots};
use crate::wal::{self, Options, Recovered, Wal};

/// Between two lines that tell how far a start has come.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// A snapshot of this size takes a while to read.
const LARGE_BYTES: u64 = 64 << 20;

/// Where a data directory lies, and how its log is to be.
pub struct Place {
    pub disk: Arc<dyn Disk>,
    pub data_dir: PathBuf,
    pub segment_bytes: u64,
    /// Of the snapshots, and of what is kept of the log behind them.
    pub policy: Policy,
    pub metrics: Arc<Metrics>,
}

/// What a data directory holds.
pub struct Data {
    pub identity: Identity,
    pub wal: Wal,
    pub recovered: Recovered,
    pub snapshots: Arc<Snapshots>,
    /// The newest snapshot, the founding one at first.
    pub meta: Meta,
    /// Where the node goes on, and the service with it.
    pub resume: Resume,
    pub store: Store,
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

    /// Recovers what an earlier start left: the state is that of the last entry that is surely committed.
    pub fn recover(&self, identity: Identity, now_micros: u64) -> Result<Data, Error> {
        let (wal, recovered) = Wal::open(self.disk.clone(), &self.log(), now_micros, self.metrics.clone())?;
        let snapshots = Arc::new(Snapshots::open(self.disk.clone(), &self.data_dir)?);
        let base = recovered.compacted.unwrap_or(FOUNDING);
        let last = recovered.entries.last().unwrap_or(base.0);
        let (meta, snapshot_bytes, state) = match snapshots.newest(base, last, |index| recovered.entries.term(index))? {
            Some(meta) => {
                let (_, image) = snapshots.read(meta.index, meta.term)?;
                let size_bytes = image.size_bytes();
                if size_bytes >= LARGE_BYTES {
                    info!(index = meta.index, bytes = size_bytes, "reading the snapshot");
                }
                let state = read_image(image).map_err(|error| match error {
                    BadImage::NewerFormat(_) => Error::NewerImage { index: meta.index, error },
                    BadImage::Damaged(_) | BadImage::Read(_) => Error::Image { index: meta.index, error },
                })?;
                if state.applied() != meta.index {
                    return Err(Error::WrongImage { index: meta.index, found: state.applied() });
                }
                (meta, size_bytes, state)
            }
            None => (Meta::founding(&recovered.founders), 0, State::founded(FOUNDING.0)),
        };
        let store = Store::new(state, self.metrics.clone());
        let mut resume = self.resume(identity, &recovered, &meta, snapshot_bytes);
        let mut told = Instant::now();
        for entry in recovered.entries.read() {
            store.apply(resume.take(entry?)?)?;
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                info!(applied = resume.applied(), last, "reading the log");
            }
        }
        Ok(Data { identity, wal, recovered, snapshots, meta, resume, store })
    }

    /// Makes the directory of a member that starts for the first time.
    pub fn found(&self, cluster: u64, id: u64, founders: &[Member], now_micros: u64) -> Result<Data, Error> {
        let disk = self.disk.clone();
        let identity = Identity::create(disk.as_ref(), &self.data_dir, cluster, id)?;
        let (wal, recovered) = Wal::create(disk.clone(), &self.log(), founders, now_micros, self.metrics.clone())?;
        let identity = identity.note_log(disk.as_ref(), &self.data_dir)?;
        let snapshots = Arc::new(Snapshots::open(disk, &self.data_dir)?);
        let meta = Meta::founding(founders);
        let store = Store::new(State::founded(meta.index), self.metrics.clone());
        let resume = self.resume(identity, &recovered, &meta, 0);
        Ok(Data { identity, wal, recovered, snapshots, meta, resume, store })
    }

    fn resume(&self, identity: Identity, recovered: &Recovered, meta: &Meta, snapshot_bytes: u64) -> Resume {
        Resume::new(identity.member, identity.nonce, recovered, meta, snapshot_bytes, self.policy.clone())
    }
}
