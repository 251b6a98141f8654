//! Answers: what every one of them carries, and the one map from errors to statuses. A refusal is one line of plain
//! text that says whether anything was applied and, where it helps, what to do.

use std::borrow::Cow;
use std::fmt::Write;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderName};
use hyper::http::HeaderValue;
use hyper::{HeaderMap, Response, StatusCode};

use super::HEADER_BYTES_MAX;
use crate::channel::{ChangeFailure, Leadership, Rejection};
use crate::kv;

/// The body is always one piece; `socket` relies on it.
pub type Answer = Response<Full<Bytes>>;

pub const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
pub const CLOSE: HeaderValue = HeaderValue::from_static("close");
pub const BYTES: HeaderValue = HeaderValue::from_static("application/octet-stream");

static X_RAFT_INDEX: HeaderName = HeaderName::from_static("x-raft-index");
static X_RAFT_TERM: HeaderName = HeaderName::from_static("x-raft-term");
static X_RAFT_LEADER: HeaderName = HeaderName::from_static("x-raft-leader");

/// An answer in the making, in the header map of its request: hyper takes the map back, so that a connection at work
/// allocates none.
pub struct Reply {
    headers: HeaderMap,
}

impl Reply {
    pub fn new(mut headers: HeaderMap) -> Self {
        headers.clear();
        // Nothing stored here is shown as a page, and no cache may keep what is linearizable.
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        Reply { headers }
    }

    /// Index and term that the answer speaks of, and the leader that this member knows.
    pub fn raft(mut self, index: u64, leadership: Leadership) -> Self {
        self.headers.insert(&X_RAFT_INDEX, HeaderValue::from(index));
        self.headers.insert(&X_RAFT_TERM, HeaderValue::from(leadership.term));
        if leadership.leader != 0 {
            self.headers.insert(&X_RAFT_LEADER, HeaderValue::from(leadership.leader));
        }
        self
    }

    /// A key's modify revision.
    pub fn revision(self, revision: u64) -> Self {
        let tag = HeaderValue::try_from(format!("\"{revision}\"")).expect("digits in quotes are a header value");
        self.with(header::ETAG, tag)
    }

    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    pub fn empty(self, status: StatusCode) -> Answer {
        self.send(status, Bytes::new())
    }

    pub fn content(self, status: StatusCode, kind: HeaderValue, content: impl Into<Bytes>) -> Answer {
        self.with(header::CONTENT_TYPE, kind).send(status, content.into())
    }

    pub fn refusal(self, refusal: &Refusal) -> Answer {
        let mut reply = self;
        if let Some((name, value)) = refusal.extra.clone() {
            reply = reply.with(name, HeaderValue::from_static(value));
        }
        if refusal.closes {
            reply = reply.with(header::CONNECTION, CLOSE);
        }
        reply.content(refusal.status, TEXT, refusal.line())
    }

    fn send(self, status: StatusCode, content: Bytes) -> Answer {
        let mut answer = Response::new(Full::new(content));
        *answer.status_mut() = status;
        *answer.headers_mut() = self.headers;
        answer
    }
}

/// Why a request was not served.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    /// Without its line end.
    reason: Cow<'static, str>,
    extra: Option<(HeaderName, &'static str)>,
    closes: bool,
}

impl Refusal {
    pub fn new(status: StatusCode, reason: impl Into<Cow<'static, str>>) -> Self {
        Refusal { status, reason: reason.into(), extra: None, closes: false }
    }

    pub fn bad_request(reason: impl Into<Cow<'static, str>>) -> Self {
        Refusal::new(StatusCode::BAD_REQUEST, reason)
    }

    pub fn method(allow: &'static str) -> Self {
        let mut refusal = Refusal::new(StatusCode::METHOD_NOT_ALLOWED, format!("only {allow} are served here"));
        refusal.extra = Some((header::ALLOW, allow));
        refusal
    }

    pub fn large_headers() -> Self {
        let reason = format!("more than 100 headers, or more than {HEADER_BYTES_MAX} bytes of them");
        Refusal::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, reason)
    }

    pub fn long_target() -> Self {
        Refusal::new(StatusCode::URI_TOO_LONG, "the request target is too long for any key")
    }

    /// It may go better in a second.
    pub fn retry(mut self) -> Self {
        self.extra = Some((header::RETRY_AFTER, "1"));
        self
    }

    /// A write that the service did not do.
    pub fn write(error: kv::Error) -> Self {
        let hint = match error {
            kv::Error::NotApplied(Rejection::NoLeader | Rejection::Busy) => "; try again",
            kv::Error::NotApplied(Rejection::Stopping | Rejection::Behind) => "; try another member",
            kv::Error::NotApplied(Rejection::NotUnderstood) => "; upgrade all members first",
            kv::Error::NotApplied(Rejection::DiskFull) => "; make room on it, meanwhile reads go on",
            kv::Error::Unknown => "; read the key before writing it again",
            kv::Error::EmptyKey | kv::Error::KeyTooLong { .. } | kv::Error::ValueTooLarge { .. } => "",
        };
        Refusal::of(error, format!("{error}{hint}"))
    }

    /// A read that the service could not answer.
    pub fn read(error: kv::Error) -> Self {
        let reason = match error {
            kv::Error::NotApplied(rejection @ Rejection::NoLeader) => {
                format!("not read: {rejection}; try again, or ask for this member's own state with ?consistency=stale")
            }
            kv::Error::NotApplied(rejection) => format!("not read: {rejection}; try again"),
            other => other.to_string(),
        };
        Refusal::of(error, reason)
    }

    /// A change of the membership that was not made.
    pub fn change(failure: ChangeFailure) -> Self {
        let reason = failure.to_string();
        match failure {
            ChangeFailure::Invalid(_) => Refusal::bad_request(reason),
            ChangeFailure::Conflict(_) => Refusal::new(StatusCode::CONFLICT, reason),
            ChangeFailure::Rejected(rejection) => Refusal::of(kv::Error::NotApplied(rejection), reason),
            ChangeFailure::Unknown => Refusal::of(kv::Error::Unknown, reason),
        }
    }

    fn of(error: kv::Error, reason: String) -> Self {
        let refusal = Refusal::new(status(error), reason);
        if refusal.status == StatusCode::SERVICE_UNAVAILABLE { refusal.retry() } else { refusal }
    }

    /// Nothing behind this request can be read.
    pub fn close(mut self) -> Self {
        self.closes = true;
        self
    }

    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The body.
    pub fn line(&self) -> String {
        format!("{}\n", self.reason)
    }

    /// The whole answer, for a connection without a request.
    pub fn raw(&self) -> String {
        let line = self.line();
        let mut raw = format!(
            "HTTP/1.1 {}\r\ncontent-type: text/plain; charset=utf-8\r\nx-content-type-options: nosniff\r\n\
             cache-control: no-store\r\nconnection: close\r\ncontent-length: {}\r\n",
            self.status,
            line.len()
        );
        if let Some((name, value)) = &self.extra {
            write!(raw, "{name}: {value}\r\n").expect("a String takes any text");
        }
        raw + "\r\n" + &line
    }
}

fn status(error: kv::Error) -> StatusCode {
    match error {
        kv::Error::EmptyKey => StatusCode::BAD_REQUEST,
        kv::Error::KeyTooLong { .. } => StatusCode::URI_TOO_LONG,
        kv::Error::ValueTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        kv::Error::NotApplied(
            Rejection::NoLeader | Rejection::Busy | Rejection::Stopping | Rejection::Behind | Rejection::NotUnderstood,
        ) => StatusCode::SERVICE_UNAVAILABLE,
        kv::Error::NotApplied(Rejection::DiskFull) => StatusCode::INSUFFICIENT_STORAGE,
        kv::Error::Unknown => StatusCode::GATEWAY_TIMEOUT,
    }
}
