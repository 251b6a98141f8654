//! What must hold of what peers send, whatever bytes it is: frames, forwarded proposals, the headers of a handshake.
//! Called by `crate::fuzzing`; not in any binary that ships.

use bytes::{Bytes, BytesMut};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request};
use raft::eraftpb::Message;

use super::frame::{self, Decoder, FRAME_OVERHEAD_BYTES, Frame, FrameError, KEEP_ALIVE, decode_one};
use super::handshake::{Caller, Identity, Life, PROPOSE, check_introduction, introduction, refusal};
use super::propose::{decode_outcomes, decode_proposals, encode_outcomes, encode_proposals};

const LIFE: Life = Life { nonce: 0xabc, boot: 7 };

/// Any bytes as a frame, as the message in a frame with a right checksum, and as a stream in pieces.
pub fn frame(bytes: &[u8]) {
    one(bytes);
    one(&sealed(bytes));
    let (cut, bytes) = bytes.split_at(bytes.len().min(4));
    stream(bytes, cut);
    // Whole frames with keep-alives between them come out of the pieces, and nothing else does.
    if let Ok(found) = decode_one(&sealed(bytes)) {
        let whole = [&KEEP_ALIVE[..], &sealed(bytes), &KEEP_ALIVE[..], &sealed(bytes)].concat();
        assert_eq!(stream(&whole, cut), (vec![found.clone(), found], None));
    }
}

fn one(bytes: &[u8]) {
    let Ok(found) = decode_one(bytes) else { return };
    let mut again = BytesMut::new();
    frame::encode(&mut again, found.boot, found.sequence, &found.message);
    // As told, and not as held: fields that no version knows may be held in two ways, and nobody reads them.
    let told = |frame: &Result<Frame, FrameError>| format!("{frame:?}");
    assert_eq!(told(&decode_one(&again)), told(&Ok(found)), "what was read is written again");
}

/// What comes out of a stream that arrives in pieces of these lengths, over and over.
fn stream(mut bytes: &[u8], cut: &[u8]) -> (Vec<Frame>, Option<FrameError>) {
    let (mut decoder, mut frames) = (Decoder::default(), Vec::new());
    let cut = if cut.is_empty() { &[0] } else { cut };
    for len in cut.iter().cycle() {
        let (piece, rest) = bytes.split_at(bytes.len().min(1 + usize::from(*len)));
        decoder.push(Bytes::copy_from_slice(piece));
        loop {
            match decoder.next() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
        bytes = rest;
        if bytes.is_empty() {
            break;
        }
    }
    (frames, None)
}

/// A frame of start 7, sequence 9, with that in the place of its message.
fn sealed(message: &[u8]) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    frame::encode(&mut bytes, 7, 9, &Message::default());
    let mut bytes = bytes.to_vec();
    bytes.extend_from_slice(message);
    bytes[..8].copy_from_slice(&((FRAME_OVERHEAD_BYTES - 8 + message.len()) as u64).to_be_bytes());
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes[8..24]), message);
    bytes[24..28].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

/// Any bytes as forwarded proposals, and as the answer to them.
pub fn proposals(bytes: &[u8]) {
    if let Some(proposals) = decode_proposals(bytes) {
        assert_eq!(encode_proposals(&proposals), bytes);
    }
    if let Some(outcomes) = decode_outcomes(bytes) {
        assert_eq!(encode_outcomes(&outcomes), bytes);
    }
}

/// Any bytes as the headers of a request or a response, `name: value` in each line, with the query in the first.
pub fn handshake(bytes: &[u8]) {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let query = lines.next().unwrap_or_default();
    let identity = Identity::new(1, 0xc1, LIFE, &[]);
    let mut headers = HeaderMap::new();
    for line in lines.take(100) {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let (name, value) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default().trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            headers.insert(name, value);
        }
    }
    if let Ok(caller) = identity.check_request(&headers) {
        let Caller { id, life, urls } = &caller;
        let again = Identity::new(*id, 0xc1, *life, urls).request(Method::POST, PROPOSE, 1, Bytes::new());
        assert_eq!(identity.check_request(again.headers()).as_ref(), Ok(&caller));
    }
    if let Ok(responder) = identity.check_response(&headers, 2) {
        let mut again = HeaderMap::new();
        Identity::new(2, 0xc1, responder.life, &[]).sign_response(&mut again, responder.leader);
        assert_eq!(identity.check_response(&again, 2), Ok(responder));
    }
    if let Some(refusal) = refusal(&headers) {
        assert_eq!(refusal.token().as_bytes(), headers[super::handshake::REFUSAL].as_bytes());
    }
    let mut request = Request::new(());
    *request.headers_mut() = headers;
    let target = [b"/raft/cluster?", query].concat();
    if let Ok(uri) = target.as_slice().try_into() {
        *request.uri_mut() = uri;
        if let Ok((id, urls)) = check_introduction(&request) {
            assert_eq!(check_introduction(&introduction(id, &urls)).ok(), Some((id, urls)));
        }
    }
}

/// Inputs to begin with, made by the encoders themselves: of [`frame`], [`proposals`], [`handshake`].
#[cfg(test)]
pub fn seeds() -> [Vec<Vec<u8>>; 3] {
    use protobuf::Message as _;
    use raft::eraftpb::{Entry, MessageType};

    use super::propose::Position;
    use crate::channel::{Rejection, RequestId};
    use crate::cluster::PeerUrl;

    let mut message = Message { from: 2, to: 1, term: 3, index: 4, log_term: 3, commit: 4, ..Message::default() };
    message.set_msg_type(MessageType::MsgAppend);
    message.entries = (5..8).map(|index| Entry { term: 3, index, data: "data".into(), ..Entry::default() }).collect();
    let append = message.write_to_bytes().unwrap();
    message.entries.clear();
    message.set_msg_type(MessageType::MsgSnapshot);
    message.mut_snapshot().mut_metadata().set_conf_state((vec![1, 2], vec![3]).into());
    let snapshot = message.write_to_bytes().unwrap();
    let frames = vec![[&[1, 2, 3, 4], &append[..]].concat(), sealed(&append), snapshot];

    let proposals = [1, 2].map(|counter| (RequestId { node: 2, boot: 1, counter }, Bytes::from_static(b"command")));
    let outcomes = [Ok(Position { term: 3, index: 4 }), Err(Rejection::NoLeader), Err(Rejection::NotUnderstood)];
    let bodies = vec![encode_proposals(&proposals).to_vec(), encode_outcomes(&outcomes).to_vec()];

    let urls = [PeerUrl::parse("http://a:1").unwrap(), PeerUrl::parse("http://[::1]:2").unwrap()];
    let asks = Identity::new(2, 0xc1, LIFE, &urls).request(Method::POST, PROPOSE, 1, Bytes::new());
    let mut says = HeaderMap::new();
    Identity::new(2, 0xc1, LIFE, &[]).sign_response(&mut says, 1);
    says.insert(super::handshake::REFUSAL, HeaderValue::from_static("removed"));
    let text = |query: &str, headers: &HeaderMap| {
        let lines = headers.iter().map(|(name, value)| format!("\n{name}: {}", value.to_str().unwrap()));
        (query.to_owned() + &lines.collect::<String>()).into_bytes()
    };
    let headers = vec![text("", asks.headers()), text("", &says), text("id=2", introduction(2, &urls).headers())];
    [frames, bodies, headers]
}
