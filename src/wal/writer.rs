//! The log on its own thread: appends queue here and are taken together, so that the slower the disk, the more goes
//! into one sync. A second thread prepares the spare segment, beginning after the first append, when the node serves.
//!
//! The queue has no bound of its own: the node, which must never wait here, stops taking proposals by
//! [`Writer::queued_bytes`]. Whatever happens is told through the one callback; called by `node`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::Serialize;

use super::log::Counts;
use super::record::FRAME_BYTES_MAX;
use super::spare::Spare;
use super::{Append, Error, Room, Wal};
use crate::metrics::Metrics;

/// The most that is taken into one append; a longer queue is taken in turns.
const TAKE_BYTES_MAX: u64 = 4 << 20;
/// How long until a spare that could not be prepared is tried again.
const SPARE_RETRY: Duration = Duration::from_secs(1);

/// What the log tells the node. After `Failed` there is nothing more.
#[derive(Debug)]
pub enum Event {
    /// Every append up to this number is durable.
    Persisted {
        number: u64,
    },
    Room(Room),
    Failed(Error),
}

/// The figures of the log in `/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    pub segments: u64,
    /// What they and the spare take on the disk.
    pub disk_bytes: u64,
    /// Used in the segment that is written to.
    pub active_bytes: u64,
    /// Left in that segment and in the spare.
    pub room_bytes: u64,
    pub queued_bytes: u64,
    pub full: bool,
    /// Frames made durable since the start.
    pub syncs: u64,
    pub written_bytes: u64,
    pub cut_bytes: u64,
}

enum Work {
    Append(Append),
    Compact {
        index: u64,
        term: u64,
    },
    /// The room may have changed.
    Room,
    Close,
}

/// The handle to the log thread. Dropped without [`Writer::close`], the thread ends by itself once it has written
/// what is queued.
pub struct Writer {
    work: Sender<Work>,
    thread: Option<JoinHandle<()>>,
    queued_bytes: Arc<AtomicU64>,
    counts: Arc<Counts>,
    spare: Arc<Spare>,
    metrics: Arc<Metrics>,
}

impl Writer {
    /// Starts the threads. `events` runs on the log's thread and must not wait.
    pub fn spawn(wal: Wal, events: impl Fn(Event) + Send + 'static) -> Result<Writer, Error> {
        let (work, queue) = channel();
        let (counts, spare, metrics) = (wal.counts.clone(), wal.spare.clone(), wal.metrics.clone());
        let queued_bytes = Arc::new(AtomicU64::new(0));
        let preparer = Preparer::spawn(spare.clone(), work.clone())?;
        let task = Task { wal, queue, queued_bytes: queued_bytes.clone(), metrics: metrics.clone(), preparer };
        let thread = thread::Builder::new().name("wal".to_owned()).spawn(move || task.run(&events));
        let thread = Some(thread.map_err(Error::Thread)?);
        Ok(Writer { work, thread, queued_bytes, counts, spare, metrics })
    }

    /// Queues an append; never waits. After the log has failed it goes nowhere.
    pub fn append(&self, append: Append) {
        let bytes = append.size_bytes();
        let queued = self.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.metrics.wal_queued_bytes.set(queued.cast_signed());
        self.send(Work::Append(append));
    }

    /// Queues a compaction behind the appends so far, see [`Wal::compact`]; never waits. A snapshot at `index` or above
    /// must be durable before.
    pub fn compact(&self, index: u64, term: u64) {
        self.send(Work::Compact { index, term });
    }

    /// Bytes handed over and not durable yet.
    pub fn queued_bytes(&self) -> u64 {
        self.queued_bytes.load(Ordering::Relaxed)
    }

    /// Whether appends of so many more bytes surely find room behind what is queued, in segments that are there. Never
    /// waits.
    pub fn has_room_for(&self, bytes: u64) -> bool {
        let active = self.counts.active_room_bytes.load(Ordering::Relaxed);
        let spare = self.spare.room_bytes();
        // A frame does not span segments: the end of the active one may stay unused, up to a frame's length.
        let usable = active.max((active + spare).saturating_sub(if spare > 0 { FRAME_BYTES_MAX } else { 0 }));
        self.queued_bytes() + bytes <= usable
    }

    pub fn status(&self) -> Status {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Status {
            segments: get(&self.counts.segments),
            disk_bytes: get(&self.counts.segments_bytes) + self.spare.disk_bytes(),
            active_bytes: get(&self.counts.active_bytes),
            room_bytes: get(&self.counts.active_room_bytes) + self.spare.room_bytes(),
            queued_bytes: self.queued_bytes(),
            full: self.spare.room() == Room::Full,
            syncs: get(&self.counts.syncs),
            written_bytes: get(&self.counts.written_bytes),
            cut_bytes: get(&self.counts.cut_bytes),
        }
    }

    /// Makes everything queued durable, then ends both threads.
    pub fn close(mut self) {
        self.send(Work::Close);
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
    }

    fn send(&self, work: Work) {
        if self.work.send(work).is_err() {
            tracing::trace!("the log thread has ended; it said why");
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The preparer holds a sender too, so that the queue alone would not tell the thread that nobody is left.
        if self.thread.is_some() {
            self.send(Work::Close);
        }
    }
}

/// What follows a batch of appends.
enum Then {
    Nothing,
    Compact { index: u64, term: u64 },
    Close,
}

struct Task {
    wal: Wal,
    queue: Receiver<Work>,
    queued_bytes: Arc<AtomicU64>,
    metrics: Arc<Metrics>,
    preparer: Preparer,
}

impl Task {
    fn run(mut self, events: &impl Fn(Event)) {
        let mut batch = Vec::new();
        let mut closing = false;
        let mut room = Room::Ok;
        // The segment after which a spare was asked for.
        let mut asked = 0;
        while !closing {
            batch.clear();
            let (taken_bytes, then) = self.take(&mut batch);
            closing = matches!(then, Then::Close);
            if let Some(number) = batch.last().map(|append| append.number) {
                if let Err(error) = self.wal.append(&batch) {
                    tracing::error!(%error, "the log failed");
                    events(Event::Failed(error));
                    break;
                }
                let queued = self.queued_bytes.fetch_sub(taken_bytes, Ordering::Relaxed) - taken_bytes;
                self.metrics.wal_queued_bytes.set(queued.cast_signed());
                events(Event::Persisted { number });
                if asked != self.wal.active.header.id {
                    asked = self.wal.active.header.id;
                    self.preparer.ask();
                }
            }
            if let Then::Compact { index, term } = then
                && let Err(error) = self.wal.compact(index, term)
            {
                tracing::error!(%error, "the log failed");
                events(Event::Failed(error));
                break;
            }
            if room != self.wal.room() {
                room = self.wal.room();
                events(Event::Room(room));
            }
        }
        self.preparer.close();
    }

    /// Waits for work, then takes what else is there, up to what must come behind those appends. Returns their bytes, and
    /// that.
    fn take(&self, batch: &mut Vec<Append>) -> (u64, Then) {
        let mut bytes = 0;
        let mut next = self.queue.recv().unwrap_or(Work::Close);
        loop {
            match next {
                Work::Append(append) => {
                    bytes += append.size_bytes();
                    batch.push(append);
                }
                Work::Compact { index, term } => return (bytes, Then::Compact { index, term }),
                Work::Room => {}
                Work::Close => return (bytes, Then::Close),
            }
            if bytes >= TAKE_BYTES_MAX {
                return (bytes, Then::Nothing);
            }
            match self.queue.try_recv() {
                Ok(work) => next = work,
                Err(_) => return (bytes, Then::Nothing),
            }
        }
    }
}

/// The thread that keeps a spare segment ready.
struct Preparer {
    wishes: Sender<()>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Preparer {
    fn spawn(spare: Arc<Spare>, work: Sender<Work>) -> Result<Preparer, Error> {
        let (wishes, asked) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let (task_stop, name) = (stop.clone(), "wal-spare".to_owned());
        let run = move || Preparer::run(&spare, &work, &asked, &task_stop);
        let thread = thread::Builder::new().name(name).spawn(run).map_err(Error::Thread)?;
        Ok(Preparer { wishes, stop, thread })
    }

    /// Asks for a spare to be made; never waits.
    fn ask(&self) {
        self.wishes.send(()).expect("the preparer lives until it is closed");
    }

    fn run(spare: &Spare, work: &Sender<Work>, asked: &Receiver<()>, stop: &AtomicBool) {
        let mut failing = false;
        loop {
            match asked.recv_timeout(if failing { SPARE_RETRY } else { Duration::MAX }) {
                Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            // Nobody was told of anything in a spare, so that its failure does not stop the node: a disk that is
            // broken shows at the next append.
            let outcome = spare.prepare(stop);
            if let Err(error) = &outcome
                && !failing
            {
                tracing::warn!(%error, "no spare log segment; trying again every second");
            }
            failing = outcome.is_err();
            if work.send(Work::Room).is_err() {
                return;
            }
        }
    }

    fn close(self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.wishes);
        if let Err(panic) = self.thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    //! What was queued is durable when the writer says so; a failure is told once and nothing after it.

    use std::time::Instant;

    use raft::eraftpb::Entry;

    use super::super::disk::Disk;
    use super::super::disk_memory::MemoryDisk;
    use super::super::{Options, segment};
    use super::*;

    const SEGMENT_BYTES: u64 = segment::HEADER_BYTES + 4096;

    fn spawn(disk: &MemoryDisk) -> (Writer, Receiver<Event>) {
        let options = Options { dir: "/data/wal".into(), segment_bytes: SEGMENT_BYTES };
        let (wal, _) = Wal::create(Arc::new(disk.clone()), &options, &[], 1, Arc::default()).unwrap();
        let (sender, events) = channel();
        let writer = Writer::spawn(wal, move |event| sender.send(event).unwrap()).unwrap();
        (writer, events)
    }

    fn append(index: u64) -> Append {
        let mut entry = Entry::new();
        (entry.term, entry.index, entry.data) = (1, index, vec![index as u8; 500].into());
        Append { number: index, entries: vec![entry], ..Append::default() }
    }

    fn wait(events: &Receiver<Event>) -> Event {
        events.recv_timeout(Duration::from_secs(20)).expect("an event within 20 s")
    }

    #[test]
    fn everything_queued_is_durable_when_it_is_closed() {
        let disk = MemoryDisk::new();
        let (writer, events) = spawn(&disk);
        (2..100).for_each(|index| writer.append(append(index)));
        let status = writer.status();
        assert!(status.segments >= 1 && status.room_bytes > 0);
        let (queued_bytes, counts) = (writer.queued_bytes.clone(), writer.counts.clone());
        writer.close();
        assert_eq!(queued_bytes.load(Ordering::Relaxed), 0);
        assert!(counts.syncs.load(Ordering::Relaxed) <= 100, "together, where they waited together");

        let mut last = 0;
        while let Ok(Event::Persisted { number }) = events.recv() {
            assert!(last < number);
            last = number;
        }
        assert_eq!(last, 99);
        disk.crash(&mut || false);
        let options = Options { dir: "/data/wal".into(), segment_bytes: SEGMENT_BYTES };
        let (_, recovered) = Wal::open(Arc::new(disk), &options, 1, Arc::default()).unwrap();
        assert_eq!(recovered.entries.len(), 98);
    }

    #[test]
    fn a_compaction_keeps_its_place_among_the_appends_and_frees_segments() {
        let disk = MemoryDisk::new();
        let (writer, events) = spawn(&disk);
        (2..90).for_each(|index| writer.append(append(index)));
        writer.compact(80, 1);
        writer.append(append(90));
        while !matches!(wait(&events), Event::Persisted { number: 90 }) {}
        let status = writer.status();
        assert!(status.segments <= 3, "{} segments", status.segments);
        assert!((status.segments..=status.segments + 1).contains(&(status.disk_bytes / SEGMENT_BYTES)), "{status:?}");
        writer.close();
        disk.crash(&mut || false);
        let options = Options { dir: "/data/wal".into(), segment_bytes: SEGMENT_BYTES };
        let (_, recovered) = Wal::open(Arc::new(disk), &options, 1, Arc::default()).unwrap();
        assert_eq!((recovered.compacted, recovered.entries.len()), (Some((80, 1)), 10));
    }

    #[test]
    fn a_failed_compaction_is_told() {
        let disk = MemoryDisk::new();
        let (writer, events) = spawn(&disk);
        disk.stop_at(disk.operations());
        writer.compact(2, 1);
        assert!(matches!(wait(&events), Event::Failed(Error::Disk(_))));
        writer.close();
        assert!(events.recv().is_err(), "nothing after the failure");
    }

    #[test]
    fn a_failed_sync_is_told_and_nothing_is_acknowledged_any_more() {
        let disk = MemoryDisk::new();
        let (writer, events) = spawn(&disk);
        // The write succeeds and its sync does not.
        disk.fail_at(disk.operations() + 1);
        writer.append(append(2));
        assert!(matches!(wait(&events), Event::Failed(Error::Disk(error)) if error.operation == "sync"));
        writer.append(append(3));
        writer.close();
        assert!(events.recv().is_err(), "nothing after the failure");
    }

    #[test]
    fn a_full_disk_is_told_and_told_again_once_there_is_room() {
        let disk = MemoryDisk::new();
        let (writer, events) = spawn(&disk);
        disk.set_capacity(Some(SEGMENT_BYTES));
        writer.append(append(2));
        assert!(matches!(wait(&events), Event::Persisted { number: 2 }));
        assert!(matches!(wait(&events), Event::Room(Room::Full)));
        assert!(writer.status().full);
        disk.set_capacity(None);
        assert!(matches!(wait(&events), Event::Room(Room::Ok)));
        let status = writer.status();
        assert!(!status.full && status.room_bytes > SEGMENT_BYTES - segment::HEADER_BYTES);
        writer.close();
    }

    #[test]
    fn a_spare_is_prepared_only_after_the_first_append() {
        let disk = MemoryDisk::new();
        let (writer, events) = spawn(&disk);
        let spare = std::path::Path::new("/data/wal/spare");
        assert_eq!(disk.size(spare).unwrap(), None);
        writer.append(append(2));
        assert!(matches!(wait(&events), Event::Persisted { number: 2 }));
        let deadline = Instant::now() + Duration::from_secs(20);
        while disk.size(spare).unwrap().is_none() {
            assert!(Instant::now() < deadline, "no spare");
            thread::yield_now();
        }
        drop(writer);
    }
}
