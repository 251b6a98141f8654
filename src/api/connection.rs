//! One client's connection from accept to close: hyper reads and writes it, a watchdog ends it where the client stalls,
//! and whoever sent what is no request is told why. The accept loop in `api` runs one of these as a task for each.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::reply::Refusal;
use super::socket::{Phase, Progress, Socket};
use super::{Api, Limits, REQUEST_LINE_BYTES_MAX, router};

/// Serves a connection until the client leaves, stalls, sends what is no HTTP, or until `stopping` and the end of the
/// request in flight.
pub async fn serve(api: Arc<Api>, stream: TcpStream, stopping: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "set TCP_NODELAY");
    }
    let progress = Arc::new(Progress::default());
    let socket = TokioIo::new(Socket::new(stream, progress.clone()));
    let client = Arc::new((api.clone(), progress.clone()));
    let service = service_fn(|request: Request<Incoming>| {
        client.1.enter(Phase::Serving);
        let client = client.clone();
        async move {
            let (api, progress) = &*client;
            let (answer, unread) = router::answer(api, request).await;
            if unread {
                progress.leave_unread();
            }
            progress.enter(Phase::Answering);
            Ok::<_, Infallible>(answer)
        }
    });
    let mut connection = api.http.serve_connection(socket, service);
    let mut watchdog = Watchdog::new(&api.limits);
    let mut told = false;
    let end = loop {
        tokio::select! {
            biased;
            end = poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
                Poll::Ready(result) => Poll::Ready(End::Done(result)),
                Poll::Pending => watchdog.poll(cx, &progress).map(End::Stalled),
            }) => break end,
            () = stopping.cancelled(), if !told => {
                told = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
    };
    let parts = connection.into_parts();
    let mut stream = parts.io.into_inner().into_stream();
    let refusal = match end {
        End::Done(Ok(())) => None,
        End::Done(Err(error)) => unreadable(&error, progress.refused(), &parts.read_buf),
        // The part of a request that came behind the last one.
        End::Stalled(Phase::Idle) if parts.read_buf.is_empty() => None,
        End::Stalled(Phase::Idle | Phase::Head) => {
            Some(Refusal::new(StatusCode::REQUEST_TIMEOUT, "the headers of the request did not come in time"))
        }
        End::Stalled(Phase::Serving | Phase::Answering) => None,
    };
    match refusal {
        Some(refusal) => refuse(&api, &mut stream, &refusal).await,
        None => {
            close(&mut stream).await;
            if progress.is_unread() {
                linger(&api, &mut stream).await;
            }
        }
    }
}

/// Tells a client over the limit so, whatever it wants.
pub async fn turn_away(api: Arc<Api>, mut stream: TcpStream) {
    let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "not applied: too many connections; try again").retry();
    refuse(&api, &mut stream, &refusal).await;
}

/// How hyper's part of a connection ended.
enum End {
    Done(hyper::Result<()>),
    Stalled(Phase),
}

/// Ends what stalls. One timer for a connection, which steady requests do not touch: it is set anew only when it fires
/// or when a phase is due before it.
struct Watchdog<'a> {
    limits: &'a Limits,
    sleep: Pin<Box<Sleep>>,
    steps: u64,
    /// None while the request in flight has time-outs of its own.
    deadline: Option<Instant>,
}

impl<'a> Watchdog<'a> {
    fn new(limits: &'a Limits) -> Self {
        let deadline = Instant::now() + limits.idle_time;
        Watchdog { limits, sleep: Box::pin(sleep_until(deadline)), steps: 0, deadline: Some(deadline) }
    }

    fn observe(&mut self, progress: &Progress) {
        if progress.steps() == self.steps {
            return;
        }
        self.steps = progress.steps();
        let time = match progress.phase() {
            Phase::Idle => self.limits.idle_time,
            Phase::Head => self.limits.head_time,
            Phase::Serving => {
                self.deadline = None;
                return;
            }
            Phase::Answering => self.limits.write_time,
        };
        let deadline = Instant::now() + time;
        self.deadline = Some(deadline);
        if deadline < self.sleep.deadline() {
            self.sleep.as_mut().reset(deadline);
        }
    }

    /// Ready when the connection stalls, with what it was doing.
    fn poll(&mut self, cx: &mut Context<'_>, progress: &Progress) -> Poll<Phase> {
        self.observe(progress);
        loop {
            ready!(self.sleep.as_mut().poll(cx));
            // It is due for a time that may have moved since.
            let now = Instant::now();
            match self.deadline {
                Some(deadline) if deadline <= now => return Poll::Ready(progress.phase()),
                Some(deadline) => self.sleep.as_mut().reset(deadline),
                None => self.sleep.as_mut().reset(now + self.limits.idle_time),
            }
        }
    }
}

/// What to say to bytes that hyper could not read as a request; nothing where it is the connection that broke.
fn unreadable(error: &hyper::Error, refused: Option<u16>, read: &[u8]) -> Option<Refusal> {
    if error.is_incomplete_message() {
        return Some(Refusal::new(StatusCode::BAD_REQUEST, "the connection ended within a request"));
    }
    if !error.is_parse() {
        return None;
    }
    let Some(status) = refused.and_then(|status| StatusCode::from_u16(status).ok()) else {
        // The only one that hyper leaves without a status is the preface of HTTP/2.
        return Some(Refusal::new(
            StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            "only HTTP/1.1 and HTTP/1.0 are spoken here",
        ));
    };
    if status == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE {
        let line = read.iter().take(REQUEST_LINE_BYTES_MAX).position(|&byte| byte == b'\n');
        return Some(if line.is_some() { Refusal::large_headers() } else { Refusal::long_target() });
    }
    Some(Refusal::new(status, format!("no HTTP request: {error}")))
}

/// Writes a refusal where there is no request to answer, and closes.
async fn refuse(api: &Api, stream: &mut TcpStream, refusal: &Refusal) {
    router::count(api, "none", refusal.status());
    match timeout(api.limits.linger_time, stream.write_all(refusal.raw().as_bytes())).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) | Err(_) => return,
    }
    close(stream).await;
    linger(api, stream).await;
}

/// Says that nothing more will be sent.
async fn close(stream: &mut TcpStream) {
    if let Err(error) = stream.shutdown().await {
        debug!(%error, "shut a client's socket down");
    }
}

/// Takes and forgets what a refused client still sends. To close with bytes unread resets the connection, and a reset
/// can overtake the answer.
async fn linger(api: &Api, stream: &mut TcpStream) {
    let mut forgotten = vec![0; 16 << 10];
    let until_it_ends = async { while matches!(stream.read(&mut forgotten).await, Ok(1..)) {} };
    if timeout(api.limits.linger_time, until_it_ends).await.is_err() {
        debug!("a refused client still sends; hanging up");
    }
}
