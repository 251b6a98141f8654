//! The peer port: who may connect, and what is answered. Every connection counts against a bound, every body against
//! another; a refusal says its reason in a status, a header and a line of text.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::dial::no_delay;
use super::forward::RECONFIGURE_BYTES_MAX;
use super::frame::{FRAME_BYTES_MAX, FRAME_OVERHEAD_BYTES, decode_one};
use super::handshake::{Denied, INTRODUCE, PIPELINE, PROBING, PROPOSE, RECONFIGURE, REFUSAL, SNAPSHOT, STREAM};
use super::hub::Hub;
use super::peer::Peer;
use super::probe::Probe;
use super::propose::{PROPOSE_BYTES_MAX, decode_proposals, encode_outcomes};
use super::stream::Outgoing;
use super::{Event, IO_TIMEOUT, introduce, snapshot};

/// From a connection's start to the end of its first request's head: who says nothing must not keep members out.
const FIRST_HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// For the head of each further request; an idle connection that is kept for the next one is closed after it, too.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Read and write buffers of a connection. Small, so that little bulk is ahead of a heartbeat.
const BUFFER_BYTES_MAX: usize = 64 << 10;
/// Before the next try to accept, when the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections for as long as the transport runs.
pub async fn serve(hub: Arc<Hub>, listener: TcpListener) {
    loop {
        let permit = hub.connections.clone().acquire_owned().await.expect("this semaphore is never closed");
        match listener.accept().await.and_then(|(stream, _)| no_delay(stream)) {
            Ok(stream) => {
                let connection = hub.stop.child_token();
                let serving = serve_connection(hub.clone(), stream, connection.clone());
                hub.spawn_until(&connection, async move {
                    serving.await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept a peer's connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(hub: Arc<Hub>, stream: TcpStream, connection: CancellationToken) {
    let asked = AtomicBool::new(false);
    let service = service_fn(|request| {
        asked.store(true, Ordering::Relaxed);
        let (hub, connection) = (hub.clone(), connection.clone());
        async move { Ok::<_, Infallible>(answer(hub, connection, request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let mut served = pin!(served);
    let outcome = tokio::select! {
        outcome = &mut served => outcome,
        () = sleep(FIRST_HEAD_TIMEOUT) => {
            if !asked.load(Ordering::Relaxed) {
                tracing::debug!("a connection from a peer asked nothing");
                return;
            }
            served.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection from a peer ended");
    }
}

async fn answer(hub: Arc<Hub>, connection: CancellationToken, request: Request<Incoming>) -> Response<Reply> {
    let mut response = match route(&hub, connection, request).await {
        Ok(response) => response,
        Err(denied) => {
            hub.count_refused(denied.token());
            tracing::debug!(%denied, "refused a peer's request");
            refuse(&denied)
        }
    };
    hub.identity.sign_response(response.headers_mut(), hub.leader());
    response
}

async fn route(
    hub: &Arc<Hub>,
    connection: CancellationToken,
    request: Request<Incoming>,
) -> Result<Response<Reply>, Denied> {
    let path = request.uri().path();
    let allowed = match path {
        PIPELINE | PROPOSE | SNAPSHOT | RECONFIGURE => Method::POST,
        STREAM | PROBING | INTRODUCE => Method::GET,
        _ => return Err(Denied::NotFound),
    };
    if *request.method() != allowed {
        return Err(Denied::Method(allowed));
    }
    if path == PROBING {
        // Answered to anyone: it says no more than every refusal does.
        return Ok(probing(hub));
    }
    if path == INTRODUCE {
        // A joiner belongs to no cluster yet.
        return introduce::answer(hub, &request).await.map(|response| response.map(Reply::Whole));
    }
    let caller = hub.identity.check_request(request.headers())?;
    let peer = hub.admit(caller).await?;
    match path {
        STREAM => {
            peer.knock();
            let id = peer.id;
            let stream = Outgoing::attach(hub.clone(), peer, connection);
            hub.tell(Event::Attached { peer: id }).await;
            Ok(Response::new(Reply::Stream(stream)))
        }
        PROPOSE => propose(hub, &peer, request.into_body()).await,
        RECONFIGURE => reconfigure(hub, &peer, request.into_body()).await,
        SNAPSHOT => snapshot::receive(hub, &peer, request.into_body()).await.map(|()| done()),
        _ => message(hub, &peer, request.into_body()).await,
    }
}

async fn message(hub: &Hub, peer: &Peer, body: Incoming) -> Result<Response<Reply>, Denied> {
    let body = collect(hub, body, FRAME_BYTES_MAX + FRAME_OVERHEAD_BYTES).await?;
    peer.figures.received_bytes.inc_by(body.len() as u64);
    hub.receive(peer, decode_one(&body)?).await?;
    Ok(done())
}

fn done() -> Response<Reply> {
    let mut response = Response::new(Reply::Whole(Full::default()));
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

async fn propose(hub: &Hub, peer: &Peer, body: Incoming) -> Result<Response<Reply>, Denied> {
    let body = collect(hub, body, PROPOSE_BYTES_MAX).await?;
    let proposals = decode_proposals(&body).ok_or(Denied::Malformed("the proposals"))?;
    drop(body);
    let outcomes = hub.ask(|reply| Event::Propose { from: peer.id, proposals, reply }).await;
    let outcomes = outcomes.ok_or(Denied::Unanswered)?;
    Ok(Response::new(Reply::Whole(Full::new(encode_outcomes(&outcomes)))))
}

async fn reconfigure(hub: &Hub, peer: &Peer, body: Incoming) -> Result<Response<Reply>, Denied> {
    let body = collect(hub, body, RECONFIGURE_BYTES_MAX).await?;
    let answer = hub.ask(|reply| Event::Reconfigure { from: peer.id, body, reply }).await;
    let mut response = Response::new(Reply::Whole(Full::new(answer.ok_or(Denied::Unanswered)?)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

fn probing(hub: &Hub) -> Response<Reply> {
    let body = serde_json::to_vec(&Probe::of(hub)).expect("numbers and a string are JSON");
    let mut response = Response::new(Reply::Whole(Full::new(body.into())));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Reads a body of at most `bytes_max`, within what all bodies may take together.
async fn collect(hub: &Hub, body: Incoming, bytes_max: usize) -> Result<Bytes, Denied> {
    // A body of no stated length counts as the longest.
    let claimed = body.size_hint().upper().unwrap_or(bytes_max as u64);
    if claimed > bytes_max as u64 {
        return Err(Denied::TooLarge);
    }
    let _room = hub.bodies.try_acquire_many(claimed as u32).map_err(|_| Denied::Busy)?;
    let collected = timeout(IO_TIMEOUT, http_body_util::Limited::new(body, bytes_max).collect()).await;
    match collected {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(Denied::TooLarge),
        Ok(Err(_)) => Err(Denied::Malformed("the body was cut")),
        Err(_) => Err(Denied::Malformed("the body did not come in time")),
    }
}

fn refuse(denied: &Denied) -> Response<Reply> {
    let mut response = Response::new(Reply::Whole(Full::new(format!("{denied}\n").into())));
    *response.status_mut() = denied.status();
    let headers = response.headers_mut();
    headers.insert(REFUSAL, HeaderValue::from_static(denied.token()));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    match denied {
        Denied::Method(allowed) => {
            let allowed = HeaderValue::try_from(allowed.as_str()).expect("a method is ASCII");
            headers.insert(ALLOW, allowed);
        }
        // Who sends this is broken, and so may be what follows.
        Denied::Frame(_)
        | Denied::Malformed(_)
        | Denied::TooLarge
        | Denied::SnapshotDamaged
        | Denied::SnapshotMismatch
        | Denied::SnapshotNotStored => {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Denied::NotFound | Denied::Refused(_) | Denied::NotIntroduced(_) | Denied::Busy | Denied::Unanswered => {}
    }
    response
}

/// A response's body: one that is there, or the endless one.
enum Reply {
    Whole(Full<Bytes>),
    Stream(Outgoing),
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Reply::Whole(body) => Pin::new(body).poll_frame(context),
            Reply::Stream(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Reply::Whole(body) => body.is_end_stream(),
            Reply::Stream(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Reply::Whole(body) => body.size_hint(),
            Reply::Stream(_) => SizeHint::default(),
        }
    }
}
