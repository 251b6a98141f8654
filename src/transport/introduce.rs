//! How a joiner learns where it belongs: `GET /raft/cluster` at a member that already has it in its log. The joiner has
//! no cluster to name yet, so this is the one exchange in which it checks nothing but the answer's form: the operator
//! chose whom to ask.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::CONTENT_TYPE;
use hyper::header::HeaderValue;
use hyper::{Request, Response, StatusCode};
use tokio::time::timeout;

use super::dial::{Connected, collect, connect_to, drive, failure};
use super::handshake::{self, Denied, Refusal, check_introduction, introduction};
use super::hub::Hub;
use super::{Event, IO_TIMEOUT};
use crate::cluster::PeerUrl;

/// The longest description of a cluster.
const INTRODUCTION_BYTES_MAX: usize = 1 << 20;
/// The longest reason that is passed on.
const REASON_CHARS_MAX: usize = 500;

/// What a member tells a joiner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Introduction {
    /// The cluster and its members, as JSON that the nodes agree on.
    Member {
        body: Bytes,
    },
    /// The ID is not in the log, or with other URLs; one line says which.
    NotAMember(String),
    Removed,
}

/// Why a joiner does not know where it belongs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IntroduceError {
    /// No answer, or none that makes sense: another member may have one.
    #[error("{0}")]
    Unreachable(String),
    /// The member's own words.
    #[error("{0}")]
    NotAMember(String),
    #[error("this ID was removed from the cluster")]
    Removed,
}

/// Asks the member at `ask` where member `own_id` belongs, who will listen at `own_urls`. Gives up after 5 s.
pub async fn introduce(own_id: u64, own_urls: &[PeerUrl], ask: &PeerUrl) -> Result<Bytes, IntroduceError> {
    let exchanged = timeout(IO_TIMEOUT, exchange(introduction(own_id, own_urls), ask)).await;
    let response = exchanged.unwrap_or_else(|_| Err(format!("ask {ask}: no answer in time")));
    let response = response.map_err(IntroduceError::Unreachable)?;
    // Something else than a member may answer there with the same status: its word is no verdict.
    match handshake::refusal(response.headers()) {
        None if response.status() == StatusCode::OK => Ok(response.into_body()),
        Some(Refusal::NotAMember) => {
            let text = String::from_utf8_lossy(response.body());
            let reason = text.lines().next().unwrap_or_default();
            Err(IntroduceError::NotAMember(reason.chars().take(REASON_CHARS_MAX).collect()))
        }
        Some(Refusal::Removed) => Err(IntroduceError::Removed),
        _ => Err(IntroduceError::Unreachable(format!("ask {ask}: {}", failure(&response)))),
    }
}

async fn exchange(request: Request<Full<Bytes>>, ask: &PeerUrl) -> Result<Response<Bytes>, String> {
    let (mut sender, connection): Connected<_> = connect_to(ask).await.map_err(|error| error.to_string())?;
    let exchanged = drive(connection, async {
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        collect(response, INTRODUCTION_BYTES_MAX).await
    });
    exchanged.await.map_err(|error| format!("ask {ask}: {error}"))
}

/// Answers a joiner, as the node decides.
pub async fn answer<B>(hub: &Hub, request: &Request<B>) -> Result<Response<Full<Bytes>>, Denied> {
    let (id, urls) = check_introduction(request)?;
    // Nothing is lost with an answer that did not come: it asks again.
    let introduction = hub.ask(|reply| Event::Introduce { id, urls, reply }).await.ok_or(Denied::Busy)?;
    match introduction {
        Introduction::Member { body } => {
            let mut response = Response::new(Full::new(body));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            Ok(response)
        }
        Introduction::NotAMember(reason) => Err(Denied::NotIntroduced(reason)),
        Introduction::Removed => Err(Refusal::Removed.into()),
    }
}
