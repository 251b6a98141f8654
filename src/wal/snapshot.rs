//! The directory of snapshots: `<data-dir>/snap/<term>-<index>.snap`, both as 16 hex digits. A file has its name only
//! once all of it is durable, so that a crash leaves the old set or the new one; what has no name yet is removed at the
//! next start. Which of them counts is decided by the log, see [`Snapshots::newest`].
//!
//! Everything here waits for the disk: called by `server` at the start, and by the node and the transport from threads
//! that may wait. The bytes are in `image`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::disk::{Disk, DiskFile};
use super::error::Error;
pub use super::image::Image;
use super::image::{Appender, ImageWriter};
use super::replay::FOUNDING;
use crate::cluster::Member;

const DIR: &str = "snap";
const SUFFIX: &str = ".snap";
/// What is being written or received.
const UNFINISHED: &str = ".new";

/// What the log and the members must know of a snapshot: where it stands, and who belonged to the cluster there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    pub index: u64,
    pub term: u64,
    pub voters: Vec<u64>,
    /// The other half of a joint configuration; empty outside of one.
    pub voters_outgoing: Vec<u64>,
    pub learners: Vec<u64>,
    /// Voters that become learners when the joint configuration is left.
    pub learners_next: Vec<u64>,
    pub auto_leave: bool,
    /// Where they are reached.
    pub members: Vec<Member>,
    pub founders: Vec<Member>,
    /// Members, and the nonces of their data directories.
    pub nonces: BTreeMap<u64, u64>,
    /// IDs that never come back.
    pub removed: BTreeSet<u64>,
}

impl Meta {
    /// The synthetic snapshot that every founder starts from; it has no file.
    pub fn founding(founders: &[Member]) -> Self {
        Meta {
            index: FOUNDING.0,
            term: FOUNDING.1,
            voters: founders.iter().map(|member| member.id).collect(),
            members: founders.to_vec(),
            founders: founders.to_vec(),
            ..Meta::default()
        }
    }

    /// Refuses what would make raft panic, or could never come to be.
    pub fn check(&self) -> Result<(), &'static str> {
        let ids = || self.voters.iter().chain(&self.voters_outgoing).chain(&self.learners).chain(&self.learners_next);
        if self.index == 0 || self.term == 0 {
            return Err("a snapshot before the first entry");
        }
        if self.voters.is_empty() {
            return Err("a snapshot without voters");
        }
        if ids().chain(self.members.iter().chain(&self.founders).map(|member| &member.id)).any(|id| *id == 0) {
            return Err("a member with the ID 0");
        }
        if self.learners.iter().any(|id| self.voters.contains(id) || self.voters_outgoing.contains(id)) {
            return Err("a learner that is a voter too");
        }
        if self.learners_next.iter().any(|id| !self.voters_outgoing.contains(id)) {
            return Err("a learner to be that was no voter");
        }
        Ok(())
    }
}

/// A handle on the directory. Clones share it.
#[derive(Clone)]
pub struct Snapshots {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    /// Numbers the unfinished files.
    unfinished: Arc<AtomicU64>,
}

impl Snapshots {
    /// Makes the directory where there is none, and removes what an earlier run left unfinished.
    pub fn open(disk: Arc<dyn Disk>, data_dir: &Path) -> Result<Self, Error> {
        let dir = data_dir.join(DIR);
        disk.create_dir(&dir)?;
        disk.sync_dir(data_dir)?;
        for name in disk.list(&dir)?.iter().filter(|name| name.ends_with(UNFINISHED)) {
            disk.remove(&dir.join(name))?;
        }
        // A process that was killed may have left a name that is not durable. Nobody may rely on it before it is.
        disk.sync_dir(&dir)?;
        Ok(Snapshots { disk, dir, unfinished: Arc::default() })
    }

    /// Writes a snapshot, durable when this returns; its size in bytes. After an error there is no such snapshot, or,
    /// where only the directory could not be synced, perhaps a whole one.
    pub fn write(&self, meta: &Meta, image: impl FnOnce(&mut dyn io::Write) -> io::Result<()>) -> Result<u64, Error> {
        meta.check().map_err(|why| Error::Image(io::Error::other(why)))?;
        let mut file = Unfinished::create(self)?;
        let mut writer = ImageWriter::begin(&mut file.out, meta, self.disk.random().map_err(Error::Random)?)?;
        let outcome = image(&mut writer);
        writer.end(outcome)?;
        let size_bytes = file.out.size_bytes();
        file.publish(meta)?;
        Ok(size_bytes)
    }

    /// Begins to take a snapshot that comes from another member.
    pub fn receive(&self) -> Result<Incoming, Error> {
        Ok(Incoming { file: Unfinished::create(self)?, failed: false })
    }

    /// Opens the file of a snapshot as it is, to send it on. It stays readable when it is purged meanwhile.
    pub fn open_file(&self, index: u64, term: u64) -> Result<Reading, Error> {
        let file = self.disk.open(&self.path(index, term))?;
        Ok(Reading { size_bytes: file.size()?, file, at: 0 })
    }

    /// Opens a snapshot to restore it. The image says at its end, and not before, that it was complete.
    pub fn read(&self, index: u64, term: u64) -> Result<(Meta, Image), Error> {
        let path = self.path(index, term);
        let (meta, image) = Image::open(self.disk.open(&path)?, &path)?;
        if (meta.index, meta.term) != (index, term) {
            let why =
                format!("it holds the snapshot of entry {}, term {}: the file was renamed", meta.index, meta.term);
            return Err(Error::Corrupt { file: path, offset: 0, why });
        }
        Ok((meta, image))
    }

    /// The newest snapshot that a log agrees with, read and verified as a whole. The log begins behind `base` (index and
    /// term), ends at `last`, and `term_at` knows the terms of the entries between. A snapshot beyond its end was never
    /// vouched for: it is passed over. A damaged one is too, with a warning, where an older one or the founding will do;
    /// where none will, this refuses: the log alone is not the state.
    pub fn newest(
        &self,
        base: (u64, u64),
        last: u64,
        term_at: impl Fn(u64) -> Option<u64>,
    ) -> Result<Option<Meta>, Error> {
        let mut damaged = None;
        for (index, term) in self.list()?.into_iter().rev() {
            let vouched_for = match index {
                _ if !(base.0..=last).contains(&index) => false,
                _ if index == base.0 => term == base.1,
                _ => term_at(index) == Some(term),
            };
            if !vouched_for {
                tracing::info!(index, term, "a snapshot that the log does not lead to: passed over");
                continue;
            }
            let verified = self.read(index, term).and_then(|(meta, image)| image.verify().map(|()| meta));
            match verified {
                Ok(meta) => return Ok(Some(meta)),
                Err(error @ Error::Corrupt { .. }) => {
                    tracing::warn!(%error, "looking for an older snapshot");
                    damaged = damaged.or(Some(error));
                }
                Err(error) => return Err(error),
            }
        }
        match damaged {
            _ if base == FOUNDING => Ok(None),
            Some(error) => Err(error),
            None => Err(Error::SnapshotMissing { dir: self.dir.clone(), index: base.0 }),
        }
    }

    /// Index and term of every snapshot, lowest first.
    pub fn list(&self) -> Result<Vec<(u64, u64)>, Error> {
        let names = self.disk.list(&self.dir)?;
        let hex = |digits: &str| u64::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 16);
        let place = |name: &String| {
            let (term, index) = name.strip_suffix(SUFFIX)?.split_once('-')?;
            Some((hex(index)?, hex(term)?))
        };
        let mut places: Vec<(u64, u64)> = names.iter().filter_map(place).collect();
        places.sort_unstable();
        Ok(places)
    }

    /// Removes the oldest until `keep` are left of those up to `needed_from`, the index of the newest snapshot that the
    /// log vouches for. The newest of them always stays, and so do those above: one of them may be on its way in, and
    /// one that the log does not know must not push out one that it does.
    pub fn purge(&self, keep: usize, needed_from: u64) -> Result<(), Error> {
        let mut places = self.list()?;
        places.retain(|(index, _)| *index <= needed_from);
        let surplus = places.len().saturating_sub(keep.max(1));
        if surplus == 0 {
            return Ok(());
        }
        for (index, term) in &places[..surplus] {
            self.disk.remove(&self.path(*index, *term))?;
        }
        Ok(self.disk.sync_dir(&self.dir)?)
    }

    fn path(&self, index: u64, term: u64) -> PathBuf {
        self.dir.join(format!("{term:016x}-{index:016x}{SUFFIX}"))
    }
}

/// A file that has no name of a snapshot yet; removed when it is dropped before it got one.
struct Unfinished {
    snapshots: Snapshots,
    path: PathBuf,
    out: Appender,
    published: bool,
}

impl Unfinished {
    fn create(snapshots: &Snapshots) -> Result<Self, Error> {
        let number = snapshots.unfinished.fetch_add(1, Ordering::Relaxed);
        let path = snapshots.dir.join(format!("{number}{UNFINISHED}"));
        let out = Appender::new(snapshots.disk.create(&path)?);
        Ok(Unfinished { snapshots: snapshots.clone(), path, out, published: false })
    }

    /// Makes the content durable, then gives it its name, durably.
    fn publish(mut self, meta: &Meta) -> Result<(), Error> {
        self.out.sync()?;
        let Snapshots { disk, dir, .. } = &self.snapshots;
        disk.rename(&self.path, &self.snapshots.path(meta.index, meta.term))?;
        self.published = true;
        Ok(disk.sync_dir(dir)?)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = self.snapshots.disk.remove(&self.path)
        {
            tracing::warn!(%error, "an unfinished snapshot stays until the next start");
        }
    }
}

/// A snapshot on its way in from another member: the bytes of its file, in order. Dropped, it leaves nothing.
pub struct Incoming {
    file: Unfinished,
    failed: bool,
}

impl Incoming {
    /// Takes the next bytes. After an error it can only be dropped.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let outcome = self.file.out.append(bytes);
        self.failed |= outcome.is_err();
        Ok(outcome?)
    }

    /// How much of the file has come.
    pub fn size_bytes(&self) -> u64 {
        self.file.out.size_bytes()
    }

    /// Verifies all that came, and only then makes it a snapshot, durable when this returns.
    pub fn finish(self) -> Result<Meta, Error> {
        if self.failed {
            return Err(Error::BadIncoming { offset: self.size_bytes(), why: "it could not be written".to_owned() });
        }
        let Unfinished { snapshots, path, .. } = &self.file;
        let verified = Image::open(snapshots.disk.open(path)?, path).and_then(|(meta, image)| {
            image.verify()?;
            Ok(meta)
        });
        let meta = verified.map_err(|error| match error {
            Error::Corrupt { offset, why, .. } => Error::BadIncoming { offset, why },
            other => other,
        })?;
        self.file.publish(&meta)?;
        Ok(meta)
    }
}

/// The file of a snapshot, to be sent as it is: the receiver verifies it.
pub struct Reading {
    file: Box<dyn DiskFile>,
    size_bytes: u64,
    at: u64,
}

impl Reading {
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fills the whole buffer from `offset`.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        Ok(self.file.read_at(offset, buffer)?)
    }
}

impl Read for Reading {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len().min(usize::try_from(self.size_bytes - self.at).unwrap_or(usize::MAX));
        self.file.read_at(self.at, &mut buffer[..len]).map_err(io::Error::other)?;
        self.at += len as u64;
        Ok(len)
    }
}
