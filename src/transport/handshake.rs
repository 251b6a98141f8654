//! Who speaks to whom: the headers that open every exchange between peers, and the words of refusal. Pure.
//!
//! Version first, then form, cluster and receiver: nothing that a stranger's cluster says is believed, not even that
//! a member is removed.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode};

use super::frame::FrameError;
use crate::cluster::{PeerUrl, URLS_MAX};

/// Version of the peer protocol: headers, endpoints, the frame's byte map and the proposals' encoding.
pub const VERSION: u64 = 2;

pub const PIPELINE: &str = "/raft";
pub const STREAM: &str = "/raft/stream/message";
pub const PROPOSE: &str = "/raft/propose";
pub const SNAPSHOT: &str = "/raft/snapshot";
pub const RECONFIGURE: &str = "/raft/reconfigure";
pub const INTRODUCE: &str = "/raft/cluster";
pub const PROBING: &str = "/raft/probing";

const FROM: HeaderName = HeaderName::from_static("x-raft-from");
const TO: HeaderName = HeaderName::from_static("x-raft-to");
const CLUSTER: HeaderName = HeaderName::from_static("x-raft-cluster-id");
const PROTOCOL: HeaderName = HeaderName::from_static("x-raft-version");
const NONCE: HeaderName = HeaderName::from_static("x-raft-nonce");
const BOOT: HeaderName = HeaderName::from_static("x-raft-boot");
const URLS: HeaderName = HeaderName::from_static("x-raft-peer-urls");
const LEADER: HeaderName = HeaderName::from_static("x-raft-leader");
pub const REFUSAL: HeaderName = HeaderName::from_static("x-raft-refusal");

/// Why a peer does not deal with another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("they belong to different clusters")]
    ClusterMismatch,
    #[error("another member answers at that address")]
    WrongReceiver,
    #[error("it speaks another version of the peer protocol")]
    Version,
    #[error("this ID was used with another data directory")]
    OtherNonce,
    #[error("a later start of the same member was met: its data directory was copied, or an old process speaks late")]
    Superseded,
    #[error("the sender is not a member, as far as it knows")]
    NotAMember,
    #[error("the sender was removed from the cluster")]
    Removed,
}

impl Refusal {
    const ALL: [Refusal; 7] = [
        Refusal::ClusterMismatch,
        Refusal::WrongReceiver,
        Refusal::Version,
        Refusal::OtherNonce,
        Refusal::Superseded,
        Refusal::NotAMember,
        Refusal::Removed,
    ];

    /// The value of `X-Raft-Refusal`.
    pub fn token(self) -> &'static str {
        match self {
            Refusal::ClusterMismatch => "cluster-mismatch",
            Refusal::WrongReceiver => "wrong-receiver",
            Refusal::Version => "version",
            Refusal::OtherNonce => "other-nonce",
            Refusal::Superseded => "superseded",
            Refusal::NotAMember => "not-a-member",
            Refusal::Removed => "removed",
        }
    }
}

/// Everything but success that a peer may be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("no such endpoint")]
    NotFound,
    #[error("only {0} is allowed here")]
    Method(Method),
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("malformed: {0}")]
    Malformed(&'static str),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("the body is too large")]
    TooLarge,
    /// A joiner that the members do not know, and why.
    #[error("{0}")]
    NotIntroduced(String),
    #[error("the snapshot was damaged on its way")]
    SnapshotDamaged,
    #[error("the file holds another snapshot than the message says")]
    SnapshotMismatch,
    #[error("the snapshot could not be stored")]
    SnapshotNotStored,
    #[error("too busy, try again")]
    Busy,
    #[error("no answer in time: it may have been taken")]
    Unanswered,
}

impl Denied {
    pub fn token(&self) -> &'static str {
        match self {
            Denied::NotFound => "not-found",
            Denied::Method(_) => "method",
            Denied::Refused(refusal) => refusal.token(),
            Denied::Malformed(_) => "malformed",
            Denied::Frame(error) => error.token(),
            Denied::TooLarge => "too-large",
            Denied::NotIntroduced(_) => Refusal::NotAMember.token(),
            Denied::SnapshotDamaged => "snapshot-damaged",
            Denied::SnapshotMismatch => "snapshot-mismatch",
            Denied::SnapshotNotStored => "snapshot-not-stored",
            Denied::Busy => "busy",
            Denied::Unanswered => "unanswered",
        }
    }

    pub fn status(&self) -> StatusCode {
        match self {
            Denied::NotFound => StatusCode::NOT_FOUND,
            Denied::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            Denied::Refused(
                Refusal::ClusterMismatch
                | Refusal::WrongReceiver
                | Refusal::Version
                | Refusal::OtherNonce
                | Refusal::Superseded,
            ) => StatusCode::PRECONDITION_FAILED,
            Denied::Refused(Refusal::NotAMember) | Denied::NotIntroduced(_) => StatusCode::FORBIDDEN,
            Denied::Refused(Refusal::Removed) => StatusCode::GONE,
            Denied::Frame(FrameError::TooLong(_)) | Denied::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Denied::Malformed(_) | Denied::Frame(_) | Denied::SnapshotDamaged | Denied::SnapshotMismatch => {
                StatusCode::BAD_REQUEST
            }
            Denied::SnapshotNotStored => StatusCode::INTERNAL_SERVER_ERROR,
            Denied::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Denied::Unanswered => StatusCode::GATEWAY_TIMEOUT,
        }
    }
}

/// The sender of a request, after cluster, receiver and version matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub id: u64,
    pub life: Life,
    pub urls: Vec<PeerUrl>,
}

/// Which data directory a member runs on, and which of its starts this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// Of the directory. Copies have the same.
    pub nonce: u64,
    /// Rises with each start on the directory.
    pub boot: u64,
}

/// The sender of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Responder {
    pub life: Life,
    /// The leader it knows, 0 for none.
    pub leader: u64,
}

/// What this member says of itself.
pub struct Identity {
    pub id: u64,
    pub cluster: u64,
    life: Life,
    urls: HeaderValue,
}

impl Identity {
    pub fn new(id: u64, cluster: u64, life: Life, urls: &[PeerUrl]) -> Self {
        Identity { id, cluster, life, urls: joined(urls) }
    }

    /// A request to member `to` that carries all headers.
    pub fn request(&self, method: Method, path: &'static str, to: u64, body: Bytes) -> Request<Full<Bytes>> {
        self.request_with(method, path, to, Full::new(body))
    }

    /// The same, with a body of another kind.
    pub fn request_with<B>(&self, method: Method, path: &'static str, to: u64, body: B) -> Request<B> {
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = hyper::Uri::from_static(path);
        let headers = request.headers_mut();
        // HTTP/1.1 wants one; nobody looks at it, for a member may be reached by any name.
        headers.insert(HOST, HeaderValue::from_static("raft"));
        self.sign(headers);
        headers.insert(TO, to.into());
        headers.insert(PROTOCOL, VERSION.into());
        headers.insert(URLS, self.urls.clone());
        request
    }

    /// Names this member in the headers of a response, and the leader it knows.
    pub fn sign_response(&self, headers: &mut HeaderMap, leader: u64) {
        self.sign(headers);
        headers.insert(LEADER, leader.into());
    }

    fn sign(&self, headers: &mut HeaderMap) {
        headers.insert(FROM, self.id.into());
        headers.insert(CLUSTER, hex(self.cluster));
        headers.insert(NONCE, hex(self.life.nonce));
        headers.insert(BOOT, self.life.boot.into());
    }

    /// Checks all of a request's headers but the nonce, which takes the node to judge, and the boot, which takes memory.
    pub fn check_request(&self, headers: &HeaderMap) -> Result<Caller, Denied> {
        if decimal(headers, &PROTOCOL).ok_or(Denied::Malformed("X-Raft-Version"))? != VERSION {
            return Err(Refusal::Version.into());
        }
        let id = decimal(headers, &FROM).filter(|id| *id != 0).ok_or(Denied::Malformed("X-Raft-From"))?;
        let to = decimal(headers, &TO).ok_or(Denied::Malformed("X-Raft-To"))?;
        let cluster = from_hex(headers, &CLUSTER).ok_or(Denied::Malformed("X-Raft-Cluster-ID"))?;
        let nonce = from_hex(headers, &NONCE).ok_or(Denied::Malformed("X-Raft-Nonce"))?;
        let boot = decimal(headers, &BOOT).ok_or(Denied::Malformed("X-Raft-Boot"))?;
        let urls = urls(headers).ok_or(Denied::Malformed("X-Raft-Peer-URLs"))?;
        if cluster != self.cluster {
            return Err(Refusal::ClusterMismatch.into());
        }
        if to != self.id {
            return Err(Refusal::WrongReceiver.into());
        }
        if id == self.id {
            return Err(Denied::Malformed("X-Raft-From is the receiver"));
        }
        Ok(Caller { id, life: Life { nonce, boot }, urls })
    }

    /// Checks that a response comes from member `peer` of this cluster. The error says what was found instead.
    pub fn check_response(&self, headers: &HeaderMap, peer: u64) -> Result<Responder, Refusal> {
        if from_hex(headers, &CLUSTER) != Some(self.cluster) {
            return Err(Refusal::ClusterMismatch);
        }
        match (decimal(headers, &FROM), from_hex(headers, &NONCE), decimal(headers, &BOOT)) {
            (Some(from), Some(nonce), Some(boot)) if from == peer => {
                Ok(Responder { life: Life { nonce, boot }, leader: decimal(headers, &LEADER).unwrap_or(0) })
            }
            _ => Err(Refusal::WrongReceiver),
        }
    }
}

/// Member `id` asks where it belongs. It cannot name its cluster: that is what it asks for.
pub fn introduction(id: u64, own_urls: &[PeerUrl]) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::default());
    *request.uri_mut() = format!("{INTRODUCE}?id={id}").parse().expect("a path and a number make a URI");
    let headers = request.headers_mut();
    headers.insert(HOST, HeaderValue::from_static("raft"));
    headers.insert(PROTOCOL, VERSION.into());
    headers.insert(URLS, joined(own_urls));
    request
}

/// Who asks with an [`introduction`]: its ID and its URLs.
pub fn check_introduction<B>(request: &Request<B>) -> Result<(u64, Vec<PeerUrl>), Denied> {
    let headers = request.headers();
    if decimal(headers, &PROTOCOL).ok_or(Denied::Malformed("X-Raft-Version"))? != VERSION {
        return Err(Refusal::Version.into());
    }
    let id = request.uri().query().and_then(|query| query.strip_prefix("id=")).and_then(number);
    let id = id.filter(|id| *id != 0).ok_or(Denied::Malformed("the query is not id=N"))?;
    Ok((id, urls(headers).ok_or(Denied::Malformed("X-Raft-Peer-URLs"))?))
}

/// The refusal that a response names, if it is one that a member makes of another.
pub fn refusal(headers: &HeaderMap) -> Option<Refusal> {
    let token = headers.get(REFUSAL)?;
    Refusal::ALL.into_iter().find(|refusal| token == refusal.token())
}

fn hex(value: u64) -> HeaderValue {
    HeaderValue::try_from(format!("{value:016x}")).expect("hex digits are ASCII")
}

fn from_hex(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    let text = headers.get(name)?.to_str().ok()?;
    let plain = text.len() == 16 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(text, 16).ok())?
}

fn decimal(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    number(headers.get(name)?.to_str().ok()?)
}

fn number(text: &str) -> Option<u64> {
    text.bytes().all(|digit| digit.is_ascii_digit()).then(|| text.parse().ok())?
}

fn joined(urls: &[PeerUrl]) -> HeaderValue {
    let urls = urls.iter().map(PeerUrl::to_string).collect::<Vec<_>>().join("+");
    HeaderValue::try_from(urls).expect("a peer URL is ASCII")
}

fn urls(headers: &HeaderMap) -> Option<Vec<PeerUrl>> {
    let text = headers.get(URLS)?.to_str().ok()?;
    let urls: Vec<_> = text.split('+').map(PeerUrl::parse).take(URLS_MAX + 1).collect::<Result<_, _>>().ok()?;
    (urls.len() <= URLS_MAX).then_some(urls)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Life = Life { nonce: 0xabc, boot: 7 };

    fn identity(id: u64, cluster: u64) -> Identity {
        Identity::new(
            id,
            cluster,
            LIFE,
            &[PeerUrl::parse("http://a:1").unwrap(), PeerUrl::parse("http://b:2").unwrap()],
        )
    }

    fn request(from: &Identity, to: u64) -> HeaderMap {
        from.request(Method::GET, STREAM, to, Bytes::new()).headers().clone()
    }

    #[test]
    fn a_caller_is_who_it_says() {
        let caller = identity(2, 9).check_request(&request(&identity(1, 9), 2)).unwrap();
        assert_eq!((caller.id, caller.life, caller.urls.len()), (1, LIFE, 2));
    }

    #[test]
    fn a_mismatch_is_refused_before_what_is_behind_it() {
        let check = |headers: &HeaderMap| identity(2, 9).check_request(headers).unwrap_err();
        let mut headers = request(&identity(1, 8), 3);
        assert_eq!(check(&headers), Refusal::ClusterMismatch.into(), "receiver differs too");
        headers.insert(PROTOCOL, (VERSION + 1).into());
        assert_eq!(check(&headers), Refusal::Version.into());
        assert_eq!(check(&request(&identity(1, 9), 3)), Refusal::WrongReceiver.into());
        assert!(matches!(check(&request(&identity(2, 9), 2)), Denied::Malformed(_)));
    }

    #[test]
    fn a_missing_or_malformed_header_is_named() {
        for (name, bad) in [
            (FROM, "0"),
            (TO, "+2"),
            (CLUSTER, "9"),
            (PROTOCOL, "one"),
            (NONCE, "+00000000000000a"),
            (BOOT, "-1"),
            (URLS, "http://a:1/"),
            (FROM, "18446744073709551616"),
        ] {
            let mut headers = request(&identity(1, 9), 2);
            headers.insert(&name, HeaderValue::from_static(bad));
            let denied = identity(2, 9).check_request(&headers).unwrap_err();
            let Denied::Malformed(found) = denied else { panic!("{name}: {denied}") };
            assert!(found.eq_ignore_ascii_case(name.as_str()), "{found}");
            headers.remove(&name);
            assert_eq!(identity(2, 9).check_request(&headers), Err(denied));
        }
    }

    /// A stranger at a peer's old address must not be able to stop this process.
    #[test]
    fn a_response_is_believed_from_the_peer_only() {
        let mut headers = HeaderMap::new();
        identity(2, 9).sign_response(&mut headers, 3);
        let us = identity(1, 9);
        assert_eq!(us.check_response(&headers, 2), Ok(Responder { life: LIFE, leader: 3 }));
        assert_eq!(us.check_response(&headers, 4), Err(Refusal::WrongReceiver));
        assert_eq!(identity(1, 8).check_response(&headers, 2), Err(Refusal::ClusterMismatch));
        assert_eq!(us.check_response(&HeaderMap::new(), 2), Err(Refusal::ClusterMismatch));
        headers.remove(BOOT);
        assert_eq!(us.check_response(&headers, 2), Err(Refusal::WrongReceiver));
    }

    #[test]
    fn a_refusal_survives_its_token() {
        for refusal in Refusal::ALL {
            let headers = HeaderMap::from_iter([(REFUSAL, HeaderValue::from_static(refusal.token()))]);
            assert_eq!(super::refusal(&headers), Some(refusal));
        }
    }
}
