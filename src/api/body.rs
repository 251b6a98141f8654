//! Reads a request's body: no longer than a value may be, no slower than a client may be, and together with all other
//! bodies no larger than their budget.

use std::error::Error;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use hyper::StatusCode;
use hyper::body::{Body, Frame, Incoming};
use tokio::time::{Instant, Sleep, sleep_until};

use super::reply::Refusal;
use super::{Api, Limits};
use crate::kv;

/// Bytes of request bodies that may be in memory, over all connections.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    max: usize,
}

impl Budget {
    pub fn new(max: usize) -> Self {
        Budget { used: AtomicUsize::new(0), max }
    }

    fn take(&self, bytes: usize) -> Option<Charge<'_>> {
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        // Dropped on refusal, it gives back what it did not get.
        let charge = Charge { budget: self, bytes };
        (before + bytes <= self.max).then_some(charge)
    }
}

/// A part of a budget, given back when dropped.
#[derive(Debug)]
struct Charge<'a> {
    budget: &'a Budget,
    bytes: usize,
}

impl Drop for Charge<'_> {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A whole body, charged to the budget while it is there.
#[derive(Debug)]
pub struct Value<'a> {
    pub bytes: Bytes,
    _charge: Charge<'a>,
}

/// Reads a body that is to become a value. A declared length that is too large is refused before a byte is read, and
/// so before a client that expects `100 Continue` has sent one.
pub async fn read<'a>(api: &'a Api, body: &mut Incoming) -> Result<Value<'a>, Refusal> {
    let max = api.service.value_bytes_max();
    let too_large = || Refusal::write(kv::Error::ValueTooLarge { max });
    // A chunked body has no length before its end.
    let expected = match body.size_hint().exact() {
        Some(length) => usize::try_from(length).ok().filter(|&length| length <= max).ok_or_else(too_large)?,
        None => max,
    };
    let charge = api.bodies.take(expected).ok_or_else(|| {
        let reason = "not applied: too many bytes of request bodies in flight; try again";
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, reason).retry()
    })?;
    let mut patience = Patience::new(&api.limits);
    let mut whole = Bytes::new();
    let mut pieces = BytesMut::new();
    while let Some(frame) = patience.next(body).await? {
        // Trailers are of no use to a value.
        let Ok(piece) = frame.into_data() else { continue };
        if whole.len().max(pieces.len()) + piece.len() > max {
            return Err(too_large());
        }
        // What came in one piece is not copied.
        if whole.is_empty() && pieces.is_empty() {
            whole = piece;
        } else {
            if pieces.is_empty() {
                pieces.reserve(body.size_hint().exact().map_or(2 * whole.len(), |_| expected));
                pieces.extend_from_slice(&std::mem::take(&mut whole));
            }
            pieces.extend_from_slice(&piece);
        }
    }
    let bytes = if pieces.is_empty() { whole } else { pieces.freeze() };
    Ok(Value { bytes, _charge: charge })
}

/// How long to wait for the pieces of one body. The timer exists only once there is something to wait for.
struct Patience<'a> {
    limits: &'a Limits,
    timer: Option<(Instant, Pin<Box<Sleep>>)>,
}

impl<'a> Patience<'a> {
    fn new(limits: &'a Limits) -> Self {
        Patience { limits, timer: None }
    }

    async fn next(&mut self, body: &mut Incoming) -> Result<Option<Frame<Bytes>>, Refusal> {
        if body.is_end_stream() {
            return Ok(None);
        }
        let mut waiting = false;
        poll_fn(|cx| {
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => return Poll::Ready(Ok(Some(frame))),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(broken(&error))),
                Poll::Ready(None) => return Poll::Ready(Ok(None)),
                Poll::Pending => {}
            }
            if !waiting {
                waiting = true;
                self.wait();
            }
            let (_, sleep) = self.timer.as_mut().expect("waiting sets the timer");
            sleep.as_mut().poll(cx).map(|()| Err(stalled()))
        })
        .await
    }

    /// Sets the timer for the next piece.
    fn wait(&mut self) {
        let now = Instant::now();
        let gap_end = now + self.limits.body_gap_time;
        let (end, sleep) =
            self.timer.get_or_insert_with(|| (now + self.limits.body_time, Box::pin(sleep_until(gap_end))));
        sleep.as_mut().reset(gap_end.min(*end));
    }
}

fn stalled() -> Refusal {
    Refusal::new(StatusCode::REQUEST_TIMEOUT, "not applied: the body did not come in time")
}

fn broken(error: &hyper::Error) -> Refusal {
    let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    Refusal::bad_request(format!("not applied: the body is broken: {}", cause.escape_debug())).close()
}
