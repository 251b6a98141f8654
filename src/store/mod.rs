//! The store: applies what the commit channel brings, answers the ticket that came with each write, and shows its
//! state to readers through a [`View`]. Nobody else changes the state.

mod state;

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

pub use state::{Answer, KeyValue, Outcome, State};

use crate::channel::{self, Applied, Commit, CommitReceiver, Failure, ReadReply, Rejection, Reply};
use crate::command::Unreadable;
use crate::metrics::Metrics;

/// Commits applied under one lock.
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
}

/// A store that cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("apply entry {index}: {source}")]
pub struct Stopped {
    index: u64,
    source: Unreadable,
}

/// The store's task: owns the right to write.
#[derive(Debug)]
pub struct Store {
    view: View,
    metrics: Arc<Metrics>,
}

impl Store {
    pub fn new(state: State, metrics: Arc<Metrics>) -> Self {
        Store { view: View { state: Arc::new(RwLock::new(state)) }, metrics }
    }

    pub fn view(&self) -> View {
        self.view.clone()
    }

    /// Applies commits until the node ends. An error is an entry that only a newer version understands.
    pub async fn run(self, mut commits: CommitReceiver<Answer>) -> Result<(), Stopped> {
        let mut batch = Vec::new();
        while commits.receive(&mut batch).await {
            while !batch.is_empty() {
                let slice = batch.len().min(SLICE);
                self.apply(batch.drain(..slice))?;
                // A long log is read back in one batch: readers, and the other tasks of this thread, come in between.
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// One write lock for the slice; tickets are answered after it, when readers see what they promise.
    fn apply(&self, slice: impl Iterator<Item = Commit<Answer>>) -> Result<(), Stopped> {
        let mut answers = Vec::new();
        let mut state = self.view.state.write().unwrap_or_else(PoisonError::into_inner);
        for commit in slice {
            match commit {
                Commit::Skip { index, term } => state.skip(index, term),
                Commit::Barrier { replies } => answers.push(Due::Reads(replies)),
                Commit::Apply { index, term, request, command, reply } => {
                    let outcome =
                        state.apply(index, term, request, &command).map_err(|source| Stopped { index, source })?;
                    if let Some(reply) = reply {
                        answers.push(Due::Write(reply, result(index, term, outcome)));
                    }
                }
            }
        }
        self.metrics.raft_applied_index.set(state.applied() as i64);
        self.metrics.store_keys.set(state.len() as i64);
        self.metrics.store_revision.set(state.revision() as i64);
        drop(state);
        answers.into_iter().for_each(Due::give);
        Ok(())
    }
}

/// An answer that is given once the lock is released.
enum Due {
    Write(Reply<Answer>, Result<Applied<Answer>, Failure>),
    Reads(Vec<ReadReply>),
}

impl Due {
    fn give(self) {
        match self {
            Due::Write(reply, result) => channel::answer(reply, result),
            Due::Reads(replies) => replies.into_iter().for_each(|reply| channel::answer(reply, Ok(()))),
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
    use crate::channel::{RequestId, commits};
    use crate::command::Command;

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
                Commit::Apply { index: 2, term: 1, request, command, reply: Some(reply) },
                Commit::Barrier { replies: vec![read_reply] },
            ])
            .unwrap();
        assert_eq!(read.await.unwrap(), Ok(()));
        assert_eq!(view.state().get(b"k").unwrap().value, "v");
        assert_eq!(written.await.unwrap(), Ok(Applied { index: 2, term: 1, answer: Answer::Put { revision: 2 } }));
        drop(sender);
        task.await.unwrap().unwrap();
    }
}
