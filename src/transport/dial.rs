//! Connections to a peer, and single exchanges over them. Its callers are `stream` and `snapshot`, which keep connections
//! of their own, and `pipeline`, `forward` and `probe`, which share a few idle ones.
//!
//! An exchange that failed says whether the request can have reached the peer: the difference between *rejected* and
//! *unknown* begins here.

use std::error::Error;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{self, Connection, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::handshake::{self, Denied, Refusal, Responder};
use super::hub::Hub;
use super::peer::Peer;
use super::{IO_TIMEOUT, locked};
use crate::cluster::PeerUrl;

/// For one URL; several are tried in turn.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Connections kept for the next request.
const IDLE_MAX: usize = 4;
/// The longest answer to a proposal of many small commands stays below.
const ANSWER_BYTES_MAX: usize = 8 << 20;

type Sender = SendRequest<Full<Bytes>>;
/// A connection, and the end that takes its requests.
pub type Connected<B> = (SendRequest<B>, Connection<TokioIo<TcpStream>, B>);

/// Connects to the first of the peer's URLs that answers. The error is of the kind `ConnectionRefused` only where all of
/// them refuse: the machines are up, and nobody listens.
pub async fn connect<B>(peer: &Peer) -> io::Result<Connected<B>>
where
    B: Body + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let mut failure: Option<io::Error> = None;
    for (index, url) in peer.urls() {
        match connect_to(&url).await {
            Ok(connected) => {
                peer.dialled(Some(index));
                return Ok(connected);
            }
            Err(error) => failure = Some(combined(failure, error)),
        }
    }
    peer.dialled(None);
    Err(failure.unwrap_or_else(|| io::Error::other("it has no peer URL")))
}

/// Whether a connection was turned down by a system on which nobody listens.
pub fn is_refused(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
}

/// What several tries end in: a refusal only if all of them do.
fn combined(earlier: Option<io::Error>, error: io::Error) -> io::Error {
    earlier.filter(|earlier| !is_refused(earlier)).unwrap_or(error)
}

/// Connects to the first address of the URL that answers.
async fn reach(url: &PeerUrl) -> io::Result<TcpStream> {
    let mut failure = None;
    for address in lookup_host(url.authority()).await? {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = Some(combined(failure, error)),
        }
    }
    Err(failure.unwrap_or_else(|| io::Error::other("its name has no address")))
}

/// Connects to one URL. The error names it.
pub async fn connect_to<B>(url: &PeerUrl) -> io::Result<Connected<B>>
where
    B: Body + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let opened = timeout(CONNECT_TIMEOUT, reach(url)).await;
    let opened = opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).and_then(no_delay);
    match opened {
        Ok(stream) => http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other),
        Err(error) => Err(io::Error::new(error.kind(), format!("connect to {url}: {error}"))),
    }
}

/// Drives a connection until the only exchange on it is done.
pub async fn drive<T>(connection: impl Future, exchange: impl Future<Output = T>) -> T {
    let (mut connection, mut exchange) = (pin!(connection), pin!(exchange));
    tokio::select! {
        biased;
        outcome = &mut exchange => return outcome,
        _ = &mut connection => {}
    }
    // The other end answered and closed at once, or only closed: both are known by now.
    exchange.await
}

/// Messages are written whole; to hold them back for more would add a round trip to each.
pub fn no_delay(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A response from the peer itself, whatever its status.
pub struct Answer {
    pub response: Response<Bytes>,
    /// From the request's first byte to the answer's last.
    pub elapsed: Duration,
}

impl Answer {
    /// Why this is not a success, in words for the log.
    pub fn failure(&self) -> String {
        failure(&self.response)
    }
}

/// What a response that is no success says, in words for the log.
pub fn failure(response: &Response<Bytes>) -> String {
    let text = String::from_utf8_lossy(&response.body()[..response.body().len().min(200)]);
    format!("it answered {}: {}", response.status(), text.trim_end())
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The peer surely did not get the request.
    #[error("{0}")]
    NotSent(String),
    /// It may have.
    #[error("{0}")]
    Lost(String),
}

/// Sends one request over an idle connection or a new one, and reads the whole answer. The answer is the peer's: cluster,
/// sender, nonce and boot were checked.
pub async fn exchange(hub: &Hub, peer: &Peer, mut request: Request<Full<Bytes>>) -> Result<Answer, ExchangeError> {
    loop {
        let idle = locked(&peer.idle).pop();
        let fresh = idle.is_none();
        let mut sender = match idle {
            Some(sender) => sender,
            None => open(hub, peer).await?,
        };
        let start = Instant::now();
        let received = timeout(IO_TIMEOUT, async {
            if sender.ready().await.is_err() {
                return Err(Failed::Unsent(Box::new(request)));
            }
            match sender.try_send_request(request).await {
                Ok(response) => collect(response, ANSWER_BYTES_MAX).await.map_err(Failed::Lost),
                Err(mut failed) => match failed.take_message() {
                    Some(request) => Err(Failed::Unsent(Box::new(request))),
                    None => Err(Failed::Lost(failed.into_error().to_string())),
                },
            }
        });
        match received.await {
            Ok(Ok(response)) => {
                let elapsed = start.elapsed();
                keep(peer, sender);
                return match verify(hub, peer, &response).await {
                    Ok(_) => Ok(Answer { response, elapsed }),
                    Err(denied) if response.status().is_client_error() => {
                        Err(ExchangeError::NotSent(denied.to_string()))
                    }
                    Err(denied) => Err(ExchangeError::Lost(denied.to_string())),
                };
            }
            // The peer closed the connection while it was idle: take the next.
            Ok(Err(Failed::Unsent(unsent))) if !fresh => request = *unsent,
            Ok(Err(Failed::Unsent(_))) => {
                return Err(ExchangeError::NotSent("the connection closed at once".to_owned()));
            }
            Ok(Err(Failed::Lost(error))) => return Err(ExchangeError::Lost(error)),
            Err(_) => return Err(ExchangeError::Lost("no answer in time".to_owned())),
        }
    }
}

enum Failed {
    /// The connection gave the request back, nothing of it written.
    Unsent(Box<Request<Full<Bytes>>>),
    Lost(String),
}

async fn open(hub: &Hub, peer: &Peer) -> Result<Sender, ExchangeError> {
    if !peer.may_dial() {
        return Err(ExchangeError::NotSent("the peer was unreachable a moment ago".to_owned()));
    }
    let place = peer.place();
    let connecting = place.run_until_cancelled(connect(peer)).await;
    let connected = connecting.unwrap_or_else(|| Err(io::Error::other("the peer moved")));
    let (sender, connection) = connected.map_err(|error| ExchangeError::NotSent(error.to_string()))?;
    hub.spawn_until(&place, async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a peer ended");
        }
    });
    Ok(sender)
}

/// Reads the whole body of a response, up to `bytes_max`.
pub async fn collect(response: Response<Incoming>, bytes_max: usize) -> Result<Response<Bytes>, String> {
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, bytes_max).collect().await.map_err(|error| error.to_string())?;
    Ok(Response::from_parts(parts, body.to_bytes()))
}

fn keep(peer: &Peer, sender: Sender) {
    let mut idle = locked(&peer.idle);
    idle.retain(|sender| !sender.is_closed());
    if idle.len() < IDLE_MAX && !sender.is_closed() {
        idle.push(sender);
    }
}

/// Checks that the peer that answers is the one that was called, with the data directory that the node knows, and
/// by no earlier start than one that was met.
pub async fn verify<T>(hub: &Hub, peer: &Peer, response: &Response<T>) -> Result<Responder, Denied> {
    let checked = match hub.identity.check_response(response.headers(), peer.id) {
        Ok(responder) => match hub.meet(peer.id, responder.life.nonce).await {
            Ok(()) => peer.greet(responder.life).map(|()| responder).map_err(Denied::from),
            Err(denied) => Err(denied),
        },
        Err(refusal) => Err(refusal.into()),
    };
    if let Err(denied) = &checked {
        hub.count_refused(denied.token());
    }
    checked
}

/// The refusal of us that a response carries. What would make this process stop is believed from the proven peer only,
/// never from a stranger who was given its address.
pub async fn refusal<T>(hub: &Hub, peer: &Peer, response: &Response<T>) -> Option<Refusal> {
    let refusal = handshake::refusal(response.headers())?;
    match refusal {
        Refusal::ClusterMismatch | Refusal::WrongReceiver | Refusal::Version => Some(refusal),
        Refusal::OtherNonce | Refusal::Superseded | Refusal::NotAMember | Refusal::Removed => {
            verify(hub, peer, response).await.is_ok().then_some(refusal)
        }
    }
}
