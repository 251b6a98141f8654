//! Reads HTTP/1.1 answers out of a buffer, pipelined or in pieces. What comes from a server is not trusted: anything
//! that is no answer is an error, never a panic.

use super::tally::{Answered, Failure};
use super::{Protocol, source::Kind};

/// raftkv sends a dozen headers, a Go server few more.
const HEADERS_MAX: usize = 64;
/// The largest answer that is read: a value of 4 MiB in base64, and its head.
pub const BYTES_MAX: usize = 16 << 20;

/// One answer that is complete in the buffer.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    body_at: usize,
    /// The server closes the connection behind it.
    pub closes: bool,
    /// Bytes of the buffer that it takes.
    pub length: usize,
}

/// The answer at the start of `input`; none while it is not complete.
pub fn parse(input: &[u8]) -> Result<Option<Answer>, Failure> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let head_length = match head.parse(input) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if input.len() < BYTES_MAX => return Ok(None),
        Ok(httparse::Status::Partial) | Err(_) => return Err(Failure::Malformed),
    };
    let status = head.code.ok_or(Failure::Malformed)?;
    let (mut content_length, mut chunked, mut closes) = (None, false, head.version == Some(0));
    for header in head.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            content_length = Some(decimal(header.value).ok_or(Failure::Malformed)?);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = header.value.eq_ignore_ascii_case(b"chunked");
        } else if header.name.eq_ignore_ascii_case("connection") {
            closes |= header.value.eq_ignore_ascii_case(b"close");
        }
    }
    let body = &input[head_length..];
    let body_length = match (status, content_length) {
        (100..200 | 204 | 304, _) => Some(0),
        _ if chunked => chunked_length(body)?,
        (_, Some(length)) if length <= BYTES_MAX => (body.len() >= length).then_some(length),
        // A body that ends with the connection is nothing that a benchmark should meet.
        (_, Some(_) | None) => return Err(Failure::Malformed),
    };
    Ok(body_length.map(|length| Answer { status, body_at: head_length, closes, length: head_length + length }))
}

impl Answer {
    /// What it means to the operation that it answers; `input` is what it was parsed from.
    pub fn judge(&self, protocol: Protocol, kind: Kind, input: &[u8]) -> Result<Answered, Failure> {
        match (protocol, kind, self.status) {
            (Protocol::Http, Kind::Write, 204) | (Protocol::Plain, Kind::Write, 200..300) => Ok(Answered::Written),
            (Protocol::Http, Kind::Read, 200) | (Protocol::Plain, Kind::Read, 200..300) => Ok(Answered::Found),
            (Protocol::Http, Kind::Read, 404) => Ok(Answered::Missing),
            (Protocol::EtcdJson, Kind::Write, 200) => Ok(Answered::Written),
            (Protocol::EtcdJson, Kind::Read, 200) if has_kvs(&input[self.body_at..self.length]) => Ok(Answered::Found),
            (Protocol::EtcdJson, Kind::Read, 200) => Ok(Answered::Missing),
            (Protocol::Http | Protocol::Plain | Protocol::EtcdJson | Protocol::Etcd, _, status) => {
                Err(Failure::Status(status))
            }
        }
    }
}

/// Bytes of a chunked body up to its end; none while it is not complete.
fn chunked_length(body: &[u8]) -> Result<Option<usize>, Failure> {
    let mut at = 0;
    loop {
        let (start, size) = match httparse::parse_chunk_size(&body[at..]) {
            Ok(httparse::Status::Complete(found)) => found,
            Ok(httparse::Status::Partial) if body.len() < BYTES_MAX => return Ok(None),
            Ok(httparse::Status::Partial) | Err(_) => return Err(Failure::Malformed),
        };
        let size = usize::try_from(size).ok().filter(|size| *size <= BYTES_MAX).ok_or(Failure::Malformed)?;
        // No server in question sends trailers: the last chunk is empty, and each ends with a line's end.
        let end = at + start + size;
        match body.get(end..end + 2) {
            None if end > BYTES_MAX => return Err(Failure::Malformed),
            None => return Ok(None),
            Some(b"\r\n") if size == 0 => return Ok(Some(end + 2)),
            Some(b"\r\n") => at = end + 2,
            Some(_) => return Err(Failure::Malformed),
        }
    }
}

fn decimal(text: &[u8]) -> Option<usize> {
    let digits = text.iter().all(u8::is_ascii_digit);
    digits.then(|| std::str::from_utf8(text).ok()?.parse().ok()).flatten()
}

/// etcd leaves the field out where no key was found.
fn has_kvs(body: &[u8]) -> bool {
    body.windows(6).any(|window| window == b"\"kvs\":")
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITTEN: &[u8] = b"HTTP/1.1 204 No Content\r\nx-raft-index: 7\r\n\r\n";
    const FOUND: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
    const CHUNKED: &[u8] =
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n6;x=y\r\n{\"kvs\"\r\n1\r\n:\r\n0\r\n\r\n";

    /// Whatever the pieces are in which they come.
    #[test]
    fn pipelined_answers_come_out_one_by_one() {
        let all = [WRITTEN, FOUND, CHUNKED, WRITTEN].concat();
        let (mut input, mut statuses) = (Vec::new(), Vec::new());
        for byte in all {
            input.push(byte);
            while let Some(answer) = parse(&input).unwrap() {
                statuses.push((answer.status, answer.length, answer.closes));
                input.drain(..answer.length);
            }
        }
        assert_eq!(input, b"");
        assert_eq!(
            statuses,
            [
                (204, WRITTEN.len(), false),
                (200, FOUND.len(), false),
                (200, CHUNKED.len(), true),
                (204, WRITTEN.len(), false)
            ]
        );
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for text in [
            "SSH-2.0-OpenSSH\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        ] {
            assert_eq!(parse(text.as_bytes()), Err(Failure::Malformed), "{text}");
        }
    }

    #[test]
    fn an_answer_that_never_ends_is_refused() {
        let endless = |start: &str| [start.as_bytes(), &vec![b'x'; BYTES_MAX]].concat();
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        for start in ["HTTP/1.1 200 OK\r\nA: ".to_owned(), format!("{head}1;"), format!("{head}1\r\na\r\n2;")] {
            assert_eq!(parse(&endless(&start)), Err(Failure::Malformed), "{start}");
            assert_eq!(parse(&endless(&start)[..1000]), Ok(None), "{start}");
        }
    }

    #[test]
    fn each_protocol_has_its_successes() {
        let judge = |protocol, kind, status, has_kvs| {
            let body: &[u8] = if has_kvs { b"{\"kvs\":[]}" } else { b"{\"header\":{}}" };
            Answer { status, body_at: 0, closes: false, length: body.len() }.judge(protocol, kind, body)
        };
        assert_eq!(judge(Protocol::Http, Kind::Write, 204, false), Ok(Answered::Written));
        assert_eq!(judge(Protocol::Http, Kind::Write, 200, false), Err(Failure::Status(200)));
        assert_eq!(judge(Protocol::Http, Kind::Write, 404, false), Err(Failure::Status(404)));
        assert_eq!(judge(Protocol::Http, Kind::Read, 404, false), Ok(Answered::Missing));
        assert_eq!(judge(Protocol::Plain, Kind::Read, 404, false), Err(Failure::Status(404)));
        assert_eq!(judge(Protocol::Plain, Kind::Write, 201, false), Ok(Answered::Written));
        assert_eq!(judge(Protocol::EtcdJson, Kind::Read, 200, true), Ok(Answered::Found));
        assert_eq!(judge(Protocol::EtcdJson, Kind::Read, 200, false), Ok(Answered::Missing));
        assert_eq!(judge(Protocol::EtcdJson, Kind::Write, 503, false), Err(Failure::Status(503)));
    }
}
