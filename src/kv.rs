//! The key-value service: one meaning for each operation, whatever the protocol that asks for it. Checks limits, sends
//! proposals to the node, reads the store's view. Called by every front end.

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

use crate::channel::{Change, ChangeFailure, Failure, Leadership, NodeStatus, Proposal, Rejection};
use crate::command::{Command, KEY_BYTES_MAX};
use crate::store::{Answer, KeyValue, View};

/// How fresh a read must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// It sees every write that was acknowledged, by any member, before it began.
    Linearizable,
    /// The local state, at once.
    Stale,
}

/// A value with the index of the state that it was read from.
#[derive(Debug, Clone)]
pub struct Read {
    pub entry: Option<KeyValue>,
    pub index: u64,
}

/// A write that is committed, durable on a majority and applied here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    pub index: u64,
    pub term: u64,
    pub revision: u64,
}

/// Why an operation has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the key is empty")]
    EmptyKey,
    #[error("the key is longer than {max} bytes")]
    KeyTooLong { max: usize },
    #[error("the value is larger than {max} bytes")]
    ValueTooLarge { max: usize },
    /// Surely not applied, now or later.
    #[error("not applied: {0}")]
    NotApplied(Rejection),
    #[error("outcome unknown: the write was proposed but not seen committed in time, and may still be applied")]
    Unknown,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Rejected(rejection) => Error::NotApplied(rejection),
            Failure::Unknown => Error::Unknown,
        }
    }
}

/// `/status`: the node's own account, and the store's.
#[derive(Debug, Serialize)]
pub struct Status {
    #[serde(flatten)]
    pub node: NodeStatus,
    pub applied: u64,
    /// A hash of the content, 16 hexadecimal digits; equal on members at the same applied index.
    pub state_hash: String,
    /// A hash of all entries applied, 16 hexadecimal digits.
    pub log_hash: String,
    pub revision: u64,
    pub keys: usize,
}

/// The service. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Service {
    proposals: mpsc::Sender<Proposal<Answer>>,
    leadership: watch::Receiver<Leadership>,
    view: View,
    value_bytes_max: usize,
}

impl Service {
    pub fn new(
        proposals: mpsc::Sender<Proposal<Answer>>,
        leadership: watch::Receiver<Leadership>,
        view: View,
        value_bytes_max: usize,
    ) -> Self {
        Service { proposals, leadership, view, value_bytes_max }
    }

    /// The largest value taken, in bytes.
    pub fn value_bytes_max(&self) -> usize {
        self.value_bytes_max
    }

    /// Sets `key` to `value`.
    pub async fn put(&self, key: &[u8], value: &[u8]) -> Result<Written, Error> {
        check_key(key)?;
        if value.len() > self.value_bytes_max {
            return Err(Error::ValueTooLarge { max: self.value_bytes_max });
        }
        let applied = self.write(Command::Put { key, value }.encode()).await?;
        let Answer::Put { revision } = applied.answer;
        Ok(Written { index: applied.index, term: applied.term, revision })
    }

    /// The value of `key`.
    pub async fn get(&self, key: &[u8], consistency: Consistency) -> Result<Read, Error> {
        check_key(key)?;
        if consistency == Consistency::Linearizable {
            self.caught_up().await?;
        }
        let state = self.view.state();
        Ok(Read { entry: state.get(key), index: state.applied() })
    }

    /// Waits until all that was committed when this was called is applied here. It also tells that there is a leader.
    pub async fn caught_up(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.propose(Proposal::Read { reply })?;
        match answer.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(rejection)) => Err(Error::NotApplied(rejection)),
            // The node ended with the question in its hands.
            Err(_) => Err(Error::NotApplied(Rejection::Stopping)),
        }
    }

    /// Changes who the members are.
    pub async fn reconfigure(&self, change: Change) -> Result<(), ChangeFailure> {
        let (reply, answer) = oneshot::channel();
        self.send(Proposal::Reconfigure { change, reply }).map_err(ChangeFailure::Rejected)?;
        // The node ended with the change in its hands.
        answer.await.unwrap_or(Err(ChangeFailure::Unknown))
    }

    /// Term and leader, as far as this member knows.
    pub fn leadership(&self) -> Leadership {
        *self.leadership.borrow()
    }

    /// Index of the last entry applied here.
    pub fn applied(&self) -> u64 {
        self.view.state().applied()
    }

    pub async fn status(&self) -> Result<Status, Error> {
        let (reply, answer) = oneshot::channel();
        self.propose(Proposal::Status { reply })?;
        let node = answer.await.map_err(|_| Error::NotApplied(Rejection::Stopping))?;
        let state = self.view.state();
        Ok(Status {
            node,
            applied: state.applied(),
            state_hash: format!("{:016x}", state.content_hash()),
            log_hash: format!("{:016x}", state.log_hash()),
            revision: state.revision(),
            keys: state.len(),
        })
    }

    async fn write(&self, command: Bytes) -> Result<crate::channel::Applied<Answer>, Error> {
        let (reply, answer) = oneshot::channel();
        self.propose(Proposal::Write { command, reply })?;
        match answer.await {
            Ok(result) => result.map_err(Error::from),
            // The node or the store ended with the write in its hands.
            Err(_) => Err(Error::Unknown),
        }
    }

    fn propose(&self, proposal: Proposal<Answer>) -> Result<(), Error> {
        self.send(proposal).map_err(Error::NotApplied)
    }

    fn send(&self, proposal: Proposal<Answer>) -> Result<(), Rejection> {
        self.proposals.try_send(proposal).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Rejection::Busy,
            mpsc::error::TrySendError::Closed(_) => Rejection::Stopping,
        })
    }
}

fn check_key(key: &[u8]) -> Result<(), Error> {
    match key.len() {
        0 => Err(Error::EmptyKey),
        1..=KEY_BYTES_MAX => Ok(()),
        _ => Err(Error::KeyTooLong { max: KEY_BYTES_MAX }),
    }
}
