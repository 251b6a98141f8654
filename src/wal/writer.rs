//! The log on its own thread: appends queue here and are taken together, so that the slower the disk, the more goes
//! into one sync. A second thread prepares the spare segment: in a new log after the first append, when the node serves;
//! later where a segment is a quarter full, or too full for what is to come, and none before it was freed, which would have
//! become the spare.
//!
//! The queue has no bound of its own: the node, which must never wait here, stops taking proposals by
//! [`Writer::queued_bytes`]. Whatever happens is told through the one callback; called by `node`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, WeakUnboundedSender, unbounded_channel};

use super::log::Counts;
use super::record::FRAME_BYTES_MAX;
use super::segment::{FIRST_ID, HEADER_BYTES};
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
    /// There was not enough of it.
    Short,
    Close,
}

/// The handle to the log thread. Dropped without [`Writer::close`], the thread ends by itself once it has written
/// what is queued.
pub struct Writer {
    work: UnboundedSender<Work>,
    thread: Option<JoinHandle<()>>,
    queued_bytes: Arc<AtomicU64>,
    counts: Arc<Counts>,
    spare: Arc<Spare>,
    metrics: Arc<Metrics>,
}

impl Writer {
    /// Starts the threads. `events` runs on the log's thread and must not wait.
    pub fn spawn(wal: Wal, events: impl Fn(Event) + Send + 'static) -> Result<Writer, Error> {
        let (wishes, wished) = mpsc::channel();
        let (mut writer, task) = Writer::new(wal, wishes, Box::new(events));
        let preparer = Preparer::spawn(writer.spare.clone(), writer.work.clone(), wished)?;
        let thread = thread::Builder::new().name("wal".to_owned()).spawn(move || {
            task.run();
            preparer.close();
        });
        writer.thread = Some(thread.map_err(Error::Thread)?);
        Ok(writer)
    }

    /// A writer without threads: whoever holds the hand does their work. For a simulator.
    #[doc(hidden)]
    pub fn by_hand(wal: Wal, events: impl Fn(Event) + Send + 'static) -> (Writer, Hand) {
        let (wishes, wished) = mpsc::channel();
        let (writer, task) = Writer::new(wal, wishes, Box::new(events));
        let (spare, work) = (writer.spare.clone(), writer.work.downgrade());
        (writer, Hand { task, next: None, wished, spare, work, preparing: Preparing::default() })
    }

    fn new(wal: Wal, wishes: Sender<()>, events: Events) -> (Writer, Task) {
        let (work, queue) = unbounded_channel();
        let (counts, spare, metrics) = (wal.counts.clone(), wal.spare.clone(), wal.metrics.clone());
        let queued_bytes = Arc::new(AtomicU64::new(0));
        let task = Task {
            wal,
            queue,
            events,
            batch: Vec::new(),
            queued_bytes: queued_bytes.clone(),
            metrics: metrics.clone(),
            room: Room::Ok,
            wishes,
            wished_behind: 0,
        };
        (Writer { work, thread: None, queued_bytes, counts, spare, metrics }, task)
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

    /// Whether appends of so many more bytes surely find room behind what is queued, in segments that are there. If not, a
    /// spare is prepared, if that can be. Never waits.
    pub fn has_room_for(&self, bytes: u64) -> bool {
        let active = self.counts.active_room_bytes.load(Ordering::Relaxed);
        let spare = self.spare.room_bytes();
        // A frame does not span segments: the end of the active one may stay unused, up to a frame's length.
        let both = (active + spare).saturating_sub(if spare > 0 { FRAME_BYTES_MAX } else { 0 });
        let usable = active.max(spare).max(both);
        let fits = self.queued_bytes() + bytes <= usable;
        if !fits {
            self.send(Work::Short);
        }
        fits
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

type Events = Box<dyn Fn(Event) + Send>;

struct Task {
    wal: Wal,
    queue: UnboundedReceiver<Work>,
    events: Events,
    /// Kept for its room.
    batch: Vec<Append>,
    queued_bytes: Arc<AtomicU64>,
    metrics: Arc<Metrics>,
    /// As last told.
    room: Room,
    wishes: Sender<()>,
    /// The segment behind which a spare was asked for.
    wished_behind: u64,
}

impl Task {
    fn run(mut self) {
        loop {
            let work = self.queue.blocking_recv().unwrap_or(Work::Close);
            if !self.turn(work) {
                return;
            }
        }
    }

    /// Does this work, and what else waits and can go with it. False once the log is closed or has failed.
    fn turn(&mut self, work: Work) -> bool {
        let (taken_bytes, then) = self.take(work);
        if let Err(error) = self.write(taken_bytes).and_then(|()| self.compact(&then)) {
            tracing::error!(%error, "the log failed");
            (self.events)(Event::Failed(error));
            return false;
        }
        if self.room != self.wal.room() {
            self.room = self.wal.room();
            (self.events)(Event::Room(self.room));
        }
        !matches!(then, Then::Close)
    }

    /// Makes the batch durable.
    fn write(&mut self, taken_bytes: u64) -> Result<(), Error> {
        let Some(number) = self.batch.last().map(|append| append.number) else {
            return Ok(());
        };
        self.wal.append(&self.batch)?;
        let queued = self.queued_bytes.fetch_sub(taken_bytes, Ordering::Relaxed) - taken_bytes;
        self.metrics.wal_queued_bytes.set(queued.cast_signed());
        (self.events)(Event::Persisted { number });
        if self.wal.active.header.id == FIRST_ID || self.is_quarter_full() {
            self.wish();
        }
        Ok(())
    }

    fn is_quarter_full(&self) -> bool {
        let active = &self.wal.active;
        active.room_bytes() < (active.size_bytes - HEADER_BYTES) / 4 * 3
    }

    /// Asks for a spare, once behind each segment.
    fn wish(&mut self) {
        let id = self.wal.active.header.id;
        if self.wished_behind != id {
            self.wished_behind = id;
            self.wishes.send(()).expect("whoever prepares spares outlives the log");
        }
    }

    fn compact(&mut self, then: &Then) -> Result<(), Error> {
        match then {
            Then::Compact { index, term } => self.wal.compact(*index, *term),
            Then::Nothing | Then::Close => Ok(()),
        }
    }

    /// Takes work into the batch, and what else waits, up to what must come behind those appends. Returns their bytes,
    /// and that.
    fn take(&mut self, work: Work) -> (u64, Then) {
        self.batch.clear();
        let mut bytes = 0;
        let mut next = work;
        loop {
            match next {
                Work::Append(append) => {
                    bytes += append.size_bytes();
                    self.batch.push(append);
                }
                Work::Compact { index, term } => return (bytes, Then::Compact { index, term }),
                Work::Room => {}
                Work::Short => self.wish(),
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

/// Prepares spares, again after a failure.
#[derive(Default)]
struct Preparing {
    failing: bool,
}

impl Preparing {
    /// Nobody was told of anything in a spare, so that its failure does not stop the node: a disk that is broken shows
    /// at the next append.
    fn prepare(&mut self, spare: &Spare, stop: &AtomicBool) {
        let outcome = spare.prepare(stop);
        if let Err(error) = &outcome
            && !self.failing
        {
            tracing::warn!(%error, "no spare log segment; trying again every second");
        }
        self.failing = outcome.is_err();
    }
}

/// The thread that keeps a spare segment ready.
struct Preparer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Preparer {
    /// `wished` brings a wish for each spare that is needed, and ends with the log.
    fn spawn(spare: Arc<Spare>, work: UnboundedSender<Work>, wished: Receiver<()>) -> Result<Preparer, Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let (task_stop, name) = (stop.clone(), "wal-spare".to_owned());
        let run = move || Preparer::run(&spare, &work, &wished, &task_stop);
        let thread = thread::Builder::new().name(name).spawn(run).map_err(Error::Thread)?;
        Ok(Preparer { stop, thread })
    }

    fn run(spare: &Spare, work: &UnboundedSender<Work>, wished: &Receiver<()>, stop: &AtomicBool) {
        let mut preparing = Preparing::default();
        loop {
            match wished.recv_timeout(if preparing.failing { SPARE_RETRY } else { Duration::MAX }) {
                Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            preparing.prepare(spare, stop);
            if work.send(Work::Room).is_err() {
                return;
            }
        }
    }

    /// The log has ended: so does this, at once.
    fn close(self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Err(panic) = self.thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
}

/// The work of both threads, done when a simulator says so.
#[doc(hidden)]
pub struct Hand {
    task: Task,
    next: Option<Work>,
    wished: Receiver<()>,
    spare: Arc<Spare>,
    work: WeakUnboundedSender<Work>,
    preparing: Preparing,
}

impl Hand {
    /// Waits until there is something to write.
    pub async fn work(&mut self) {
        if self.next.is_none() {
            self.next = Some(self.task.queue.recv().await.unwrap_or(Work::Close));
        }
    }

    /// Does what waits. False once the log is closed or has failed.
    pub fn turn(&mut self) -> bool {
        self.next.take().is_none_or(|work| self.task.turn(work))
    }

    /// Prepares a spare segment if one was asked for; or, with `again`, if the last try failed.
    pub fn prepare_spare(&mut self, again: bool) {
        if self.wished.try_recv().is_err() && !(again && self.preparing.failing) {
            return;
        }
        self.preparing.prepare(&self.spare, &false.into());
        if let Some(work) = self.work.upgrade() {
            work.send(Work::Room).expect("this hand holds the other end");
        }
    }
}

#[cfg(test)]
mod tests {
    //! What was queued is durable when the writer says so; a failure is told once and nothing after it.

    use std::time::Instant;

    use raft::eraftpb::Entry;

    use super::super::Options;
    use super::super::disk::Disk;
    use super::super::disk_memory::MemoryDisk;
    use super::*;

    const SEGMENT_BYTES: u64 = HEADER_BYTES + 4096;

    fn spawn(disk: &MemoryDisk) -> (Writer, Receiver<Event>) {
        let options = Options { dir: "/data/wal".into(), segment_bytes: SEGMENT_BYTES };
        let (wal, _) = Wal::create(Arc::new(disk.clone()), &options, &[], 1, Arc::default()).unwrap();
        let (sender, events) = mpsc::channel();
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
        assert!(!status.full && status.room_bytes > SEGMENT_BYTES - HEADER_BYTES);
        writer.close();
    }

    /// A node that finds its last segment full, and no spare, takes no appends until there is one: it must not wait for
    /// an append to make it.
    #[test]
    fn a_log_that_starts_with_little_room_gets_a_spare_without_an_append() {
        let disk = MemoryDisk::new();
        let (writer, events) = spawn(&disk);
        // No room for a spare, in all that life.
        disk.set_capacity(Some(SEGMENT_BYTES));
        (2..9).for_each(|index| writer.append(append(index)));
        while !matches!(wait(&events), Event::Persisted { number: 8 }) {}
        writer.close();
        disk.set_capacity(None);
        let options = Options { dir: "/data/wal".into(), segment_bytes: SEGMENT_BYTES };
        let (wal, _) = Wal::open(Arc::new(disk.clone()), &options, 1, Arc::default()).unwrap();
        let writer = Writer::spawn(wal, |_| {}).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !writer.has_room_for(1000) {
            assert!(Instant::now() < deadline, "no room");
            thread::sleep(Duration::from_millis(1));
        }
        writer.close();
    }

    /// A segment that is not a quarter full may still be too full for what is to come.
    #[test]
    fn whoever_finds_no_room_gets_a_spare() {
        let disk = MemoryDisk::new();
        let (writer, events) = spawn(&disk);
        let deadline = Instant::now() + Duration::from_secs(20);
        writer.append(append(2));
        while writer.spare.room_bytes() == 0 {
            assert!(Instant::now() < deadline, "no spare behind the first segment");
            thread::yield_now();
        }
        // Into the second segment, which takes that spare.
        for index in 3..10 {
            writer.append(append(index));
            while !matches!(wait(&events), Event::Persisted { number } if number == index) {}
        }
        assert_eq!((writer.spare.room_bytes(), writer.status().segments), (0, 2));
        assert!(writer.counts.active_room_bytes.load(Ordering::Relaxed) > (SEGMENT_BYTES - HEADER_BYTES) / 4 * 3);
        while !writer.has_room_for(SEGMENT_BYTES - HEADER_BYTES - 100) {
            assert!(Instant::now() < deadline, "no room");
            thread::yield_now();
        }
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
