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
use crate::channel::{Change, Leadership};
use crate::cluster::{Member, PeerUrl, URLS_MAX};
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
        Method::POST => match add(api, key, query, body).await {
            Ok(()) => return done(api, reply),
            Err(refusal) => refusal,
        },
        Method::DELETE => match remove(api, key, query).await {
            Ok(()) => return done(api, reply),
            Err(refusal) => refusal,
        },
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
    let reply = reply.revision(entry.revisions().modify);
    if method == Method::HEAD {
        let length = HeaderValue::from(entry.value().len());
        reply.with(header::CONTENT_LENGTH, length).with(header::CONTENT_TYPE, BYTES).empty(StatusCode::OK)
    } else {
        reply.content(StatusCode::OK, BYTES, entry.to_bytes())
    }
}

fn done(api: &Api, reply: Reply) -> Answer {
    reply.raft(api.service.applied(), api.service.leadership()).empty(StatusCode::NO_CONTENT)
}

/// Adds a member, or changes the URLs of one. What cannot be an address is refused before anybody hears of it:
/// raftexample replicated a URL with a trailing slash, and no node ever started again.
async fn add(api: &Api, id: &[u8], query: Option<&str>, body: &mut Incoming) -> Result<(), Refusal> {
    target::no_parameters(query)?;
    let id = member_id(id, "POST /{id} adds the member with that numeric ID")?;
    let value = body::read(api, body).await?;
    let urls = addresses(&value.bytes)?;
    api.service.reconfigure(Change::Add(Member { id, urls })).await.map_err(Refusal::change)
}

/// The URLs in the body of a POST, `+` between them.
pub(super) fn addresses(body: &[u8]) -> Result<Vec<PeerUrl>, Refusal> {
    let text = std::str::from_utf8(body).map_err(|_| Refusal::bad_request("the body is no URL: not UTF-8"))?;
    let mut urls: Vec<PeerUrl> = Vec::new();
    for url in text.split('+') {
        let url = PeerUrl::parse(url).map_err(|error| Refusal::bad_request(format!("not applied: {error}")))?;
        if urls.contains(&url) {
            return Err(Refusal::bad_request(format!("not applied: {url} is named twice")));
        }
        if urls.len() == URLS_MAX {
            return Err(Refusal::bad_request(format!("not applied: a member has at most {URLS_MAX} URLs")));
        }
        urls.push(url);
    }
    Ok(urls)
}

async fn remove(api: &Api, id: &[u8], query: Option<&str>) -> Result<(), Refusal> {
    target::no_parameters(query)?;
    let id = member_id(
        id,
        "DELETE /{id} removes the member with that numeric ID; keys are deleted through /api/v1/kv/ (to come)",
    )?;
    api.service.reconfigure(Change::Remove(id)).await.map_err(Refusal::change)
}

pub(super) fn member_id(id: &[u8], usage: &'static str) -> Result<u64, Refusal> {
    let digits = id.iter().all(u8::is_ascii_digit);
    match std::str::from_utf8(id).ok().filter(|_| digits).and_then(|id| id.parse::<u64>().ok()) {
        Some(0) => Err(Refusal::bad_request("not applied: ID 0 means nobody; IDs start at 1")),
        Some(id) => Ok(id),
        None => Err(Refusal::bad_request(usage)),
    }
}
