//! One request from its head to its answer: the checks that concern every request, then the front end that its target
//! names. `connection` calls it.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use hyper::body::{Body, Incoming};
use hyper::header::{CONNECTION, EXPECT};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method, Request, StatusCode, Uri};

use super::reply::{Answer, CLOSE, Refusal, Reply};
use super::target::{self, Place};
use super::{Api, HEADER_BYTES_MAX, ops, raftexample};
use crate::metrics;

/// The answer, and whether the client may still be sending a part of its request.
pub async fn answer(api: &Api, request: Request<Incoming>) -> (Answer, bool) {
    let (Parts { method, uri, headers, .. }, mut body) = request.into_parts();
    let waits_for_continue = !body.is_end_stream() && headers.contains_key(EXPECT);
    let oversized = size_bytes(&headers) > HEADER_BYTES_MAX;
    let reply = Reply::new(headers);
    let mut answer = if oversized {
        reply.refusal(&Refusal::large_headers())
    } else {
        route(api, &method, &uri, &mut body, reply).await
    };
    count(api, label(&method), answer.status());
    let unread = answer.headers().contains_key(CONNECTION)
        || !body.is_end_stream() && (waits_for_continue || !drain(&mut body).await);
    if unread {
        answer.headers_mut().insert(CONNECTION, CLOSE);
    }
    (answer, unread)
}

/// Counts an answer.
pub fn count(api: &Api, method: &'static str, status: StatusCode) {
    api.metrics.http_requests.get_or_create(&metrics::Request { method, status: status.as_u16() }).inc();
}

async fn route(api: &Api, method: &Method, uri: &Uri, body: &mut Incoming, reply: Reply) -> Answer {
    let key = match target::key(uri) {
        Ok(key) => key,
        Err(refusal) => return raftexample::refuse(api, method, reply, refusal),
    };
    match target::place(&key) {
        Place::Key => raftexample::answer(api, method, &key, uri.query(), body, reply).await,
        Place::Service(service) => ops::answer(api, method, Some(service), reply).await,
        Place::Reserved => ops::answer(api, method, None, reply).await,
    }
}

/// As it came: each name and value, and the `: ` and line end between them.
fn size_bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum()
}

/// Takes the rest of a body that nobody wanted if it is here already, so that the connection can go on. False if there
/// is more to come.
async fn drain(body: &mut Incoming) -> bool {
    poll_fn(|cx| {
        while !body.is_end_stream() {
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(None) => return Poll::Ready(true),
                Poll::Ready(Some(Err(_))) | Poll::Pending => return Poll::Ready(false),
            }
        }
        Poll::Ready(true)
    })
    .await
}

/// One of a fixed set of words: a client does not choose what labels there are.
fn label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        _ => "other",
    }
}
