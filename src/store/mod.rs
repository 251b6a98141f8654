//! The store: applies what the commit channel brings, answers the ticket that came with each write, and shows its
//! state to readers through a [`View`]. Nobody else changes the state.

#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod key;
mod keys;
mod snapshot;
mod state;
mod value;

use std::io::Read;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub use snapshot::{BadImage, read_image, write_image};
pub use state::{Answer, Outcome, State};
use tokio::sync::oneshot;
use tokio::task::JoinError;
pub use value::{KeyValue, Revisions};

use crate::blocking;
use crate::channel::{self, Applied, Commit, CommitReceiver, Failure, ReadReply, Rejection, Reply, WriteImage};
use crate::command::Unreadable;
use crate::metrics::Metrics;

/// Writes applied under one lock, but for the last entry's.
const SLICE: usize = 512;

/// A read-only handle on the state. Cheap to clone.
#[derive(Debug, Clone)]
pub struct View {
    state: Arc<RwLock<State>>,
}

impl View {
    /// The state as of the last batch applied. Hold it for a look, not longer: the store waits to write.
    pub fn state(&self) -> RwLockReadGuard<'_, State> {
        // A poisoned lock means that apply panicked, which ends the process; whoever still reads sees whole commands.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A store that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    #[error("apply entry {index}: {source}")]
    Apply { index: u64, source: Unreadable },
    #[error("restore the state at entry {index}: {source}")]
    Restore { index: u64, source: BadImage },
    #[error("restore the state at entry {index}: its image holds the state at {found}")]
    WrongImage { index: u64, found: u64 },
    #[error("restore the state at entry {index}: the process is ending")]
    Ending { index: u64 },
}

/// The store's task: owns the right to write.
#[derive(Debug)]
pub struct Store {
    view: View,
    metrics: Arc<Metrics>,
}

impl Store {
    pub fn new(state: State, metrics: Arc<Metrics>) -> Self {
        let store = Store { view: View { state: Arc::new(RwLock::new(state)) }, metrics };
        store.measure(&store.view.state());
        store
    }

    pub fn view(&self) -> View {
        self.view.clone()
    }

    /// Applies commits until the node ends. An error is an entry that only a newer version understands, or an image
    /// that cannot be read.
    pub async fn run(self, mut commits: CommitReceiver<Answer>) -> Result<(), Stopped> {
        let mut batch = Vec::new();
        while commits.receive(&mut batch).await {
            let mut commits = batch.drain(..).peekable();
            while let Some(next) = commits.next() {
                if let Commit::Restore { index, image } = next {
                    self.restore(index, image).await?;
                } else {
                    let mut writes = count(&next);
                    let mut in_slice = |commit: &Commit<Answer>| {
                        let fits = !matches!(commit, Commit::Restore { .. }) && writes < SLICE;
                        writes += count(commit);
                        fits
                    };
                    let behind = std::iter::from_fn(|| commits.next_if(&mut in_slice));
                    self.apply(std::iter::once(next).chain(behind))?;
                }
                // A long backlog comes in one batch: readers, and the other tasks of this thread, come in between.
                if commits.peek().is_some() {
                    tokio::task::yield_now().await;
                }
            }
        }
        Ok(())
    }

    /// Reads the image on a thread that may wait for a disk, and swaps the state once it is whole. Readers see the old
    /// state until then.
    async fn restore(&self, index: u64, image: Box<dyn Read + Send>) -> Result<(), Stopped> {
        let view = self.view();
        let restored = blocking::run(move || {
            let state = read_image(image).map_err(|source| Stopped::Restore { index, source })?;
            if state.applied() != index {
                return Err(Stopped::WrongImage { index, found: state.applied() });
            }
            let applied = view.state().applied();
            assert!(applied <= index, "a restoration of entry {index} where {applied} is applied");
            // The lock is gone before the old state is: to free a million keys takes a while.
            let old = std::mem::replace(&mut *view.state_mut(), state);
            drop(old);
            Ok(())
        });
        match restored.await.map_err(JoinError::try_into_panic) {
            Ok(outcome) => outcome?,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            Err(Err(_cancelled)) => return Err(Stopped::Ending { index }),
        }
        self.measure(&self.view.state());
        Ok(())
    }

    /// Applies some commits, of which none is a restoration. One write lock for the slice; tickets are answered after it, when
    /// readers see what they promise.
    pub fn apply(&self, slice: impl IntoIterator<Item = Commit<Answer>>) -> Result<(), Stopped> {
        let mut answers = Vec::new();
        let mut state = self.view.state_mut();
        for commit in slice {
            match commit {
                Commit::Skip { index, term } => state.skip(index, term),
                Commit::Barrier { replies } => answers.push(Due::Reads(replies)),
                Commit::Apply { index, term, writes, replies } => {
                    let mut replies = replies.into_iter();
                    let tell = |outcome| {
                        if let Some(reply) = replies.next().flatten() {
                            answers.push(Due::Write(reply, result(index, term, outcome)));
                        }
                    };
                    state.apply(index, term, &writes, tell).map_err(|source| Stopped::Apply { index, source })?;
                }
                Commit::Snapshot { reply } => {
                    let state = state.clone();
                    answers.push(Due::Snapshot(reply, Box::new(move |out| write_image(&state, out))));
                }
                Commit::Restore { index, .. } => unreachable!("the restoration at {index} is no part of a slice"),
            }
        }
        self.measure(&state);
        drop(state);
        answers.into_iter().for_each(Due::give);
        Ok(())
    }

    fn measure(&self, state: &State) {
        self.metrics.raft_applied_index.set(state.applied() as i64);
        self.metrics.store_keys.set(state.len() as i64);
        self.metrics.store_revision.set(state.revision() as i64);
    }
}

/// How many writes a commit brings; one at least, for whatever it is takes its time.
fn count(commit: &Commit<Answer>) -> usize {
    match commit {
        Commit::Apply { writes, .. } => writes.count(),
        Commit::Skip { .. } | Commit::Barrier { .. } | Commit::Snapshot { .. } | Commit::Restore { .. } => 1,
    }
}

/// An answer that is given once the lock is released.
enum Due {
    Write(Reply<Answer>, Result<Applied<Answer>, Failure>),
    Reads(Vec<ReadReply>),
    Snapshot(oneshot::Sender<WriteImage>, WriteImage),
}

impl Due {
    fn give(self) {
        match self {
            Due::Write(reply, result) => channel::answer(reply, result),
            Due::Reads(replies) => replies.into_iter().for_each(|reply| channel::answer(reply, Ok(()))),
            Due::Snapshot(reply, write) => channel::answer(reply, write),
        }
    }
}

fn result(index: u64, term: u64, outcome: Outcome) -> Result<Applied<Answer>, Failure> {
    match outcome {
        Outcome::Applied(answer) => Ok(Applied { index, term, answer }),
        // The ticket meets the first copy of its write, so this one was not applied before, and is not now: so many
        // others overtook it that it fell out of the window.
        Outcome::TooOld => Err(Failure::Rejected(Rejection::Busy)),
        Outcome::Repeat => Err(Failure::Unknown),
        Outcome::Malformed => Err(Failure::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::sync::oneshot;

    use super::*;
    use crate::channel::{RequestId, Writes, commits};
    use crate::command::Command;

    fn put(index: u64, key: &[u8], value: &[u8]) -> Commit<Answer> {
        let request = RequestId { node: 1, boot: 1, counter: index };
        let writes = Writes::one(request, Command::Put { key, value }.encode());
        Commit::Apply { index, term: 1, writes, replies: vec![None] }
    }

    /// A write is answered when a reader sees it, and a barrier behind it no earlier.
    #[tokio::test]
    async fn answers_come_after_the_state_shows_them() {
        let store = Store::new(State::founded(1), Arc::new(Metrics::new()));
        let view = store.view();
        let (sender, receiver) = commits();
        let task = tokio::spawn(store.run(receiver));
        let (reply, written) = oneshot::channel();
        let (read_reply, read) = oneshot::channel();
        let request = RequestId { node: 1, boot: 1, counter: 1 };
        let command: Bytes = Command::Put { key: b"k", value: b"v" }.encode();
        sender
            .publish(vec![
                Commit::Apply { index: 2, term: 1, writes: Writes::one(request, command), replies: vec![Some(reply)] },
                Commit::Barrier { replies: vec![read_reply] },
            ])
            .unwrap();
        assert_eq!(read.await.unwrap(), Ok(()));
        assert_eq!(view.state().get(b"k").unwrap().value(), b"v");
        assert_eq!(written.await.unwrap(), Ok(Applied { index: 2, term: 1, answer: Answer::Put { revision: 2 } }));
        drop(sender);
        task.await.unwrap().unwrap();
    }

    /// Those that share an entry are told each its own revision, whoever of them waits.
    #[tokio::test]
    async fn every_write_of_an_entry_gets_its_own_answer() {
        let store = Store::new(State::founded(1), Arc::new(Metrics::new()));
        let (mut replies, mut answers) = (Vec::new(), Vec::new());
        let mut writes = Vec::new();
        for counter in 1..=5 {
            let request = RequestId { node: 1, boot: 1, counter };
            writes.push((request, Command::Put { key: b"k", value: b"v" }.encode()));
            let (reply, answer) = oneshot::channel();
            replies.push((counter != 3).then_some(reply));
            answers.push(answer);
        }
        let writes = Writes::pack(&writes).remove(0);
        store.apply([Commit::Apply { index: 2, term: 1, writes, replies }]).unwrap();
        for (nth, answer) in (0..).zip(answers) {
            let revision = 2 + nth;
            let expected = Applied { index: 2, term: 1, answer: Answer::Put { revision } };
            assert_eq!(answer.await.ok(), (nth != 2).then_some(Ok(expected)));
        }
    }

    /// The image is that of its place in the log, whatever was written before it is; another store goes on from it.
    #[tokio::test]
    async fn a_snapshot_is_of_its_place_in_the_log_and_restores_another_store() {
        let (reply, snapshot) = oneshot::channel();
        let original = Store::new(State::founded(1), Arc::new(Metrics::new()));
        let view = original.view();
        let (sender, receiver) = commits();
        sender.publish(vec![put(2, b"a", b"1"), Commit::Snapshot { reply }, put(3, b"a", b"2")]).unwrap();
        drop(sender);
        original.run(receiver).await.unwrap();
        let mut image = Vec::new();
        snapshot.await.unwrap()(&mut image).unwrap();
        assert_eq!(read_image(&image[..]).unwrap().get(b"a").unwrap().value(), b"1");

        let metrics = Arc::new(Metrics::new());
        let copy = Store::new(State::founded(1), metrics.clone());
        let (copy_view, (sender, receiver)) = (copy.view(), commits());
        let (read_reply, read) = oneshot::channel();
        let restore = Commit::Restore { index: 2, image: Box::new(std::io::Cursor::new(image)) };
        sender.publish(vec![Commit::Skip { index: 2, term: 9 }, restore, put(3, b"a", b"2")]).unwrap();
        sender.publish(vec![Commit::Barrier { replies: vec![read_reply] }]).unwrap();
        drop(sender);
        copy.run(receiver).await.unwrap();
        assert_eq!(read.await.unwrap(), Ok(()));
        assert_eq!(*copy_view.state(), *view.state());
        assert_eq!((metrics.raft_applied_index.get(), metrics.store_keys.get()), (3, 1));
    }

    /// The whole way: out of one store, through a file of the log's making, into another. A file that ends too early is
    /// noticed while it is read, and changes nothing.
    #[tokio::test]
    async fn a_state_travels_through_a_snapshot_file() {
        use crate::wal::disk_memory::MemoryDisk;
        use crate::wal::snapshot::{Meta, Snapshots};

        let (reply, snapshot) = oneshot::channel();
        let original = Store::new(State::founded(1), Arc::new(Metrics::new()));
        let (view, (sender, receiver)) = (original.view(), commits());
        sender.publish(vec![put(2, &[0, 255], &vec![7; 700_000]), Commit::Snapshot { reply }]).unwrap();
        drop(sender);
        original.run(receiver).await.unwrap();
        let disk = MemoryDisk::new();
        let snapshots = Snapshots::open(Arc::new(disk.clone()), "/data".as_ref()).unwrap();
        let meta = Meta { index: 2, term: 1, voters: vec![1], ..Meta::default() };
        snapshots.write(&meta, snapshot.await.unwrap()).unwrap();

        for whole in [true, false] {
            let copy = Store::new(State::founded(1), Arc::new(Metrics::new()));
            let (copy_view, (sender, receiver)) = (copy.view(), commits());
            let (_, image) = snapshots.read(2, 1).unwrap();
            sender.publish(vec![Commit::Restore { index: 2, image: Box::new(image) }]).unwrap();
            drop(sender);
            let outcome = copy.run(receiver).await.map_err(|error| error.to_string());
            if whole {
                assert_eq!((outcome, &*copy_view.state()), (Ok(()), &*view.state()));
                let path = std::path::Path::new("/data/snap/0000000000000001-0000000000000002.snap");
                let mut bytes = disk.content(path).unwrap();
                // The end block.
                bytes.truncate(bytes.len() - 20);
                disk.set_content(path, bytes);
            } else {
                assert!(outcome.unwrap_err().contains("is damaged at byte"));
                assert_eq!(copy_view.state().applied(), 1);
            }
        }
    }

    #[tokio::test]
    async fn an_image_that_is_damaged_or_of_another_index_stops_the_store() {
        let mut image = Vec::new();
        write_image(&State::founded(5), &mut image).unwrap();
        for (index, cut, why) in
            [(5, 1, "restore the state at entry 5: the image of the state is damaged"), (6, 0, "at 5")]
        {
            let store = Store::new(State::founded(1), Arc::new(Metrics::new()));
            let (view, (sender, receiver)) = (store.view(), commits());
            let image = Box::new(std::io::Cursor::new(image[..image.len() - cut].to_vec()));
            sender.publish(vec![Commit::Restore { index, image }]).unwrap();
            let error = store.run(receiver).await.unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
            assert_eq!(view.state().applied(), 1, "nothing was swapped");
        }
    }
}
