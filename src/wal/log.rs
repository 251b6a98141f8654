//! The open log: how appends become frames, frames fill segments, and segments are freed.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use raft::eraftpb::HardState;

use super::disk::Disk;
use super::entries::Entries;
use super::error::Error;
use super::record::{self, FRAME_BYTES_MAX};
use super::recovery::{self, Closed};
use super::segment::{self, FIRST_ID, HEADER_BYTES, Segment};
use super::spare::Spare;
use super::terms::Terms;
use super::{Append, Options, Recovered, Room, replay};
use crate::cluster::Member;
use crate::metrics::Metrics;

/// An open log. Single-threaded: [`Writer`](super::writer::Writer) runs it on a thread of its own.
pub struct Wal {
    disk: Arc<dyn Disk>,
    options: Options,
    pub(super) metrics: Arc<Metrics>,
    /// Oldest first.
    pub(super) closed: VecDeque<Closed>,
    pub(super) active: Segment,
    pub(super) spare: Arc<Spare>,
    next_sequence: u64,
    /// The frame being put together; kept for its allocation.
    frame: Vec<u8>,
    /// The highest index of an entry in `frame`.
    frame_last_index: u64,
    /// Behind a snapshot in `frame` the log begins anew.
    frame_restarts: bool,
    kept: Kept,
    stopped: bool,
    pub(super) counts: Arc<Counts>,
}

/// What a compaction writes again, so that the segments that held it can go.
#[derive(Debug)]
struct Kept {
    founders: Vec<Member>,
    boot: u64,
    hard_state: Option<HardState>,
    nonces: BTreeMap<u64, u64>,
    /// Index and term of the entry before the first.
    base: (u64, u64),
    last_index: u64,
}

/// Figures that other threads may look at.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) segments: AtomicU64,
    pub(super) segments_bytes: AtomicU64,
    pub(super) active_bytes: AtomicU64,
    pub(super) active_room_bytes: AtomicU64,
    pub(super) syncs: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) cut_bytes: AtomicU64,
}

impl Wal {
    /// Whether there is a log to open. A creation that was cut short left none.
    pub fn exists(disk: &dyn Disk, dir: &Path) -> Result<bool, Error> {
        // The first segment gets its name only with a durable first frame.
        Ok(!segment::ids(disk, dir)?.is_empty())
    }

    /// Makes a new log, durable when this returns.
    pub fn create(
        disk: Arc<dyn Disk>,
        options: &Options,
        founders: &[Member],
        now_micros: u64,
        metrics: Arc<Metrics>,
    ) -> Result<(Wal, Recovered), Error> {
        disk.create_dir(&options.dir)?;
        if let Some(data_dir) = options.dir.parent() {
            disk.sync_dir(data_dir)?;
        }
        let spare = Arc::new(Spare::find(disk.clone(), options, metrics.clone())?);
        let mut active =
            Segment::draft(disk.as_ref(), &options.dir, spare.take()?, options.segment_bytes, FIRST_ID, 1)?;
        let mut frame = Vec::new();
        record::begin_frame(&mut frame);
        record::put_founding(&mut frame, founders);
        record::put_boot(&mut frame, now_micros);
        record::seal_frame(&mut frame, active.header.frame_seed(), 1);
        active.write(&frame)?;
        active.publish(disk.as_ref(), &options.dir)?;

        let kept = Kept {
            founders: founders.to_vec(),
            boot: now_micros,
            hard_state: None,
            nonces: BTreeMap::new(),
            base: replay::FOUNDING,
            last_index: replay::FOUNDING.0,
        };
        let recovered = Recovered {
            founders: founders.to_vec(),
            boot: now_micros,
            hard_state: HardState::default(),
            entries: Entries::new(disk.clone(), &options.dir, FIRST_ID..=FIRST_ID, Terms::default()),
            nonces: BTreeMap::new(),
            compacted: None,
            cut_bytes: 0,
            segments: 1,
        };
        let wal = Wal::assemble(disk, options, metrics, VecDeque::new(), active, spare, 2, kept);
        wal.count_write(frame.len());
        Ok((wal, recovered))
    }

    /// Opens a log that exists: reads it back, cuts a torn end, and makes the number of this start durable.
    pub fn open(
        disk: Arc<dyn Disk>,
        options: &Options,
        now_micros: u64,
        metrics: Arc<Metrics>,
    ) -> Result<(Wal, Recovered), Error> {
        let mut found = recovery::recover(disk.as_ref(), &options.dir)?;
        // A process that was killed, or stopped at a failed sync, may have left names and its last frame in memory
        // only. Nothing may be written behind them before they are durable, or a power loss would make a torn frame
        // look like damage. Writing the frame again also makes the kernel forget that it failed to write it.
        disk.sync_dir(&options.dir)?;
        if found.cut_bytes > 0 {
            tracing::warn!(bytes = found.cut_bytes, "the log ends in a torn write: cut");
            found.active.cut(FRAME_BYTES_MAX)?;
        }
        if let Some((offset, frame)) = &found.last_frame {
            found.active.rewrite(*offset, frame)?;
        }
        found.active.sync()?;

        let spare = Arc::new(Spare::find(disk.clone(), options, metrics.clone())?);
        let (replay, sequence) = (found.replay, found.next_sequence);
        let last_index = replay.last_index();
        let hard_state = replay.hard_state();
        let founders = replay.founders.expect("recovery refuses a log without its founding");
        let base = replay.base.expect("recovery refuses a log without a beginning");
        let kept = Kept {
            founders: founders.clone(),
            boot: now_micros.max(replay.boot.saturating_add(1)),
            hard_state: Some(hard_state.clone()),
            nonces: replay.nonces.clone(),
            base,
            last_index,
        };
        let first = found.closed.front().map_or(found.active.header.id, |oldest| oldest.id);
        let entries = Entries::new(disk.clone(), &options.dir, first..=found.active.header.id, replay.entries);
        let mut wal = Wal::assemble(disk, options, metrics, found.closed, found.active, spare, sequence, kept);
        wal.counts.cut_bytes.store(found.cut_bytes, Ordering::Relaxed);
        wal.begin();
        record::put_boot(&mut wal.frame, wal.kept.boot);
        wal.flush()?;
        let recovered = Recovered {
            founders,
            boot: wal.kept.boot,
            hard_state,
            entries,
            nonces: replay.nonces,
            compacted: Some(base).filter(|base| *base != replay::FOUNDING),
            cut_bytes: found.cut_bytes,
            segments: wal.closed.len() + 1,
        };
        Ok((wal, recovered))
    }

    #[expect(clippy::too_many_arguments, reason = "the two ways to a log end here, and nobody else calls it")]
    fn assemble(
        disk: Arc<dyn Disk>,
        options: &Options,
        metrics: Arc<Metrics>,
        closed: VecDeque<Closed>,
        active: Segment,
        spare: Arc<Spare>,
        next_sequence: u64,
        kept: Kept,
    ) -> Wal {
        let options = options.clone();
        let (frame, counts) = (Vec::new(), Arc::default());
        let (frame_last_index, frame_restarts, stopped) = (0, false, false);
        let wal = Wal {
            disk,
            options,
            metrics,
            closed,
            active,
            spare,
            next_sequence,
            frame,
            frame_last_index,
            frame_restarts,
            kept,
            stopped,
            counts,
        };
        wal.count_room();
        wal
    }

    /// Remembers all of it, durable when this returns: in one frame with one sync, or, where that would be longer than
    /// a frame can be, in several, each synced before the next. Where a snapshot took the place of the log, the segments
    /// before it are freed once all of it is durable. After an error nothing of it may be acknowledged, and every later
    /// call fails.
    pub fn append(&mut self, batch: &[Append]) -> Result<(), Error> {
        self.run(|wal| {
            wal.append_batch(batch)?;
            match batch.iter().filter_map(|append| append.snapshot).next_back() {
                Some((index, _)) => wal.free(index),
                None => Ok(()),
            }
        })
    }

    /// Says that the entries up to `index`, whose term is `term`, are no longer needed, durable when this returns; then
    /// frees the segments that hold nothing else.
    pub fn compact(&mut self, index: u64, term: u64) -> Result<(), Error> {
        if index <= self.kept.base.0 {
            return Ok(());
        }
        self.run(|wal| {
            wal.write_compaction(index, term)?;
            wal.free(index)
        })
    }

    /// Prepares a spare segment now. [`Writer`](super::writer::Writer) does it on a thread; a simulator calls this.
    pub fn prepare_spare(&mut self) -> Result<(), Error> {
        self.spare.prepare(&false.into())
    }

    pub fn room(&self) -> Room {
        self.spare.room()
    }

    /// What is left in the active segment and in the spare.
    pub fn room_bytes(&self) -> u64 {
        self.active.room_bytes() + self.spare.room_bytes()
    }

    /// Runs a change of the log; after an error there is never another.
    fn run(&mut self, change: impl FnOnce(&mut Self) -> Result<(), Error>) -> Result<(), Error> {
        if self.stopped {
            return Err(Error::Stopped);
        }
        self.stopped = true;
        change(self)?;
        self.stopped = false;
        Ok(())
    }

    fn append_batch(&mut self, batch: &[Append]) -> Result<(), Error> {
        self.begin();
        for append in batch {
            if let Some((index, term)) = append.snapshot {
                self.restart_behind(index, term)?;
            }
            // The entries first, as etcd has it: a commit index is never durable before the entry that it names.
            for entry in &append.entries {
                self.make_room(record::entry_bytes(entry))?;
                self.note_entry(entry.index);
                record::put_entry(&mut self.frame, entry);
            }
            if let Some(state) = &append.hard_state {
                self.make_room(record::HARD_STATE_BYTES)?;
                record::put_hard_state(&mut self.frame, state);
                self.kept.hard_state = Some(state.clone());
            }
            for (member, nonce) in &append.nonces {
                self.make_room(record::NONCE_BYTES)?;
                record::put_nonce(&mut self.frame, *member, *nonce);
                self.kept.nonces.insert(*member, *nonce);
            }
        }
        self.flush()
    }

    fn note_entry(&mut self, index: u64) {
        let (base, last) = (self.kept.base.0, self.kept.last_index);
        assert!(base < index && index <= last + 1, "entry {index} appended to a log of {base} < index <= {last}");
        self.kept.last_index = index;
        self.frame_last_index = self.frame_last_index.max(index);
    }

    /// A snapshot takes the place of the whole log, entries above its index included: they were not of this history.
    fn restart_behind(&mut self, index: u64, term: u64) -> Result<(), Error> {
        let (base, commit) = (self.kept.base.0, self.kept.hard_state.as_ref().map_or(0, |state| state.commit));
        assert!(base.max(commit) <= index, "a snapshot at {index} of a log from {base} with {commit} committed");
        self.kept.base = (index, term);
        self.kept.last_index = index;
        self.put_base()?;
        self.frame_last_index = 0;
        self.frame_restarts = true;
        Ok(())
    }

    fn write_compaction(&mut self, index: u64, term: u64) -> Result<(), Error> {
        self.kept.base = (index, term);
        self.kept.last_index = self.kept.last_index.max(index);
        self.begin();
        self.put_base()?;
        self.flush()
    }

    /// Puts all that recovery needs, besides entries, into one frame: the segments before it can then go.
    fn put_base(&mut self) -> Result<(), Error> {
        let (mut records, kept) = (Vec::new(), &self.kept);
        record::put_founding(&mut records, &kept.founders);
        record::put_boot(&mut records, kept.boot);
        // Before the hard state: what that has committed is then in the log, or compacted away.
        record::put_compacted(&mut records, kept.base.0, kept.base.1, kept.last_index);
        if let Some(state) = &kept.hard_state {
            record::put_hard_state(&mut records, state);
        }
        for (member, nonce) in &kept.nonces {
            record::put_nonce(&mut records, *member, *nonce);
        }
        self.make_room(records.len())?;
        self.frame.extend_from_slice(&records);
        Ok(())
    }

    fn free(&mut self, index: u64) -> Result<(), Error> {
        while self.closed.front().is_some_and(|oldest| oldest.last_index <= index) {
            let oldest = self.closed.pop_front().expect("it was looked at");
            self.spare.recycle(&segment::path(&self.options.dir, oldest.id))?;
            // One at a time: were a younger one to go first, a crash would leave a hole.
            self.disk.sync_dir(&self.options.dir)?;
        }
        self.count_room();
        Ok(())
    }

    fn begin(&mut self) {
        record::begin_frame(&mut self.frame);
        self.frame_last_index = 0;
        self.frame_restarts = false;
    }

    /// Makes sure that a record still fits the frame, which may write what the frame has so far.
    fn make_room(&mut self, record_bytes: usize) -> Result<(), Error> {
        let max = FRAME_BYTES_MAX.min(self.options.segment_bytes - HEADER_BYTES) - record::FRAME_ALIGN as u64;
        if (self.frame.len() + record_bytes) as u64 > max {
            self.flush()?;
            self.begin();
        }
        if (self.frame.len() + record_bytes) as u64 > max {
            return Err(Error::RecordTooLarge { bytes: record_bytes as u64, max });
        }
        Ok(())
    }

    /// Makes the frame durable, in the active segment or as the first one of the next.
    fn flush(&mut self) -> Result<(), Error> {
        if self.frame.len() == record::FRAME_HEADER_BYTES {
            return Ok(());
        }
        let fits = self.frame.len().next_multiple_of(record::FRAME_ALIGN) as u64 <= self.active.room_bytes();
        let full = if fits { None } else { Some(self.rotate()?) };
        record::seal_frame(&mut self.frame, self.active.header.frame_seed(), self.next_sequence);
        self.active.write(&self.frame)?;
        let started = Instant::now();
        match full {
            None => self.active.sync()?,
            Some(full) => {
                self.active.publish(self.disk.as_ref(), &self.options.dir)?;
                full.close(self.next_sequence)?;
            }
        }
        self.metrics.wal_fsync_seconds.observe(started.elapsed().as_secs_f64());
        if self.frame_restarts {
            self.closed.iter_mut().for_each(|before| before.last_index = 0);
            self.active.last_index = 0;
        }
        self.active.last_index = self.active.last_index.max(self.frame_last_index);
        self.next_sequence += 1;
        self.count_write(self.frame.len());
        Ok(())
    }

    /// Makes a draft of the next segment the active one, whose first frame publishes it, and returns the full one.
    fn rotate(&mut self) -> Result<Segment, Error> {
        let (disk, dir) = (self.disk.as_ref(), &self.options.dir);
        let (id, sequence) = (self.active.header.id, self.next_sequence);
        let next = Segment::draft(disk, dir, self.spare.take()?, self.options.segment_bytes, id + 1, sequence)?;
        let full = std::mem::replace(&mut self.active, next);
        self.closed.push_back(Closed { id, last_index: full.last_index, size_bytes: full.size_bytes });
        Ok(full)
    }

    fn count_write(&self, bytes: usize) {
        self.counts.syncs.fetch_add(1, Ordering::Relaxed);
        self.counts.written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.metrics.wal_written_bytes.inc_by(bytes as u64);
        self.count_room();
    }

    fn count_room(&self) {
        let segments = self.closed.len() as u64 + 1;
        self.counts.segments.store(segments, Ordering::Relaxed);
        let closed_bytes: u64 = self.closed.iter().map(|closed| closed.size_bytes).sum();
        self.counts.segments_bytes.store(closed_bytes + self.active.size_bytes, Ordering::Relaxed);
        self.metrics.wal_segments.set(i64::try_from(segments).expect("a count of files"));
        self.counts.active_bytes.store(self.active.tail, Ordering::Relaxed);
        self.counts.active_room_bytes.store(self.active.room_bytes(), Ordering::Relaxed);
    }
}
