//! The two ends of a stream of messages. [`Outgoing`] is the body of the endless response in which a peer reads what we
//! send it; [`pull`] is the task that keeps such a stream open from a peer to us, and reads it.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::{Method, StatusCode};
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::dial::{connect, is_refused, refusal, verify};
use super::frame::{Decoder, KEEP_ALIVE, encode};
use super::handshake::{Refusal, STREAM};
use super::hub::Hub;
use super::outbox::Taken;
use super::peer::{Peer, Standing};
use super::{Event, IO_TIMEOUT};

/// How long a stream may be silent before it writes a keep-alive: less than a third of what the reader bears.
const KEEP_ALIVE_AFTER: Duration = Duration::from_millis(1500);
/// Batches are cut from blocks of this size.
const BLOCK_BYTES: usize = 64 << 10;
/// First and longest pause between two tries to open a stream.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Tries a second, whatever the reasons to hurry.
const DIALS_PER_SECOND_MAX: f64 = 5.0;
/// A stream that lived this long was a good one: when it breaks, the next try is early.
const GOOD_AFTER: Duration = Duration::from_secs(1);
/// A visitor that nobody could reach for this long is forgotten.
const VISITOR_PATIENCE: Duration = Duration::from_secs(30);

/// Our messages for one peer, as it reads them. They are encoded here, on the connection's task.
pub struct Outgoing {
    hub: Arc<Hub>,
    peer: Arc<Peer>,
    generation: u64,
    buffer: BytesMut,
    wrote: Instant,
    keep_alive: Pin<Box<Sleep>>,
}

impl Outgoing {
    /// Takes over the peer's messages from any stream before. `connection` cuts the connection that this one is on.
    pub fn attach(hub: Arc<Hub>, peer: Arc<Peer>, connection: CancellationToken) -> Self {
        let generation = peer.outbox.attach(connection);
        let keep_alive = Box::pin(sleep(KEEP_ALIVE_AFTER));
        Outgoing {
            hub,
            peer,
            generation,
            buffer: BytesMut::with_capacity(BLOCK_BYTES),
            wrote: Instant::now(),
            keep_alive,
        }
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        let bytes = match this.peer.outbox.take(this.generation, context.waker()) {
            Taken::Detached => return Poll::Ready(None),
            Taken::Messages { sequence, messages } => {
                for (sequence, message) in (sequence..).zip(&messages) {
                    encode(&mut this.buffer, this.hub.boot, sequence, message);
                }
                this.buffer.split().freeze()
            }
            Taken::Nothing => {
                // The timer is moved only when it fires, not with each message.
                loop {
                    ready!(this.keep_alive.as_mut().poll(context));
                    let due = this.wrote + KEEP_ALIVE_AFTER;
                    if due <= Instant::now() {
                        break;
                    }
                    this.keep_alive.as_mut().reset(due);
                }
                Bytes::from_static(&KEEP_ALIVE)
            }
        };
        this.wrote = Instant::now();
        this.peer.figures.sent_bytes.inc_by(bytes.len() as u64);
        Poll::Ready(Some(Ok(hyper::body::Frame::data(bytes))))
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if let Some(dropped) = self.peer.outbox.detach(self.generation) {
            self.hub.lost(&self.peer, dropped);
            // What was on its way may be lost too, so this is said even when nothing waited.
            self.hub.unreachable(self.peer.id);
        }
    }
}

/// Keeps a stream of the peer's messages open, for as long as it is a peer.
pub async fn pull(hub: Arc<Hub>, peer: Arc<Peer>) {
    let mut pace = Pace::new();
    let mut heard = Instant::now();
    loop {
        pace.admit().await;
        let start = Instant::now();
        let reading = peer.place().run_until_cancelled_owned(read(&hub, &peer)).await;
        let (standing, error) = match reading.unwrap_or_else(|| End::Broke("the peer moved".to_owned())) {
            End::Unopened(error) => (Standing::Unreachable, error),
            End::NobodyListens(error) => {
                hub.tell(Event::NobodyListens { peer: peer.id }).await;
                (Standing::Unreachable, error)
            }
            End::Refused(refusal) => {
                hub.count_refused(refusal.token());
                hub.tell(Event::Refused { peer: peer.id, refusal }).await;
                (Standing::Refused(refusal), refusal.to_string())
            }
            End::Broke(error) => {
                heard = Instant::now();
                hub.unreachable(peer.id);
                if start.elapsed() >= GOOD_AFTER {
                    pace.reset();
                }
                (Standing::Unreachable, error)
            }
        };
        peer.stand(standing, Some(error));
        if peer.is_visitor() && heard.elapsed() > VISITOR_PATIENCE && !peer.outbox.is_attached() {
            hub.forget(peer.id);
            return;
        }
        tokio::select! {
            () = pace.pause() => {}
            () = peer.knocked.notified() => pace.reset(),
        }
    }
}

/// How a try to read a stream ended.
enum End {
    Unopened(String),
    NobodyListens(String),
    Refused(Refusal),
    Broke(String),
}

async fn read(hub: &Arc<Hub>, peer: &Arc<Peer>) -> End {
    let (mut sender, connection) = match connect(peer).await {
        Ok(connected) => connected,
        Err(error) if is_refused(&error) => return End::NobodyListens(error.to_string()),
        Err(error) => return End::Unopened(error.to_string()),
    };
    // Driven by this task: a message then wakes one task on its way in, not two.
    let mut connection = pin!(connection);
    let request = hub.identity.request(Method::GET, STREAM, peer.id, Bytes::new());
    let mut connected = true;
    let opening = async {
        let mut response = pin!(sender.send_request(request));
        tokio::select! {
            biased;
            response = &mut response => return response,
            _ = &mut connection => connected = false,
        }
        // The peer answered and closed at once, or only closed: both are known by now.
        response.await
    };
    let response = match timeout(IO_TIMEOUT, opening).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => return End::Unopened(format!("open the stream: {error}")),
        Err(_) => return End::Unopened("open the stream: no answer in time".to_owned()),
    };
    if response.status() != StatusCode::OK {
        return match refusal(hub, peer, &response).await {
            Some(refusal) => End::Refused(refusal),
            None => End::Unopened(format!("open the stream: it answered {}", response.status())),
        };
    }
    let leader = match verify(hub, peer, &response).await {
        Ok(responder) => responder.leader,
        Err(denied) => return End::Unopened(format!("not the peer that we know: {denied}")),
    };
    peer.stand(Standing::Open, None);
    hub.tell(Event::Accepted { peer: peer.id, leader }).await;
    End::Broke(frames(hub, peer, response.into_body(), connection, connected).await)
}

/// Hands over all frames of an open stream, and drives its connection while `connected`. Returns why it ended.
async fn frames<C: Future>(
    hub: &Hub,
    peer: &Peer,
    mut body: Incoming,
    mut connection: Pin<&mut C>,
    mut connected: bool,
) -> String {
    let mut decoder = Decoder::default();
    let mut heard = Instant::now();
    let mut deadline = pin!(sleep_until(heard + IO_TIMEOUT));
    loop {
        let piece = tokio::select! {
            biased;
            piece = body.frame() => piece,
            _ = &mut connection, if connected => {
                // What it read before it ended is still to come out of the body.
                connected = false;
                continue;
            }
            () = &mut deadline => {
                if heard.elapsed() >= IO_TIMEOUT {
                    return "the stream fell silent".to_owned();
                }
                deadline.as_mut().reset(heard + IO_TIMEOUT);
                continue;
            }
        };
        let chunk = match piece {
            Some(Ok(piece)) => match piece.into_data() {
                Ok(chunk) => chunk,
                Err(_trailers) => continue,
            },
            Some(Err(error)) => return format!("the stream broke: {error}"),
            None if decoder.is_empty() => return "the peer ended the stream".to_owned(),
            None => return "the peer ended the stream within a frame".to_owned(),
        };
        peer.figures.received_bytes.inc_by(chunk.len() as u64);
        decoder.push(chunk);
        loop {
            let received = match decoder.next() {
                Ok(None) => break,
                Ok(Some(frame)) => hub.receive(peer, frame).await,
                Err(error) => Err(error),
            };
            if let Err(error) = received {
                hub.count_refused(error.token());
                return format!("closed the stream: {error}");
            }
        }
        // After the node took it all: the time that it needed is not the peer's silence.
        heard = Instant::now();
    }
}

/// When to try again: soon at first, then rarely, never more often than [`DIALS_PER_SECOND_MAX`].
struct Pace {
    pause: Duration,
    tries: f64,
    at: Instant,
}

impl Pace {
    fn new() -> Self {
        Pace { pause: PAUSE_MIN, tries: DIALS_PER_SECOND_MAX, at: Instant::now() }
    }

    /// Waits until a try is within the rate, and takes it.
    async fn admit(&mut self) {
        self.refill();
        if self.tries < 1.0 {
            sleep(Duration::from_secs_f64((1.0 - self.tries) / DIALS_PER_SECOND_MAX)).await;
            self.refill();
        }
        self.tries = (self.tries - 1.0).max(0.0);
    }

    fn refill(&mut self) {
        let now = Instant::now();
        let earned = (now - self.at).as_secs_f64() * DIALS_PER_SECOND_MAX;
        (self.tries, self.at) = ((self.tries + earned).min(DIALS_PER_SECOND_MAX), now);
    }

    async fn pause(&mut self) {
        let longest = self.pause;
        self.pause = (longest * 2).min(PAUSE_MAX);
        // Nodes that lost each other at the same instant do not come back at the same instant. Without randomness they
        // only collide more.
        let random = getrandom::u32().unwrap_or(u32::MAX);
        sleep(longest.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX))).await;
    }

    fn reset(&mut self) {
        self.pause = PAUSE_MIN;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn however_often_it_is_hurried_a_peer_is_dialled_at_a_bounded_rate() {
        let (mut pace, start) = (Pace::new(), Instant::now());
        for _ in 0..5 + 50 {
            pace.admit().await;
            pace.reset();
        }
        let elapsed = start.elapsed().as_secs_f64();
        assert!((9.9..10.2).contains(&elapsed), "50 tries above the first burst took {elapsed} s");
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_from_milliseconds_to_a_second() {
        let mut pace = Pace::new();
        let start = Instant::now();
        pace.pause().await;
        assert!(start.elapsed() <= PAUSE_MIN + Duration::from_millis(1));
        for _ in 0..10 {
            pace.pause().await;
        }
        let last = Instant::now();
        pace.pause().await;
        assert!(last.elapsed() >= PAUSE_MAX / 2 && last.elapsed() <= PAUSE_MAX + Duration::from_millis(1));
    }
}
