//! The paths that raftexample taught: `PUT /{key}`, `GET /{key}`, and membership under `POST` and `DELETE /{id}`, with
//! the walkthrough's statuses. What differs from it is a mend: 204 only for what is committed, durable on a majority and
//! applied; `GET` linearizable; keys and values of any bytes, never shown as a page; the query no part of the key.
//!
//! Every answer carries `X-Raft-Index`, `X-Raft-Term` and, where there is one, `X-Raft-Leader`: of a write, the entry's
//! index and term; else the index of the state that answered, and the term this member is in. `ETag` is the key's modify
//! revision.

use hyper::body::Incoming;
use hyper::http::HeaderValue;
use hyper::{Method, StatusCode, header};

use super::reply::{Answer, BYTES, Refusal, Reply};
use super::{Api, body, target};
use crate::channel::Leadership;
use crate::kv::{Read, Written};

const ALLOW: &str = "PUT, GET, HEAD, POST, DELETE";

pub async fn answer(
    api: &Api,
    method: &Method,
    key: &[u8],
    query: Option<&str>,
    body: &mut Incoming,
    reply: Reply,
) -> Answer {
    let refusal = match *method {
        Method::PUT => match put(api, key, query, body).await {
            Ok(Written { index, term, revision }) => {
                let leadership = Leadership { term, ..api.service.leadership() };
                return reply.raft(index, leadership).revision(revision).empty(StatusCode::NO_CONTENT);
            }
            Err(refusal) => refusal,
        },
        Method::GET | Method::HEAD => match get(api, key, query).await {
            Ok(read) => return value(api, method, read, reply),
            Err(refusal) => refusal,
        },
        Method::POST => membership(key, query, "POST /{id} adds the member with that numeric ID"),
        Method::DELETE => {
            membership(key, query, "DELETE /{id} removes a member; keys are deleted through /api/v1/kv/ (to come)")
        }
        _ => Refusal::method(ALLOW),
    };
    refuse(api, method, reply, refusal)
}

/// A refusal on a key's path.
pub fn refuse(api: &Api, method: &Method, reply: Reply, refusal: Refusal) -> Answer {
    let reply = reply.raft(api.service.applied(), api.service.leadership());
    match *method {
        Method::PUT | Method::GET | Method::HEAD | Method::POST | Method::DELETE => reply.refusal(&refusal),
        // Whatever is wrong with the path, this comes first: `OPTIONS *` has none.
        _ => reply.refusal(&Refusal::method(ALLOW)),
    }
}

async fn put(api: &Api, key: &[u8], query: Option<&str>, body: &mut Incoming) -> Result<Written, Refusal> {
    target::no_parameters(query)?;
    let value = body::read(api, body).await?;
    api.service.put(key, &value.bytes).await.map_err(Refusal::write)
}

async fn get(api: &Api, key: &[u8], query: Option<&str>) -> Result<Read, Refusal> {
    let consistency = target::consistency(query)?;
    api.service.get(key, consistency).await.map_err(Refusal::read)
}

fn value(api: &Api, method: &Method, read: Read, reply: Reply) -> Answer {
    let reply = reply.raft(read.index, api.service.leadership());
    let Some(entry) = read.entry else {
        return reply.refusal(&Refusal::new(StatusCode::NOT_FOUND, "Failed to GET"));
    };
    let reply = reply.revision(entry.modify_revision);
    if method == Method::HEAD {
        let length = HeaderValue::from(entry.value.len());
        reply.with(header::CONTENT_LENGTH, length).with(header::CONTENT_TYPE, BYTES).empty(StatusCode::OK)
    } else {
        reply.content(StatusCode::OK, BYTES, entry.value)
    }
}

/// The cluster cannot change yet. An answer that tells a mistake from what is to come keeps scripts honest.
fn membership(id: &[u8], query: Option<&str>, usage: &'static str) -> Refusal {
    if let Err(refusal) = target::no_parameters(query) {
        return refusal;
    }
    match std::str::from_utf8(id).ok().and_then(|id| id.parse::<u64>().ok()) {
        Some(_) => Refusal::new(
            StatusCode::NOT_IMPLEMENTED,
            "membership changes are not available in this version; nothing was changed",
        ),
        None => Refusal::bad_request(usage),
    }
}
