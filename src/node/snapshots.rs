//! Snapshots: when one is due, how it comes about, what is forgotten behind it, and how one from the leader is
//! installed. The service writes its state on a thread of its own; the node only says where in the log, adds the
//! membership of that place, and hears when the file is durable.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use raft::eraftpb::{ConfState, Message, SnapshotMetadata};
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinSet};
use tracing::{info, warn};

use super::admit::admit;
use super::{Node, Stopped};
use crate::blocking;
use crate::channel::{Commit, WriteImage};
use crate::wal;
use crate::wal::snapshot::{Meta, Snapshots};

/// A snapshot larger than this is not followed by another until the log has grown by its size, and by [`GROWN_BYTES_MIN`] at
/// least, however many entries that takes: a large state that changes little by little is not written again and again.
const SMALL_BYTES: u64 = 1 << 20;

/// A start reads so much log, of small writes, in half a second. The policy's `log_bytes`, if they are less.
const GROWN_BYTES_MIN: u64 = 32 << 20;

/// In the order of IDs each member waits for this part of that more than the one before it: while one writes a large snapshot, the
/// others are a majority that is not slowed down.
const TURN_PART: u64 = 8;

/// Bytes kept for members that are far behind, on the disk and in memory.
const SLOW_BYTES_MAX: u64 = 256 << 20;

/// Election time-outs for which a member may be silent and the log is kept for it: it may come back, or be busy with a snapshot.
const SLOW_TIMEOUTS: u64 = 10;

/// Ticks between a failed transfer and the next, more with each failure, up to so many.
const FAILURE_TICKS: u64 = 5;
const FAILURE_TICKS_MAX: u64 = 50;

/// Transfers of one snapshot to one member that may fail before it is taken for damaged, and a new one is made.
const FAILURES_MAX: u64 = 3;

/// Ticks before another try, after a snapshot could not be written.
const RETRY_TICKS: u64 = 100;

/// When a snapshot is taken, and what is kept behind it. Where it counts entries, one of several writes counts as so many.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Entries since the last snapshot that make one due.
    pub count: u64,
    /// Time since the last snapshot that makes one due, if there are `min_entries` new ones. Zero: never.
    pub interval: Duration,
    pub min_entries: u64,
    /// Bytes of log since the last one that make one due.
    pub log_bytes: u64,
    /// Entries kept behind a snapshot for slow followers, as long as they are no more than `catchup_bytes`.
    pub catchup_entries: u64,
    pub catchup_bytes: u64,
    /// What the log may take in memory where no slow follower needs more of it.
    pub memory_bytes: u64,
    /// Snapshot files kept.
    pub keep: usize,
}

impl Policy {
    /// Whether the oldest of the entries in memory, which take so many bytes there, is more than is to be kept; `behind` it
    /// there are so many.
    pub(super) fn may_forget(&self, behind: u64, bytes: u64) -> bool {
        bytes > self.memory_bytes && (behind >= self.catchup_entries || bytes > self.catchup_bytes)
    }
}

/// A snapshot's image, verified, as it is read from its file.
pub type Image = Box<dyn io::Read + Send>;

enum Done {
    /// The snapshot, and the size of its file.
    Taken(Result<(Meta, u64), wal::Error>),
    Purged(Result<(), wal::Error>),
    Opened(Box<Message>, Result<Received, wal::Error>),
}

/// A snapshot from the leader, in a file of its own.
struct Received {
    meta: Box<Meta>,
    size_bytes: u64,
    image: Image,
}

/// The node's snapshots.
pub struct Snapshotting {
    pub files: Arc<Snapshots>,
    policy: Policy,
    /// Index of the last one, and the tick at which it was done.
    last: (u64, u64),
    /// Writes that were published since the start, and that a start found behind its snapshot, and how many of them the last
    /// one holds; an entry of another kind counts for one.
    pub(super) published_writes: u64,
    last_writes: u64,
    /// Bytes of log behind the last one that a start found.
    found_bytes: u64,
    /// Bytes appended to the log when the last one was done, and the size of its file.
    last_bytes: u64,
    last_size_bytes: u64,
    /// Index of the last entry that the log on the disk no longer holds.
    log_base: u64,
    /// The one that is being taken holds so many of the writes that were published.
    taking: Option<u64>,
    not_before: u64,
    /// From the leader, stepped and not yet durable in the log.
    received: Option<Received>,
    /// Members to which transfers failed: how many in a row, and the tick at which raft is told of the last.
    failed: BTreeMap<u64, (u64, u64)>,
    work: JoinSet<Done>,
}

/// Where a node starts.
pub struct Origin {
    /// The index of the snapshot that the service starts from.
    pub last: u64,
    /// Of that snapshot's file; 0 where it has none.
    pub last_size_bytes: u64,
    /// Bytes that the entries behind it take in the log, and how many writes of them are applied.
    pub grown_bytes: u64,
    pub applied_writes: u64,
    /// The index of the last entry before the log.
    pub log_base: u64,
}

impl Snapshotting {
    pub fn new(files: Arc<Snapshots>, policy: Policy, origin: Origin) -> Self {
        let Origin { last, last_size_bytes, grown_bytes, applied_writes, log_base } = origin;
        Snapshotting {
            files,
            policy,
            last: (last, 0),
            published_writes: applied_writes,
            last_writes: 0,
            found_bytes: grown_bytes,
            last_bytes: 0,
            last_size_bytes,
            log_base,
            taking: None,
            not_before: 0,
            received: None,
            failed: BTreeMap::new(),
            work: JoinSet::new(),
        }
    }

    /// The next piece of work that is done, if any is under way.
    pub async fn done(&mut self) -> Option<Result<SnapshotDone, JoinError>> {
        self.work.join_next().await.map(|done| done.map(SnapshotDone))
    }

    /// The first entry that the log on the disk holds.
    pub fn log_from(&self) -> u64 {
        self.log_base + 1
    }

    /// Index of the newest one, 0 before the first.
    pub fn newest(&self) -> u64 {
        if self.last.0 > super::FOUNDING.0 { self.last.0 } else { 0 }
    }
}

/// Work on a snapshot that is done, for [`Node::on_snapshot_done`].
pub struct SnapshotDone(Done);

impl<A: Send + 'static> Node<A> {
    /// Asks the service for its state at this place in the log, if a snapshot is due.
    pub(super) fn snapshot_if_due(&mut self, commits: &mut Vec<Commit<A>>) {
        let shots = &self.snapshotting;
        // While a received one is made durable, raft is ahead of what is published.
        if self.core.is_restoring() || shots.taking.is_some() || shots.not_before > self.now {
            return;
        }
        let wanted = self.core.take_snapshot_wanted();
        // Where nothing was written since the last, one that is wanted takes its place: that one arrived nowhere.
        if self.published < shots.last.0 + u64::from(!wanted) {
            return;
        }
        let policy = &shots.policy;
        let new = shots.published_writes - shots.last_writes;
        let waited = self.settings.tick * u32::try_from(self.now - shots.last.1).unwrap_or(u32::MAX);
        let by_time = !policy.interval.is_zero() && waited >= policy.interval && new >= policy.min_entries.max(1);
        let grown = shots.found_bytes + self.core.appended_bytes() - shots.last_bytes;
        let due = new >= policy.count || by_time || grown >= policy.log_bytes;
        if !(wanted || due && self.is_worth_a_snapshot(grown)) {
            return;
        }
        let term = self.core.term_at(self.published).expect("the last entry applied is held");
        let meta = self.members.meta(self.published, term, self.core.conf_state());
        let (reply, image) = oneshot::channel();
        commits.push(Commit::Snapshot { reply });
        self.snapshotting.taking = Some(self.snapshotting.published_writes);
        let (files, keep) = (self.snapshotting.files.clone(), self.snapshotting.policy.keep);
        self.snapshotting.work.spawn(async move {
            // The service ends without an answer only when the process does.
            let Ok(image) = image.await else { return std::future::pending().await };
            let taken = blocking::run(move || take(&files, meta, image, keep)).await;
            Done::Taken(taken.expect("writing a snapshot does not panic"))
        });
    }

    /// Whether the log has grown by so much that to write a state of the last one's size is no waste.
    fn is_worth_a_snapshot(&self, grown: u64) -> bool {
        let Snapshotting { last_size_bytes, policy, .. } = &self.snapshotting;
        if *last_size_bytes <= SMALL_BYTES {
            return true;
        }
        let least = GROWN_BYTES_MIN.min(policy.log_bytes).max(*last_size_bytes);
        let before = self.members.iter().filter(|member| member.id < self.settings.id).count() as u64;
        grown >= least + least / TURN_PART * before.min(TURN_PART)
    }

    pub(super) fn on_snapshot_done(&mut self, done: Result<SnapshotDone, JoinError>) -> Result<(), Stopped> {
        match done.expect("work on a snapshot does not panic").0 {
            Done::Taken(Ok((meta, bytes))) => {
                info!(index = meta.index, bytes, "snapshot taken");
                let writes = self.snapshotting.taking.take().expect("it was being taken");
                self.forget_behind(&meta, bytes, writes);
            }
            Done::Taken(Err(error)) => {
                warn!(%error, "no snapshot: the log grows until one can be written");
                self.snapshotting.taking = None;
                self.snapshotting.not_before = self.now + RETRY_TICKS;
            }
            Done::Purged(Ok(())) => {}
            Done::Purged(Err(error)) => warn!(%error, "old snapshots stay until the next is taken"),
            Done::Opened(message, Ok(received)) => return self.step_snapshot(*message, received),
            Done::Opened(message, Err(error)) => warn!(from = message.from, %error, "a received snapshot is lost"),
        }
        Ok(())
    }

    /// How a transfer ended. Raft sends again as soon as it hears of a failure, so it hears of each later.
    pub(super) fn on_snapshot_sent(&mut self, peer: u64, delivered: bool) {
        if delivered {
            self.snapshotting.failed.remove(&peer);
            self.core.report_snapshot(peer, true);
            return;
        }
        let (failures, report_at) = self.snapshotting.failed.entry(peer).or_default();
        *failures += 1;
        *report_at = self.now + (*failures * FAILURE_TICKS).min(FAILURE_TICKS_MAX);
        if *failures % FAILURES_MAX == 0 {
            self.core.forget_snapshot();
        }
    }

    pub(super) fn tick_snapshots(&mut self) {
        let now = self.now;
        let due: Vec<u64> =
            self.snapshotting.failed.iter().filter(|(_, (_, at))| *at == now).map(|(peer, _)| *peer).collect();
        for peer in due {
            self.core.report_snapshot(peer, false);
        }
    }

    /// A snapshot from the leader, verified and durable as a file. It counts once the log says so.
    pub(super) fn on_snapshot(&mut self, message: Message) {
        let metadata = message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let files = self.snapshotting.files.clone();
        self.snapshotting.work.spawn(async move {
            let opened = blocking::run(move || files.read(index, term)).await;
            let opened = opened.expect("opening a snapshot does not panic");
            let received = opened.map(|(meta, image)| {
                let size_bytes = image.size_bytes();
                Received { meta: Box::new(meta), size_bytes, image: Box::new(image) }
            });
            Done::Opened(Box::new(message), received)
        });
    }

    fn step_snapshot(&mut self, message: Message, received: Received) -> Result<(), Stopped> {
        // One that came before is being installed still: this one is as good as lost, and the leader sends another.
        if self.snapshotting.received.is_some() {
            return Ok(());
        }
        let (told, meta) = (message.get_snapshot().get_metadata(), &received.meta);
        if (told.index, told.term, told.get_conf_state()) != (meta.index, meta.term, &conf_state(meta)) {
            self.count_refused("snapshot meta");
            return Ok(());
        }
        match admit(&message, &self.core) {
            Ok(()) => {
                self.snapshotting.received = Some(received);
                self.core.step(message);
                Ok(())
            }
            Err(refusal) => self.on_refused(&message, refusal),
        }
    }

    /// Whether raft took the snapshot that was stepped; where it had no use for it, it is let go.
    pub(super) fn settle_received(&mut self) {
        if !self.core.is_restoring() {
            self.snapshotting.received = None;
        }
    }

    /// The log goes on behind a received snapshot: so does the service.
    pub(super) fn restore(&mut self, metadata: &SnapshotMetadata, commits: &mut Vec<Commit<A>>) {
        let received = self.snapshotting.received.take().expect("raft restores what was stepped");
        let Received { meta, size_bytes, image } = received;
        assert_eq!((meta.index, meta.term), (metadata.index, metadata.term), "the snapshot that raft restored");
        info!(index = meta.index, "snapshot installed");
        self.members.restore(&meta);
        self.tell_transport();
        self.published = meta.index;
        self.note_snapshot(&meta, size_bytes, self.snapshotting.published_writes);
        self.snapshotting.log_base = meta.index;
        let (files, keep, index) = (self.snapshotting.files.clone(), self.snapshotting.policy.keep, meta.index);
        self.snapshotting.work.spawn(async move {
            let purged = blocking::run(move || files.purge(keep, index)).await;
            Done::Purged(purged.expect("removing files does not panic"))
        });
        commits.push(Commit::Restore { index: meta.index, image });
    }

    /// Who is on the way to catch up must find the entries behind its snapshot, or it would need one after the other: up to
    /// where the log of the last such member goes.
    fn slowest_follower(&self) -> Option<u64> {
        let ticks = SLOW_TIMEOUTS * self.settings.election_ticks as u64;
        let followers = self
            .members
            .iter()
            .filter(|member| self.was_up_within(ticks, member.id) || self.core.is_sent_a_snapshot(member.id));
        followers.filter_map(|member| self.core.reached(member.id)).min()
    }

    /// Between two snapshots of a large state the log grows long. The disk needs all of it for a restart; memory what followers
    /// may soon ask for. Whoever asks for more gets a snapshot.
    pub(super) fn shrink_log(&mut self) {
        if self.core.log_memory_bytes() <= self.snapshotting.policy.memory_bytes || self.core.is_restoring() {
            return;
        }
        let covered = self.published.min(self.slowest_follower().unwrap_or(self.published));
        let policy = &self.snapshotting.policy;
        self.core.shrink(covered, |behind, bytes| policy.may_forget(behind, bytes));
        // However slow a follower is. What is behind the newest snapshot stays, or that would help nobody.
        let most = policy.memory_bytes.max(policy.catchup_bytes).max(SLOW_BYTES_MAX);
        self.core.shrink(self.snapshotting.last.0, |_, bytes| bytes > most);
    }

    /// What the snapshot covers, which is so many of the writes published, may go, but for what slow followers may still need.
    fn forget_behind(&mut self, meta: &Meta, size_bytes: u64, writes: u64) {
        // A snapshot that came meanwhile is newer.
        if self.core.is_restoring() || meta.index < self.snapshotting.last.0 {
            return;
        }
        let policy = &self.snapshotting.policy;
        let mut keep_from = self.core.reach_back(meta.index, 0, policy.catchup_entries, policy.catchup_bytes);
        if let Some(slowest) = self.slowest_follower().filter(|slowest| *slowest < keep_from) {
            keep_from = keep_from.min(self.core.reach_back(meta.index, slowest, u64::MAX, SLOW_BYTES_MAX));
        }
        // Memory may hold less than the disk by now.
        let term = if keep_from == meta.index { Some(meta.term) } else { self.core.term_at(keep_from) };
        if let Some(term) = term.filter(|_| keep_from > self.snapshotting.log_base) {
            self.ends.wal.compact(keep_from, term);
            self.snapshotting.log_base = keep_from;
        }
        self.core.compact(metadata(meta), keep_from);
        self.note_snapshot(meta, size_bytes, writes);
    }

    /// The next one is due by what comes behind this one.
    fn note_snapshot(&mut self, meta: &Meta, size_bytes: u64, writes: u64) {
        let shots = &mut self.snapshotting;
        shots.last_writes = writes;
        (shots.last, shots.last_size_bytes) = ((meta.index, self.now), size_bytes);
        (shots.found_bytes, shots.last_bytes) = (0, self.core.appended_bytes());
    }
}

fn take(files: &Snapshots, meta: Meta, image: WriteImage, keep: usize) -> Result<(Meta, u64), wal::Error> {
    let bytes = files.write(&meta, image)?;
    files.purge(keep, meta.index)?;
    Ok((meta, bytes))
}

/// A snapshot in raft's own record.
pub fn metadata(meta: &Meta) -> SnapshotMetadata {
    let mut metadata = SnapshotMetadata { index: meta.index, term: meta.term, ..SnapshotMetadata::default() };
    metadata.set_conf_state(conf_state(meta));
    metadata
}

/// Who votes and who learns, in raft's own record.
pub fn conf_state(meta: &Meta) -> ConfState {
    ConfState {
        voters: meta.voters.clone(),
        learners: meta.learners.clone(),
        voters_outgoing: meta.voters_outgoing.clone(),
        learners_next: meta.learners_next.clone(),
        auto_leave: meta.auto_leave,
        ..ConfState::default()
    }
}
