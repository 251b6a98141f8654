//! What a follower forwards to the leader, writes and membership changes, and what it knows when the answer is not
//! there. It never repeats a request: who knows the deadline does. The leader's end is in `listener`.

use bytes::Bytes;
use hyper::{Method, StatusCode};
use tokio::time::timeout;

use super::IO_TIMEOUT;
use super::dial::{ExchangeError, exchange};
use super::handshake::{PROPOSE, RECONFIGURE};
use super::hub::Hub;
use super::propose::{Outcome, decode_outcomes, encode_proposals};
use crate::channel::RequestId;

/// The longest membership change, and the longest answer to one.
pub const RECONFIGURE_BYTES_MAX: usize = 64 << 10;

/// Why the leader's answer is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// The leader surely did not take what was forwarded.
    #[error("not sent to the leader: {0}")]
    NotSent(String),
    /// It may have.
    #[error("no answer from the leader: {0}")]
    Unknown(String),
}

/// Sends proposals to the leader and waits for their outcome.
pub async fn propose(hub: &Hub, leader: u64, proposals: &[(RequestId, Bytes)]) -> Result<Vec<Outcome>, ProposeError> {
    let outcomes = |body: Bytes| decode_outcomes(&body).filter(|outcomes| outcomes.len() == proposals.len());
    forward(hub, leader, PROPOSE, encode_proposals(proposals), outcomes).await
}

/// Sends a membership change to the leader and waits for its answer. Both are the node's, and opaque here.
pub async fn reconfigure(hub: &Hub, leader: u64, body: Bytes) -> Result<Bytes, ProposeError> {
    if body.len() > RECONFIGURE_BYTES_MAX {
        return Err(ProposeError::NotSent(format!("it takes {} bytes, of {RECONFIGURE_BYTES_MAX}", body.len())));
    }
    let answer = |body: Bytes| (body.len() <= RECONFIGURE_BYTES_MAX).then_some(body);
    forward(hub, leader, RECONFIGURE, body, answer).await
}

/// Posts `body` to the leader; `decode` makes what is wanted of the answer, or nothing if it is malformed.
async fn forward<T>(
    hub: &Hub,
    leader: u64,
    path: &'static str,
    body: Bytes,
    decode: impl FnOnce(Bytes) -> Option<T>,
) -> Result<T, ProposeError> {
    let Some(peer) = hub.peer(leader) else {
        return Err(ProposeError::NotSent(format!("member {leader} has no address")));
    };
    let turn = timeout(IO_TIMEOUT, peer.forwarding.acquire()).await;
    let Ok(Ok(_turn)) = turn else {
        return Err(ProposeError::NotSent("too many requests wait for the leader".to_owned()));
    };
    let request = hub.identity.request(Method::POST, path, leader, body);
    let exchanged = peer.stop.run_until_cancelled(exchange(hub, &peer, request)).await;
    let answer = match exchanged {
        Some(Ok(answer)) => answer,
        Some(Err(ExchangeError::NotSent(error))) => return Err(ProposeError::NotSent(error)),
        Some(Err(ExchangeError::Lost(error))) => return Err(ProposeError::Unknown(error)),
        None => return Err(ProposeError::Unknown("the connection was closed".to_owned())),
    };
    match answer.response.status() {
        StatusCode::OK => {
            decode(answer.response.into_body()).ok_or(ProposeError::Unknown("the answer is malformed".to_owned()))
        }
        // Every refusal of a peer's is made before the node sees what is forwarded.
        status if status.is_client_error() || status == StatusCode::SERVICE_UNAVAILABLE => {
            Err(ProposeError::NotSent(answer.failure()))
        }
        _ => Err(ProposeError::Unknown(answer.failure())),
    }
}
